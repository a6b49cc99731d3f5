"""Bytes on a stream: bounded msgpack messages inside length-prefixed frames. Sans IO.

Owns: the frame header, the size limits, and strict decoding (no extension types, no deep nesting, no
unknown fields). Must not know: sockets, what any message means. Every message class of the protocol
derives from `Message`; the transport reads and writes `Frame`s.

What a message would take once it is decoded is added up before anything is made of it: 256 KiB of empty maps would be
20 MiB, and 2,500 bytes that claim arrays within arrays reserve 10.

A frame is `kind: u8, length: u32 big-endian, payload`. Raw tensor bytes travel in CHUNK frames so that
they are never copied through msgpack.
"""

from __future__ import annotations

import gc
import struct
from collections.abc import Sequence
from enum import IntEnum
from typing import Any, Self, TypeVar

import msgpack
from pydantic import BaseModel, ConfigDict, GetCoreSchemaHandler, ValidationError

from protocol.errors import WireError

PROTOCOL_VERSION = 11
MAX_MESSAGE_BYTES = 256 * 1024  # the largest control message is a commit for ~1,000 members
MAX_CHUNK_BYTES = 1024 * 1024  # bigger chunks gained nothing on loopback and delay everything else on a home link
MAX_DEPTH = 12  # our deepest message nests 7 levels; msgpack's own limit (1,024) is far beyond any need
ROOM_PER_BYTE, MORE_ROOM = 3, 768 * 1024
"""What decoding may take: three times the bytes, and this much more. A commit for a thousand has a fifth to spare."""
SMALL_BYTES = 8 * 1024  # of which nothing that takes more than that can be made, unless it claims long arrays
MAX_ENTRIES = 256  # of a map: maps are messages, and every surplus field is an error that is made before it is refused
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

    Raises `WireError` without calling it if that would take too much memory.

    200 KB can hold as many lists. While they are made, the collector would look through everything that lives in this
    process, several times over: half a second of ours for a stranger's one message.
    """
    _check_room(data)
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
            max_map_len=MAX_ENTRIES,
        )
    except (ValueError, TypeError, UnicodeDecodeError, msgpack.UnpackException) as error:
        raise WireError(f"not a message: {str(error) or type(error).__name__}") from None
    _check_depth(value)
    return value


def _end_at_first_error(schema: Any) -> None:
    if isinstance(schema, dict):
        if schema.get("type") in ("tuple", "list"):
            schema["fail_fast"] = True
        for part in schema.values():
            _end_at_first_error(part)
    elif isinstance(schema, list | tuple):
        for part in schema:
            _end_at_first_error(part)


class Message(BaseModel):
    """Base of everything that crosses the network: frozen, strict, closed to unknown fields."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid", allow_inf_nan=False)

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> Any:
        """Let every sequence end at its first bad item: 64 KiB can hold as many, and each would become an error."""
        schema = handler(source)
        _end_at_first_error(schema)
        return schema

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
    level = [value] if type(value) in _CONTAINERS else []
    for _ in range(MAX_DEPTH):
        if not level:
            return
        level = [
            child
            for item in level
            for child in (item if type(item) is tuple else item.values())
            if type(child) in _CONTAINERS
        ]
    if level:
        raise WireError(f"message nests deeper than {MAX_DEPTH} levels")


_CONTAINERS = frozenset((tuple, dict))


# -- what a message would take in memory ------------------------------------------------------------------

_NEVER, _EXTENSION_8, _STR_8, _ARRAY_16, _MAP_16 = 0xC1, 0xC7, 0xD9, 0xDC, 0xDE
_TIMESTAMP = b"\xff"  # the extension that msgpack decodes by itself: its content could be no values, and hide others
_SLOT_BYTES, _OBJECT_BYTES, _TEXT_BYTES, _LIST_BYTES, _MAP_BYTES, _ENTRY_BYTES = 8, 40, 60, 72, 200, 40
_WIDTHS = {
    0xC4: 1, 0xC5: 2, 0xC6: 4, 0xC7: 1, 0xC8: 2, 0xC9: 4, 0xD4: 0, 0xD5: 0, 0xD6: 0, 0xD7: 0, 0xD8: 0,
    0xD9: 1, 0xDA: 2, 0xDB: 4, 0xDC: 2, 0xDD: 4, 0xDE: 2, 0xDF: 4,
}  # fmt: skip
"""Of the length that follows a first byte."""


def _first_bytes() -> tuple[list[int], list[int]]:
    """Return how far it is from a value's first byte to the next one's, and what the value takes. 0: a length follows.

    An extension's content is walked through like all the rest: whoever takes it decodes it as msgpack.
    """
    steps, takes = [1] * 256, [0] * 256
    for few in range(16):
        takes[0x80 + few] = _MAP_BYTES + _ENTRY_BYTES * max(0, few - 5) if few else _LIST_BYTES + _SLOT_BYTES
        takes[0x90 + few] = _LIST_BYTES + _SLOT_BYTES * few
    for length in range(32):
        steps[0xA0 + length] = 1 + length
        takes[0xA0 + length] = _TEXT_BYTES + 3 * length if length > 1 else 0  # one letter is there already
    for code, size in zip(range(0xCA, 0xD4), (4, 8, 1, 2, 4, 8, 1, 2, 4, 8), strict=True):
        steps[code], takes[code] = 1 + size, _OBJECT_BYTES
    takes[0xCC] = 0  # so are the numbers below 256
    for code in (_NEVER, *_WIDTHS):
        steps[code] = 0
    return steps, takes


_STEPS, _TAKES = _first_bytes()


def _check_room(data: bytes) -> None:
    """Add up, from first bytes and lengths alone, what decoding `data` takes; raise `WireError` if that is too much.

    It need not know what is inside what: values follow each other in the same order however they are nested.
    """
    if len(data) <= SMALL_BYTES and b"\xdc" not in data and b"\xdd" not in data:
        return
    steps, takes = _STEPS, _TAKES
    room = MORE_ROOM + ROOM_PER_BYTE * len(data)
    at, end = 0, len(data)
    while at < end:
        code = data[at]
        room -= takes[code]
        if step := steps[code]:
            at += step
            continue
        if code == _NEVER:
            raise WireError("not a message: no value begins like that")
        at += 1 + _WIDTHS[code]
        length = int.from_bytes(data[at - _WIDTHS[code] : at], "big")
        if length > end - at:  # every value takes a byte at least
            raise WireError("not a message: it claims more than follows")
        if code >= _MAP_16:
            room -= _MAP_BYTES + 3 * _ENTRY_BYTES * length  # it grows by copying
        elif code >= _ARRAY_16:
            room -= _LIST_BYTES + 2 * _SLOT_BYTES * length  # it is a list before it is a tuple
        elif _EXTENSION_8 <= code < _STR_8:  # the numbers in between have steps
            if data[at : at + 1] == _TIMESTAMP:
                raise WireError("not a message: it holds a timestamp")
            room -= _OBJECT_BYTES + max(length, 16)
            at += 1
        else:
            is_wide = code >= _STR_8 and not data[at : at + length].isascii()
            room -= _TEXT_BYTES + (4 * length if is_wide else length)
            at += length
        if room < 0:
            break
    if room < 0:
        raise WireError(f"a message of {end} bytes that would take too much memory")
