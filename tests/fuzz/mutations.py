"""Small changes to bytes, some of which know msgpack, JSON and lengths. Seeded: the same numbers give the same bytes.

Owns: the ways of changing. Must not know: what is decoded.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from random import Random
from typing import Any

import msgpack

EDGES = (
    0,
    1,
    -1,
    127,
    128,
    255,
    256,
    65_535,
    65_536,
    2**31 - 1,
    2**31,
    2**32 - 1,
    2**53,
    2**63 - 1,
    2**64 - 1,
    -(2**63),
)
SCRAPS: tuple[Any, ...] = (
    None, True, False, 1.5, float("nan"), float("inf"), -0.0, "", "x" * 300, b"", b"\xff" * 300, [], {}, [[]],
    [0] * 300, {"a": 1}, {"__class__": "x"}, "object", [None] * 5, "\ud7ff",
)  # fmt: skip
MAX_BYTES = 256 * 1024


def mutate(data: bytes, others: Sequence[bytes], chance: Random) -> bytes:
    """Return bytes that differ from `data` in one to four places, or in what they hold."""
    if chance.random() < 0.4 and (held := _changed_value(data, chance)) is not None:
        return held[:MAX_BYTES]
    changed = bytearray(data)
    for _ in range(chance.randint(1, 4)):
        changed = chance.choice(_WAYS)(changed, others, chance)
    return bytes(changed[:MAX_BYTES])


def _flip(data: bytearray, others: Sequence[bytes], chance: Random) -> bytearray:
    if data:
        data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
    return data


def _overwrite(data: bytearray, others: Sequence[bytes], chance: Random) -> bytearray:
    at = chance.randrange(len(data) + 1)
    data[at : at + chance.randint(0, 8)] = chance.randbytes(chance.randint(0, 8))
    return data


def _edge(data: bytearray, others: Sequence[bytes], chance: Random) -> bytearray:
    """Write a number at the edge of its range, in any width and either order: lengths are among what it hits."""
    form = chance.choice(("<B", "<H", ">H", "<I", ">I", "<Q", ">Q"))
    size = struct.calcsize(form)
    at = chance.randrange(len(data) + 1)
    data[at : at + size] = struct.pack(form, chance.choice(EDGES) % (1 << 8 * size))
    return data


def _cut(data: bytearray, others: Sequence[bytes], chance: Random) -> bytearray:
    return data[: chance.randrange(len(data) + 1)]


def _repeat(data: bytearray, others: Sequence[bytes], chance: Random) -> bytearray:
    start, end = sorted(chance.randrange(len(data) + 1) for _ in range(2))
    data[start:start] = data[start:end] * chance.choice((1, 2, 40))
    return data[:MAX_BYTES]


def _splice(data: bytearray, others: Sequence[bytes], chance: Random) -> bytearray:
    other = chance.choice(others)
    return data[: chance.randrange(len(data) + 1)] + bytearray(other[chance.randrange(len(other) + 1) :])


_WAYS = (_flip, _flip, _overwrite, _edge, _edge, _cut, _repeat, _splice)


def _changed_value(data: bytes, chance: Random) -> bytes | None:
    """Change something in what the bytes hold, if they are msgpack: a field of another type, one too many, nesting."""
    try:
        value = msgpack.unpackb(data, strict_map_key=False)
        return bytes(msgpack.packb(_change(value, chance)))
    except (ValueError, TypeError, OverflowError, msgpack.UnpackException, RecursionError):
        return None


def _change(value: Any, chance: Random) -> Any:
    if isinstance(value, dict) and value and chance.random() < 0.8:
        key = chance.choice(list(value))
        match chance.randrange(6):
            case 0:
                return {name: each for name, each in value.items() if name != key}
            case 1:
                return {**value, "surplus": chance.choice(SCRAPS)}
        return {**value, key: _change(value[key], chance)}
    if isinstance(value, list) and value and chance.random() < 0.8:
        at = chance.randrange(len(value))
        match chance.randrange(6):
            case 0:
                return value[:at] + value[at + 1 :]
            case 1:
                return value + [value[at]] * chance.choice((1, 500))
        return [*value[:at], _change(value[at], chance), *value[at + 1 :]]
    if chance.random() < 0.1:
        for _ in range(chance.choice((3, 20, 400))):
            value = [value]
        return value
    return chance.choice((*SCRAPS, *EDGES))
