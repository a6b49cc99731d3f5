"""The book of credits: entries that are only ever added, and their sums.

Owns: the SQL of `credit_entries` and `balances`. Must not know: what work is worth, or when it is settled.

Double entry: what a peer earns goes from its account `mint` to `held`, and later from there to `free`, or back. So a
peer's accounts always add up to nothing, and what it was ever given is what `mint` is short of.
"""

from __future__ import annotations

import itertools
import sqlite3
from collections.abc import Mapping
from dataclasses import dataclass

from coordinator.store.successors import all_newest
from protocol.ids import PeerId, RoundId, StageId


@dataclass(frozen=True, slots=True)
class Work:
    """What a peer has earned at one stage in one round, all told."""

    tokens: int
    mflop: int


@dataclass(frozen=True, slots=True)
class Balance:
    """One peer's credits, in millions of floating-point operations, and the target tokens behind them."""

    held_mflop: int = 0
    free_mflop: int = 0
    held_tokens: int = 0
    free_tokens: int = 0


def book_work(
    db: sqlite3.Connection, round_id: RoundId, work: Mapping[tuple[StageId, PeerId], Work], *, at_s: float
) -> int:
    """Book what was earned in a round beyond what is booked for it; return how many entries that took.

    The same call again books nothing: so a round may be settled as often as something new is known of it.
    """
    booked = {
        (StageId(stage), PeerId(peer)): Work(tokens, mflop)
        for stage, peer, tokens, mflop in db.execute(
            "SELECT stage, peer, sum(tokens), sum(mflop) FROM credit_entries WHERE kind = 'work' AND round = ? "
            "GROUP BY stage, peer",
            (round_id,),
        )
    }
    entries = []
    for (stage, peer), due in sorted(work.items()):
        before = booked.get((stage, peer), Work(0, 0))
        if due.tokens > before.tokens:
            mflop = max(0, due.mflop - before.mflop)
            entries.append((at_s, "work", peer, "mint", "held", mflop, due.tokens - before.tokens, round_id, stage))
    db.executemany(
        "INSERT INTO credit_entries (at_s, kind, peer, debit, credit, mflop, tokens, round, stage) "
        "VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
        entries,
    )
    return len(entries)


def release(db: sqlite3.Connection, *, before_s: float, at_s: float, limit: int) -> int:
    """Release what was held since before a time and not revoked meanwhile; return how many entries.

    In the order in which they were booked, up to the first that is not due: so what is released ends at one place.
    """
    rows = db.execute(
        """
        SELECT at_s, peer, mflop, tokens, round, stage, id FROM credit_entries AS work
        WHERE id > (SELECT coalesce(max(of), 0) FROM credit_entries WHERE kind = 'release') AND kind = 'work'
        AND NOT EXISTS (SELECT 1 FROM credit_entries WHERE of = work.id) ORDER BY id LIMIT ?
        """,
        (limit,),
    ).fetchall()
    due = [(at_s, *row[1:]) for row in itertools.takewhile(lambda row: row[0] < before_s, rows)]
    db.executemany(
        "INSERT INTO credit_entries (at_s, kind, peer, debit, credit, mflop, tokens, round, stage, of) "
        "VALUES (?, 'release', ?, 'held', 'free', ?, ?, ?, ?, ?)",
        due,
    )
    return len(due)


def revoke(db: sqlite3.Connection, peer: PeerId, *, reason: str, at_s: float, since_s: float = 0.0) -> int:
    """Take back what a peer earned since a time and is still held; return how many MFLOP that was."""
    (before,) = db.execute("SELECT coalesce(max(id), 0) FROM credit_entries").fetchone()
    db.execute(
        """
        INSERT INTO credit_entries (at_s, kind, peer, debit, credit, mflop, tokens, round, stage, of, reason)
        SELECT ?, 'revoke', peer, 'held', 'mint', mflop, tokens, round, stage, id, ? FROM credit_entries AS work
        WHERE kind = 'work' AND peer = ? AND at_s >= ?
        AND NOT EXISTS (SELECT 1 FROM credit_entries WHERE of = work.id)
        """,
        (at_s, reason, peer, since_s),
    )
    (mflop,) = db.execute(
        "SELECT coalesce(sum(mflop), 0) FROM credit_entries WHERE id > ? AND kind = 'revoke'", (before,)
    ).fetchone()
    return int(mflop)


def restore(db: sqlite3.Connection, peer: PeerId, *, since_s: float, at_s: float) -> None:
    """Book anew what a peer had earned and was taken back since a time: that was wrong."""
    db.execute(
        """
        INSERT INTO credit_entries (at_s, kind, peer, debit, credit, mflop, tokens, round, stage, reason)
        SELECT ?, 'work', peer, 'mint', 'held', mflop, tokens, round, stage, 'restored' FROM credit_entries
        WHERE kind = 'revoke' AND peer = ? AND at_s >= ?
        """,
        (at_s, peer, since_s),
    )


def by_person(db: sqlite3.Connection) -> dict[PeerId, Balance]:
    """Return the balances with those of replaced keys added to the newest. The book itself is never changed."""
    following = all_newest(db)
    found: dict[PeerId, Balance] = {}
    for peer, mine in balances(db).items():
        person = following.get(peer, peer)
        so_far = found.get(person, Balance())
        found[person] = Balance(
            held_mflop=so_far.held_mflop + mine.held_mflop,
            free_mflop=so_far.free_mflop + mine.free_mflop,
            held_tokens=so_far.held_tokens + mine.held_tokens,
            free_tokens=so_far.free_tokens + mine.free_tokens,
        )
    return found


def balances(db: sqlite3.Connection) -> dict[PeerId, Balance]:
    """Return the balance of every peer that ever earned something."""
    sums: dict[PeerId, dict[str, tuple[int, int]]] = {}
    for peer, account, mflop, tokens in db.execute("SELECT peer, account, mflop, tokens FROM balances"):
        sums.setdefault(PeerId(peer), {})[account] = (mflop, tokens)
    found = {}
    for peer, accounts in sums.items():
        held, free = accounts.get("held", (0, 0)), accounts.get("free", (0, 0))
        found[peer] = Balance(held_mflop=held[0], free_mflop=free[0], held_tokens=held[1], free_tokens=free[1])
    return found
