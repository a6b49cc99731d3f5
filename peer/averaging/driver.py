"""Carries out what the round machine of one stage decides.

Owns: the queue of events, the beat, and one method per action. The machine (`protocol/rounds`) is pure
and says what should happen; here it happens: messages are sent, rounds opened, sums frozen and reduced,
updates applied and logged. Must not know: why. One driver per hosted stage; they run independently, so
two stages of one peer never wait for each other.
"""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import Callable, Coroutine, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import structlog

from peer.averaging.absorb import Update, update_norm
from peer.averaging.history import History
from peer.averaging.line_rate import LineRate
from peer.averaging.machine_clock import MachineClock
from peer.averaging.outbox import Outbox
from peer.averaging.reduce import Reduce, Reduced, ReduceError, ReduceGroup, ReduceTimeouts, Shards
from peer.averaging.rules import round_timers
from peer.averaging.sync import OUR_FAULTS, StageSync, standing_after, to_its_end
from peer.engine.span import SpanEngine
from peer.pipeline.compute import ComputeThread, Priority
from peer.pipeline.gate import Gate
from peer.pipeline.view import Membership, View
from peer.reports import ReportQueue
from protocol.control import AveragingReport, ClosingReport, CommitReport, Snapshot
from protocol.errors import BusyError, PeerFault, StorageError, SwarmError, TransientError, UnreachableError
from protocol.history import LogAnswer, LogRequest, StateAnswer
from protocol.ids import Digest, Lineage, PeerId, RoundId, StageId, Version
from protocol.manifest import AveragingMode, Manifest
from protocol.rounds import events
from protocol.rounds.closings import FIRST_STAGE
from protocol.rounds.factors import LEAST_CLIPPED, factors_of
from protocol.rounds.lineage import Link
from protocol.rounds.machine import RoundMachine
from protocol.rounds.messages import MAX_COMMITS_PER_ANSWER, MAX_NORM, Charter, Closing, Commit, StageMessage
from protocol.signing import Signed
from protocol.transport.calls import Calls
from protocol.wire import MAX_MESSAGE_BYTES

log = structlog.get_logger()

RESYNC_PATIENCE_S = 30.0  # nobody to fetch the state from for so long: perhaps nobody has it any more
STAGED_KEPT = 3
MAX_LOG_BYTES = MAX_MESSAGE_BYTES // 2  # a commit of a large stage weighs tens of kilobytes
LEAST_SPEED, MOST_SPEED, NEWCOMER_SPEED = 0.01, 8.0, 0.5  # of the median
MAX_INBOX = 1_000  # of messages that wait; a step of a large stage takes seconds, and anybody may send


@dataclass(slots=True)
class DriverStatistics:
    """What the status line and the reports show of a stage."""

    committed: int = 0
    averaged: int = 0
    failed: int = 0
    last_group: int = 0
    last_asked: int = 0


@dataclass(slots=True)
class Hooks:
    """What a stage's rounds mean to the rest of the peer."""

    on_freeze: Callable[[Closing], None]
    """The round is over: no task of it or of one before counts any more."""
    on_commit: Callable[[Commit, Signed], None]
    sources: Callable[[], tuple[PeerId, ...]]
    """Everybody who may hold this stage's state, by what is known now."""
    on_own_closing: Callable[[StageMessage], None]
    """Our clock closed the round: the other stages that are hosted here should hear it too."""
    on_lost: Callable[[], None]
    """Nobody whom we know can bring the stage's state: the span has to start over, from a checkpoint if need be."""
    on_bits: Callable[[RoundId, int], None] = field(default=lambda round_id, done: None)


