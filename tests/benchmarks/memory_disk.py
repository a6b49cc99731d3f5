"""What the disk itself can do: the same bytes as a training step, without training.

Owns: one file, read and written past the page cache by one thread each way. Must not know: what the bytes are. Nothing
of `peer/memory/` is used, so that a slow way there cannot hide.
"""

from __future__ import annotations

import itertools
import mmap
import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Self

BLOCK_BYTES = 4096


class RawDisk:
    """A file of `file_bytes`, moved in requests of `request_bytes`; both are rounded up."""

    def __init__(self, path: Path, *, file_bytes: int, request_bytes: int) -> None:
        self._request_bytes = -(-request_bytes // BLOCK_BYTES) * BLOCK_BYTES
        self._num_requests = -(-file_bytes // self._request_bytes)
        self._buffers = [mmap.mmap(-1, self._request_bytes) for _ in range(2)]
        for buffer in self._buffers:  # zeros are a special case for some drives
            buffer[:] = os.urandom(BLOCK_BYTES) * (self._request_bytes // BLOCK_BYTES)
        self._path = path
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_DIRECT", 0))
        os.posix_fallocate(self._descriptor, 0, self._num_requests * self._request_bytes)
        self.move(read_bytes=0, written_bytes=self._num_requests * self._request_bytes)  # fresh extents are slower

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._descriptor)
        self._path.unlink()

    def move(self, *, read_bytes: int, written_bytes: int) -> float:
        """Read and write this many bytes, both at once, and return how many seconds it took."""
        started_s = time.perf_counter()
        with ThreadPoolExecutor(2) as threads:
            both = [
                threads.submit(self._transfer, os.preadv, self._buffers[0], read_bytes),
                threads.submit(self._transfer, os.pwritev, self._buffers[1], written_bytes),
            ]
        for future in both:
            future.result()
        return time.perf_counter() - started_s

    def _transfer(self, call: Callable[[int, list[memoryview], int], int], buffer: mmap.mmap, num_bytes: int) -> None:
        view = memoryview(buffer)
        for number in itertools.count():
            wanted = min(self._request_bytes, num_bytes - number * self._request_bytes)
            if wanted <= 0:
                return
            request = view[: -(-wanted // BLOCK_BYTES) * BLOCK_BYTES]
            moved = call(self._descriptor, [request], number % self._num_requests * self._request_bytes)
            if moved != len(request):
                raise OSError(f"a transfer of {len(request)} bytes ended after {moved}")
