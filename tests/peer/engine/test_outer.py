"""The outer step against torch's own SGD, and where it has to do nothing or everything."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from peer.engine.outer import OuterSpec, outer_step
from protocol.errors import ConfigError

rates = st.floats(0.01, 2.0)
momenta = st.floats(0.0, 0.99)


def random(length: int, seed: int) -> torch.Tensor:
    return torch.randn(length, generator=torch.Generator().manual_seed(seed))


@given(learning_rate=rates, momentum=momenta, seed=st.integers(0, 1000), steps=st.integers(1, 5))
def test_is_sgd_with_nesterov_momentum(learning_rate: float, momentum: float, seed: int, steps: int) -> None:
    """Oracle: torch.optim.SGD in fp64."""
    anchor, velocity = random(100, seed), torch.zeros(100)
    weights = torch.nn.Parameter(anchor.double())
    sgd = torch.optim.SGD([weights], lr=learning_rate, momentum=momentum, nesterov=momentum > 0)
    for step in range(steps):
        drift = random(100, 1000 * seed + step)
        outer_step(anchor, velocity, drift, OuterSpec(learning_rate, momentum))
        weights.grad = drift.double()
        sgd.step()
    torch.testing.assert_close(anchor.double(), weights.detach(), rtol=1e-5, atol=1e-4)


@given(learning_rate=rates, momentum=momenta, length=st.integers(0, 70), seed=st.integers(0, 1000))
def test_no_number_depends_on_its_neighbours_or_on_a_fused_operation(
    learning_rate: float, momentum: float, length: int, seed: int
) -> None:
    """Oracle: numpy, one number at a time, each operation rounded to fp32: what every machine can do."""
    anchor, velocity, drift = (random(length, seed + n) for n in range(3))
    numbers = zip(anchor.tolist(), velocity.tolist(), drift.tolist(), strict=True)
    expected = [_by_hand(a, v, d, learning_rate, momentum) for a, v, d in numbers]
    before = drift.clone()
    outer_step(anchor, velocity, drift, OuterSpec(learning_rate, momentum))
    assert list(zip(anchor.tolist(), velocity.tolist(), strict=True)) == expected
    assert torch.equal(drift, before)


def _by_hand(
    anchor: float, velocity: float, drift: float, learning_rate: float, momentum: float
) -> tuple[float, float]:
    rate, friction = np.float32(learning_rate), np.float32(momentum)
    velocity32 = np.float32(velocity) * friction + np.float32(drift)
    step = (velocity32 * friction + np.float32(drift)) * rate
    return float(np.float32(anchor) - step), float(velocity32)


def test_rate_one_without_momentum_puts_the_anchor_where_the_replicas_are() -> None:
    """Oracle: with one replica, a local step and no codec, `diloco` is plain training."""
    anchor, weights = torch.tensor([1.0, 2.0, -4.0]), torch.tensor([0.5, 2.5, -4.0])
    outer_step(anchor, torch.zeros(3), anchor - weights, OuterSpec(1.0, 0.0))
    assert torch.equal(anchor, weights)


@pytest.mark.parametrize(
    ("learning_rate", "momentum"), [(0.0, 0.9), (2.1, 0.9), (float("nan"), 0.9), (0.7, 1.0), (0.7, -0.1)]
)
def test_senseless_settings_are_refused(learning_rate: float, momentum: float) -> None:
    with pytest.raises(ConfigError, match="make no sense"):
        OuterSpec(learning_rate, momentum)


def test_buffers_that_do_not_fit_are_our_own_bug() -> None:
    for drift in (torch.zeros(3), torch.zeros(4, dtype=torch.float64)):
        with pytest.raises(ValueError, match="flat fp32"):
            outer_step(torch.zeros(4), torch.zeros(4), drift, OuterSpec())
