"""coordinator/forecast/memory.py: what fits where, and what it costs to bring it.

Oracle: on paper, with bytes per element as the peers' memory engine has them (docs/decisions/0009).
"""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coordinator.forecast.memory import apart_bytes, residence, shared_bytes
from coordinator.forecast.spans import spans_of
from coordinator.forecast.swarm import Peers, Recipe
from coordinator.presets import find_preset
from peer.memory.units import OUTER
from protocol.errors import ConfigError
from tests.coordinator.forecast.asks import recipe

SPAN = spans_of(find_preset("bench").config, 2)[0]
N = SPAN.num_elements
WIDE = recipe(optimizer__name="adamw32")
HIDDEN = recipe(optimizer__name="adamw32", averaging__overlap=True)
LOCAL = recipe(optimizer__name="adamw32", averaging__mode="diloco", averaging__microbatches_per_step=4)


def peers(device: float, host: float | None = None, *, drive_gb_per_s: float | None = None) -> Peers:
    """A peer with so many bytes per element."""
    return Peers(
        count=1,
        device_bytes=int(device * N),
        host_bytes=None if host is None else int(host * N),
        pcie_gb_per_s=10.0,
        drive_gb_per_s=drive_gb_per_s,
    )


def test_state_of_gradients_takes_16_bytes_in_full() -> None:
    home = residence(Peers(count=1), SPAN, WIDE, wave=8)
    assert (home.device_bytes, home.host_bytes, home.drive_bytes) == (16 * N, 0, 0)
    assert (home.wave, home.wave_s, home.step_s) == (1, 0.0, 0.0)


def test_local_steps_take_16_more_and_overlap_takes_4() -> None:
    """Oracle: the names of what is kept apart, all of it in fp32 (`peer/memory/units.py`)."""
    assert apart_bytes(SPAN, LOCAL) == 4 * len(OUTER) * N
    assert apart_bytes(SPAN, HIDDEN) == 4 * N
    assert residence(Peers(count=1), SPAN, LOCAL, wave=8).device_bytes == 32 * N
    assert residence(Peers(count=1), SPAN, HIDDEN, wave=8).device_bytes == 20 * N


def test_what_ends_a_round_leaves_first_and_costs_nothing_meanwhile() -> None:
    home = residence(peers(20), SPAN, LOCAL, wave=8)
    assert (home.device_bytes, home.host_bytes) == (20 * N, 12 * N)
    assert (home.wave_s, home.step_s) == (0.0, 0.0)


def test_moments_come_once_a_step() -> None:
    """Oracle: 4 of 8 bytes per element, at 10 GB/s; of local steps, once for four microbatches."""
    home = residence(peers(12), SPAN, WIDE, wave=8)
    assert home.host_bytes == pytest.approx(4 * N)
    assert home.step_s == pytest.approx(4 * N / 10e9)
    assert home.wave_s == 0.0
    local = residence(peers(12), SPAN, LOCAL, wave=8)
    assert local.host_bytes == pytest.approx(20 * N)
    assert local.wave == 4
    assert local.wave_s == pytest.approx(4 * N / 10e9)
    assert local.step_s == 0.0


@pytest.mark.parametrize(("master", "weight_bytes"), [("fp32", 4), ("bf16-sr", 2)])
def test_weights_come_twice_a_wave_and_gradients_once(master: str, weight_bytes: int) -> None:
    """Oracle: half of weights and gradients is away, and all moments."""
    home = residence(peers(4), SPAN, recipe(optimizer__name="adamw32", optimizer__master=master), wave=8)
    assert home.device_bytes == 4 * N
    assert home.host_bytes == pytest.approx(0.5 * (weight_bytes + 4) * N + 8 * N, rel=1e-6)
    assert home.wave == 8
    assert home.wave_s == pytest.approx(0.5 * (2 * weight_bytes + 4) * N / 10e9)
    assert home.step_s == pytest.approx((0.5 * (weight_bytes + 4) + 8) * N / 10e9)


def test_what_host_memory_cannot_hold_comes_from_a_drive() -> None:
    """Oracle: of 8 bytes, 2 at 10 GB/s and 6 at 2 and then at 10."""
    home = residence(peers(8, 2, drive_gb_per_s=2.0), SPAN, WIDE, wave=8)
    assert home.host_bytes == pytest.approx(2 * N)
    assert home.drive_bytes == pytest.approx(6 * N)
    assert home.step_s == pytest.approx(2 * N / 10e9 + 6 * N / 10e9 + 6 * N / 2e9)


def test_what_fits_nowhere_is_refused_with_what_is_missing() -> None:
    with pytest.raises(ConfigError, match=r"stage 0 does not fit a peer with .* missing") as caught:
        residence(peers(8, 2), SPAN, WIDE, wave=8)
    assert "more stages" in caught.value.hint


@settings(max_examples=25)
@given(device=st.floats(0.0, 40.0), less=st.floats(0.0, 40.0), is_local=st.booleans())
def test_less_device_memory_never_streams_less(device: float, less: float, is_local: bool) -> None:
    spec: Recipe = LOCAL if is_local else WIDE
    more, fewer = (residence(peers(size), SPAN, spec, wave=4) for size in (max(device, less), min(device, less)))
    assert fewer.wave_s >= more.wave_s
    assert fewer.step_s >= more.step_s
    assert fewer.device_bytes <= more.device_bytes


def test_what_is_shared_is_what_checkpoints_hold() -> None:
    """Oracle: weights and moments; of local steps, anchor and velocity (peer/engine/statefiles.py)."""
    assert shared_bytes(SPAN, WIDE) == 12 * N
    assert shared_bytes(SPAN, LOCAL) == 8 * N
