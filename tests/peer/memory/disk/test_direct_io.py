"""Bytes come back whatever their length and place in memory, and short transfers are continued.

Oracles: the bytes that were written; the file as Python's own `open` reads it.
"""

from __future__ import annotations

import mmap
import os
import random
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from peer.memory.disk import direct_io
from peer.memory.disk.direct_io import UnitFile, aligned_buffer, allocate, is_aligned
from peer.memory.pages import PAGE_BYTES, padded

FILE_BLOCKS = 12
OFFSET = 2 * PAGE_BYTES
LENGTHS = (1, 4095, 4096, 4097, 3 * 4096, 20_000)


@pytest.fixture(params=[True, False], ids=["direct", "buffered"])
def file(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[UnitFile]:
    path = tmp_path / "data"
    allocate(path, FILE_BLOCKS * PAGE_BYTES)
    made = UnitFile(path, may_be_direct=request.param, largest_bytes=max(LENGTHS))
    try:
        if request.param and not made.is_direct:
            pytest.skip("the file system of pytest's folder has no direct I/O")
        yield made
    finally:
        made.close()


def placed(data: bytes, shift: int) -> memoryview:
    """Return a writable copy that begins `shift` bytes after a page's border."""
    view = memoryview(aligned_buffer(len(data) + shift))[shift : shift + len(data)]
    view[:] = data
    return view


@pytest.mark.parametrize("shift", [0, 64], ids=["aligned", "unaligned"])
@pytest.mark.parametrize("num_bytes", LENGTHS)
def test_bytes_come_back(file: UnitFile, tmp_path: Path, num_bytes: int, shift: int) -> None:
    data = random.Random(num_bytes).randbytes(num_bytes)
    file.write(OFFSET, placed(b"\xff" * num_bytes, 0))
    file.write(OFFSET, placed(data, shift))
    into = placed(bytes(num_bytes), shift)
    file.read(OFFSET, into)
    assert into == data
    file.sync()
    whole = (tmp_path / "data").read_bytes()
    assert whole == bytes(OFFSET) + data + bytes(FILE_BLOCKS * PAGE_BYTES - OFFSET - num_bytes)


def test_read_only_memory_can_be_written(file: UnitFile) -> None:
    file.write(0, memoryview(b"abc" * 3000))
    into = placed(bytes(9000), 0)
    file.read(0, into)
    assert into == b"abc" * 3000


def test_a_bounce_leaves_nothing_of_the_last_one(file: UnitFile, tmp_path: Path) -> None:
    file.write(0, placed(b"\xff" * 4096, 64))
    file.write(OFFSET, placed(b"x", 64))
    assert (tmp_path / "data").read_bytes()[OFFSET : OFFSET + PAGE_BYTES] == b"x" + bytes(PAGE_BYTES - 1)


def test_short_transfers_are_continued(file: UnitFile, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel may move less than was asked, also a part of a block, which O_DIRECT cannot go on from."""

    def short(call: Callable[[int, list[memoryview], int], int]) -> Callable[[int, list[memoryview], int], int]:
        def transfer(descriptor: int, buffers: list[memoryview], offset: int) -> int:
            moved = call(descriptor, [buffers[0][: 2 * PAGE_BYTES]], offset)
            return moved - 100 if moved > PAGE_BYTES else moved

        return transfer

    monkeypatch.setattr(os, "pwritev", short(os.pwritev))
    monkeypatch.setattr(os, "preadv", short(os.preadv))
    data = random.Random(0).randbytes(20_000)
    file.write(0, placed(data, 0))
    into = placed(bytes(20_000), 0)
    file.read(0, into)
    assert into == data


def test_large_requests_are_cut(file: UnitFile, monkeypatch: pytest.MonkeyPatch) -> None:
    """Linux moves at most 2 GiB less one page per call; here with a smaller limit."""
    asked: list[int] = []
    pwritev = os.pwritev

    def counting(descriptor: int, buffers: list[memoryview], offset: int) -> int:
        asked.append(len(buffers[0]))
        return pwritev(descriptor, buffers, offset)

    monkeypatch.setattr(os, "pwritev", counting)
    monkeypatch.setattr(direct_io, "MAX_REQUEST_BYTES", 2 * PAGE_BYTES)
    file.write(0, placed(bytes(5 * PAGE_BYTES), 0))
    assert asked == [8192, 8192, 4096]


def test_a_file_that_ends_early_is_an_error(file: UnitFile, tmp_path: Path) -> None:
    os.truncate(tmp_path / "data", PAGE_BYTES + 100)
    with pytest.raises(OSError, match="ended too early"):
        file.read(0, placed(bytes(3 * PAGE_BYTES), 0))


def test_without_direct_io_the_cache_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some file systems say so at the first transfer only."""

    def refuse(descriptor: int, buffers: list[memoryview], offset: int) -> int:
        raise OSError(22, "Invalid argument")

    allocate(tmp_path / "data", PAGE_BYTES)
    with monkeypatch.context() as patch:
        patch.setattr(os, "preadv", refuse)
        file = UnitFile(tmp_path / "data", may_be_direct=True, largest_bytes=1)
    assert not file.is_direct
    file.write(0, memoryview(b"abc"))
    into = bytearray(3)
    file.read(0, memoryview(into))
    file.close()
    assert into == b"abc"


def test_buffers_are_whole_blocks_from_a_border_on() -> None:
    buffer = aligned_buffer(5000)
    assert isinstance(buffer, mmap.mmap)
    assert len(buffer) == padded(5000) == 8192
    assert is_aligned(memoryview(buffer))
    assert not is_aligned(memoryview(buffer)[64:])


def test_room_is_taken_at_once(tmp_path: Path) -> None:
    """Oracle: the blocks that the file system has given to the file."""
    allocate(tmp_path / "data", 64 * PAGE_BYTES)
    found = (tmp_path / "data").stat()
    assert (found.st_size, found.st_mode & 0o777) == (64 * PAGE_BYTES, 0o600)
    assert found.st_blocks * 512 >= 64 * PAGE_BYTES
