"""When a round is over: feeders report finished numbers, one of them keeps the count and closes the round.

Owns: what is known to be done in the open round, whom to report to, and the making of a closing. Runs on
every member of stage 0, each being a feeder and ready to be the clock. Must not know: ballots, and whose a
number is (`protocol/ownership.py`).

The clock is the first member in steward order that answers. A feeder repeats whatever the clock's last
answer lacks, so that a new clock learns everything by itself. A clock that is not the first keeps reporting
to those before it: two clocks with half the bits each would otherwise both wait for the deadline.
"""

from __future__ import annotations

from collections.abc import Iterable

from protocol.ids import PeerId, RoundId, digest
from protocol.rounds.events import Announce, BitsChanged, Report, Send, Step, Trouble
from protocol.rounds.messages import (
    CLOSING_CONTEXT,
    MAX_DONE_PER_MESSAGE,
    ClosingNotice,
    DoneReport,
    DoneTask,
    DoneUnion,
)
from protocol.rounds.records import bitmap, draw_closing
from protocol.rounds.settings import RoundSize, Settings

MAX_REPORT_BYTES = 128 * 1024  # tasks in one message, half of what it may weigh; a longer one travels alone
GRACE_SILENCES = 2  # a feeder notices a dead clock after one, and has reported to the next after two
CREDIT_BYTES, TASK_BYTES = 96, 96  # a credit, and the rest of a task, on the wire, rounded up


