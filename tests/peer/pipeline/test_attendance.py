"""Whether any microbatch of a round may still come in. Oracle: the plan of the round."""

from __future__ import annotations

from peer.pipeline.attendance import Attendance
from peer.pipeline.gate import Gate
from peer.tasks import TaskId
from protocol.batches import Microbatch, TaskKind
from protocol.ids import Lineage, RoundId, RunId, StageId, Version

STAGE, OTHER = StageId(1), StageId(2)
PLAN = [Microbatch(number, TaskKind.TRAIN if number < 2 else TaskKind.EVAL, (number,)) for number in range(3)]


class Played:
    def __init__(self) -> None:
        self.gate = Gate(run=RunId("0" * 32))
        self.attendance = Attendance(self.gate)
        self.open(0)

    def open(self, round_id: int, lineage: bytes = bytes(32)) -> None:
        self.gate.open(STAGE, round_id=RoundId(round_id), version=Version(0), lineage=Lineage(lineage))

    def note(self, number: int, kind: TaskKind = TaskKind.TRAIN, *, round_id: int = 0) -> bool:
        """Note a number; tell whether others of its kind are missing."""
        self.attendance.note(TaskId(kind, RoundId(round_id), number), STAGE, PLAN)
        return self.attendance.is_missing_any(STAGE, kind)


def test_a_round_is_complete_when_every_number_of_a_kind_has_been_here() -> None:
    played = Played()
    assert [played.note(1), played.note(1), played.note(0)] == [True, True, False]
    assert played.attendance.is_missing_any(STAGE, TaskKind.EVAL)
    assert not played.note(2, TaskKind.EVAL)
    assert played.attendance.is_missing_any(OTHER, TaskKind.TRAIN), "nothing is known of a stage that nobody enters"


def test_a_task_of_another_round_comes_too_late_to_count() -> None:
    """Oracle: both numbers of the present round are still to come, or one of them is."""
    played = Played()
    played.open(1)
    assert played.note(0, round_id=0)
    assert [played.note(1, round_id=1), played.note(0, round_id=0), played.note(0, round_id=1)] == [True, True, False]


def test_every_opening_begins_anew() -> None:
    """The next round, and the same one in another lineage: its sums begin again."""
    played = Played()
    assert [played.note(0), played.note(1)] == [True, False]
    played.open(0, lineage=bytes([1] * 32))
    assert [played.note(0), played.note(1)] == [True, False]
    played.open(1)
    assert played.note(0, round_id=1)
