"""Bulk bytes by name: token chunks, checkpoints, update logs.

Owns: the range request and its transfer, bounded on both sides. Must not know: what a name means (the
serving side gives a resolver) or whether the bytes are right (the fetching side compares digests it got
from a signed place). A broken transfer is resumed by asking for the rest, from anybody.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Annotated, BinaryIO, cast

from pydantic import Field

from protocol.errors import StrangerError, TransientError, UnreachableError, WireError
from protocol.ids import PeerId
from protocol.transport.streams import Stream, Streams
from protocol.transport.throttle import Lane
from protocol.wire import MAX_CHUNK_BYTES, PROTOCOL_VERSION, Message

MAX_RANGE_BYTES = 8 * 1024 * 1024  # what one request may bring; bounds memory of who asks
MAX_BODIES_PER_CALLER = 8  # under way at once, a chunk of each in memory: who reads slowly makes itself wait
ANSWER_TIMEOUT_S = 20.0
CLOSE_TIMEOUT_S = 10.0

Load = Callable[[], bytes | memoryview | None]
"""Brings the bytes, or None if they are not here after all. Called in a thread, for it may read and hash."""

Resolver = Callable[[PeerId, str], Path | bytes | memoryview | Load | None]


class RangeRequest(Message):
    """Ask for up to `length` bytes of a blob from `offset`."""

    name: Annotated[str, Field(max_length=200)]
    offset: Annotated[int, Field(ge=0)]
    length: Annotated[int, Field(ge=1, le=MAX_RANGE_BYTES)]


class RangeAnswer(Message):
    """`length` bytes follow, of a blob of `total_bytes`; `found` is false if there is no such blob here."""

    found: bool
    length: Annotated[int, Field(ge=0, le=MAX_RANGE_BYTES)]
    total_bytes: Annotated[int, Field(ge=0)]


class MissingBlobError(UnreachableError):
    """The peer answered, and does not have that blob."""


class Blobs:
    """Serves and fetches ranges of named blobs within one run."""

    def __init__(self, streams: Streams, *, run: str) -> None:
        self._streams = streams
        self._name = blob_protocol(run)
        self._resolve: Resolver | None = None
        self._turns: dict[PeerId, tuple[asyncio.Semaphore, int]] = {}
        """Of everybody who is asking right now, and how many streams of theirs there are."""

    async def serve(self, resolve: Resolver) -> None:
        """Serve what `resolve(caller, name)` returns: a file, bytes, what loads them, or None for "not here"."""
        self._resolve = resolve
        await self._streams.serve(self._name, self._answer, lane=Lane.BULK)

    def retire(self) -> None:
        """Serve nothing any more."""
        self._streams.retire(self._name)
        self._resolve = None

    async def fetch_range(self, peer: PeerId, name: str, *, offset: int, length: int) -> tuple[bytes, int]:
        """Return up to `length` bytes from `offset`, and the blob's total size.

        Raises `MissingBlobError` if the peer does not have it, other `TransientError`s if the link fails.
        """
        try:
            return await self._fetch_range(peer, name, offset, length)
        except StrangerError:  # it was restarted and has forgotten us: now it is shown our pass first
            return await self._fetch_range(peer, name, offset, length)

    async def _fetch_range(self, peer: PeerId, name: str, offset: int, length: int) -> tuple[bytes, int]:
        async with self._streams.open(peer, self._name, lane=Lane.BULK) as stream:
            await stream.send(RangeRequest(name=name, offset=offset, length=length))
            answer = await stream.receive(RangeAnswer, timeout_s=ANSWER_TIMEOUT_S)
            if not answer.found:
                raise MissingBlobError(f"{peer} does not have {name}")
            if answer.length > length:
                raise WireError(f"{peer} wants to send {answer.length} bytes where {length} were asked for")
            body, _ = await stream.receive_body(answer.length)
        return bytes(body), answer.total_bytes

    async def fetch(self, peer: PeerId, name: str, *, max_bytes: int) -> bytes:
        """Return a whole blob, refusing one larger than `max_bytes` before it is transferred."""
        return bytes(await self.fetch_into(peer, name, lambda total: memoryview(bytearray(total)), max_bytes=max_bytes))

    async def fetch_into(
        self, peer: PeerId, name: str, make_room: Callable[[int], memoryview], *, max_bytes: int
    ) -> memoryview:
        """Bring a whole blob into the buffer that `make_room` gives for its length, and return that.

        One larger than `max_bytes` is refused before it is transferred.
        """
        room: memoryview | None = None
        done = 0
        while room is None or done < len(room):
            piece, total = await self.fetch_range(peer, name, offset=done, length=MAX_RANGE_BYTES)
            if total > max_bytes:
                raise WireError(f"{peer} offers {total} bytes of {name}, more than the {max_bytes} expected")
            if room is None:
                room = make_room(total)
            if total != len(room) or (not piece and done < total) or done + len(piece) > total:
                raise TransientError(f"{name} changed at {peer} while it was fetched")
            room[done : done + len(piece)] = piece
            done += len(piece)
        return room

    async def _answer(self, stream: Stream) -> None:
        request = await stream.receive(RangeRequest, timeout_s=ANSWER_TIMEOUT_S)
        resolve = self._resolve  # retired, if it is while the request was on its way
        source = None if resolve is None else resolve(stream.remote, request.name)
        async with self._turn(stream.remote):
            if source is None:
                await stream.send(RangeAnswer(found=False, length=0, total_bytes=0))
            else:
                await _send(stream, source, request)
        await stream.wait_closed(timeout_s=CLOSE_TIMEOUT_S)

    @asynccontextmanager
    async def _turn(self, caller: PeerId) -> AsyncIterator[None]:
        turns, num = self._turns.get(caller, (asyncio.Semaphore(MAX_BODIES_PER_CALLER), 0))
        self._turns[caller] = (turns, num + 1)
        try:
            async with turns:
                yield
        finally:
            turns, num = self._turns.pop(caller)
            if num > 1:
                self._turns[caller] = (turns, num - 1)


def blob_protocol(run: str) -> str:
    """Return the libp2p protocol name of a run's blobs."""
    return f"/handcar/{PROTOCOL_VERSION}/{run}/blob"


