"""How fast a stage is while it has something to do. Oracle: a clock that the test moves."""

from __future__ import annotations

from peer.engine.pace import Pace


class Clock:
    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def test_waiting_for_others_does_not_count() -> None:
    clock = Clock()
    pace = Pace(clock)
    assert pace.tokens_per_s is None
    pace.begin()
    for _ in range(4):
        clock.now_s += 0.5
        pace.note(10)
    clock.now_s += 60.0
    assert pace.tokens_per_s == 20.0


def test_a_pause_before_a_takeover_does_not_count() -> None:
    """Ten tasks of a second, and one of somebody else 100 s later. Oracle: 10 tokens/s all the same."""
    clock = Clock()
    pace = Pace(clock)
    pace.begin()
    for gap_s in [1.0] * 10 + [100.0]:
        clock.now_s += gap_s
        pace.note(10)
    assert pace.tokens_per_s == 10.0


def test_a_round_without_work_says_nothing_new() -> None:
    """What was measured before still holds; the next round with work is measured by itself."""
    clock = Clock()
    pace = Pace(clock)
    pace.begin()
    clock.now_s += 1.0
    pace.note(5)
    pace.begin()
    clock.now_s += 9.0
    pace.note(0)
    assert pace.tokens_per_s == 5.0
    clock.now_s += 1.0
    pace.note(30)
    assert pace.tokens_per_s == 3.0
