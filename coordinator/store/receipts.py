"""Receipts that were handed in, and what speaks against a peer.

Owns: the SQL of `receipts`, `disputes` and `evidence`. Must not know: what receipts are worth
(`coordinator/settlement.py`), nor what is done about disputes.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from protocol.ids import PeerId, RoundId, StageId

CONTRADICTION = "two windows"
MAX_ROUNDS_AHEAD = 4  # of the newest that we know to be over


@dataclass(frozen=True, slots=True, kw_only=True)
class ReceiptRow:
    """One window that a peer has signed; `signed` is the envelope's bytes."""

    peer: PeerId
    session: int
    round: RoundId
    part: int
    signed: bytes


@dataclass(frozen=True, slots=True)
class RoundReceipts:
    """All that was handed in for a round."""

    signed: tuple[bytes, ...]
    keys: tuple[tuple[PeerId, int, int], ...]
    """Peer, session and part of each."""
    caps: Mapping[tuple[StageId, PeerId], int]
    """Tokens by all closings of the round."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EvidenceRow:
    """Something that speaks against a peer, with what proves it."""

    id: int
    peer: PeerId
    kind: str
    subject: str
    detail: str
    proof: bytes
    at_s: float


def add_receipt(db: sqlite3.Connection, row: ReceiptRow, *, received_s: float, max_per_round: int) -> None:
    """Add a window of a round that is over, unless it is known or the peer has said more than enough.

    Or is about to be over: who leaves in the middle of a round hands in what it has done so far. Two different windows
    under one name prove that their signer lies to somebody: the second is evidence.
    """
    (newest,) = db.execute("SELECT coalesce(max(round), -1) FROM rounds").fetchone()
    if row.round > newest + MAX_ROUNDS_AHEAD:
        return
    key = row.round, row.peer, row.session, row.part
    known = db.execute(
        "SELECT signed FROM receipts WHERE round = ? AND peer = ? AND session = ? AND part = ?", key
    ).fetchone()
    if known is not None:
        if known[0] != row.signed:
            subject = f"round {row.round}, session {row.session}, part {row.part}"
            detail = "signed two different receipts for the same hops"
            add_evidence(db, row.peer, CONTRADICTION, subject, detail, proof=known[0] + row.signed, at_s=received_s)
        return
    (count,) = db.execute(
        "SELECT count(*) FROM receipts WHERE round = ? AND peer = ?", (row.round, row.peer)
    ).fetchone()
    if count < max_per_round:
        db.execute("INSERT INTO receipts VALUES (?, ?, ?, ?, ?, ?, 0)", (*_keyed(row), row.signed, received_s))


def settle_again(db: sqlite3.Connection, round_id: RoundId) -> None:
    """Have a round worked out anew: its closing came, or another one, and with it more that may be earned."""
    db.execute("UPDATE receipts SET settled = 0 WHERE round = ?", (round_id,))


def due_rounds(db: sqlite3.Connection, *, quiet_since_s: float, waiting_since_s: float, limit: int) -> list[RoundId]:
    """Return rounds with unsettled receipts of which nothing new has come lately, or some have waited for long."""
    rows = db.execute(
        "SELECT round FROM receipts WHERE NOT settled GROUP BY round "
        "HAVING max(received_s) <= ? OR min(received_s) <= ? ORDER BY min(received_s) LIMIT ?",
        (quiet_since_s, waiting_since_s, limit),
    )
    return [RoundId(row[0]) for row in rows]


def receipts_of(db: sqlite3.Connection, round_id: RoundId) -> RoundReceipts:
    """Return all windows of a round, settled before or not, and what its closings credit."""
    rows = db.execute(
        "SELECT signed, peer, session, part FROM receipts WHERE round = ? ORDER BY peer, session, part", (round_id,)
    ).fetchall()
    caps = db.execute(
        "SELECT stage, peer, CAST(TOTAL(tokens) AS INTEGER) FROM round_credits WHERE round = ? GROUP BY stage, peer",
        (round_id,),
    )
    return RoundReceipts(
        signed=tuple(row[0] for row in rows),
        keys=tuple((PeerId(peer), session, part) for _, peer, session, part in rows),
        caps={(StageId(stage), PeerId(peer)): tokens for stage, peer, tokens in caps},
    )


def mark_settled(db: sqlite3.Connection, round_id: RoundId, keys: Iterable[tuple[PeerId, int, int]]) -> None:
    """Note that these windows have been taken into account."""
    db.executemany(
        "UPDATE receipts SET settled = 1 WHERE round = ? AND peer = ? AND session = ? AND part = ?",
        [(round_id, *key) for key in keys],
    )


def replace_disputes(
    db: sqlite3.Connection,
    round_id: RoundId,
    disputes: Iterable[tuple[int, StageId, PeerId, PeerId, str]],
    *,
    at_s: float,
) -> None:
    """Note what a round's receipts disagree on by now: what comes late may settle it."""
    db.execute("DELETE FROM disputes WHERE round = ?", (round_id,))
    db.executemany(
        "INSERT OR IGNORE INTO disputes VALUES (?, ?, ?, ?, ?, ?, ?)", [(round_id, *each, at_s) for each in disputes]
    )


