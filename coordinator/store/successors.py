"""Rows about keys that were replaced. Plain functions on a connection.

Owns: the SQL of `successors`. Must not know: what a peer leaves to its successor. Whoever keeps something by peer
follows this table, forwards with `newest`, or backwards with `predecessors`.
"""

from __future__ import annotations

import sqlite3

from protocol.ids import PeerId


def add_successor(db: sqlite3.Connection, peer: PeerId, successor: PeerId, *, statement: bytes, now_s: float) -> None:
    """Enter who follows a peer that nobody follows yet."""
    db.execute(
        "INSERT INTO successors (peer, successor, statement, since_s) VALUES (?, ?, ?, ?)",
        (peer, successor, statement, now_s),
    )


def successor_of(db: sqlite3.Connection, peer: PeerId) -> PeerId | None:
    """Return the key that replaced a peer's."""
    row = db.execute("SELECT successor FROM successors WHERE peer = ?", (peer,)).fetchone()
    return None if row is None else PeerId(row[0])


def newest(db: sqlite3.Connection, peer: PeerId) -> PeerId:
    """Return the key that a peer goes by now: its own, or the last of those that followed."""
    return all_newest(db).get(peer, peer)


def all_newest(db: sqlite3.Connection) -> dict[PeerId, PeerId]:
    """Return the key that replaced each key that was replaced, in the end."""
    rows = db.execute("SELECT peer, successor FROM successors")
    following = {PeerId(peer): PeerId(successor) for peer, successor in rows}
    found = {}
    for peer, last in following.items():
        seen = {peer}
        while last in following and last not in seen:
            seen.add(last)
            last = following[last]
        found[peer] = last
    return found


def predecessors(db: sqlite3.Connection, peer: PeerId) -> tuple[PeerId, ...]:
    """Return all keys that a peer went by before, and those of peers that have become it."""
    rows = db.execute(
        """
        WITH RECURSIVE before (peer) AS (
            SELECT peer FROM successors WHERE successor = ?
            UNION SELECT successors.peer FROM successors JOIN before ON successors.successor = before.peer
        )
        SELECT peer FROM before ORDER BY peer
        """,
        (peer,),
    )
    return tuple(PeerId(row[0]) for row in rows)
