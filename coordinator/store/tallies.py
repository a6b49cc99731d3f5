"""Sums over history: the ledger's counters, loss curves, throughput, the newest averagings.

Owns: the SQL that adds up. Must not know: how a number is shown. Every counter is computed from stored
reports and charters at the moment it is asked for; nothing is counted in memory, so a restart can neither
lose nor double one.

Sums of what strangers report use TOTAL, which cannot overflow and raise as SUM does.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import median

from protocol.ids import PeerId, RoundId, StageId, Version

RECENT_ROUNDS = 5  # over which throughput is averaged: a few, so that it follows who comes and goes


@dataclass(frozen=True, slots=True, kw_only=True)
class Counters:
    """The ledger's counters over the whole run (design, words)."""

    tasks_done: int
    tasks_resent: int
    tasks_lost: int
    tokens: int
    tokens_dropped: int
    """Accumulated, and not in the model: never averaged, or in updates that were rolled back."""
    double_counted: int
    averagings_ok: int
    """Pairs of stage and round in which two or more named members took the same committed bytes."""
    averagings_failed: int
    """Attempts (stage, round, ballot) that nobody saw succeed."""
    rounds_solo: int
    """Pairs of stage and round that one replica committed alone."""
    rounds_rolled_back: int
    """Committed updates, one per stage and round, that are not in the state to which the stage was restored; and those
    of the half of a torn swarm that does not go on."""
    hops: int
    activation_bytes: int
    peers_joined: int
    peers_lost: int
    peers_left: int


@dataclass(frozen=True, slots=True, kw_only=True)
class RoundTally:
    """One closed round. `loss` is nats per training token; `heldout_loss` that of the state it started from."""

    round: RoundId
    tasks_done: int
    tasks_lost: int
    tokens: int
    loss: float | None
    heldout_loss: float | None
    heldout_tokens: int
    closed_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Course:
    """How training went so far: the closed rounds that stand, as far as anybody shows them."""

    rounds_trained: int
    newest: RoundId | None
    """The newest of all, one that only evaluates among them."""
    first: RoundTally | None
    last: RoundTally | None
    evaluated: RoundTally | None
    """The newest one with a held-out loss."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rollback:
    """What a stage lost: founded again on an older state than its last commit had led to, or torn in two."""

    stage: StageId
    generation: int
    """Of the charter that founded it again, or under which it was torn."""
    torn: bool
    """These are the commits of the half that does not go on."""
    version_before: Version
    version: Version
    """Founded on, or up to which the halves had been one."""
    rounds: int
    """Committed rounds whose updates are gone."""
    tokens: int
    """In those updates."""
    at_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class LastAveraging:
    """The newest attempt to average a stage: `took_part` of `asked` replicas."""

    stage: StageId
    round: RoundId
    ballot: int
    ok: bool
    reason: str
    took_part: int
    asked: int
    group: str
    """Its hash, in hex: the same for all who averaged together. Empty if they do not agree on it."""
    bytes_sent: int
    bytes_received: int
    seconds: float
    hidden_share: float
    """Of the seconds: for how many the stage went on training."""


_REPORTED = """
    SELECT CAST(TOTAL(tasks_resent) AS INTEGER), CAST(TOTAL(hops) AS INTEGER),
           CAST(TOTAL(activation_bytes) AS INTEGER) FROM work
"""
_CLOSED = """
    SELECT CAST(TOTAL(tasks_done) AS INTEGER), CAST(TOTAL(tasks_lost) AS INTEGER), CAST(TOTAL(tokens) AS INTEGER)
    FROM rounds WHERE NOT superseded
"""
# Commits of rounds that were trained again stay in: what was dropped or counted twice there did happen.
_COMMITTED = """
    SELECT CAST(TOTAL(dropped) AS INTEGER), CAST(TOTAL(double_counted) AS INTEGER) FROM commits
"""
_AVERAGED = """
    SELECT count(*) FROM (
        SELECT DISTINCT stage, round FROM commits
        WHERE NOT solo AND (SELECT count(*) FROM commit_takers AS t WHERE t.digest = commits.digest) >= 2
    )
