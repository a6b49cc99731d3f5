"""hivemind's P2P object as the reduce uses it: bounded, with deadlines, leaving nothing behind.

Owns: the translation between our peer ids and hivemind's, opening a protobuf stream to a peer, and the fence
around streams from peers. The stream format itself stays hivemind's (`messages.py`), and `Link` has just the methods
that hivemind's servicers and stubs call on a P2P. Must not know: groups, tensors.

Why not P2P itself: it reads messages of any length that the other side claims, waits for ever on a peer that
cannot be dialled, leaks the socket when dialling fails, leaves its writing task running when the caller stops
reading, and leaves a served stream's task waiting for ever when the handler ends before the caller does.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Collection, Iterator
from contextlib import aclosing, contextmanager
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import structlog
from google.protobuf.message import DecodeError, Message
from hivemind.p2p import P2P, P2PContext, PeerID
from hivemind.p2p.p2p_daemon_bindings.datastructures import StreamInfo
from hivemind.proto.averaging_pb2 import AveragingData
from hivemind.proto.p2pd_pb2 import RPCError

from peer.averaging.group_message import GroupMessage
from peer.averaging.messages import END_OF_STREAM, MessageReader, head_of
from peer.codecs import Buffer
from protocol.errors import RefusedError, SwarmError, UnreachableError, WireError
from protocol.ids import PeerId
from protocol.transport.dial import dial, hang_up
from protocol.transport.passes import Passes
from protocol.transport.throttle import Lane, Line

log = structlog.get_logger()

T = TypeVar("T")
Handler = Callable[[AsyncGenerator[GroupMessage, None], P2PContext], AsyncGenerator[GroupMessage, None]]

SHORT_BYTES = 64  # such messages are not worth a turn
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


@dataclass(slots=True)
class Traffic:
    """How many bytes the messages of a stream have had."""

    sent: int = 0
    received: int = 0


@dataclass(frozen=True)
class CallContext(P2PContext):  # type: ignore[misc]
    """What a handler knows of a call, as hivemind has it, and what the call has moved."""

    traffic: Traffic = field(default_factory=Traffic)


class Link:
    """One p2p daemon, shared by all groups of this process."""

    def __init__(self, p2p: P2P, line: Line | None = None, *, passes: Passes | None = None) -> None:
        """What goes over `line` takes turns with the rest of this peer, which goes first.

        `passes` shows ours to whom we call, and its door says who may come in; without one, anybody may.
        """
        self._p2p, self._line = p2p, line or Line()
        self._passes = passes
        self._served: Counter[PeerID] = Counter()
        self._serving: dict[asyncio.Task[Any], PeerID] = {}

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
        self, peer: PeerID, name: str, requests: AsyncGenerator[GroupMessage, None], answer_type: type[Message]
    ) -> Exchange:
        """Open a stream to `peer`'s handler `name`. Called by hivemind's stubs.

        Raises `UnreachableError` if the peer or the handler is not there, `DeadlineError` if it takes too long, other
        `TransientError`s or `PeerFault` if it does not take our pass.
        """
        if self._passes is not None:
            await self._passes.introduce(from_hivemind(peer))
        reader, writer = await dial(self._p2p, peer, name)
        return Exchange(peer, LinkStream(reader, writer, self._line), requests, on_unanswered=self._forget)

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
        assert (request_type, stream_input, stream_output, balanced) == (AveragingData, True, True, False), (
            "no other kind"
        )

        async def on_stream(info: StreamInfo, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            try:
                with self._admission(info.peer_id) as admitted:
                    if admitted:
                        stream = LinkStream(reader, writer, self._line)
                        context = CallContext(
                            handle_name=name, local_id=self.peer_id, remote_id=info.peer_id, traffic=stream.traffic
                        )
                        await _serve(handler, _requests(stream, info.peer_id), context, stream)
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

    def hang_up_on(self, banned: Collection[PeerId]) -> None:
        """End the streams of peers that are banned now."""
        for task, caller in list(self._serving.items()):
            if from_hivemind(caller) in banned:
                task.cancel()

    def _forget(self, peer: PeerID) -> None:
        """It may have been restarted, and take us for a stranger: it will be shown our pass again."""
        if self._passes is not None:
            self._passes.forget(from_hivemind(peer))

    @contextmanager
    def _admission(self, caller: PeerID) -> Iterator[bool]:
        """Count the streams of a caller; False if it has too many, or all callers together have."""
        task = asyncio.current_task()
        assert task is not None
        if self._passes is not None and not self._passes.door.is_admitted(from_hivemind(caller)):
            log.debug("reduce.stream_refused", caller=str(caller), reason="no pass, or banned")
            yield False
            return
        if self._served[caller] >= MAX_STREAMS_PER_CALLER or len(self._serving) >= MAX_STREAMS:
            log.warning("reduce.stream_refused", caller=str(caller), reason="too many streams")
            yield False
            return
        self._served[caller] += 1
        self._serving[task] = caller
        try:
            yield True
        finally:
            self._serving.pop(task, None)
            self._served[caller] -= 1
            if not self._served[caller]:
                del self._served[caller]

    @property
    def _connector(self) -> Any:
        return self._p2p._client.control.daemon_connector


class LinkStream:
    """A stream of whole messages: bounded, counted, and in turn with others."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, line: Line) -> None:
        self._reader, self._writer, self._line = MessageReader(reader, writer.transport), writer, line
        self.traffic = Traffic()

    async def receive(self) -> GroupMessage | RPCError:
        """Return the next message, or the error that the other side reports.

        Raises `EOFError` at the end of the stream, and `WireError` for bytes that are no message.
        """
        is_error, data = await self._reader.read()
        self.traffic.received += len(data)
        if len(data) <= SHORT_BYTES:
            self._line.down.spend(len(data))
        else:
            await self._line.down.take(len(data), Lane.BULK)  # unread, what follows stays where it is
        if not is_error:
            return GroupMessage.from_wire(data)
        try:
            return RPCError.FromString(bytes(data))
        except DecodeError:
            raise WireError("what comes is no protobuf message") from None

    async def send(self, message: GroupMessage) -> bool:
        """Send a message; False if nobody is listening any more."""
        said, data = message.to_wire()
        await self._line.up.take(len(said) + len(data), Lane.BULK)
        self.traffic.sent += len(said) + len(data)
        return await self._write(head_of(len(said) + len(data)) + said, data)

    async def send_end(self) -> bool:
        """Say that no message follows; False if nobody is listening any more."""
        return await self._write(END_OF_STREAM)

    async def _write(self, *pieces: Buffer) -> bool:
        try:
            for piece in pieces:
                self._writer.write(piece)
            await self._writer.drain()
        except WRITE_ENDED:
            return False
        return True

    def abort(self) -> None:
        """End it now, whatever is under way."""
        self._writer.transport.abort()


