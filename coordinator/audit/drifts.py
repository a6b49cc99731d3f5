"""How far the work of honest replicas may be from what the anchor's weights make of it, with local steps. Pure.

Owns: what was measured lately, the limits that follow, and how often who was beyond them. Must not know: cases
(`court.py`), what follows for a peer (`office.py`).

A replica that has taken steps of its own since the last average has weights that nobody else has. What it computes is
still near to what the anchor's weights compute, which all others have. How near depends on the learning rate and on how
long ago the average was, so others of its stage are the measure; and a microbatch like no other may be far off by
chance, so it takes several. Of attacks that leaves the gross ones: turned signs, zeros, work of other inputs.
"""

from __future__ import annotations

import statistics
from collections import defaultdict, deque

from protocol.ids import PeerId, RoundId, StageId

LEAST, MOST = 0.6, 1.8
"""Limits of the limit: relative distances. Zeros are 1 away from anything, a turned sign 2."""
USUAL, SPREAD = 0.9, 2.5
"""What part of a peer's audits are as near as is usual, and how many times that is the limit."""
LEAST_PEERS, LEAST_AUDITS = 3, 8
MAX_REMEMBERED = 32  # audits of each peer: the learning rate changes, and with it what is usual
MAX_PEERS = 256  # of each stage

FLAGRANT = 3.0  # times the limit
LATELY, TOO_MUCH, FLAGRANT_SCORE = 16, 3.0, 1.5
"""Audits of a peer that are looked back at, and the score at which it is too much: 1 for each that was too far off.

Of some 1,100 audits of honest peers one was (two stages of three replicas, the smallest preset): that three of sixteen
are by chance has odds of one in a million.
"""


class Drifts:
    """Distances of everybody's work at each stage."""

    def __init__(self) -> None:
        self._seen: defaultdict[StageId, defaultdict[PeerId, deque[tuple[float, float]]]] = defaultdict(
            lambda: defaultdict(lambda: deque(maxlen=MAX_REMEMBERED))
        )

    def note(self, stage: StageId, peer: PeerId, apart: tuple[float, float]) -> None:
        """Take how far activations and gradients of one microbatch were from the anchor's."""
        seen = self._seen[stage]
        seen[peer].append(apart)
        while len(seen) > MAX_PEERS:
            seen.pop(next(iter(seen)))

    def limits(self, stage: StageId) -> tuple[float, float]:
        """Return how far activations and gradients may be. Until a few peers are known, only nonsense is too far."""
        known = [list(each) for each in self._seen[stage].values() if len(each) >= LEAST_AUDITS]
        if len(known) < LEAST_PEERS:
            return MOST, MOST
        outputs, returned = (
            statistics.median(_usual([apart[index] for apart in each]) for each in known) for index in range(2)
        )
        return _limit(outputs), _limit(returned)

    def is_beyond(self, stage: StageId, apart: tuple[float, float], *, factor: float = 1.0) -> bool:
        """Tell whether that is too far, or so many times too far."""
        return any(far > factor * limit for far, limit in zip(apart, self.limits(stage), strict=True))


class FarOff:
    """How often everybody's work was further off than it may be."""

    def __init__(self) -> None:
        self._scores: defaultdict[PeerId, deque[tuple[RoundId, float]]] = defaultdict(lambda: deque(maxlen=LATELY))

    def note(self, peer: PeerId, round_id: RoundId, score: float) -> bool:
        """Take an audit and what it counts against a peer; tell whether that is too much by now."""
        scores = self._scores[peer]
        scores.append((round_id, score))
        against = [each for each in scores if each[1]]
        return len({each[0] for each in against}) > 1 and sum(each[1] for each in against) >= TOO_MUCH

    def forget(self, peer: PeerId) -> None:
        """It has been judged, or that was taken back."""
        self._scores.pop(peer, None)

    def succeed(self, before: PeerId, peer: PeerId) -> None:
        """One goes by another key now."""
        if before in self._scores:
            self._scores[peer].extend(self._scores.pop(before))


def _usual(distances: list[float]) -> float:
    return sorted(distances)[int(USUAL * len(distances))]


def _limit(usual: float) -> float:
    return min(MOST, max(LEAST, SPREAD * usual))