class Clock:
    """One stage-0 member's view of one round."""

    def __init__(self, settings: Settings, round_id: RoundId, order: tuple[PeerId, ...], now_s: float) -> None:
        self._settings = settings
        self.round = round_id
        self.size: RoundSize = settings.rules.size_of(round_id)
        self._order = order
        self._opened_s = now_s
        self._tasks: dict[int, DoneTask] = {}
        self._own_bits = 0  # the numbers in `_tasks`
        self._rank = 0  # the member we report to
        self._answered_s = now_s
        self._clock_has = 0  # by its last answer; its word, not its proof
        self._last_clock_had = 0
        self._changed_s = now_s  # when the clock changed
        self._probe = 0
        self.is_closed = False

    @property
    def bits(self) -> int:
        """Everything that is done as far as we know."""
        return self._own_bits | self._clock_has | self._last_clock_had

    @property
    def is_clock(self) -> bool:
        return self._order[self._rank] == self._settings.me.peer

    # -- events ------------------------------------------------------------------------------------

    def on_task_done(self, task: DoneTask) -> list[Step]:
        """Note a number that we fed ourselves."""
        return self._add([task])

    def on_report(self, sender: PeerId, report: DoneReport) -> list[Step]:
        """Take over what a feeder proves, and answer with all that we know."""
        if sender not in self._order:
            return []
        check = self._settings.rules.check_done
        fresh = [task for task in report.tasks if task.number not in self._tasks]
        proved = [task for task in fresh if self._is_sound(task) and check(self.round, task)]
        actions: list[Step] = []
        if len(proved) < len(fresh):
            actions.append(Report(Trouble.FAULT, sender, f"{len(fresh) - len(proved)} numbers without proof"))
        actions += self._add(proved)
        union = DoneUnion(stage=self._settings.stage, round=self.round, done=bitmap(self._own_bits, self.size))
        return [*actions, Send(sender, union)]

    def on_union(self, sender: PeerId, union: DoneUnion, now_s: float) -> list[Step]:
        """Learn what the clock knows, and that it lives. An earlier member that answers is the clock again."""
        rank = self._order.index(sender) if sender in self._order else len(self._order)
        if rank > self._rank:
            return []
        before = self.bits
        if rank != self._rank:
            self._change_clock(rank, now_s)
        self._answered_s = now_s
        self._clock_has = int.from_bytes(union.done, "little") & self.size.all_bits
        return self._tell_change(before)

    def tick(self, now_s: float) -> list[Step]:
        """Report, replace a silent clock, close at the deadline."""
        if self.is_closed:
            return []
        silence_s, before = self._settings.timers.silence_s, self.bits
        if not self.is_clock and now_s - self._answered_s > silence_s:
            self._change_clock((self._rank + 1) % len(self._order), now_s)
        if now_s - self._changed_s > GRACE_SILENCES * silence_s:
            self._last_clock_had = 0
        actions = self._tell_change(before)
        if self.is_clock:
            actions += self._report_to_earlier()
            return [*actions, *self.close()] if self._is_late(now_s) else actions
        return [*actions, *self._report_to(self._order[self._rank], self._own_bits & ~self._clock_has)]

    def wake(self, now_s: float) -> None:
        """Nobody's silence meant anything while we were stopped."""
        self._answered_s = now_s

    def close(self) -> list[Step]:
        """Sign the closing and tell everybody. The machine adds the replicas of all stages to the targets."""
        self.is_closed = True
        closing = draw_closing(self._settings.run, self.round, self.size, self._tasks)
        signed = self._settings.notary.seal(CLOSING_CONTEXT, closing)
        notice = ClosingNotice(stage=self._settings.stage, closing=signed)
        me = self._settings.me.peer
        return [
            Announce(to=frozenset(self._order) - {me}, message=notice, key=digest(signed.payload)),
            Send(me, notice),
        ]

    # -- helpers -----------------------------------------------------------------------------------

    @property
    def _is_full(self) -> bool:
        """A round without any number is never full: it waits for its deadline instead of spinning."""
        return self._own_bits == self.size.all_bits != 0

    def _is_late(self, now_s: float) -> bool:
        """After the last round there is nothing to close."""
        last_round = self._settings.rules.last_round
        exists = last_round is None or self.round <= last_round
        return exists and now_s - self._opened_s >= self._settings.timers.round_deadline_s

    def _is_sound(self, task: DoneTask) -> bool:
        """A number of this round, with one credit per stage at most, and none above its tokens."""
        stages = {credit.stage for credit in task.credits}
        fits = all(credit.tokens <= task.target_tokens for credit in task.credits)
        return fits and len(stages) == len(task.credits) and task.number < self.size.num_train + self.size.num_eval

    def _add(self, tasks: Iterable[DoneTask]) -> list[Step]:
        """Add proofs. Whoever holds them all may close at once, clock or not: the proofs decide, not the rank."""
        if self.is_closed:
            return []
        before = self.bits
        for task in tasks:
            if self._is_sound(task):
                self._tasks[task.number] = task
                self._own_bits |= 1 << task.number
        actions = self._tell_change(before)
        return [*actions, *self.close()] if self._is_full else actions

    def _change_clock(self, rank: int, now_s: float) -> None:
        """Believe the old clock a little longer: its feeders need a moment to tell the new one.

        What nobody tells it has died with the old clock and its feeder, and has to be done again.
        """
        self._last_clock_had |= self._clock_has
        self._rank, self._answered_s, self._changed_s, self._clock_has = rank, now_s, now_s, 0

    def _tell_change(self, before: int) -> list[Step]:
        return [BitsChanged(self.round, self.bits)] if self.bits != before else []

    def _report_to_earlier(self) -> list[Step]:
        """As a stand-in clock, knock at one of the members before us, in turn, at every beat."""
        if self._rank == 0:
            return []
        self._probe = (self._probe + 1) % self._rank
        return self._report_to(self._order[self._probe], 0)

    def _report_to(self, peer: PeerId, bits: int) -> list[Step]:
        chosen: list[DoneTask] = []
        num_bytes = 0
        for number in sorted(self._tasks):
            if not bits >> number & 1:
                continue
            task = self._tasks[number]
            num_bytes += TASK_BYTES + len(task.evidence) + CREDIT_BYTES * len(task.credits)
            if chosen and (num_bytes > MAX_REPORT_BYTES or len(chosen) == MAX_DONE_PER_MESSAGE):
                break
            chosen.append(task)
        return [Send(peer, DoneReport(stage=self._settings.stage, round=self.round, tasks=tuple(chosen)))]
