"""Going on from this peer's own disk when no other replica is there to vouch for what lies on it.

Owns: the rule by which a state of ours is still the stage's (`find_path`, pure), and walking from there along our own
log of commits. Must not know: seats, ballots, where else a state could come from (`restore.py` does).

The witness is the coordinator. Its charter says where the stage's history begins at present, so whatever was rolled
back is out; the newest commit that was reported under it says what has been reached for sure. A state is taken if our
own log leads from it through that place, or from that place through it, and then as far as the log goes. So it is never
older than what the swarm is known to have accepted, and never of another lineage. Commits beyond the witness are those
that we had no time to report.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from typing import Self

import structlog

from peer.averaging.absorb import Update
from peer.averaging.history import History
from peer.averaging.sync import Place, StageSync, to_its_end
from peer.engine.local_checkpoint import Standing
from protocol.control import Snapshot
from protocol.errors import PeerFault, RefusedError, StorageError
from protocol.history import StateAnswer, StateRequest
from protocol.ids import Digest, Lineage, PeerId, RoundId, StageId, Version, digest
from protocol.rounds.events import CommitStep
from protocol.rounds.lineage import next_lineage, root_lineage
from protocol.rounds.messages import CHARTER_CONTEXT, COMMIT_CONTEXT, Charter, Commit
from protocol.signing import Signed, unseal
from protocol.transport.calls import Calls

log = structlog.get_logger()

CommitOf = Callable[[Version], Signed | None]
"""Our own log: the commit that followed a version."""


@dataclass(frozen=True, slots=True)
class Books:
    """What the coordinator knows of a stage: its newest charter, and the newest place that was reported under it."""

    charter: Charter
    root: Lineage
    version: Version
    lineage: Lineage

    @classmethod
    def read(cls, answer: StateAnswer, *, stage: StageId, coordinator: PeerId) -> Self | None:
        """Read what the coordinator has answered; None if the stage has not begun. Raises `PeerFault` if it is odd."""
        if answer.charter is None:
            return None
        charter = unseal(answer.charter, CHARTER_CONTEXT, Charter, signer=coordinator)
        root = root_lineage(answer.charter)
        if answer.commit is None:
            newest = charter.version, root
        else:
            commit = unseal(answer.commit, COMMIT_CONTEXT, Commit)
            if (commit.stage, commit.generation) != (stage, charter.generation):
                raise PeerFault("the coordinator names a commit of another charter")
            newest = commit.version, next_lineage(commit.parent, answer.commit.payload)
        if charter.stage != stage or newest[0] < charter.version:
            raise PeerFault("the coordinator's word on this stage contradicts itself")
        return cls(charter, root, *newest)


@dataclass(frozen=True, slots=True)
class Path:
    """The way from a state of ours to the newest version that our own log reaches."""

    to_charter: tuple[CommitStep, ...]
    passes_charter: bool
    """After `to_charter` the state has to be the one that the charter names: by its digest."""
    beyond: tuple[CommitStep, ...]
    end: Standing
    unreported: tuple[Signed, ...]
    """Commits that the coordinator has not heard of."""


def find_path(own: Standing, books: Books, commit_of: CommitOf) -> Path | None:
    """Return how `own` leads to what the coordinator knows, and past it as far as our log goes; None if it does not."""
    charter = books.charter
    before = _up_to(charter.version, own, commit_of)
    if before is None:
        return None
    passes_charter = own.version <= charter.version
    at = Standing(charter.version, charter.round, books.root) if passes_charter else own
    # From the older of the two places, the log has to pass through the newer one.
    older, newer = sorted([(at.version, at.lineage), (books.version, books.lineage)])
    steps = tuple(_follow(*older, charter.generation, commit_of))
    if newer not in [older, *((step.commit.version, step.lineage) for step in steps)]:
        return None
    beyond = tuple(step for step in steps if step.commit.version > at.version)
    end = at
    if beyond:
        last = beyond[-1]
        end = Standing(last.commit.version, RoundId(last.commit.round + 1), last.lineage)
    unreported = tuple(step.signed for step in steps if step.commit.version > books.version)
    return Path(before, passes_charter, beyond, end, unreported)


def _up_to(version: Version, own: Standing, commit_of: CommitOf) -> tuple[CommitStep, ...] | None:
    """List what leads from our state to a charter's version, over older charters too; None if not all of it is kept.

    The digest in the charter will tell whether it was the right way.
    """
    steps = [_read(Version(before), commit_of) for before in range(own.version, version)]
    whole = tuple(step for step in steps if step is not None)
    return whole if len(whole) == len(steps) else None


def _follow(version: Version, lineage: Lineage, generation: int, commit_of: CommitOf) -> Iterator[CommitStep]:
    """Walk our log under one charter, as long as each commit follows the one before."""
    while (step := _read(version, commit_of)) is not None:
        if (step.commit.parent, step.commit.generation) != (lineage, generation):
            return
        yield step
        version, lineage = step.commit.version, step.lineage


def _read(before: Version, commit_of: CommitOf) -> CommitStep | None:
    signed = commit_of(before)
    if signed is None:
        return None
    commit = unseal(signed, COMMIT_CONTEXT, Commit)
    if commit.version != before + 1:
        return None
    return CommitStep(commit, signed, next_lineage(commit.parent, signed.payload))


class OwnDisk:
    """One stage's state on this peer's own disk."""

    def __init__(
        self,
        stage: StageId,
        *,
        sync: StageSync,
        history: History,
        calls: Calls,
        coordinator: PeerId,
        state_digest: Callable[[], Awaitable[Digest]],
        on_unreported: Callable[[Signed], None],
    ) -> None:
        """`on_unreported` is given every commit of the way that the coordinator has not heard of."""
        self._stage = stage
        self._sync = sync
        self._history = history
        self._calls = calls
        self._coordinator = coordinator
        self._state_digest = state_digest
        self._on_unreported = on_unreported

    async def go_on(self, *, least: Version) -> Place | None:
        """Bring the engine to the newest version that our disk leads to; None if it is older than `least`, or not ours.

        Raises `TransientError` if the coordinator does not answer: without its word every own state may be history.
        """
        books = await self._ask()
        if books is None:
            return None
        own = self._sync.own_standing()
        snapshots = await asyncio.to_thread(self._history.snapshots)
        starts: list[tuple[Standing, Snapshot | None]] = [] if own is None else [(own, None)]
        starts += [(Standing(each.version, each.round, each.lineage), each) for each in snapshots]
        for start, snapshot in sorted(starts, key=lambda each: -each[0].version):
            try:
                path = await asyncio.to_thread(find_path, start, books, self._history.commit_of)
                if path is None or path.end.version < least:
                    log.info("resume.not_the_stages", stage=self._stage, version=start.version, known=books.version)
                    continue
                if snapshot is not None:
                    await self._sync.load_own(snapshot)
                await self._go(path, books.charter)
            except PeerFault as error:  # damaged, or cut off: what is older may be whole
                log.warning("resume.failed", stage=self._stage, version=start.version, error=error.one_line())
                continue
            for signed in path.unreported:
                self._on_unreported(signed)
            return self._placed(start, path)
        return None

    def _placed(self, start: Standing, path: Path) -> Place:
        end = path.end
        log.info("resume.own_disk", stage=self._stage, version=start.version, reached=end.version, alone=True)
        return Place(charter=None, commits=(), round=end.round, version=end.version, lineage=end.lineage)

    async def _ask(self) -> Books | None:
        """Ask the coordinator for its word; None if it has none."""
        try:
            answer = await self._calls.call(self._coordinator, StateRequest(stage=self._stage), StateAnswer)
            return Books.read(answer, stage=self._stage, coordinator=self._coordinator)
        except (PeerFault, RefusedError) as error:  # an older coordinator, say
            log.info("resume.no_word", stage=self._stage, error=error.one_line())
            return None

    async def _go(self, path: Path, charter: Charter) -> None:
        for step in path.to_charter:
            await self._take(step)
        if path.passes_charter and await self._state_digest() != charter.state_digest:
            raise PeerFault(f"the state of version {charter.version} is not the charter's")
        for step in path.beyond:
            await self._take(step)
        self._sync.hold(path.end)

    async def _take(self, step: CommitStep) -> None:
        """Take one step again, with the bytes in our log."""
        commit = step.commit
        try:
            data = await asyncio.to_thread(self._history.update_of, Version(commit.version - 1))
        except StorageError as error:
            raise PeerFault(f"our log has a gap: {error}") from None
        if await asyncio.to_thread(digest, data) != commit.digest:
            raise PeerFault(f"our log is damaged at version {commit.version}")
        await to_its_end(self._sync.absorb(commit, Update(self._sync.codec, data)))
        self._sync.hold(Standing(commit.version, RoundId(commit.round + 1), step.lineage))
