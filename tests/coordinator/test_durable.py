"""coordinator/durable.py: whole or not at all, and the operating system's refusals in one line."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from coordinator.durable import PART_PREFIX, check_empty, new_directory, write_file
from protocol.errors import ConfigError, StorageError


def test_a_folder_appears_whole_when_the_work_is_done(tmp_path: Path) -> None:
    """Oracle: not there during the work, complete after it, nothing left beside it."""
    final = tmp_path / "new" / "run"
    with new_directory(final, last="manifest") as staging:
        (staging / "manifest").write_text("m")
        assert not final.exists()
    assert [entry.name for entry in final.iterdir()] == ["manifest"]
    assert list(final.parent.iterdir()) == [final]


@pytest.mark.parametrize("existed", [False, True])
def test_a_failure_leaves_nothing_behind(tmp_path: Path, existed: bool) -> None:
    """Oracle: the parent and the target look as before; the error comes through."""
    final = tmp_path / "run"
    if existed:
        final.mkdir()
    with pytest.raises(RuntimeError, match="boom"):
        _fail_in(final)
    assert list(tmp_path.rglob("*")) == ([final] if existed else [])


def test_an_empty_folder_is_filled_and_stays_the_same_folder(tmp_path: Path) -> None:
    """Oracle: the inode; it may be a mount point or the shell's working directory."""
    final = tmp_path / "volume"
    final.mkdir()
    inode = final.stat().st_ino
    renamed: list[str] = []
    plain = Path.rename

    def rename(path: Path, target: Path) -> Path:
        renamed.append(path.name)
        return plain(path, target)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "rename", rename)
        with new_directory(final, last="a manifest") as staging:
            for name in ("a manifest", "b", "z"):
                (staging / name).write_text(name)
    assert final.stat().st_ino == inode
    assert sorted(entry.name for entry in final.iterdir()) == ["a manifest", "b", "z"]
    assert renamed[-1] == "a manifest"


def test_a_folder_with_something_in_it_is_refused(tmp_path: Path) -> None:
    """Oracle: nothing in it is touched."""
    (tmp_path / "thesis.tex").write_text("years")
    with pytest.raises(ConfigError, match="is not empty"), new_directory(tmp_path, last="x"):
        pytest.fail("the body must not run")
    assert [entry.name for entry in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_file_is_not_a_folder(tmp_path: Path) -> None:
    """Oracle: the message says so."""
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="is a file"):
        check_empty(tmp_path / "file")


def test_what_a_killed_attempt_left_is_cleared(tmp_path: Path) -> None:
    """Oracle: a folder that holds nothing but our own unfinished work counts as empty."""
    (tmp_path / f"{PART_PREFIX}abc" / "tokens").mkdir(parents=True)
    with new_directory(tmp_path, last="x") as staging:
        (staging / "x").write_text("")
    assert [entry.name for entry in tmp_path.iterdir()] == ["x"]


def test_a_path_below_a_file_is_a_storage_error(tmp_path: Path) -> None:
    """Oracle: exit code 5, one line, the path in it."""
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError) as caught, new_directory(tmp_path / "file" / "run", last="x"):
        pytest.fail("the body must not run")
    assert caught.value.exit_code == 5
    assert str(tmp_path / "file" / "run") in caught.value.one_line()


def test_a_file_is_replaced_in_one_step(tmp_path: Path) -> None:
    """Oracle: when the new content cannot be written the old one stays, and no part file is left."""
    path = tmp_path / "file"
    write_file(path, b"old")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", _full)
        with pytest.raises(StorageError, match="No space left"):
            write_file(path, b"new")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]
    write_file(path, b"new")
    assert path.read_bytes() == b"new"


def _fail_in(final: Path) -> None:
    with new_directory(final, last="manifest") as staging:
        (staging / "half").write_text("x")
        raise RuntimeError("boom")


def _full(descriptor: int) -> None:
    raise OSError(28, "No space left on device")
