"""The bytes of an update while they come in: in a file without a name, so that they are no copy of the stage in memory.

Owns: the file and its mapping into memory. Must not know: what the bytes are, where they come from. An update is as
long as a stage's gradients in their codec; whoever reads or writes it goes from front to back, a part at a time, so the
kernel can put what was used back on the disk. Short ones are not worth a file.

What comes in is written to the file, not to the mapping: there every page of 4 KiB would stop the writer for a fault,
which takes five times as long.
"""

from __future__ import annotations

import mmap
import os
import tempfile
import weakref
from pathlib import Path

from protocol.errors import StorageError

MIN_FILE_BYTES = 32 << 20


class Spool:
    """A buffer of fixed length. It lives as long as somebody holds its `view`."""

    def __init__(self, num_bytes: int, folder: Path | None) -> None:
        """Make room in `folder`; without one, in memory. Raises `StorageError` if there is none."""
        self._file: int | None = None
        if folder is None or num_bytes < MIN_FILE_BYTES:
            self.view = memoryview(bytearray(num_bytes))
            return
        try:
            with tempfile.TemporaryFile(dir=folder, prefix="update-") as file:
                if hasattr(os, "posix_fallocate"):  # a write to a mapping can only say by a signal that a disk is full
                    os.posix_fallocate(file.fileno(), 0, num_bytes)
                else:
                    file.truncate(num_bytes)
                self.view = memoryview(mmap.mmap(file.fileno(), num_bytes))
                self._file = os.dup(file.fileno())
                weakref.finalize(self, os.close, self._file)
        except OSError as error:
            hint = "Free some disk space."
            raise StorageError(f"no room for an update in {folder}: {error.strerror}.", hint=hint) from None

    def put(self, offset: int, data: bytes | bytearray | memoryview) -> None:
        """Write bytes at their place. Raises `StorageError` if the disk does not take them."""
        assert offset + len(data) <= len(self.view), "more bytes than the update has"
        if self._file is None:
            self.view[offset : offset + len(data)] = data
            return
        rest = memoryview(data)
        try:
            while rest:
                written = os.pwrite(self._file, rest, offset)
                rest, offset = rest[written:], offset + written
        except OSError as error:
            raise StorageError(f"an update cannot be written: {error.strerror}.", hint="Check the disk.") from None
