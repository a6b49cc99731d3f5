"""Whose turn it is. Oracles: every shard exactly once per cycle; no fragment much larger than its share."""

from __future__ import annotations

import pytest

from protocol.architecture import preset, stage_blocks
from protocol.fragments import Fragments
from protocol.ids import RoundId, Version
from protocol.layout import BlockLayout

LAST = RoundId(100)


def blocks(name: str = "1b", stages: int = 2, stage: int = 0) -> tuple[BlockLayout, ...]:
    return tuple(stage_blocks(preset(name), stages, stage))


@pytest.mark.parametrize("stage", [0, 1])
@pytest.mark.parametrize("count", [1, 2, 3, 5, 8])
def test_every_shard_has_its_turn_once_per_cycle(count: int, stage: int) -> None:
    layout = blocks(stage=stage)
    fragments = Fragments(layout, count, last_round=LAST)
    turns = [fragments.due(Version(7 + turn), RoundId(50)) for turn in range(count)]
    assert sorted(shard for turn in turns for shard in turn) == list(range(sum(len(each.shards()) for each in layout)))
    assert all(turn == tuple(sorted(turn)) for turn in turns)
    assert turns == [fragments.due(Version(7 + count + turn), RoundId(3)) for turn in range(count)]


@pytest.mark.parametrize("count", [2, 3, 4])
def test_fragments_are_alike_and_have_whole_blocks(count: int) -> None:
    """Oracle: the largest block is what the largest and the smallest fragment may differ by."""
    layout = blocks()
    owner = [number for number, block in enumerate(layout) for _ in block.shards()]
    loads = []
    for turn in Fragments(layout, count, last_round=LAST):
        mine = {owner[shard] for shard in turn}
        assert len(turn) == sum(len(layout[number].shards()) for number in mine), "all shards of its blocks"
        loads.append(sum(layout[number].num_elements for number in mine))
    assert max(loads) - min(loads) <= max(block.num_elements for block in layout)


def test_layers_that_are_alike_go_in_turn() -> None:
    """Oracle: by hand, for a stage in the middle, which has nothing but layers."""
    layout = blocks("1b", 4, 1)
    first, second = Fragments(layout, 2, last_round=LAST)
    sizes = {len(block.shards()) for block in layout}
    assert len(sizes) == 1
    each = sizes.pop()
    assert [shard // each for shard in first][::each] == list(range(0, len(layout), 2))
    assert [shard // each for shard in second][::each] == list(range(1, len(layout), 2))


def test_there_are_no_more_fragments_than_blocks() -> None:
    layout = blocks("tiny", 2, 0)
    fragments = Fragments(layout, 64, last_round=LAST)
    assert len(fragments) == len(layout)
    assert all(fragments)


def test_the_last_round_that_trains_has_everything() -> None:
    layout = blocks()
    fragments = Fragments(layout, 3, last_round=LAST)
    everything = tuple(range(sum(len(each.shards()) for each in layout)))
    assert fragments.due(Version(5), RoundId(99)) != everything
    assert fragments.due(Version(5), LAST) == everything
    assert fragments.due(Version(6), RoundId(101)) == everything
    assert Fragments(layout, 3, last_round=None).due(Version(6), RoundId(101)) != everything
