"""Streams, calls and blobs between two real nodes: what arrives, and what every kind of trouble turns into."""

from __future__ import annotations

import asyncio
import gc
import os
import weakref
from collections.abc import Callable
from contextlib import AsyncExitStack
from pathlib import Path

import psutil
import pytest

from protocol.errors import (
    BusyError,
    ClockError,
    ConfigError,
    DeadlineError,
    IncompatibleError,
    RefusedError,
    TransientError,
    UnreachableError,
    WireError,
)
from protocol.ids import PeerId, digest
from protocol.transport import streams
from protocol.transport.blobs import (
    MAX_BODIES_PER_CALLER,
    MAX_RANGE_BYTES,
    Blobs,
    MissingBlobError,
    RangeAnswer,
    RangeRequest,
)
from protocol.transport.calls import Calls, Done, Failure
from protocol.transport.streams import Stream, Streams
from protocol.wire import HEADER, MAX_CHUNK_BYTES, MAX_MESSAGE_BYTES, FrameKind, Message
from tests.protocol.transport.network import RUN, StartNode

pytestmark = pytest.mark.slow  # every test starts two real nodes


class Question(Message):
    number: int


class Reply(Message):
    number: int


class Long(Message):
    text: str


async def pair(start: StartNode) -> tuple[Streams, Streams, PeerId]:
    """Return the streams of two connected nodes, and the second one's id."""
    second = await start("second")
    first = await start("first", peers=await second.addresses())
    return Streams(first.p2p), Streams(second.p2p), second.peer_id


async def test_messages_and_bodies_arrive_as_they_were_sent(start: StartNode) -> None:
    """Oracle: three chunks of random bytes and their SHA-256, computed on both sides."""
    first, second, peer = await pair(start)
    body = os.urandom(2 * 1024 * 1024 + 17)

    async def echo(stream: Stream) -> None:
        question = await stream.receive(Question, timeout_s=5)
        received, found = await stream.receive_body(question.number)
        assert found == digest(body)
        await stream.send(Reply(number=len(received)))
        await stream.send_body(memoryview(received))
        await stream.wait_closed(timeout_s=5)

    await second.serve("echo", echo)
    async with first.open(peer, "echo") as stream:
        await stream.send(Question(number=len(body)))
        assert await stream.send_body(memoryview(body)) == digest(body)
        assert (await stream.receive(Reply, timeout_s=5)).number == len(body)
        returned, found = await stream.receive_body(len(body))
        assert bytes(returned) == body
        assert found == digest(body)


async def test_trouble_has_a_name(start: StartNode) -> None:
    """Oracle: one error kind for each way in which a conversation can fail."""
    first, second, peer = await pair(start)

    async def silent(stream: Stream) -> None:
        await asyncio.sleep(5)

    async def rude(stream: Stream) -> None:
        return

    async def confused(stream: Stream) -> None:
        await stream.send(Question(number=1))
        await stream.wait_closed(timeout_s=5)

    for name, handler in (("silent", silent), ("rude", rude), ("confused", confused)):
        await second.serve(name, handler)
    async with first.open(peer, "silent") as stream:
        with pytest.raises(DeadlineError):
            await stream.receive(Reply, timeout_s=0.2)
    async with first.open(peer, "rude") as stream:
        with pytest.raises(UnreachableError):
            await stream.receive(Reply, timeout_s=5)
    async with first.open(peer, "confused") as stream:
        with pytest.raises(WireError, match="unexpected message"):
            await stream.receive(Reply, timeout_s=5)
    with pytest.raises(UnreachableError):
        async with first.open(peer, "nobody serves this"):
            pass
    await second.stop()


@pytest.mark.parametrize(
    "garbage",
    [
        os.urandom(64),
        HEADER.pack(FrameKind.MESSAGE, 0xFFFFFFFF),
        HEADER.pack(FrameKind.MESSAGE, MAX_MESSAGE_BYTES) + b"\x91" * 1000,
        HEADER.pack(FrameKind.MESSAGE, 20_000) + b"\x91" * 20_000,
        HEADER.pack(FrameKind.CHUNK, 4) + b"body",
        b"",
    ],
    ids=["random", "oversize", "truncated", "deep", "wrong kind", "nothing"],
)
async def test_garbage_ends_its_own_stream_and_nothing_else(start: StartNode, garbage: bytes) -> None:
    """Oracle: after the garbage an honest call on the same handler is answered, and no stream is left open."""
    first, second, peer = await pair(start)
    asking, answering = Calls(first, run=RUN), Calls(second, run=RUN)

    async def answer(caller: PeerId, question: Question) -> Reply:
        return Reply(number=question.number + 1)

    answering.on(Question, answer)
    await answering.serve()
    async with first.open(peer, asking._name) as stream:
        stream._writer.write(garbage)
        await stream._writer.drain()
    assert (await asking.call(peer, Question(number=1), Reply)).number == 2
    async with asyncio.timeout(15):
        while second._num_open:  # noqa: ASYNC110 - there is no event for it, and no need for one outside of tests
            await asyncio.sleep(0.02)


