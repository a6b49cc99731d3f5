"""What audits have found, and where every peer stands by them. Plain functions on a connection.

Owns: the SQL of `audits` and `standings`. Must not know: what is done about it (`coordinator/audit/`).
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from protocol.ids import PeerId, RoundId, StageId


@dataclass(frozen=True, slots=True, kw_only=True)
class AuditRow:
    """One audit that has ended. Distances are relative; liars and missing are peers that answered wrongly or not."""

    at_s: float
    peer: PeerId
    auditor: PeerId
    round: RoundId
    number: int
    first_stage: StageId
    num_stages: int
    finding: str
    outputs: float
    returned: float
    liars: tuple[PeerId, ...] = ()
    missing: tuple[PeerId, ...] = ()
    seed: bytes = b""


def add_audit(db: sqlite3.Connection, row: AuditRow) -> None:
    """Keep what an audit has found."""
    db.execute(
        "INSERT INTO audits (at_s, peer, auditor, round, number, first_stage, num_stages, finding, outputs, returned, "
        "liars, missing, seed) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
        (
            *(row.at_s, row.peer, row.auditor, row.round, row.number, row.first_stage, row.num_stages, row.finding),
            *(row.outputs, row.returned, json.dumps(row.liars), json.dumps(row.missing), row.seed),
        ),
    )


def audits_of(db: sqlite3.Connection, peer: PeerId, *, limit: int = 1000) -> list[AuditRow]:
    """Return the audits of a peer, newest first: of its work, or in which it was found to lie."""
    rows = db.execute(
        "SELECT at_s, peer, auditor, round, number, first_stage, num_stages, finding, outputs, returned, liars, "
        "missing, seed FROM audits WHERE peer = ? OR liars LIKE ? ORDER BY id DESC LIMIT ?",
        (peer, f'%"{peer}"%', limit),
    )
    return [
        AuditRow(
            at_s=at_s,
            peer=PeerId(who),
            auditor=PeerId(auditor),
            round=RoundId(round_id),
            number=number,
            first_stage=StageId(first),
            num_stages=count,
            finding=finding,
            outputs=outputs,
            returned=returned,
            liars=tuple(json.loads(liars)),
            missing=tuple(json.loads(missing)),
            seed=seed,
        )
        for at_s, who, auditor, round_id, number, first, count, finding, outputs, returned, liars, missing, seed in rows
    ]


def count_findings(db: sqlite3.Connection) -> dict[PeerId, dict[str, int]]:
    """Return how often audits of each peer have ended how."""
    found: dict[PeerId, dict[str, int]] = {}
    for peer, finding, count in db.execute("SELECT peer, finding, count(*) FROM audits GROUP BY peer, finding"):
        found.setdefault(PeerId(peer), {})[finding] = count
    return found


def prune_audits(db: sqlite3.Connection, *, before_s: float) -> None:
    """Forget what is old and has found nothing; what speaks against somebody stays."""
    db.execute("DELETE FROM audits WHERE at_s < ? AND finding IN ('valid', 'nothing')", (before_s,))


def put_standing(db: sqlite3.Connection, peer: PeerId, standing: Mapping[str, Any]) -> None:
    """Keep where a peer stands."""
    db.execute("INSERT OR REPLACE INTO standings VALUES (?, ?)", (peer, json.dumps(standing, sort_keys=True)))


def drop_standing(db: sqlite3.Connection, peer: PeerId) -> None:
    """Forget where a key stands that was replaced: its successor stands there."""
    db.execute("DELETE FROM standings WHERE peer = ?", (peer,))


def load_standings(db: sqlite3.Connection) -> dict[PeerId, dict[str, Any]]:
    """Return where everybody stands."""
    return {PeerId(peer): json.loads(text) for peer, text in db.execute("SELECT peer, standing FROM standings")}
