"""Puts the parts of a span together: engines, pipeline, one round driver per stage, and what they serve.

Owns: construction and wiring, nothing else: who gets which object, which message goes to whom. Must not
know: the order of a session's life (`peer/session.py`). If you wonder who calls whom in a peer, it is here.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Coroutine, Iterable, Mapping
from functools import partial
from pathlib import Path

import structlog

from peer.auditor import Auditor
from peer.averaging.driver import Hooks, StageDriver, membership_of
from peer.averaging.group_reduce import GroupReduce
from peer.averaging.history import History
from peer.averaging.own_disk import OwnDisk
from peer.averaging.restore import Restorer
from peer.averaging.rules import done_task, machine_settings, round_timers
from peer.averaging.sync import StageSync
from peer.contributions import Contributions
from peer.data.fetch import open_files, serve_tokens
from peer.data.source import BatchSource
from peer.data.tokens import TokenFile
from peer.engine.build import build_recomputer
from peer.engine.schedule import learning_rate
from peer.engine.span import SpanEngine
from peer.link import Link
from peer.memory.executor import Pause
from peer.payloads import Payloads
from peer.pipeline.board import Board
from peer.pipeline.callee import HopServer, HostedTask
from peer.pipeline.caller import HopCaller
from peer.pipeline.compute import ComputeThread, Priority
from peer.pipeline.demand import WAVES, Demand, InFlight
from peer.pipeline.feeder import FIRST_STAGE, Feeder
from peer.pipeline.gate import Gate
from peer.pipeline.router import Router
from peer.pipeline.span import SpanRunner
from peer.pipeline.view import Membership, View
from peer.pipeline.waves import Waves
from peer.receipts import ReceiptBook
from peer.reports import ReportQueue
from peer.settings import PeerSettings
from peer.tally import Tally
from peer.tasks import Body, Outcome, TaskId
from protocol.audits import NonsenseReport, Order
from protocol.batches import Microbatch, TaskKind
from protocol.control import CommitReport, GivenUp, ReceiptReport
from protocol.errors import PeerFault, RefusedError, TransientError
from protocol.history import CommitNews, LogAnswer, LogRequest, StateAnswer, StateRequest
from protocol.hops import MAX_BODY_BYTES
from protocol.ids import Digest, Lineage, PeerId, RoundId, StageId, Version
from protocol.manifest import Manifest
from protocol.ownership import rendezvous
from protocol.rounds import events
from protocol.rounds.lineage import Chain, next_lineage, root_lineage
from protocol.rounds.machine import RoundMachine
from protocol.rounds.messages import (
    CHARTER_CONTEXT,
    COMMIT_CONTEXT,
    ROUND_MESSAGES,
    Charter,
    Closing,
    ClosingNotice,
    Commit,
    StageMessage,
)
from protocol.rounds.settings import Settings
from protocol.signing import Signed, unseal
from protocol.transport.blobs import Load
from protocol.transport.calls import Done

log = structlog.get_logger()

NEWS_TIMEOUT_S = 3.0
MAX_INFORMANTS = 8
MAX_NONSENSE = 1024  # peers and rounds that are remembered as told of
MAX_TOKEN_SOURCES = 3  # besides the coordinator: more would only be more ways to wait


class SpanParts:
    """Everything that works on one span."""

    def __init__(
        self,
        *,
        link: Link,
        settings: PeerSettings,
        manifest: Manifest,
        engine: SpanEngine,
        compute: ComputeThread,
        reports: ReportQueue,
        session: int,
        folder: Path,
    ) -> None:
        self._link = link
        self._manifest = manifest
        self._engine = engine
        self._compute = compute
        self._reports = reports
        self._folder = folder
        self._errands: set[asyncio.Task[None]] = set()
        run = manifest.run_id
        forward_codec, gradient_codec = manifest.averaging.hop_codecs
        self.stages = tuple(engine.engines)
        self.num_stages = manifest.model.num_stages
        self.sources_of: Callable[[StageId], tuple[PeerId, ...]] = lambda stage: ()
        """Whom to ask for a stage's state; the session knows."""
        self.on_lost: Callable[[], None] = lambda: None
        """Called when a stage's state cannot be had from anybody; the session knows what then."""
        self.on_pause: Callable[[], None] = lambda: None
        """Called when this machine turns out to need a pause."""
        self.tally = Tally()
        self.view = View()
        self.gate = Gate(run=run)
        self._board: Board | None = None
        self._token_files: dict[TaskKind, TokenFile] = {}
        self._batches = BatchSource(data=manifest.data, batch=manifest.batch, files=self._token_files)
        self._caller = HopCaller(
            run=run,
            me=link.peer_id,
            codec=forward_codec,
            gradient_codec=gradient_codec,
            num_stages=self.num_stages,
            streams=link.streams,
            view=self.view,
            router=Router(run=run),
            hop_silence_s=manifest.timing.hop_silence_s,
        )
        self._caller.on_lost = link.lost
        self._caller.on_answer = self._note_answer
        self._receipts = ReceiptBook(run, link.key, session=session)
        self._payloads = Payloads(max_bytes=settings.audit_bytes // 2)
        self._reports = reports
        self._nonsense: deque[tuple[PeerId, RoundId]] = deque(maxlen=MAX_NONSENSE)
        recomputer = build_recomputer(manifest, engine, max_bytes=settings.audit_bytes // 2)
        loop = asyncio.get_running_loop()
        self._contributions = Contributions(
            me=link.peer_id,
            engines=engine.engines,
            recomputer=recomputer,
            gate=self.gate,
            report=lambda report: loop.call_soon_threadsafe(reports.add, report),
        )
        # whoever waits for us must not take a wave that gathers for a peer that is gone
        patience_s = min(engine.wave_patience_s, manifest.timing.hop_silence_s / 4)
        self._demand = Demand(self.view, last=engine.last)
        serving = self._in_flight(max(settings.slots, WAVES * engine.wave))
        feeding = self._in_flight(max(self.num_stages + 1, WAVES * engine.wave), chosen=settings.in_flight)
        self._waves = Waves(
            compute,
            size=lambda: min(engine.wave, feeding.limit()) if engine.is_first else engine.wave,
            patience_s=patience_s,
        )
        engine.on_progress(compute.advance)
        self._runner = SpanRunner(
            run=run,
            key=link.key,
            engine=engine,
            compute=compute,
            waves=self._waves,
            caller=self._caller,
            gate=self.gate,
            batches=self._batches,
            on_pause=lambda: self.on_pause(),
            on_nonsense=self._note_nonsense,
        )
        self._server = HopServer(
            run=run,
            codec=forward_codec,
            streams=link.streams,
            gate=self.gate,
            work=self._work,
            on_answered=self._note_served,
            on_received=self._count_received,
            body_bytes=engine.body_bytes,
            load_s=self.load_s,
            jobs_done=lambda: compute.progress,
            num_slots=serving.limit,
            num_numbers=lambda round_id: len(self._batches.plan(round_id)),
            round_deadline_s=manifest.timing.round_deadline_s,
        )
        self._auditor = Auditor(
            link=link,
            compute=compute,
            recomputer=recomputer,
            payloads=self._payloads,
            contributions=self._contributions,
            batches=self._batches,
            gate=self.gate,
            reports=reports,
            stages=self.stages,
            num_stages=self.num_stages,
            max_body_bytes=MAX_BODY_BYTES,
        )
        self._reduce = GroupReduce(link.node.p2p, namespace=run, folder=folder, line=link.line, passes=link.passes)
        self._feeder = Feeder(
            run=run,
            me=link.peer_id,
            runner=self._runner,
            gate=self.gate,
            view=self.view,
            batches=self._batches,
            on_board=self._take_board,
            on_finished=self._finished,
            in_flight=feeding.limit,
            wave_of=partial(self._demand.wave_of, FIRST_STAGE),
            round_deadline_s=manifest.timing.round_deadline_s,
            first_takeover_s=manifest.timing.hop_silence_s,
        )
        self._histories = {stage: History(folder / f"stage-{stage}", stage=stage) for stage in self.stages}
        machine = {stage: machine_settings(manifest, stage, key=link.key, session=session) for stage in self.stages}
        self._syncs = {stage: self._make_sync(stage, machine[stage]) for stage in self.stages}
        self.drivers = {stage: self._make_driver(stage, machine[stage]) for stage in self.stages}

    # -- life -----------------------------------------------------------------------------------------

    async def open_tokens(self) -> None:
        """Open the token files if this span reads tokens (the first and the last stage do), and fetch them."""
        if not (self._engine.is_first or self._engine.is_last):
            return
        await open_files(
            self._token_files,
            self._manifest,
            folder=self._folder / "tokens",
            blobs=self._link.blobs,
            sources=self._token_sources,
        )

    async def serve(self) -> None:
        """Answer hops, reduces, round messages and requests for history."""
        calls = self._link.calls
        for kind in ROUND_MESSAGES:
            calls.on(kind, self._on_round_message)
        calls.on(StateRequest, self._on_state_request)
        calls.on(LogRequest, self._on_log_request)
        calls.on(CommitNews, self._on_commit_news)
        await calls.serve()
        await self._link.blobs.serve(self._resolve)
        await self._reduce.start()
        await self._server.serve()

    def background(self) -> Iterable[Coroutine[None, None, None]]:
        """Return what has to run beside the drivers."""
        yield self._runner.wait_broken()
        if self._engine.is_first:
            yield self._feeder.run()
        yield self._refresh_views()
        yield self._auditor.run()

    async def stop(self) -> None:
        """Stop what serves; the files stay.

        Nothing may hold on to us afterwards: the next span needs the memory of this one.
        """
        self.gate.is_leaving = True
        self._link.calls.off(*ROUND_MESSAGES, StateRequest, LogRequest, CommitNews)
        self._link.blobs.retire()
        await self._server.stop()
        for task in list(self._errands):
            task.cancel()
        await asyncio.gather(*self._errands, return_exceptions=True)
        for window in self._receipts.close_all():
            self._reports.add(ReceiptReport(window=window))
        await self._reduce.stop()
        self._waves.close()
        await self._compute.run(self._engine.close, priority=Priority.CONTROL)
        for file in self._token_files.values():
            file.close()

    def drive_bytes(self) -> int | None:
        """Return how much was written to the NVMe drive today, if one is used."""
        return self._engine.drive_bytes()

    def pause(self) -> Pause | None:
        """Return why this machine needs a pause, if it does."""
        return self._engine.pause()

    def restorer(self, stage: StageId) -> Restorer:
        """Return what brings a stage to its first state."""
        own_disk = OwnDisk(
            stage,
            sync=self._syncs[stage],
            history=self._histories[stage],
            calls=self._link.calls,
            coordinator=self._link.coordinator,
            on_unreported=lambda signed: self._reports.add(CommitReport(commit=signed)),
        )
        return Restorer(
            stage,
            sync=self._syncs[stage],
            own_disk=own_disk,
            history=self._histories[stage],
            engine=self._engine,
            compute=self._compute,
            blobs=self._link.blobs,
            coordinator=self._link.coordinator,
        )

    def give_up(self, what: GivenUp) -> None:
        """Let a stage follow others instead of what it has, if it still has it."""
        if what.stage in self.drivers:
            self.drivers[what.stage].post(events.Rejoin(what.lineage, what.members))

    def _note_nonsense(self, peer: PeerId, task: TaskId) -> None:
        """Tell the coordinator who sends us what are no numbers, once for each round."""
        log.warning("hop.nonsense", peer=peer, round=task.round, number=task.number)
        if (peer, task.round) not in self._nonsense:
            self._nonsense.append((peer, task.round))
            self._reports.add(NonsenseReport(peer=peer, round=task.round))

    def audit(self, orders: Iterable[Order]) -> None:
        """Carry out what the coordinator wants to be looked at."""
        self._auditor.take(orders)

    def learn_charter(self, charter: Charter, lineage: Lineage) -> None:
        """Let the router know the members that a charter names."""
        self.view.learn(
            Membership(
                stage=charter.stage,
                generation=charter.generation,
                round=charter.round,
                version=charter.version,
                lineage=lineage,
                members={seat.peer: 1.0 for seat in charter.seats},
            )
        )

    def learn_waves(self, waves: Mapping[StageId, Mapping[PeerId, int]]) -> None:
        """Take over how many microbatches pass others together, so that we send them enough."""
        self._demand.learn(waves)

    def load_s(self) -> float:
        """Estimate how long a new task would wait here."""
        return self._compute.load_s() + self._waves.num_gathering * self._compute.task_s

    def introduce(self, peer: PeerId, addresses: Iterable[str]) -> None:
        """Tell the daemon where a peer lives, without waiting for it."""
        self._start(self._link.introduce(peer, addresses))

    # -- wiring ---------------------------------------------------------------------------------------

    def _in_flight(self, usual: int, *, chosen: int = 0) -> InFlight:
        """Bound what is under way by the room for it, and by what the volunteer has chosen (0: nothing)."""
        own = chosen or usual
        room = self._engine.in_flight or own
        return InFlight(self._demand, own=own, most=min(chosen, room) if chosen else room)

    def _make_sync(self, stage: StageId, machine: Settings) -> StageSync:
        return StageSync(
            stage,
            engine=self._engine.engines[stage],
            history=self._histories[stage],
            compute=self._compute,
            calls=self._link.calls,
            blobs=self._link.blobs,
            me=self._link.peer_id,
            coordinator=self._link.coordinator,
            schedule=learning_rate(self._manifest),
            check_history=partial(Chain.of_history, machine),
            init_seed=self._manifest.model.init_seed,
            resumed=self._engine.resumed.get(stage),
            before_step=partial(self._contributions.before_step, stage),
            before_replaced=partial(self._contributions.before_replaced, stage),
        )

    def _make_driver(self, stage: StageId, machine: Settings) -> StageDriver:
        return StageDriver(
            stage,
            manifest=self._manifest,
            machine=RoundMachine(machine),
            me=self._link.peer_id,
            engine=self._engine,
            compute=self._compute,
            calls=self._link.calls,
            reduce=self._reduce,
            sync=self._syncs[stage],
            history=self._histories[stage],
            gate=self.gate,
            view=self.view,
            reports=self._reports,
            hooks=Hooks(
                on_freeze=lambda closing: self._on_freeze(stage, closing),
                on_commit=self._on_commit,
                sources=lambda: self.sources_of(stage),
                on_own_closing=self._on_own_closing,
                on_lost=lambda: self.on_lost(),
                on_bits=self._on_bits,
            ),
            beat_s=round_timers(self._manifest).beat_s,
        )

    async def _work(self, hosted: HostedTask) -> Outcome:
        self._keep(hosted.key.task, hosted.body.digest, hosted.body.data)
        return await self._runner.work(
            hosted.key.task,
            hosted.key.stage,
            hosted.body,
            caller=hosted.key.caller,
            pulse=hosted.pulse,
            deadline_s=hosted.deadline_s,
            retries_left=hosted.retries_left,
        )

    def _note_served(self, hosted: HostedTask, outcome: Outcome) -> None:
        key = hosted.key
        self._receipts.note(key.task, key.caller, self._link.peer_id, key.stage, hosted.body, outcome)
        self._keep(key.task, outcome.gradient_digest, outcome.gradient)

    def _note_answer(self, task: TaskId, callee: PeerId, stage: StageId, body: Body, outcome: Outcome) -> None:
        self._receipts.note(task, self._link.peer_id, callee, stage, body, outcome)
        self._keep(task, body.digest, body.data)
        self._keep(task, outcome.gradient_digest, outcome.gradient)

    def _keep(self, task: TaskId, digest: Digest, data: bytes | bytearray | None) -> None:
        """Keep what crossed a hop of ours for audits. Evaluations are not audited."""
        if task.kind is TaskKind.TRAIN:
            self._payloads.keep(digest, data)

    def _count_received(self, task: TaskId, target_tokens: int) -> None:
        if task.kind is TaskKind.TRAIN:
            self.tally.accept(target_tokens, fed=False)

    def _take_board(self, board: Board) -> None:
        self._board = board

    def _finished(self, board: Board, microbatch: Microbatch, outcome: Outcome) -> None:
        if microbatch.kind is TaskKind.TRAIN:
            self.tally.accept(outcome.target_tokens, fed=True)
        self.drivers[FIRST_STAGE].post(events.TaskDone(board.round, done_task(microbatch, outcome)))

    def _on_bits(self, round_id: RoundId, done: int) -> None:
        if self._board is not None and self._board.round == round_id:
            numbers = (number for number in range(done.bit_length()) if done >> number & 1)
            self._board.learn_done(numbers, now_s=time.monotonic())

    def _on_freeze(self, stage: StageId, closing: Closing) -> None:
        self.tally.learn_closing(closing)
        self._server.end_round(closing.round)
        if stage == self.stages[0] and not closing.num_train:  # nothing to average: no commit will follow
            self._report_work(closing.round)

    def _on_commit(self, commit: Commit, signed: Signed) -> None:
        """Report the round's work once, and tell the neighbouring stages who goes on."""
        if commit.stage == self.stages[0]:
            self._report_work(commit.round)
        self._start(self._tell_neighbours(commit, signed))

    def _report_work(self, round_id: RoundId) -> None:
        for window in self._receipts.close(round_id):
            self._reports.add(ReceiptReport(window=window))
        self._reports.add(
            self.tally.end_round(
                round_id,
                self._caller.statistics,
                fed_again=self._feeder.num_fed_again,
                busy_s=self._compute.statistics().busy_s,
            )
        )

    # -- serving --------------------------------------------------------------------------------------

    async def _on_round_message(self, caller: PeerId, message: StageMessage) -> Done:
        if isinstance(message, ClosingNotice):  # about the whole run, whoever's clock it was
            for driver in self.drivers.values():
                driver.receive(caller, message)
        else:
            self._driver_of(message.stage).receive(caller, message)
        return Done()

    def _on_own_closing(self, message: StageMessage) -> None:
        for stage, driver in self.drivers.items():
            if stage != message.stage:
                driver.post(events.Received(self._link.peer_id, message))

    async def _on_state_request(self, caller: PeerId, request: StateRequest) -> StateAnswer:
        return await self._driver_of(request.stage).answer_state()

    async def _on_log_request(self, caller: PeerId, request: LogRequest) -> LogAnswer:
        return await self._driver_of(request.stage).answer_log(request)

    def _driver_of(self, stage: StageId) -> StageDriver:
        driver = self.drivers.get(stage)
        if driver is None:
            raise RefusedError(f"stage {stage} is not hosted here")
        return driver

    def _resolve(self, caller: PeerId, name: str) -> Path | bytes | memoryview | Load | None:
        """Find a blob by name: token chunks, snapshots, updates."""
        kinds = {TaskKind.TRAIN: self._manifest.data.train.name, TaskKind.EVAL: self._manifest.data.heldout.name}
        if name.startswith("tokens/"):
            return serve_tokens(name, ((kinds[kind], file) for kind, file in self._token_files.items()))
        if name.startswith("payload/"):
            return self._payloads.resolve(name)
        pieces = name.split("/")
        if len(pieces) not in (3, 4) or not pieces[1].isdecimal() or int(pieces[1]) not in self._histories:
            return None
        stage = StageId(int(pieces[1]))
        if pieces[0] == "staged":
            return self.drivers[stage].staged_update(pieces[2])
        if not pieces[2].isdecimal():
            return None
        part = pieces[3] if len(pieces) == 4 else ""
        return self._histories[stage].resolve(pieces[0], Version(int(pieces[2])), part)

    # -- keeping the view fresh -----------------------------------------------------------------------

    async def _refresh_views(self) -> None:
        """Ask replicas of a stage for its newest commit whenever a hop shows that ours is stale."""
        while True:
            stage, peer = await self._caller.on_stale_view.get()
            self._start(self._refresh_view(stage, peer))  # beside the others: one that hangs holds up nobody else

    async def _refresh_view(self, stage: StageId, peer: PeerId | None) -> None:
        try:
            for informant in self._informants(stage) if peer is None else [peer]:
                try:
                    request = StateRequest(stage=stage)
                    answer = await self._link.calls.call(informant, request, StateAnswer, timeout_s=NEWS_TIMEOUT_S)
                    self._learn_answer(answer)
                except (TransientError, PeerFault, RefusedError) as error:
                    log.debug("view.unrefreshed", stage=stage, peer=informant, error=error.one_line())
                else:
                    return
        finally:
            self._caller.news_asked(stage, peer)

    def _informants(self, stage: StageId) -> list[PeerId]:
        """List who may know a stage's newest members: whoever is said to host it, less who did not answer lately."""
        suspects = set(self.view.suspects(now_s=time.monotonic()))
        return [peer for peer in self.sources_of(stage) if peer not in suspects][:MAX_INFORMANTS]

    def _learn_answer(self, answer: StateAnswer) -> None:
        """Take over another stage's newest membership from one of its replicas."""
        if answer.charter is None:
            return
        charter = unseal(answer.charter, CHARTER_CONTEXT, Charter, signer=self._link.coordinator)
        self.learn_charter(charter, root_lineage(answer.charter))
        if answer.commit is not None:
            commit = unseal(answer.commit, COMMIT_CONTEXT, Commit)
            if (commit.stage, commit.generation) != (charter.stage, charter.generation):
                raise PeerFault("a commit came with another stage's charter")
            self.view.learn(membership_of(commit, next_lineage(commit.parent, answer.commit.payload)))

    async def _on_commit_news(self, caller: PeerId, news: CommitNews) -> Done:
        """Believe a commit that follows the membership we know and is signed by one of its members; else ask."""
        commit = unseal(news.commit, COMMIT_CONTEXT, Commit)
        if commit.stage >= self.num_stages:
            raise PeerFault(f"there is no stage {commit.stage} in this run")
        known = self.view.membership(commit.stage)
        if known is not None and commit.parent == known.lineage and news.commit.signer in known.members:
            self.view.learn(membership_of(commit, next_lineage(commit.parent, news.commit.payload)))
        else:  # a stranger's word only makes us ask those whom somebody else names
            self._caller.ask_for_news(commit.stage, caller if caller in self.sources_of(commit.stage) else None)
        return Done()

    async def _tell_neighbours(self, commit: Commit, signed: Signed) -> None:
        """Spread a commit over the stage that sends to us: each of our members tells its share of theirs.

        Stage 0 keeps the run's clock, so everybody has to know its members. Who hosts the stage before ours is
        known from the coordinator and the DHT as well: its own commits do not come our way.
        """
        ours = [seat.peer for seat in commit.seats]
        if self._link.peer_id not in ours:
            return
        listeners = [commit.stage - 1] if commit.stage else list(range(1, self.num_stages))
        theirs = {peer for stage in listeners for peer in self.sources_of(StageId(stage))}
        mine = [peer for peer in sorted(theirs) if rendezvous(peer, dict.fromkeys(ours, 1.0))[0] == self._link.peer_id]
        await asyncio.gather(*(self._tell(peer, CommitNews(commit=signed)) for peer in mine))

    async def _tell(self, peer: PeerId, news: CommitNews) -> None:
        try:
            await self._link.calls.tell(peer, news, timeout_s=NEWS_TIMEOUT_S)
        except (TransientError, PeerFault, RefusedError) as error:
            log.debug("news.undelivered", peer=peer, error=error.one_line())

    def _token_sources(self, name: str) -> list[PeerId]:
        """Ask fellow readers of tokens first, each for other chunks, and the coordinator last: its line is thin."""
        last = StageId(self._manifest.model.num_stages - 1)
        away = {self._link.peer_id, *self.view.suspects(now_s=time.monotonic())}
        memberships = [self.view.membership(stage) for stage in (FIRST_STAGE, last)]
        readers = {peer: 1.0 for known in memberships if known for peer in known.members if peer not in away}
        return [*rendezvous(name, readers)[:MAX_TOKEN_SOURCES], self._link.coordinator]

    def _start(self, work: Coroutine[None, None, None]) -> None:
        task = asyncio.create_task(work)
        self._errands.add(task)
        task.add_done_callback(self._errands.discard)
