"""What averages say of a line. Oracle: a line of known rate and latency."""

from __future__ import annotations

import pytest

from peer.averaging.line_rate import REMEMBERED, SETUP_S, LineRate


def seen(*sizes: int, rate: float, latency_s: float = SETUP_S) -> LineRate:
    line = LineRate()
    for size in sizes:
        line.note(size, latency_s + size / rate)
    return line


def test_nothing_is_known_before_the_first_average() -> None:
    line = LineRate()
    line.note(0, 1.0)
    assert line.bytes_per_s is None


def test_small_averages_do_not_make_a_line_look_slow() -> None:
    """They take as long as it takes to meet. Oracle: the rate of the line."""
    assert seen(10**8, *[10**4] * (REMEMBERED - 1), rate=1e7).bytes_per_s == pytest.approx(1e7)


def test_of_averages_alike_the_newest_counts() -> None:
    line = seen(10**8, rate=1e7)
    line.note(99_000_000, SETUP_S + 33.0)
    assert line.bytes_per_s == pytest.approx(3e6)


def test_what_was_long_ago_is_forgotten() -> None:
    """A line that was fast may be shared today. Oracle: the rate of the last ones."""
    line = seen(10**8, rate=1e7)
    for _ in range(REMEMBERED):
        line.note(10**6, SETUP_S + 10.0)
    assert line.bytes_per_s == pytest.approx(1e5)


def test_an_average_faster_than_meeting_usually_is() -> None:
    """No rate below zero, and none without bound."""
    assert seen(10**6, rate=1e8, latency_s=0.0).bytes_per_s == pytest.approx(1e9)
