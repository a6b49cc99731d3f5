"""Measuring this machine: all of a profile is there and within reason. No times are compared.

Oracle: the calculated sizes.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from peer.memory.disk.volume import volume_of
from peer.memory.placement import Tier
from peer.memory.planning.profile import Profile, graph_bytes, workspace_bytes
from protocol.architecture import preset, stage_blocks
from protocol.errors import ConfigError
from protocol.layout import BlockKind

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def measured() -> Profile:
    from peer.engine.measure import measure

    return measure(preset("tiny"), sequences=2, sequence_length=32)


def test_every_price_is_there(measured: Profile) -> None:
    for block in stage_blocks(preset("tiny"), 1, 0):
        assert measured.forward_s(block) > 0
        assert measured.backward_s(block) > 0
    assert measured.step_8bit_s > 0
    assert measured.step_32bit_s > 0
    assert measured.link(Tier.HOST).in_bytes_per_s > 1e6
    assert 0 <= measured.link(Tier.HOST).compute_share < 1
    assert measured.is_host_memory
    assert measured.process_bytes > 1 << 20
    assert measured.nvme is None
    assert Profile.from_json(measured.to_json()) == measured


def test_sizes_are_as_calculated(measured: Profile) -> None:
    layer = next(block for block in stage_blocks(preset("tiny"), 1, 0) if block.kind is BlockKind.LAYER)
    assert measured.graph_bytes(layer) == pytest.approx(graph_bytes(layer, 2, 32), rel=0.05)
    assert measured.workspace_bytes(layer) == workspace_bytes(layer, 64)
    assert measured.entry_bytes == 2 * 32 * 64 * 4


def test_a_drive_is_measured_and_left_as_it_was(tmp_path: Path) -> None:
    from peer.engine.measure import measure

    folder = tmp_path / "drive"
    try:
        volume_of(folder).refuse_unfit(folder)
    except ConfigError as error:
        pytest.skip(f"the temporary folder is not fit: {error}")
    profile = measure(preset("tiny"), sequences=1, sequence_length=16, nvme=folder, optimizer="adamw32")
    assert profile.link(Tier.NVME).in_bytes_per_s > 1e5
    assert profile.link(Tier.NVME).out_bytes_per_s > 1e5
    assert list(folder.iterdir()) == []
    assert profile.step_workspace_bytes == 0
