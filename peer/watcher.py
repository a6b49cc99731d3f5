"""A watcher: follows stages without being one of their replicas, and recomputes what others did there.

Owns: keeping up with the stages' members, and what it takes to carry out audits. Must not know: who is audited; rounds
and seats, for it has none. The organiser runs it (`peer watch`), for stages that have too few replicas to look at each
other's work. Nobody has to trust it with more than that: it sends nothing that anybody computes with.

It begins with the coordinator's checkpoint or the initial weights, and takes one committed update after the other; past
weights are kept on the way. No member's snapshot is taken: it might be made up, to put others out by it.
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
from peer.averaging.restore import NO_LINEAGE, folder_of, newest_checkpoint
from peer.averaging.rules import machine_settings
from peer.averaging.sync import Place, StageSync
from peer.contributions import Contributions
from peer.coordination import Condition
from peer.data.fetch import open_files
from peer.data.source import BatchSource
from peer.data.tokens import TokenFile
from peer.engine.build import build_recomputer
from peer.engine.local_checkpoint import Standing
from peer.engine.schedule import learning_rate
from peer.engine.span import SpanEngine
from peer.engine.weights import FLOAT_BYTES
from peer.link import Link
from peer.payloads import Payloads
from peer.pipeline.compute import ComputeThread, Priority
from peer.pipeline.gate import Gate
from peer.reports import ReportQueue
from protocol.batches import TaskKind
from protocol.control import BeatReply, PeerState, Snapshot, StageState
from protocol.errors import ConfigError, PeerFault, RefusedError, TransientError, UnreachableError
from protocol.hops import MAX_BODY_BYTES
from protocol.ids import Lineage, PeerId, RoundId, StageId, Version
from protocol.manifest import Manifest
from protocol.rounds.lineage import Chain, root_lineage
from protocol.rounds.messages import CHARTER_CONTEXT, COMMIT_CONTEXT, Charter, Commit
from protocol.signing import Signed, unseal
from protocol.sizes import size_text

log = structlog.get_logger()

LOOK_EVERY_S = 0.5
AGAIN_AFTER_S = 5.0  # something was not there or did not fit: look again
MAX_ASKED = 3  # members that are asked at a time where their stage stands
RELOAD_EVERY_S = 3600.0  # another machine's steps may differ from theirs by what a float rounds away
FRESH_S = 60.0  # weights that were got so lately need not be got anew


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
        self._charters: dict[StageId, tuple[Charter, Signed]] = {}
        self._loaded_s: dict[StageId, float] = {}
        """Since when a stage's weights follow from a checkpoint, on the monotonic clock; not there: they do not."""
        self._turns = {stage: asyncio.Lock() for stage in engine.engines}
        self._places: dict[StageId, Place] = {}
        self._errands: set[asyncio.Task[None]] = set()
        self._token_files: dict[TaskKind, TokenFile] = {}
        least_bytes = sum(FLOAT_BYTES * each.num_elements for each in engine.engines.values())
        if audit_bytes < least_bytes:
            wanted = f"one version of the stages that it follows takes {size_text(least_bytes)}"
            raise ConfigError(
                f"--audit-memory is too small: {wanted}.", hint="Give more, or follow fewer with --stage."
            )
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
            renew=self._renew,
        )
        self._syncs = {stage: self._make_sync(stage, session) for stage in self.stages}
        self.is_finished = asyncio.Event()

    @property
    def recomputed(self) -> int:
        """How many microbatches and contributions were recomputed."""
        return self._auditor.num_recomputed

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
        for signed in reply.charters:
            self._learn_charter(signed)
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
            is_replica=False,
        )

    async def _open_tokens(self) -> None:
        """Open the token files if tokens are read here; the coordinator may be away for a while."""
        while self._engine.is_first or self._engine.is_last:
            try:
                return await open_files(
                    self._token_files,
                    self._manifest,
                    folder=self._folder / "tokens",
                    blobs=self._link.blobs,
                    sources=lambda _: (self._link.coordinator,),
                )
            except (TransientError, PeerFault) as error:
                log.info("tokens.waiting", error=error.one_line())
                await asyncio.sleep(AGAIN_AFTER_S)

    def _learn_charter(self, signed: Signed) -> None:
        charter = unseal(signed, CHARTER_CONTEXT, Charter, signer=self._link.coordinator)
        known = self._charters.get(charter.stage)
        if known is None or known[0].generation < charter.generation:
            self._charters[charter.stage] = charter, signed
            self._places.pop(charter.stage, None)  # the run may have gone back: what is here may be of no use
            self._loaded_s.pop(charter.stage, None)

    async def _follow(self, stage: StageId) -> None:
        """Stay where a stage's members are. Whatever they send, the next look may find something better."""
        while True:
            is_there = await self._look(stage)
            await asyncio.sleep(LOOK_EVERY_S if is_there else AGAIN_AFTER_S)

    async def _renew(self, stages: Iterable[StageId]) -> None:
        """Get the weights of stages anew, unless that was lately: with all versions since the checkpoint."""
        for stage in stages:
            if time.monotonic() - self._loaded_s.get(stage, float("-inf")) > FRESH_S:
                self._loaded_s.pop(stage, None)
                await self._look(stage)

    async def _look(self, stage: StageId) -> bool:
        """Take what the members of a stage have agreed on since the last time; False if we are not where they are."""
        if stage not in self._charters:
            return False
        async with self._turns[stage]:
            if time.monotonic() - self._loaded_s.get(stage, float("-inf")) > RELOAD_EVERY_S:
                self._loaded_s.pop(stage, None)
            members = self._members.get(stage, ())
            try:
                if stage not in self._loaded_s:
                    await self._load(stage)
                await self._catch_up(stage, random.sample(members, min(MAX_ASKED, len(members))))
            except (TransientError, PeerFault, RefusedError) as error:
                log.info("watch.behind", stage=stage, error=error.one_line())
                self._places.pop(stage, None)
                if not await self._is_on_the_way(stage):
                    self._loaded_s.pop(stage, None)
                return False
            return True

    async def _load(self, stage: StageId) -> None:
        """Begin anew with the newest checkpoint, or with the initial weights if there is none.

        Raises `UnreachableError` if the stage's lineage begins after that: there will be a newer one.
        """
        sync, checkpoint = self._syncs[stage], await self._checkpoint(stage)
        charter, signed = self._charters[stage]
        if (Version(0) if checkpoint is None else checkpoint.version) < charter.version:
            raise UnreachableError(f"there is no checkpoint of stage {stage} from version {charter.version} on yet.")
        self._places.pop(stage, None)
        self._gate.forget(stage)
        await self._compute.run(lambda: self._recomputer.forget(stage), priority=Priority.CONTROL)
        if checkpoint is None:
            await sync.start_over()
            standing = Standing(Version(0), RoundId(0), NO_LINEAGE)
        else:
            await sync.from_checkpoint(checkpoint, source=self._link.coordinator, folder=folder_of(checkpoint))
            standing = Standing(checkpoint.version, checkpoint.round, checkpoint.lineage)
        if charter.version == standing.version:  # a lineage begins where its charter says, whatever it was before
            if charter.state_digest != await sync.state_digest():
                raise PeerFault(f"stage {stage} began with another state than the coordinator's checkpoint")
            standing = Standing(standing.version, max(standing.round, charter.round), root_lineage(signed))
        sync.hold(standing)
        self._loaded_s[stage] = time.monotonic()

    async def _checkpoint(self, stage: StageId) -> Snapshot | None:
        return await newest_checkpoint(self._link.blobs, self._link.coordinator, stage)

    async def _is_on_the_way(self, stage: StageId) -> bool:
        """Tell whether members may still be followed from here: there is no checkpoint beyond, and no other lineage."""
        own = self._syncs[stage].own_standing()
        if own is None:
            return False
        try:
            checkpoint = await self._checkpoint(stage)
        except (TransientError, PeerFault):
            return True
        return checkpoint is None or checkpoint.version < own.version or checkpoint.lineage == own.lineage

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
