"""The cut into parts, the ordered sum, and reading encoded shards: everything about the reduce without a network."""

from __future__ import annotations

import asyncio
import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from peer.averaging.merge import MergeStopped, OrderedMerger
from peer.averaging.parts import PART_ELEMENTS, cut, cut_for_each
from peer.averaging.reduce import (
    ReduceGroup,
    ReduceTimeouts,
    decoded_parts,
    encode_shard,
    encoded_shard_bytes,
)
from peer.codecs import codec
from protocol.errors import WireError
from protocol.ids import PeerId
from protocol.rounds.factors import shares_of
from tests.peer.averaging.reduce_members import decode_shard

shard_lists = st.lists(st.integers(0, 5 * PART_ELEMENTS), max_size=6)


@given(shards=shard_lists, num_members=st.integers(1, 9))
def test_parts_cover_every_shard_once_and_in_order(shards: list[int], num_members: int) -> None:
    """Oracle: walking along the parts reaches each shard's end exactly, and no member has more than one part extra."""
    parts = cut(shards, num_members=num_members)
    assert [part.index for part in parts] == list(range(len(parts)))
    assert [(p.shard, p.start) for p in parts] == sorted((p.shard, p.start) for p in parts)
    for shard, length in enumerate(shards):
        mine = [part for part in parts if part.shard == shard]
        assert [part.start for part in mine] == list(itertools.accumulate([0] + [p.length for p in mine]))[:-1]
        assert sum(part.length for part in mine) == length
        assert all(0 < part.length <= PART_ELEMENTS for part in mine)
    shares = [sum(part.reducer == member for part in parts) for member in range(num_members)]
    assert max(shares) - min(shares) <= 1


@given(shards=shard_lists)
def test_cut_does_not_depend_on_the_number_of_members(shards: list[int]) -> None:
    """Bytes in the update log must be readable without knowing who made them."""
    spans = [[(part.shard, part.start, part.length) for part in cut(shards, num_members=n)] for n in (1, 2, 7)]
    assert spans[0] == spans[1] == spans[2]


@given(shards=shard_lists, num_members=st.integers(1, 5))
def test_a_cut_for_each_member_is_the_same_cut_again(shards: list[int], num_members: int) -> None:
    """Oracle: the cut for one member, whose place it takes in turn."""
    single = cut(shards, num_members=1)
    parts = cut_for_each(shards, num_members=num_members)
    assert [part.index for part in parts] == list(range(num_members * len(single)))
    for member in range(num_members):
        mine = [part for part in parts if part.reducer == member]
        assert [(p.shard, p.start, p.length) for p in mine] == [(p.shard, p.start, p.length) for p in single]


@pytest.mark.parametrize("arrival", list(itertools.permutations(range(4))))
async def test_sum_is_in_member_order_whatever_the_arrival(arrival: tuple[int, ...]) -> None:
    """Oracle: ((a + b) + c) + d in plain torch, for values where another order rounds differently."""
    given_values = [torch.randn(64, generator=torch.Generator().manual_seed(m)) * 10.0 ** (3 * m) for m in range(4)]
    expected = given_values[0] + given_values[1] + given_values[2] + given_values[3]
    assert not torch.equal(expected, given_values[3] + given_values[2] + given_values[1] + given_values[0])
    merger = OrderedMerger(codec("fp32"), [64], num_senders=4)
    waiting = []
    for member in arrival:
        waiting.append(asyncio.create_task(merger.accumulate_part(member, 0, given_values[member].clone())))
        await asyncio.sleep(0)
    assert {await task for task in waiting} == {codec("fp32").encode(expected)}


async def test_mean_counts_each_member_by_its_share() -> None:
    """Oracle: the weighted mean in plain torch, with one rounding per product and sum; shares of 1/4, 1/4 and 1/2."""
    given_values = [torch.randn(64, generator=torch.Generator().manual_seed(m)) for m in range(3)]
    expected = given_values[0] * 0.25 + given_values[1] * 0.25 + given_values[2] * 0.5
    merger = OrderedMerger(codec("fp32"), [64], num_senders=3, factors=shares_of((1, 1, 2)))
    waiting = [asyncio.create_task(merger.accumulate_part(m, 0, given_values[m].clone())) for m in (2, 0, 1)]
    assert {await task for task in waiting} == {codec("fp32").encode(expected)}


async def test_a_factor_of_one_changes_no_bit() -> None:
    """Oracle: the same sum without factors."""
    values = [torch.randn(64, generator=torch.Generator().manual_seed(m)) for m in range(2)]
    sums = []
    for factors in ((), (1.0, 1.0)):
        merger = OrderedMerger(codec("int8"), [64], num_senders=2, factors=factors)
        waiting = asyncio.create_task(merger.accumulate_part(1, 0, values[1].clone()))
        sums.append(await merger.accumulate_part(0, 0, values[0].clone()))
        await waiting
    assert sums[0] == sums[1]


