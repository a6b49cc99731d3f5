"""Rows about what happened: reports and what they said, charters, checkpoints, events.

Owns: the SQL that appends history and reads single pieces of it back. Must not know: whether a report is
believed (`coordinator/ledger.py` checks before it writes). Sums over history are `tallies.py`.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable
from dataclasses import dataclass

from coordinator.store.peers import is_known
from protocol.control import AveragingReport, WorkReport
from protocol.ids import Digest, Lineage, PeerId, RoundId, StageId, Version

ROUNDS_KEPT = 8  # of whose commits the envelopes are kept; two halves of a swarm that meet again are soon in step


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
class ClosingRow:
    """One closed round."""

    digest: Digest
    signer: PeerId
    round: RoundId
    tasks_done: int
    tasks_lost: int
    loss_sum: float
    tokens: int
    heldout_loss_sum: float
    heldout_tokens: int


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


@dataclass(frozen=True, slots=True, kw_only=True)
class CommitLink:
    """A vouched commit's place in its stage's tree, and what speaks for it."""

    stage: StageId
    version: Version
    lineage: Lineage
    parent: Lineage
    closing: tuple[Digest, PeerId]
    """And its clock's name: two halves may close a round with the same words."""
    tokens: int
    members: int
    takers: int
    """How many of the members have reported it."""


Said = ClosingRow | CommitRow | AveragingReport | WorkReport


@dataclass(frozen=True, slots=True, kw_only=True)
class ReportEntry:
    """One numbered report; `said` is None if it is not believed."""

    sequence: int
    said: Said | None


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


def add_reports(db: sqlite3.Connection, peer: PeerId, entries: Iterable[ReportEntry], *, received_s: float) -> int:
    """Add what is new among a peer's reports; return up to which number they are stored.

    A peer numbers its reports upwards, with gaps, and repeats the oldest until they are acknowledged: a lower
    number than the newest acknowledged one is a repetition.
    """
    newest = acknowledged(db, peer)
    for entry in sorted(entries, key=lambda one: one.sequence):
        if entry.sequence <= newest:
            continue
        newest = entry.sequence
        _store(db, peer, entry, received_s)
    db.execute("UPDATE peers SET acknowledged = ? WHERE peer = ?", (newest, peer))
    return newest


def _store(db: sqlite3.Connection, peer: PeerId, entry: ReportEntry, received_s: float) -> None:
    """Store what a report says, if it is to be believed.

    Any member may have been clock or steward, so all that is asked of a signer is that it was let in once.
    """
    match entry.said:
        case ClosingRow() as closing if is_known(db, closing.signer):
            add_closing(db, closing, closed_s=received_s)
        case CommitRow() as commit if is_known(db, commit.signer):
            add_commit(db, commit, received_s=received_s)
            if commit.was_taken:
                add_taker(db, commit.digest, peer)
        case AveragingReport() as averaging:
            add_averaging(db, peer, entry.sequence, report=averaging, received_s=received_s)
        case WorkReport() as work:
            add_work(db, peer, entry.sequence, report=work)


def add_closing(db: sqlite3.Connection, row: ClosingRow, *, closed_s: float) -> None:
    """Add a closed round, unless it is known, and settle which closing of that round stands."""
    db.execute(
        "INSERT OR IGNORE INTO rounds VALUES (?, ?, 0, ?, ?, ?, ?, ?, ?, ?)",
        (
            row.digest,
            row.round,
            row.tasks_done,
            row.tasks_lost,
            row.loss_sum,
            row.tokens,
            row.heldout_loss_sum,
            row.heldout_tokens,
            closed_s,
        ),
    )
    _settle_round(db, row.round)


def add_commit(db: sqlite3.Connection, row: CommitRow, *, received_s: float) -> None:
    """Add a commit, unless it is known, and with it the closing that it sums up."""
    given_up_s = _given_up_s(db, row.parent)
    db.execute(
        "INSERT OR IGNORE INTO commits VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
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
            row.vouched,
            None,
        ),
    )
    if row.vouched:
        _keep_if_new(db, row)
    if given_up_s is not None:
        give_up(db, [row.lineage], at_s=given_up_s)
    add_closing(db, row.closing, closed_s=received_s)


def add_taker(db: sqlite3.Connection, digest: Digest, peer: PeerId) -> None:
    """Note that a named member took a commit's bytes."""
    db.execute("INSERT OR IGNORE INTO commit_takers VALUES (?, ?)", (digest, peer))


def newest_commits(db: sqlite3.Connection) -> list[bytes]:
    """Return the signed commits of the newest rounds of every stage, of its highest generation."""
    return [row[0] for row in db.execute("SELECT signed FROM signed_commits ORDER BY stage, digest")]


