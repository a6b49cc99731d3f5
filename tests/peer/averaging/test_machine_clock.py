"""The time that the round machine is told. Oracle: arithmetic, on a played clock."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from peer.averaging import machine_clock
from peer.averaging.machine_clock import MachineClock


@pytest.mark.parametrize(("worked_s", "counted_s"), [(0.0, 0.0), (8.0, 0.0), (9.0, 9.0)])
def test_work_does_not_count_until_others_may_have_lost_their_patience(
    monkeypatch: pytest.MonkeyPatch, worked_s: float, counted_s: float
) -> None:
    time = SimpleNamespace(now_s=100.0)
    monkeypatch.setattr(machine_clock, "time", SimpleNamespace(monotonic=lambda: time.now_s))
    clock = MachineClock(limit_s=8.0)
    before_s = clock.now_s()
    time.now_s += 5.0
    assert clock.now_s() - before_s == 5.0, "what is not work counts"
    with clock.working():
        time.now_s += worked_s
    time.now_s += 1.0
    assert clock.now_s() - before_s == 6.0 + counted_s
