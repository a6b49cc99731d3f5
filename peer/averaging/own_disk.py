"""Going on from the state on this peer's own NVMe drive when no other replica is there to vouch for it.

Owns: the rule by which a state of ours is still the stage's (`find_path`, pure), and walking from there along our own
log of commits. Must not know: seats, ballots, where else a state could come from (`restore.py` does).

The witness is the coordinator. Its charter says where the stage's history begins at present, so whatever was rolled
back is out; the newest commit that was reported under it says what has been reached. A state is taken if our own log
joins it to one of these places, and then as far as the log goes: to commits that we had no time to report, or to a
place before the newest commit if the rest is lost. Whether somebody else may still bring more is for the coordinator
to decide (`coordinator/founding.py`). A log with another commit than the newest at its version is of a branch, and is
not taken; nor is a state of which the coordinator says that it was given up with the lost half of a torn swarm.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Self

import structlog

from peer.averaging.history import History
from peer.averaging.sync import Place, StageSync, standing_after, standing_of, to_its_end
from peer.engine.local_checkpoint import Standing
from protocol.control import Snapshot
from protocol.errors import PeerFault, RefusedError, UnreachableError
from protocol.history import StateAnswer, StateRequest
from protocol.ids import Lineage, PeerId, StageId, Version
from protocol.rounds.events import CommitStep
from protocol.rounds.lineage import next_lineage, root_lineage
from protocol.rounds.messages import CHARTER_CONTEXT, COMMIT_CONTEXT, Charter, Commit
from protocol.signing import Signed, unseal
from protocol.transport.calls import Calls

log = structlog.get_logger()

CommitOf = Callable[[Version], Signed | None]
"""Our own log: the commit that followed a version."""

CheckHistory = Callable[[Signed, tuple[Signed, ...]], object]
"""Raises `PeerFault` unless commits follow a charter, or the first of them, by the rules of the round machine."""

At = tuple[Version, Lineage]


@dataclass(frozen=True, slots=True)
class Books:
    """What the coordinator knows of a stage: its newest charter, and the newest commit that was reported under it."""

    signed_charter: Signed
    charter: Charter
    commit: Signed | None
    places: tuple[At, ...]
    """Of its lineage, newest first: where that commit led and what it followed, and where the charter begins."""

    @property
    def newest(self) -> At:
        return self.places[0]

    @property
    def version(self) -> Version:
        return self.newest[0]

    @classmethod
    def read(cls, answer: StateAnswer, *, stage: StageId, coordinator: PeerId) -> Self | None:
        """Read what the coordinator has answered; None if the stage has not begun. Raises `PeerFault` if it is odd."""
        if answer.charter is None:
            return None
        charter = unseal(answer.charter, CHARTER_CONTEXT, Charter, signer=coordinator)
        places: list[At] = [(charter.version, root_lineage(answer.charter))]
        if answer.commit is not None:
            commit = unseal(answer.commit, COMMIT_CONTEXT, Commit)
            if (commit.stage, commit.generation) != (stage, charter.generation):
                raise PeerFault("the coordinator names a commit of another charter")
            led_to = next_lineage(commit.parent, answer.commit.payload)
            places = [(commit.version, led_to), (Version(commit.version - 1), commit.parent), *places]
        if charter.stage != stage or places[0][0] < charter.version:
            raise PeerFault("the coordinator's word on this stage contradicts itself")
        return cls(answer.charter, charter, answer.commit, tuple(places))


@dataclass(frozen=True, slots=True)
class Path:
    """The way from a state of ours to the newest version that our own log reaches."""

    to_charter: tuple[CommitStep, ...]
    passes_charter: bool
    """After `to_charter` the state has to be the one that the charter names: by its digest."""
    at: Standing
    """Where we are then; from here on every step is one of the charter's lineage."""
    beyond: tuple[CommitStep, ...]
    unreported: tuple[CommitStep, ...]
    """Those of the lineage that the coordinator has not heard of, also if they led to `at`."""

    @property
    def end(self) -> Standing:
        return _reached(self.beyond[-1]) if self.beyond else self.at


def find_path(own: Standing, books: Books, commit_of: CommitOf, check_history: CheckHistory) -> Path | None:
    """Return how `own` is joined to what the coordinator knows, and goes on as far as our log; None if it is not."""
    charter = books.charter
    before = _up_to(charter.version, own, commit_of)
    if before is None:
        return None
    passes_charter = own.version <= charter.version
    at = Standing(charter.version, charter.round, books.places[-1][1]) if passes_charter else own
    for known in books.places:
        steps = _join((at.version, at.lineage), known, books, commit_of, check_history)
        if steps is not None:
            beyond = tuple(step for step in steps if step.commit.version > at.version)
            unreported = tuple(step for step in steps if step.commit.version > books.version)
            return Path(before, passes_charter, at, beyond, unreported)
    return None


def _up_to(version: Version, own: Standing, commit_of: CommitOf) -> tuple[CommitStep, ...] | None:
    """List what leads from our state to a charter's version, over older charters too; None if not all of it is kept.

    The digest in the charter will tell whether it was the right way.
    """
    steps = [_read(Version(before), commit_of) for before in range(own.version, version)]
    whole = tuple(step for step in steps if step is not None)
    return whole if len(whole) == len(steps) else None


def _join(
    ours: At, known: At, books: Books, commit_of: CommitOf, check_history: CheckHistory
) -> tuple[CommitStep, ...] | None:
    """Walk our log from the older of two places to its end; None unless it leads through the other, and no branch."""
    older, newer = sorted([ours, known])
    steps = tuple(_follow(older, books, commit_of, check_history))
    passed = [older, *(_place(step) for step in steps)]
    is_branch = any(at != books.newest for at in passed if at[0] == books.version)
    return None if is_branch or newer not in passed else steps


