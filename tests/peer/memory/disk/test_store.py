"""The store gives back what was written or says why not, and goes back to its last commit as a whole.

Oracles: a dictionary as the model of a store; the bytes written; damage done to the files by hand; refusals of the real
kernel where it can be made to refuse, of a stand-in for its call otherwise. For dying see `test_store_crash.py`.
"""

from __future__ import annotations

import errno
import os
import resource
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from threading import Event, Thread
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from peer.memory.disk.direct_io import aligned_buffer
from peer.memory.disk.store import NvmeStore
from peer.memory.disk.store_folder import DATA_FILE
from peer.memory.disk.wear import DAY_S, WriteBudgetSpent
from protocol.errors import StorageError
from tests.peer.memory.disk.small_store import (
    GRADIENT,
    MOMENTS,
    UNITS,
    WEIGHTS,
    cut_off,
    data_of,
    get,
    open_store,
    put,
    refusing,
)

PATIENCE_S = 5.0


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "offload" / "store"


@pytest.fixture
def store(folder: Path) -> Iterator[NvmeStore]:
    with open_store(folder) as opened:
        yield opened


# -- what comes back ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("may_be_direct", [True, False], ids=["direct", "buffered"])
def test_units_come_back_also_after_a_restart(folder: Path, may_be_direct: bool) -> None:
    with open_store(folder, may_be_direct=may_be_direct) as store:
        if may_be_direct and not store.is_direct:
            pytest.skip("the file system of pytest's folder has no direct I/O")
        for unit in range(len(UNITS)):
            put(store, unit, 1)
        assert [get(store, unit) for unit in range(3)] == [data_of(unit, 1) for unit in range(3)]
        store.commit({"step": 1, "seeds": [3, 4]})
    with open_store(folder, may_be_direct=may_be_direct) as store:
        assert store.committed == {"step": 1, "seeds": [3, 4]}
        assert [get(store, unit) for unit in (WEIGHTS, MOMENTS)] == [data_of(unit, 1) for unit in (WEIGHTS, MOMENTS)]


def test_larger_buffers_keep_what_is_behind_the_unit(store: NvmeStore) -> None:
    buffer = memoryview(aligned_buffer(UNITS[MOMENTS].num_bytes))
    buffer[:] = b"\x07" * len(buffer)
    store.write(MOMENTS, buffer)
    buffer[:] = b"\x09" * len(buffer)
    store.read(MOMENTS, buffer)
    assert buffer == b"\x07" * 5000 + b"\x09" * 3192


def test_what_was_not_written_cannot_be_read(store: NvmeStore, folder: Path) -> None:
    with pytest.raises(StorageError, match=r"moments \(unit 1 of .*units.data\) holds nothing"):
        get(store, MOMENTS)
    put(store, GRADIENT, 1)
    store.commit({})
    store.close()
    with open_store(folder) as store, pytest.raises(StorageError, match=r"gradient .* holds nothing"):
        get(store, GRADIENT)


def test_revert_goes_back_to_the_commit(store: NvmeStore) -> None:
    put(store, WEIGHTS, 1)
    store.commit({"step": 1})
    for unit in range(3):
        put(store, unit, 2)
    assert get(store, WEIGHTS) == data_of(WEIGHTS, 2)
    store.revert()
    assert get(store, WEIGHTS) == data_of(WEIGHTS, 1)
    assert store.committed == {"step": 1}
    for unit in (MOMENTS, GRADIENT):
        with pytest.raises(StorageError, match="holds nothing"):
            get(store, unit)


def test_a_record_is_the_same_before_and_after_a_restart(store: NvmeStore, folder: Path) -> None:
    meta: Any = {"pair": (1, 2), "none": None}
    store.commit(meta)
    before = store.committed
    store.close()
    with open_store(folder) as store:
        assert store.committed == before == {"pair": [1, 2], "none": None}


ACTIONS = st.lists(
    st.one_of(
        st.tuples(st.just("write"), st.integers(0, 2), st.integers(0, 50)),
        st.sampled_from([("commit",), ("commit",), ("revert",), ("reopen",), ("crash",)]),
    ),
    max_size=25,
)


