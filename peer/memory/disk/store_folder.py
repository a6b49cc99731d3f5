"""The folder of an NVMe store: its lock, the making of its files, and what an earlier process left there.

Owns: names, permissions and order of these files. Must not know: transfers, when a table is replaced (`store.py`).
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Sequence
from pathlib import Path

import structlog

from peer.memory.disk.direct_io import UnitFile, allocate, resize
from peer.memory.disk.durable_files import (
    FILE_MODE,
    allocated_bytes,
    disk_fault,
    make_folder,
    publish,
    sync_folder,
    write_temporary,
)
from peer.memory.disk.slot_table import (
    SlotTable,
    UnitSpec,
    decode,
    durable_bytes,
    encode,
    layout_digest,
    offsets,
    required_bytes,
)
from protocol.errors import ConfigError, StorageError

log = structlog.get_logger()

DATA_FILE = "units.data"
TABLE_FILE = "units.table"
LOCK_FILE = "lock"

FREE_MARGIN_BYTES = 1 << 29  # what the disk keeps beyond the store: a full one breaks more than training

_FETCH_AGAIN = "Let it be replaced: the state has to be fetched again."


class StoreFolder:
    """Where the state of one fingerprint, cut into these units, lies. `lock` it before anything else."""

    def __init__(self, path: Path, units: Sequence[UnitSpec], *, fingerprint: str) -> None:
        self.path = path
        self.units = tuple(units)
        *self.offsets, self._data_bytes = offsets(units)
        self._fingerprint = fingerprint
        self._durable_bytes = durable_bytes(units)
        self._layout = layout_digest(units)
        self._table_path = path / TABLE_FILE
        self._data_path = path / DATA_FILE
        self._lock: int | None = None

    def refuse_oversize(self, limit_bytes: int | None) -> None:
        """Raise `ConfigError` if the store is larger than the user allows."""
        needed_bytes = required_bytes(self.units)
        if limit_bytes is not None and needed_bytes > limit_bytes:
            raise ConfigError(
                f"what training keeps on the drive takes {_size(needed_bytes)}, and {_size(limit_bytes)} are allowed.",
                hint="Allow more, or take fewer layers.",
            )

    def lock(self) -> None:
        """Make the folder if need be, and keep others out. The kernel frees the lock however the process ends."""
        make_folder(self.path)
        try:
            descriptor = os.open(self.path / LOCK_FILE, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, FILE_MODE)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BaseException:
                os.close(descriptor)
                raise
        except BlockingIOError:
            raise StorageError(
                f"{self.path} is in use by another process.", hint="Stop that one, or give this one its own folder."
            ) from None
        except OSError as error:
            raise disk_fault(f"cannot use {self.path}", error) from error
        self._lock = descriptor

    def unlock(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def load(self, *, replace: bool) -> SlotTable | None:
        """Read the table of an earlier process, and make room for today's scratch behind what the table speaks of.

        None: there is none, or it does not fit and may be replaced. What fits is never given up for lack of space.
        """
        try:
            data = self._table_path.read_bytes()
            # A process killed between rename and sync leaves a table that a power cut may still take back, and that
            # one refers to the slots that are written next. Before the first write, the one in sight has to be final.
            sync_folder(self.path)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise disk_fault(f"cannot read {self._table_path}", error) from error
        try:
            table = decode(data, layout=self._layout, fingerprint=self._fingerprint, where=str(self._table_path))
            found_bytes = self._checked_size()
        except (StorageError, ConfigError) as error:
            if replace:
                log.warning("store.thrown_away", folder=str(self.path), reason=str(error))
                return None
            raise
        if found_bytes != self._data_bytes:
            self._fit_scratch(found_bytes)
        return table

    def create(self) -> SlotTable:
        """Make an empty store in place of whatever is there. The table comes last: without one, there is none."""
        try:
            self._refuse_full()
            self._table_path.unlink(missing_ok=True)
            sync_folder(self.path)
            self._data_path.unlink(missing_ok=True)
            try:
                allocate(self._data_path, self._data_bytes)
            except BaseException:
                self._data_path.unlink(missing_ok=True)  # not half of it on a disk that is full
                raise
        except OSError as error:
            raise disk_fault(f"cannot make {self._data_path}", error) from error
        table = SlotTable(commit=0, slots=(None,) * sum(unit.durable for unit in self.units), meta=None)
        self.publish(self.write_next(self.encoded(table)))
        return table

    def open_data(self, *, may_be_direct: bool) -> UnitFile:
        largest_bytes = max(unit.num_bytes for unit in self.units)
        try:
            return UnitFile(self._data_path, may_be_direct=may_be_direct, largest_bytes=largest_bytes)
        except OSError as error:
            raise disk_fault(f"cannot open {self._data_path}", error) from error

    def encoded(self, table: SlotTable) -> bytes:
        return encode(table, layout=self._layout, fingerprint=self._fingerprint)

    def write_next(self, encoded: bytes) -> Path:
        """Write a table beside the one that counts, for `publish`."""
        return write_temporary(self._table_path, encoded)

    def publish(self, temporary: Path) -> None:
        publish(temporary, self._table_path)

    def _checked_size(self) -> int:
        found_bytes = self._data_path.stat().st_size if self._data_path.is_file() else 0
        if found_bytes < self._durable_bytes:
            raise StorageError(
                f"{self._data_path} is damaged: it has {found_bytes} bytes and should have {self._durable_bytes}.",
                hint=_FETCH_AGAIN,
            )
        return found_bytes

    def _fit_scratch(self, found_bytes: int) -> None:
        try:
            if found_bytes < self._data_bytes:
                self._refuse_full()
            resize(self._data_path, self._data_bytes)
        except OSError as error:
            raise disk_fault(f"cannot change the size of {self._data_path}", error) from error

    def _refuse_full(self) -> None:
        """Raise `StorageError` if the store does not fit, what is there of it already included."""
        found = os.statvfs(self.path)
        needed_bytes = required_bytes(self.units)
        free_bytes = found.f_bavail * found.f_frsize + allocated_bytes(self.path)
        missing_bytes = needed_bytes + FREE_MARGIN_BYTES - free_bytes
        if missing_bytes > 0:
            raise StorageError(
                f"{self.path} lacks {_size(missing_bytes)} of free space: what training keeps there takes "
                f"{_size(needed_bytes)}, and {_size(FREE_MARGIN_BYTES)} have to stay free.",
                hint="Free some disk space there, or choose another folder.",
            )


def _size(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:,.1f} GB" if num_bytes >= 10**9 else f"{num_bytes / 1e6:,.1f} MB"
