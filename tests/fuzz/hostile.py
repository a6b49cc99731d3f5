"""Bytes that cost whoever decodes them far more than whoever made them, unless they are looked through first.

Owns: the shapes. Must not know: what decodes them, and what may come of it.
"""

from __future__ import annotations

from collections.abc import Iterator

ARRAY, MAP, TEXT = b"\xdd", b"\xdf", b"\xdb"


def hostile(num_bytes: int) -> dict[str, bytes]:
    """Return shapes of about so many bytes (less than one per cent more or less), from 1,000 on."""
    return dict(_shapes(num_bytes))


def _shapes(num_bytes: int) -> Iterator[tuple[str, bytes]]:
    room = num_bytes - 5
    yield "lists in lists", b"\x91" * (num_bytes - 1) + b"\x90"
    yield "lists twelve deep", _many(b"\x91" * 11 + b"\x90", room)
    yield "empty lists", _many(b"\x90", room)
    yield "empty maps", _many(b"\x80", room)
    yield "nothings", _many(b"\xc0", room)
    yield "maps of one", _many(b"\x81\xa0\xc0", room)
    yield "maps of six", _many(b"\x86" + b"".join(b"\xa1%c\xc0" % letter for letter in b"abcdef"), room)
    yield "maps of eleven bytes", _many(b"\x8b" + b"".join(b"\xc4\x01%c\xc0" % each for each in range(11)), room)
    yield "numbers", _many(b"\xca\x00\x00\x00\x01", room)
    yield "letters", _many(b"\xa1a", room)
    yield "two letters", _many(b"\xa2ab", room)
    yield "short wide text", _many(b"\xa5a\xf0\x9f\x98\x80", room)
    yield "long wide text", TEXT + room.to_bytes(4, "big") + b"\xf0\x9f\x98\x80" + b"a" * (room - 4)
    yield (
        "one map of many",
        MAP
        + (room // 6).to_bytes(4, "big")
        + b"".join(b"\xa4%04x\xc0" % (number % 0x10000) for number in range(room // 6)),
    )
    yield "claims", b"\xdc\x02\x00" * (num_bytes // 3)
    yield "times", _many(b"\xd6\xff\x00\x00\x00\x00", room)
    yield "tuples of the DHT", _many(b"\xd4\x40\x90", room)
    yield "tuples within tuples of the DHT", _many(b"\xd7\x40\xd6\x40\xd5\x40\x91\x90\xc0\xc0", room)
    hidden = b"\x80" * (min(room - 10, 0xFFFF) // 256 * 256)
    header = b"\xd6\xff\xdb\x00\x00" + (len(hidden) >> 8).to_bytes(1, "big") + b"\x00"
    yield "maps behind a time that looks like text", ARRAY + (len(hidden) + 2).to_bytes(4, "big") + header + hidden
    for name, field in ((b"BeatReply", b"members"), (b"Commit", b"contributors"), (b"Window", b"partners")):
        for fill in (b"\x00", b"\x90"):
            start = b"\x92%c%b\x81%c%b" % (0xA0 + len(name), name, 0xA0 + len(field), field)
            yield f"a {name.decode()} of {field.decode()} {fill.hex()}", start + _many(fill, room - len(start))


def _many(item: bytes, num_bytes: int) -> bytes:
    count = num_bytes // len(item)
    return ARRAY + count.to_bytes(4, "big") + item * count
