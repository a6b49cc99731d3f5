"""Strangers, garbage and lying members against a real reduce: refused or named, and honest traffic goes on."""

from __future__ import annotations

import asyncio
import math
import struct
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace

import pytest
import torch
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
from peer.averaging.group_reduce import GroupReduce
from peer.averaging.reduce import ReduceError, ReduceGroup, ReduceTimeouts, Shards
from peer.averaging.reduce_service import ReduceService
from protocol.ids import digest
from tests.peer.averaging.reduce_members import (
    NAMESPACE,
    Member,
    call,
    group_numbers,
    hello,
    joined,
    make_group,
    make_shards,
    part_message,
    reduce_all,
    reference,
)

pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.usefixtures("no_task_left_behind")]


async def test_foreign_peer_is_refused_and_does_no_harm(swarm: list[Member]) -> None:
    """Oracle: the refusal's code, and the members' result is that of the members."""
    group = make_group(swarm[:2])
    inputs = [make_shards(seed, (1000,)) for seed in range(2)]
    first = asyncio.create_task(swarm[0].reduce.reduce(group, Shards.of(inputs[0])))
    await asyncio.sleep(0.1)
    answers = await call(swarm[3], swarm[0], hello(group.group_id, part_message(bytes(4000))))
    assert [answer.code for answer in answers] == [PROTOCOL_VIOLATION]
    second = await swarm[1].reduce.reduce(group, Shards.of(inputs[1]))
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
    "gives up at length": ((AveragingData(code=CANCELLED, peer_id=b"x" * 1_000_000),), "gave up"),
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
    honest = asyncio.create_task(swarm[0].reduce.reduce(group, Shards.of([torch.ones(100)])))
    answers = await call(swarm[1], swarm[0], hello(group.group_id, *messages))
    with pytest.raises(ReduceError, match=why) as caught:
        await honest
    assert caught.value.peer == swarm[1].peer
    assert caught.value.witness is None
    if lie != "another digest":  # that one comes after the talk
        assert answers[-1].code == CANCELLED
        assert answers[-1].peer_id == swarm[1].p2p.peer_id.to_bytes()


def normed(group: ReduceGroup, inputs: Sequence[Sequence[Tensor]], *, slack: Sequence[float] = ()) -> ReduceGroup:
    """Have every member say how long its shards are, times `slack`."""
    norms = [torch.cat(list(shards)).norm().item() for shards in inputs]
    return replace(group, norms=tuple(norm * each for norm, each in zip(norms, slack or (1.0,) * 3, strict=True)))


@pytest.mark.parametrize("name", ["fp32", "int8", "int4", "sparse"])
async def test_who_says_how_long_its_values_are_is_believed(swarm: list[Member], name: str) -> None:
    """Parts go to three reducers, and codecs round. Oracle: the same sum as without."""
    inputs = [[shard / 10.0**seed for shard in make_shards(seed)] for seed in range(3)]
    group = normed(make_group(swarm[:3], name), inputs)
    results = await reduce_all(swarm[:3], group, inputs)
    assert {joined(result) for result in results} == {b"".join(reference(name, inputs))}


@pytest.mark.parametrize("name", ["fp32", "sparse"])
async def test_who_sends_more_than_it_said_is_named(swarm: list[Member], name: str) -> None:
    """It sends no reducer more than its claim, and all of them together more. Oracle: whom the others name."""
    inputs = [[shard / 10.0**seed for shard in make_shards(seed)] for seed in range(3)]
    group = normed(make_group(swarm[:3], name), inputs, slack=(1.0, 0.7 if name == "fp32" else 0.1, 1.0))
    results = await reduce_all(swarm[:3], group, inputs)
    honest = [result for result in (results[0], results[2]) if isinstance(result, ReduceError)]
    assert [error.peer for error in honest] == [swarm[1].peer] * 2
    assert any("had said" in str(error) for error in honest), "the other one may hear of it"


