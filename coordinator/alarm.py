"""Noticing that the model has become worse, from one evaluation to the next.

Owns: what counts as a jump of the held-out loss, and saying so; going back by itself only if the organiser wants that,
as a loss is the word of whoever computed it. Must not know: how the run goes back (`rollback.py`).
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import structlog

from coordinator.clock import Clock
from coordinator.journal import DISK_NOTE, Journal
from coordinator.rollback import WISH, Wish
from coordinator.rundir import RunDir
from coordinator.settings import CoordinatorSettings
from coordinator.store import peers, rounds
from coordinator.store.database import Database
from protocol.errors import StorageError
from protocol.ids import RoundId

log = structlog.get_logger()

NOTE = "loss"
LOOK_EVERY_S = 5.0
BAD = 2  # evaluations in a row: one may be of a round that somebody has lied about
BEFORE, LEAST_BEFORE = 8, 3
RISE = 0.2  # of what was usual before: a spike of the learning rate's making is smaller, or does not stay


@dataclass(frozen=True, slots=True)
class Jump:
    """The held-out loss has risen and stays there."""

    round: RoundId
    """Of the first bad evaluation."""
    last_good: RoundId
    before: float
    after: float


def find_jump(losses: Sequence[tuple[RoundId, float]]) -> Jump | None:
    """Look at evaluations (round, loss), the oldest first; None unless the last two are far above those before."""
    bad, good = losses[-BAD:], losses[:-BAD][-BEFORE:]
    if len(good) < LEAST_BEFORE:
        return None
    usual = statistics.median(loss for _, loss in good)
    if not all(math.isnan(loss) or loss > usual * (1 + RISE) for _, loss in bad):
        return None
    last_good = max(number for number, loss in good if loss <= usual * (1 + RISE))
    return Jump(round=bad[0][0], last_good=last_good, before=usual, after=bad[-1][1])


class Alarm:
    """Watches the evaluations of a run."""

    def __init__(
        self, run: RunDir, *, settings: CoordinatorSettings, database: Database, journal: Journal, clock: Clock
    ) -> None:
        self._run, self._settings, self._database = run, settings, database
        self._journal, self._clock = journal, clock
        self._look_at_s = float("-inf")
        self._told: RoundId | None = None
        """The last good evaluation before the jump that was told of."""

    async def tick(self) -> None:
        """Say so if the loss has jumped, and go back if that is wanted."""
        now_s = self._clock.monotonic()
        if now_s < self._look_at_s:
            return
        self._look_at_s = now_s + LOOK_EVERY_S
        try:
            jump = find_jump(await self._database.run(rounds.last_evaluations, limit=BAD + BEFORE))
            if jump is None:
                self._journal.clear(NOTE)
            elif self._told != jump.last_good:
                await self._tell(jump)
                self._told = jump.last_good
        except StorageError as error:
            self._journal.note(DISK_NOTE, str(error))

    async def _tell(self, jump: Jump) -> None:
        before = [number for number in self._run.checkpoints.rounds() if number <= jump.last_good]
        text = f"held-out loss went from {jump.before:.3f} to {jump.after:.3f} at round {jump.round}"
        target = max(before, default=None)
        advice = "there is no checkpoint before that" if target is None else f"coordinator rollback DIR --to {target}"
        self._journal.note(NOTE, f"{text}: {advice}")
        await self._journal.event("loss.jumped", detail=text)
        if target is not None and self._settings.auto_rollback:
            wish = Wish(round=target, reason=text)
            await self._database.run(peers.put_setting, WISH, wish.to_json())