async def test_errors_cross_a_call_as_codes(start: StartNode) -> None:
    """Oracle: busy keeps its delay; whatever else happens there ends the call here, and nothing but the call."""
    first, second, peer = await pair(start)
    asking, answering = Calls(first, run=RUN), Calls(second, run=RUN)
    errors = [BusyError("later", retry_after_s=1.5), RefusedError("no"), ConfigError("mine"), ClockError("yours")]

    async def fail(caller: PeerId, question: Question) -> Done:
        raise errors[question.number]

    answering.on(Question, fail)
    await answering.serve()
    with pytest.raises(BusyError) as busy:
        await asking.call(peer, Question(number=0), Done)
    assert busy.value.retry_after_s == 1.5
    for number, code in ((1, "E-REF"), (2, "E-CFG"), (3, "E-CLOCK")):
        with pytest.raises(TransientError, match=code):
            await asking.call(peer, Question(number=number), Done)


async def test_what_is_retired_holds_on_to_nothing_and_can_be_served_again(start: StartNode) -> None:
    """Oracle: a weak reference to whoever served; the daemon takes one registration per name for its whole life."""
    first, second, peer = await pair(start)
    asking, answering = Calls(first, run=RUN), Calls(second, run=RUN)

    class Server:
        async def answer(self, caller: PeerId, question: Question) -> Reply:
            return Reply(number=question.number)

    server = Server()
    gone = weakref.ref(server)
    answering.on(Question, server.answer)
    await answering.serve()
    assert (await asking.call(peer, Question(number=1), Reply)).number == 1
    answering.off(Question)
    second.retire(answering._name)
    del server
    await asyncio.sleep(0.1)  # the stream that it answered has to end
    gc.collect()
    assert gone() is None
    with pytest.raises(TransientError):
        await asking.call(peer, Question(number=2), Reply)
    again = Server()
    answering.on(Question, again.answer)
    await answering.serve()
    assert (await asking.call(peer, Question(number=3), Reply)).number == 3


async def test_only_the_coordinator_can_refuse_us_as_a_whole(start: StartNode) -> None:
    first, second, peer = await pair(start)
    asking, answering = Calls(first, run=RUN, coordinator=peer), Calls(second, run=RUN)
    errors = [RefusedError("no", hint="Ask again in May."), IncompatibleError("old"), ClockError("yours")]

    async def fail(caller: PeerId, question: Question) -> Done:
        raise errors[question.number]

    answering.on(Question, fail)
    await answering.serve()
    for number, error in enumerate(errors):
        with pytest.raises(type(error), match=str(error)) as caught:
            await asking.call(peer, Question(number=number), Done)
        assert caught.value.hint == error.hint


async def test_what_is_too_large_for_a_message_is_not_sent(start: StartNode) -> None:
    """Oracle: an error here; the other side would hang up without a word."""
    first, second, peer = await pair(start)
    answering = Calls(second, run=RUN)
    await answering.serve()
    async with first.open(peer, answering._name) as stream:
        with pytest.raises(WireError, match="too large"):
            await stream.send(Long(text="x" * MAX_MESSAGE_BYTES))


async def test_blobs_come_whole_or_not_at_all(start: StartNode, tmp_path: Path) -> None:
    """Oracle: a file longer than one range, bytes, a missing name, and a blob over the caller's limit."""
    first, second, peer = await pair(start)
    fetching, serving = Blobs(first, run=RUN), Blobs(second, run=RUN)
    large = os.urandom(MAX_RANGE_BYTES + 5)
    (tmp_path / "large").write_bytes(large)
    blobs: dict[str, Path | bytes] = {"large": tmp_path / "large", "small": b"abc", "pruned": tmp_path / "gone"}
    await serving.serve(lambda caller, name: blobs.get(name))
    assert await fetching.fetch(peer, "large", max_bytes=len(large)) == large
    assert await fetching.fetch(peer, "small", max_bytes=3) == b"abc"
    assert await fetching.fetch_range(peer, "small", offset=1, length=1) == (b"b", 3)
    for name in ("nothing", "pruned"):
        with pytest.raises(MissingBlobError):
            await fetching.fetch(peer, name, max_bytes=10)
    with pytest.raises(WireError, match="more than"):
        await fetching.fetch(peer, "small", max_bytes=2)


async def test_ranges_of_a_file_come_chunk_by_chunk(start: StartNode, tmp_path: Path) -> None:
    """Oracle: slices of the bytes, at the borders of chunks and beyond the end."""
    first, second, peer = await pair(start)
    fetching, serving = Blobs(first, run=RUN), Blobs(second, run=RUN)
    data = os.urandom(3 * MAX_CHUNK_BYTES + 1)
    (tmp_path / "file").write_bytes(data)
    await serving.serve(lambda caller, name: tmp_path / name)
    for offset in (0, 1, MAX_CHUNK_BYTES, len(data) - 1, len(data), len(data) + 5):
        for length in (1, MAX_CHUNK_BYTES, 2 * MAX_CHUNK_BYTES + 7, MAX_RANGE_BYTES):
            expected = data[offset : offset + length]
            assert await fetching.fetch_range(peer, "file", offset=offset, length=length) == (expected, len(data))


