"""What is in a folder is opened, refused or replaced; one process at a time; no more space than was said.

Oracles: files made or damaged by hand; the blocks that the file system has given away; a second process.
"""

from __future__ import annotations

import errno
import os
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from structlog.testing import capture_logs

from peer.memory.disk import store_folder
from peer.memory.disk.slot_table import FORMAT, MAGIC
from peer.memory.disk.store import WRITES_FILE, NvmeStore, UnitSpec, required_bytes
from peer.memory.disk.store_folder import DATA_FILE, LOCK_FILE, TABLE_FILE
from peer.memory.disk.volume import Volume
from protocol.errors import ConfigError, StorageError
from tests.peer.memory.disk.small_store import MOMENTS, UNITS, WEIGHTS, cut_off, data_of, get, open_store, put, refusing


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "offload" / "store"


@pytest.fixture
def store(folder: Path) -> Iterator[NvmeStore]:
    with open_store(folder) as opened:
        yield opened


@pytest.mark.parametrize(
    ("options", "difference"),
    [
        ({"fingerprint": "b"}, "of another run or model"),
        ({"units": UNITS[1:]}, "cut into other units"),
        ({"units": (UnitSpec("weights", 8191), *UNITS[1:])}, "cut into other units"),
        ({"units": (*UNITS[:2], UnitSpec("gradient", 300))}, "cut into other units"),
    ],
)
def test_state_of_something_else_is_refused_or_replaced(folder: Path, options: dict[str, Any], difference: str) -> None:
    with open_store(folder) as store:
        store.commit({"step": 1})
    with pytest.raises(ConfigError, match=rf"units.table belongs to training state {difference}") as refusal:
        open_store(folder, **options)
    assert "a folder of its own" in refusal.value.hint
    with open_store(folder, replace=True) as store:
        assert store.committed == {"step": 1}  # what fits is not thrown away
    with open_store(folder, replace=True, **options) as store:
        assert store.committed is None


SCRATCH = {
    "none": UNITS[:2],
    "less": (*UNITS[:2], UnitSpec("gradient", 300, durable=False)),
    "more, and among the others": (
        UnitSpec("activation", 100_000, durable=False),
        UNITS[WEIGHTS],
        UnitSpec("gradient", 5000, durable=False),
        UNITS[MOMENTS],
    ),
}


