"""Whenever the machine or the process dies, the store holds one version, whole, and none that was lost after a commit.

Oracle: `stored_versions.content`, by which a version's number gives every byte. The disk that forgets is
`fragile_disk.py`; the last test kills a real process on the real one.
"""

from __future__ import annotations

import random
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest

from peer.memory.disk.store import NvmeStore
from peer.memory.disk.store_folder import DATA_FILE
from tests.peer.memory.disk.fragile_disk import Cut, FragileDisk
from tests.peer.memory.disk.stored_versions import (
    DURABLE,
    KILLED_FACTOR,
    SCRATCH,
    UNITS,
    content,
    open_store,
    versions_held,
    write_version,
)

ROOT = Path(__file__).parents[4]

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the disk that forgets finds files by /proc/self/fd")


class Life:
    """One process's work on a store, from creation: three versions with a revert among them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.begun = self.done = 0
        self.store: NvmeStore | None = None

    def live(self) -> None:
        self.store = open_store(self.folder, may_be_direct=False)
        for version in (1, 2, 3):
            self.store.write(SCRATCH, memoryview(bytes(100)))
            write_version(self.store, version)
            if version == 2:
                self.store.revert()
                write_version(self.store, version)
            self.begun = version
            self.store.commit({"version": version})
            self.done = version

    def end(self) -> None:
        if self.store is not None:
            self.store.close()


def cut_at(call: int, tmp_path: Path, *, seed: int, is_killed_first: bool) -> tuple[set[int], int] | None:
    """Live until a call, cut the power, and return which versions may be there and which one is; None past the end."""
    life = Life(tmp_path / "store")
    open_store(life.folder).close()
    with pytest.MonkeyPatch.context() as patch:
        disk = FragileDisk(life.folder, patch, data_file=DATA_FILE, seed=seed)
        disk.calls_left = call
        try:
            life.live()
            return None
        except Cut:
            pass
        finally:
            if not is_killed_first:
                disk.survive(tmp_path / "survived")
            disk.is_watching = False
            life.end()
        if is_killed_first:  # only the process died; the next one writes on, and then the power goes
            disk.is_watching, disk.calls_left = True, None
            with open_store(life.folder, may_be_direct=False) as store:
                assert versions_held(store) in {life.done, life.begun}
                for unit in DURABLE:
                    store.write(unit, memoryview(bytes(UNITS[unit].num_bytes)))
                disk.survive(tmp_path / "survived")
        with open_store(tmp_path / "survived") as store:
            return {life.done, life.begun}, versions_held(store)


@pytest.mark.slow
@pytest.mark.parametrize("is_killed_first", [False, True], ids=["power cut", "killed, then power cut"])
def test_every_moment_to_die_leaves_one_whole_version(tmp_path: Path, is_killed_first: bool) -> None:
    """Every call that changes the disk is once the last one."""
    call, seen = 0, set()
    while True:
        folder = tmp_path / str(call)
        folder.mkdir()
        outcome = cut_at(call, folder, seed=call, is_killed_first=is_killed_first)
        if outcome is None:
            break
        allowed, held = outcome
        assert held in allowed, call
        seen.add(held)
        call += 1
    assert seen == {0, 1, 2, 3}
    assert call > 50


@pytest.mark.parametrize("call", [3, 20, 35])
def test_some_moments_to_die(tmp_path: Path, call: int) -> None:
    """The same, in short: among the writes of the first version, and in the middle of two commits."""
    outcome = cut_at(call, tmp_path, seed=call, is_killed_first=False)
    assert outcome is not None
    assert outcome[1] in outcome[0]


@pytest.mark.slow
def test_a_killed_process_leaves_one_whole_version(tmp_path: Path) -> None:
    """Oracle besides the bytes: a version that the process had said to be committed is not lost."""
    folder, chance, seen = tmp_path / "store", random.Random(5), [0]
    for _ in range(5):
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.peer.memory.disk.stored_versions", str(folder)],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert process.stdout is not None
        try:
            assert int(process.stdout.readline()) == seen[-1]
            with suppress(subprocess.TimeoutExpired):
                process.wait(timeout=chance.uniform(0.02, 0.25))
        finally:
            process.send_signal(signal.SIGKILL)
            said, _ = process.communicate()
        assert process.returncode == -signal.SIGKILL
        with open_store(folder, factor=KILLED_FACTOR) as store:
            seen.append(versions_held(store, factor=KILLED_FACTOR))
        last_said = int(said.split()[-1]) if said.split() else seen[-2]
        assert last_said <= seen[-1] <= last_said + 1
    assert seen[-1] > 5


def test_a_version_skips_units() -> None:
    """Of the yardstick itself: a version changes some units and not all, or a mix could go unseen."""
    changed = [[content(unit, version) != content(unit, version - 1) for unit in DURABLE] for version in range(2, 6)]
    assert all(any(units) and not all(units) for units in changed)
