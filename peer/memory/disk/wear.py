"""How much was written to a drive, per day and in all, and the point at which a day's writing has to stop.

Owns: the count, its file, the day's budget. Must not know: what is written. `store.py` asks before each write.

A drive at home is rated for some 600 TB written per TB of size (160-330 GB a day for its warranty); streamed state can
write that in weeks. So the count is kept over restarts. It is saved with each commit, on closing, and whenever about
1 % of the day's budget was written since: a killed process loses no more than that.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from threading import Lock

import structlog

from peer.memory.disk.durable_files import disk_fault, publish, write_temporary
from protocol.errors import StorageError

log = structlog.get_logger()

DAY_S = 86_400
SAVED_SHARE = 0.01
"""Of a day's budget, after which the count is saved: a process that is killed may lose so much of it."""
SAVED_BYTES = 1 << 30
"""The same where there is no budget."""


class WriteBudgetSpent(StorageError):
    """Today's writes are used up. Nothing was written: the same write may be tried again after `resumes_in_s`."""

    default_hint = "Training can go on at 00:00 UTC; a larger budget wears the drive out sooner."

    def __init__(self, message: str, *, resumes_in_s: float, hint: str | None = None) -> None:
        super().__init__(message, hint=hint)
        self.resumes_in_s = resumes_in_s


class WriteBudget:
    """Counts written bytes per UTC day; safe to use from several threads. `now_s` is the time since 1970."""

    def __init__(self, path: Path, *, per_day_bytes: int | None, now_s: Callable[[], float]) -> None:
        self._path = path
        self._per_day_bytes = per_day_bytes
        self._now_s = now_s
        self._lock = Lock()
        self._day, self._day_bytes, self._total_bytes = _load(path)
        self._unsaved_bytes = 0
        self._save_after_bytes = SAVED_BYTES if per_day_bytes is None else int(SAVED_SHARE * per_day_bytes)

    @property
    def today_bytes(self) -> int:
        with self._lock:
            self._turn_day()
            return self._day_bytes

    @property
    def total_bytes(self) -> int:
        with self._lock:
            return self._total_bytes

    def left_bytes(self) -> int | None:
        """Return what may still be written today, or None if there is no limit."""
        return None if self._per_day_bytes is None else max(0, self._per_day_bytes - self.today_bytes)

    def require(self, num_bytes: int) -> None:
        """Raise `WriteBudgetSpent` unless so much may still be written today."""
        with self._lock:
            self._require(num_bytes)

    def spend(self, num_bytes: int) -> None:
        """Count bytes that are about to be written, or raise `WriteBudgetSpent` and count nothing."""
        with self._lock:
            self._require(num_bytes)
            self._add(num_bytes)

    def count(self, num_bytes: int) -> None:
        """Count bytes that have to be written whatever the budget says: a commit's own."""
        with self._lock:
            self._turn_day()
            self._add(num_bytes)

    def save(self) -> None:
        """Keep the count for the next start. Raises `StorageError`."""
        with self._lock:
            if self._unsaved_bytes:
                self._save()

    def _save(self) -> None:
        record = {"day": self._day, "day_bytes": self._day_bytes, "total_bytes": self._total_bytes}
        publish(write_temporary(self._path, json.dumps(record).encode()), self._path)
        self._unsaved_bytes = 0

    def _require(self, num_bytes: int) -> None:
        self._turn_day()
        if self._per_day_bytes is not None and self._day_bytes + num_bytes > self._per_day_bytes:
            raise WriteBudgetSpent(
                f"today's {self._per_day_bytes / 1e9:.4g} GB of writes to {self._path.parent} are spent.",
                resumes_in_s=DAY_S - self._now_s() % DAY_S,
            )

    def _add(self, num_bytes: int) -> None:
        self._day_bytes += num_bytes
        self._total_bytes += num_bytes
        self._unsaved_bytes += num_bytes
        if self._unsaved_bytes > self._save_after_bytes:
            try:
                self._save()
            except StorageError as error:  # nobody asked for it here; the next commit does
                log.warning("wear.not_saved", error=error.one_line())

    def _turn_day(self) -> None:
        today = datetime.fromtimestamp(self._now_s(), UTC).date().isoformat()
        if (
            today != self._day
        ):  # also when the clock was set back: one wrong day in the future must not stop us till then
            self._day, self._day_bytes = today, 0


def _load(path: Path) -> tuple[str, int, int]:
    """Read what an earlier process counted. A damaged count is not worth a refused start: it begins anew."""
    try:
        record = json.loads(path.read_bytes())
        day, day_bytes, total_bytes = record["day"], record["day_bytes"], record["total_bytes"]
    except FileNotFoundError:
        return "", 0, 0
    except OSError as error:
        raise disk_fault(f"cannot read {path}", error) from error
    except (ValueError, KeyError, TypeError):
        return "", 0, 0
    if not (isinstance(day, str) and isinstance(day_bytes, int) and isinstance(total_bytes, int)):
        return "", 0, 0
    return day, max(0, day_bytes), max(0, total_bytes)
