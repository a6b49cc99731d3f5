"""The flat buffer of a shard's optimizer state. Oracle: sizes and borders, by hand."""

from __future__ import annotations

import itertools

import pytest

from peer.memory.moments import FIELD_ALIGNMENT_BYTES, OptimizerName, groups, moment_bytes, moment_fields
from protocol import layout as layouts
from protocol.architecture import preset, stage_blocks
from protocol.layout import BlockKind, ShardLayout

BLOCKS = stage_blocks(preset("demo"), 1, 0)


def cut() -> tuple[ShardLayout, ...]:
    """Some shards are all matrices, some all vectors, some both."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(layouts, "SHARD_ELEMENTS", 1 << 17)
        return tuple(shard for block in BLOCKS for shard in block.shards())


SHARDS = (*(shard for block in BLOCKS for shard in block.shards()), *cut())


@pytest.mark.parametrize("optimizer", ["adamw8bit", "adamw32"])
def test_fields_stand_one_behind_the_other_and_fill_the_buffer(optimizer: OptimizerName) -> None:
    for layout in SHARDS:
        fields = moment_fields(layout, optimizer)
        assert all(field.offset_bytes % FIELD_ALIGNMENT_BYTES == 0 for field in fields)
        for before, after in itertools.pairwise(fields):
            assert 0 <= after.offset_bytes - before.end_bytes < FIELD_ALIGNMENT_BYTES
        assert 0 <= moment_bytes(layout, optimizer) - fields[-1].end_bytes < FIELD_ALIGNMENT_BYTES
        assert len({(field.group, field.name) for field in fields}) == len(fields)


@pytest.mark.parametrize("optimizer", ["adamw8bit", "adamw32"])
def test_every_element_has_two_moments(optimizer: OptimizerName) -> None:
    for layout in SHARDS:
        for group, part in groups(layout):
            own = {f.name: f.num_elements for f in moment_fields(layout, optimizer) if f.group == group}
            assert own["moment1"] == own["moment2"] == part.stop - part.start


def test_only_matrices_of_layers_are_kept_in_8_bit() -> None:
    """Oracle: the kinds of shards; 8 bits and a scale per 256 elements are 2.03 bytes per element."""
    for layout in SHARDS:
        in_8_bit = {field.group for field in moment_fields(layout, "adamw8bit") if field.dtype == "uint8"}
        assert in_8_bit == ({"matrices"} if layout.kind is BlockKind.LAYER else set())
    layer = next(layout for layout in SHARDS if layout.kind is BlockKind.LAYER)
    assert moment_bytes(layer, "adamw32") / layer.num_elements == pytest.approx(8.0, rel=0.01)
    assert moment_bytes(layer, "adamw8bit") / layer.num_elements == pytest.approx(2.03, rel=0.02)
