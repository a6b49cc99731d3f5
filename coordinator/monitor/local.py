"""The status of a run directory, straight from its database, whether or not a coordinator runs there.

Owns: reading it, and a newest reading that many can share. Must not know: the network. A directory that was
never served still has a manifest, and says so.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from threading import Lock

from coordinator.rundir import RunDir
from coordinator.status import Document, document
from coordinator.store.database import DATABASE_FILE, reading

FRESH_S = 1.0  # however many ask: the database is read once in this time


def status_of_directory(directory: Path) -> Document:
    """Return the status document of the run in `directory`, or raise `ConfigError` or `StorageError`."""
    return status_of_run(RunDir.open(directory))


def status_of_run(run: RunDir) -> Document:
    """Return the status document of an opened run."""
    with reading(run.path / DATABASE_FILE) as db:
        return document(db, run.manifest, now_s=time.time())


class SharedStatus:
    """The newest document that a function returned, for a moment. Any thread may ask; it blocks while one reads."""

    def __init__(self, read: Callable[[], Document]) -> None:
        self._read = read
        self._lock = Lock()
        self._read_s = float("-inf")
        self._document: Document = {}

    def __call__(self) -> Document:
        with self._lock:
            if time.monotonic() - self._read_s >= FRESH_S:
                self._document = self._read()
                self._read_s = time.monotonic()
            return self._document
