"""Who feeds which microbatch, and which replicas a hop may go to. Pure; the same answer everywhere.

Owns: weighted rendezvous hashing (Schindelhauer & Schomaker 2005; score `-w / ln(u)`), used three times:
feeders own numbers, routers draw candidates, stages order their stewards. Must not know: addresses,
load, time. Nobody leases anything and no authority hands anything out, so it works the same with and
without the coordinator.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from hashlib import blake2b

from protocol.ids import PeerId

CANDIDATES = 3  # the router's choice: enough to avoid a busy replica, few enough to be auditable


def rendezvous(key: str, weights: Mapping[PeerId, float]) -> tuple[PeerId, ...]:
    """Order peers by their claim on `key`, strongest first. Peers of weight 0 come last, never dropped.

    A peer that leaves changes nobody else's order: only its own keys move.
    """
    return tuple(sorted(weights, key=lambda peer: (-_score(key, peer, weights[peer]), peer)))


def owners(round_seed: str, numbers: Iterable[int], feeders: Mapping[PeerId, float]) -> dict[int, PeerId]:
    """Assign every microbatch number to the feeder with the strongest claim.

    `feeders` are the stage-0 replicas named in the last commit, weighted by what they finished in it.
    """
    return {number: rendezvous(f"{round_seed}/{number}", feeders)[0] for number in numbers}


def candidates(round_seed: str, number: int, stage: int, replicas: Mapping[PeerId, float]) -> tuple[PeerId, ...]:
    """Order a stage's replicas for one microbatch; the router picks among the first `CANDIDATES`, then the next."""
    return rendezvous(f"{round_seed}/{number}/{stage}", replicas)


def _score(key: str, peer: PeerId, weight: float) -> float:
    if weight <= 0:
        return 0.0
    word = blake2b(peer.encode(), key=blake2b(key.encode(), digest_size=32).digest(), digest_size=8).digest()
    uniform = (int.from_bytes(word, "big") + 0.5) / 2**64
    return -weight / math.log(uniform)
