"""Whole protobuf messages on a stream, in hivemind's format, with few wakeups and few copies.

Owns: the format (a marker, a length, the message) and its bounds. Must not know: peers, whose turn it is, what the
messages say.

Why not asyncio's stream reader: its buffer is a quarter of a message, so that every message stops and starts it many
times, wakes its task for every few KiB, and is copied twice on the way. Here the kernel fills the message itself, and
the task wakes up once. Nothing is read that nobody has asked for.
"""

from __future__ import annotations

import asyncio
from typing import Any

from hivemind.p2p import P2P

from protocol.errors import WireError

HEAD_BYTES = 1 + P2P.HEADER_LEN
MAX_REDUCE_MESSAGE_BYTES = 1024 * 1024  # the largest honest one is one fp32 part (512 KiB) and a few bytes
BELIEVED_BYTES = 64 * 1024  # there is room for so much of what a head claims, and for more of it once that has come
KINDS = (P2P.MESSAGE_MARKER, P2P.ERROR_MARKER)
END_OF_STREAM = P2P.ERROR_MARKER + bytes(P2P.HEADER_LEN)  # hivemind's: an error that says nothing


class MessageReader(asyncio.BufferedProtocol):
    """Takes the reading side of an asyncio stream over, for good; its writer stays what it is."""

    def __init__(self, reader: asyncio.StreamReader, transport: Any) -> None:
        """What `reader` has read already comes first."""
        self._transport = transport
        self._stream: Any = transport.get_protocol()  # whom the writer asks whether it may go on
        self._head = bytearray(HEAD_BYTES)
        self._body: bytearray | None = None
        self._missing = memoryview(self._head)
        self._length, self._believed = 0, BELIEVED_BYTES
        self._whole: asyncio.Future[None] | None = None
        self._pause()
        transport.set_protocol(self)
        inner: Any = reader
        self._early, self._is_ended = memoryview(bytes(inner._buffer)), bool(inner._eof)  # it has no other way out

    async def read(self) -> tuple[bool, bytearray]:
        """Return whether the next message is an error, and its bytes; who is cancelled meanwhile may ask for it again.

        Raises `EOFError` if the stream has ended, and `WireError` for what is no message, or one that is too long.
        """
        assert self._whole is None, "one message at a time"
        if not self._take_early():
            if self._is_ended or self._transport.is_closing():
                raise EOFError("the stream has ended")
            self._whole = asyncio.get_running_loop().create_future()
            self._transport.resume_reading()
            try:
                await self._whole
            finally:
                self._whole = None
                self._pause()
        assert self._body is not None
        is_error, body = bytes(self._head[:1]) == P2P.ERROR_MARKER, self._body
        self._body, self._missing = None, memoryview(self._head)
        return is_error, body

    # --- what the transport calls ---------------------------------------------------------------------

    def get_buffer(self, sizehint: int) -> memoryview:
        return self._missing

    def buffer_updated(self, nbytes: int) -> None:
        self._missing = self._missing[nbytes:]
        try:
            if not self._is_whole():
                return
        except WireError as error:
            self._end(error)
        self._pause()  # at once: for what follows there is no buffer yet
        if self._whole is not None and not self._whole.done():
            self._whole.set_result(None)

    def eof_received(self) -> Any:
        self._is_ended = True
        self._end(EOFError("the stream has ended"))
        return self._stream.eof_received()

    def connection_lost(self, exc: Exception | None) -> None:
        self._is_ended = True
        self._end(EOFError("the connection is gone"))
        self._stream.connection_lost(exc)

    def pause_writing(self) -> None:
        self._stream.pause_writing()

    def resume_writing(self) -> None:
        self._stream.resume_writing()

    # --- small things ---------------------------------------------------------------------------------

    def _is_whole(self) -> bool:
        """Go on from the head to the body; tell whether that is complete. Raises `WireError` for a bad head."""
        if not self._missing and self._body is None:
            length = int.from_bytes(self._head[1:], P2P.BYTEORDER)
            if bytes(self._head[:1]) not in KINDS:
                raise WireError("what comes is no protobuf stream")
            if length > MAX_REDUCE_MESSAGE_BYTES:
                raise WireError(f"message of {length} bytes is over the limit of {MAX_REDUCE_MESSAGE_BYTES}")
            self._length = length
            self._grow(min(length, self._believed))
        elif not self._missing and self._body is not None and len(self._body) < self._length:
            self._grow(min(2 * len(self._body), self._length))
        is_whole = self._body is not None and not self._missing and len(self._body) == self._length
        if is_whole:
            self._believed = max(self._believed, self._length)
        return is_whole

    def _grow(self, num_bytes: int) -> None:
        """Make room for so much of the body; what is there already moves."""
        body, there = bytearray(num_bytes), self._body or b""
        body[: len(there)] = there
        self._body, self._missing = body, memoryview(body)[len(there) :]

    def _take_early(self) -> bool:
        """Fill a message from what was read before we came; tell whether it is complete."""
        while not self._is_whole() and self._early:
            num_bytes = min(len(self._missing), len(self._early))
            self._missing[:num_bytes] = self._early[:num_bytes]
            self._missing, self._early = self._missing[num_bytes:], self._early[num_bytes:]
        return self._is_whole()

    def _pause(self) -> None:
        if not self._transport.is_closing():  # uvloop takes that amiss
            self._transport.pause_reading()

    def _end(self, error: Exception) -> None:
        if self._whole is not None and not self._whole.done():
            self._whole.set_exception(error)


def head_of(num_bytes: int) -> bytes:
    """Return what comes before a message of so many bytes."""
    return bytes(P2P.MESSAGE_MARKER) + num_bytes.to_bytes(P2P.HEADER_LEN, P2P.BYTEORDER)
