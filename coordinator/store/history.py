"""Rows about what happened: reports and what they said, charters, checkpoints, events.

Owns: the SQL that appends history and reads single pieces of it back. Must not know: whether a report is
believed (`coordinator/ledger.py` checks before it writes). Sums over history are `tallies.py`.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable
from dataclasses import dataclass

from coordinator.store import tree
from coordinator.store.peers import is_known
from coordinator.store.receipts import ReceiptRow, add_receipt
from coordinator.store.rounds import ClosingRow, add_closing
from protocol.control import AveragingReport, WorkReport
from protocol.ids import Digest, Lineage, PeerId, RoundId, StageId, Version

MAX_TIPS = 16  # of a stage whose envelopes are kept: more branches than a swarm can be torn into by accident

MAX_WORK_PER_ROUND, MAX_AVERAGINGS_PER_ROUND = 8, 32
"""Of one peer, and of averages also of one stage: it may come back, and a round may be worked on again."""
KEPT_EVENTS = 100_000  # some 20 MB; a swarm of a hundred that is restarted daily makes as many in a year


@dataclass(frozen=True, slots=True, kw_only=True)
class CharterRow:
    """One charter as issued; `signed` is the envelope's bytes."""

    stage: StageId
    generation: int
    round: RoundId
    version: Version
    signed: bytes
    issued_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class CommitRow:
    """One stage's commit, and the closing that it was made under."""

    digest: Digest
    signer: PeerId
    stage: StageId
    generation: int
    version: Version
    lineage: Lineage
    parent: Lineage
    closing: ClosingRow
    members: int
    tokens: int
    """What its contributors had accumulated."""
    dropped: int
    double_counted: int
    solo: bool
    was_taken: bool
    """The reporting peer is a member, and so took the committed bytes."""
    vouched: bool
    """A member signed it: only then does it say how far its stage has come."""
    signed: bytes


@dataclass(frozen=True, slots=True)
class ReceiptEntry:
    """Receipts, and how many of a peer and a round are enough."""

    row: ReceiptRow
    max_per_round: int


Said = ClosingRow | CommitRow | AveragingReport | WorkReport | ReceiptEntry