@pytest.mark.parametrize("units", SCRATCH.values(), ids=SCRATCH.keys())
def test_other_scratch_leaves_the_state_where_it_is(folder: Path, units: tuple[UnitSpec, ...]) -> None:
    """Oracles: the bytes and the record of the last commit, before, with and after the other scratch; the file's size,
    summed by hand; the blocks that the file system has given away."""
    with open_store(folder) as store:
        put(store, WEIGHTS, 1)
        put(store, MOMENTS, 1)
        store.commit({"step": 1})
        put(store, WEIGHTS, 2)
        store.commit({"step": 2})
    with open_store(folder, units=units, replace=True) as store:
        assert store.committed == {"step": 2}
        data = (folder / DATA_FILE).stat()
        assert data.st_size == 32768 + sum(-(-unit.num_bytes // 4096) * 4096 for unit in units if not unit.durable)
        assert data.st_blocks * 512 >= data.st_size
        for number, unit in enumerate(units):
            if not unit.durable:
                with pytest.raises(StorageError, match="holds nothing"):
                    store.read(number, memoryview(bytearray(unit.num_bytes)))
                store.write(number, memoryview(b"s" * unit.num_bytes))
        read = bytearray(5000)
        store.read(units.index(UNITS[MOMENTS]), memoryview(read))
        assert bytes(read) == data_of(MOMENTS, 1)
        store.write(units.index(UNITS[MOMENTS]), memoryview(data_of(MOMENTS, 3)))
        store.commit({"step": 3})
    with open_store(folder) as store:
        assert store.committed == {"step": 3}
        assert (get(store, WEIGHTS), get(store, MOMENTS)) == (data_of(WEIGHTS, 2), data_of(MOMENTS, 3))


def test_state_that_is_thrown_away_is_spoken_of(folder: Path) -> None:
    """Oracle: the log, with the folder and the reason; nothing is said where nothing is lost."""
    with capture_logs() as logs:
        open_store(folder, replace=True).close()
        open_store(folder, replace=True, units=UNITS[:2]).close()
        assert not logs
        open_store(folder, replace=True, fingerprint="b").close()
    (line,) = logs
    assert (line["log_level"], line["event"], line["folder"]) == ("warning", "store.thrown_away", str(folder))
    assert "of another run or model" in line["reason"]


def test_there_is_room_for_what_our_own_files_give_up(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk on which nothing is free but what this store has taken. Oracle: it opens, and opens as another's."""
    with open_store(folder) as store:
        store.commit({"step": 1})
    found = os.statvfs(folder)
    own_bytes = sum(path.stat().st_blocks * 512 for path in folder.iterdir())
    missing_bytes = required_bytes(UNITS) - own_bytes
    monkeypatch.setattr(store_folder, "FREE_MARGIN_BYTES", 0)
    monkeypatch.setattr(os, "statvfs", lambda _: Full(-(-missing_bytes // found.f_frsize), found.f_frsize))
    with open_store(folder, replace=True) as store:
        assert store.committed == {"step": 1}
    with open_store(folder, replace=True, fingerprint="b") as store:
        assert store.committed is None


class Full(NamedTuple):
    """A file system that has only these blocks."""

    f_bavail: int
    f_frsize: int


@pytest.mark.parametrize("options", [{"fingerprint": "b"}, {}])
def test_nothing_is_thrown_away_for_what_has_no_room(
    folder: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    """Another's state, or only more scratch, that the full disk cannot take. Oracle: the state of before, whole."""
    with open_store(folder) as store:
        put(store, WEIGHTS, 1)
        store.commit({"step": 1})
    more = (*UNITS, UnitSpec("activation", 10**6, durable=False))
    with monkeypatch.context() as patch:
        patch.setattr(os, "statvfs", lambda _: Full(0, 4096))
        with pytest.raises(StorageError, match=r"lacks .* of free space"):
            open_store(folder, replace=True, units=more, **options)
    with monkeypatch.context() as patch:
        patch.setattr(os, "posix_fallocate", refusing(errno.ENOSPC))
        with pytest.raises(StorageError, match=r"cannot change the size of .*units.data: No space left"):
            open_store(folder, replace=True, units=more)
    with open_store(folder) as store:
        assert (store.committed, get(store, WEIGHTS)) == ({"step": 1}, data_of(WEIGHTS, 1))


def test_a_folder_has_one_user(store: NvmeStore, folder: Path) -> None:
    with pytest.raises(StorageError, match=r"store is in use by another process") as refusal:
        open_store(folder, replace=True)
    assert "its own folder" in refusal.value.hint
    store.close()
    open_store(folder).close()


@pytest.mark.slow
def test_a_folder_has_one_process(store: NvmeStore, folder: Path) -> None:
    """Oracle: a second process, and the lock of one that has died."""
    program = f"""
from pathlib import Path
from tests.peer.memory.disk.small_store import open_store
open_store(Path({str(folder)!r}))
print("open", flush=True)  # what is not flushed dies with it
__import__("os")._exit(0)
"""
    command = [sys.executable, "-c", program]
    root = Path(__file__).parents[4]
    refused = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    assert "in use by another process" in refused.stderr
    store.close()
    died = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True)
    assert died.stdout == "open\n"
    open_store(folder).close()


def test_only_the_owner_can_look(store: NvmeStore, folder: Path) -> None:
    store.commit({})
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in (folder, *folder.iterdir())}
    assert modes == {"store": 0o700, **dict.fromkeys((DATA_FILE, TABLE_FILE, WRITES_FILE, LOCK_FILE), 0o600)}


def test_a_store_that_is_too_large_is_not_made(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"takes 1.1 MB, and 1.0 MB are allowed"):
        open_store(folder, limit_bytes=10**6)
    assert not folder.exists()
    open_store(folder, limit_bytes=required_bytes(UNITS)).close()


def test_the_planners_figure_holds(folder: Path) -> None:
    """Oracle: the blocks that the file system has given to all files, also to the table that is not yet published."""
    units = [UnitSpec(f"unit {number}", 4000) for number in range(500)]
    with open_store(folder, units=units) as store:
        for unit in range(500):
            store.write(unit, memoryview(bytes(4000)))
        store.commit({"x": "y" * 1000})
    taken = sum(path.stat().st_blocks * 512 for path in folder.iterdir())
    table = (folder / TABLE_FILE).stat().st_blocks * 512
    assert taken + table <= required_bytes(units) <= taken + (1 << 20)


def test_a_lack_of_space_is_said_in_figures(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = os.statvfs(folder.parents[1])
    monkeypatch.setattr(store_folder, "FREE_MARGIN_BYTES", found.f_bavail * found.f_frsize + 10**12)
    with pytest.raises(StorageError, match=r"lacks 1,000.0 GB of free space: what training keeps there takes 1.1 MB"):
        open_store(folder)
    assert not (folder / DATA_FILE).exists()


def test_a_disk_that_fills_up_on_the_way_keeps_no_half(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(os, "posix_fallocate", refusing(errno.ENOSPC))
        with pytest.raises(StorageError, match=r"cannot make .*units.data: No space left") as refusal:
            open_store(folder)
    assert "Free some disk space" in refusal.value.hint
    assert not (folder / DATA_FILE).exists()
    open_store(folder).close()


def test_a_folder_that_cannot_be_written_is_said(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder.parent.write_text("a file in the way")
    with pytest.raises(StorageError, match=r"cannot make the folder .*: File exists") as refusal:
        open_store(folder.parent)
    assert "may write to" in refusal.value.hint
    with pytest.raises(StorageError, match=r"cannot make the folder .*: File exists"):
        open_store(folder)
    folder.parent.unlink()
    folder.mkdir(parents=True)
    monkeypatch.setattr(os, "open", refusing(errno.EROFS))  # tests may run as root, who can write everywhere
    with pytest.raises(StorageError, match=r"cannot use .*: Read-only file system"):
        open_store(folder)


def test_unfit_file_systems_are_refused_and_slow_ones_named(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"kept in memory \(tmpfs\)"):
        open_store(folder, volume=Volume("tmpfs"))
    assert not folder.exists()
    with open_store(folder, volume=Volume("ext4", is_rotational=True), may_be_direct=False) as store:
        assert ["hard disk" in store.warnings[0], "no direct I/O" in store.warnings[1]] == [True, True]


def test_a_damaged_table_is_refused_or_replaced(folder: Path) -> None:
    with open_store(folder) as store:
        store.commit({"step": 1})
    cut_off(folder / TABLE_FILE)
    with pytest.raises(StorageError, match=r"store/units.table is damaged") as refusal:
        open_store(folder)
    assert refusal.value.hint == "Let it be replaced: the state has to be fetched again."
    with open_store(folder, replace=True) as store:
        assert store.committed is None


def test_a_newer_format_is_refused(folder: Path) -> None:
    open_store(folder).close()
    path = folder / TABLE_FILE
    path.write_bytes(path.read_bytes().replace(f"{MAGIC} {FORMAT}".encode(), f"{MAGIC} {FORMAT + 1}".encode(), 1))
    with pytest.raises(StorageError, match="has format 2, this version of Handcar reads 1") as refusal:
        open_store(folder)
    assert "newer version" in refusal.value.hint


@pytest.mark.parametrize("damage", [cut_off, Path.unlink])
def test_a_data_file_that_is_not_whole_is_refused_or_replaced(folder: Path, damage: Callable[[Path], None]) -> None:
    open_store(folder).close()
    damage(folder / DATA_FILE)
    with pytest.raises(StorageError, match=r"units.data is damaged: it has \d+ bytes and should have 32768"):
        open_store(folder)
    with open_store(folder, replace=True) as store:
        put(store, WEIGHTS, 1)
        assert get(store, WEIGHTS) == data_of(WEIGHTS, 1)
