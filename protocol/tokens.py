"""Where a window of tokens lies in a token file, and how a chunk of that file is checked.

Owns: the index format and the arithmetic from windows to chunks. Pure. Must not know: files, sources,
numpy. The coordinator writes and serves chunks (`coordinator/tokenfiles.py`), volunteers fetch, verify
and keep them (`peer/data/tokens.py`); both sides agree here.

A token file is nothing but little-endian ids, two or four bytes each. Its index is the SHA-256 of every
chunk, one after the other in file order; the manifest holds the SHA-256 of the index.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Self

from protocol.errors import WireError
from protocol.ids import DIGEST_BYTES, Digest, digest
from protocol.manifest import TokenFileSpec

CHUNK_BYTES = 1024 * 1024  # one protocol body chunk: 512 Ki tokens, 0.4 s on a 20 Mbit/s link


@dataclass(frozen=True, slots=True)
class ByteRange:
    """`length` bytes from `start`."""

    start: int
    length: int

    @property
    def end(self) -> int:
        return self.start + self.length


@dataclass(frozen=True, slots=True)
class ChunkIndex:
    """The digests of a token file's chunks; build one with `parse` unless the digests are our own."""

    spec: TokenFileSpec
    data: bytes

    @classmethod
    def parse(cls, spec: TokenFileSpec, data: bytes) -> Self:
        """Return the index in `data`, or raise `WireError` if the manifest means another one."""
        expected = spec.num_chunks * DIGEST_BYTES
        if len(data) != expected:
            raise WireError(f"index of {spec.name} has {len(data)} bytes instead of {expected}")
        if digest(data) != spec.index_digest:
            raise WireError(f"index of {spec.name} is not the one in the manifest")
        return cls(spec, data)

    def digest_of(self, chunk: int) -> Digest:
        """Return the expected SHA-256 of a chunk."""
        check_chunk(self.spec, chunk)
        return Digest(self.data[chunk * DIGEST_BYTES : (chunk + 1) * DIGEST_BYTES])

    def fits(self, chunk: int, data: bytes) -> bool:
        """Tell whether `data` is that chunk, to the last bit."""
        return len(data) == chunk_range(self.spec, chunk).length and digest(data) == self.digest_of(chunk)


def index_bytes(digests: Iterable[Digest]) -> bytes:
    """Lay out an index; its own SHA-256 goes into the manifest."""
    return b"".join(digests)


def check_chunk(spec: TokenFileSpec, chunk: int) -> None:
    """Raise `WireError` for a chunk number that the file does not have."""
    if not 0 <= chunk < spec.num_chunks:
        raise WireError(f"{spec.name} has no chunk {chunk}: it has {spec.num_chunks}")


def chunk_range(spec: TokenFileSpec, chunk: int) -> ByteRange:
    """Return the bytes of a chunk; only the last one may be shorter than `chunk_bytes`."""
    check_chunk(spec, chunk)
    start = chunk * spec.chunk_bytes
    return ByteRange(start, min(spec.chunk_bytes, spec.num_bytes - start))


def window_range(spec: TokenFileSpec, window: int, *, sequence_length: int) -> ByteRange:
    """Return the bytes of window w: the T + 1 tokens from `w * T`.

    Neighbouring windows share one token: the last label of one is the first input of the next.
    """
    first = window * sequence_length
    if window < 0 or first + sequence_length + 1 > spec.num_tokens:
        raise WireError(f"{spec.name} has no window {window} of {sequence_length} tokens")
    return ByteRange(first * spec.bytes_per_token, (sequence_length + 1) * spec.bytes_per_token)


def chunks_of(spec: TokenFileSpec, windows: Iterable[int], *, sequence_length: int) -> tuple[int, ...]:
    """List, in file order and each once, the chunks that hold these windows."""
    chunks: set[int] = set()
    for window in windows:
        span = window_range(spec, window, sequence_length=sequence_length)
        chunks.update(range(span.start // spec.chunk_bytes, (span.end - 1) // spec.chunk_bytes + 1))
    return tuple(sorted(chunks))
