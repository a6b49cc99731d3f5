"""One large file that is read and written in whole units, past the page cache where the file system allows that.

Owns: alignment, bounce and padding, short transfers, and preallocation. Must not know: units, slots, checksums
(`store.py`). Raises plain `OSError`: the caller knows what the bytes were.

Past the page cache, because the state that streams through here is larger than memory and is used once per step: if
cached, it would only push out what is needed. Measured (virtio disk, ext4, units of 32 MiB): O_DIRECT writes 1.6-1.7
GB/s and reads 1.1-1.2 GB/s at 2-4 % of a core; through the cache it is 1.5 and 1.6 (read-ahead) at 26-35 % of a core.

A fresh, unwritten extent takes its first write more slowly: 1.3 instead of 1.7 GB/s direct, 0.3-0.7 instead of 1.5
cached. A pass of zeros would cost more time than it saves, and wear besides, so the first write of a slot is that pass.

All calls release the GIL while the kernel works. Reads and writes may come from any number of threads at once, as long
as they do not overlap in the file.
"""

from __future__ import annotations

import errno
import mmap
import os
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from threading import Lock

import numpy as np

from peer.memory.disk.durable_files import FILE_MODE, sync_data, sync_file, sync_folder
from peer.memory.pages import PAGE_BYTES, padded

HUGE_PAGE_BYTES = 2 << 20
MAX_REQUEST_BYTES = 1 << 30  # Linux moves at most 2 GiB less one page per call; half of it stays aligned

_Call = Callable[[int, list[memoryview], int], int]


def aligned_buffer(num_bytes: int) -> mmap.mmap:
    """Return zeroed memory in whole blocks that needs no bounce; CUDA can pin it.

    Anonymous and private: what Python maps by default is shared memory, which containers limit and which the kernel
    does not put into huge pages.
    """
    buffer = mmap.mmap(-1, padded(num_bytes), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if num_bytes >= HUGE_PAGE_BYTES and hasattr(mmap, "MADV_HUGEPAGE"):
        with suppress(OSError):  # some kernels have none; a disk pins page by page, so fewer pages cost less
            buffer.madvise(mmap.MADV_HUGEPAGE)
    return buffer


def is_aligned(view: memoryview) -> bool:
    """Tell whether a buffer begins where O_DIRECT can use it."""
    return bool(np.frombuffer(view, np.uint8).ctypes.data % PAGE_BYTES == 0)


def allocate(path: Path, num_bytes: int) -> None:
    """Create a file with room for `num_bytes`, which writing it can no longer run out of."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, FILE_MODE)
    try:
        if sys.platform == "linux":
            os.posix_fallocate(descriptor, 0, num_bytes)
        else:
            os.ftruncate(descriptor, num_bytes)
        sync_file(descriptor)
    finally:
        os.close(descriptor)
    sync_folder(path.parent)


def resize(path: Path, num_bytes: int) -> None:
    """Give a file the length `num_bytes`; its beginning stays. As `allocate`, or as it was if there is no room."""
    descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    try:
        before_bytes = os.fstat(descriptor).st_size
        if sys.platform == "linux" and num_bytes > before_bytes:
            try:
                os.posix_fallocate(descriptor, before_bytes, num_bytes - before_bytes)
            except BaseException:
                os.ftruncate(descriptor, before_bytes)
                raise
        else:
            os.ftruncate(descriptor, num_bytes)
        sync_file(descriptor)
    finally:
        os.close(descriptor)


class UnitFile:
    """An open file of whole blocks. `is_direct` says whether the page cache is passed by."""

    def __init__(self, path: Path, *, may_be_direct: bool, largest_bytes: int) -> None:
        descriptor = _open_direct(path) if may_be_direct else None
        self.is_direct = descriptor is not None
        self._descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC) if descriptor is None else descriptor
        self._bounce = memoryview(aligned_buffer(largest_bytes))  # takes no memory before it is touched
        self._bounce_lock = Lock()

    def read(self, offset: int, into: memoryview) -> None:
        """Fill a byte buffer from a block's border on. Buffers that begin at one too spare a copy."""
        if not self.is_direct:
            self._transfer(os.preadv, into, offset)
            self._drop_cached(offset, len(into))
        elif is_aligned(into):
            whole_bytes = len(into) - len(into) % PAGE_BYTES
            self._transfer(os.preadv, into[:whole_bytes], offset)
            if rest := into[whole_bytes:]:
                block = memoryview(aligned_buffer(PAGE_BYTES))
                self._transfer(os.preadv, block, offset + whole_bytes)
                rest[:] = block[: len(rest)]
        else:
            with self._bounce_lock:
                self._transfer(os.preadv, self._bounce[: padded(len(into))], offset)
                into[:] = self._bounce[: len(into)]

    def write(self, offset: int, data: memoryview) -> None:
        """Write bytes from a block's border on; the last block is filled up with zeros."""
        if not self.is_direct:
            self._transfer(os.pwritev, data, offset)
            self._drop_cached(offset, len(data))
        elif is_aligned(data):
            whole_bytes = len(data) - len(data) % PAGE_BYTES
            self._transfer(os.pwritev, data[:whole_bytes], offset)
            if rest := data[whole_bytes:]:
                block = memoryview(aligned_buffer(PAGE_BYTES))
                block[: len(rest)] = rest
                self._transfer(os.pwritev, block, offset + whole_bytes)
        else:
            end = padded(len(data))
            with self._bounce_lock:
                self._bounce[: len(data)] = data
                self._bounce[len(data) : end] = bytes(end - len(data))
                self._transfer(os.pwritev, self._bounce[:end], offset)

    def sync(self) -> None:
        """Make everything written so far survive a power cut."""
        sync_data(self._descriptor)
        if not self.is_direct:
            self._drop_cached(0, 0)  # to the end: what was dirty when it was written can go only now

    def close(self) -> None:
        os.close(self._descriptor)

    def _transfer(self, call: _Call, view: memoryview, offset: int) -> None:
        """Repeat `call` until all is moved. Python itself repeats what a signal interrupted (PEP 475)."""
        step_bytes = PAGE_BYTES if self.is_direct else 1
        done = 0
        while done < len(view):
            moved = call(self._descriptor, [view[done : done + MAX_REQUEST_BYTES]], offset + done)
            if moved < step_bytes:  # past the file's end; and from within a block no direct transfer can go on
                raise OSError(errno.EIO, "the transfer ended too early")
            done += moved - moved % step_bytes

    def _drop_cached(self, offset: int, num_bytes: int) -> None:
        """Give the page cache back. Dirty pages stay, but their way to the disk begins."""
        if sys.platform == "linux":
            os.posix_fadvise(self._descriptor, offset, num_bytes, os.POSIX_FADV_DONTNEED)


def _open_direct(path: Path) -> int | None:
    """Open past the page cache, or return None where the file system does not have that."""
    if sys.platform != "linux":
        return None
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_DIRECT)
    except OSError as error:
        if error.errno == errno.EINVAL:
            return None
        raise
    try:  # some let it be opened so and refuse the first transfer
        os.preadv(descriptor, [aligned_buffer(PAGE_BYTES)], 0)
    except OSError as error:
        os.close(descriptor)
        if error.errno == errno.EINVAL:
            return None
        raise
    return descriptor
