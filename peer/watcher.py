"""A watcher: follows stages without being one of their replicas, and recomputes what others did there.

Owns: keeping up with the stages' members, and what it takes to carry out audits. Must not know: who is audited; rounds
and seats, for it has none. The organiser runs it (`peer watch`), for stages that have too few replicas to look at each
other's work. Nobody has to trust it with more than that: it sends nothing that anybody computes with.

What a stage's members agree on is fetched as a joiner does (`peer/averaging/sync.py`): a snapshot, and then one update
after the other. Past weights are kept on the way.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Iterable
from functools import partial
from pathlib import Path

import structlog

from peer.auditor import Auditor
from peer.averaging.history import History
from peer.averaging.rules import machine_settings
from peer.averaging.sync import Place, StageSync
from peer.contributions import Contributions
from peer.coordination import Condition
from peer.data.fetch import SwarmChunks
from peer.data.source import BatchSource, open_files
from peer.data.tokens import TokenFile
from peer.engine.build import build_recomputer
from peer.engine.local_checkpoint import Standing
from peer.engine.schedule import learning_rate
from peer.engine.span import SpanEngine
from peer.link import Link
from peer.payloads import Payloads
from peer.pipeline.compute import ComputeThread, Priority
from peer.pipeline.gate import Gate
from peer.reports import ReportQueue
from protocol.batches import TaskKind
from protocol.control import BeatReply, PeerState, StageState
from protocol.errors import PeerFault, RefusedError, TransientError
from protocol.hops import MAX_BODY_BYTES
from protocol.ids import Lineage, PeerId, RoundId, StageId, Version
from protocol.manifest import Manifest
from protocol.rounds.lineage import Chain
from protocol.rounds.messages import COMMIT_CONTEXT, Commit
from protocol.signing import unseal

log = structlog.get_logger()

LOOK_EVERY_S = 0.5
MAX_ASKED = 3  # members that are asked at a time where their stage stands
RELOAD_EVERY_S = 3600.0  # from a snapshot: another machine's steps may differ from theirs by what a float rounds away


class Watcher:
    """Follows some stages of a run."""

    def __init__(
        self,
        *,
        link: Link,
        manifest: Manifest,
        engine: SpanEngine,
        compute: ComputeThread,
        reports: ReportQueue,
        session: int,
        folder: Path,
        audit_bytes: int,
    ) -> None:
        self._link, self._manifest, self._engine, self._compute = link, manifest, engine, compute
        self._folder = folder
        self._gate = Gate(run=manifest.run_id)
        self._members: dict[StageId, tuple[PeerId, ...]] = {}
        self._places: dict[StageId, Place] = {}
        self._errands: set[asyncio.Task[None]] = set()
        self._token_files: dict[TaskKind, TokenFile] = {}
        self._recomputer = build_recomputer(manifest, engine, max_bytes=audit_bytes)
        self.stages = tuple(engine.engines)
        self._auditor = Auditor(
            link=link,
            compute=compute,
            recomputer=self._recomputer,
            payloads=Payloads(max_bytes=0),
            contributions=Contributions(
                me=link.peer_id,
                engines=engine.engines,
                recomputer=self._recomputer,
                gate=self._gate,
                report=reports.add,
            ),
            batches=BatchSource(data=manifest.data, batch=manifest.batch, files=self._token_files),
            gate=self._gate,
            reports=reports,
            stages=self.stages,
            num_stages=manifest.model.num_stages,
            max_body_bytes=MAX_BODY_BYTES,
        )
        self._syncs = {stage: self._make_sync(stage, session) for stage in self.stages}
        self.is_finished = asyncio.Event()

    @property
    def recomputed(self) -> int:
        """How many microbatches and contributions were recomputed."""
        return self._auditor.num_done

    @property
    def round(self) -> RoundId | None:
        """The latest round that a stage is in."""
        return max((place.round for place in self._places.values()), default=None)

    def condition(self) -> Condition:
        """Return what a beat should say: which stages are followed, and to where."""
        stages = tuple(
            StageState(
                stage=stage, round=place.round, version=place.version, lineage=place.lineage, ready=True, members=0
            )
            for stage, place in sorted(self._places.items())
        )
        return Condition(PeerState.WATCHING, "" if stages else "looking for members", stages)

    def on_reply(self, reply: BeatReply) -> None:
        """Take over what the coordinator says."""
        members: dict[StageId, list[PeerId]] = {}
        for stage, peer, addresses in reply.members:
            members.setdefault(stage, []).append(peer)
            task = asyncio.create_task(self._link.introduce(peer, addresses))
            self._errands.add(task)
            task.add_done_callback(self._errands.discard)
        if members:
            self._members = {stage: tuple(peers) for stage, peers in members.items()}
        self._auditor.take((*reply.sketches, *reply.audits, *reply.sums))
        if reply.finished:
            self.is_finished.set()

    async def run(self) -> None:
        """Follow and recompute until the run is over."""
        await self._open_tokens()
        async with asyncio.TaskGroup() as tasks:
            beside = [tasks.create_task(self._follow(stage)) for stage in self.stages]
            beside.append(tasks.create_task(self._auditor.run()))
            await self.is_finished.wait()
            for task in beside:
                task.cancel()

    async def close(self) -> None:
        """Give back what is held open."""
        for task in list(self._errands):
            task.cancel()
        await asyncio.gather(*self._errands, return_exceptions=True)
        await self._compute.run(self._engine.close, priority=Priority.CONTROL)
        for file in self._token_files.values():
            file.close()

    # -- private --------------------------------------------------------------------------------------

    def _make_sync(self, stage: StageId, session: int) -> StageSync:
        machine = machine_settings(self._manifest, stage, key=self._link.key, session=session)
        return StageSync(
            stage,
            engine=self._engine.engines[stage],
            history=History(self._folder / f"stage-{stage}", stage=stage),
            compute=self._compute,
            calls=self._link.calls,
            blobs=self._link.blobs,
            me=self._link.peer_id,
            coordinator=self._link.coordinator,
            schedule=learning_rate(self._manifest),
            check_history=partial(Chain.of_history, machine),
            init_seed=self._manifest.model.init_seed,
            before_step=lambda commit, update: self._recomputer.keep(stage),
        )

    async def _open_tokens(self) -> None:
        if self._engine.is_first or self._engine.is_last:
            data = self._manifest.data
            chunks = SwarmChunks(self._link.blobs, (data.train, data.heldout), sources=self._token_sources)
            await open_files(self._token_files, self._manifest, folder=self._folder / "tokens", source=chunks)

    def _token_sources(self, name: str) -> Iterable[PeerId]:
        return (self._link.coordinator,)

    async def _follow(self, stage: StageId) -> None:
        """Stay where a stage's members are. Whatever they send, the next look may find something better."""
        loaded_s = time.monotonic()
        while True:
            members = self._members.get(stage, ())
            if time.monotonic() - loaded_s > RELOAD_EVERY_S:
                loaded_s = time.monotonic()
                self._syncs[stage].forget_own()
            try:
                await self._catch_up(stage, random.sample(members, min(MAX_ASKED, len(members))))
            except (TransientError, PeerFault, RefusedError) as error:
                self._places.pop(stage, None)
                log.info("watch.behind", stage=stage, error=error.one_line())
            await asyncio.sleep(LOOK_EVERY_S)

    async def _catch_up(self, stage: StageId, members: Iterable[PeerId]) -> None:
        place = await self._syncs[stage].from_members(members)
        self._syncs[stage].hold(Standing(place.version, place.round, place.lineage))
        for signed in place.commits:  # of what was worked on between two looks
            commit = unseal(signed, COMMIT_CONTEXT, Commit)
            for round_id in range(commit.first_round, commit.round + 1):
                self._note(stage, RoundId(round_id), Version(commit.version - 1), commit.parent)
        self._note(stage, place.round, place.version, place.lineage)
        self._places[stage] = place

    def _note(self, stage: StageId, round_id: RoundId, version: Version, lineage: Lineage) -> None:
        """Remember with which version a round began, so that its work can be recomputed."""
        if self._gate.version_at(stage, round_id) != version:
            self._gate.open(stage, round_id=round_id, version=version, lineage=lineage)
