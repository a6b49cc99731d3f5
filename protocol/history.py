"""Asking about a stage's recent past. Pure messages.

Owns: what a joiner asks before it has any state (`StateRequest`, to a replica, or to the coordinator if there is none)
and while it replays (`LogRequest`). Must not know: who keeps what of it. The bytes themselves are blobs:
`state/STAGE/VERSION/PART`, `update/STAGE/VERSION` (the bytes that take VERSION to the next one), and
`staged/STAGE/DIGEST` (bytes that are summed but not committed yet).
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from protocol.control import Snapshot
from protocol.ids import Lineage, StageId, Version
from protocol.rounds.messages import MAX_COMMITS_PER_ANSWER
from protocol.signing import Signed
from protocol.wire import Message


class StateRequest(Message):
    """Where does this stage stand, as far as you know, and which snapshots of it do you serve?"""

    stage: StageId
    standing: Lineage | None = None
    """Where the asking peer stands itself, by what lies on its disk."""


class StateAnswer(Message):
    """`charter` is the newest known; `commit` the newest under it (None right after the charter).

    A replica names the newest commit that it has applied. The coordinator names the newest that it was told of, and
    leaves `snapshots` empty: it serves checkpoints, by another name.
    """

    charter: Signed | None
    commit: Signed | None
    version: Version
    lineage: Lineage
    snapshots: Annotated[tuple[Snapshot, ...], Field(max_length=8)]
    is_lost: bool = False
    """The coordinator's word: where the asking peer stands was given up with the lost half of a torn swarm."""


class LogRequest(Message):
    """Which commits did your replica apply from `since` on?"""

    stage: StageId
    since: Version


class LogAnswer(Message):
    """Consecutive commits, the first of which was applied to `since`; empty if it is not kept or not there yet."""

    commits: Annotated[tuple[Signed, ...], Field(max_length=MAX_COMMITS_PER_ANSWER)]


class CommitNews(Message):
    """To a neighbouring stage: this is our newest commit, route to these members from now on."""

    commit: Signed
