"""Bytes on a stream: bounded msgpack messages inside length-prefixed frames. Sans IO.

Owns: the frame header, the size limits, and strict decoding (no extension types, no deep nesting, no
unknown fields). Must not know: sockets, what any message means. Every message class of the protocol
derives from `Message`; the transport reads and writes `Frame`s.

A frame is `kind: u8, length: u32 big-endian, payload`. Raw tensor bytes travel in CHUNK frames so that
they are never copied through msgpack.
"""

from __future__ import annotations

import gc
import struct
from collections.abc import Iterable, Sequence
from enum import IntEnum
from typing import Any, Self, TypeVar

import msgpack
from pydantic import BaseModel, ConfigDict, ValidationError

from protocol.errors import WireError

PROTOCOL_VERSION = 8
MAX_MESSAGE_BYTES = 256 * 1024  # the largest control message is a commit for ~1,000 members
MAX_CHUNK_BYTES = 1024 * 1024  # bigger chunks gained nothing on loopback and delay everything else on a home link
MAX_DEPTH = 12  # our deepest message nests 7 levels; msgpack's own limit (1,024) is far beyond any need
HEADER = struct.Struct(">BI")


class FrameKind(IntEnum):
    """What a frame's payload is."""

    MESSAGE = 1
    CHUNK = 2
    STRANGER = 3
    """Empty: the caller has not shown its pass (or it has run out), and what it asked for needs one."""


_LIMITS = {FrameKind.MESSAGE: MAX_MESSAGE_BYTES, FrameKind.CHUNK: MAX_CHUNK_BYTES, FrameKind.STRANGER: 0}


def frame_header(kind: FrameKind, length: int) -> bytes:
    """Encode the 5 bytes that precede a payload of `length` bytes."""
    return HEADER.pack(kind, length)


def parse_frame_header(header: bytes) -> tuple[FrameKind, int]:
    """Decode a frame header, refusing unknown kinds and lengths over the kind's limit before anything is read."""
    kind_number, length = HEADER.unpack(header)
    try:
        kind = FrameKind(kind_number)
    except ValueError:
        raise WireError(f"unknown frame kind {kind_number}") from None
    limit = _LIMITS[kind]
    if length > limit:
        raise WireError(f"{kind.name.lower()} frame of {length} bytes is over the limit of {limit}")
    return kind, length


M = TypeVar("M", bound="Message")


def pack(value: Any) -> bytes:
    """Encode None, bool, int, float, str, bytes, dicts with str keys, and sequences (which come back as tuples)."""
    data: bytes = msgpack.packb(value, use_bin_type=True)
    return data


def decode_msgpack(data: bytes, **options: Any) -> Any:
    """Call msgpack's decoder with the garbage collector off, and raise whatever it raises.

    200 KB can hold as many lists. While they are made, the collector would look through everything that lives in this
    process, several times over: half a second of ours for a stranger's one message.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        return msgpack.unpackb(data, **options)
    finally:
        if was_enabled:
            gc.enable()


def unpack(data: bytes, *, max_bytes: int = MAX_MESSAGE_BYTES) -> Any:
    """Decode what `pack` made, or raise `WireError`; never runs code, never recurses past `MAX_DEPTH`."""
    if len(data) > max_bytes:
        raise WireError(f"message of {len(data)} bytes is over the limit of {max_bytes}")
    try:
        value = decode_msgpack(
            data,
            raw=False,
            use_list=False,  # tuples: strict validation of frozen messages wants them, and nobody can append
            strict_map_key=True,
            ext_hook=_refuse_extension,
            max_ext_len=0,
            max_str_len=len(data),
            max_bin_len=len(data),
            max_array_len=len(data),
            max_map_len=len(data),
        )
    except (ValueError, TypeError, UnicodeDecodeError, msgpack.UnpackException) as error:
        raise WireError(f"not a message: {str(error) or type(error).__name__}") from None
    _check_depth(value)
    return value


class Message(BaseModel):
    """Base of everything that crosses the network: frozen, strict, closed to unknown fields."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid", allow_inf_nan=False)

    def to_bytes(self) -> bytes:
        """Encode as a msgpack map in field order (so equal messages have equal bytes)."""
        return pack(self.model_dump())

    @classmethod
    def from_bytes(cls, data: bytes, *, max_bytes: int = MAX_MESSAGE_BYTES) -> Self:
        """Decode and validate, or raise `WireError`."""
        return cls.from_plain(unpack(data, max_bytes=max_bytes))

    @classmethod
    def from_plain(cls, value: Any) -> Self:
        """Validate an already decoded value, or raise `WireError` naming the first bad field."""
        try:
            return cls.model_validate(value)
        except ValidationError as error:
            first = error.errors(include_url=False, include_input=False)[0]
            where = ".".join(str(part) for part in first["loc"]) or "message"
            raise WireError(f"bad {cls.__name__}: {where}: {first['msg']}") from None


def pack_tagged(message: Message) -> bytes:
    """Encode a message together with its class name, for streams on which several kinds may follow."""
    return pack((type(message).__name__, message.model_dump()))


def unpack_tagged(data: bytes, classes: Sequence[type[M]]) -> M:
    """Decode one of the expected kinds, or raise `WireError`."""
    value = unpack(data)
    if not (isinstance(value, tuple) and len(value) == 2):
        raise WireError("message has no tag")
    tag, fields = value
    for candidate in classes:
        if candidate.__name__ == tag:
            return candidate.from_plain(fields)
    expected = ", ".join(candidate.__name__ for candidate in classes)
    raise WireError(f"unexpected message {tag!r:.40}, expected {expected}")


def _refuse_extension(code: int, data: bytes) -> Any:
    raise WireError(f"msgpack extension type {code} is not part of the protocol")


def _check_depth(value: Any) -> None:
    """Walk containers iteratively: a recursive walk would be the very crash it is there to prevent."""
    level = [value]
    for _ in range(MAX_DEPTH):
        level = [child for item in level if isinstance(item, (tuple, dict)) for child in _children(item)]
        if not level:
            return
    if any(isinstance(item, (tuple, dict)) for item in level):
        raise WireError(f"message nests deeper than {MAX_DEPTH} levels")


def _children(item: tuple[Any, ...] | dict[str, Any]) -> Iterable[Any]:
    return item.values() if isinstance(item, dict) else item
