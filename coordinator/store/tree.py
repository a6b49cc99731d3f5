"""Commits as a tree: where the replicas of a stage have parted, and which branches do not go on.

Owns: the SQL that follows commits to their parents and children, and the mark of what was given up. Must not know:
which branch should go on (`coordinator/forks.py`). Everything is looked up by lineage: what it costs depends on how far
branches are apart, never on how long the run has been going.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass

from coordinator.store.rounds import settle_round
from protocol.ids import Digest, Lineage, PeerId, RoundId, StageId, Version

MAX_LOOKUPS = 20_000  # of one walk: a tear of some weeks


@dataclass(frozen=True, slots=True, kw_only=True)
class CommitLink:
    """A vouched commit's place in its stage's tree, and what speaks for it."""

    stage: StageId
    round: RoundId
    version: Version
    lineage: Lineage
    parent: Lineage
    closing: tuple[Digest, PeerId]
    """And its clock's name: two halves may close a round with the same words."""
    tokens: int
    members: int
    takers: int
    """How many of the members have reported it."""


def paths(
    db: sqlite3.Connection, tips: Collection[Lineage], *, root: tuple[Lineage, Version]
) -> Mapping[Lineage, tuple[CommitLink, ...]]:
    """Return for each place in one stage's tree the commits that led there since all of them were one, newest first.

    `root` is where the stage's newest charter begins. A place that cannot be followed to where the others come from, or
    was given up, has no path.
    """
    links: dict[Lineage, CommitLink] = {}
    at = {tip: tip for tip in tips if _is_there(db, tip, root, links)}
    for _ in range(MAX_LOOKUPS):
        if len(set(at.values())) <= 1:
            break
        ahead = max(set(at.values()), key=lambda lineage: (_version(lineage, root, links), lineage))
        parent = links[ahead].parent if ahead in links else None
        if parent is None or not _is_there(db, parent, root, links):  # a report of it is missing
            at = {tip: place for tip, place in at.items() if place != ahead}
        else:
            at = {tip: parent if place == ahead else place for tip, place in at.items()}
    else:
        return {}
    ancestor = next(iter(at.values()), None)
    return {tip: tuple(_back_to(ancestor, tip, links)) for tip in at}


def known(db: sqlite3.Connection, lineages: Collection[Lineage]) -> set[Lineage]:
    """Return those of commits that go on, and that a member has signed."""
    return {lineage for lineage in lineages if _link(db, lineage) is not None}


def path_since(db: sqlite3.Connection, tip: Lineage, round_id: RoundId) -> tuple[CommitLink, ...]:
    """Return the commits that led to a place, newest first, as far as they are known and not older than a round."""
    found: list[CommitLink] = []
    while len(found) < MAX_LOOKUPS and (link := _link(db, tip)) is not None and link.round >= round_id:
        found.append(link)
        tip = link.parent
    return tuple(found)


def give_up(db: sqlite3.Connection, lineages: Iterable[Lineage], *, at_s: float) -> list[Lineage]:
    """Mark commits and all that follows them as in no state that goes on; return what was marked now."""
    marked: list[Lineage] = []
    waiting = list(lineages)
    while waiting:
        lineage = waiting.pop()
        mark = "UPDATE commits SET given_up_s = ? WHERE lineage = ? AND given_up_s IS NULL RETURNING round"
        if db.execute(mark, (at_s, lineage)).fetchall():
            marked.append(lineage)
            waiting += [child for (child,) in db.execute("SELECT lineage FROM commits WHERE parent = ?", (lineage,))]
    _settle_rounds_of(db, marked)
    return marked


def take_back(db: sqlite3.Connection, lineage: Lineage) -> list[Lineage]:
    """Unmark a commit and those that led to it: it goes on after all. Return what was unmarked."""
    unmarked: list[Lineage] = []
    while True:
        unmark = "UPDATE commits SET given_up_s = NULL WHERE lineage = ? AND given_up_s IS NOT NULL RETURNING parent"
        changed = db.execute(unmark, (lineage,)).fetchone()
        if changed is None:
            break
        unmarked.append(lineage)
        lineage = changed[0]
    _settle_rounds_of(db, unmarked)
    return unmarked


def given_up_s(db: sqlite3.Connection, lineage: Lineage) -> float | None:
    """Return when a lineage was given up; None if it was not."""
    row = db.execute("SELECT given_up_s FROM commits WHERE lineage = ?", (lineage,)).fetchone()
    return None if row is None else row[0]


def given_up(db: sqlite3.Connection) -> list[Lineage]:
    """Return every lineage that was given up."""
    return [lineage for (lineage,) in db.execute("SELECT lineage FROM commits WHERE given_up_s IS NOT NULL")]


