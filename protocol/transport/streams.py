"""Framed streams between two peers, on libp2p's binary streams.

Owns: opening and serving streams, frames, body hashing, deadlines, and turning every way in which a
connection can die into one of our errors. Must not know: what a message means. Above it stand
`calls.py` (one question, one answer) and `peer/pipeline` (hops).

Two traps of the daemon below shape this file: a remote that is killed in mid-stream looks like a normal
end of stream, so every read says how much it expects; and what is unacknowledged when either side
closes may be lost, so a stream's last word is always read before it is closed.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator, Awaitable, Callable, Collection
from contextlib import asynccontextmanager, suppress
from typing import TypeVar

import structlog
from hivemind.p2p import P2P, PeerID
from hivemind.p2p.p2p_daemon_bindings.datastructures import StreamInfo

from protocol.access import Door
from protocol.errors import (
    DeadlineError,
    PeerFault,
    StrangerError,
    SwarmError,
    TransientError,
    UnreachableError,
    WireError,
)
from protocol.ids import Digest, PeerId
from protocol.transport.dial import OPEN_TIMEOUT_S, dial, hang_up
from protocol.transport.throttle import Lane, Line
from protocol.wire import (
    HEADER,
    MAX_CHUNK_BYTES,
    MAX_MESSAGE_BYTES,
    FrameKind,
    Message,
    frame_header,
    pack_tagged,
    parse_frame_header,
    unpack_tagged,
)

log = structlog.get_logger()

CHUNK_TIMEOUT_S = 60.0  # 1 MiB at 0.14 Mbit/s: slower than that is not a link
MAX_STREAMS_PER_CALLER = 64  # far above what an honest peer keeps open; bounds memory under a flood
MAX_STREAMS = 1024
MAX_STREAMS_OF_STRANGERS = 256  # besides them, of who has no pass: what strangers do takes nobody's room
MAX_STREAMS_PER_STRANGER = 16  # an honest peer whom we have forgotten calls with all that it has under way
STRANGER_TIMEOUT_S = 2.0

M = TypeVar("M", bound=Message)
Handler = Callable[["Stream"], Awaitable[None]]


def _ignore() -> None:
    """Nobody wants to hear of chunks."""


class Stream:
    """One two-way stream to `remote`, whose identity libp2p has authenticated."""

    def __init__(
        self,
        remote: PeerId,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        *,
        line: Line | None = None,
        lane: Lane = Lane.PROMPT,
        is_admitted: bool = True,
    ) -> None:
        """Bodies take turns on `line`, where `lane` says what goes first. Messages do not wait."""
        self.remote = remote
        self.is_admitted = is_admitted
        """The one who opened it has shown a pass. Only handlers that strangers may reach need to look."""
        self._reader = reader
        self._writer = writer
        self._line, self._lane = line or Line(), lane
        self.bytes_sent = 0
        self.bytes_received = 0

    async def send(self, message: Message) -> None:
        """Send one message. Raises `UnreachableError` if the stream is gone."""
        payload = pack_tagged(message)
        if len(payload) > MAX_MESSAGE_BYTES:  # the other side would only hang up
            raise WireError(f"a {type(message).__name__} of {len(payload)} bytes is too large to be sent")
        self._line.up.spend(len(payload))
        await self._write(frame_header(FrameKind.MESSAGE, len(payload)) + payload)

    async def receive(self, *classes: type[M], timeout_s: float) -> M:
        """Read the next message, which must be one of `classes`.

        Raises `DeadlineError` after `timeout_s`, `UnreachableError` if the stream ends, `WireError` on anything else.
        """
        try:
            async with asyncio.timeout(timeout_s):
                payload = await self._read_frame(FrameKind.MESSAGE)
        except TimeoutError:
            raise DeadlineError(f"{self.remote} sent nothing for {timeout_s:g} s") from None
        self._line.down.spend(len(payload))
        return unpack_tagged(payload, classes)

    async def send_body(self, body: memoryview, *, on_chunk: Callable[[], None] = _ignore) -> Digest:
        """Send raw bytes in chunks and return their SHA-256; `on_chunk` hears of each that has gone out."""
        hasher = hashlib.sha256()
        for start in range(0, len(body), MAX_CHUNK_BYTES):
            chunk = body[start : start + MAX_CHUNK_BYTES]
            hasher.update(chunk)
            await self._line.up.take(len(chunk), self._lane)
            self._writer.write(frame_header(FrameKind.CHUNK, len(chunk)))
            await self._write(chunk)
            on_chunk()
        return Digest(hasher.digest())

    async def receive_body(self, num_bytes: int, *, on_chunk: Callable[[], None] = _ignore) -> tuple[bytearray, Digest]:
        """Read exactly `num_bytes` of chunks; return them with their SHA-256. One deadline per chunk.

        All chunks but the last are full: smaller ones would let a sender take all the time in the world.
        """
        hasher = hashlib.sha256()
        body = bytearray(num_bytes)
        filled = 0
        while filled < num_bytes:
            try:
                async with asyncio.timeout(CHUNK_TIMEOUT_S):
                    chunk = await self._read_frame(FrameKind.CHUNK)
            except TimeoutError:
                raise DeadlineError(f"{self.remote} stopped in the middle of a body") from None
            if len(chunk) != min(MAX_CHUNK_BYTES, num_bytes - filled):
                raise WireError(f"body chunk of {len(chunk)} bytes at {filled} of {num_bytes}")
            await self._line.down.take(len(chunk), self._lane)  # unread, what follows stays where it is
            hasher.update(chunk)
            body[filled : filled + len(chunk)] = chunk
            filled += len(chunk)
            on_chunk()
        return body, Digest(hasher.digest())

    async def refuse_stranger(self) -> None:
        """Say that a pass is needed for this."""
        await self._write(frame_header(FrameKind.STRANGER, 0))

    async def wait_closed(self, *, timeout_s: float) -> None:
        """Wait until the other side has closed: it has read our last word (or is gone)."""
        try:
            async with asyncio.timeout(timeout_s):
                if await self._reader.read(1):
                    raise WireError(f"{self.remote} kept talking after the end")
        except (TimeoutError, ConnectionError):
            return

    def close(self) -> None:
        """Close at once. Whatever the other side has not read may be lost."""
        self._writer.transport.abort()

    async def _write(self, data: bytes | memoryview) -> None:
        try:
            self._writer.write(data)
            async with asyncio.timeout(CHUNK_TIMEOUT_S):
                await self._writer.drain()
        except TimeoutError:
            self.close()
            raise DeadlineError(f"{self.remote} does not read what is sent to it") from None
        except (ConnectionError, RuntimeError) as error:  # uvloop raises RuntimeError on a closed transport
            raise UnreachableError(f"the stream to {self.remote} broke: {error or type(error).__name__}") from None
        self.bytes_sent += len(data)

    async def _read_frame(self, expected: FrameKind) -> bytes:
        try:
            kind, length = parse_frame_header(await self._reader.readexactly(HEADER.size))
            if kind is FrameKind.STRANGER:
                raise StrangerError(f"{self.remote} wants to see our pass")
            if kind is not expected:
                raise WireError(f"{self.remote} sent a {kind.name} frame where {expected.name} was due")
            payload = await self._reader.readexactly(length)
        except (asyncio.IncompleteReadError, ConnectionError) as error:
            raise UnreachableError(f"{self.remote} ended the stream too early ({type(error).__name__})") from None
        self.bytes_received += HEADER.size + length
        return payload


class Streams:
    """Opens and serves named streams on one p2p daemon."""

    def __init__(self, p2p: P2P, *, line: Line | None = None, door: Door | None = None) -> None:
        """`line` limits how fast all of them together are; `door` says who may come in, anybody if there is none."""
        self._p2p = p2p
        self._door = door
        self.introduce: Callable[[PeerId], Awaitable[None]] | None = None
        """Shows our pass to a peer before we ask it for anything; `transport/passes.py` puts itself here."""
        self.on_stranger: Callable[[PeerId], None] = lambda peer: None
        """Hears of a peer that wants to see it (again)."""
        self._line = line or Line()
        self._lanes: dict[str, Lane] = {}
        self._open_by_caller: dict[PeerId, int] = {}
        self._num_open = 0
        self._handlers: dict[str, Handler] = {}
        self._open_to_all: set[str] = set()
        self._registered: set[str] = set()
        self._serving: dict[asyncio.Task[None], PeerId] = {}
        self._num_strangers = 0
        self._is_stopping = False

    @asynccontextmanager
    async def open(
        self,
        peer: PeerId,
        name: str,
        *,
        timeout_s: float = OPEN_TIMEOUT_S,
        lane: Lane = Lane.PROMPT,
        introduced: bool = True,
    ) -> AsyncIterator[Stream]:
        """Open a stream to `peer`'s handler `name`; it is closed when the block is left.

        The peer is shown our pass first, if we are to be `introduced`. Raises
        `UnreachableError` if the peer or its handler is not there, `DeadlineError` if it takes too long.
        """
        if self._is_banned(peer):
            raise UnreachableError(f"{peer} is banned")
        if introduced and self.introduce is not None:
            await self._show_our_pass(peer, timeout_s)
        reader, writer = await dial(self._p2p, _peer_id(peer), name, timeout_s=timeout_s)
        async with _ending(writer):
            try:
                yield Stream(peer, reader, writer, line=self._line, lane=lane)
            except StrangerError:
                self.on_stranger(peer)
                raise

    async def _show_our_pass(self, peer: PeerId, timeout_s: float) -> None:
        """Introduce ourselves within a caller's time; if that fails, the peer is as good as not there."""
        assert self.introduce is not None
        try:
            async with asyncio.timeout(timeout_s):
                await self.introduce(peer)
        except TimeoutError:
            raise DeadlineError(f"{peer} did not look at our pass within {timeout_s:g} s") from None
        except (UnreachableError, DeadlineError):
            raise
        except (TransientError, PeerFault) as error:
            raise UnreachableError(f"{peer} does not take our pass: {error}") from None

    async def serve(self, name: str, handler: Handler, *, lane: Lane = Lane.PROMPT, open_to_all: bool = False) -> None:
        """Let `handler` serve streams called `name`, instead of whoever did before.

        Who has shown no pass reaches it only if it is `open_to_all`.

        Its errors end that stream and nothing else. A daemon takes one registration per name for its whole
        life, so a peer that changes its stages changes the handler behind it.
        """
        self._handlers[name], self._lanes[name] = handler, lane
        (self._open_to_all.add if open_to_all else self._open_to_all.discard)(name)
        if name not in self._registered:
            self._registered.add(name)
            await self._register(name)

    def retire(self, name: str) -> None:
        """Let nobody serve streams called `name` until somebody does again: they are closed at once."""
        self._handlers.pop(name, None)

    async def _register(self, name: str) -> None:
        async def on_stream(info: StreamInfo, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            task = asyncio.current_task()
            assert task is not None
            caller = PeerId(str(info.peer_id))
            self._serving[task] = caller
            try:
                await self._serve_one(name, caller, reader, writer)
            except asyncio.CancelledError:
                if not self._is_stopping and not self._is_banned(caller):
                    raise
            finally:
                self._serving.pop(task, None)
                writer.transport.abort()

        await self._p2p.add_binary_stream_handler(name, on_stream)

    def hang_up_on(self, banned: Collection[PeerId]) -> None:
        """End the streams of peers that are banned now."""
        for task, caller in list(self._serving.items()):
            if caller in banned:
                task.cancel()

    async def stop(self) -> None:
        """End every stream that is being served."""
        self._is_stopping = True
        serving = list(self._serving)
        for task in serving:
            task.cancel()
        await asyncio.gather(*serving, return_exceptions=True)

    async def _serve_one(
        self, name: str, caller: PeerId, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        """Let the handler serve a stream, within the caller's share; it counts until its socket is closed."""
        handler = self._handlers.get(name)
        if handler is None:
            return
        if self._door is not None and not self._door.knock(caller):
            log.debug("stream.refused", name=name, caller=caller, reason="too often, or banned")
            return
        is_admitted = self._door is None or self._door.is_admitted(caller)
        if self._is_full(caller, is_admitted=is_admitted):
            log.warning("stream.refused", name=name, caller=caller, reason="too many streams")
            return
        self._num_open += 1
        self._num_strangers += not is_admitted
        self._open_by_caller[caller] = self._open_by_caller.get(caller, 0) + 1
        stream = Stream(caller, reader, writer, line=self._line, lane=self._lanes[name], is_admitted=is_admitted)
        try:
            async with _ending(writer):
                if is_admitted or name in self._open_to_all:
                    await handler(stream)
                else:
                    await stream.refuse_stranger()
                    with suppress(WireError):  # what it has sent meanwhile is nobody's fault
                        await stream.wait_closed(timeout_s=STRANGER_TIMEOUT_S)
        except PeerFault as error:
            log.info("stream.fault", name=name, caller=caller, error=error.one_line())
        except TransientError as error:
            log.debug("stream.ended", name=name, caller=caller, error=error.one_line())
        except SwarmError as error:
            log.warning("stream.failed", name=name, caller=caller, error=error.one_line())
        finally:
            self._num_open -= 1
            self._num_strangers -= not is_admitted
            self._open_by_caller[caller] -= 1
            if not self._open_by_caller[caller]:
                del self._open_by_caller[caller]

    def _is_full(self, caller: PeerId, *, is_admitted: bool) -> bool:
        own = self._open_by_caller.get(caller, 0)
        if not is_admitted:
            return self._num_strangers >= MAX_STREAMS_OF_STRANGERS or own >= MAX_STREAMS_PER_STRANGER
        return self._num_open - self._num_strangers >= MAX_STREAMS or own >= MAX_STREAMS_PER_CALLER

    def _is_banned(self, caller: PeerId) -> bool:
        return self._door is not None and caller in self._door.banned


@asynccontextmanager
async def _ending(writer: asyncio.StreamWriter) -> AsyncIterator[None]:
    """Close a stream when the block is left: at once if it is cancelled, else what was sent last may still go out.

    That is also so if the block fails: an error often follows the acknowledgement of what has caused it.
    """
    try:
        yield
    except SwarmError:
        await hang_up(writer)
        raise
    except BaseException:
        writer.transport.abort()
        raise
    await hang_up(writer)


def _peer_id(peer: PeerId) -> PeerID:
    """Return hivemind's object for a peer id. Raises `UnreachableError` if nobody can have it."""
    try:
        return PeerID.from_base58(peer)
    except ValueError as error:
        raise UnreachableError(f"'{peer[:64]}' is not a peer id: {error}") from None
