"""The database: one schema, nothing acknowledged is lost, nothing newer is touched."""

from __future__ import annotations

import os
import signal
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest

from coordinator.store import history, peers
from coordinator.store.database import Database, open_readonly
from coordinator.store.schema import MIGRATIONS, SCHEMA_VERSION, migrate, read_version
from protocol.errors import ConfigError, StorageError
from protocol.ids import PeerId, RoundId, StageId, Version

WRITER = """
import asyncio, sys
from pathlib import Path
from coordinator.store import peers
from coordinator.store.database import Database

async def main():
    database = await Database.open(Path(sys.argv[1]))
    number = 0
    while True:
        await database.run(peers.put_setting, "number", str(number))
        print(number, flush=True)
        number += 1

asyncio.run(main())
"""


def test_what_was_acknowledged_survives_kill_9(tmp_path: Path) -> None:
    """Oracle: the last number that the killed process had printed, which it did after its commit."""
    path = tmp_path / "db"
    writer = subprocess.Popen([sys.executable, "-c", WRITER, str(path)], stdout=subprocess.PIPE, text=True)
    assert writer.stdout is not None
    printed = [int(writer.stdout.readline()) for _ in range(20)]
    os.kill(writer.pid, signal.SIGKILL)
    printed += [int(line) for line in writer.stdout.read().split("\n") if line.strip()]
    writer.stdout.close()
    writer.wait(timeout=10)
    with closing(open_readonly(path)) as db:
        kept = int(peers.get_setting(db, "number") or -1)
    assert kept >= printed[-1]


async def test_every_commit_is_synced_to_disk(tmp_path: Path) -> None:
    """Oracle: SQLite's own pragmas (2 is FULL), asked on the connection that writes."""

    def pragmas(db: sqlite3.Connection) -> tuple[str, int]:
        return db.execute("PRAGMA journal_mode").fetchone()[0], db.execute("PRAGMA synchronous").fetchone()[0]

    database = await Database.open(tmp_path / "db")
    try:
        assert await database.run(pragmas) == ("wal", 2)
    finally:
        await database.close()


async def test_a_failed_transaction_leaves_nothing(tmp_path: Path) -> None:
    def fail_half_way(db: sqlite3.Connection) -> None:
        peers.put_setting(db, "half", "1")
        raise RuntimeError("half way")

    database = await Database.open(tmp_path / "db")
    try:
        with pytest.raises(RuntimeError, match="half way"):
            await database.run(fail_half_way)
        assert await database.run(peers.get_setting, "half") is None
    finally:
        await database.close()


async def test_a_newer_schema_is_refused_and_not_touched(tmp_path: Path) -> None:
    path = tmp_path / "db"
    with closing(sqlite3.connect(path)) as db, db:
        db.execute("CREATE TABLE schema_version (version INTEGER NOT NULL)")
        db.execute("INSERT INTO schema_version VALUES (?)", (SCHEMA_VERSION + 1,))
    before = path.read_bytes()
    with pytest.raises(StorageError, match=f"schema {SCHEMA_VERSION + 1}"):
        await Database.open(path)
    with pytest.raises(StorageError, match=f"schema {SCHEMA_VERSION + 1}"):
        open_readonly(path)
    with closing(sqlite3.connect(path)) as db:
        assert read_version(db) == SCHEMA_VERSION + 1
        assert db.execute("SELECT count(*) FROM sqlite_master").fetchone()[0] == 1
    assert path.read_bytes()[100:] == before[100:]  # the header may have changed to WAL


def test_migrations_run_once_each_and_in_order() -> None:
    """Oracle: a database that stops after every version must end with the same schema as a new one."""
    with closing(sqlite3.connect(":memory:", isolation_level=None)) as db:
        migrate(db)
        schema = db.execute("SELECT name, sql FROM sqlite_master ORDER BY name").fetchall()
        assert read_version(db) == len(MIGRATIONS)
        migrate(db)
        assert db.execute("SELECT name, sql FROM sqlite_master ORDER BY name").fetchall() == schema


async def test_a_file_that_is_no_database_is_one_clear_error(tmp_path: Path) -> None:
    (tmp_path / "db").write_bytes(b"not a database, whatever its name says" * 100)
    with pytest.raises(StorageError, match="not a database"):
        await Database.open(tmp_path / "db")


async def test_an_unwritable_place_is_one_clear_error(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="unable to open"):
        await Database.open(tmp_path / "missing" / "db")


async def test_a_full_disk_is_a_storage_error_and_rolls_back(tmp_path: Path) -> None:
    """Oracle: SQLite's own page limit stands in for the disk."""

    def limit(db: sqlite3.Connection) -> None:
        pages = db.execute("PRAGMA page_count").fetchone()[0]
        db.execute(f"PRAGMA max_page_count = {pages}")

    database = await Database.open(tmp_path / "db")
    try:
        await database.run(limit)
        with pytest.raises(StorageError, match="full"):
            await database.run(peers.put_setting, "large", "x" * 100_000)
        assert await database.run(peers.get_setting, "large") is None
    finally:
        await database.close()


def test_looking_needs_a_run_that_was_started(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="ever started"):
        open_readonly(tmp_path / "db")


async def test_one_can_look_while_it_is_written_and_after(tmp_path: Path) -> None:
    path = tmp_path / "odd name?#%"
    database = await Database.open(path)
    await database.run(peers.put_setting, "colour", "red")
    with closing(open_readonly(path)) as db:
        assert peers.get_setting(db, "colour") == "red"
        with pytest.raises(sqlite3.OperationalError, match="readonly"):
            peers.put_setting(db, "colour", "blue")
    await database.close()
    with closing(open_readonly(path)) as db:
        assert peers.get_setting(db, "colour") == "red"


async def test_a_generation_is_issued_once(tmp_path: Path) -> None:
    row = history.CharterRow(
        stage=StageId(0), generation=1, round=RoundId(0), version=Version(0), signed=b"a", issued_s=1.0
    )
    database = await Database.open(tmp_path / "db")
    try:
        await database.run(history.add_charters, [row])
        with pytest.raises(sqlite3.IntegrityError):
            await database.run(history.add_charters, [row])
    finally:
        await database.close()


async def test_events_are_returned_newest_first(tmp_path: Path) -> None:
    database = await Database.open(tmp_path / "db")
    try:
        for number in range(3):
            event = history.Event(at_s=float(number), kind="a.b", peer=PeerId("p"), detail=str(number))
            await database.run(history.add_event, event)
        assert [event.detail for event in await database.run(history.last_events, limit=2)] == ["2", "1"]
    finally:
        await database.close()