async def _send(stream: Stream, source: Path | bytes | memoryview | Load, request: RangeRequest) -> None:
    """Answer with a range of what is here. Of a file, no more than a chunk is in memory at a time."""
    opened = await asyncio.to_thread(_open, source)
    if opened is None:
        await stream.send(RangeAnswer(found=False, length=0, total_bytes=0))
        return
    total = len(opened) if isinstance(opened, memoryview) else await asyncio.to_thread(opened.seek, 0, os.SEEK_END)
    start, end = min(request.offset, total), min(request.offset + request.length, total)
    try:
        await stream.send(RangeAnswer(found=True, length=end - start, total_bytes=total))
        for at in range(start, end, MAX_CHUNK_BYTES):
            num = min(MAX_CHUNK_BYTES, end - at)
            piece = opened[at : at + num] if isinstance(opened, memoryview) else await _piece(opened, at, num)
            await stream.send_body(piece)
    finally:
        if not isinstance(opened, memoryview):
            opened.close()


def _open(source: Path | bytes | memoryview | Load) -> memoryview | BinaryIO | None:
    if callable(source):
        loaded = source()
        return None if loaded is None else memoryview(loaded)
    if isinstance(source, Path):
        try:
            return cast(BinaryIO, source.open("rb", buffering=0))
        except FileNotFoundError:  # pruned between resolving and reading
            return None
    return memoryview(source)


async def _piece(file: BinaryIO, at: int, num: int) -> memoryview:
    def read() -> bytes:
        file.seek(at)
        return file.read(num)

    piece = await asyncio.to_thread(read)
    if len(piece) != num:
        raise TransientError("a file became shorter while it was sent")
    return memoryview(piece)