@dataclass(frozen=True, slots=True, kw_only=True)
class ReportEntry:
    """One numbered report; `said` is None if it is not believed."""

    sequence: int
    said: Said | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Stored:
    """What came of a peer's reports."""

    acknowledged: int
    given_up: tuple[Lineage, ...]
    """Of commits that follow one that was given up."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointRow:
    """One collected checkpoint."""

    round: RoundId
    num_bytes: int
    seconds: float
    collected_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """Something that an organiser would want to have seen."""

    at_s: float
    kind: str
    peer: PeerId | None
    detail: str


def acknowledged(db: sqlite3.Connection, peer: PeerId) -> int:
    """Return the highest sequence number of this peer that is on disk."""
    row = db.execute("SELECT acknowledged FROM peers WHERE peer = ?", (peer,)).fetchone()
    return int(row[0]) if row else 0


def add_reports(db: sqlite3.Connection, peer: PeerId, entries: Iterable[ReportEntry], *, received_s: float) -> Stored:
    """Add what is new among a peer's reports.

    A peer numbers its reports upwards, with gaps, and repeats the oldest until they are acknowledged: a lower
    number than the newest acknowledged one is a repetition.
    """
    newest, given_up = acknowledged(db, peer), []
    for entry in sorted(entries, key=lambda one: one.sequence):
        if entry.sequence <= newest:
            continue
        newest = entry.sequence
        given_up += _store(db, peer, entry, received_s)
    db.execute("UPDATE peers SET acknowledged = ? WHERE peer = ?", (newest, peer))
    return Stored(acknowledged=newest, given_up=tuple(given_up))


def _store(db: sqlite3.Connection, peer: PeerId, entry: ReportEntry, received_s: float) -> list[Lineage]:
    """Store what a report says, if it is to be believed; return what is given up with it.

    Any member may have been clock or steward, so all that is asked of a signer is that it was let in once.
    """
    given_up: list[Lineage] = []
    match entry.said:
        case ClosingRow() as closing if is_known(db, closing.signer):
            add_closing(db, closing, closed_s=received_s)
        case CommitRow() as commit if is_known(db, commit.signer):
            given_up = add_commit(db, commit, received_s=received_s)
            if commit.was_taken:
                add_taker(db, commit.digest, peer)
        case AveragingReport() as averaging:
            add_averaging(db, peer, entry.sequence, report=averaging, received_s=received_s)
        case WorkReport() as work:
            add_work(db, peer, entry.sequence, report=work)
        case ReceiptEntry(row, max_per_round):
            add_receipt(db, row, received_s=received_s, max_per_round=max_per_round)
    return given_up


def add_commit(db: sqlite3.Connection, row: CommitRow, *, received_s: float) -> list[Lineage]:
    """Add a commit, unless it is known, and with it the closing that it sums up; return what is given up with it.

    Who first reported it may have had nothing to show that a member had signed it; the next one may.
    """
    vouched = row.vouched or tree.is_signed_by_member(db, row.parent, row.signer)
    db.execute(
        "INSERT INTO commits VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, NULL, 0) "
        "ON CONFLICT (digest) DO UPDATE SET vouched = max(vouched, excluded.vouched)",
        (
            row.digest,
            row.stage,
            row.closing.round,
            row.generation,
            row.version,
            row.lineage,
            row.closing.digest,
            row.members,
            row.tokens,
            row.dropped,
            row.double_counted,
            row.solo,
            received_s,
            row.parent,
            row.closing.signer,
            vouched,
        ),
    )
    gone_s = tree.gone_since_s(db, row.stage, row.generation, row.version)
    given_up_s = tree.given_up_s(db, row.parent) if gone_s is None else gone_s
    given_up = [] if given_up_s is None else tree.give_up(db, [row.lineage], at_s=given_up_s)
    if gone_s is not None:
        tree.mark_gone(db, given_up)
    if vouched:
        _keep_if_tip(db, row)
    add_closing(db, row.closing, closed_s=received_s)
    return given_up


def add_taker(db: sqlite3.Connection, digest: Digest, peer: PeerId) -> None:
    """Note that a named member took a commit's bytes."""
    db.execute("INSERT OR IGNORE INTO commit_takers VALUES (?, ?)", (digest, peer))


def newest_commits(db: sqlite3.Connection) -> list[bytes]:
    """Return the signed commits that nothing follows and that go on, of every stage's highest generation."""
    rows = db.execute(
        "SELECT signed FROM signed_commits AS s JOIN commits AS c USING (digest) WHERE c.given_up_s IS NULL "
        "ORDER BY s.stage, s.digest"
    )
    return [row[0] for row in rows]


def add_averaging(
    db: sqlite3.Connection, peer: PeerId, sequence: int, *, report: AveragingReport, received_s: float
) -> None:
    """Add one member's view of one attempt to average, unless it has said more than enough of that round."""
    of = report.stage, report.round, peer
    (count,) = db.execute("SELECT count(*) FROM averagings WHERE stage = ? AND round = ? AND peer = ?", of).fetchone()
    if count >= MAX_AVERAGINGS_PER_ROUND:
        return
    db.execute(
        "INSERT OR IGNORE INTO averagings VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
        (
            peer,
            sequence,
            report.stage,
            report.round,
            report.ballot,
            report.members,
            report.asked,
            report.ok,
            report.reason,
            report.bytes_sent,
            report.bytes_received,
            report.seconds,
            received_s,
            report.group,
            report.hidden_seconds,
        ),
    )


def add_work(db: sqlite3.Connection, peer: PeerId, sequence: int, *, report: WorkReport) -> None:
    """Add what one peer did in one round, unless it has said more than enough of it."""
    (count,) = db.execute("SELECT count(*) FROM work WHERE round = ? AND peer = ?", (report.round, peer)).fetchone()
    if count >= MAX_WORK_PER_ROUND:
        return
    db.execute(
        "INSERT OR IGNORE INTO work VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
        (
            peer,
            sequence,
            report.round,
            report.tasks_fed,
            report.tasks_resent,
            report.hops,
            report.activation_bytes,
            report.target_tokens,
            report.seconds,
            report.compute_seconds,
        ),
    )