@settings(max_examples=20)
@given(actions=ACTIONS, may_be_direct=st.booleans())
def test_it_behaves_like_a_dictionary(actions: list[tuple[Any, ...]], may_be_direct: bool) -> None:
    """Oracle: two dictionaries, one of the last commit. A crash is the folder, copied while the store is open."""
    with tempfile.TemporaryDirectory() as name, pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda _: None)  # they cost most of the time, and no power is cut here
        patch.setattr(os, "fdatasync", lambda _: None)
        folder = Path(name, "0")
        store = open_store(folder, may_be_direct=may_be_direct)
        current: dict[int, bytes] = {}
        committed: dict[int, bytes] = {}
        meta: dict[str, Any] | None = None
        for number, action in enumerate(actions):
            match action:
                case ("write", unit, seed):
                    put(store, unit, seed)
                    current[unit] = data_of(unit, seed)
                case ("commit",):
                    meta = {"action": number}
                    store.commit(meta)
                    committed = {unit: data for unit, data in current.items() if UNITS[unit].durable}
                case ("revert",):
                    store.revert()
                    current = dict(committed)
                case (way,):
                    if way == "crash":
                        shutil.copytree(folder, folder := Path(name, str(number + 1)))
                    store.close()
                    store = open_store(folder, may_be_direct=may_be_direct)
                    current = dict(committed)
            assert store.committed == meta
            for unit in range(3):
                if unit in current:
                    assert get(store, unit) == current[unit]
                else:
                    with pytest.raises(StorageError, match="holds nothing"):
                        get(store, unit)
        store.close()


def test_threads_read_and_write_while_commits_are_made(store: NvmeStore) -> None:
    """Each thread has units of its own, as a schedule gives them out; oracle: what it wrote last."""
    problems: list[BaseException] = []

    def work(unit: int) -> None:
        try:
            for seed in range(40):
                put(store, unit, seed)
                assert get(store, unit) == data_of(unit, seed)
        except BaseException as error:  # noqa: BLE001  a thread's failure is raised below
            problems.append(error)

    threads = [Thread(target=work, args=(unit,)) for unit in range(3)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        store.commit({})
    for thread in threads:
        thread.join()
    assert not problems
    assert [get(store, unit) for unit in range(3)] == [data_of(unit, 39) for unit in range(3)]


def test_a_commit_waits_for_the_write_under_way(
    store: NvmeStore, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It must hold the unit as it was before or after, not none at all."""
    is_writing, may_go_on = Event(), Event()
    pwritev = os.pwritev

    def slow(descriptor: int, buffers: list[memoryview], offset: int) -> int:
        is_writing.set()
        assert may_go_on.wait(PATIENCE_S)
        return pwritev(descriptor, buffers, offset)

    monkeypatch.setattr(os, "pwritev", slow)
    writer = Thread(target=put, args=(store, WEIGHTS, 1))
    committer = Thread(target=store.commit, args=({},))
    writer.start()
    assert is_writing.wait(PATIENCE_S)
    committer.start()
    while committer.is_alive() and not store._writes._is_taken:
        pass
    may_go_on.set()
    for thread in (writer, committer):
        thread.join(PATIENCE_S)
    store.close()
    with open_store(folder) as store:
        assert get(store, WEIGHTS) == data_of(WEIGHTS, 1)


def test_commits_copy_nothing(store: NvmeStore) -> None:
    """Oracle: whole blocks by hand."""
    put(store, WEIGHTS, 1)
    put(store, MOMENTS, 1)
    store.commit({})
    put(store, MOMENTS, 2)
    store.commit({})
    get(store, WEIGHTS)
    found = store.statistics()
    assert (found.bytes_written, found.bytes_read, found.commits) == (3 * 8192, 8192, 2)
    assert 3 * 8192 < found.written_today_bytes == found.written_total_bytes <= 3 * 8192 + 2 * 4096


def test_a_closed_store_refuses(store: NvmeStore) -> None:
    store.close()
    store.close()
    attempts: list[Callable[[], object]] = [
        lambda: put(store, WEIGHTS, 1),
        lambda: get(store, WEIGHTS),
        lambda: store.commit({}),
        store.revert,
    ]
    for attempt in attempts:
        with pytest.raises(StorageError, match="is closed"):
            attempt()


# -- damage -------------------------------------------------------------------------------------------------


def test_a_flipped_bit_in_any_slot_is_found_when_it_counts(folder: Path) -> None:
    """Weights are in slot 1 after two commits, moments still in slot 0; the other slots are nobody's bytes."""
    with open_store(folder) as store:
        put(store, WEIGHTS, 1)
        put(store, MOMENTS, 1)
        store.commit({})
        put(store, WEIGHTS, 2)
        store.commit({})
    slot_of = {(WEIGHTS, 0): 0, (WEIGHTS, 1): 8192, (MOMENTS, 0): 16384, (MOMENTS, 1): 24576}
    for (unit, slot), offset in slot_of.items():
        for at in (0, UNITS[unit].num_bytes - 1):
            flip(folder / DATA_FILE, offset + at)
            with open_store(folder) as store:
                if (unit, slot) in {(WEIGHTS, 1), (MOMENTS, 0)}:
                    with pytest.raises(StorageError, match=rf"{UNITS[unit].name} .*units.data\) is damaged") as found:
                        get(store, unit)
                    assert "fetched again" in found.value.one_line()
                else:
                    assert get(store, unit) == data_of(unit, 2 - unit)
            flip(folder / DATA_FILE, offset + at)


def flip(path: Path, offset: int) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 1 << offset % 8]))