class StageDriver:
    """Drives one stage's round machine."""

    def __init__(
        self,
        stage: StageId,
        *,
        manifest: Manifest,
        machine: RoundMachine,
        me: PeerId,
        engine: SpanEngine,
        compute: ComputeThread,
        calls: Calls,
        reduce: Reduce,
        sync: StageSync,
        history: History,
        gate: Gate,
        view: View,
        reports: ReportQueue,
        hooks: Hooks,
        beat_s: float,
    ) -> None:
        self.stage = stage
        self._manifest = manifest
        self._machine = machine
        self._me = me
        self._engine = engine
        self._compute = compute
        self._reduce = reduce
        self._sync = sync
        self._history = history
        self._gate = gate
        self._view = view
        self._reports = reports
        self._hooks = hooks
        self._beat_s = beat_s
        timers = round_timers(manifest)
        self._line_rate = LineRate()
        self._clock = MachineClock(limit_s=timers.patience_s - timers.ping_timeout_s)  # our last answer may be lost
        self._inbox: asyncio.Queue[events.Event] = asyncio.Queue()
        self._is_tick_due = False
        self._outbox = Outbox(calls, send_timeout_s=timers.ping_timeout_s / 2, start=self._start, on_gone=self._on_gone)
        self._group: asyncio.TaskGroup | None = None
        self._is_draining = False
        self._reducing: dict[Digest, asyncio.Task[None]] = {}
        self._staged: dict[Digest, Update] = {}
        self._snapshot: Snapshot | None = None
        self._changing: asyncio.Task[None] | None = None
        """Brings the engine to another state, from others: the newest replay or resync."""
        self._engine_lock = asyncio.Lock()
        self._late_round: RoundId | None = None
        """Whose contribution was frozen before what came before it was applied: it is measured with that."""
        self._is_whole = manifest.averaging.fragments == 1
        self._left = asyncio.Event()
        self.state_digest: Digest | None = None
        """Of the newest applied state."""
        self.statistics = DriverStatistics()

    # -- what others call -----------------------------------------------------------------------------

    def post(self, event: events.Event) -> None:
        """Hand the machine a fact. Never blocks."""
        self._is_draining = self._is_draining or isinstance(event, events.Drain)
        self._inbox.put_nowait(event)

    def receive(self, caller: PeerId, message: StageMessage) -> None:
        """Hand the machine what somebody sent. Raises `BusyError` while it is far behind: it will be sent again."""
        if self._inbox.qsize() >= MAX_INBOX:
            raise BusyError(f"stage {self.stage} is busy.", retry_after_s=self._beat_s)
        self.post(events.Received(caller, message))

    async def run(self) -> None:
        """Feed the machine events and beats until cancelled; an error of an action ends the peer, loudly."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._beat(), name=f"beat-{self.stage}")
            self._group = tasks
            while True:
                event = await self._inbox.get()
                if isinstance(event, events.Tick):
                    self._is_tick_due = False
                actions = self._machine.handle(event, self._clock.now_s())
                with self._clock.working():
                    for action in actions:
                        await self._perform(action)

    async def wait_left(self) -> None:
        """Wait until our work of this round is safe and nobody waits for us."""
        await self._left.wait()

    async def say_goodbye(self) -> None:
        """Tell the stage's members that this replica is gone, so that nobody waits for it."""
        self._stop_changing()
        farewells = self._machine.handle(events.Quit(), self._clock.now_s())
        await self._outbox.say_last([(each.to, each.message) for each in farewells if isinstance(each, events.Send)])

    @property
    def standing(self) -> Link | None:
        """Where the state stands in the stage's lineage; None while it is being fetched anew."""
        return self._machine.applied

    @property
    def rival(self) -> Lineage | None:
        """Where one of those stands who have parted from us; None if we have met nobody of the kind."""
        return self._machine.rival

    def staged_update(self, digest_hex: str) -> bytes | memoryview | None:
        """Return update bytes that are summed but not committed yet, for a member that missed the reduce."""
        for known, update in self._staged.items():
            if known.hex() == digest_hex:
                return update.data
        return None

    async def answer_state(self) -> StateAnswer:
        """Tell a joiner where this replica stands."""
        chain, applied = self._machine.chain, self._machine.applied
        if chain is None or applied is None:
            return StateAnswer(charter=None, commit=None, version=Version(0), lineage=Lineage(bytes(32)), snapshots=())
        return StateAnswer(
            charter=chain.signed_charter,
            commit=None if applied.step is None else applied.step.signed,
            version=applied.version,
            lineage=applied.lineage,
            snapshots=await asyncio.to_thread(self._history.snapshots),  # anybody may ask, and the disk may be slow
        )

    async def answer_log(self, request: LogRequest) -> LogAnswer:
        """List the commits that followed a version, as far as they are kept."""
        return LogAnswer(commits=await asyncio.to_thread(self._commits_since, request.since))

    def _commits_since(self, version: Version) -> tuple[Signed, ...]:
        commits: list[Signed] = []
        left = MAX_LOG_BYTES
        for offset in range(MAX_COMMITS_PER_ANSWER):
            signed = self._history.commit_of(Version(version + offset))
            left -= 0 if signed is None else len(signed.payload)
            if signed is None or (commits and left < 0):
                break
            commits.append(signed)
        return tuple(commits)

    @property
    def snapshot(self) -> Snapshot | None:
        """The newest snapshot that this replica took itself."""
        return self._snapshot

    # -- actions --------------------------------------------------------------------------------------

    async def _perform(self, action: events.Action) -> None:
        match action:
            case events.Send(to, message):
                self._send(to, message)
            case events.OpenRound():
                await self._open_round(action)
            case events.Freeze(closing, signed, replaces, following):
                self._reports.add(ClosingReport(closing=signed))
                self._freeze(closing, replaces=replaces, following=following)
            case events.Shut():
                self._gate.freeze(self.stage)
            case events.StartReduce():
                task = self._start(self._run_reduce(action), name=f"reduce-{self.stage}-{action.round}")
                self._reducing[action.group_id] = task
            case events.AbortReduce(group_id):
                reducing = self._reducing.pop(group_id, None)
                if reducing is not None:
                    reducing.cancel()
            case events.Fetch(commit, sources):
                self._start(self._fetch(commit, sources), name=f"fetch-{self.stage}-{commit.version}")
            case events.Apply(commit, signed, lineage):
                await self._apply(commit, signed, lineage)
            case events.Replay(steps, sources):
                self._change_state(lambda: self._replay(steps, sources), name=f"replay-{self.stage}")
            case events.Resync():
                self._change_state(lambda: self._resync(action), name=f"resync-{self.stage}")
            case events.NewLineage(_, lineage, round_id):  # a joiner finds the charter's state under its new name
                assert self._machine.applied is not None
                self._snapshot = await self.take_snapshot(round_id, self._machine.applied.version, lineage)
            case events.BitsChanged(round_id, done):
                self._hooks.on_bits(round_id, done)
            case events.Left():
                self._left.set()
            case events.Report(trouble, peer, detail):
                log.info("round.trouble", stage=self.stage, trouble=str(trouble), peer=peer, detail=detail)

    async def _open_round(self, action: events.OpenRound) -> None:
        # Before anybody is let in: a task would only wait behind the writing, and its caller's patience with it.
        if self._is_snapshot_due(action.first_round):
            self._snapshot = await self.take_snapshot(action.first_round, action.version, action.lineage)
        await self._compute.run(
            lambda: self._engine.open(self.stage, action.round, fresh=action.fresh), priority=Priority.CONTROL
        )
        if self._is_draining:  # what would be begun now would be left half done, and done again by somebody else
            self._gate.leave(self.stage)
        else:
            self._gate.open(self.stage, round_id=action.round, version=action.version, lineage=action.lineage)
        log.info("round.open", stage=self.stage, round=action.round, version=action.version, peers=len(action.members))

    def _freeze(self, closing: Closing, *, replaces: bool, following: Commit | None) -> None:
        """Stop adding to the sum, in the thread that adds; tell the machine afterwards what the sum stands for.

        The microbatch at hand may take longer than others have patience, so the machine goes on answering meanwhile.
        """
        self._gate.freeze(self.stage)
        self._hooks.on_freeze(closing)
        update = None if following is None else self._staged.get(following.digest)
        # queued at once: nothing that comes after this in the compute thread may come before it
        freezing = self._compute.submit(
            lambda: self._end_adding(following, update, replaces=replaces), priority=Priority.CONTROL
        )
        self._late_round = closing.round if replaces else None

        async def tell() -> None:
            with self._pausing():
                tokens = await freezing
                norm = 0.0 if replaces else await self._contribution_norm(closing.round)
                log.debug("round.frozen", stage=self.stage, round=closing.round, tokens=tokens, norm=norm)
                self.post(events.Frozen(closing.round, tokens, self._engine.tokens_per_s(self.stage), norm))

        self._start(tell(), name=f"freeze-{self.stage}-{closing.round}")

    async def _contribution_norm(self, round_id: RoundId) -> float:
        """Measure what we bring to the average after a round, as others will."""
        engine = self._engine.engines[self.stage]
        norm = await self._compute.run(
            lambda: engine.contribution_norm(engine.due(Version(engine.version + 1), round_id)),
            priority=Priority.CONTROL,
        )
        return norm if norm <= MAX_NORM else MAX_NORM  # no number either: whoever adds it up will say so

    async def _late_norm(self) -> float | None:
        """Measure what was frozen before what came before it was applied; None if that is not so.

        Again with every step until the next round is frozen: the machine may not have waited for this one.
        """
        return None if self._late_round is None else await self._contribution_norm(self._late_round)

    async def _run_reduce(self, action: events.StartReduce) -> None:
        """Sum what was frozen with the group, or average it; stage the bytes; report how it went."""
        engine = self._engine.engines[self.stage]
        due = engine.due(Version(action.version + 1), action.round)
        lengths = [engine.shards[number].num_elements for number in due]
        shards = Shards(lengths, lambda index: engine.contribution_shard(due[index]))
        open_before_s = self._gate.open_s(self.stage)
        log.debug("averaging.begun", stage=self.stage, round=action.round, peers=len(action.group))
        # if all fragments are due at the end, somebody may have measured one of them before it heard that this is it
        group = self._group_of(action, is_measured=len(due) < len(engine.shards) or self._is_whole)
        try:
            try:
                reduced = await self._reduce.reduce(group, shards)
            finally:
                self._reducing.pop(action.group_id, None)  # what is summed may be of use, whatever the machine wants
            weights = tuple(contribution.weight for contribution in action.group)
            update = Update(
                reduced.codec, reduced.data, weights, shards=due, factors=group.factors, taken=reduced.taken
            )
            update, norm = await self._checked(update)
        except (SwarmError, *OUR_FAULTS) as error:
            is_ours = isinstance(error, StorageError) or not isinstance(error, SwarmError)
            if is_ours and not self._engine.note_fault(error):
                raise  # a full disk, say: every further ballot would fail as well, and nobody would learn why
            suspect = error.peer if isinstance(error, ReduceError) and error.peer != self._me else None
            self._reported(action, None, reason=_reason(error))
            self.post(events.ReduceFailed(action.group_id, _reason(error), suspect))
            return
        self._stage_update(reduced.digest, update)
        log.debug("averaging.done", stage=self.stage, round=action.round, seconds=round(reduced.seconds, 3))
        hidden_s = self._gate.open_s(self.stage) - open_before_s
        self._reported(action, reduced, hidden_s=min(hidden_s, reduced.seconds))
        self._line_rate.note(reduced.bytes_sent, reduced.seconds)
        self.post(events.ReduceDone(action.group_id, reduced.digest, norm, self._line_rate.bytes_per_s))

    def _group_of(self, action: events.StartReduce, *, is_measured: bool = True) -> ReduceGroup:
        timing, is_mean = self._manifest.timing, self._manifest.averaging.mode is AveragingMode.DILOCO
        is_measured = is_measured and len(action.group) >= LEAST_CLIPPED
        return ReduceGroup(
            group_id=action.group_id,
            members=tuple(contribution.peer for contribution in action.group),
            codec=action.codec,
            factors=factors_of(action.group, is_mean=is_mean),
            norms=tuple(contribution.norm for contribution in action.group) if is_measured else (),
            keeps=len(action.group) > 1,
            timeouts=ReduceTimeouts(
                sender_s=timing.hop_silence_s, reducer_s=2 * timing.hop_silence_s, deadline_s=timing.reduce_timeout_s
            ),
        )

    async def _checked(self, update: Update) -> tuple[Update, float]:
        """Return an update with its norm. Raises `WireError` if its bytes do not fit this stage."""
        engine = self._engine.engines[self.stage]
        norm = await self._compute.run(lambda: update_norm(engine, update), priority=Priority.CONTROL)
        return replace(update, norm=norm), norm

    def _reported(
        self, action: events.StartReduce, reduced: Reduced | None, *, reason: str = "", hidden_s: float = 0.0
    ) -> None:
        """Count an attempt; a stage with one member averages nothing and reports nothing."""
        self.statistics.last_group, self.statistics.last_asked = len(action.group), action.num_asked
        if len(action.group) == 1 and action.num_asked == 1:
            return
        self.statistics.averaged += reduced is not None
        self.statistics.failed += reduced is None
        self._reports.add(
            AveragingReport(
                stage=self.stage,
                round=action.round,
                ballot=action.ballot,
                group=action.group_id,
                members=len(action.group),
                asked=action.num_asked,
                ok=reduced is not None,
                reason=reason[:200],
                bytes_sent=0 if reduced is None else reduced.bytes_sent,
                bytes_received=0 if reduced is None else reduced.bytes_received,
                seconds=0.0 if reduced is None else reduced.seconds,
                hidden_seconds=hidden_s,
            )
        )

    async def _fetch(self, commit: Commit, sources: Iterable[PeerId]) -> None:
        try:
            update, norm = await self._checked(await self._sync.fetch_update(commit, self._known(sources, commit)))
        except (TransientError, PeerFault) as error:  # also bytes that fit the commit's digest, and nothing else
            self.post(events.FetchFailed(commit.digest, _reason(error)))
            return
        except OUR_FAULTS as error:
            if not self._engine.note_fault(error):
                raise
            self.post(events.FetchFailed(commit.digest, _reason(error)))
            return
        self._stage_update(commit.digest, update)
        self.post(events.Fetched(commit.digest, norm))

    def _known(self, sources: Iterable[PeerId], commit: Commit) -> list[PeerId]:
        """Keep of those who are said to have a commit's bytes who can be expected to.

        The word of who sent us the message is not enough: a stranger would only make us wait.
        """
        known = {*self._hooks.sources(), *(contribution.peer for contribution in commit.contributors)}
        return [peer for peer in sources if peer in known]

    def _change_state(self, work: Callable[[], Coroutine[None, None, None]], *, name: str) -> None:
        """Bring the engine to another state beside the loop, which goes on listening; only the newest of these counts.

        They take the engine in turn: one that is cancelled still ends the step that it has begun.
        """

        async def change() -> None:
            async with self._engine_lock:
                with self._pausing():
                    await work()

        self._stop_changing()
        self._changing = self._start(change(), name=name)

    def _stop_changing(self) -> None:
        """Give up what is under way to another state: the machine wants something else by now."""
        if self._changing is not None:
            self._changing.cancel()

    @contextmanager
    def _pausing(self, commit: Commit | None = None) -> Iterator[None]:
        """Say nothing to the machine if this peer needs a pause before it can do what the block does.

        The session ends with its next beat. Told of a failure, the machine would try again at every tick, and then give
        up a state that is sound; or, after a step that has failed half-way, go on with one that is not. With others who
        can serve the update of `commit`, we may leave at once: what is left undone here is no work of ours.
        """
        try:
            yield
        except OUR_FAULTS as error:
            if not self._engine.note_fault(error):
                raise
            log.warning("round.paused", stage=self.stage, reason=_reason(error))
            if commit is not None and any(each.peer != self._me for each in commit.contributors):
                self._left.set()

    async def _apply(self, commit: Commit, signed: Signed, lineage: Lineage) -> None:
        """Absorb staged bytes: the step that makes a new version. They stay staged for others until it is there."""
        update = self._staged.get(commit.digest)
        if update is None:
            self.post(events.ApplyFailed(lineage, "the bytes are not staged here"))
            return
        self._stop_changing()
        try:
            async with self._engine_lock:
                with self._pausing(commit):
                    await self._stop_adding()
                    state_digest = await self._take_step(commit, signed, lineage, update)
                    self.post(events.Applied(lineage, state_digest, await self._late_norm()))
        except PeerFault as error:
            self._staged.pop(commit.digest, None)
            self.post(events.ApplyFailed(lineage, _reason(error)))

    async def _replay(self, steps: tuple[events.CommitStep, ...], sources: tuple[PeerId, ...]) -> None:
        """Fetch and take one step after the other; what an earlier attempt has done stays done."""
        engine = self._engine.engines[self.stage]
        try:
            with self._pausing(steps[-1].commit):
                await self._stop_adding()
                for step in steps:
                    if step.commit.version > engine.version:
                        update = await self._sync.fetch_update(step.commit, self._known(sources, step.commit))
                        await to_its_end(self._take_step(step.commit, step.signed, step.lineage, update))
                self.post(events.Applied(steps[-1].lineage, self.state_digest, await self._late_norm()))
        except (TransientError, PeerFault) as error:
            self.post(events.ApplyFailed(steps[-1].lineage, _reason(error)))

    async def _stop_adding(self) -> None:
        """End the round at hand if nobody has told us that it is over: its work belongs to the state that is left."""
        if self._engine.is_open(self.stage):
            self._gate.freeze(self.stage)
            await self._compute.run(lambda: self._end_adding(None, None, replaces=True), priority=Priority.CONTROL)

    def _end_adding(self, following: Commit | None, update: Update | None, *, replaces: bool) -> int:
        """Make what was added up our contribution, in the compute thread; return its tokens.

        If it takes the place of the one before, that is the one which the commit `following` is of.
        """
        if replaces:
            self._sync.before_replaced(following, update)
        return self._engine.freeze(self.stage, replaces=replaces)

    async def _take_step(self, commit: Commit, signed: Signed, lineage: Lineage, update: Update) -> Digest:
        """Absorb an update, log it, and tell the rest of the peer; return the digest of the new state."""
        await self._sync.absorb(commit, update)
        keeping = self._sync.keep(commit, signed, update)
        state_digest, _ = await asyncio.gather(self._state_digest(), keeping)  # the disk need not wait for the hash
        self._after_step(commit, signed, lineage, state_digest)
        standing = standing_after(commit, lineage)  # last: it may write for a long time
        await self._compute.run(lambda: self._engine.note_standing(self.stage, standing), priority=Priority.CONTROL)
        return state_digest

    def _after_step(self, commit: Commit, signed: Signed, lineage: Lineage, state_digest: Digest) -> None:
        self.statistics.committed += 1
        self._staged.clear()
        self._view.learn(membership_of(commit, lineage))
        self._reports.add(CommitReport(commit=signed))
        self.state_digest = state_digest
        log.info(
            "round.committed",
            stage=self.stage,
            round=commit.round,
            version=commit.version,
            peers=len(commit.contributors),
            codec=commit.codec,
            state=state_digest.hex()[:12],
        )
        self._hooks.on_commit(commit, signed)

    def _is_snapshot_due(self, round_id: RoundId) -> bool:
        """Every so many rounds, and before the round that only evaluates; also if the one before was void."""
        batch, every = self._manifest.batch, self._manifest.keeping.checkpoint_every
        is_due = round_id == batch.num_rounds or (round_id > 0 and round_id % every == 0)
        return is_due and (self._snapshot is None or self._snapshot.round != round_id)

    async def take_snapshot(self, round_id: RoundId, version: Version, lineage: Lineage) -> Snapshot | None:
        """Write the present state to disk. A full disk costs the snapshot, not the training."""

        def save() -> Snapshot:
            return self._history.save_snapshot(
                lambda files: self._engine.write_state(self.stage, files),
                round_id=round_id,
                version=version,
                lineage=lineage,
            )

        try:
            # in the compute thread, so that no step comes between: written as it lies, there is no second copy of it
            return await self._compute.run(save, priority=Priority.CONTROL)
        except StorageError as error:
            log.error("snapshot.failed", stage=self.stage, version=version, error=error.one_line())
            return self._snapshot

    async def _state_digest(self) -> Digest:
        engine = self._engine.engines[self.stage]
        return await self._compute.run(engine.state_digest, priority=Priority.CONTROL)

    async def _resync(self, action: events.Resync) -> None:
        """Fetch the state anew: without it this replica is of no use. If nobody can bring it, start over.

        What members say under an older charter than the one given is history; they will hear of it.
        """
        least = 0 if action.charter is None else Charter.from_bytes(action.charter.payload).generation
        self._gate.freeze(self.stage)
        await self._compute.run(lambda: self._engine.freeze(self.stage, contributes=False), priority=Priority.CONTROL)
        self._staged.clear()
        if action.is_choice:  # what we had, and whom we knew, is of the branch that is given up
            self._snapshot = None
            self._view.forget(self.stage)
        give_up_s = time.monotonic() + RESYNC_PATIENCE_S
        while time.monotonic() < give_up_s:
            try:
                others = () if action.is_choice else self._hooks.sources()
                everybody = [*action.sources, *others]
                place = await self._sync.from_members(everybody, least_generation=least, forgets=action.is_choice)
            except UnreachableError as error:
                log.info("resync.waiting", stage=self.stage, error=error.one_line())
                await asyncio.sleep(self._beat_s * 4)
                continue
            assert place.charter is not None
            self.state_digest = await self._state_digest()
            self.post(events.Synced(place.charter, place.commits, self.state_digest))
            return
        log.warning("resync.given_up", stage=self.stage)
        self._hooks.on_lost()

    # -- messages -------------------------------------------------------------------------------------

    def _send(self, to: PeerId, message: StageMessage) -> None:
        if to == self._me:  # a closing concerns all stages that are hosted here
            self._hooks.on_own_closing(message)
        else:
            self._outbox.put(to, message)

    def _on_gone(self, peer: PeerId) -> None:
        self._view.note_gone(peer, now_s=time.monotonic())  # the coordinator hears of it, and may found anew
        self.post(events.PeerGone(peer))

    async def _beat(self) -> None:
        while True:
            if not self._is_tick_due:  # one is enough, however long a step of the optimizer took
                self._is_tick_due = True
                self.post(events.Tick())
            await asyncio.sleep(self._beat_s)

    def _start(self, work: Coroutine[None, None, None], *, name: str) -> asyncio.Task[None]:
        assert self._group is not None, "actions are only performed while the driver runs"
        return self._group.create_task(work, name=name)

    def _stage_update(self, digest: Digest, update: Update) -> None:
        self._staged[digest] = update
        while len(self._staged) > STAGED_KEPT:
            self._staged.pop(next(iter(self._staged)))