async def test_a_file_that_becomes_shorter_ends_the_transfer(start: StartNode, tmp_path: Path) -> None:
    first, second, peer = await pair(start)
    serving, path = Blobs(second, run=RUN), tmp_path / "file"
    path.write_bytes(bytes(MAX_RANGE_BYTES))
    await serving.serve(lambda caller, name: path)
    async with first.open(peer, serving._name) as stream:
        await stream.send(RangeRequest(name="file", offset=0, length=MAX_RANGE_BYTES))
        await stream.receive(RangeAnswer, timeout_s=5.0)
        os.truncate(path, 0)
        with pytest.raises(TransientError):
            await stream.receive_body(MAX_RANGE_BYTES)


async def test_who_does_not_read_waits_for_itself(start: StartNode) -> None:
    """Oracle: how often what is asked for is loaded."""
    first, second, peer = await pair(start)
    serving, loaded = Blobs(second, run=RUN), 0

    def load() -> bytes:
        nonlocal loaded
        loaded += 1
        return bytes(MAX_RANGE_BYTES)

    await serving.serve(lambda caller, name: load)
    async with AsyncExitStack() as stack:
        for _ in range(MAX_BODIES_PER_CALLER + 2):
            stream = await stack.enter_async_context(first.open(peer, serving._name))
            await stream.send(RangeRequest(name="x", offset=0, length=MAX_RANGE_BYTES))
        await until(lambda: loaded >= MAX_BODIES_PER_CALLER)
        await asyncio.sleep(0.3)
        assert loaded == MAX_BODIES_PER_CALLER
    await until(lambda: not serving._turns)


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(10.0):
        while not condition():  # noqa: ASYNC110 - what is waited for tells nobody
            await asyncio.sleep(0.01)


async def test_who_serves_nothing_under_a_name_is_told_from_who_is_not_there(start: StartNode) -> None:
    """Oracle: the same question to a node that lives and to one that has stopped."""
    second = await start("second")
    first = await start("first", peers=await second.addresses())
    streams = Streams(first.p2p)
    with pytest.raises(UnreachableError) as deaf:
        async with streams.open(second.peer_id, "/handcar/99/another-version"):
            pass
    assert (deaf.value.is_deaf, deaf.value.is_certain) == (True, False)
    await second.stop()
    with pytest.raises(UnreachableError) as gone:
        async with streams.open(second.peer_id, "/handcar/99/another-version"):
            pass
    assert not gone.value.is_deaf


async def test_a_caller_that_does_not_read_leaves_no_socket_behind(
    start: StartNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: the descriptors of this process, while the caller still holds its own end."""
    monkeypatch.setattr(streams, "CHUNK_TIMEOUT_S", 0.3)
    first, second, peer = await pair(start)
    ended = asyncio.Event()

    async def flood(stream: Stream) -> None:
        try:
            await stream.send_body(memoryview(bytes(32 << 20)))  # more than all buffers between the two hold
        finally:
            ended.set()

    await second.serve("flood", flood)
    before = psutil.Process().num_fds()
    async with first.open(peer, "flood") as stream:
        stream._reader._transport.pause_reading()  # type: ignore[attr-defined]
        async with asyncio.timeout(15):
            await ended.wait()
            while psutil.Process().num_fds() > before + 1:  # noqa: ASYNC110 - one is our own end
                await asyncio.sleep(0.02)


async def test_a_request_whose_handler_has_gone_off_meanwhile_is_refused(start: StartNode) -> None:
    """Oracle: an answer, where there used to be a stream that just broke off."""
    first, second, peer = await pair(start)
    asking, answering = Calls(first, run=RUN), Calls(second, run=RUN)

    async def answer(caller: PeerId, question: Question) -> Reply:
        return Reply(number=question.number)

    answering.on(Question, answer)
    await answering.serve()
    async with first.open(peer, asking._name) as stream:
        while not second._num_open:  # noqa: ASYNC110 - until it waits for the request
            await asyncio.sleep(0.02)
        answering.off(Question)
        await stream.send(Question(number=1))
        answered: Message = await stream.receive(Reply, Failure, timeout_s=5)
        assert isinstance(answered, Failure)
        assert answered.code == RefusedError.code


async def test_what_is_said_right_before_an_error_arrives(start: StartNode) -> None:
    """A caller acknowledges an answer that it does not like. Oracle: the other side, which has to hear that."""
    first, second, peer = await pair(start)
    heard = asyncio.Queue[int]()

    async def listen(stream: Stream) -> None:
        heard.put_nowait((await stream.receive(Question, timeout_s=5)).number)

    async def acknowledge(number: int) -> None:
        async with first.open(peer, "listen") as stream:
            await stream.send(Question(number=number))
            raise WireError("that was no good answer")

    await second.serve("listen", listen)
    for number in range(20):
        with pytest.raises(WireError, match="no good answer"):
            await acknowledge(number)
    async with asyncio.timeout(5):
        assert sorted([await heard.get() for _ in range(20)]) == list(range(20))
