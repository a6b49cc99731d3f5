"""Rows about invites and who came in by them. Plain functions on a connection.

Owns: the SQL of `invites` and `invite_uses`. Must not know: tokens, only their hashes; whether a run asks for one.
"""

from __future__ import annotations

import sqlite3
from dataclasses import dataclass

from protocol.ids import Digest, PeerId


@dataclass(frozen=True, slots=True, kw_only=True)
class InviteRow:
    """One invite. Times are Unix seconds."""

    id: str
    note: str
    uses: int
    """How many peers may come in by it."""
    created_s: float
    expires_s: float | None
    revoked_s: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class InviteUse:
    """A peer that came in by an invite, under the name that it has now."""

    invite: str
    peer: PeerId
    name: str
    used_s: float


def add_invite(db: sqlite3.Connection, row: InviteRow, *, secret: Digest) -> None:
    """Keep a new invite."""
    db.execute(
        "INSERT INTO invites (id, secret, note, uses, created_s, expires_s, revoked_s) VALUES (?, ?, ?, ?, ?, ?, ?)",
        (row.id, secret, row.note, row.uses, row.created_s, row.expires_s, row.revoked_s),
    )


def load_invites(db: sqlite3.Connection) -> list[InviteRow]:
    """Return all invites, the oldest first."""
    rows = db.execute("SELECT id, note, uses, created_s, expires_s, revoked_s FROM invites ORDER BY created_s, id")
    return [_invite(row) for row in rows]


def find_invite(db: sqlite3.Connection, *, secret: Digest) -> InviteRow | None:
    """Return the invite of a token's hash."""
    row = db.execute(
        "SELECT id, note, uses, created_s, expires_s, revoked_s FROM invites WHERE secret = ?", (secret,)
    ).fetchone()
    return None if row is None else _invite(row)


def revoke_invite(db: sqlite3.Connection, invite: str, *, now_s: float) -> bool:
    """Let nobody come in by an invite any more; tell whether somebody could be let in by it before."""
    cursor = db.execute("UPDATE invites SET revoked_s = ? WHERE id = ? AND revoked_s IS NULL", (now_s, invite))
    return cursor.rowcount > 0


def use_invite(db: sqlite3.Connection, peer: PeerId, *, secret: Digest, now_s: float) -> bool:
    """Let a newcomer in by the invite of a token's hash; tell whether that is possible. One use is one peer."""
    cursor = db.execute(
        """
        INSERT INTO invite_uses (peer, invite, used_s)
        SELECT ?, id, ? FROM invites
        WHERE secret = ? AND revoked_s IS NULL AND (expires_s IS NULL OR expires_s > ?)
              AND uses > (SELECT count(*) FROM invite_uses WHERE invite = invites.id)
        """,
        (peer, now_s, secret, now_s),
    )
    return cursor.rowcount > 0


def has_use(db: sqlite3.Connection, peer: PeerId) -> bool:
    """Tell whether a peer ever came in by an invite."""
    return db.execute("SELECT 1 FROM invite_uses WHERE peer = ?", (peer,)).fetchone() is not None


def pass_use_on(db: sqlite3.Connection, peer: PeerId, successor: PeerId) -> None:
    """Make a peer's use that of its successor, unless that has one itself."""
    db.execute("UPDATE OR IGNORE invite_uses SET peer = ? WHERE peer = ?", (successor, peer))


def load_uses(db: sqlite3.Connection) -> list[InviteUse]:
    """Return who came in by which invite, in the order of coming."""
    rows = db.execute(
        "SELECT invite, peer, coalesce(name, ''), used_s FROM invite_uses LEFT JOIN peers USING (peer)"
        " ORDER BY used_s, peer"
    )
    return [
        InviteUse(invite=invite, peer=PeerId(peer), name=name, used_s=used_s) for invite, peer, name, used_s in rows
    ]


def _invite(row: tuple[str, str, int, float, float | None, float | None]) -> InviteRow:
    return InviteRow(id=row[0], note=row[1], uses=row[2], created_s=row[3], expires_s=row[4], revoked_s=row[5])
