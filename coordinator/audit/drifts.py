"""How far the work of honest replicas may be from what the anchor's weights make of it, with local steps. Pure.

Owns: what was measured lately, the limits that follow, and how often who was beyond them. Must not know: cases
(`court.py`), what follows for a peer (`office.py`).

A replica that has taken steps of its own since the last average has weights that nobody else has. What it computes is
still near to what the anchor's weights compute, which all others have. How near depends on the learning rate and on how
long ago the average was, so others of its stage are the measure; and a microbatch like no other may be far off by
chance, so it takes several. Of attacks that leaves the gross ones: turned signs, zeros, work of other inputs.
"""

from __future__ import annotations

import math
import statistics
from collections import OrderedDict, defaultdict, deque
from collections.abc import Collection
from functools import partial

from coordinator.audit.by_peer import ByPeer
from coordinator.carries import WorkKey
from protocol.ids import PeerId, StageId

LEAST, MOST = 0.6, 1.8
"""Limits of the limit: relative distances. Zeros are 1 away from anything, a turned sign 2."""
USUAL, SPREAD = 0.9, 2.5
"""What part of a peer's audits are as near as is usual, and how many times that is the limit."""
WIDE = 1.4
"""Times what is usual is let pass in any case: a run that diverges is nobody's fault."""
LEAST_PEERS, LEAST_AUDITS = 3, 8
MAX_REMEMBERED = 32  # audits of each peer: the learning rate changes, and with it what is usual
MAX_PEERS = 256  # that passed the same stages
AWAY_S = 3600.0  # who is away for longer is no measure any more: what is usual changes

FLAGRANT = 3.0  # times the limit
LATELY, TOO_MUCH, FLAGRANT_SCORE = 16, 3.0, 1.5
"""Audits of a peer that are looked back at, and the score at which it is too much: 1 for each that was too far off. Of
some 1,100 audits of honest peers one was (two stages of three replicas, the smallest preset)."""

Far = tuple[float | None, float | None]
"""How far activations and gradients of one microbatch are from the anchor's; None where nothing goes on, or back."""


class Drifts:
    """Distances of everybody's work, by the stages that it passed."""

    def __init__(self) -> None:
        self._seen: defaultdict[tuple[StageId, ...], ByPeer[deque[Far]]] = defaultdict(
            lambda: ByPeer(partial(deque, maxlen=MAX_REMEMBERED), max_peers=MAX_PEERS)
        )
        self._here_s: dict[PeerId, float] = {}

    def keep_only(self, live: Collection[PeerId], *, now_s: float) -> None:
        """Forget who has been away for long."""
        self._here_s |= dict.fromkeys(live, now_s)
        self._here_s = {peer: at_s for peer, at_s in self._here_s.items() if now_s - at_s <= AWAY_S}
        for seen in self._seen.values():
            for peer in seen.known().keys() - self._here_s.keys():
                seen.forget(peer)

    def note(self, stages: tuple[StageId, ...], peer: PeerId, far: Far) -> None:
        """Take how far one microbatch was."""
        self._seen[stages].of(peer).append(far)

    def limits(self, stages: tuple[StageId, ...]) -> tuple[float, float]:
        """Return how far activations and gradients may be: as far as they like until a few peers are known."""
        seen = self._seen[stages].known().values()
        outputs, returned = ([[far[side] for far in each] for each in seen] for side in range(2))
        return _limit(outputs), _limit(returned)

    def is_beyond(self, stages: tuple[StageId, ...], far: Far, *, factor: float = 1.0) -> bool:
        """Tell whether that is too far, or so many times too far."""
        return any(
            each is not None and each > factor * limit for each, limit in zip(far, self.limits(stages), strict=True)
        )


class FarOff(ByPeer[OrderedDict[WorkKey, float]]):
    """How often everybody's work was further off than it may be, with local steps or without."""

    def __init__(self) -> None:
        super().__init__(OrderedDict)

    def note(self, peer: PeerId, work: WorkKey, score: float) -> bool:
        """Take an audit of a piece of work, which counts once, and its score; tell whether that is too much by now."""
        scores = self.of(peer)
        scores[work] = max(score, scores.get(work, 0.0))
        while len(scores) > LATELY:
            scores.popitem(last=False)
        against = {key: each for key, each in scores.items() if each}
        return len({key[0] for key in against}) > 1 and sum(against.values()) >= TOO_MUCH


def _limit(by_peer: list[list[float | None]]) -> float:
    told = [[far for far in each if far is not None] for each in by_peer]
    known = [sorted(each) for each in told if len(each) >= LEAST_AUDITS]
    if len(known) < LEAST_PEERS:
        return math.inf
    usual = statistics.median(each[int(USUAL * len(each))] for each in known)
    return max(LEAST, min(SPREAD * usual, MOST), WIDE * usual)