def commit_links(db: sqlite3.Connection, stage: StageId, generation: int, *, limit: int) -> list[CommitLink]:
    """Return the newest commits of a stage under one charter that were not given up, newest first."""
    rows = db.execute(
        """
        SELECT version, lineage, parent, closing, clock, tokens, members,
               (SELECT count(*) FROM commit_takers AS t WHERE t.digest = c.digest)
        FROM commits AS c WHERE stage = ? AND generation = ? AND vouched AND given_up_s IS NULL
        ORDER BY version DESC, lineage LIMIT ?
        """,
        (stage, generation, limit),
    )
    return [
        CommitLink(
            stage=stage,
            version=version,
            lineage=lineage,
            parent=parent,
            closing=(closing, clock),
            tokens=tokens,
            members=members,
            takers=takers,
        )
        for version, lineage, parent, closing, clock, tokens, members, takers in rows
    ]


def give_up(db: sqlite3.Connection, lineages: Iterable[Lineage], *, at_s: float) -> None:
    """Note that these commits and all that follows them are in no state that goes on, whenever they are reported."""
    rounds: set[RoundId] = set()
    waiting = list(lineages)
    while waiting:
        lineage = waiting.pop()
        row = db.execute("SELECT round FROM commits WHERE lineage = ? AND given_up_s IS NULL", (lineage,)).fetchone()
        if row is None:
            continue
        rounds.add(row[0])
        db.execute("UPDATE commits SET given_up_s = ? WHERE lineage = ?", (at_s, lineage))
        waiting += [child for (child,) in db.execute("SELECT lineage FROM commits WHERE parent = ?", (lineage,))]
    for round_id in rounds:
        if db.execute("SELECT 1 FROM rounds WHERE round = ?", (round_id,)).fetchone():
            _settle_round(db, round_id)


def given_up(db: sqlite3.Connection, *, limit: int) -> list[Lineage]:
    """Return the newest lineages that were given up."""
    newest = "given_up_s IS NOT NULL ORDER BY given_up_s DESC, version DESC LIMIT ?"
    return [lineage for (lineage,) in db.execute(f"SELECT lineage FROM commits WHERE {newest}", (limit,))]


def add_averaging(
    db: sqlite3.Connection, peer: PeerId, sequence: int, *, report: AveragingReport, received_s: float
) -> None:
    """Add one member's view of one attempt to average."""
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
    """Add what one peer did in one round."""
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
    """Append an event."""
    db.execute(
        "INSERT INTO events (at_s, kind, peer, detail) VALUES (?, ?, ?, ?)",
        (event.at_s, event.kind, event.peer, event.detail),
    )


def last_events(db: sqlite3.Connection, *, limit: int) -> list[Event]:
    """Return the newest events, newest first."""
    rows = db.execute("SELECT at_s, kind, peer, detail FROM events ORDER BY id DESC LIMIT ?", (limit,))
    return [
        Event(at_s=at_s, kind=kind, peer=None if peer is None else PeerId(peer), detail=detail)
        for at_s, kind, peer, detail in rows
    ]


def _settle_round(db: sqlite3.Connection, round_id: RoundId) -> None:
    """Mark all closings of a round but one as superseded.

    The one that stands is what commits of the highest generation were made under, then of most stages, then
    the latest: a closing that no commit names (the last round has none), or none that goes on, stands only if there is
    no other.
    """
    standing = db.execute(
        """
        SELECT digest FROM rounds LEFT JOIN (
            SELECT closing, max(generation) AS generation, count(*) AS stages FROM commits
            WHERE closing IN (SELECT digest FROM rounds WHERE round = :round) AND given_up_s IS NULL GROUP BY closing
        ) AS named ON named.closing = digest
        WHERE round = :round
        ORDER BY coalesce(generation, 0) DESC, coalesce(stages, 0) DESC, closed_s DESC, digest LIMIT 1
        """,
        {"round": round_id},
    ).fetchone()[0]
    db.execute("UPDATE rounds SET superseded = (digest <> ?) WHERE round = ?", (standing, round_id))


def _given_up_s(db: sqlite3.Connection, parent: Lineage) -> float | None:
    """Return when a lineage was given up; None if it was not."""
    row = db.execute("SELECT given_up_s FROM commits WHERE lineage = ?", (parent,)).fetchone()
    return None if row is None else row[0]


def _keep_if_new(db: sqlite3.Connection, row: CommitRow) -> None:
    """Keep the envelopes of a stage's newest rounds: what its newest commit is may depend on what is given up."""
    db.execute(
        "INSERT OR IGNORE INTO signed_commits VALUES (?, ?, ?, ?, ?)",
        (row.digest, row.stage, row.generation, row.closing.round, row.signed),
    )
    db.execute(
        """
        DELETE FROM signed_commits WHERE stage = :stage AND (generation, round) <= (
            SELECT generation, round - :kept FROM signed_commits WHERE stage = :stage
            ORDER BY generation DESC, round DESC LIMIT 1
        )
        """,
        {"stage": row.stage, "kept": ROUNDS_KEPT},
    )