"""
_FAILED = "SELECT count(*) FROM (SELECT 1 FROM averagings GROUP BY stage, round, ballot HAVING max(ok) = 0)"
_SOLO = "SELECT count(*) FROM (SELECT DISTINCT stage, round FROM commits WHERE solo)"
_EVENTS = "SELECT kind, count(*) FROM events WHERE kind IN ('peer.joined', 'peer.lost', 'peer.left') GROUP BY kind"


# What the lost half of a torn swarm had committed. Every commit there is an update of its own.
_TORN = """
    SELECT stage, generation, 1, max(version), min(version) - 1, count(*), CAST(TOTAL(tokens) AS INTEGER), given_up_s
    FROM commits WHERE given_up_s IS NOT NULL GROUP BY stage, generation, given_up_s
"""
# The first later charter that began below a commit took it back; what was trained anew can be taken back again.
# Rival commits of one place in a lineage are one update.
_ROLLED_BACK = f"""
    SELECT gone.stage, h.generation, 0, max(gone.version), h.version, count(*), CAST(TOTAL(gone.tokens) AS INTEGER),
           h.issued_s AS at_s
    FROM (
        SELECT c.stage, max(c.version) AS version, max(c.tokens) AS tokens, min(later.generation) AS taken_back_by
        FROM charters AS later
        JOIN commits AS c ON c.stage = later.stage AND c.generation < later.generation AND c.version > later.version
        WHERE later.generation > 1 AND c.given_up_s IS NULL GROUP BY c.stage, c.generation, c.round
    ) AS gone
    JOIN charters AS h ON h.stage = gone.stage AND h.generation = gone.taken_back_by
    GROUP BY gone.stage, h.generation UNION ALL {_TORN} ORDER BY at_s DESC, 1
"""


def counters(db: sqlite3.Connection) -> Counters:
    """Add everything up."""
    rolled_back = rollbacks(db)
    resent, hops, activation_bytes = db.execute(_REPORTED).fetchone()
    done, lost, tokens = db.execute(_CLOSED).fetchone()
    dropped, doubled = db.execute(_COMMITTED).fetchone()
    events: dict[str, int] = dict(db.execute(_EVENTS).fetchall())
    return Counters(
        tasks_done=done,
        tasks_resent=resent,
        tasks_lost=lost,
        tokens=tokens,
        tokens_dropped=dropped + sum(rollback.tokens for rollback in rolled_back),
        double_counted=doubled,
        averagings_ok=db.execute(_AVERAGED).fetchone()[0],
        averagings_failed=db.execute(_FAILED).fetchone()[0],
        rounds_solo=db.execute(_SOLO).fetchone()[0],
        rounds_rolled_back=sum(rollback.rounds for rollback in rolled_back),
        hops=hops,
        activation_bytes=activation_bytes,
        peers_joined=events.get("peer.joined", 0),
        peers_lost=events.get("peer.lost", 0),
        peers_left=events.get("peer.left", 0),
    )


def rollbacks(db: sqlite3.Connection) -> list[Rollback]:
    """Return what was lost whenever a stage was founded again, or torn, the newest first."""
    return [
        Rollback(
            stage=StageId(stage),
            generation=generation,
            torn=bool(torn),
            version_before=Version(before),
            version=Version(version),
            rounds=rounds,
            tokens=tokens,
            at_s=at_s,
        )
        for stage, generation, torn, before, version, rounds, tokens, at_s in db.execute(_ROLLED_BACK)
    ]


def round_tallies(db: sqlite3.Connection) -> list[RoundTally]:
    """Return the closed rounds that stand, oldest first."""
    return _tallies(db, "1 ORDER BY round")


def course(db: sqlite3.Connection) -> Course:
    """Return how training went so far; a run's many rounds are counted, not loaded."""
    newest = db.execute("SELECT max(round) FROM rounds WHERE NOT superseded").fetchone()[0]
    return Course(
        rounds_trained=db.execute("SELECT count(*) FROM rounds WHERE NOT superseded AND tokens > 0").fetchone()[0],
        newest=None if newest is None else RoundId(newest),
        first=_tally(db, "tokens > 0 ORDER BY round"),
        last=_tally(db, "tokens > 0 ORDER BY round DESC"),
        evaluated=_tally(db, "heldout_tokens > 0 ORDER BY round DESC"),
    )


