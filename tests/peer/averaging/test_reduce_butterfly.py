"""The exact all-reduce between real p2p daemons: the same bytes for everybody, or an error that names a peer."""

from __future__ import annotations

import asyncio
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from peer.averaging import runner, taken
from peer.averaging.link import Link
from peer.averaging.parts import PART_ELEMENTS
from peer.averaging.reduce import (
    Reduced,
    ReduceError,
    ReduceGroup,
    ReduceTimeouts,
    Shards,
    contribution,
    encoded_shard_bytes,
)
from peer.averaging.reduce_service import ReduceService
from peer.averaging.spool import Spool
from peer.codecs import codec
from protocol.errors import LocalFault, StorageError, UnreachableError
from protocol.ids import PeerId, digest
from protocol.rounds.factors import shares_of
from tests.peer.averaging.reduce_members import (
    NAMESPACE,
    QUICK,
    SHARDS,
    Member,
    call,
    decode_shard,
    hello,
    joined,
    make_group,
    make_shards,
    reduce_all,
    reference,
)

pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.usefixtures("no_task_left_behind")]


# --- the sum ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["fp32", "fp16", "int8", "int4", "sparse"])
@pytest.mark.parametrize("number", [1, 2, 3, 4])
async def test_every_member_gets_the_bytes_of_the_plain_sum(swarm: list[Member], number: int, name: str) -> None:
    """Oracle: `reference`, bit by bit; the inputs are the same as before."""
    members = swarm[:number]
    inputs = [make_shards(seed) for seed in range(number)]
    before = [[shard.clone() for shard in shards] for shards in inputs]
    results = await reduce_all(members, make_group(members, name), inputs)
    expected = reference(name, before)
    for result in results:
        assert joined(result) == b"".join(expected)
        assert isinstance(result, Reduced)
        assert result.digest == digest(*expected)
        assert result.shard_elements == SHARDS
        assert (result.bytes_sent > 0) == (result.bytes_received > 0) == (number > 1)
    assert all(
        torch.equal(a, b) for old, new in zip(before, inputs, strict=True) for a, b in zip(old, new, strict=True)
    )


