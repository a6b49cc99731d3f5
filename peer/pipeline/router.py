"""Choose where a microbatch goes next.

Owns: the estimate of when each replica would finish (an average of seconds per task, plus the load it
reported last), and the order in which candidates are tried. The candidates themselves are drawn by hash
(`protocol/ownership.py`) from the committed members, so a router cannot favour its friends: it only picks
among three. Cost per hop does not grow with the swarm.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from protocol.ids import PeerId, RoundId, RunId, StageId
from protocol.ownership import CANDIDATES, candidates

SMOOTHING = 0.2  # weight of the newest observation: follows a card that starts to throttle within ~5 tasks
NEWCOMER_S = 0.0  # an unknown replica looks instantly free, so it is measured soon (SWARM's exploration rule)


@dataclass(slots=True)
class _Estimate:
    task_s: float
    load_s: float


class Router:
    """Orders the replicas of a stage for one microbatch."""

    def __init__(self, *, run: RunId) -> None:
        self._run = run
        self._estimates: dict[PeerId, _Estimate] = {}

    def order(
        self, *, round_id: RoundId, number: int, stage: StageId, replicas: Mapping[PeerId, float]
    ) -> Iterator[PeerId]:
        """Yield replicas to try: the first three drawn, soonest finish first; then the next three, and so on."""
        drawn = candidates(f"{self._run}/{round_id}", number, stage, replicas)
        for start in range(0, len(drawn), CANDIDATES):
            yield from sorted(drawn[start : start + CANDIDATES], key=self._finish_s)

    def observe(self, peer: PeerId, *, task_s: float, load_s: float) -> None:
        """Learn from a finished hop: its seconds at the callee, and the work still queued there."""
        known = self._estimates.get(peer)
        if known is None:
            self._estimates[peer] = _Estimate(task_s, load_s)
        else:
            known.task_s += SMOOTHING * (task_s - known.task_s)
            known.load_s = load_s

    def forget(self, peer: PeerId) -> None:
        """Drop what was measured: the peer failed, or came back as something else."""
        self._estimates.pop(peer, None)

    def _finish_s(self, peer: PeerId) -> float:
        known = self._estimates.get(peer)
        return NEWCOMER_S if known is None else known.task_s + known.load_s
