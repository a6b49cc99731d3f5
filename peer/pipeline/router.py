"""Choose where a microbatch goes next.

Owns: the estimate of when each replica would finish (an average of seconds per task, the load it reported last,
and a penalty for failures), and the order in which candidates are tried. The candidates themselves are drawn by
hash (`protocol/ownership.py`) from the committed members, so a router cannot favour its friends: it only picks
among three. Cost per hop does not grow with the swarm. Must not know: clocks; times are passed in.

Whatever is held against a replica fades: one that is never chosen is never measured again, and a single slow
answer (its own next stage was gone for a while) must not cost it its work for ever.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from protocol.ids import PeerId, RoundId, RunId, StageId
from protocol.ownership import CANDIDATES, candidates

SMOOTHING = 0.2  # weight of the newest observation: follows a card that starts to throttle within ~5 tasks
NEWCOMER_S = 0.0  # an unknown replica looks instantly free, so it is measured soon (SWARM's exploration rule)
HALF_LIFE_S = 30.0  # of what is remembered: a card five times slower than its siblings is tried about once a minute
PENALTY_S = 10.0  # of a first failure; doubles with every further one in a row
MAX_PENALTY_S = 600.0
ONE_FAILURE_S = 5.0  # a replica that dies fails all tasks that it has: within this time they count as one


@dataclass(slots=True)
class _Estimate:
    task_s: float
    load_s: float
    penalty_s: float
    observed_s: float

    def finish_s(self, now_s: float) -> float:
        age_s = max(0.0, now_s - self.observed_s)
        queue_s = max(0.0, self.load_s - age_s)  # it has been worked off meanwhile
        return queue_s + (self.task_s + self.penalty_s) * math.exp2(-age_s / HALF_LIFE_S)


class Router:
    """Orders the replicas of a stage for one microbatch."""

    def __init__(self, *, run: RunId) -> None:
        self._run = run
        self._estimates: dict[PeerId, _Estimate] = {}

    def order(
        self, *, round_id: RoundId, number: int, stage: StageId, replicas: Mapping[PeerId, float], now_s: float
    ) -> Iterator[PeerId]:
        """Yield replicas to try: the first three drawn, soonest finish first; then the next three, and so on."""
        drawn = candidates(f"{self._run}/{round_id}", number, stage, replicas)
        for start in range(0, len(drawn), CANDIDATES):
            yield from sorted(drawn[start : start + CANDIDATES], key=lambda peer: self._finish_s(peer, now_s))

    def observe(self, peer: PeerId, *, task_s: float, load_s: float, now_s: float) -> None:
        """Learn from a finished hop: its seconds from being accepted to its answer, and the work queued there."""
        known = self._estimates.get(peer)
        mean_s = task_s if known is None else known.task_s + SMOOTHING * (task_s - known.task_s)
        self._estimates[peer] = _Estimate(mean_s, load_s, penalty_s=0.0, observed_s=now_s)

    def penalise(self, peer: PeerId, *, now_s: float) -> None:
        """Prefer others for a while: the peer failed or could not be reached. In a row, each counts double."""
        known = self._estimates.get(peer, _Estimate(0.0, 0.0, penalty_s=0.0, observed_s=now_s))
        if known.penalty_s and now_s - known.observed_s < ONE_FAILURE_S:
            return
        penalty_s = min(MAX_PENALTY_S, max(PENALTY_S, 2 * known.penalty_s))
        self._estimates[peer] = _Estimate(known.task_s, 0.0, penalty_s=penalty_s, observed_s=now_s)

    def _finish_s(self, peer: PeerId, now_s: float) -> float:
        known = self._estimates.get(peer)
        return NEWCOMER_S if known is None else known.finish_s(now_s)
