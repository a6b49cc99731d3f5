"""Closed rounds: adding them, and which closing of a round stands.

Owns: the SQL of `rounds` and `round_credits`. Must not know: whether a closing is believed.
"""

from __future__ import annotations

import sqlite3
from dataclasses import dataclass

from coordinator.store import receipts
from protocol.ids import Digest, PeerId, RoundId, StageId


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
    credits: tuple[tuple[StageId, PeerId, int], ...] = ()
    """Target tokens that each peer carried through each stage. What a commit keeps of a closing has none."""


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
    credited = db.executemany(
        "INSERT OR IGNORE INTO round_credits VALUES (?, ?, ?, ?, ?)",
        [(row.digest, row.round, *credit) for credit in row.credits],
    )
    if credited.rowcount > 0:
        receipts.settle_again(db, row.round)
    settle_round(db, row.round)


def settle_round(db: sqlite3.Connection, round_id: RoundId) -> None:
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


def last_evaluations(db: sqlite3.Connection, *, limit: int) -> list[tuple[RoundId, float]]:
    """Return the last rounds that were evaluated and go on, with their held-out loss in nats, the oldest first."""
    query = """
        SELECT round, heldout_loss_sum / heldout_tokens FROM rounds
        WHERE heldout_tokens > 0 AND NOT superseded
            AND NOT EXISTS (SELECT 1 FROM commits WHERE closing = rounds.digest AND gone)
        ORDER BY round DESC, digest LIMIT ?
    """
    return [(RoundId(number), loss) for number, loss in reversed(db.execute(query, (limit,)).fetchall())]
