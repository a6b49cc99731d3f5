"""The cut of a block into shards. Oracle: the rules of `protocol/layout.py`, element by element."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol import layout
from protocol.architecture import preset, stage_blocks
from protocol.layout import (
    ALIGNMENT_ELEMENTS,
    SHARD_ALIGNMENT_ELEMENTS,
    SHARD_ELEMENTS,
    BlockKind,
    BlockLayout,
    Shape,
    block_layout,
)

MATRICES = st.lists(st.tuples(st.integers(1, 90), st.integers(1, 90)), max_size=6)
VECTORS = st.lists(st.tuples(st.integers(1, 6000)), max_size=6)
LIMITS = st.integers(1, 6).map(lambda pages: pages * SHARD_ALIGNMENT_ELEMENTS)


@st.composite
def blocks(draw: st.DrawFn) -> BlockLayout:
    shapes: list[Shape] = [*draw(MATRICES), *draw(VECTORS)]
    if not shapes:
        shapes = [(1,)]
    return block_layout("layer.7", BlockKind.LAYER, [(f"tensor.{index}", shape) for index, shape in enumerate(shapes)])


@contextmanager
def shards_of_at_most(limit: int) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(layout, "SHARD_ELEMENTS", limit)
        yield


def contents(block: BlockLayout) -> list[str]:
    """Write down for every element of a block whose it is: a matrix's, a vector's, or nobody's (padding)."""
    elements = ["-"] * block.num_elements
    for slot in block.slots:
        elements[slot.offset : slot.end] = ["m" if len(slot.shape) > 1 else "v"] * slot.num_elements
    return elements


@given(block=blocks(), limit=LIMITS)
def test_shards_cover_a_block_once_and_none_is_too_large(block: BlockLayout, limit: int) -> None:
    with shards_of_at_most(limit):
        shards = block.shards()
    assert [element for shard in shards for element in range(shard.start, shard.stop)] == [*range(block.num_elements)]
    assert all(0 < shard.num_elements <= limit for shard in shards)
    assert all(shard.start % SHARD_ALIGNMENT_ELEMENTS == 0 for shard in shards)
    assert [shard.name for shard in shards] == [f"layer.7.{index}" for index in range(len(shards))]
    assert {shard.kind for shard in shards} == {BlockKind.LAYER}


@given(block=blocks(), limit=LIMITS)
def test_there_are_no_more_shards_than_needed_and_none_is_much_larger_than_another(
    block: BlockLayout, limit: int
) -> None:
    """Oracle: the number of full shards that would do; all but the last one are as long as the first."""
    with shards_of_at_most(limit):
        shards = block.shards()
    assert len(shards) <= -(-block.num_elements // limit)
    assert len({shard.num_elements for shard in shards[:-1]}) <= 1
    assert shards[-1].num_elements <= shards[0].num_elements


@given(block=blocks(), limit=LIMITS)
def test_a_shard_knows_its_part_of_matrices_vectors_and_padding(block: BlockLayout, limit: int) -> None:
    """Oracle: the block's elements written down one by one."""
    with shards_of_at_most(limit):
        shards = block.shards()
    everything = contents(block)
    for shard in shards:
        own = everything[shard.start : shard.stop]
        assert shard.num_elements % ALIGNMENT_ELEMENTS == shard.num_matrix_elements % ALIGNMENT_ELEMENTS == 0
        assert 0 <= shard.num_matrix_elements <= shard.num_elements
        assert "v" not in own[: shard.num_matrix_elements]
        assert "m" not in own[shard.num_matrix_elements :]
        padding = [element for start, end in shard.padding for element in range(start, end)]
        assert padding == [element for element, whose in enumerate(own) if whose == "-"]
        assert all(start < end for start, end in shard.padding)
    assert sum(shard.num_matrix_elements for shard in shards) == block.num_matrix_elements


@given(block=blocks())
def test_tensors_begin_aligned_and_padding_ends_where_the_next_one_begins(block: BlockLayout) -> None:
    assert all(slot.offset % ALIGNMENT_ELEMENTS == 0 for slot in block.slots)
    assert block.num_elements % ALIGNMENT_ELEMENTS == 0
    assert all(end - start < ALIGNMENT_ELEMENTS for start, end in block.padding())
    assert block.num_parameters == sum(whose != "-" for whose in contents(block))


def test_the_default_cut_is_part_of_the_protocol() -> None:
    """Oracle: by hand for `1b`; replicas that cut otherwise could neither average nor compare hashes."""
    assert (ALIGNMENT_ELEMENTS, SHARD_ALIGNMENT_ELEMENTS, SHARD_ELEMENTS) == (256, 4096, 8 * 2**20)
    by_name = {block.name: block for block in stage_blocks(preset("1b"), 1, 0)}
    # 128,256 rows of 2,048 are over 64 Mi elements: four blocks of 32,064 rows
    tables = [f"{name}.{index}" for name in ("embedding", "head") for index in range(4)]
    assert list(by_name) == [*tables[:4], *(f"layer.{index}" for index in range(16)), "norm", *tables[4:]]
    for name in tables:
        (slot,) = by_name[name].slots
        assert (slot.shape, slot.first_row) == ((32_064, 2048), 32_064 * int(name[-1]))
        # 65,667,072 elements in eight shards of 8,208,384, a multiple of 4,096 as it is
        assert [shard.num_elements for shard in by_name[name].shards()] == [8_208_384] * 8
    # 10,485,760 of attention, 50,331,648 of the MLP, two norms: an eighth of that, rounded up to 4,096
    layer = by_name["layer.0"].shards()
    assert sum(shard.num_elements for shard in layer) == 60_821_504
    assert [shard.num_elements for shard in layer] == [7_606_272] * 7 + [7_577_600]
    assert [shard.num_matrix_elements for shard in layer] == [7_606_272] * 7 + [7_573_504]
    assert [shard.num_elements for shard in by_name["norm"].shards()] == [2048]
