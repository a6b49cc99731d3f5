"""hivemind's P2P object as the reduce uses it: bounded, with deadlines, leaving nothing behind.

Owns: the translation between our peer ids and hivemind's, opening a protobuf stream to a peer, and the fence
around streams from peers. The stream format itself stays hivemind's (`P2P.send_protobuf` and friends), and
`Link` has just the methods that hivemind's servicers and stubs call on a P2P. Must not know: groups, tensors.

Why not P2P itself: it reads messages of any length that the other side claims, waits for ever on a peer that
cannot be dialled, leaks the socket when dialling fails, leaves its writing task running when the caller stops
reading, and leaves a served stream's task waiting for ever when the handler ends before the caller does.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator
from contextlib import aclosing, contextmanager
from typing import Any, Generic, TypeVar

import structlog
from google.protobuf.message import DecodeError, Message
from hivemind.p2p import P2P, P2PContext, PeerID
from hivemind.p2p.p2p_daemon_bindings.datastructures import StreamInfo

from protocol.errors import RefusedError, SwarmError, UnreachableError, WireError
from protocol.ids import PeerId
from protocol.transport.dial import dial, hang_up
from protocol.transport.throttle import Lane, Line

log = structlog.get_logger()

T = TypeVar("T")
Handler = Callable[[AsyncGenerator[Message, None], P2PContext], AsyncGenerator[Message, None]]

MAX_REDUCE_MESSAGE_BYTES = 1024 * 1024  # the largest honest one is one fp32 part (512 KiB) and a few bytes
FRAMING_BYTES = 64  # what hivemind puts before a message has nine
MAX_STREAMS_PER_CALLER = 32  # an honest peer has one per stage that we share
MAX_STREAMS = 1024  # of all callers: as many as the members of a large stage, each with one

READ_ENDED = (ConnectionError, EOFError)
WRITE_ENDED = (ConnectionError, RuntimeError)  # RuntimeError is uvloop's word for a closed transport


def to_hivemind(peer: PeerId) -> PeerID:
    """Return hivemind's object for a peer id. Raises `WireError` if the id is not base58."""
    try:
        return PeerID.from_base58(peer)
    except ValueError:
        raise WireError(f"'{peer[:64]}' is not a peer id") from None


def from_hivemind(peer: PeerID) -> PeerId:
    """Return our form of hivemind's peer id."""
    return PeerId(peer.to_base58())


