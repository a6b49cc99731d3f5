"""The NVMe store: training state in one file, read and written unit by unit, committed as a whole.

Owns: the folder of a store, its locking, which slot of a unit is written when, checksums, commit and revert. Must not
know: torch, what a unit holds, when a step is over (the caller's schedule), what lies under the folder (`volume.py`).

    units.data     every unit's slots, preallocated
    units.table    what the last commit says (`slot_table.py`), replaced as a whole
    writes.json    bytes written, per day and in all (`wear.py`)
    lock           held while the store is open

An optimizer step inside the backward pass changes units one after the other, so a crash leaves some of them a step
ahead. Hence a durable unit has two slots: what the last commit refers to is frozen, and every write goes to the other
one until the next commit. A unit that was not written since stays where it is, so a commit copies nothing. It syncs the
data, then replaces the table: whenever the machine dies, one table is there, and nothing that it refers to was touched.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock
from types import TracebackType
from typing import Self

import xxhash

from peer.memory.disk.direct_io import UnitFile
from peer.memory.disk.durable_files import disk_fault
from peer.memory.disk.slot_table import Json, Slot, SlotTable, UnitSpec, as_record, required_bytes
from peer.memory.disk.store_folder import DATA_FILE, StoreFolder
from peer.memory.disk.turnstile import Turnstile
from peer.memory.disk.volume import Volume, volume_of
from peer.memory.disk.wear import WriteBudget
from peer.memory.pages import padded
from protocol.errors import StorageError

__all__ = ["NvmeStore", "StoreStatistics", "UnitSpec", "required_bytes"]

WRITES_FILE = "writes.json"

_FETCH_AGAIN = "The drive may be failing (look at its SMART data). The state has to be fetched again."
_REVERT = "Go back to the last commit, which is whole."
_OPEN_AGAIN = "Open it again: it holds this version or the last one, whole."

# XXH3, 64 bits: 24 GB/s here, against 2.4 for the fastest sound one of the standard library (CRC-32). Every byte passes
# through it twice per step, and on a CPU peer that time is taken from computing. It misses one torn write in 2^64, and
# no flipped bit. Nobody hostile writes to this file.
_checksum = xxhash.xxh3_64_intdigest


@dataclass(frozen=True, slots=True)
class StoreStatistics:
    """What one process did with a store. Bytes of units count as whole blocks; commits as they were made."""

    bytes_read: int
    bytes_written: int
    commits: int
    written_today_bytes: int
    """Since midnight UTC, by all processes, with what commits themselves write."""
    written_total_bytes: int


@dataclass(slots=True)
class _Unit:
    """`current` is what a read gets, `committed` what the last commit refers to. None: nothing is there."""

    spec: UnitSpec
    first_offset: int
    current: Slot | None
    committed: Slot | None
    lock: Lock = field(default_factory=Lock)  # one transfer at a time per unit

    @property
    def padded_bytes(self) -> int:
        return padded(self.spec.num_bytes)

    def offset(self, slot_number: int) -> int:
        return self.first_offset + slot_number * self.padded_bytes

    def free_slot(self) -> int:
        return 0 if self.committed is None else 1 - self.committed.number


class NvmeStore:
    """All units of one peer's state on one drive. Create it with `NvmeStore.open`.

    Any thread may call anything. Transfers of different units run at once; a commit waits for the writes that are under
    way and holds back new ones. Which version of a unit a read gets that overlaps a write of it, nobody promises.
    """

    def __init__(
        self, folder: StoreFolder, table: SlotTable, file: UnitFile, budget: WriteBudget, *, volume: Volume
    ) -> None:
        """Take over what `open` has prepared; the store closes it."""
        self._folder = folder
        self._table = table
        self._file = file
        self._budget = budget
        self._volume = volume
        self._units = [
            _Unit(spec, offset, current=None, committed=None)
            for spec, offset in zip(folder.units, folder.offsets, strict=True)
        ]
        self._durable = [it for it in self._units if it.spec.durable]
        for it, slot in zip(self._durable, table.slots, strict=True):
            it.current = it.committed = slot
        self._reads = Turnstile()
        self._writes = Turnstile()
        self._counters_lock = Lock()
        self._bytes_read = self._bytes_written = self._commits = 0
        self._unwritten: set[int] = set()  # durable units whose last write failed; a commit would lack them
        self._hole: str | None = None  # why a commit would hold bytes that nobody wrote, whatever is written yet
        self._broken: str | None = None  # why not even this process knows which table a power cut would leave
        self._is_closed = False

    @classmethod
    def open(
        cls,
        path: Path,
        units: Sequence[UnitSpec],
        *,
        fingerprint: str,
        limit_bytes: int | None = None,
        writes_per_day_bytes: int | None = None,
        replace: bool = False,
        books: Path | None = None,
        may_be_direct: bool = True,
        volume: Volume | None = None,
        now_s: Callable[[], float] = time.time,
    ) -> Self:
        """Reopen the store in a folder as its last commit left it, or create it.

        `fingerprint` says whose state it is; what is of another one, of other durable units or damaged is refused, or
        thrown away with `replace`. Scratch units may be others than before: they hold nothing at first. `books` is the
        folder that has the writes of the day, for stores that share a budget. `volume` and `now_s` (since 1970) can be
        given by tests. Raises `ConfigError` for what the user chose wrongly, `StorageError` for what the disk cannot
        do.
        """
        folder = StoreFolder(path, units, fingerprint=fingerprint)
        folder.refuse_oversize(limit_bytes)
        volume = volume_of(path) if volume is None else volume
        volume.refuse_unfit(path)
        with ExitStack() as undo:
            folder.lock()
            undo.callback(folder.unlock)
            table = folder.load(replace=replace) or folder.create()
            file = folder.open_data(may_be_direct=may_be_direct)
            undo.callback(file.close)
            budget = WriteBudget((books or path) / WRITES_FILE, per_day_bytes=writes_per_day_bytes, now_s=now_s)
            store = cls(folder, table, file, budget, volume=volume)
            undo.pop_all()
        return store

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    @property
    def committed(self) -> dict[str, Json] | None:
        """Return the record of the last commit, or None before the first."""
        return self._table.meta

    @property
    def is_direct(self) -> bool:
        """Tell whether the page cache is passed by."""
        return self._file.is_direct

    @property
    def warnings(self) -> tuple[str, ...]:
        """Say what makes this a slow place, in sentences for the user."""
        found = [self._volume.warning] if self._volume.warning else []
        if not self.is_direct:
            found.append("the file system has no direct I/O: transfers cost more CPU time and push out cached files.")
        return tuple(found)

    def read(self, unit: int, into: memoryview) -> None:
        """Read a unit into the first bytes of a buffer that is at least as long; page-aligned ones spare a copy.

        Raises `StorageError`, and then the buffer holds anything, if the bytes are not those that were written.
        """
        it = self._units[unit]
        view = into.cast("B")[: it.spec.num_bytes]
        assert len(view) == it.spec.num_bytes
        with self._reads.together(), it.lock:
            self._refuse_closed()
            if it.current is None:
                raise StorageError(f"{self._named(unit)} holds nothing: not written yet, or its last write failed.")
            try:
                self._file.read(it.offset(it.current.number), view)
            except OSError as error:
                raise disk_fault(f"cannot read {self._named(unit)}", error) from error
            if _checksum(view) != it.current.checksum:
                raise StorageError(f"{self._named(unit)} is damaged: its checksum does not fit.", hint=_FETCH_AGAIN)
        with self._counters_lock:
            self._bytes_read += it.padded_bytes

    def write(self, unit: int, data: memoryview) -> None:
        """Write a unit from the first bytes of a buffer, which must not change meanwhile.

        Raises `WriteBudgetSpent` before anything has happened: wait, then write again. Raises `StorageError` if the
        disk refuses; then a durable unit has to be written once more, or all be given up (`revert`), before a commit.
        """
        it = self._units[unit]
        view = data.cast("B")[: it.spec.num_bytes]
        assert len(view) == it.spec.num_bytes
        with self._writes.together(), it.lock:
            self._refuse_closed()
            self._refuse_broken()
            self._budget.spend(it.padded_bytes)
            try:
                it.current = None
                number, checksum = it.free_slot(), _checksum(view)
                self._file.write(it.offset(number), view)
                it.current = Slot(number, checksum)
                self._unwritten.discard(unit)
            except BaseException as error:
                if it.spec.durable:
                    self._unwritten.add(unit)
                if isinstance(error, OSError):
                    raise disk_fault(f"cannot write {self._named(unit)}", error) from error
                raise
        with self._counters_lock:
            self._bytes_written += it.padded_bytes

    def commit(self, meta: Mapping[str, Json]) -> None:
        """Make what is written now, with `meta`, the version that survives everything.

        When this returns, it is on the disk. If it raises, the last commit still counts; only where the hint is to open
        the store again, nobody knows which of the two. A lack of space for the table can be mended and tried again.
        """
        with self._writes.alone():
            self._refuse_closed()
            self._refuse_broken()
            if self._hole is not None:
                raise StorageError(f"this version cannot be committed: {self._hole}.", hint=_REVERT)
            if self._unwritten:
                name = self._units[min(self._unwritten)].spec.name
                raise StorageError(f"this version cannot be committed: {name} was not written whole.", hint=_REVERT)
            slots = tuple(it.current for it in self._durable)
            table = SlotTable(self._table.commit + 1, slots, as_record(meta))
            encoded = self._folder.encoded(table)
            try:
                self._file.sync()
            except BaseException as error:
                self._hole = "the disk did not keep what was written"  # a second sync would succeed and mean nothing
                if isinstance(error, OSError):
                    raise disk_fault(f"cannot sync {self._folder.path / DATA_FILE}", error) from error
                raise
            self._budget.count(padded(len(encoded)))
            self._budget.save()
            self._replace_table(table, self._folder.write_next(encoded))
            self._commits += 1

    def revert(self) -> None:
        """Forget what was written since the last commit. Scratch units hold nothing after it."""
        with self._writes.alone(), self._reads.alone():
            self._refuse_closed()
            self._refuse_broken()
            self._hole = "going back was cut short"
            for it in self._units:
                it.current = it.committed
            self._unwritten.clear()
            self._hole = None

    def budget_left_bytes(self) -> int | None:
        """Return how much may still be written today, or None without a limit: a caller can pause before a step."""
        return self._budget.left_bytes()

    def require_budget(self, num_bytes: int) -> None:
        """Raise `WriteBudgetSpent` unless so much may still be written today: a pass is begun only if it can end."""
        self._budget.require(num_bytes)

    def statistics(self) -> StoreStatistics:
        with self._counters_lock:
            read, written = self._bytes_read, self._bytes_written
        return StoreStatistics(read, written, self._commits, self._budget.today_bytes, self._budget.total_bytes)

    def close(self) -> None:
        """Let go of the folder. What was not committed is lost. Raises `StorageError` if the count cannot be kept."""
        with self._writes.alone(), self._reads.alone():
            if self._is_closed:
                return
            self._is_closed = True
            try:
                self._budget.save()
            finally:
                self._file.close()
                self._folder.unlock()

    def _replace_table(self, table: SlotTable, temporary: Path) -> None:
        """Publish a table, and from then on leave alone what it refers to."""
        try:
            self._folder.publish(temporary)
            for it, slot in zip(self._durable, table.slots, strict=True):
                it.committed = slot
            self._table = table
        except BaseException as error:
            # Either table may be the one that a power cut leaves, so no slot is free to be written any more.
            self._broken = f"{self._folder.path} is in doubt after a failed commit"
            if isinstance(error, StorageError):
                error.hint = _OPEN_AGAIN
            raise

    def _refuse_closed(self) -> None:
        if self._is_closed:
            raise StorageError(f"the store in {self._folder.path} is closed.")

    def _refuse_broken(self) -> None:
        if self._broken is not None:
            raise StorageError(f"{self._broken}.", hint=_OPEN_AGAIN)

    def _named(self, unit: int) -> str:
        return f"{self._units[unit].spec.name} (unit {unit} of {self._folder.path / DATA_FILE})"
