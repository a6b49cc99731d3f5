"""The exact all-reduce between real p2p daemons: the same bytes for everybody, or an error that names a peer."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass

import pytest
import pytest_asyncio
import torch
from hivemind.p2p import P2P
from hivemind.proto.averaging_pb2 import (
    ACCEPTED,
    AVERAGED_PART,
    BAD_GROUP_ID,
    CANCELLED,
    PART_FOR_AVERAGING,
    PROTOCOL_VIOLATION,
    AveragingData,
)
from hivemind.proto.runtime_pb2 import Tensor as WireTensor
from torch import Tensor

from peer.averaging import link
from peer.averaging.butterfly import ButterflyReduce
from peer.averaging.link import from_hivemind
from peer.averaging.parts import PART_ELEMENTS, cut
from peer.averaging.reduce import Reduced, ReduceError, ReduceGroup, ReduceTimeouts
from peer.averaging.reduce_service import ReduceService
from peer.codecs import codec
from protocol.errors import LocalFault
from protocol.ids import PeerId, digest

pytestmark = [pytest.mark.asyncio(loop_scope="module")]

NAMESPACE = "test"
SHARDS = (3 * PART_ELEMENTS + 1000, 500, 0, PART_ELEMENTS, 70_000)  # 7 parts, some short, one shard without any
QUICK = ReduceTimeouts(sender_s=2.0, reducer_s=4.0, deadline_s=20.0)
group_numbers = itertools.count()


@dataclass(frozen=True)
class Member:
    """A peer: its daemon and its reduce."""

    p2p: P2P
    reduce: ButterflyReduce

    @property
    def peer(self) -> PeerId:
        return from_hivemind(self.p2p.peer_id)


async def start_members(number: int) -> list[Member]:
    """Start daemons that know each other through the first."""
    first = await P2P.create()
    addresses = await first.get_visible_maddrs()
    rest = await asyncio.gather(*(P2P.create(initial_peers=addresses) for _ in range(number - 1)))
    members = [Member(p2p, ButterflyReduce(p2p, namespace=NAMESPACE, early_wait_s=2.0)) for p2p in (first, *rest)]
    for member in members:
        await member.reduce.start()
        await member.p2p.wait_for_at_least_n_peers(1)
    return members


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def swarm() -> AsyncIterator[list[Member]]:
    """Four members that live as long as the module; whoever wants to kill one starts its own."""
    members = await start_members(4)
    try:
        yield members
    finally:
        await asyncio.gather(*(member.p2p.shutdown() for member in members))


@pytest_asyncio.fixture(loop_scope="module")
async def mortals() -> AsyncIterator[list[Member]]:
    """Three members for one test."""
    members = await start_members(3)
    try:
        yield members
    finally:
        await asyncio.gather(*(member.p2p.shutdown() for member in members))


def make_group(members: Sequence[Member], name: str = "fp32", timeouts: ReduceTimeouts = QUICK) -> ReduceGroup:
    group_id = next(group_numbers).to_bytes(8, "big")
    return ReduceGroup(group_id=group_id, members=tuple(m.peer for m in members), codec=name, timeouts=timeouts)


def make_shards(seed: int, lengths: Sequence[int] = SHARDS) -> list[Tensor]:
    """Gradients whose scale differs between members, so that the order of addition shows."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(length, generator=generator) * 10.0**seed for length in lengths]


def reference(name: str, inputs: Sequence[Sequence[Tensor]]) -> list[bytes]:
    """The definition, in plain torch: per part, decode what each member sends, add in member order, encode once."""
    used, expected = codec(name), []
    for part in cut([len(shard) for shard in inputs[0]], num_members=1):
        sent = [shards[part.shard][part.start : part.start + part.length] for shards in inputs]
        total = used.decode(used.encode(sent[0]), part.length)
        for values in sent[1:]:
            total = total + used.decode(used.encode(values), part.length)
        expected.append(used.encode(total))
    return expected


async def reduce_all(
    members: Sequence[Member], group: ReduceGroup, inputs: Sequence[Sequence[Tensor]], order: Sequence[int] = ()
) -> list[Reduced | BaseException]:
    """Reduce at every member at once (started in `order`); return results and errors in member order."""
    order = order or range(len(members))
    tasks = {}
    for position in order:
        tasks[position] = asyncio.create_task(members[position].reduce.reduce(group, inputs[position]))
        await asyncio.sleep(0.02)  # lets this member call the others before they know of the group
    return await asyncio.gather(*(tasks[position] for position in range(len(members))), return_exceptions=True)


