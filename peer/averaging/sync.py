"""Get a stage's state: from our own disk, from its members, or from the coordinator's checkpoint.

Owns: choosing a snapshot, fetching it in verified ranges, replaying the log after it. A joiner, a healer
and a peer that comes back all come through here. Must not know: ballots, seats. What is fetched is
believed as far as its hashes go; whether the state is the members' own, the round machine checks.
"""

from __future__ import annotations

import asyncio
import itertools
from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import structlog

from peer.averaging.absorb import Update, absorb, update_bytes
from peer.averaging.history import History, file_digest
from peer.averaging.spool import Spool
from peer.engine.local_checkpoint import Standing
from peer.engine.schedule import LearningRate
from peer.engine.stage_engine import StageEngine
from peer.engine.statefiles import UnfitState
from peer.pipeline.compute import ComputeThread, Priority
from protocol.control import Snapshot, StateFile
from protocol.errors import (
    DeadlineError,
    LocalFault,
    PeerFault,
    RefusedError,
    StorageError,
    TransientError,
    UnreachableError,
)
from protocol.history import LogAnswer, LogRequest, StateAnswer, StateRequest
from protocol.ids import Digest, Lineage, PeerId, RoundId, StageId, Version, digest
from protocol.rounds.factors import factors_of
from protocol.rounds.lineage import next_lineage, root_lineage
from protocol.rounds.messages import CHARTER_CONTEXT, COMMIT_CONTEXT, Charter, Commit
from protocol.signing import Signed, unseal
from protocol.transport.blobs import MAX_RANGE_BYTES, Blobs, MissingBlobError
from protocol.transport.calls import Calls

log = structlog.get_logger()

T = TypeVar("T")

MAX_HEADER_BYTES = 1 << 20  # of a safetensors file, whose names and shapes come before the tensors
MAX_STEPS = 100_000

FETCH_PATIENCE_S = 20.0
MIN_BYTES_PER_S = 250_000  # 2 Mbit/s: a tenth of the thinnest line that a peer is made for, as it may serve ten at once
MAX_SLOW_SOURCES = 3  # so many may take all the time they have before the bytes count as not to be had

REMOTE_FAULTS = (TransientError, PeerFault, RefusedError)
"""What others can cause in us. The rest of the tree is about this machine, and goes through."""

OUR_FAULTS = (LocalFault, MemoryError, RuntimeError, OSError)
"""Among these is what only stops this machine for a while: the engine knows which (`SpanEngine.note_fault`)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where a synchronised state stands: its charter, and the commits that led from a snapshot to it."""

    charter: Signed | None
    commits: tuple[Signed, ...]
    round: RoundId
    version: Version
    lineage: Lineage


async def to_its_end(work: Coroutine[Any, Any, T]) -> T:
    """Do `work` and return what comes out; a cancellation meanwhile takes effect only when it has ended.

    For what changes the engine: a job of the compute thread runs to its end anyway, and whoever changes the engine next
    must find it done and its bookkeeping complete.
    """
    task = asyncio.ensure_future(work)
    is_cancelled = False
    while not task.done():
        try:
            await asyncio.wait({task})
        except asyncio.CancelledError:
            is_cancelled = True
    if is_cancelled:
        if not task.cancelled() and (error := task.exception()) is not None:
            log.info("change.failed", error=repr(error))  # nobody waits for it any more
        raise asyncio.CancelledError
    return task.result()


def standing_after(commit: Commit, lineage: Lineage) -> Standing:
    """Return where a stage stands once it has taken a commit, which led to `lineage`."""
    return Standing(commit.version, RoundId(commit.round + 1), lineage)


def standing_of(snapshot: Snapshot) -> Standing:
    """Return where a stage stands that has become a snapshot."""
    return Standing(snapshot.version, snapshot.round, snapshot.lineage)