def test_a_file_cut_off_under_an_open_store_is_an_error(store: NvmeStore, folder: Path) -> None:
    put(store, MOMENTS, 1)
    cut_off(folder / DATA_FILE)
    with pytest.raises(StorageError, match=r"cannot read moments .*: the transfer ended too early"):
        get(store, MOMENTS)


# -- what the disk refuses ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("code", "hint"), [(errno.ENOSPC, "Free some"), (errno.EIO, "SMART")])
def test_a_failed_write_can_be_reverted(
    store: NvmeStore, folder: Path, monkeypatch: pytest.MonkeyPatch, code: int, hint: str
) -> None:
    put(store, WEIGHTS, 1)
    store.commit({"step": 1})
    put(store, MOMENTS, 2)
    with monkeypatch.context() as patch:
        patch.setattr(os, "pwritev", refusing(code))
        with pytest.raises(StorageError, match=r"cannot write weights .*units.data") as refusal:
            put(store, WEIGHTS, 2)
    assert hint in refusal.value.hint
    with pytest.raises(StorageError, match=r"weights .* holds nothing"):
        get(store, WEIGHTS)
    put(store, MOMENTS, 3)  # goes, and heals nothing
    with pytest.raises(StorageError, match="cannot be committed: weights was not written whole") as refusal:
        store.commit({"step": 2})
    assert refusal.value.hint == "Go back to the last commit, which is whole."
    store.revert()
    assert get(store, WEIGHTS) == data_of(WEIGHTS, 1)
    put(store, WEIGHTS, 4)
    store.commit({"step": 2})
    store.close()
    with open_store(folder) as store:
        assert (store.committed, get(store, WEIGHTS)) == ({"step": 2}, data_of(WEIGHTS, 4))


