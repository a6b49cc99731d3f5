"""Counting what is done: feeders, the clock, and what happens when it dies."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol.ids import PeerId, RoundId, StageId
from protocol.rounds import RoundSize
from protocol.rounds.clock import MAX_REPORT_BYTES, Clock
from protocol.rounds.events import Announce, BitsChanged, Report, Send, Step
from protocol.rounds.messages import (
    MAX_DONE_PER_MESSAGE,
    MAX_EVIDENCE_BYTES,
    Closing,
    ClosingNotice,
    Credit,
    DoneReport,
    DoneTask,
    DoneUnion,
)
from protocol.wire import MAX_MESSAGE_BYTES
from tests.protocol.rounds.builders import RULES, TIMERS, A, B, C, done, settings

STAGE = StageId(0)
ROUND = RoundId(3)
SILENT_S = TIMERS.silence_s + TIMERS.beat_s


def clock(me: PeerId, *, num_train: int = 4, num_eval: int = 0) -> Clock:
    """Make one member's clock; a is first in order, then b, then c."""
    rules = replace(
        RULES,
        size_of=lambda _round: RoundSize(num_train, num_eval),
        check_done=lambda _round, task: task.evidence != b"lie",
    )
    return Clock(settings(me, stage=STAGE, rules=rules), ROUND, (A, B, C), 0.0)


def report(*tasks: DoneTask) -> DoneReport:
    return DoneReport(stage=STAGE, round=ROUND, tasks=tasks)


def union(bits: int) -> DoneUnion:
    return DoneUnion(stage=STAGE, round=ROUND, done=bits.to_bytes(1, "little"))


def sent(kind: type[DoneReport], steps: list[Step]) -> list[tuple[PeerId, list[int]]]:
    return [
        (step.to, [task.number for task in step.message.tasks])
        for step in steps
        if isinstance(step, Send) and isinstance(step.message, kind)
    ]


def closed(steps: list[Step]) -> Closing | None:
    notices = [step.message for step in steps if isinstance(step, Announce)]
    if not notices:
        return None
    (notice,) = notices
    assert isinstance(notice, ClosingNotice)
    return Closing.from_bytes(notice.closing.payload)


def test_a_feeder_repeats_what_the_clock_lacks_and_nothing_else() -> None:
    """The clock's own answer is the acknowledgement."""
    feeder = clock(B)
    feeder.on_task_done(done(0))
    feeder.on_task_done(done(2))
    assert sent(DoneReport, feeder.tick(0.5)) == [(A, [0, 2])]
    feeder.on_union(A, union(0b0001), 0.6)
    assert sent(DoneReport, feeder.tick(1.0)) == [(A, [2])]


def test_a_dead_clock_is_replaced_and_the_next_one_hears_everything() -> None:
    """Also what the dead one had acknowledged."""
    feeder = clock(C)
    feeder.on_task_done(done(0))
    feeder.on_union(A, union(0b0001), 0.5)
    assert sent(DoneReport, feeder.tick(1.0)) == [(A, [])]
    assert sent(DoneReport, feeder.tick(0.5 + SILENT_S)) == [(B, [0])]


def test_the_first_member_that_answers_again_is_the_clock_again() -> None:
    """A stand-in keeps knocking, so two halves of the bits meet."""
    stand_in = clock(B)
    stand_in.on_task_done(done(1))
    steps = stand_in.tick(SILENT_S)
    assert stand_in.is_clock
    assert sent(DoneReport, steps) == [(A, [])]
    stand_in.on_union(A, union(0), SILENT_S + 0.1)
    assert sent(DoneReport, stand_in.tick(SILENT_S + 0.5)) == [(A, [1])]


def test_a_later_member_cannot_declare_itself_the_clock() -> None:
    """Only an earlier one in order can, or the one that we report to."""
    feeder = clock(B)
    assert feeder.on_union(C, union(0b1111), 0.1) == []
    assert feeder.bits == 0


def test_numbers_without_proof_do_not_count() -> None:
    """The liar is reported; the honest number in the same message counts."""
    steps = clock(A).on_report(B, report(done(0).model_copy(update={"evidence": b"lie"}), done(1)))
    assert [step.peer for step in steps if isinstance(step, Report)] == [B]
    assert [step.done for step in steps if isinstance(step, BitsChanged)] == [0b0010]