class Exchange:
    """An open stream to a peer: our requests go out in the background, its answers are iterated."""

    def __init__(
        self,
        peer: PeerID,
        stream: LinkStream,
        requests: AsyncGenerator[GroupMessage, None],
        *,
        on_unanswered: Callable[[PeerID], None] = lambda peer: None,
    ) -> None:
        """`on_unanswered` hears of a peer that ends the stream before it has said anything."""
        self._peer, self._stream = peer, stream
        self._on_unanswered, self._has_answered = on_unanswered, False
        self._requests = requests
        self._writing = asyncio.create_task(self._write(), name=f"reduce: write to {peer}")

    @property
    def traffic(self) -> Traffic:
        return self._stream.traffic

    def __aiter__(self) -> Exchange:
        return self

    async def __anext__(self) -> GroupMessage:
        """Return the next answer; stop when the other side has ended the stream, for whatever reason.

        Raises `WireError` for bytes that are no answer, `RefusedError` if the peer reports an error.
        """
        try:
            answer = await self._stream.receive()
        except READ_ENDED:
            if not self._has_answered:
                self._on_unanswered(self._peer)
            raise StopAsyncIteration from None
        self._has_answered = True
        if isinstance(answer, RPCError):
            raise RefusedError(f"{self._peer} failed: {answer.message[:200]}")
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
            self._stream.abort()  # closing would first flush what nobody waits for
            await asyncio.wait({ending, self._writing})
        if not self._writing.cancelled() and (bug := self._writing.exception()) is not None:
            raise bug  # making a request failed: what a dead stream raises has been dealt with

    async def _write(self) -> None:
        try:
            async for request in self._requests:
                if not await self._stream.send(request):
                    return  # nobody is listening any more; the reading side sees the same end
            await self._stream.send_end()
        finally:
            await self._requests.aclose()

    async def _wait_ended(self) -> None:
        try:
            async for _ in self:  # reading is also what lets a peer that is stuck in its sending get to our message
                pass
        except (WireError, RefusedError):
            return


class Inbox(Generic[T]):
    """The messages of a served stream, which one can stop waiting for without losing the stream.

    One is read ahead, while its predecessor is dealt with.
    """

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
        read, self._reading = self._reading, None
        message = read.result()
        if message is not None:
            self._reading = asyncio.ensure_future(anext(self._stream, None))
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
            await asyncio.gather(self._reading, return_exceptions=True)  # how it would have ended is nobody's news


async def _serve(
    handler: Handler, requests: AsyncGenerator[GroupMessage, None], context: P2PContext, stream: LinkStream
) -> None:
    async with aclosing(requests), aclosing(handler(requests, context)) as answers:
        async for answer in answers:
            if not await stream.send(answer):
                return


async def _requests(stream: LinkStream, caller: PeerID) -> AsyncGenerator[GroupMessage, None]:
    """Yield what a caller sends until it ends the stream properly. Raises `UnreachableError` if it just vanishes."""
    while True:
        try:
            request = await stream.receive()
        except READ_ENDED:
            raise UnreachableError(f"{caller} broke its stream off") from None
        if isinstance(request, RPCError):  # hivemind's end-of-stream message
            return
        yield request