def test_a_failed_write_is_made_good_by_the_next_one(
    store: NvmeStore, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of two units that failed, each has to be written again. Oracle: the bytes after a restart."""
    put(store, WEIGHTS, 1)
    store.commit({"step": 1})
    with monkeypatch.context() as patch:
        patch.setattr(os, "pwritev", refusing(errno.EIO))
        for unit in (WEIGHTS, MOMENTS):
            with pytest.raises(StorageError, match="cannot write"):
                put(store, unit, 2)
    put(store, WEIGHTS, 3)
    with pytest.raises(StorageError, match="cannot be committed: moments was not written whole"):
        store.commit({"step": 2})
    put(store, MOMENTS, 3)
    store.commit({"step": 2})
    store.close()
    with open_store(folder) as store:
        assert store.committed == {"step": 2}
        assert [get(store, unit) for unit in (WEIGHTS, MOMENTS)] == [data_of(unit, 3) for unit in (WEIGHTS, MOMENTS)]


def test_scratch_that_could_not_be_written_costs_no_commit(store: NvmeStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """No commit holds it. Oracle: the record."""
    put(store, WEIGHTS, 1)
    with monkeypatch.context() as patch:
        patch.setattr(os, "pwritev", refusing(errno.EIO))
        with pytest.raises(StorageError, match="cannot write gradient"):
            put(store, GRADIENT, 1)
    store.commit({"step": 1})
    assert store.committed == {"step": 1}
    with pytest.raises(StorageError, match=r"gradient .* holds nothing"):
        get(store, GRADIENT)


@pytest.mark.skipif(sys.platform != "linux", reason="how the limit shows differs")
def test_the_kernels_own_refusal_leaves_the_commit(store: NvmeStore) -> None:
    """A limit on file sizes stands in for a full disk: the kernel itself refuses the write."""
    put(store, WEIGHTS, 1)
    store.commit({"step": 1})
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8192, hard))  # in the middle of the file
    try:
        with pytest.raises(StorageError, match="cannot write weights") as refusal:
            put(store, WEIGHTS, 2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "ulimit -f" in refusal.value.hint
    store.revert()
    assert get(store, WEIGHTS) == data_of(WEIGHTS, 1)


def test_a_sync_that_fails_is_not_asked_twice(store: NvmeStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel reports lost pages once; the next sync would succeed without them."""
    put(store, WEIGHTS, 1)
    with monkeypatch.context() as patch:
        patch.setattr(os, "fdatasync", refusing(errno.EIO))
        with pytest.raises(StorageError, match="cannot sync"):
            store.commit({})
    with pytest.raises(StorageError, match="the disk did not keep what was written"):
        store.commit({})
    store.revert()
    store.commit({"step": 1})
    assert store.committed == {"step": 1}


def test_a_full_disk_at_a_commit_can_be_tried_again(
    store: NvmeStore, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(store, WEIGHTS, 1)
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", refusing(errno.ENOSPC))
        with pytest.raises(StorageError, match=r"cannot write .*: No space left"):
            store.commit({"step": 1})
    assert store.committed is None
    assert not list(folder.glob("*.new"))
    store.commit({"step": 1})
    assert store.committed == {"step": 1}


@pytest.mark.parametrize("call", ["replace", "fsync"])
def test_a_commit_in_doubt_stops_all_writing(
    store: NvmeStore, folder: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    """If the table's renaming may or may not last, the slots of both tables have to stay as they are."""
    put(store, WEIGHTS, 1)
    store.commit({"step": 1})
    put(store, WEIGHTS, 2)
    real: Callable[..., Any] = getattr(os, call)
    num_calls = 0

    def late(*arguments: Any) -> Any:
        nonlocal num_calls
        num_calls += 1
        if num_calls == {"replace": 2, "fsync": 4}[call]:  # after those for the count of writes: file, folder, file
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return real(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(os, call, late)
        with pytest.raises(StorageError, match=r"cannot replace .*units.table") as refusal:
            store.commit({"step": 2})
    assert "Open it again" in refusal.value.hint
    attempts: list[Callable[[], None]] = [
        lambda: put(store, WEIGHTS, 3),
        lambda: store.commit({"step": 2}),
        store.revert,
    ]
    for attempt in attempts:
        with pytest.raises(StorageError, match="in doubt") as refusal:
            attempt()
        assert refusal.value.hint == "Open it again: it holds this version or the last one, whole."
    store.close()
    step = {"replace": 1, "fsync": 2}[call]
    with open_store(folder) as store:
        assert (store.committed, get(store, WEIGHTS)) == ({"step": step}, data_of(WEIGHTS, step))


# -- wear ---------------------------------------------------------------------------------------------------


def test_a_spent_budget_pauses_in_the_middle_of_a_step(folder: Path) -> None:
    """Refused, then the next day the same write: nothing is lost, nothing has to be reverted."""
    now_s = 1000.0 * DAY_S
    options: dict[str, Any] = {"writes_per_day_bytes": 16384, "now_s": lambda: now_s}
    with open_store(folder, **options) as store:
        put(store, WEIGHTS, 1)
        put(store, MOMENTS, 1)
        assert store.budget_left_bytes() == 0
        with pytest.raises(WriteBudgetSpent) as refusal:
            put(store, WEIGHTS, 2)
        assert refusal.value.resumes_in_s == DAY_S
        assert get(store, WEIGHTS) == data_of(WEIGHTS, 1)
        store.commit({"step": 1})
    with open_store(folder, **options) as store:
        with pytest.raises(WriteBudgetSpent):
            put(store, WEIGHTS, 2)
        now_s += DAY_S
        put(store, WEIGHTS, 2)
        store.commit({"step": 2})
        assert get(store, WEIGHTS) == data_of(WEIGHTS, 2)
        assert 0 < (store.budget_left_bytes() or 0) < 8192
