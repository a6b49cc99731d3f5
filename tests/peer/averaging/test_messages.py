"""Whole messages on real sockets, on both kinds of event loop. Oracle: hivemind's own reading and writing of them."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
import uvloop
from hivemind.p2p import P2P
from hivemind.proto.averaging_pb2 import AVERAGED_PART, AveragingData
from hivemind.proto.p2pd_pb2 import RPCError

from peer.averaging.messages import BELIEVED_BYTES, END_OF_STREAM, MAX_REDUCE_MESSAGE_BYTES, MessageReader, head_of
from protocol.errors import WireError

Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]


@pytest.fixture(params=[asyncio.new_event_loop, uvloop.new_event_loop], ids=["asyncio", "uvloop"])
def run(request: pytest.FixtureRequest) -> Callable[[Callable[[Streams, Streams], Awaitable[None]]], None]:
    """Run a coroutine function on two streams that are connected."""

    async def connected(body: Callable[[Streams, Streams], Awaitable[None]]) -> None:
        ends = [await asyncio.open_unix_connection(sock=end) for end in socket.socketpair()]
        try:
            async with asyncio.timeout(20):
                await body(ends[0], ends[1])
        finally:
            for _, writer in ends:
                writer.transport.abort()
            await asyncio.sleep(0)

    def run_on(body: Callable[[Streams, Streams], Awaitable[None]]) -> None:
        with asyncio.Runner(loop_factory=request.param) as runner:
            runner.run(connected(body))

    return run_on


def message(num_bytes: int, code: int = AVERAGED_PART) -> AveragingData:
    made = AveragingData(code=code)
    made.tensor_part.buffer = bytes(index % 251 for index in range(num_bytes))
    return made


def framed(message: AveragingData) -> tuple[bytes, bytes]:
    data = message.SerializeToString()
    return head_of(len(data)), data


async def read(reader: MessageReader) -> tuple[bool, bytes]:
    is_error, data = await reader.read()
    return is_error, bytes(data)


def taken_over(streams: Streams) -> MessageReader:
    return MessageReader(streams[0], streams[1].transport)


async def write(streams: Streams, *parts: bytes) -> None:
    for part in parts:
        streams[1].write(part)
    await streams[1].drain()


def test_what_hivemind_sends_is_read(run: Any) -> None:
    """Long ones and short ones, a believed one and one that is twice as long, and the end that is an error."""
    sent = [message(size) for size in (524_288, 0, 3, 300_000, BELIEVED_BYTES, 2 * BELIEVED_BYTES, 1_000_000)]

    async def body(left: Streams, right: Streams) -> None:
        async def send() -> None:
            for each in (*sent, RPCError(message="no"), P2P.END_OF_STREAM):
                await P2P.send_protobuf(each, left[1])

        sending = asyncio.create_task(send())
        reader = taken_over(right)
        for each in sent:
            assert await read(reader) == (False, each.SerializeToString())
        assert await read(reader) == (True, RPCError(message="no").SerializeToString())
        assert await read(reader) == (True, b"")
        await sending

    run(body)


def test_what_is_framed_is_read_by_hivemind(run: Any) -> None:
    async def body(left: Streams, right: Streams) -> None:
        sending = asyncio.create_task(write(left, *framed(message(524_288)), END_OF_STREAM))
        assert await P2P.receive_protobuf(AveragingData, right[0]) == (message(524_288), None)
        assert await P2P.receive_protobuf(AveragingData, right[0]) == (None, RPCError())
        await sending

    run(body)


def test_bytes_that_a_stream_reader_has_read_come_first(run: Any) -> None:
    """Oracle: one and a half messages are there when the stream is taken over."""

    async def body(left: Streams, right: Streams) -> None:
        head, data = framed(message(1000))
        await write(left, b"x", head, data, head, data[:500])
        assert await right[0].readexactly(1) == b"x"
        await asyncio.sleep(0.05)
        reader = taken_over(right)
        assert await read(reader) == (False, data)
        await write(left, data[500:])
        assert await read(reader) == (False, data)

    run(body)


def test_who_stops_waiting_can_ask_again(run: Any) -> None:
    """Oracle: cancelled in the middle of a head and in the middle of a body, the message is whole."""

    async def body(left: Streams, right: Streams) -> None:
        reader = taken_over(right)
        wire = b"".join(framed(message(200_000)))
        for start, stop in ((0, 4), (4, 100_000)):
            await write(left, wire[start:stop])
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.05):
                    await reader.read()
        sending = asyncio.create_task(write(left, wire[100_000:]))
        assert (await reader.read())[1] == wire[9:]
        await sending

    run(body)


def test_nothing_is_read_that_nobody_asks_for(run: Any) -> None:
    """Oracle: a sender of 4 MiB gets stuck until it is read."""

    async def body(left: Streams, right: Streams) -> None:
        reader, wire = taken_over(right), b"".join(framed(message(524_288)))
        async with asyncio.TaskGroup() as tasks:
            sending = tasks.create_task(write(left, *[wire] * 8))
            await reader.read()
            await asyncio.sleep(0.1)
            assert not sending.done()
            for _ in range(7):
                await reader.read()

    run(body)


@pytest.mark.parametrize(
    ("wire", "complaint"),
    [(b"\x07" + bytes(8), "no protobuf"), (b"\x00" + (MAX_REDUCE_MESSAGE_BYTES + 1).to_bytes(8, "big"), "limit")],
)
def test_a_bad_head_is_refused_before_there_is_a_body(run: Any, wire: bytes, complaint: str) -> None:
    async def body(left: Streams, right: Streams) -> None:
        reader = taken_over(right)
        await write(left, wire)
        for _ in range(2):  # it does not get better
            with pytest.raises(WireError, match=complaint):
                await reader.read()

    run(body)


def test_a_claim_is_believed_bit_by_bit(run: Any) -> None:
    """Oracle: of a message of 1 MiB of which nothing comes, there is room for a sixteenth."""

    async def body(left: Streams, right: Streams) -> None:
        reader = taken_over(right)
        await write(left, b"\x00" + MAX_REDUCE_MESSAGE_BYTES.to_bytes(8, "big"))
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.05):
                await reader.read()
        assert len(reader.get_buffer(-1)) == BELIEVED_BYTES

    run(body)


@pytest.mark.parametrize("is_rude", [False, True])
def test_the_end_of_a_stream_is_the_end(run: Any, is_rude: bool) -> None:
    """Whether it is closed or reset, in the middle of a message, and also for who asks once more."""

    async def body(left: Streams, right: Streams) -> None:
        reader = taken_over(right)
        await write(left, b"\x00\x00")
        await asyncio.sleep(0.02)
        if is_rude:
            left[1].transport.abort()
        else:
            left[1].write_eof()
        for _ in range(2):
            with pytest.raises(EOFError):
                await reader.read()

    run(body)


def test_the_writer_still_waits_for_its_reader(run: Any) -> None:
    """Oracle: a drain that ends only when the other side reads; asyncio's writer is told by its first protocol."""

    async def body(left: Streams, right: Streams) -> None:
        taken_over(left)
        left[1].write(bytes(4 << 20))
        draining = asyncio.create_task(left[1].drain())
        await asyncio.sleep(0.05)
        assert not draining.done()
        assert len(await right[0].readexactly(4 << 20)) == 4 << 20
        await draining

    run(body)
