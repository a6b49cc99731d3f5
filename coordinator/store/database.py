"""The coordinator's one SQLite file: one thread that touches it, one transaction per call.

Owns: opening, durability, the thread, and turning SQLite's "no" into a `StorageError`. Must not know: any
table. Queries are plain functions that take a connection (`peers.py`, `history.py`, `tallies.py`); services
run them as `await database.run(function, *arguments)`, whoever only looks does so `with reading(path) as db`.

WAL with `synchronous=FULL`: every commit is fsynced before it is acknowledged, so neither `kill -9` nor a
power cut takes back what a peer was told to forget (docs/decisions/0006). One beat is one commit.
"""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Concatenate, ParamSpec, TypeVar

from coordinator.store.schema import SCHEMA_VERSION, migrate, read_version
from protocol.errors import ConfigError, StorageError

DATABASE_FILE = "coordinator.sqlite3"
BUSY_TIMEOUT_S = 5.0  # a reader never blocks us under WAL; a backup or a second writer may, briefly

Connection = sqlite3.Connection  # for the type of a parameter: nobody outside this package imports sqlite3

P = ParamSpec("P")
T = TypeVar("T")


class Database:
    """Owns the connection that writes. Create it with `Database.open`."""

    def __init__(self, path: Path, executor: ThreadPoolExecutor, connection: sqlite3.Connection) -> None:
        self.path = path
        self._executor = executor
        self._connection = connection

    @classmethod
    async def open(cls, path: Path) -> Database:
        """Open or create the database, bringing it to the current schema.

        Raises `StorageError` if it cannot be used, or was written by a newer Handcar.
        """
        executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="sqlite")
        try:
            connection = await asyncio.get_running_loop().run_in_executor(executor, _open_writer, path)
        except BaseException:
            executor.shutdown(wait=False)
            raise
        return cls(path, executor, connection)

    async def run(
        self, function: Callable[Concatenate[sqlite3.Connection, P], T], *args: P.args, **kwargs: P.kwargs
    ) -> T:
        """Run `function(connection, ...)` in one transaction; when this returns, it is on disk.

        A caller that is cancelled does not take the transaction back. Raises `StorageError` if SQLite cannot.
        """
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(
            self._executor, lambda: _transaction(self._connection, lambda: function(self._connection, *args, **kwargs))
        )

    async def close(self) -> None:
        """Finish what was asked, and close. The WAL is folded into the file."""
        loop = asyncio.get_running_loop()
        await loop.run_in_executor(self._executor, self._connection.close)
        self._executor.shutdown()


@contextmanager
def reading(path: Path) -> Iterator[sqlite3.Connection]:
    """Open an existing database for looking while the block runs, also while a coordinator writes it.

    Raises `ConfigError` if there is none, `StorageError` if it cannot be read, be it only at some page half way.
    """
    with closing(open_readonly(path)) as connection, _storage_faults(f"cannot read {path}"):
        connection.execute("BEGIN")  # one moment's picture: what is read in several steps fits together
        yield connection


def open_readonly(path: Path) -> sqlite3.Connection:
    """Open what `reading` reads; for those who keep it open. The caller closes it."""
    if not path.is_file():
        raise ConfigError(f"{path.parent} holds no run that was ever started.", hint="Start it: coordinator run DIR")
    with _storage_faults(f"cannot read {path}"):
        connection = sqlite3.connect(f"file:{_quoted(path)}?mode=ro", uri=True, timeout=BUSY_TIMEOUT_S)
        try:
            _check_version(path, read_version(connection))
        except BaseException:
            connection.close()
            raise
    return connection


def _check_version(path: Path, version: int) -> None:
    """Raise `StorageError` unless a database can be looked at as it is: only a coordinator changes its schema."""
    if version == SCHEMA_VERSION:
        return
    hint = "Use the version of Handcar that the coordinator runs."
    if version < SCHEMA_VERSION:
        hint = "A start brings it up to date: coordinator run DIR"
    raise StorageError(
        f"{path} has schema {version}, this version of Handcar reads {SCHEMA_VERSION}.",
        hint=hint,
    )


def _open_writer(path: Path) -> sqlite3.Connection:
    with _storage_faults(f"cannot use the database {path}"):
        # autocommit mode: transactions are exactly those of `_transaction`
        connection = sqlite3.connect(path, timeout=BUSY_TIMEOUT_S, isolation_level=None)
        try:
            connection.execute("PRAGMA journal_mode = WAL")
            connection.execute("PRAGMA synchronous = FULL")
            connection.execute("PRAGMA foreign_keys = ON")
            migrate(connection)
        except BaseException:
            connection.close()
            raise
    return connection


def _transaction(connection: sqlite3.Connection, body: Callable[[], T]) -> T:
    with _storage_faults("the run's database refuses"):
        connection.execute("BEGIN IMMEDIATE")
        try:
            result = body()
            connection.execute("COMMIT")
        except BaseException:
            if connection.in_transaction:  # a full disk may have rolled it back already
                connection.execute("ROLLBACK")
            raise
    return result


@contextmanager
def _storage_faults(what: str) -> Iterator[None]:
    """Raise `StorageError` beginning with `what` for whatever SQLite cannot do inside."""
    try:
        yield
    except (sqlite3.IntegrityError, sqlite3.ProgrammingError, sqlite3.DataError):  # our own bugs
        raise
    except sqlite3.DatabaseError as error:  # full disk, I/O error, lock, damaged file: the machine's
        raise StorageError(f"{what}: {error}.") from error


def _quoted(path: Path) -> str:
    return str(path.absolute()).replace("%", "%25").replace("?", "%3f").replace("#", "%23")