def joined(reduced: Reduced | BaseException) -> bytes:
    assert isinstance(reduced, Reduced), reduced
    return b"".join(part for parts in reduced.parts for part in parts)


@pytest_asyncio.fixture(loop_scope="module", autouse=True)
async def no_task_left_behind(swarm: list[Member]) -> AsyncIterator[None]:
    """Oracle: the tasks that were there before. What has been cancelled gets a moment to end."""
    before = asyncio.all_tasks()
    yield
    for _ in range(100):
        left = asyncio.all_tasks() - before - {asyncio.current_task()}
        if not left:
            return
        await asyncio.sleep(0.02)
    raise AssertionError(f"left behind: {left}")


# --- the sum ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["fp32", "fp16", "int8"])
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


@pytest.mark.parametrize("order", [(2, 1, 0), (1, 2, 0), (2, 0, 1)])
async def test_order_of_arrival_does_not_matter(swarm: list[Member], order: tuple[int, ...]) -> None:
    """Oracle: member order. Who comes first waits in the others' services until they know of the group, too."""
    inputs = [make_shards(seed, (PART_ELEMENTS + 7,)) for seed in range(3)]
    results = await reduce_all(swarm[:3], make_group(swarm[:3]), inputs, order)
    assert {joined(result) for result in results} == {b"".join(reference("fp32", inputs))}


async def test_decode_into_writes_the_sum_of_one_shard(swarm: list[Member]) -> None:
    """Oracle: torch's own sum; fp32 loses nothing."""
    inputs = [make_shards(seed) for seed in range(2)]
    result = (await reduce_all(swarm[:2], make_group(swarm[:2]), inputs))[1]
    assert isinstance(result, Reduced)
    for index, length in enumerate(SHARDS):
        out = torch.empty(length)
        result.decode_into(index, out)
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
    tasks = [asyncio.create_task(m.reduce.reduce(group, given)) for m, given in zip(mortals, inputs, strict=True)]
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
    tasks = [asyncio.create_task(m.reduce.reduce(group, x)) for m, x in zip(swarm[:3], inputs, strict=True)]
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
        await swarm[0].reduce.reduce(group, make_shards(0, (1000,)))
    assert caught.value.peer == swarm[1].peer


async def test_who_is_no_member_or_reuses_an_id_is_told_at_once(swarm: list[Member]) -> None:
    """Both are bugs of our own steward code."""
    group = make_group(swarm[:2])
    with pytest.raises(ValueError, match="no member"):
        await swarm[2].reduce.reduce(group, [])
    await reduce_all(swarm[:2], group, [make_shards(0, (5,))] * 2)
    with pytest.raises(ValueError, match="used before"):
        await swarm[0].reduce.reduce(group, make_shards(0, (5,)))
    with pytest.raises(ValueError, match="flat contiguous fp32"):
        await swarm[0].reduce.reduce(make_group(swarm[:2]), [torch.zeros(2, 2)])


# --- strangers and liars ----------------------------------------------------------------------------------


async def call(caller: Member, callee: Member, requests: AsyncIterator[AveragingData]) -> list[AveragingData]:
    """Talk to a member's service with hivemind's own stub: neither `Link` nor the runner is in the way."""
    stub = ReduceService.get_stub(caller.p2p, callee.p2p.peer_id, namespace=NAMESPACE)
    return [answer async for answer in await stub.rpc_aggregate_part(requests)]


def part_message(data: bytes) -> AveragingData:
    return AveragingData(tensor_part=WireTensor(buffer=data))


async def hello(group_id: bytes, *then: AveragingData) -> AsyncIterator[AveragingData]:
    yield AveragingData(code=PART_FOR_AVERAGING, group_id=group_id)
    for message in then:
        yield message


async def test_foreign_peer_is_refused_and_does_no_harm(swarm: list[Member]) -> None:
    """Oracle: the refusal's code, and the members' result is that of the members."""
    group = make_group(swarm[:2])
    inputs = [make_shards(seed, (1000,)) for seed in range(2)]
    first = asyncio.create_task(swarm[0].reduce.reduce(group, inputs[0]))
    await asyncio.sleep(0.1)
    answers = await call(swarm[3], swarm[0], hello(group.group_id, part_message(bytes(4000))))
    assert [answer.code for answer in answers] == [PROTOCOL_VIOLATION]
    second = await swarm[1].reduce.reduce(group, inputs[1])
    assert joined(second) == joined(await first) == b"".join(reference("fp32", inputs))