class Link:
    """One p2p daemon, shared by all groups of this process."""

    def __init__(self, p2p: P2P, line: Line | None = None) -> None:
        """What goes over `line` takes turns with the rest of this peer, which goes first."""
        self._p2p, self._line = p2p, line or Line()
        self._served: Counter[PeerID] = Counter()
        self._serving: set[asyncio.Task[Any]] = set()

    @property
    def peer_id(self) -> PeerID:
        """Our own id. hivemind's runner reads it."""
        return self._p2p.peer_id

    async def is_daemon_alive(self) -> bool:
        """Tell whether our own daemon answers: if not, every peer seems to have hung up."""
        try:
            _, writer = await self._connector.open_connection()
        except OSError:
            return False
        writer.close()
        return True

    async def iterate_protobuf_handler(
        self, peer: PeerID, name: str, requests: AsyncGenerator[Message, None], answer_type: type[Message]
    ) -> Exchange:
        """Open a stream to `peer`'s handler `name`. Called by hivemind's stubs.

        Raises `UnreachableError` if the peer or the handler is not there, `DeadlineError` if it takes too long.
        """
        reader, writer = await dial(self._p2p, peer, name)
        return Exchange(peer, LinkReader(reader, self._line), LinkWriter(writer, self._line), requests, answer_type)

    async def add_protobuf_handler(
        self,
        name: str,
        handler: Handler,
        request_type: type[Message],
        *,
        stream_input: bool,
        stream_output: bool,
        balanced: bool,
    ) -> None:
        """Serve protobuf streams called `name`. Called by hivemind's `ServicerBase`."""
        assert (stream_input, stream_output, balanced) == (True, True, False), "the reduce has no other kind"

        async def on_stream(info: StreamInfo, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            context = P2PContext(handle_name=name, local_id=self.peer_id, remote_id=info.peer_id)
            try:
                with self._admission(info.peer_id) as admitted:
                    if admitted:
                        requests = _requests(LinkReader(reader, self._line), request_type, info.peer_id)
                        await _serve(handler, requests, context, LinkWriter(writer, self._line))
                        await hang_up(writer)
            except asyncio.CancelledError:  # by the runner that is done with this stream, or by `remove_...`
                return  # asyncio 3.11 stumbles over a connection whose task ends as cancelled
            finally:
                writer.transport.abort()

        await self._p2p.add_binary_stream_handler(name, on_stream)

    async def remove_protobuf_handler(self, name: str, *, stream_input: bool, stream_output: bool) -> None:
        """Stop serving, and end what is being served. Called by hivemind's `ServicerBase`."""
        await self._p2p.remove_binary_stream_handler(name)
        serving = list(self._serving)
        for task in serving:
            task.cancel()
        await asyncio.gather(*serving, return_exceptions=True)

    @contextmanager
    def _admission(self, caller: PeerID) -> Iterator[bool]:
        """Count the streams of a caller; False if it has too many, or all callers together have."""
        task = asyncio.current_task()
        assert task is not None
        if self._served[caller] >= MAX_STREAMS_PER_CALLER or len(self._serving) >= MAX_STREAMS:
            log.warning("reduce.stream_refused", caller=str(caller), reason="too many streams")
            yield False
            return
        self._served[caller] += 1
        self._serving.add(task)
        try:
            yield True
        finally:
            self._serving.discard(task)
            self._served[caller] -= 1
            if not self._served[caller]:
                del self._served[caller]

    @property
    def _connector(self) -> Any:
        return self._p2p._client.control.daemon_connector


class LinkReader:
    """The one method of a stream reader that hivemind's protobuf streams use: bounded, and in turn with others."""

    def __init__(self, reader: asyncio.StreamReader, line: Line) -> None:
        self._reader, self._line = reader, line

    async def readexactly(self, num_bytes: int) -> bytes:
        """Read exactly `num_bytes`, or raise `WireError` before reading if they are too many."""
        if num_bytes > MAX_REDUCE_MESSAGE_BYTES:
            raise WireError(f"message of {num_bytes} bytes is over the limit of {MAX_REDUCE_MESSAGE_BYTES}")
        data = await self._reader.readexactly(num_bytes)
        if num_bytes <= FRAMING_BYTES:  # a message is read in three pieces, and takes one turn
            self._line.down.spend(num_bytes)
        else:
            await self._line.down.take(num_bytes, Lane.BULK)  # unread, what follows stays where it is
        return data


class LinkWriter:
    """A stream writer, for whole messages: in turn with others."""

    def __init__(self, writer: asyncio.StreamWriter, line: Line) -> None:
        self._writer, self._line = writer, line

    @property
    def transport(self) -> asyncio.WriteTransport:
        return self._writer.transport

    async def send(self, message: Message) -> bool:
        """Send a message; False if nobody is listening any more."""
        await self._line.up.take(message.ByteSize(), Lane.BULK)
        try:
            await P2P.send_protobuf(message, self._writer)
        except WRITE_ENDED:
            return False
        return True


class Exchange:
    """An open stream to a peer: our requests go out in the background, its answers are iterated."""

    def __init__(
        self,
        peer: PeerID,
        reader: LinkReader,
        writer: LinkWriter,
        requests: AsyncGenerator[Message, None],
        answer_type: type[Message],
    ) -> None:
        self._peer, self._reader, self._writer = peer, reader, writer
        self._requests, self._answer_type = requests, answer_type
        self._writing = asyncio.create_task(self._write(), name=f"reduce: write to {peer}")

    def __aiter__(self) -> Exchange:
        return self

    async def __anext__(self) -> Message:
        """Return the next answer; stop when the other side has ended the stream, for whatever reason.

        Raises `WireError` for bytes that are no answer, `RefusedError` if the peer reports an error.
        """
        try:
            answer, error = await P2P.receive_protobuf(self._answer_type, self._reader)
        except READ_ENDED:
            raise StopAsyncIteration from None
        except (DecodeError, TypeError):
            raise WireError(f"{self._peer} sent what is no protobuf stream") from None
        if error is not None:
            raise RefusedError(f"{self._peer} failed: {error.message[:200]}")
        return answer

    async def aclose(self, *, grace_s: float = 0.0) -> None:
        """Close. With a grace, first let our last request out and wait for the other side to end the stream."""
        ending = asyncio.create_task(self._wait_ended(), name=f"reduce: end of {self._peer}")
        try:
            if grace_s:
                await asyncio.wait({ending}, timeout=grace_s)
        finally:
            ending.cancel()
            self._writing.cancel()
            self._writer.transport.abort()  # closing would first flush what nobody waits for
            await asyncio.wait({ending, self._writing})
        if not self._writing.cancelled() and (bug := self._writing.exception()) is not None:
            raise bug  # making a request failed: what a dead stream raises has been dealt with

    async def _write(self) -> None:
        try:
            async for request in self._requests:
                if not await self._writer.send(request):
                    return  # nobody is listening any more; the reading side sees the same end
            await self._writer.send(P2P.END_OF_STREAM)
        finally:
            await self._requests.aclose()

    async def _wait_ended(self) -> None:
        try:
            async for _ in self:  # reading is also what lets a peer that is stuck in its sending get to our message
                pass
        except (WireError, RefusedError):
            return


class Inbox(Generic[T]):
    """The messages of a served stream, which one can stop waiting for without losing the stream."""

    def __init__(self, stream: AsyncIterator[T]) -> None:
        self._stream = stream
        self._reading: asyncio.Future[T | None] | None = None

    async def next_unless(self, outcome: asyncio.Future[Any]) -> T | None:
        """Return the next message; None if the stream ends or `outcome` is settled before it comes."""
        if self._reading is None:
            self._reading = asyncio.ensure_future(anext(self._stream, None))
        await asyncio.wait({self._reading, outcome}, return_when=asyncio.FIRST_COMPLETED)
        if not self._reading.done():
            return None
        message, self._reading = self._reading.result(), None
        return message

    async def wait_ended(self, *, timeout_s: float) -> None:
        """Read to the end, so that the other side has our last word before we close; not longer than that."""
        never = asyncio.get_running_loop().create_future()
        try:
            async with asyncio.timeout(timeout_s):
                while await self.next_unless(never) is not None:
                    pass
        except (TimeoutError, SwarmError):
            return

    async def close(self) -> None:
        """Stop reading."""
        if self._reading is not None:
            self._reading.cancel()
            await asyncio.wait({self._reading})


async def _serve(
    handler: Handler, requests: AsyncGenerator[Message, None], context: P2PContext, writer: LinkWriter
) -> None:
    async with aclosing(requests), aclosing(handler(requests, context)) as answers:
        async for answer in answers:
            if not await writer.send(answer):
                return


async def _requests(reader: LinkReader, request_type: type[Message], caller: PeerID) -> AsyncGenerator[Message, None]:
    """Yield what a caller sends until it ends the stream properly. Raises `UnreachableError` if it just vanishes."""
    while True:
        try:
            request, _ = await P2P.receive_protobuf(request_type, reader)
        except READ_ENDED:
            raise UnreachableError(f"{caller} broke its stream off") from None
        except (DecodeError, TypeError):
            raise WireError(f"{caller} sent what is no protobuf stream") from None
        if request is None:  # hivemind's end-of-stream message
            return
        yield request
