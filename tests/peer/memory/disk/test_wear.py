"""Written bytes are counted over restarts and days, and stop at the day's budget.

Oracles: sums by hand; a clock that the test sets.
"""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from peer.memory.disk.wear import DAY_S, SAVED_BYTES, WriteBudget, WriteBudgetSpent
from tests.peer.memory.disk.small_store import refusing

NOON_S = 20_000 * DAY_S + DAY_S / 2


class Time:
    now_s = NOON_S

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def time() -> Time:
    return Time()


def budget_of(folder: Path, time: Time, per_day_bytes: int | None = 100) -> WriteBudget:
    return WriteBudget(folder / "writes.json", per_day_bytes=per_day_bytes, now_s=time)


def test_a_write_that_would_pass_the_budget_counts_for_nothing(tmp_path: Path, time: Time) -> None:
    budget = budget_of(tmp_path, time)
    budget.spend(60)
    with pytest.raises(WriteBudgetSpent) as refusal:
        budget.spend(41)
    assert refusal.value.resumes_in_s == DAY_S / 2
    assert (budget.today_bytes, budget.left_bytes()) == (60, 40)
    budget.spend(40)
    assert budget.left_bytes() == 0


def test_the_next_day_begins_at_midnight_utc(tmp_path: Path, time: Time) -> None:
    budget = budget_of(tmp_path, time)
    budget.spend(100)
    time.now_s += DAY_S / 2 - 1
    assert budget.left_bytes() == 0
    time.now_s += 1
    assert budget.left_bytes() == 100
    budget.spend(30)
    assert (budget.today_bytes, budget.total_bytes) == (30, 130)


def test_a_commit_is_counted_but_never_refused(tmp_path: Path, time: Time) -> None:
    budget = budget_of(tmp_path, time)
    budget.count(130)
    assert (budget.today_bytes, budget.left_bytes()) == (130, 0)


def test_without_a_limit_it_only_counts(tmp_path: Path, time: Time) -> None:
    budget = budget_of(tmp_path, time, per_day_bytes=None)
    budget.spend(10**15)
    assert budget.left_bytes() is None


def test_the_count_survives_a_restart(tmp_path: Path, time: Time) -> None:
    budget = budget_of(tmp_path, time)
    budget.spend(60)
    budget.save()
    assert budget_of(tmp_path, time).left_bytes() == 40
    time.now_s += DAY_S
    later = budget_of(tmp_path, time)
    assert (later.left_bytes(), later.total_bytes) == (100, 60)


@pytest.mark.parametrize(("per_day_bytes", "step_bytes"), [(10_000, 100), (None, SAVED_BYTES)])
def test_a_killed_process_loses_little_of_the_count(
    tmp_path: Path, time: Time, per_day_bytes: int | None, step_bytes: int
) -> None:
    """Oracle: the count that the next process reads, though nobody has saved: a step late at most."""
    budget = budget_of(tmp_path, time, per_day_bytes)
    for steps in range(1, 8):
        budget.spend(step_bytes)
        kept = budget_of(tmp_path, time, per_day_bytes).total_bytes
        assert (steps - 1) * step_bytes <= kept <= steps * step_bytes
    assert kept > 0


def test_a_count_that_cannot_be_kept_stops_no_write(
    tmp_path: Path, time: Time, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: the log instead of an error; it is kept as soon as the disk takes it."""
    budget = budget_of(tmp_path, time)
    with monkeypatch.context() as patch, capture_logs() as logs:
        patch.setattr(os, "write", refusing(errno.ENOSPC))
        budget.spend(50)
    assert [line["event"] for line in logs] == ["wear.not_saved"]
    budget.spend(10)
    assert budget_of(tmp_path, time).total_bytes == 60


def test_a_clock_that_was_ahead_does_not_stop_us_for_years(tmp_path: Path, time: Time) -> None:
    time.now_s += 3650 * DAY_S
    budget = budget_of(tmp_path, time)
    budget.spend(100)
    budget.save()
    time.now_s = NOON_S
    assert budget_of(tmp_path, time).left_bytes() == 100


@pytest.mark.parametrize("damage", [b"", b"{", b"[]", b'{"day": 1}', b'{"day": 1, "day_bytes": "x", "total_bytes": 0}'])
def test_a_damaged_count_begins_anew(tmp_path: Path, time: Time, damage: bytes) -> None:
    (tmp_path / "writes.json").write_bytes(damage)
    assert budget_of(tmp_path, time).left_bytes() == 100


def test_the_refusal_is_one_line_with_a_hint(tmp_path: Path, time: Time) -> None:
    with pytest.raises(WriteBudgetSpent, match=r"today's 200 GB of writes to .* are spent") as refusal:
        budget_of(tmp_path, time, per_day_bytes=200 * 10**9).spend(201 * 10**9)
    assert "00:00 UTC" in refusal.value.one_line()
