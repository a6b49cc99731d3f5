"""The database: one schema, nothing acknowledged is lost, nothing newer is touched."""

from __future__ import annotations

import os
import random
import re
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterable
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest

from coordinator.store import history, peers, tallies
from coordinator.store.database import Database, open_readonly, reading
from coordinator.store.rounds import ClosingRow
from coordinator.store.schema import MIGRATIONS, SCHEMA_VERSION, migrate, read_version
from protocol.errors import ConfigError, StorageError
from protocol.ids import Lineage, PeerId, RoundId, StageId, Version, digest

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


def commit_row(stage: int, generation: int, round_id: int, *, rival: int = 0) -> history.CommitRow:
    """Return a commit whose envelope says which one it is."""
    name = f"{stage}/{generation}/{round_id}/{rival}"
    closed = ClosingRow(
        digest=digest(f"{round_id}/{generation}".encode()),
        signer=PeerId("p"),
        round=RoundId(round_id),
        tasks_done=4,
        tasks_lost=0,
        loss_sum=1.0,
        tokens=256,
        heldout_loss_sum=0.0,
        heldout_tokens=0,
    )
    return history.CommitRow(
        digest=digest(name.encode()),
        signer=PeerId("p"),
        stage=StageId(stage),
        generation=generation,
        version=Version(round_id + 1),
        lineage=Lineage(digest(name.encode())),
        parent=Lineage(bytes(32)),
        closing=closed,
        members=1,
        tokens=250,
        dropped=6,
        double_counted=0,
        solo=True,
        was_taken=True,
        vouched=True,
        signed=name.encode(),
    )


def line(stage: int, generation: int, rounds: Iterable[int]) -> list[history.CommitRow]:
    """Return commits that follow each other."""
    rows: list[history.CommitRow] = []
    for round_id in rounds:
        row = commit_row(stage, generation, round_id)
        rows.append(replace(row, parent=rows[-1].lineage) if rows else row)
    return rows


# Stage 0 has come to round 3 of generation 2, once more after it had come to round 9 of the first; stage 1 holds
# two rivals of its newest round. Late and repeated reports come in any order.
HISTORY = [*line(0, 1, range(10)), *line(0, 2, (2, 3)), *line(1, 1, (4,))]
HISTORY += [replace(commit_row(1, 1, 5, rival=rival), parent=HISTORY[-1].lineage) for rival in (1, 2)]
NEWEST = {b"0/2/3/0", b"1/1/5/1", b"1/1/5/2"}


@pytest.mark.parametrize("seed", range(5))
def test_the_newest_commits_are_those_of_the_highest_generation(seed: int) -> None:
    rows = HISTORY * 2
    random.Random(seed).shuffle(rows)
    with closing(sqlite3.connect(":memory:", isolation_level=None)) as db:
        migrate(db)
        for row in rows:
            history.add_commit(db, row, received_s=1.0)
        assert set(history.newest_commits(db)) == NEWEST
        assert db.execute("SELECT count(*) FROM signed_commits").fetchone()[0] == len(NEWEST), "others are not kept"
        assert db.execute("SELECT count(*) FROM commits").fetchone()[0] == len(HISTORY)


def test_a_commit_that_no_member_vouches_for_is_counted_and_replaces_no_other() -> None:
    forged = replace(commit_row(0, 2, 99), vouched=False)
    with closing(sqlite3.connect(":memory:", isolation_level=None)) as db:
        migrate(db)
        for row in (*HISTORY, forged):
            history.add_commit(db, row, received_s=1.0)
        assert set(history.newest_commits(db)) == NEWEST
        assert db.execute("SELECT count(*) FROM commits").fetchone()[0] == len(HISTORY) + 1


def plans_of(db: sqlite3.Connection, work: Callable[[], object]) -> list[str]:
    """Return SQLite's plan of every statement that `work` runs."""
    statements: list[str] = []
    db.set_trace_callback(statements.append)
    work()
    db.set_trace_callback(None)
    rows = (db.execute(f"EXPLAIN QUERY PLAN {statement}").fetchall() for statement in statements)
    return [step for plan in rows for *_, step in plan]