async def test_the_digest_is_that_of_the_bytes_however_they_are_hashed(
    swarm: list[Member], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: all bytes hashed at once; here every part is hashed as soon as those before it are there."""
    monkeypatch.setattr(runner, "HASHED_BYTES", 1)
    results = await reduce_all(swarm[:3], make_group(swarm[:3]), [make_shards(seed) for seed in range(3)])
    for result in results:
        assert isinstance(result, Reduced)
        assert result.digest == digest(joined(result))


async def test_with_weights_every_member_gets_the_bytes_of_the_mean(swarm: list[Member]) -> None:
    """Oracle: torch's own weighted mean; fp32 loses nothing, and shares of 1/8, 3/8 and 1/2 round nothing."""
    inputs = [make_shards(seed, (PART_ELEMENTS + 7,)) for seed in range(3)]
    group = replace(make_group(swarm[:3]), factors=shares_of((100, 300, 400)))
    results = await reduce_all(swarm[:3], group, inputs)
    a, b, c = (shards[0] for shards in inputs)
    out = torch.empty(len(a))
    decode_shard("fp32", joined(results[0]), out)
    assert torch.equal(out, a * 0.125 + b * 0.375 + c * 0.5)
    assert len({joined(result) for result in results}) == 1


@pytest.mark.parametrize("name", ["fp32", "int8"])
async def test_what_a_maker_keeps_is_what_it_was_sent(swarm: list[Member], name: str) -> None:
    """Factors come later, and the sum is the same. Oracle: every member's own values behind the codec."""
    inputs = [make_shards(seed) for seed in range(3)]
    group = replace(make_group(swarm[:3], name), factors=(1.0, 0.5, 1.0))
    plain = await reduce_all(swarm[:3], replace(group, group_id=b"plain " + name.encode()), inputs)
    results = await reduce_all(swarm[:3], replace(group, keeps=True), inputs)
    assert {joined(result) for result in (*plain, *results)} == {joined(plain[0])}
    parts = []
    for result in results:
        assert isinstance(result, Reduced)
        assert result.taken is not None
        for member, shards in enumerate(inputs):
            for part, values in result.taken.of(member):
                sent = shards[part.shard][part.start : part.start + part.length]
                assert torch.equal(values, contribution(sent, using=codec(name)))
                parts.append((member, part.index))
    assert sorted(parts) == [(member, index) for member in range(3) for index in range(7)]
    assert all(isinstance(result, Reduced) and result.taken is None for result in plain)


async def test_alone_too_a_sum_is_made_smaller_by_what_does_not_count(swarm: list[Member]) -> None:
    """Or a group of one would take a step that is larger by the same factor. Oracle: plain torch."""
    inputs = [make_shards(0, (PART_ELEMENTS + 7,))]
    (result,) = await reduce_all(swarm[:1], replace(make_group(swarm[:1]), factors=(0.25,)), inputs)
    out = torch.empty(len(inputs[0][0]))
    decode_shard("fp32", joined(result), out)
    assert torch.equal(out, inputs[0][0] * 0.25)


@pytest.mark.parametrize("order", [(2, 1, 0), (1, 2, 0), (2, 0, 1)])
async def test_order_of_arrival_does_not_matter(swarm: list[Member], order: tuple[int, ...]) -> None:
    """Oracle: member order. Who comes first waits in the others' services until they know of the group, too."""
    inputs = [make_shards(seed, (PART_ELEMENTS + 7,)) for seed in range(3)]
    results = await reduce_all(swarm[:3], make_group(swarm[:3]), inputs, order)
    assert {joined(result) for result in results} == {b"".join(reference("fp32", inputs))}


async def test_a_shard_of_the_result_is_read_as_its_sum(swarm: list[Member]) -> None:
    """Oracle: torch's own sum; fp32 loses nothing."""
    inputs = [make_shards(seed) for seed in range(2)]
    result = (await reduce_all(swarm[:2], make_group(swarm[:2]), inputs))[1]
    assert isinstance(result, Reduced)
    offset = 0
    for index, length in enumerate(SHARDS):
        out = torch.empty(length)
        size = encoded_shard_bytes(result.codec, length)
        decode_shard(result.codec, result.data[offset : offset + size], out)
        offset += size
        assert torch.equal(out, inputs[0][index] + inputs[1][index])


async def test_groups_of_different_stages_run_at_the_same_time(swarm: list[Member]) -> None:
    """Oracle: each group's own reference; the groups overlap in members and are told apart by id alone."""
    lists = [swarm[:3], [swarm[2], swarm[0]], [swarm[3], swarm[1], swarm[0], swarm[2]]]
    inputs = [[make_shards(seed + index, (200_000,)) for seed in range(len(ms))] for index, ms in enumerate(lists)]
    runs = [reduce_all(ms, make_group(ms, "int8"), given) for ms, given in zip(lists, inputs, strict=True)]
    for given, results in zip(inputs, await asyncio.gather(*runs), strict=True):
        assert {joined(result) for result in results} == {b"".join(reference("int8", given))}


async def test_shards_smaller_than_the_group_still_bind_everybody(swarm: list[Member]) -> None:
    """One part and four members: three reduce nothing and yet have to accept."""
    inputs = [make_shards(seed, (10,)) for seed in range(4)]
    results = await reduce_all(swarm, make_group(swarm), inputs)
    assert {joined(result) for result in results} == {b"".join(reference("fp32", inputs))}


async def test_nothing_to_sum_is_agreed_on_as_well(swarm: list[Member]) -> None:
    results = await reduce_all(swarm[:2], make_group(swarm[:2]), [[torch.empty(0)]] * 2)
    assert [joined(result) for result in results] == [b"", b""]


# --- failures ---------------------------------------------------------------------------------------------


@pytest.mark.slow
async def test_everybody_raises_when_a_member_is_killed_half_way(mortals: list[Member]) -> None:
    """Oracle: nobody has a result, all survivors name the dead one, long before the deadline."""
    inputs = [make_shards(seed, (60 * PART_ELEMENTS,)) for seed in range(3)]
    group = make_group(mortals)
    tasks = [
        asyncio.create_task(m.reduce.reduce(group, Shards.of(given))) for m, given in zip(mortals, inputs, strict=True)
    ]
    await asyncio.sleep(0.1)
    assert not any(task.done() for task in tasks), "the kill must hit a reduce that is under way"
    async with asyncio.timeout(QUICK.reducer_s + 3):
        await mortals[1].p2p.shutdown()
        results = await asyncio.gather(*tasks, return_exceptions=True)
    assert [type(result) for result in results] == [ReduceError] * 3
    assert {result.peer for result in results if isinstance(result, ReduceError)} == {mortals[1].peer}


@pytest.mark.slow
async def test_everybody_raises_when_a_member_never_comes(swarm: list[Member]) -> None:
    group = make_group(swarm[:3])
    inputs = [make_shards(seed, (1000,)) for seed in range(2)]
    async with asyncio.timeout(QUICK.reducer_s + 3):
        results = await reduce_all(swarm[:2], group, inputs)
    for result in results:
        assert isinstance(result, ReduceError)
        assert result.peer == swarm[2].peer


async def test_member_of_another_size_is_named_by_everybody(swarm: list[Member]) -> None:
    inputs = [make_shards(seed, (1000 + (seed == 2),)) for seed in range(3)]
    results = await reduce_all(swarm[:3], make_group(swarm[:3]), inputs)
    assert all(isinstance(result, ReduceError) for result in results)
    assert {result.peer for result in results[:2] if isinstance(result, ReduceError)} == {swarm[2].peer}


async def test_member_with_nan_fails_itself_and_is_named_by_the_others(swarm: list[Member]) -> None:
    inputs = [make_shards(seed, (PART_ELEMENTS * 3,)) for seed in range(3)]
    inputs[1][0][-1] = float("nan")
    results = await reduce_all(swarm[:3], make_group(swarm[:3]), inputs)
    assert isinstance(results[1], LocalFault)
    for result in (results[0], results[2]):
        assert isinstance(result, ReduceError)
        assert result.peer == swarm[1].peer


async def test_a_member_whose_disk_is_full_fails_itself_and_the_others_hear_at_once(
    swarm: list[Member], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Oracle: its own error; whom the others name, before they would give it up; the event loop is not held up."""
    threads: list[threading.Thread] = []

    def room(num_bytes: int, folder: Path | None) -> Spool:
        threads.append(threading.current_thread())
        if folder == tmp_path:
            raise StorageError("no room")
        return Spool(num_bytes, folder)

    monkeypatch.setattr(runner, "Spool", room)
    monkeypatch.setattr(swarm[1].reduce, "_folder", tmp_path)
    async with asyncio.timeout(QUICK.sender_s / 2):
        results = await reduce_all(swarm[:3], make_group(swarm[:3]), [make_shards(seed) for seed in range(3)])
    assert isinstance(results[1], StorageError)
    for result in (results[0], results[2]):
        assert isinstance(result, ReduceError)
        assert result.peer == swarm[1].peer
    assert threading.current_thread() not in threads


async def test_without_room_for_what_it_is_sent_a_member_sums_all_the_same(
    swarm: list[Member], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: the sum; nothing was kept."""

    def room(num_bytes: int, folder: Path | None) -> Spool:
        raise StorageError("no room")

    monkeypatch.setattr(taken, "Spool", room)
    inputs = [make_shards(seed) for seed in range(3)]
    results = await reduce_all(swarm[:3], replace(make_group(swarm[:3]), keeps=True), inputs)
    assert {joined(result) for result in results} == {b"".join(reference("fp32", inputs))}
    assert all(isinstance(result, Reduced) and result.taken is None for result in results)


async def test_unreachable_member_is_named(swarm: list[Member]) -> None:
    """The address book knows nothing of this id; dialling it fails at once."""
    stranger = PeerId("12D3KooWGzBtXVcJH6mFEYqZjZ9ttGzV8uzdZp7J2bMLwQ5D5jkC")
    members = (*(m.peer for m in swarm[:2]), stranger)
    group = ReduceGroup(group_id=b"ghost", members=members, codec="fp32", timeouts=QUICK)
    results = await reduce_all(swarm[:2], group, [make_shards(seed, (10,)) for seed in range(2)])
    assert {result.peer for result in results if isinstance(result, ReduceError)} == {stranger}


async def test_cancelled_reduce_leaves_no_task_and_tells_the_others(swarm: list[Member]) -> None:
    group = make_group(swarm[:3])
    inputs = [make_shards(seed, (40 * PART_ELEMENTS,)) for seed in range(3)]
    tasks = [asyncio.create_task(m.reduce.reduce(group, Shards.of(x))) for m, x in zip(swarm[:3], inputs, strict=True)]
    await asyncio.sleep(0.05)
    tasks[0].cancel()
    results = await asyncio.gather(*tasks, return_exceptions=True)
    assert isinstance(results[0], asyncio.CancelledError)
    assert {result.peer for result in results[1:] if isinstance(result, ReduceError)} == {swarm[0].peer}
    assert len(results[1:]) == 2


@pytest.mark.slow
async def test_deadline_ends_a_reduce_that_only_trickles(swarm: list[Member]) -> None:
    """The silent member keeps its streams open, so only the deadline (shorter than its timeout) can end this."""
    group = make_group(swarm[:2], timeouts=ReduceTimeouts(sender_s=8, reducer_s=9, deadline_s=0.5))
    with pytest.raises(ReduceError, match="deadline") as caught:
        await swarm[0].reduce.reduce(group, Shards.of(make_shards(0, (1000,))))
    assert caught.value.peer == swarm[1].peer


async def test_a_group_that_is_asked_for_twice_fails_the_second_attempt_and_nothing_else(swarm: list[Member]) -> None:
    """A steward may repeat itself, or be hostile. Oracle: the error of a failed attempt, which blames nobody else."""
    group = make_group(swarm[:2])
    await reduce_all(swarm[:2], group, [make_shards(0, (5,))] * 2)
    with pytest.raises(ReduceError, match="used before") as caught:
        await swarm[0].reduce.reduce(group, Shards.of(make_shards(0, (5,))))
    assert caught.value.peer == swarm[0].peer


async def test_who_is_no_member_or_has_no_flat_shards_is_told_at_once(swarm: list[Member]) -> None:
    """Both are bugs of our own code."""
    with pytest.raises(ValueError, match="no member"):
        await swarm[2].reduce.reduce(make_group(swarm[:2]), Shards.of([]))
    with pytest.raises(ValueError, match="flat contiguous fp32"):
        await swarm[0].reduce.reduce(make_group(swarm[:1]), Shards.of([torch.zeros(2, 2)]))


async def test_stopped_member_answers_nobody_any_more(mortals: list[Member]) -> None:
    """Oracle: a call that was waiting for its group ends, and the next one finds no handler."""
    waiting = asyncio.create_task(call(mortals[1], mortals[0], hello(b"not yet")))
    await asyncio.sleep(0.1)
    await mortals[0].reduce.stop()
    assert await waiting == []
    stub = ReduceService.get_stub(Link(mortals[1].p2p), mortals[0].p2p.peer_id, namespace=NAMESPACE)
    with pytest.raises(UnreachableError, match="protocols not supported"):
        await stub.rpc_aggregate_part(hello(b"too late"))
