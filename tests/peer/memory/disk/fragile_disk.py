"""A disk that forgets what was not synced, under a folder that a store really uses.

Owns: what a power cut may leave. Of the data file: what the last sync covered, and any of the 512-byte sectors written
since. Of a replaced file: any content since the last sync of the folder, torn if it was renamed before it was synced.
Must not know: slots, tables, commits. Nothing is really synced, which also makes the tests fast.
"""

from __future__ import annotations

import os
import random
from pathlib import Path
from typing import Any

import pytest

SECTOR_BYTES = 512


class Cut(BaseException):
    """The machine stops here. No handler for mere errors may catch it."""


class FragileDisk:
    """Stands in for the calls that change a folder. Set `calls_left` to stop at the next call but that many."""

    def __init__(self, folder: Path, patch: pytest.MonkeyPatch, *, data_file: str, seed: int) -> None:
        self._folder = folder
        self._data_path = folder / data_file
        self._random = random.Random(seed)
        self._data = bytearray(self._data_path.read_bytes())  # what a power cut leaves for certain
        self._unsynced: list[tuple[int, bytes]] = []
        small = [path for path in folder.iterdir() if path != self._data_path]
        self._candidates = {path.name: [path.read_bytes()] for path in small}
        self._synced: set[Path] = set()
        self._real = {name: getattr(os, name) for name in ("pwritev", "write", "fsync", "fdatasync", "replace")}
        self.calls_left: int | None = None
        self.is_watching = True
        for name in self._real:
            patch.setattr(os, name, getattr(self, f"_{name}"))

    def survive(self, folder: Path) -> None:
        """Write down what a power cut leaves, by chance."""
        folder.mkdir()
        data = bytearray(self._data)
        for offset, sector in self._unsynced:
            if self._random.random() < 0.5:
                data[offset : offset + len(sector)] = sector
        (folder / self._data_path.name).write_bytes(data)
        for name, candidates in self._candidates.items():
            (folder / name).write_bytes(self._random.choice(candidates))

    def _count(self) -> bool:
        """Tell whether the machine stops with this call; by chance it stops before the call has done anything."""
        if not self.is_watching or self.calls_left is None:
            return False
        self.calls_left -= 1
        if self.calls_left < 0 and self._random.random() < 0.5:
            raise Cut
        return self.calls_left < 0

    def _pwritev(self, descriptor: int, buffers: list[memoryview], offset: int) -> int:
        is_last = self._count()
        if self.is_watching:
            data = b"".join(buffers)
            for start in range(0, len(data), SECTOR_BYTES):
                self._unsynced.append((offset + start, data[start : start + SECTOR_BYTES]))
        return int(self._do("pwritev", is_last, descriptor, buffers, offset))

    def _write(self, descriptor: int, data: Any) -> int:
        is_last = self._count()
        self._synced.discard(_path_of(descriptor))
        return int(self._do("write", is_last, descriptor, data))

    def _fdatasync(self, descriptor: int) -> None:
        is_last = self._count()
        if self.is_watching and _path_of(descriptor) == self._data_path:
            for offset, sector in self._unsynced:
                self._data[offset : offset + len(sector)] = sector
            self._unsynced.clear()
        self._do(None, is_last)

    def _fsync(self, descriptor: int) -> None:
        is_last = self._count()
        path = _path_of(descriptor)
        self._synced.add(path)
        if self.is_watching and path == self._folder:
            self._candidates = {name: found[-1:] for name, found in self._candidates.items()}
        self._do(None, is_last)

    def _replace(self, source: Path, target: Path) -> None:
        is_last = self._count()
        if self.is_watching:
            data = Path(source).read_bytes()
            if Path(source) not in self._synced:
                data = data[: self._random.randrange(len(data))]
            self._candidates.setdefault(Path(target).name, [b""]).append(data)
        self._do("replace", is_last, source, target)

    def _do(self, name: str | None, is_last: bool, *arguments: Any) -> Any:
        result = self._real[name](*arguments) if name else None
        if is_last:
            raise Cut
        return result


def _path_of(descriptor: int) -> Path:
    return Path(os.readlink(f"/proc/self/fd/{descriptor}"))