_Start = Callable[
    [PeerId, list[PeerId], StateAnswer, Signed, Charter],
    Awaitable[tuple[Lineage, Version, RoundId, list[Signed]]],
]
"""Brings the engine to a state that a source vouches for; returns where it stands and the commit that led there."""


class StageSync:
    """Brings one engine to the state of its stage."""

    def __init__(
        self,
        stage: StageId,
        *,
        engine: StageEngine,
        history: History,
        compute: ComputeThread,
        calls: Calls,
        blobs: Blobs,
        me: PeerId,
        coordinator: PeerId,
        schedule: LearningRate,
        check_history: Callable[[Signed, tuple[Signed, ...]], object],
        init_seed: int = 0,
        resumed: Standing | None = None,
        before_step: Callable[[Commit, Update], None] = lambda commit, update: None,
        before_replaced: Callable[[Commit | None, Update | None], None] = lambda commit, update: None,
        is_replica: bool = True,
    ) -> None:
        """`check_history` raises `PeerFault` unless commits follow a charter by the rules of the round machine.

        `before_step` is called in the compute thread before the engine goes to the next version, `before_replaced`
        before a new contribution takes the place of the one that this step is of, if one does before that. Who is no
        replica only goes on from its own state, as no round will show whether a member's snapshot was theirs, and logs
        nothing.

        The first commit is believed if the charter is not what it follows. `resumed` says where the engine's state
        stands if it was found on this peer's own disk.
        """
        self.check_history = check_history
        self._stage = stage
        self._engine = engine
        self._history = history
        self._compute = compute
        self._calls = calls
        self._blobs = blobs
        self._me = me
        self._coordinator = coordinator
        self._schedule = schedule
        self._init_seed = init_seed
        self._before_step, self.before_replaced, self._is_replica = before_step, before_replaced, is_replica
        self._forgets = False
        self._held = None if resumed is None else (resumed, engine.changes)
        # the number of changes after which the engine held the initial weights; whatever changes it makes it another
        self._initial_changes = engine.changes if resumed is None and engine.version == 0 else None

    async def from_members(
        self, sources: Iterable[PeerId], *, least_generation: int = 0, forgets: bool = False
    ) -> Place:
        """Become what the members are: their newest snapshot (or ours, if it is theirs too) and the log after it.

        `forgets` drops what our own disk has beyond that snapshot, because it is of a lineage that does not go on.

        Whatever one of them sends, the next one is asked. Raises `UnreachableError` if none of them answers with a
        state of `least_generation` or later that can be followed, `LocalFault` if our own machine is what fails: asking
        others does not make room on a full disk.
        """
        answers = await self._ask(sources)
        newest = max((charter.generation for _, charter in answers.values()), default=0)
        if not answers or newest < least_generation:
            raise UnreachableError(f"no member of stage {self._stage} answers.")
        current = {peer: answer for peer, (answer, charter) in answers.items() if charter.generation == newest}
        peers = _most_shared_first(current)
        self._forgets = forgets
        if forgets:
            self._held = None
        # everybody is asked to vouch for what was on our own disk before anybody's snapshot is fetched
        ways = [self._start_from] if self._is_replica else []
        if self.own_standing() is not None:
            ways.insert(0, self._start_from_resumed)
        for start, source in itertools.product(ways, peers):
            answer, charter = answers[source]
            try:
                return await self._follow(source, peers, answer, charter, start)
            except REMOTE_FAULTS as error:
                log.info("sync.failed", stage=self._stage, source=source, error=error.one_line())
        raise UnreachableError(f"nobody could bring us to the state of stage {self._stage}.")

    def own_standing(self) -> Standing | None:
        """Return where the engine stands if that is known: what was on our own disk, or what has followed it since."""
        if self._held is None:
            return None
        standing, changes = self._held
        return standing if (self._engine.changes, self._engine.version) == (changes, standing.version) else None

    def hold(self, standing: Standing) -> None:
        """Take note of where the engine stands now, until something else changes it."""
        self._held = standing, self._engine.changes

    async def load_own(self, snapshot: Snapshot) -> None:
        """Become a snapshot on our own disk. If it is damaged or none of this stage it goes, and `PeerFault` comes."""
        await self._load_kept(snapshot)
        self.hold(standing_of(snapshot))

    async def state_digest(self) -> Digest:
        """Hash the engine's present state."""
        return await self._compute.run(self._engine.state_digest, priority=Priority.CONTROL)

    async def start_over(self) -> None:
        """Go back to the initial weights, unless the engine is there: version 0 alone may be a load that has failed."""

        def draw() -> None:
            if self._engine.changes != self._initial_changes:
                self._engine.initialise(self._init_seed)
                self._initial_changes = self._engine.changes

        await to_its_end(self._compute.run(draw, priority=Priority.CONTROL))

    async def from_checkpoint(self, snapshot: Snapshot, *, source: PeerId, folder: str) -> Place:
        """Become a checkpoint that `source` (the coordinator) serves under the blob folder `folder`."""
        names = {file.part: f"{folder}/stage-{self._stage}.{file.part}.safetensors" for file in snapshot.files}
        await self._become(snapshot, names, [source])
        return Place(charter=None, commits=(), round=snapshot.round, version=snapshot.version, lineage=snapshot.lineage)

    async def fetch_update(self, commit: Commit, sources: Iterable[PeerId]) -> Update:
        """Bring the bytes of a commit from anybody who has them.

        Raises `UnreachableError` if nobody has, `DeadlineError` if those who say so are too slow.
        """
        shards = self._engine.due(commit.version, commit.round)
        limit = update_bytes(self._engine, commit.codec, len(commit.contributors), shards)
        patience_s = FETCH_PATIENCE_S + limit / MIN_BYTES_PER_S
        room = await asyncio.to_thread(Spool, limit, self._history.folder)  # on some file systems this takes long
        try:
            async with asyncio.timeout(MAX_SLOW_SOURCES * patience_s):
                for source in sources:
                    update = await self._fetch_from(source, commit, room.view, patience_s)
                    if update is not None:
                        return update
        except TimeoutError:
            raise DeadlineError(f"nobody brought the update to version {commit.version} in time.") from None
        raise UnreachableError(f"nobody has the update to version {commit.version} of stage {self._stage}.")

    def update_of(self, commit: Commit, data: bytes | memoryview) -> Update:
        """Return what bytes of this commit's digest mean."""
        weights = tuple(each.weight for each in commit.contributors)
        due = self._engine.due(commit.version, commit.round)
        factors = factors_of(commit.contributors, is_mean=self._engine.anchored is not None)
        return Update(commit.codec, data, weights, shards=due, factors=factors)

    async def absorb(self, commit: Commit, update: Update) -> None:
        """Take the step to a commit's version, in the compute thread. Raises `PeerFault` if it does not follow."""

        def take_step() -> None:
            if commit.version != self._engine.version + 1:
                raise PeerFault(f"commit of version {commit.version} does not follow version {self._engine.version}")
            self._before_step(commit, update)
            absorb(
                self._engine,
                update,
                clip_scale=commit.clip_scale,
                schedule=self._schedule,
                is_ours=any(each.peer == self._me and each.weight > 0 for each in commit.contributors),
                following=self._engine.due(Version(commit.version + 1), RoundId(commit.round + 1)),
            )

        await self._compute.run(take_step, priority=Priority.CONTROL)

    async def keep(self, commit: Commit, signed: Signed, update: Update) -> None:
        """Log an update that was absorbed, for those who come later, and for ourselves if we come back alone.

        A disk that is full costs just that: the round stands, and the coordinator hears of it all the same.
        """
        try:
            await asyncio.to_thread(self._history.append, Version(commit.version - 1), update.data, signed)
        except StorageError as error:
            log.error("update.unlogged", stage=self._stage, version=commit.version, error=error.one_line())

    # -- private --------------------------------------------------------------------------------------

    async def _fetch_from(self, source: PeerId, commit: Commit, room: memoryview, patience_s: float) -> Update | None:
        """Ask one peer for a commit's bytes, which lie in its log or still in its staging; None if it has none."""
        names = (f"update/{self._stage}/{commit.version - 1}", f"staged/{self._stage}/{commit.digest.hex()}")
        try:
            async with asyncio.timeout(patience_s):
                for name in names:
                    try:
                        data = await self._blobs.fetch_into(
                            source, name, lambda num_bytes: room[:num_bytes], max_bytes=len(room)
                        )
                    except MissingBlobError:
                        continue
                    except (TransientError, PeerFault) as error:
                        log.debug("update.missing", source=source, name=name, error=error.one_line())
                        return None  # it is not there, or not well: the other name would cost as much again
                    if await asyncio.to_thread(digest, data) == commit.digest:
                        return self.update_of(commit, data)
                    log.warning("update.wrong", source=source, name=name)
        except TimeoutError:
            log.info("update.slow", source=source, version=commit.version, patience_s=patience_s)
        return None

    async def _replay(self, signed: Signed, commit: Commit, sources: Iterable[PeerId]) -> None:
        """Apply a commit that follows our state, fetching its bytes. Raises if they cannot be had or do not fit."""
        update = await self.fetch_update(commit, sources)
        await to_its_end(self._take(commit, signed, update))

    async def _take(self, commit: Commit, signed: Signed, update: Update) -> None:
        own = self.own_standing()
        await self.absorb(commit, update)
        if own is not None and own.lineage == commit.parent:
            self.hold(standing_after(commit, next_lineage(commit.parent, signed.payload)))
        if self._is_replica:
            await self.keep(commit, signed, update)

    async def _ask(self, sources: Iterable[PeerId]) -> dict[PeerId, tuple[StateAnswer, Charter]]:
        """Ask everybody at the same time; keep the answers that have a charter which the coordinator has signed."""

        async def ask(peer: PeerId) -> tuple[PeerId, tuple[StateAnswer, Charter]] | None:
            try:
                answer = await self._calls.call(peer, StateRequest(stage=self._stage), StateAnswer)
                if answer.charter is None:
                    return None
                return peer, (answer, self._read_charter(answer.charter))
            except REMOTE_FAULTS as error:
                log.debug("sync.unanswered", peer=peer, error=error.one_line())
                return None

        found = await asyncio.gather(*(ask(peer) for peer in dict.fromkeys(sources) if peer != self._me))
        return dict(filter(None, found))

    def _read_charter(self, signed: Signed) -> Charter:
        charter = unseal(signed, CHARTER_CONTEXT, Charter, signer=self._coordinator)
        if charter.stage != self._stage:
            raise PeerFault("that charter is about another stage")
        return charter

    async def _follow(
        self, source: PeerId, peers: list[PeerId], answer: StateAnswer, charter: Charter, start: _Start
    ) -> Place:
        """Take a starting point that `source` vouches for, then replay until it has nothing newer."""
        signed_charter = answer.charter
        assert signed_charter is not None, "answers without one are not kept"
        lineage, version, round_id, commits = await start(source, peers, answer, signed_charter, charter)
        self.check_history(signed_charter, tuple(commits))
        for _ in range(MAX_STEPS):
            answered = await self._calls.call(source, LogRequest(stage=self._stage, since=version), LogAnswer)
            if not answered.commits:
                break
            for signed in answered.commits:
                commit = unseal(signed, COMMIT_CONTEXT, Commit)
                if commit.parent != lineage:
                    raise PeerFault(f"{source} sent a commit that does not follow")
                # before it changes anything: whoever asks next, or starts again here, takes it for what was accepted
                self.check_history(signed_charter, (*commits[-1:], signed))
                await self._replay(signed, commit, [source, *peers])
                lineage = next_lineage(lineage, signed.payload)
                version, round_id = commit.version, RoundId(commit.round + 1)
                commits.append(signed)
        if version < answer.version:
            raise UnreachableError(f"{source} does not have what followed version {version} of stage {self._stage}.")
        return Place(charter=signed_charter, commits=tuple(commits), round=round_id, version=version, lineage=lineage)

    async def _commit_before(self, source: PeerId, lineage: Lineage, version: Version) -> Signed:
        """Bring the commit that led to a snapshot: without it nobody knows who follows it up."""
        before = Version(version - 1)
        answered = await self._calls.call(source, LogRequest(stage=self._stage, since=before), LogAnswer)
        if not answered.commits:
            raise UnreachableError(f"{source} does not have the commit that led to version {version}.")
        signed = answered.commits[0]
        commit = unseal(signed, COMMIT_CONTEXT, Commit)
        if (commit.version, next_lineage(commit.parent, signed.payload)) != (version, lineage):
            raise PeerFault(f"{source} sent a commit that does not lead to version {version}")
        kept = await asyncio.to_thread(self._history.commit_of, before)
        if kept is None or kept.payload != signed.payload:  # under another signature it would be none of a member's
            await asyncio.to_thread(self._history.keep_commit, before, signed)
        return signed

    async def _start_from_resumed(
        self, source: PeerId, peers: list[PeerId], answer: StateAnswer, signed_charter: Signed, charter: Charter
    ) -> tuple[Lineage, Version, RoundId, list[Signed]]:
        """Go on from the state that was on our own disk, if it is one that `source` has passed through."""
        own = self.own_standing()
        if own is None or not charter.version <= own.version <= answer.version:
            raise UnreachableError(f"{source} is not ahead of what is here of stage {self._stage}.")
        commits: list[Signed] = []
        if own.version > charter.version:
            commits = [await self._commit_before(source, own.lineage, own.version)]
        elif own.lineage != root_lineage(signed_charter):
            raise UnreachableError(f"{source} begins stage {self._stage} from another state than ours.")
        log.info("resume.own_disk", stage=self._stage, version=own.version)
        return own.lineage, own.version, max(own.round, charter.round), commits

    async def _start_from(
        self, source: PeerId, peers: list[PeerId], answer: StateAnswer, signed_charter: Signed, charter: Charter
    ) -> tuple[Lineage, Version, RoundId, list[Signed]]:
        """Load the newest snapshot that `source` vouches for, or begin where its stage began."""
        snapshots = [one for one in answer.snapshots if charter.version <= one.version <= answer.version]
        newest = max(snapshots, key=lambda one: one.version, default=None)
        if self._forgets:
            await asyncio.to_thread(self._history.forget_after, charter.version if newest is None else newest.version)
        if newest is not None:
            names = {file.part: f"state/{self._stage}/{newest.version}/{file.part}" for file in newest.files}
            await self._become(newest, names, [source, *peers])
            # the state at the charter's own version is where its lineage begins, whatever it was called before
            lineage = root_lineage(signed_charter) if newest.version == charter.version else newest.lineage
            commits = []
            if newest.version != charter.version:
                commits = [await self._commit_before(source, lineage, newest.version)]
            return lineage, newest.version, max(newest.round, charter.round), commits
        if charter.version != 0:
            raise UnreachableError(f"{source} serves no snapshot of stage {self._stage} yet.")
        await self.start_over()
        return root_lineage(signed_charter), charter.version, charter.round, []

    async def _become(self, snapshot: Snapshot, names: dict[str, str], sources: list[PeerId]) -> None:
        """Load a snapshot, from our own disk if it is there and sound; otherwise fetch its files by their `names`."""
        if await asyncio.to_thread(self._has, snapshot):
            try:
                return await self._load_kept(snapshot)
            except PeerFault as error:
                log.warning("snapshot.damaged", stage=self._stage, version=snapshot.version, problem=str(error))
        for file in snapshot.files:
            await self._fetch_file(snapshot, file, names[file.part], sources)
        await self._load(snapshot)  # each file was checked when it had come
        await asyncio.to_thread(self._history.adopt_snapshot, snapshot)

    def _has(self, snapshot: Snapshot) -> bool:
        """Tell whether our own disk holds these very files from before."""
        return any((own.version, own.files) == (snapshot.version, snapshot.files) for own in self._history.snapshots())

    async def _load_kept(self, snapshot: Snapshot) -> None:
        """Become a snapshot on our own disk; one that is not what it was goes, with a `PeerFault`."""
        try:
            await asyncio.to_thread(self._history.check_snapshot, snapshot)
        except StorageError as error:
            self._history.discard_snapshot(snapshot.version)
            raise PeerFault(str(error)) from None
        await self._load(snapshot)

    async def _load(self, snapshot: Snapshot) -> None:
        """Become a snapshot whose files are here and have the promised hashes.

        If they are no state of this stage they go, with a `PeerFault`. Raises `StorageError` if our own machine fails:
        the files may be as good as ever then, but the engine's state is none any more.
        """

        def load() -> None:
            with self._history.open_snapshot(snapshot) as files:
                try:
                    self._engine.read_state(files, version=snapshot.version)
                except UnfitState as error:  # whoever promised that hash promised nonsense
                    raise PeerFault(f"the snapshot of version {snapshot.version} cannot be loaded: {error}") from None

        try:
            await to_its_end(self._compute.run(load, priority=Priority.CONTROL))
        except PeerFault:
            self._history.discard_snapshot(snapshot.version)
            raise

    async def _fetch_file(self, snapshot: Snapshot, file: StateFile, name: str, sources: list[PeerId]) -> None:
        """Fetch a file range by range, going on with another source where one fails."""
        most = self._engine.state_bytes + MAX_HEADER_BYTES
        if file.num_bytes > most:
            raise PeerFault(f"a {file.part} file of {file.num_bytes} bytes; ours cannot have more than {most}")
        path = self._history.incoming_path(snapshot.version, file.part)
        if await asyncio.to_thread(_is_there, path, file):
            return  # from an attempt that ended for a reason of our own
        try:
            with path.open("wb") as out:
                await self._fetch_into(out, file, name, sources)
            if await asyncio.to_thread(file_digest, path) != file.digest:
                raise PeerFault(f"{name} does not have the promised SHA-256")
        except OSError as error:
            path.unlink(missing_ok=True)
            hint = "Free some space there, or choose another --data-dir."
            raise StorageError(f"cannot keep the state of stage {self._stage}: {error.strerror}.", hint=hint) from None
        except BaseException:
            path.unlink(missing_ok=True)  # gigabytes that nobody would ever look at again
            raise

    async def _fetch_into(self, out: BinaryIO, file: StateFile, name: str, sources: list[PeerId]) -> None:
        waiting = list(sources)
        while out.tell() < file.num_bytes:
            if not waiting:
                raise UnreachableError(f"nobody could bring the rest of {name}.")
            try:
                piece, _ = await self._blobs.fetch_range(
                    waiting[0], name, offset=out.tell(), length=min(MAX_RANGE_BYTES, file.num_bytes - out.tell())
                )
            except (TransientError, PeerFault) as error:
                log.info("sync.source_failed", source=waiting[0], name=name, error=error.one_line())
                waiting.pop(0)
                continue
            if not piece:
                waiting.pop(0)
                continue
            await asyncio.to_thread(out.write, piece)


def _is_there(path: Path, file: StateFile) -> bool:
    try:
        return path.stat().st_size == file.num_bytes and file_digest(path) == file.digest
    except OSError:
        return False


def _most_shared_first(answers: Mapping[PeerId, StateAnswer]) -> list[PeerId]:
    """Order members by how many stand in the same lineage, and then by version.

    A commit that a few have not applied yet is fetched later; a version that only one claims may be made up.
    """
    shared = Counter(answer.lineage for answer in answers.values())
    return sorted(answers, key=lambda peer: (-shared[answers[peer].lineage], -answers[peer].version))