def _reason(error: Exception) -> str:
    text = error.one_line() if isinstance(error, SwarmError) else " ".join(f"{type(error).__name__}: {error}".split())
    return text[:200]


def membership_of(commit: Commit, lineage: Lineage) -> Membership:
    """Read the next round's members, with what they weigh, out of a commit."""
    weights = _speeds(commit) if commit.stage == FIRST_STAGE else _shares(commit)
    return Membership(
        stage=commit.stage,
        generation=commit.generation,
        round=RoundId(commit.round + 1),
        version=commit.version,
        lineage=lineage,
        members={seat.peer: weight for seat, weight in zip(commit.seats, weights, strict=True)},
    )


def _speeds(commit: Commit) -> list[float]:
    """Weigh feeders by how fast they are: numbers are dealt out by it."""
    known = [speed for speed in commit.speeds if speed > 0]
    usual = statistics.median(known) if known else 1.0
    # It is a peer's own word: who claims too much would get all numbers and do none of them. One that is slower by more
    # than that hardly counts, but has to have something to be measured by.
    least, most, newcomer = LEAST_SPEED * usual, MOST_SPEED * usual, NEWCOMER_SPEED * usual
    return [min(max(speed, least), most) if speed > 0 else newcomer for speed in commit.speeds]


def _shares(commit: Commit) -> list[float]:
    """Weigh those to whom others send by what they did: half of that, half of the mean.

    How fast they could be shows in their answers, which the router minds. By what they did alone, shares would drift
    apart by chance (Polya's urn).
    """
    weights = {contribution.peer: contribution.weight for contribution in commit.contributors}
    mean = max(1.0, commit.total_tokens / len(commit.seats))
    return [0.5 * (mean + weights.get(seat.peer, 0)) for seat in commit.seats]
