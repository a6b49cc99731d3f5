"""Rows about who takes part: peers, what they host, and the run's few single values.

Owns: the SQL of `peers`, `replicas` and `settings`. Must not know: when a peer counts as lost, or why it was
given a stage. Plain functions on a connection; `Database.run` gives them their transaction.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from protocol.control import StageState
from protocol.ids import Lineage, PeerId, RoundId, StageId, Version

Presence = Literal["live", "lost", "left"]


@dataclass(frozen=True, slots=True, kw_only=True)
class PeerRow:
    """One peer as it is kept across restarts."""

    peer: PeerId
    session: int
    name: str
    capability: bytes
    admission: bytes
    presence: Presence
    state: str
    reason: str
    stages: tuple[StageId, ...]
    wanted: tuple[StageId, ...]
    addresses: tuple[str, ...]
    joined_s: float
    seen_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Sighting:
    """What changes about a peer from beat to beat."""

    peer: PeerId
    presence: Presence
    state: str
    reason: str
    stages: tuple[StageId, ...]
    addresses: tuple[str, ...]
    seen_s: float
    replicas: tuple[StageState, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaRow:
    """One replica as it was last reported."""

    peer: PeerId
    stage: StageId
    round: RoundId
    version: Version
    lineage: Lineage
    ready: bool
    members: int


def save_peer(db: sqlite3.Connection, row: PeerRow) -> None:
    """Insert or replace a peer at its registration. What it reported before stays acknowledged."""
    db.execute(
        """
        INSERT INTO peers (peer, session, name, capability, admission, presence, state, reason, stages, wanted,
                           addresses, joined_s, seen_s)
        VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)
        ON CONFLICT (peer) DO UPDATE SET
            session = excluded.session, name = excluded.name, capability = excluded.capability,
            admission = excluded.admission, presence = excluded.presence, state = excluded.state,
            reason = excluded.reason, stages = excluded.stages, wanted = excluded.wanted,
            addresses = excluded.addresses, seen_s = excluded.seen_s
        """,
        (
            row.peer,
            row.session,
            row.name,
            row.capability,
            row.admission,
            row.presence,
            row.state,
            row.reason,
            json.dumps(row.stages),
            json.dumps(row.wanted),
            json.dumps(row.addresses),
            row.joined_s,
            row.seen_s,
        ),
    )
    db.execute("DELETE FROM replicas WHERE peer = ?", (row.peer,))


def forget(db: sqlite3.Connection, gone: Iterable[PeerId]) -> None:
    """Drop peers, unless they are live: one of them may have just come back."""
    for peer in gone:
        if db.execute("DELETE FROM peers WHERE peer = ? AND presence != 'live'", (peer,)).rowcount:
            db.execute("DELETE FROM replicas WHERE peer = ?", (peer,))


def save_sightings(db: sqlite3.Connection, sightings: Iterable[Sighting]) -> None:
    """Write down how peers are."""
    for sighting in sightings:
        db.execute(
            "UPDATE peers SET presence = ?, state = ?, reason = ?, stages = ?, addresses = ?, seen_s = ?"
            " WHERE peer = ?",
            (
                sighting.presence,
                sighting.state,
                sighting.reason,
                json.dumps(sighting.stages),
                json.dumps(sighting.addresses),
                sighting.seen_s,
                sighting.peer,
            ),
        )
        db.execute("DELETE FROM replicas WHERE peer = ?", (sighting.peer,))
        db.executemany(
            "INSERT OR REPLACE INTO replicas VALUES (?, ?, ?, ?, ?, ?, ?)",
            [(sighting.peer, s.stage, s.round, s.version, s.lineage, s.ready, s.members) for s in sighting.replicas],
        )


def load_peers(db: sqlite3.Connection) -> list[PeerRow]:
    """Return every peer that ever registered, in the order of joining."""
    rows = db.execute(
        "SELECT peer, session, name, capability, admission, presence, state, reason, stages, wanted, addresses,"
        " joined_s, seen_s FROM peers ORDER BY joined_s, peer"
    )
    return [
        PeerRow(
            peer=PeerId(row[0]),
            session=row[1],
            name=row[2],
            capability=row[3],
            admission=row[4],
            presence=row[5],
            state=row[6],
            reason=row[7],
            stages=tuple(StageId(stage) for stage in json.loads(row[8])),
            wanted=tuple(StageId(stage) for stage in json.loads(row[9])),
            addresses=tuple(json.loads(row[10])),
            joined_s=row[11],
            seen_s=row[12],
        )
        for row in rows
    ]


def is_known(db: sqlite3.Connection, peer: str) -> bool:
    """Tell whether a peer ever registered."""
    return db.execute("SELECT 1 FROM peers WHERE peer = ?", (peer,)).fetchone() is not None


def load_replicas(db: sqlite3.Connection) -> list[ReplicaRow]:
    """Return the replicas of all peers as they were last written down."""
    rows = db.execute("SELECT peer, stage, round, version, lineage, ready, members FROM replicas ORDER BY stage, peer")
    return [
        ReplicaRow(
            peer=PeerId(peer),
            stage=StageId(stage),
            round=RoundId(round_id),
            version=Version(version),
            lineage=Lineage(lineage),
            ready=bool(ready),
            members=members,
        )
        for peer, stage, round_id, version, lineage, ready, members in rows
    ]


def get_setting(db: sqlite3.Connection, key: str) -> str | None:
    """Return a kept value, or None."""
    row = db.execute("SELECT value FROM settings WHERE key = ?", (key,)).fetchone()
    return None if row is None else str(row[0])


def drop_setting(db: sqlite3.Connection, key: str) -> None:
    """Forget a kept value."""
    db.execute("DELETE FROM settings WHERE key = ?", (key,))


def put_setting(db: sqlite3.Connection, key: str, value: str) -> None:
    """Keep a value."""
    db.execute("INSERT OR REPLACE INTO settings VALUES (?, ?)", (key, value))
