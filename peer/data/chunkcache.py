"""A sparse file of chunks on disk and the bitmap that remembers which of them it holds.

Owns: the two files and their locking against each other. Must not know: hashes, sources; whoever reads a
chunk after a start verifies it (`peer/data/tokens.py`). Nothing is synced: the bitmap is a hint, and a chunk
that it promises wrongly fails its hash and is fetched again.
"""

from __future__ import annotations

import os
from pathlib import Path
from threading import Lock

from protocol.errors import StorageError
from protocol.manifest import TokenFileSpec
from protocol.tokens import ByteRange, chunk_range

BITMAP_SUFFIX = ".have"


class ChunkCache:
    """Stores chunks by number; safe to use from several threads. Raises `StorageError` when the disk does not play."""

    def __init__(self, path: Path, spec: TokenFileSpec) -> None:
        self._path = path
        self._spec = spec
        self._lock = Lock()  # work that outlives its cancelled task must not hit a closed, reused descriptor
        self._is_closed = False
        num_bytes = (spec.num_chunks + 7) // 8
        try:
            self._file = _open(path, spec.num_bytes)  # sparse: takes no room before it is filled
            self._bitmap_file = _open(path.with_suffix(BITMAP_SUFFIX), num_bytes)
            self._bitmap = bytearray(os.pread(self._bitmap_file, num_bytes, 0))
        except OSError as error:
            raise storage_error(path, error) from error

    def __contains__(self, chunk: int) -> bool:
        return 0 <= chunk < self._spec.num_chunks and bool(self._bitmap[chunk // 8] >> (chunk % 8) & 1)

    def __len__(self) -> int:
        return sum(byte.bit_count() for byte in self._bitmap)

    def read(self, span: ByteRange) -> bytes:
        """Return the bytes of a range, zeros where nothing was stored. Raises `StorageError` once it is closed."""
        with self._lock:
            if self._is_closed:
                raise StorageError(f"{self._path} is closed.")
            try:
                return os.pread(self._file, span.length, span.start)
            except OSError as error:
                raise storage_error(self._path, error) from error

    def store(self, chunk: int, data: bytes) -> None:
        """Keep a chunk, then remember it."""
        with self._lock:
            if self._is_closed:
                return
            self._write(self._file, data, chunk_range(self._spec, chunk).start)
            self._mark(chunk, held=True)

    def forget(self, chunk: int) -> None:
        """No longer claim to hold a chunk."""
        with self._lock:
            if not self._is_closed:
                self._mark(chunk, held=False)

    def close(self) -> None:
        """Close both files; later stores do nothing, and nothing can be read."""
        with self._lock:
            if not self._is_closed:
                self._is_closed = True
                os.close(self._file)
                os.close(self._bitmap_file)

    def _mark(self, chunk: int, *, held: bool) -> None:
        byte, bit = divmod(chunk, 8)
        self._bitmap[byte] = self._bitmap[byte] & ~(1 << bit) | held << bit
        self._write(self._bitmap_file, self._bitmap[byte : byte + 1], byte)

    def _write(self, descriptor: int, data: bytes | bytearray, offset: int) -> None:
        written = 0
        try:
            while written < len(data):
                written += os.pwrite(descriptor, memoryview(data)[written:], offset + written)
        except OSError as error:
            raise storage_error(self._path, error) from error


def storage_error(path: Path, error: OSError) -> StorageError:
    """Say in one line that tokens cannot be kept."""
    return StorageError(
        f"cannot keep tokens in {path}: {error.strerror or error}.",
        hint="Free some space there, or choose another --data-dir.",
    )


def _open(path: Path, num_bytes: int) -> int:
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    os.ftruncate(descriptor, num_bytes)
    return descriptor