async def test_a_member_of_weight_zero_changes_nothing() -> None:
    merger = OrderedMerger(codec("fp32"), [2], num_senders=2, factors=(1.0, 0.0))
    waiting = asyncio.create_task(merger.accumulate_part(1, 0, torch.tensor([1e30, -1e30])))
    merged = await merger.accumulate_part(0, 0, torch.tensor([1.0, 2.0]))
    assert await waiting == merged == codec("fp32").encode(torch.tensor([1.0, 2.0]))


async def test_merger_knows_who_is_missing_and_lets_waiters_go() -> None:
    merger = OrderedMerger(codec("fp32"), [2, 2], num_senders=3)
    waiting = asyncio.create_task(merger.accumulate_part(1, 0, torch.ones(2)))
    await asyncio.sleep(0)
    assert merger.missing(0) == [0, 2]
    merger.finalize()
    with pytest.raises(MergeStopped):
        await waiting
    with pytest.raises(MergeStopped):
        await merger.accumulate_part(0, 0, torch.ones(2))


async def test_cancelled_sender_does_not_take_the_sum_from_the_others() -> None:
    merger = OrderedMerger(codec("fp32"), [2], num_senders=3)
    first, second = (asyncio.create_task(merger.accumulate_part(m, 0, torch.ones(2))) for m in (0, 1))
    await asyncio.sleep(0)
    first.cancel()
    await asyncio.sleep(0)
    merged = await merger.accumulate_part(2, 0, torch.ones(2))
    assert merger.missing(0) == []
    assert await second == merged == codec("fp32").encode(torch.full((2,), 3.0))


async def test_values_that_could_overflow_the_sum_are_refused_when_they_arrive() -> None:
    """Two members of 3e38 each are finite and their sum is not: the one who sent it must be named, not the reducer."""
    merger = OrderedMerger(codec("fp32"), [1], num_senders=2)
    with pytest.raises(WireError, match="overflow"):
        await merger.accumulate_part(1, 0, torch.tensor([-3e38]))


@pytest.mark.parametrize("name", ["fp32", "fp16", "int8", "int4", "sparse"])
@pytest.mark.parametrize("num_elements", [0, 1, PART_ELEMENTS, 2 * PART_ELEMENTS + 1000])
def test_encoded_shard_reads_back_part_by_part(name: str, num_elements: int) -> None:
    """Oracle: the codec applied to each part by hand."""
    values = torch.randn(num_elements, generator=torch.Generator().manual_seed(1))
    parts = [values[s : s + PART_ELEMENTS] for s in range(0, num_elements, PART_ELEMENTS)]
    data = b"".join(codec(name).encode(part) for part in parts)
    assert len(data) == encoded_shard_bytes(name, num_elements)
    out = torch.full((num_elements,), 7.0)
    decode_shard(name, data, out)
    expected = [codec(name).decode(codec(name).encode(part), len(part)) for part in parts]
    assert torch.equal(out, torch.cat(expected) if expected else out)
    with pytest.raises(WireError, match="encoded shard"):
        decode_shard(name, data + b"\0", out)


@given(
    num_elements=st.integers(0, 9000),
    shares=st.lists(st.sampled_from([0.125, 0.25, 0.5]), min_size=1, max_size=4),
    is_mean=st.booleans(),
    seed=st.integers(0, 100),
)
def test_contributions_are_added_up_in_member_order(
    num_elements: int, shares: list[float], is_mean: bool, seed: int
) -> None:
    """Oracle: the codec and plain torch, member by member."""
    values = [torch.randn(num_elements, generator=torch.Generator().manual_seed(seed + m)) for m in range(len(shares))]
    sent = [encode_shard("sparse", each) for each in values]
    decoded = [codec("sparse").decode(data, num_elements) for data in sent]
    weighted = [share * each for share, each in zip(shares, decoded, strict=True)] if is_mean else decoded
    expected = weighted[0].clone()
    for each in weighted[1:]:
        expected += each
    out = torch.full((num_elements,), 7.0)
    for part, piece in decoded_parts("sparse", sent, num_elements, factors=shares if is_mean else ()):
        out[part] = piece
    assert torch.equal(out, expected)


def test_impossible_groups_are_refused() -> None:
    """A group is made by our own steward code, so these are bugs, not faults."""
    alice, bob = PeerId("alice"), PeerId("bob")
    for members, group_id in (((), b"g"), ((alice, alice), b"g"), ((alice, bob), b""), ((alice, bob), bytes(65))):
        with pytest.raises(ValueError, match="group"):
            ReduceGroup(group_id=group_id, members=members, codec="fp32")
    for factors in ((1.0,), (0.0, 0.0), (0.5, -1.0), (1.0, 1.5), (1.0, math.nan)):
        with pytest.raises(ValueError, match="factor"):
            ReduceGroup(group_id=b"g", members=(alice, bob), codec="fp32", factors=factors)
    with pytest.raises(ValueError, match="sender_s < reducer_s"):
        ReduceTimeouts(sender_s=5, reducer_s=5)