def count_disputes(db: sqlite3.Connection) -> dict[PeerId, tuple[int, int]]:
    """Return of every peer that others quarrel with: how many hops, and with how many different partners."""
    rows = db.execute(
        """
        SELECT peer, count(*), count(DISTINCT other) FROM (
            SELECT caller AS peer, callee AS other FROM disputes UNION ALL SELECT callee, caller FROM disputes
        ) GROUP BY peer
        """
    )
    return {PeerId(peer): (hops, partners) for peer, hops, partners in rows}


def prune(db: sqlite3.Connection, *, before_s: float) -> None:
    """Forget receipts and disputes that nobody will ask for any more."""
    db.execute("DELETE FROM receipts WHERE settled AND received_s < ?", (before_s,))
    db.execute("DELETE FROM disputes WHERE at_s < ?", (before_s,))


def add_evidence(
    db: sqlite3.Connection, peer: PeerId, kind: str, subject: str, detail: str, *, proof: bytes, at_s: float
) -> None:
    """Keep what speaks against a peer; the same thing once."""
    db.execute(
        "INSERT OR IGNORE INTO evidence (peer, kind, subject, detail, proof, at_s) VALUES (?, ?, ?, ?, ?, ?)",
        (peer, kind, subject, detail, proof, at_s),
    )


def evidence_of(db: sqlite3.Connection, peer: PeerId) -> list[EvidenceRow]:
    """Return what speaks against a peer, oldest first."""
    rows = db.execute(
        "SELECT id, peer, kind, subject, detail, proof, at_s FROM evidence WHERE peer = ? ORDER BY id", (peer,)
    )
    return [
        EvidenceRow(id=number, peer=PeerId(who), kind=kind, subject=subject, detail=detail, proof=proof, at_s=at_s)
        for number, who, kind, subject, detail, proof, at_s in rows
    ]


def _keyed(row: ReceiptRow) -> tuple[PeerId, int, RoundId, int]:
    return row.peer, row.session, row.round, row.part


def handed_in(db: sqlite3.Connection, *, since_s: float, until_s: float) -> dict[PeerId, tuple[int, int]]:
    """Return in how many rounds, closed then, peers are credited with work, and of how many they say nothing."""
    query = """
        SELECT peer, count(DISTINCT round), count(DISTINCT CASE WHEN NOT EXISTS (
            SELECT 1 FROM receipts AS r WHERE r.peer = c.peer AND r.round = c.round
        ) THEN round END)
        FROM round_credits AS c WHERE tokens > 0 AND round IN (
            SELECT round FROM rounds WHERE closed_s >= ? AND closed_s < ?
        ) GROUP BY peer
    """
    return {PeerId(peer): (rounds, silent) for peer, rounds, silent in db.execute(query, (since_s, until_s))}