@pytest.mark.parametrize("what", ["start", "report", "counters", "course"])
def test_no_statement_goes_through_all_of_history_for_each_row_or_report(what: str) -> None:
    """Oracle: SQLite's own plans. A sum may scan a table once; a report looks things up, whatever came before it."""
    row = commit_row(0, 1, 7)
    with closing(sqlite3.connect(":memory:", isolation_level=None)) as db:
        migrate(db)
        steps = plans_of(
            db,
            {
                "start": lambda: history.newest_commits(db),
                "report": lambda: history.add_commit(db, row, received_s=1.0),
                "counters": lambda: tallies.counters(db),
                "course": lambda: tallies.course(db),
            }[what],
        )
    assert steps
    scanned = {match[1] for step in steps if (match := re.match(r"SCAN (?:TABLE )?(\w+)", step))}
    if what == "report":
        assert scanned <= {"signed_commits"}, "which holds as many rows as there are stages"
    for number, step in enumerate(steps):
        if "CORRELATED" in step:
            assert re.match(r"SEARCH .*USING PRIMARY KEY", steps[number + 1])


async def test_a_database_of_the_first_schema_is_brought_up_to_date(tmp_path: Path) -> None:
    """Oracle: rows written by hand as the first version wrote them, against what the present one stores of the same."""
    path = tmp_path / "db"
    with closing(sqlite3.connect(path, isolation_level=None)) as db:
        db.executescript(f"{MIGRATIONS[0]}; CREATE TABLE schema_version (version INTEGER NOT NULL);")
        db.execute("INSERT INTO schema_version VALUES (1)")
        db.execute("INSERT INTO reports VALUES ('p', 1, 'CommitReport', 1, 1.0)")
        for row in HISTORY:
            closed = row.closing
            db.execute(
                "INSERT OR IGNORE INTO rounds VALUES (?, ?, 0, 4, 0, 1.0, 256, 0.0, 0, 1.0)",
                (closed.digest, closed.round),
            )
            db.execute(
                "INSERT INTO commits VALUES (?, ?, ?, ?, ?, ?, ?, 1, 6, 0, 1, 1.0, ?)",
                (
                    row.digest,
                    row.stage,
                    closed.round,
                    row.generation,
                    row.version,
                    row.lineage,
                    closed.digest,
                    row.signed,
                ),
            )
    with pytest.raises(StorageError, match="schema 1") as refused:
        open_readonly(path)
    assert "coordinator run" in refused.value.hint

    def commits(db: sqlite3.Connection) -> list[object]:
        """Return what the first version could know: not what a commit followed, nor who had closed its round."""
        return [(*row[:13],) for row in db.execute("SELECT * FROM commits ORDER BY digest").fetchall()]

    def fill(db: sqlite3.Connection) -> None:
        for row in HISTORY:
            history.add_commit(db, row, received_s=1.0)

    old, new = await Database.open(path), await Database.open(tmp_path / "new")
    try:
        await new.run(fill)
        assert await old.run(commits) == await new.run(commits)
        assert set(await old.run(history.newest_commits)) == NEWEST
    finally:
        await old.close()
        await new.close()


async def test_a_page_that_cannot_be_read_is_a_storage_error(tmp_path: Path) -> None:
    await (await Database.open(tmp_path / "db")).close()
    with pytest.raises(StorageError, match=r"cannot read .*malformed"), reading(tmp_path / "db"):
        raise sqlite3.DatabaseError("database disk image is malformed")
    with pytest.raises(sqlite3.ProgrammingError), reading(tmp_path / "db") as db:
        db.execute("SELECT ?")  # a bug of ours is not the machine's


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


async def test_what_is_read_in_several_steps_is_of_one_moment(tmp_path: Path) -> None:
    database = await Database.open(tmp_path / "db")
    try:
        await database.run(peers.put_setting, "colour", "red")
        with reading(tmp_path / "db") as db:
            assert peers.get_setting(db, "colour") == "red"
            await database.run(peers.put_setting, "colour", "blue")
            assert peers.get_setting(db, "colour") == "red"
        with reading(tmp_path / "db") as db:
            assert peers.get_setting(db, "colour") == "blue"
    finally:
        await database.close()


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