def add_charters(db: sqlite3.Connection, rows: Iterable[CharterRow]) -> None:
    """Add newly issued charters, all or none."""
    db.executemany(
        "INSERT INTO charters VALUES (?, ?, ?, ?, ?, ?)",
        [(row.stage, row.generation, row.round, row.version, row.signed, row.issued_s) for row in rows],
    )


def newest_charters(db: sqlite3.Connection) -> list[CharterRow]:
    """Return the charter of the highest generation of every stage."""
    rows = db.execute(
        """
        SELECT stage, generation, round, version, signed, issued_s FROM charters AS c
        WHERE generation = (SELECT max(generation) FROM charters WHERE stage = c.stage) ORDER BY stage
        """
    )
    return [
        CharterRow(
            stage=StageId(stage),
            generation=generation,
            round=RoundId(round_id),
            version=Version(version),
            signed=signed,
            issued_s=issued_s,
        )
        for stage, generation, round_id, version, signed, issued_s in rows
    ]


def add_checkpoint(db: sqlite3.Connection, row: CheckpointRow) -> None:
    """Add a checkpoint that is complete on disk."""
    db.execute(
        "INSERT OR REPLACE INTO checkpoints VALUES (?, ?, ?, ?)",
        (row.round, row.num_bytes, row.seconds, row.collected_s),
    )


def remove_checkpoints(db: sqlite3.Connection, rounds: Iterable[RoundId]) -> None:
    """Forget checkpoints that are no longer on disk."""
    db.executemany("DELETE FROM checkpoints WHERE round = ?", [(round_id,) for round_id in rounds])


def load_checkpoints(db: sqlite3.Connection) -> list[CheckpointRow]:
    """Return the checkpoints, oldest first."""
    rows = db.execute("SELECT round, bytes, seconds, collected_s FROM checkpoints ORDER BY round")
    return [
        CheckpointRow(round=RoundId(round_id), num_bytes=num_bytes, seconds=seconds, collected_s=collected_s)
        for round_id, num_bytes, seconds, collected_s in rows
    ]


def add_event(db: sqlite3.Connection, event: Event) -> None:
    """Append an event; the oldest ones make room for it."""
    added = db.execute(
        "INSERT INTO events (at_s, kind, peer, detail) VALUES (?, ?, ?, ?)",
        (event.at_s, event.kind, event.peer, event.detail),
    )
    db.execute("DELETE FROM events WHERE id <= ?", ((added.lastrowid or 0) - KEPT_EVENTS,))


def last_events(db: sqlite3.Connection, *, limit: int) -> list[Event]:
    """Return the newest events, newest first."""
    rows = db.execute("SELECT at_s, kind, peer, detail FROM events ORDER BY id DESC LIMIT ?", (limit,))
    return [
        Event(at_s=at_s, kind=kind, peer=None if peer is None else PeerId(peer), detail=detail)
        for at_s, kind, peer, detail in rows
    ]


def _keep_if_tip(db: sqlite3.Connection, row: CommitRow) -> None:
    """Keep a commit's envelope as long as nothing follows it, and its stage has no newer charter."""
    before = "SELECT digest FROM commits WHERE lineage = ?"
    db.execute(f"DELETE FROM signed_commits WHERE digest = ({before})", (row.parent,))
    followed = db.execute("SELECT 1 FROM commits WHERE parent = ? AND vouched", (row.lineage,)).fetchone()
    if followed is None:
        db.execute(
            "INSERT OR IGNORE INTO signed_commits VALUES (?, ?, ?, ?, ?)",
            (row.digest, row.stage, row.generation, row.closing.round, row.signed),
        )
    db.execute(
        """
        DELETE FROM signed_commits WHERE stage = :stage AND digest NOT IN (
            SELECT digest FROM signed_commits WHERE stage = :stage
            AND generation = (SELECT max(generation) FROM signed_commits WHERE stage = :stage)
            ORDER BY round DESC, digest LIMIT :kept
        )
        """,
        {"stage": row.stage, "kept": MAX_TIPS},
    )
