"""When a run is over. Oracles: a clock that only the test moves, and the events and notes that are left."""

from __future__ import annotations

import sqlite3
from pathlib import Path

import pytest

from coordinator.checkpointfiles import Checkpoint, CheckpointRecord
from coordinator.finish import EVALUATION_PATIENCE_S, SETTLE_BEATS
from coordinator.status import document
from coordinator.store import history, tallies
from protocol.errors import StorageError
from protocol.ids import RoundId
from tests.coordinator.office import (
    Office,
    Volunteer,
    closing,
    closing_report,
    open_office,
    sign_closing,
    state,
)

A = Volunteer("a")
LAST = RoundId(10)


def last_checkpoint(office: Office) -> Checkpoint:
    record = CheckpointRecord(run=office.manifest.run_id, round=LAST, stages=())
    return Checkpoint(office.services.run.path, record)


def settle_s(office: Office) -> float:
    return SETTLE_BEATS * office.manifest.timing.beat_s


async def tick(office: Office, seconds: float) -> None:
    office.time.advance(seconds)
    await office.services.tick(last_checkpoint(office))


async def evaluate(office: Office, round_id: int, *, num_train: int, sequence: int) -> None:
    """Report the closing of a round with its evaluation."""
    numbers = (1 << (num_train + 4)) - 1
    evaluated = closing(
        office.manifest,
        round_id,
        tasks=num_train,
        num_train=num_train,
        num_eval=4,
        done=numbers.to_bytes(1, "little"),
        eval_loss_sum=256 * 3.0,
        eval_tokens=256,
    )
    await office.beat(A, state(0), reports=((sequence, closing_report(sign_closing(A, evaluated))),))


def is_over(office: Office) -> bool:
    return office.services.finish.is_reached


async def ending(office: Office) -> str:
    events = await office.services.database.run(history.last_events, limit=50)
    return next((event.detail for event in events if event.kind == "run.finished"), "")


async def evaluated_round(office: Office) -> int:
    found = await office.services.database.run(document, office.manifest, now_s=office.services.clock.wall())
    assert found["state"] == "finished"
    return int(found["heldout"]["round"])


async def test_a_run_is_over_with_its_last_checkpoint_and_its_last_evaluation(tmp_path: Path) -> None:
    async with open_office(tmp_path) as office:
        await office.join(A)
        await tick(office, EVALUATION_PATIENCE_S / 2)
        assert not is_over(office)
        await evaluate(office, LAST, num_train=0, sequence=1)
        await tick(office, 1.0)
        await tick(office, 0.9 * settle_s(office))
        assert not is_over(office)
        await tick(office, 0.1 * settle_s(office) + 0.001)
        assert is_over(office)
        assert await ending(office) == "10 rounds"
        assert await evaluated_round(office) == LAST


async def test_an_end_without_the_last_evaluation_says_so_and_names_the_round_of_the_one_it_has(tmp_path: Path) -> None:
    async with open_office(tmp_path) as office:
        await office.join(A)
        await evaluate(office, 8, num_train=4, sequence=1)
        await tick(office, 0.0)
        await tick(office, EVALUATION_PATIENCE_S - 1.0)
        await tick(office, 2.0)
        assert not is_over(office)
        await tick(office, settle_s(office))
        assert is_over(office)
        assert await ending(office) == "10 rounds, without the last evaluation"
        assert await evaluated_round(office) == 8


async def test_a_database_that_does_not_answer_is_a_note_and_asked_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def locked(db: sqlite3.Connection, round_id: RoundId | int) -> bool:
        raise StorageError("the run's database refuses: database is locked.")

    async with open_office(tmp_path) as office:
        await office.join(A)
        await evaluate(office, LAST, num_train=0, sequence=1)
        with monkeypatch.context() as patch:
            patch.setattr(tallies, "is_evaluated", locked)
            await tick(office, 0.0)
        assert "locked" in office.services.journal.notes["disk"]
        await tick(office, 1.0)
        await tick(office, settle_s(office))
        assert is_over(office)
