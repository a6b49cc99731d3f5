"""Following commits in the database. Oracle: lines of commits that are laid by hand."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace

import pytest

from coordinator.store import history, tallies, tree
from coordinator.store.schema import migrate
from protocol.ids import Lineage, PeerId, RoundId, Version, digest
from tests.coordinator.test_store import commit_row

ROOT = Lineage(digest(b"root"))


@pytest.fixture
def db() -> Iterator[sqlite3.Connection]:
    with closing(sqlite3.connect(":memory:", isolation_level=None)) as connection:
        migrate(connection)
        yield connection


def line(first: int, last: int, *, after: history.CommitRow | None = None, rival: int = 0) -> list[history.CommitRow]:
    """Lay commits of some rounds, one after the other."""
    rows: list[history.CommitRow] = []
    for round_id in range(first, last + 1):
        before = rows[-1] if rows else after
        parent = ROOT if before is None else before.lineage
        rows.append(replace(commit_row(0, 1, round_id, rival=rival), parent=parent))
    return rows


def add(db: sqlite3.Connection, *rows: history.CommitRow) -> list[Lineage]:
    return [lineage for row in rows for lineage in history.add_commit(db, row, received_s=1.0)]


def lengths(db: sqlite3.Connection, *tips: history.CommitRow) -> dict[Lineage, int]:
    found = tree.paths(db, [tip.lineage for tip in tips], root=(ROOT, Version(0)))
    return {tip: len(path) for tip, path in found.items()}


def test_paths_reach_back_to_where_all_were_one(db: sqlite3.Connection) -> None:
    trunk = line(0, 4)
    left, right = line(5, 7, after=trunk[-1], rival=1), line(5, 6, after=trunk[-1], rival=2)
    add(db, *trunk, *left, *right)
    assert lengths(db, left[-1], right[-1]) == {left[-1].lineage: 3, right[-1].lineage: 2}
    assert lengths(db, left[-1], right[-1], trunk[-1]) == {
        left[-1].lineage: 3,
        right[-1].lineage: 2,
        trunk[-1].lineage: 0,
    }
    assert lengths(db, left[-1]) == {left[-1].lineage: 0}
    assert lengths(db, left[-1], left[0]) == {left[-1].lineage: 2, left[0].lineage: 0}, "one is behind the other"
    newest = tree.paths(db, [left[-1].lineage, right[-1].lineage], root=(ROOT, Version(0)))[left[-1].lineage]
    assert [link.version for link in newest] == [8, 7, 6]


def test_where_all_were_one_may_be_the_charter(db: sqlite3.Connection) -> None:
    left, right = line(0, 2, rival=1), line(0, 1, rival=2)
    add(db, *left, *right)
    assert lengths(db, left[-1], right[-1]) == {left[-1].lineage: 3, right[-1].lineage: 2}
    assert set(tree.paths(db, [left[-1].lineage, ROOT], root=(ROOT, Version(0)))) == {left[-1].lineage, ROOT}


def test_what_cannot_be_followed_has_no_path(db: sqlite3.Connection) -> None:
    """A report is missing, or is none of a member's: the trunk must not be taken for a part of the other branch."""
    trunk = line(0, 4)
    left, right = line(5, 8, after=trunk[-1], rival=1), line(5, 6, after=trunk[-1], rival=2)
    add(db, *trunk, *left[:1], *left[2:], *right)
    assert lengths(db, left[-1], right[-1]) == {right[-1].lineage: 0}
    add(db, replace(left[1], vouched=False))
    assert lengths(db, left[-1], right[-1]) == {right[-1].lineage: 0}
    add(db, left[1])  # somebody else tells of it, who could show that a member had signed it
    assert lengths(db, left[-1], right[-1]) == {left[-1].lineage: 4, right[-1].lineage: 2}


def test_who_took_a_commit_may_sign_the_next(db: sqlite3.Connection) -> None:
    """The ledger has forgotten who sat there, after a restart say."""
    first, second = line(0, 1)
    add(db, first)
    assert history.newest_commits(db) == [first.signed]
    add(db, replace(second, vouched=False))
    assert history.newest_commits(db) == [first.signed], "it may be anybody's"
    history.add_taker(db, first.digest, second.signer)
    add(db, replace(second, vouched=False))
    assert history.newest_commits(db) == [second.signed]


def test_what_follows_a_commit_that_was_given_up_is_given_up_whenever_it_is_reported(db: sqlite3.Connection) -> None:
    """Rounds 0 to 4 in a line, and two others after round 1; round 2 is given up."""
    rows = line(0, 4)
    rivals = line(2, 3, after=rows[1], rival=1)
    add(db, *rows[:3], rows[4], *rivals)  # round 3 is told last: whoever had it was away
    assert tree.give_up(db, [rows[2].lineage], at_s=7.0) == [rows[2].lineage]
    assert set(add(db, rows[3])) == {rows[3].lineage, rows[4].lineage}
    assert set(tree.given_up(db)) == {row.lineage for row in rows[2:]}
    (lost,) = tallies.rollbacks(db)
    assert (lost.torn, lost.version, lost.version_before, lost.rounds, lost.tokens) == (True, 2, 5, 3, 750)
    assert lost.at_s == 7.0
    assert tallies.counters(db).rounds_rolled_back == 3
    assert history.newest_commits(db) == [rivals[-1].signed]
    assert lengths(db, rows[4], rivals[-1]) == {rivals[-1].lineage: 0}


def test_what_was_given_up_can_be_taken_back(db: sqlite3.Connection) -> None:
    """Nothing else is left of the stage."""
    rows = line(0, 4)
    add(db, *rows)
    tree.give_up(db, [rows[2].lineage], at_s=7.0)
    assert set(tree.take_back(db, rows[3].lineage)) == {rows[2].lineage, rows[3].lineage}
    assert tree.given_up(db) == [rows[4].lineage]


def test_a_commit_is_lost_once_however_often(db: sqlite3.Connection) -> None:
    """It was given up, and a charter has gone back behind it since. Oracle: five commits in all."""
    rows = line(0, 4)
    add(db, *rows)
    tree.give_up(db, [rows[3].lineage], at_s=7.0)
    for generation, version in ((1, 0), (2, 1)):
        row = history.CharterRow(
            stage=rows[0].stage,
            generation=generation,
            round=RoundId(0),
            version=Version(version),
            signed=b"",
            issued_s=float(generation),
        )
        history.add_charters(db, [row])
    assert sorted((each.torn, each.rounds) for each in tallies.rollbacks(db)) == [(False, 2), (True, 2)]


def test_only_so_many_branches_are_kept_in_full(db: sqlite3.Connection) -> None:
    """One member makes up hundreds of them."""
    for rival in range(100):
        add(db, *line(0, 0, rival=rival))
    assert len(history.newest_commits(db)) == history.MAX_TIPS


def test_a_long_tear_is_walked_and_one_without_end_is_not(
    db: sqlite3.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    trunk = line(0, 0)
    left, right = line(1, 60, after=trunk[-1], rival=1), line(1, 60, after=trunk[-1], rival=2)
    add(db, *trunk, *left, *right)
    assert lengths(db, left[-1], right[-1]) == {left[-1].lineage: 60, right[-1].lineage: 60}
    monkeypatch.setattr(tree, "MAX_LOOKUPS", 50)
    assert lengths(db, left[-1], right[-1]) == {}
    assert len(tree.path_since(db, left[-1].lineage, RoundId(0))) == 50
    assert len(tree.path_since(db, left[-1].lineage, RoundId(31))) == 30
    assert PeerId("p") == left[0].signer