ACCEPTED_SUMS = {
    "nothing": (b"", "does not say how much"),
    "of too few": (struct.pack("<2d", 1.0, 1.0), "does not say how much"),
    "less than nothing": (struct.pack("<3d", 1.0, -1e9, 1.0), "what cannot be"),
    "no number": (struct.pack("<3d", math.nan, 1.0, 1.0), "what cannot be"),
    "endless": (struct.pack("<3d", 1.0, 1.0, math.inf), "what cannot be"),
}


@pytest.mark.slow
@pytest.mark.parametrize("lie", ACCEPTED_SUMS)
async def test_a_reducer_that_does_not_say_what_it_was_sent_is_named(swarm: list[Member], lie: str) -> None:
    """It makes no part itself here: there is one, which is ours."""
    packed, why = ACCEPTED_SUMS[lie]
    group = replace(make_group([swarm[0], swarm[1], swarm[2]]), norms=(10.0, 10.0, 10.0))
    honest = asyncio.create_task(swarm[0].reduce.reduce(group, Shards.of([torch.ones(100)])))
    total = digest(struct.pack("<100f", *[1.0] * 100))
    accepted = [
        AveragingData(code=ACCEPTED, tensor_part=WireTensor(buffer=total + words))
        for words in (packed, struct.pack("<3d", 0.0, 0.0, 0.0))
    ]
    calls = [
        asyncio.create_task(call(liar, swarm[0], hello(group.group_id, ZEROS, words)))
        for liar, words in zip(swarm[1:3], accepted, strict=True)
    ]
    with pytest.raises(ReduceError, match=why) as caught:
        await honest
    assert caught.value.peer == swarm[1].peer
    await asyncio.gather(*calls, return_exceptions=True)


@pytest.mark.slow
async def test_second_stream_of_a_member_is_refused(swarm: list[Member]) -> None:
    """Two streams would be two votes. Oracle: the refusal; the reduce goes on with the first stream."""
    group, let_go = make_group(swarm[:2]), asyncio.Event()

    async def hold() -> AsyncIterator[AveragingData]:
        yield AveragingData(code=PART_FOR_AVERAGING, group_id=group.group_id)
        await let_go.wait()
        yield part_message(bytes(4))  # too short: ends it all

    honest = asyncio.create_task(swarm[0].reduce.reduce(group, Shards.of([torch.ones(100)])))
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

    honest = asyncio.create_task(swarm[0].reduce.reduce(group, Shards.of([torch.ones(100)])))
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
    first = asyncio.create_task(swarm[0].reduce.reduce(group, Shards.of(inputs[0])))
    _, reader, writer = await swarm[3].p2p.call_binary_stream_handler(
        swarm[0].p2p.peer_id, ReduceService._get_handle_name(NAMESPACE, "rpc_aggregate_part")
    )
    writer.write(GARBAGE[kind])
    await writer.drain()
    if kind == "a terabyte announced":
        async with asyncio.timeout(5):
            assert await reader.read() == b""  # refused before a single byte of it was waited for
    writer.transport.abort()
    second = await swarm[1].reduce.reduce(group, Shards.of(inputs[1]))
    assert joined(second) == joined(await first) == b"".join(reference("fp32", inputs))


@pytest.mark.parametrize(("limit", "holder"), [("MAX_STREAMS_PER_CALLER", 3), ("MAX_STREAMS", 2)])
async def test_there_are_only_so_many_streams(
    swarm: list[Member], monkeypatch: pytest.MonkeyPatch, limit: str, holder: int
) -> None:
    """Oracle: the stream over the limit (of a caller, of all together) is closed without an answer; when the others
    are gone there is room again.
    """
    monkeypatch.setattr(link, limit, 2)
    name = ReduceService._get_handle_name(NAMESPACE, "rpc_aggregate_part")
    held = [(await swarm[holder].p2p.call_binary_stream_handler(swarm[0].p2p.peer_id, name))[1:] for _ in range(2)]
    await asyncio.sleep(0.1)
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
    honest = GroupReduce(swarm[0].p2p, namespace=namespace)
    await honest.start()
    with pytest.raises(ReduceError) as caught:
        await honest.reduce(make_group([swarm[1], swarm[0]]), Shards.of([torch.ones(100)]))
    assert caught.value.peer == swarm[1].peer
