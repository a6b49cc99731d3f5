"""Learning rate by version."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from peer.engine.schedule import LearningRate
from protocol.errors import ConfigError

RATE = LearningRate(peak=3e-3, warmup=4, total=60, final_fraction=0.1)


def test_warm_up_is_linear_and_the_first_update_moves() -> None:
    """Oracle: quarters of the peak."""
    assert [RATE.at(version) for version in range(4)] == pytest.approx([0.75e-3, 1.5e-3, 2.25e-3, 3e-3], rel=1e-8)


def test_decay_is_a_cosine_from_the_peak_to_the_final_fraction_and_then_constant() -> None:
    """Oracle: the values of half a cosine at its start, middle and end."""
    assert [RATE.at(version) for version in (4, 32, 60, 61, 10**9)] == pytest.approx(
        [3e-3, (3e-3 + 3e-4) / 2, 3e-4, 3e-4, 3e-4], rel=1e-8
    )


@given(st.integers(0, 200), st.integers(0, 200), st.floats(0, 1), st.floats(1e-8, 10))
def test_rate_stays_between_its_ends_and_has_nine_digits(warmup: int, decay: int, fraction: float, peak: float) -> None:
    """Oracle: bounds, monotony after warm-up, and the decimal that Python prints."""
    rate = LearningRate(peak=peak, warmup=warmup, total=warmup + decay, final_fraction=fraction)
    rates = [rate.at(version) for version in range(warmup + decay + 2)]
    assert all(0 <= value <= peak * (1 + 1e-8) for value in rates)
    assert rates[warmup:] == sorted(rates[warmup:], reverse=True)
    assert rates[:warmup] == sorted(rates[:warmup])
    assert all(value == float(f"{value:.9g}") for value in rates)


@pytest.mark.parametrize(
    "wrong",
    [
        {"peak": 0.0},
        {"peak": -1.0},
        {"peak": math.nan},
        {"peak": math.inf},
        {"warmup": -1},
        {"warmup": 61},
        {"final_fraction": 1.1},
        {"final_fraction": math.nan},
    ],
)
def test_senseless_settings_are_refused(wrong: dict[str, Any]) -> None:
    """Oracle: ConfigError."""
    with pytest.raises(ConfigError):
        LearningRate(**({"peak": 1e-3, "warmup": 4, "total": 60} | wrong))