def _tally(db: sqlite3.Connection, which: str) -> RoundTally | None:
    return next(iter(_tallies(db, f"{which} LIMIT 1")), None)


def _tallies(db: sqlite3.Connection, which: str) -> list[RoundTally]:
    """Return the closed rounds that stand and fulfil a condition of ours, in its order."""
    rows = db.execute(
        "SELECT round, tasks_done, tasks_lost, tokens, loss_sum, heldout_loss_sum, heldout_tokens, closed_s"
        f" FROM rounds WHERE NOT superseded AND {which}"
    )
    return [
        RoundTally(
            round=RoundId(round_id),
            tasks_done=done,
            tasks_lost=lost,
            tokens=tokens,
            loss=loss_sum / tokens if tokens else None,
            heldout_loss=heldout_sum / heldout_tokens if heldout_tokens else None,
            heldout_tokens=heldout_tokens,
            closed_s=closed_s,
        )
        for round_id, done, lost, tokens, loss_sum, heldout_sum, heldout_tokens, closed_s in rows
    ]


def is_evaluated(db: sqlite3.Connection, round_id: RoundId | int) -> bool:
    """Tell whether a round was closed with a held-out loss."""
    row = db.execute("SELECT 1 FROM rounds WHERE round = ? AND NOT superseded AND heldout_tokens > 0", (round_id,))
    return row.fetchone() is not None


def tokens_per_s(db: sqlite3.Connection) -> float | None:
    """Return training tokens per second over the newest rounds, by the peers' own clocks; None before there are any.

    Our own receiving times would do until we are away for an hour and get all reports at once. Of the seconds
    that peers report for a round the median counts: some joined in its middle.
    """
    tokens, seconds = 0, 0.0
    for tally in _tallies(db, f"tokens > 0 ORDER BY round DESC LIMIT {RECENT_ROUNDS}"):
        reported = [row[0] for row in db.execute("SELECT seconds FROM work WHERE round = ?", (tally.round,))]
        if reported:
            tokens += tally.tokens
            seconds += median(reported)
    return tokens / seconds if seconds > 0 else None


def last_averagings(db: sqlite3.Connection) -> list[LastAveraging]:
    """Return the newest attempt of every stage that ever tried.

    Bytes are those of all members together; seconds are the slowest member's, and what is hidden is the mean.
    """
    rows = db.execute(
        """
        SELECT a.stage, a.round, a.ballot, max(a.ok), max(CASE WHEN a.ok THEN '' ELSE a.reason END), max(a.members),
               max(a.asked), CASE WHEN count(DISTINCT a.reduce_group) = 1 THEN hex(max(a.reduce_group)) ELSE '' END,
               CAST(TOTAL(a.bytes_sent) AS INTEGER), CAST(TOTAL(a.bytes_received) AS INTEGER), max(a.seconds),
               CASE WHEN TOTAL(a.seconds) > 0 THEN TOTAL(a.hidden_seconds) / TOTAL(a.seconds) ELSE 0 END
        FROM averagings AS a
        JOIN (
            SELECT stage, round, max(ballot) AS ballot FROM averagings AS b
            WHERE round = (SELECT max(round) FROM averagings WHERE stage = b.stage) GROUP BY stage, round
        ) AS newest ON a.stage = newest.stage AND a.round = newest.round AND a.ballot = newest.ballot
        GROUP BY a.stage ORDER BY a.stage
        """
    )
    return [
        LastAveraging(
            stage=StageId(stage),
            round=RoundId(round_id),
            ballot=ballot,
            ok=bool(ok),
            reason="" if ok else reason,
            took_part=members,
            asked=asked,
            group=group.lower(),
            bytes_sent=sent,
            bytes_received=received,
            seconds=seconds,
            hidden_share=min(1.0, hidden_share),
        )
        for stage, round_id, ballot, ok, reason, members, asked, group, sent, received, seconds, hidden_share in rows
    ]


def tokens_by_peer(db: sqlite3.Connection) -> Mapping[PeerId, int]:
    """Return how many target tokens each peer says it worked on."""
    rows = db.execute("SELECT peer, CAST(TOTAL(target_tokens) AS INTEGER) FROM work GROUP BY peer")
    return {PeerId(peer): tokens for peer, tokens in rows}
