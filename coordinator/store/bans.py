"""Rows about who is kept out. Plain functions on a connection.

Owns: the SQL of `bans`. Must not know: why somebody is, or who hears of it (`coordinator/bans.py`).
"""

from __future__ import annotations

import sqlite3
from dataclasses import dataclass
from typing import Literal

from protocol.ids import PeerId

Kind = Literal["banned", "frozen", "rotated"]


@dataclass(frozen=True, slots=True, kw_only=True)
class BanRow:
    """One peer that is kept out. Times are Unix seconds; without an end it is until somebody takes it back."""

    peer: PeerId
    since_s: float
    until_s: float | None
    reason: str
    kind: Kind = "banned"
    """`banned` by the organiser; `frozen`: two processes use its key; `rotated`: its key was replaced by another."""


def add_ban(db: sqlite3.Connection, row: BanRow) -> None:
    """Ban a peer, or change its ban."""
    db.execute(
        "INSERT OR REPLACE INTO bans (peer, since_s, until_s, reason, kind) VALUES (?, ?, ?, ?, ?)",
        (row.peer, row.since_s, row.until_s, row.reason, row.kind),
    )


def add_milder_ban(db: sqlite3.Connection, row: BanRow) -> BanRow:
    """Ban a peer unless that would end a ban earlier, or make one something less; return what holds now."""
    known = find_ban(db, row.peer, now_s=row.since_s)
    if known is not None:
        lasts = known.until_s is None or (row.until_s is not None and row.until_s <= known.until_s)
        if lasts or (known.kind == "banned" and row.kind != "banned"):
            return known
    add_ban(db, row)
    return row


def remove_ban(db: sqlite3.Connection, peer: PeerId) -> bool:
    """Take a ban back; tell whether there was one."""
    return db.execute("DELETE FROM bans WHERE peer = ?", (peer,)).rowcount > 0


def find_ban(db: sqlite3.Connection, peer: PeerId, *, now_s: float) -> BanRow | None:
    """Return a peer's ban, if it holds now."""
    row = db.execute(f"{_SELECT} AND peer = ?", (now_s, peer)).fetchone()
    return None if row is None else _row(row)


def load_bans(db: sqlite3.Connection, *, now_s: float) -> list[BanRow]:
    """Return the bans that hold now, the newest first; keys that were replaced come last, whatever their number."""
    return [_row(row) for row in db.execute(f"{_SELECT} ORDER BY kind = 'rotated', since_s DESC, peer", (now_s,))]


_SELECT = "SELECT peer, since_s, until_s, reason, kind FROM bans WHERE (until_s IS NULL OR until_s > ?)"


def _row(row: tuple[str, float, float | None, str, Kind]) -> BanRow:
    peer, since_s, until_s, reason, kind = row
    return BanRow(peer=PeerId(peer), since_s=since_s, until_s=until_s, reason=reason, kind=kind)