@pytest.mark.slow
@pytest.mark.parametrize(("group_id", "code"), [(b"unknown", BAD_GROUP_ID), (b"", PROTOCOL_VIOLATION)])
async def test_wrong_group_id_is_refused(swarm: list[Member], group_id: bytes, code: int) -> None:
    assert [answer.code for answer in await call(swarm[3], swarm[0], hello(group_id))] == [code]


async def test_group_that_has_ended_is_refused_without_waiting(swarm: list[Member]) -> None:
    group = make_group(swarm[:2])
    await reduce_all(swarm[:2], group, [make_shards(0, (5,))] * 2)
    async with asyncio.timeout(1):
        answers = await call(swarm[1], swarm[0], hello(group.group_id))
    assert [answer.code for answer in answers] == [BAD_GROUP_ID]


NAN_PART = b"\x00\x00\xc0\x7f" * 100
ZEROS = part_message(bytes(400))
LIES: dict[str, tuple[tuple[AveragingData, ...], str]] = {
    "NaN": ((part_message(NAN_PART),), "bad part .*NaN"),
    "too short": ((part_message(bytes(399)),), "bad part .*399 bytes"),
    "too long": ((part_message(bytes(404)),), "bad part .*404 bytes"),
    "empty": ((part_message(b""),), "bad part .*0 bytes"),
    "too large to sum": ((part_message(b"\xff\xff\x7f\x7f" * 100),), "overflow"),
    "gives up": ((AveragingData(code=CANCELLED, peer_id=b"nobody"),), "gave up"),
    "wrong word at the end": ((ZEROS, AveragingData(code=AVERAGED_PART)), "AVERAGED_PART instead of its acceptance"),
    "another digest": (
        (ZEROS, AveragingData(code=ACCEPTED, tensor_part=WireTensor(buffer=b"x" * 32))),
        "another result",
    ),
    "leaves before the end": ((ZEROS,), "ended its stream"),
}


@pytest.mark.slow  # each waits a second for a peer that is not there to say goodbye
@pytest.mark.parametrize("lie", LIES)
async def test_lying_sender_is_named(swarm: list[Member], lie: str) -> None:
    """An authenticated member that says the wrong thing: the reducer raises, says why, names it, and tells it."""
    messages, why = LIES[lie]
    group = make_group(swarm[:2])
    honest = asyncio.create_task(swarm[0].reduce.reduce(group, [torch.ones(100)]))
    answers = await call(swarm[1], swarm[0], hello(group.group_id, *messages))
    with pytest.raises(ReduceError, match=why) as caught:
        await honest
    assert caught.value.peer == swarm[1].peer
    assert caught.value.witness is None
    if lie != "another digest":  # that one comes after the talk
        assert answers[-1].code == CANCELLED
        assert answers[-1].peer_id == swarm[1].p2p.peer_id.to_bytes()


@pytest.mark.slow
async def test_second_stream_of_a_member_is_refused(swarm: list[Member]) -> None:
    """Two streams would be two votes. Oracle: the refusal; the reduce goes on with the first stream."""
    group, let_go = make_group(swarm[:2]), asyncio.Event()

    async def hold() -> AsyncIterator[AveragingData]:
        yield AveragingData(code=PART_FOR_AVERAGING, group_id=group.group_id)
        await let_go.wait()
        yield part_message(bytes(4))  # too short: ends it all

    honest = asyncio.create_task(swarm[0].reduce.reduce(group, [torch.ones(100)]))
    first = asyncio.create_task(call(swarm[1], swarm[0], hold()))
    await asyncio.sleep(0.1)
    answers = await call(swarm[1], swarm[0], hello(group.group_id, ZEROS))
    assert [answer.code for answer in answers] == [PROTOCOL_VIOLATION]
    assert not honest.done()
    let_go.set()
    with pytest.raises(ReduceError, match="4 bytes"):
        await honest
    assert [answer.code for answer in await first] == [CANCELLED]


