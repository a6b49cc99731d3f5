"""Room for an update. Oracle: the bytes that were put there, and what the folder shows."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from peer.averaging import spool
from peer.averaging.spool import Spool
from protocol.errors import StorageError


@pytest.mark.parametrize("in_file", [False, True])
def test_what_was_put_is_there_and_no_file_is_seen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, in_file: bool
) -> None:
    monkeypatch.setattr(spool, "MIN_FILE_BYTES", 0 if in_file else 1 << 30)
    room = Spool(10_000, tmp_path)
    room.put(0, b"abc")
    room.put(9_000, memoryview(b"x" * 1_000))
    assert bytes(room.view) == b"abc" + bytes(8_997) + b"x" * 1_000
    assert list(tmp_path.iterdir()) == []


def test_the_view_outlives_everything_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spool, "MIN_FILE_BYTES", 0)
    view = Spool(4096, tmp_path).view
    view[:3] = b"abc"
    assert bytes(view[:4]) == b"abc\0"


def test_a_short_update_is_not_worth_a_file() -> None:
    """Oracle: a folder that is not there."""
    assert len(Spool(100, Path("/nowhere")).view) == 100


@pytest.mark.skipif(not hasattr(os, "posix_fallocate"), reason="needs posix_fallocate")
def test_a_disk_that_has_no_room_is_said_to_have_none(tmp_path: Path) -> None:
    """Oracle: an error now, and not a signal in the middle of a round."""
    with pytest.raises(StorageError, match="no room for an update"):
        Spool(1 << 50, tmp_path)


def test_more_than_fits_is_a_bug() -> None:
    with pytest.raises(AssertionError):
        Spool(10, None).put(8, b"abc")


def test_a_disk_that_fails_is_said_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: a disk that takes 3 bytes at a time is served on, and the error of the fourth write is ours."""
    monkeypatch.setattr(spool, "MIN_FILE_BYTES", 0)
    room, pwrite = Spool(100, tmp_path), os.pwrite
    written: list[int] = []

    def slow(file: int, data: memoryview, offset: int) -> int:
        if len(written) == 3:
            raise OSError(5, "Input/output error")
        written.append(offset)
        return pwrite(file, data[:3], offset)

    monkeypatch.setattr(os, "pwrite", slow)
    room.put(10, b"abcdef")
    assert bytes(room.view[9:17]) == b"\0abcdef\0"
    with pytest.raises(StorageError, match="cannot be written"):
        room.put(0, b"xyz123")