@pytest.mark.parametrize(
    "task",
    [
        done(4),
        done(0, tokens=5, credits=(Credit(stage=STAGE, peer=A, tokens=6),)),
        done(0, credits=(Credit(stage=STAGE, peer=A, tokens=6), Credit(stage=STAGE, peer=B, tokens=6))),
    ],
)
def test_numbers_that_make_no_sense_do_not_count(task: DoneTask) -> None:
    """Beyond the round, or crediting more than there was."""
    counting = clock(A)
    counting.on_report(B, report(task))
    assert counting.bits == 0


def test_reports_of_strangers_are_not_answered() -> None:
    """Only members feed."""
    assert clock(A).on_report(PeerId("x"), report(done(0))) == []


def test_the_last_bit_closes_the_round_once() -> None:
    """Evaluation numbers count as bits and not as losses."""
    counting = clock(A, num_train=2, num_eval=1)
    counting.on_report(B, report(done(0), done(2)))
    record = closed(counting.on_report(C, report(done(1))))
    assert record is not None
    assert (record.tasks_done, record.tasks_lost, record.evals_done) == (2, 0, 1)
    assert closed(counting.on_report(B, report(done(1)))) is None
    assert counting.tick(5.0) == []


def test_whoever_holds_all_proofs_may_close() -> None:
    """The proofs decide, not the rank: the round does not wait for a clock that is just dying."""
    last = clock(C, num_train=1)
    assert closed(last.on_task_done(done(0))) is not None


def test_at_the_deadline_only_the_clock_closes_with_what_there_is() -> None:
    """And records what is missing."""
    late_s = TIMERS.round_deadline_s + 1.0
    counting, feeder = clock(A), clock(B)
    counting.on_task_done(done(3))
    feeder.on_union(A, union(0), late_s)
    record = closed(counting.tick(late_s))
    assert record is not None
    assert (record.tasks_done, record.tasks_lost) == (1, 3)
    assert closed(feeder.tick(late_s)) is None


def test_a_round_without_numbers_does_not_spin() -> None:
    """It is over at its deadline, and not once a beat."""
    empty = clock(A, num_train=0)
    assert closed(empty.tick(1.0)) is None
    assert closed(empty.tick(TIMERS.round_deadline_s)) is not None


def test_after_the_last_round_nothing_is_closed_any_more() -> None:
    """Nobody would believe it."""
    base = settings(A, stage=StageId(0))
    for last_round, closes in ((ROUND, True), (ROUND - 1, False)):
        rules = replace(base.rules, size_of=lambda _round: RoundSize(0), last_round=RoundId(last_round))
        empty = Clock(replace(base, rules=rules), ROUND, (A, B, C), 0.0)
        assert (closed(empty.tick(TIMERS.round_deadline_s)) is not None) is closes


def test_bits_that_only_the_dead_clock_vouched_for_are_done_again_after_a_while() -> None:
    """Clock and feeder died together: the number is shown as undone once the new clock should know better."""
    feeder = clock(C)
    feeder.on_union(A, union(0b0100), 0.5)
    changed_s = 0.5 + SILENT_S
    feeder.tick(changed_s)
    feeder.on_union(B, union(0), changed_s + 0.1)
    assert feeder.bits == 0b0100
    later_s = changed_s + 2 * TIMERS.silence_s + 0.1
    feeder.on_union(B, union(0), later_s - 0.2)
    steps = feeder.tick(later_s)
    assert BitsChanged(ROUND, 0) in steps


def test_sleep_does_not_make_the_clock_look_dead() -> None:
    """After a pause of ours the same clock is asked again."""
    feeder = clock(B)
    feeder.wake(100.0)
    assert [to for to, _ in sent(DoneReport, feeder.tick(100.0))] == [A]


@given(st.integers(0, 3000) | st.integers(0, MAX_EVIDENCE_BYTES), st.integers(0, 256))
def test_a_report_always_fits_a_message(evidence_bytes: int, num_credits: int) -> None:
    """The largest proofs and paths that a task may have, in any number."""
    feeder = clock(B, num_train=200)
    credits = tuple(Credit(stage=StageId(stage), peer=PeerId("p" * 52), tokens=1) for stage in range(num_credits))
    for number in range(100 if evidence_bytes <= 3000 else 2):
        feeder.on_task_done(done(number, credits=credits).model_copy(update={"evidence": b"e" * evidence_bytes}))
    (message,) = [step.message for step in feeder.tick(0.5) if isinstance(step, Send)]
    assert isinstance(message, DoneReport)
    assert 0 < len(message.tasks) <= MAX_DONE_PER_MESSAGE
    num_bytes = len(message.to_bytes())
    assert num_bytes < MAX_MESSAGE_BYTES
    assert num_bytes < MAX_REPORT_BYTES or len(message.tasks) == 1