@pytest.mark.slow
async def test_member_that_never_accepts_is_named(swarm: list[Member]) -> None:
    """It has every sum and says nothing: without its word nobody may think that all have the result."""
    group = make_group(swarm[:2], timeouts=ReduceTimeouts(sender_s=0.3, reducer_s=0.5, deadline_s=20))
    let_go = asyncio.Event()

    async def silent() -> AsyncIterator[AveragingData]:
        async for message in hello(group.group_id, ZEROS):
            yield message
        await let_go.wait()

    honest = asyncio.create_task(swarm[0].reduce.reduce(group, [torch.ones(100)]))
    answers = asyncio.create_task(call(swarm[1], swarm[0], silent()))
    with pytest.raises(ReduceError, match="did not acknowledge") as caught:
        await honest
    assert caught.value.peer == swarm[1].peer
    let_go.set()
    await asyncio.gather(answers, return_exceptions=True)  # hivemind's stub may trip over the closed stream


GARBAGE = {
    "nothing": b"",
    "noise": bytes(range(256)) * 40,
    "a terabyte announced": b"\x00" + (1 << 40).to_bytes(8, "big") + bytes(1000),
    "no protobuf": b"\x00" + (8).to_bytes(8, "big") + b"\xff" * 8,
    "cut short": b"\x00" + (1000).to_bytes(8, "big") + bytes(10),
    "an endless group id": b"\x00" + (100_003).to_bytes(8, "big") + b"\x12\xa0\x8d\x06" + bytes(99_999),
}


@pytest.mark.parametrize("kind", GARBAGE)
async def test_garbage_ends_its_stream_and_nothing_else(swarm: list[Member], kind: str) -> None:
    """Raw bytes where a protobuf stream should be, from a peer of no group, while a reduce is waiting to happen."""
    group = make_group(swarm[:2])
    inputs = [make_shards(seed, (1000,)) for seed in range(2)]
    first = asyncio.create_task(swarm[0].reduce.reduce(group, inputs[0]))
    _, reader, writer = await swarm[3].p2p.call_binary_stream_handler(
        swarm[0].p2p.peer_id, ReduceService._get_handle_name(NAMESPACE, "rpc_aggregate_part")
    )
    writer.write(GARBAGE[kind])
    await writer.drain()
    if kind == "a terabyte announced":
        async with asyncio.timeout(5):
            assert await reader.read() == b""  # refused before a single byte of it was waited for
    writer.transport.abort()
    second = await swarm[1].reduce.reduce(group, inputs[1])
    assert joined(second) == joined(await first) == b"".join(reference("fp32", inputs))


async def test_caller_gets_only_so_many_streams(swarm: list[Member], monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: the stream over the limit is closed without an answer; when the others are gone there is room again."""
    monkeypatch.setattr(link, "MAX_STREAMS_PER_CALLER", 2)
    name = ReduceService._get_handle_name(NAMESPACE, "rpc_aggregate_part")
    held = [(await swarm[3].p2p.call_binary_stream_handler(swarm[0].p2p.peer_id, name))[1:] for _ in range(2)]
    assert await call(swarm[3], swarm[0], hello(b"")) == []
    for _, writer in held:
        writer.transport.abort()
    await asyncio.sleep(0.2)
    assert [answer.code for answer in await call(swarm[3], swarm[0], hello(b""))] == [PROTOCOL_VIOLATION]


def summed(data: bytes) -> AveragingData:
    return AveragingData(code=AVERAGED_PART, tensor_part=WireTensor(buffer=data))


@pytest.mark.parametrize(
    "answers",
    [[summed(NAN_PART)], [summed(bytes(8))], [AveragingData(code=BAD_GROUP_ID)], [AveragingData(code=99)], []],
    ids=["NaN", "short", "refuses", "unknown code", "hangs up"],
)
async def test_lying_reducer_is_named(swarm: list[Member], answers: list[AveragingData]) -> None:
    """A member whose reducer says the wrong thing, whatever it receives."""
    namespace = f"lies-{next(group_numbers)}"

    async def lie(requests: AsyncIterator[AveragingData], _context: object) -> AsyncIterator[AveragingData]:
        await anext(requests)
        for answer in answers:
            yield answer

    name = ReduceService._get_handle_name(namespace, "rpc_aggregate_part")
    await swarm[1].p2p.add_protobuf_handler(name, lie, AveragingData, stream_input=True, stream_output=True)
    honest = ButterflyReduce(swarm[0].p2p, namespace=namespace)
    await honest.start()
    with pytest.raises(ReduceError) as caught:
        await honest.reduce(make_group([swarm[1], swarm[0]]), [torch.ones(100)])
    assert caught.value.peer == swarm[1].peer
