"""Who recomputes a piece of work.

Owns: who can, has time, and is trusted; and when it is left to a watcher of the organiser's. Must not know: what is
drawn (`office.py`), how a case is judged (`court.py`).
"""

from __future__ import annotations

import random
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Protocol

from coordinator.audit.court import Case
from coordinator.carries import Carry
from coordinator.registry import LivePeer, Registry
from protocol.encoding import FP16_BLOCK
from protocol.ids import PeerId
from protocol.manifest import Manifest

MAX_WAITING, MAX_SUMS_WAITING = 4, 2  # audits of microbatches and of contributions that wait at one auditor
MAX_AT_WATCHER = 2  # it may be slow, and what waits too long is no use
PREFIX, WHOLE_RATE = 32, 1 / 4
"""Tokens of every sequence that a watcher looks at, on a CPU as it may be; and how often it does all of them."""


class Load(Protocol):
    """Tells how many audits wait for a peer: of contributions, or of microbatches."""

    def __call__(self, peer: PeerId, *, is_sum: bool) -> int: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """Who recomputes it."""

    auditor: PeerId
    is_watcher: bool = False
    prefix: int | None = None
    """Of so many tokens only, and forward only."""


class Auditors:
    """All who could be asked."""

    def __init__(
        self,
        manifest: Manifest,
        *,
        registry: Registry,
        load: Load,
        is_trusted: Callable[[PeerId], bool],
        chance: random.Random,
    ) -> None:
        self._registry, self._load, self._is_trusted, self._chance = registry, load, is_trusted, chance
        self._may_overlap = manifest.averaging.overlap
        self._prefix = _prefix_of(manifest)

    def choose(self, carry: Carry, *, without: Collection[PeerId], is_sum: bool, first: Case | None) -> Choice | None:
        """Choose somebody for a microbatch, or for the contribution that it is a part of; None if there is nobody.

        `without` are those who are concerned themselves. `first` is the case of which this is the second opinion.
        """
        if first is None or not first.is_watcher:
            auditor = self._among_peers(carry, without, is_sum=is_sum, is_urgent=first is not None)
            if auditor is not None:
                return Choice(auditor=auditor)
        return self._among_watchers(carry, without, is_sum=is_sum, first=first)

    def _among_peers(
        self, carry: Carry, without: Collection[PeerId], *, is_sum: bool, is_urgent: bool
    ) -> PeerId | None:
        limit = MAX_SUMS_WAITING if is_sum else MAX_WAITING  # of each kind a few, so that both are done
        free = [
            peer.peer
            for peer in self._registry.live()
            if peer.peer not in without
            and _has_ready(peer, carry)
            and (is_urgent or self._load(peer.peer, is_sum=is_sum) < limit)
        ]
        trusted = [peer for peer in free if self._is_trusted(peer)]
        return self._chance.choice(trusted or free) if free else None

    def _among_watchers(
        self, carry: Carry, without: Collection[PeerId], *, is_sum: bool, first: Case | None
    ) -> Choice | None:
        """Too few others have a replica: leave it to a watcher.

        As a second opinion the same one may be asked again, with weights that it gets anew. A contribution it looks at
        only as that: all of a round's microbatches would keep it from everything else.
        """
        if (self._may_overlap and carry.version is None) or (is_sum and first is None):
            return None  # it does not know when who took which version
        able = [
            peer.peer
            for peer in self._registry.watching()
            if peer.peer not in carry.neighbours
            and _has_ready(peer, carry)
            and (first is not None or self._load(peer.peer, is_sum=False) < MAX_AT_WATCHER)
        ]
        free = [peer for peer in able if peer not in without] or (able if first is not None else [])
        if not free:
            return None
        is_whole = carry.downstream is None or self._chance.random() < WHOLE_RATE
        prefix = None if is_whole or first is not None else self._prefix
        return Choice(auditor=self._chance.choice(free), is_watcher=True, prefix=prefix)


def _has_ready(peer: LivePeer, carry: Carry) -> bool:
    """Tell whether a peer has weights of all the stages that a piece of work passed."""
    return set(carry.stages) <= {replica.stage for replica in peer.replicas if replica.ready}


def _prefix_of(manifest: Manifest) -> int | None:
    """Return of how many tokens a watcher may look; None if a codec's blocks would run across their end."""
    width, length = manifest.model.config["hidden_size"], manifest.batch.sequence_length
    fits = not (PREFIX * width % FP16_BLOCK or length * width % FP16_BLOCK)  # the blocks of all others divide it
    return PREFIX if fits and length > PREFIX else None