def go_back(db: sqlite3.Connection, at: Mapping[StageId, Version], *, at_s: float) -> list[Lineage]:
    """Give up for good what leads beyond these versions under the charters that there are; return what is marked now.

    Also what is heard of later: a coordinator that was away does not know yet how far its peers have come.
    """
    marked: list[Lineage] = []
    for stage, version in at.items():
        (generation,) = db.execute(
            "SELECT coalesce(max(generation), 0) FROM charters WHERE stage = ?", (stage,)
        ).fetchone()
        covered = "DELETE FROM barriers WHERE stage = ? AND generation <= ? AND version >= ?"
        db.execute(covered, (stage, generation, version))
        db.execute("INSERT OR IGNORE INTO barriers VALUES (?, ?, ?, ?)", (stage, generation, version, at_s))
        query = "SELECT lineage FROM commits WHERE stage = ? AND version > ? AND NOT gone"
        lineages = [lineage for (lineage,) in db.execute(query, (stage, version)).fetchall()]
        give_up(db, lineages, at_s=at_s)
        mark_gone(db, lineages)
        marked += lineages
    return marked


@dataclass(frozen=True, slots=True)
class Barrier:
    """Where a stage has gone back to, and under which charter."""

    generation: int
    version: Version


def barriers(db: sqlite3.Connection) -> list[tuple[StageId, Barrier]]:
    """Return where stages have gone back to, the last time last."""
    found = db.execute("SELECT stage, generation, version FROM barriers ORDER BY generation")
    return [(stage, Barrier(generation, version)) for stage, generation, version in found]


def gone_since_s(db: sqlite3.Connection, stage: StageId, generation: int, version: Version) -> float | None:
    """Return since when a commit of this kind is gone; None if it is not."""
    query = "SELECT min(since_s) FROM barriers WHERE stage = ? AND generation >= ? AND version < ?"
    row = db.execute(query, (stage, generation, version)).fetchone()
    return None if row[0] is None else float(row[0])


def mark_gone(db: sqlite3.Connection, lineages: Iterable[Lineage]) -> None:
    """Note that what was given up does not go on, also if nobody stands anywhere else."""
    db.executemany("UPDATE commits SET gone = 1 WHERE lineage = ?", [(lineage,) for lineage in lineages])


def gone(db: sqlite3.Connection) -> list[Lineage]:
    """Return what was noted by `mark_gone`."""
    return [lineage for (lineage,) in db.execute("SELECT lineage FROM commits WHERE gone")]


def is_signed_by_member(db: sqlite3.Connection, parent: Lineage, signer: PeerId) -> bool:
    """Tell whether somebody is known to have taken a vouched commit as one of its members, and so may sign the next."""
    row = db.execute(
        "SELECT 1 FROM commits AS c JOIN commit_takers AS t ON t.digest = c.digest "
        "WHERE c.lineage = ? AND c.vouched AND t.peer = ?",
        (parent, signer),
    ).fetchone()
    return row is not None


def _link(db: sqlite3.Connection, lineage: Lineage) -> CommitLink | None:
    row = db.execute(
        """
        SELECT stage, round, version, lineage, parent, closing, clock, tokens, members,
               (SELECT count(*) FROM commit_takers AS t WHERE t.digest = c.digest)
        FROM commits AS c WHERE lineage = ? AND vouched AND given_up_s IS NULL
        """,
        (lineage,),
    ).fetchone()
    if row is None:
        return None
    stage, round_id, version, lineage, parent, closing, clock, tokens, members, takers = row
    return CommitLink(
        stage=stage,
        round=round_id,
        version=version,
        lineage=lineage,
        parent=parent,
        closing=(closing, clock),
        tokens=tokens,
        members=members,
        takers=takers,
    )


def _is_there(
    db: sqlite3.Connection, lineage: Lineage, root: tuple[Lineage, Version], links: dict[Lineage, CommitLink]
) -> bool:
    if lineage != root[0] and lineage not in links:
        link = _link(db, lineage)
        if link is None:
            return False
        links[lineage] = link
    return True


def _version(lineage: Lineage, root: tuple[Lineage, Version], links: Mapping[Lineage, CommitLink]) -> Version:
    return root[1] if lineage == root[0] else links[lineage].version


def _back_to(ancestor: Lineage | None, tip: Lineage, links: Mapping[Lineage, CommitLink]) -> Iterator[CommitLink]:
    while tip != ancestor:
        yield links[tip]
        tip = links[tip].parent


def _settle_rounds_of(db: sqlite3.Connection, lineages: Iterable[Lineage]) -> None:
    rounds = {
        round_id
        for lineage in lineages
        for (round_id,) in db.execute(
            "SELECT c.round FROM commits AS c JOIN rounds AS r ON r.digest = c.closing WHERE c.lineage = ?", (lineage,)
        )
    }
    for round_id in rounds:
        settle_round(db, round_id)
