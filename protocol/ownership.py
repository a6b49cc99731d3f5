"""Who feeds which microbatch, and which replicas a hop may go to. Pure; the same answer everywhere.

Owns: dealing a round's numbers out to feeders by their speed, and weighted rendezvous hashing (Schindelhauer &
Schomaker 2005; score `-w / ln(u)`), by which numbers pass to others, routers draw candidates, and stages order their
stewards. Must not know: addresses, load, time. Nobody leases anything and no authority hands anything out, so it works
the same with and without the coordinator.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterable, Mapping
from hashlib import blake2b

from protocol.ids import PeerId

SPARE = 0.5
CANDIDATES = 3  # the router's choice: enough to avoid a busy replica, few enough to be auditable


def rendezvous(key: str, weights: Mapping[PeerId, float]) -> tuple[PeerId, ...]:
    """Order peers by their claim on `key`, strongest first. Peers of weight 0 come last, never dropped.

    A peer that leaves changes nobody else's order: only its own keys move.
    """
    return tuple(sorted(weights, key=lambda peer: (-_score(key, peer, weights[peer]), peer)))


def owners(round_seed: str, numbers: Iterable[int], feeders: Mapping[PeerId, float]) -> dict[int, PeerId]:
    """Assign every microbatch number to a feeder, so that all are done at about the same time.

    `feeders` are the stage-0 replicas that the last commit seats, weighted by their speed. Each number in turn goes to
    who would have finished it first, and half a number more: a slow one that is a little late with its last number
    makes everybody wait. Which numbers these are is drawn by hash, or one feeder would always have the same places in
    the text.
    """
    least = max(feeders.values()) / 1e9 or 1.0
    weights = {peer: max(weight, least) for peer, weight in feeders.items()}
    due = [((1 + SPARE) / weight, peer, 1) for peer, weight in sorted(weights.items())]
    heapq.heapify(due)
    found = {}
    for number in sorted(numbers, key=lambda number: _word(round_seed, str(number))):
        _, peer, count = due[0]
        found[number] = peer
        heapq.heapreplace(due, ((count + 1 + SPARE) / weights[peer], peer, count + 1))
    return found


def candidates(round_seed: str, number: int, stage: int, replicas: Mapping[PeerId, float]) -> tuple[PeerId, ...]:
    """Order a stage's replicas for one microbatch; the router picks among the first `CANDIDATES`, then the next."""
    return rendezvous(f"{round_seed}/{number}/{stage}", replicas)


def _score(key: str, peer: PeerId, weight: float) -> float:
    if weight <= 0:
        return 0.0
    uniform = (int.from_bytes(_word(key, peer), "big") + 0.5) / 2**64
    return -weight / math.log(uniform)


def _word(key: str, name: str) -> bytes:
    return blake2b(name.encode(), key=blake2b(key.encode(), digest_size=32).digest(), digest_size=8).digest()