def _follow(at: At, books: Books, commit_of: CommitOf, check_history: CheckHistory) -> Iterator[CommitStep]:
    """Walk our log under one charter, as long as each commit follows the one before by the rules.

    The first one is believed where we start at a place of ours, or at what the newest commit followed: in front of a
    place that the coordinator knows, the hashes say it.
    """
    before = () if books.commit is None or at != books.newest else (books.commit,)
    while (step := _read(at[0], commit_of)) is not None:
        if (step.commit.parent, step.commit.generation) != (at[1], books.charter.generation):
            return
        try:
            check_history(books.signed_charter, (*before, step.signed))
        except PeerFault as fault:
            log.info("resume.bad_commit", version=step.commit.version, error=fault.one_line())
            return
        yield step
        at, before = _place(step), (step.signed,)


def _read(before: Version, commit_of: CommitOf) -> CommitStep | None:
    """Read the commit that followed a version; None if our log has none there, or a damaged one."""
    signed = commit_of(before)
    if signed is None:
        return None
    try:
        commit = unseal(signed, COMMIT_CONTEXT, Commit)
    except PeerFault as fault:
        log.info("resume.bad_commit", version=before + 1, error=fault.one_line())
        return None
    if commit.version != before + 1:
        return None
    return CommitStep(commit, signed, next_lineage(commit.parent, signed.payload))


def _place(step: CommitStep) -> At:
    return step.commit.version, step.lineage


def _reached(step: CommitStep) -> Standing:
    return standing_after(step.commit, step.lineage)


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
        on_unreported: Callable[[Signed], None],
    ) -> None:
        """`on_unreported` is given every commit of the way that the coordinator has not heard of."""
        self._stage = stage
        self._sync = sync
        self._history = history
        self._calls = calls
        self._coordinator = coordinator
        self._on_unreported = on_unreported

    async def go_on(self, *, least: Version) -> Place | None:
        """Bring the engine to the newest version that our disk leads to; None if it is older than `least`, or not ours.

        Raises `TransientError` or `PeerFault` if the coordinator gives no answer that can be read: without its word
        every own state may be history.
        """
        for start, snapshot in await self._starts():
            books = await self._ask(start.lineage)
            if books is None:
                continue
            check_history = self._sync.check_history
            path = await asyncio.to_thread(find_path, start, books, self._history.commit_of, check_history)
            if path is None or path.end.version < least:
                log.info("resume.not_the_stages", stage=self._stage, version=start.version, known=books.version)
                continue
            try:
                if snapshot is not None:
                    await self._sync.load_own(snapshot)
                await self._reach_lineage(path, books.charter)
            except PeerFault as error:  # damaged, or not the charter's: what is older may be sound
                log.warning("resume.failed", stage=self._stage, version=start.version, error=error.one_line())
                continue
            end = await self._go_beyond(path)
            if end.version >= least:
                return self._placed(start, path, end)
        return None

    async def _starts(self) -> list[tuple[Standing, Snapshot | None]]:
        """List the states that lie here, newest first: the engine's own, and those that have to be loaded."""
        own = self._sync.own_standing()
        snapshots = await asyncio.to_thread(self._history.snapshots)
        starts: list[tuple[Standing, Snapshot | None]] = [] if own is None else [(own, None)]
        starts += [(standing_of(snapshot), snapshot) for snapshot in snapshots]
        return sorted(starts, key=lambda each: -each[0].version)

    def _placed(self, start: Standing, path: Path, end: Standing) -> Place:
        for step in path.unreported:
            if step.commit.version <= end.version:
                self._on_unreported(step.signed)
        log.info("resume.own_disk", stage=self._stage, version=start.version, reached=end.version, alone=True)
        return Place(charter=None, commits=(), round=end.round, version=end.version, lineage=end.lineage)

    async def _ask(self, standing: Lineage) -> Books | None:
        """Ask the coordinator for its word; None if the stage has not begun, or where we stand was given up."""
        try:
            request = StateRequest(stage=self._stage, standing=standing)
            answer = await self._calls.call(self._coordinator, request, StateAnswer)
        except RefusedError as error:  # to this one question: it is asked again as if nobody had answered
            raise UnreachableError(f"the coordinator does not say where stage {self._stage} stands: {error}") from None
        if answer.is_lost:
            log.info("resume.given_up", stage=self._stage)
            return None
        return Books.read(answer, stage=self._stage, coordinator=self._coordinator)

    async def _reach_lineage(self, path: Path, charter: Charter) -> None:
        """Come to where the charter's lineage is ours. Raises `PeerFault` if the state is not the one that it names."""
        for step in path.to_charter:
            await self._take(step)
        if path.passes_charter and await self._sync.state_digest() != charter.state_digest:
            raise PeerFault(f"the state of version {charter.version} is not the charter's")
        self._sync.hold(path.at)

    async def _go_beyond(self, path: Path) -> Standing:
        """Go on as far as our log is sound; return where that is. Every state on the way is one of the stage's."""
        at = path.at
        for step in path.beyond:
            try:
                await self._take(step)
            except PeerFault as error:
                log.warning("resume.cut_short", stage=self._stage, version=at.version, error=error.one_line())
                return at
            at = _reached(step)
        return at

    async def _take(self, step: CommitStep) -> None:
        """Take one step again, with the bytes in our log. Raises `PeerFault`, with nothing changed, if they are bad."""
        commit = step.commit
        data = await asyncio.to_thread(self._history.update_of, Version(commit.version - 1), commit.digest)
        if data is None:
            raise PeerFault(f"our log has lost what led to version {commit.version}")
        await to_its_end(self._sync.absorb(commit, self._sync.update_of(commit, data)))
        self._sync.hold(_reached(step))
