"""Collecting checkpoints: when every stage has a snapshot of one round, bring the files home.

Owns: watching the offers in the live view, fetching, writing through `RunDir`, and remembering the newest
sound checkpoint. Must not know: who votes how (`offers.py`), how ranges travel (`fetching.py`), the files'
layout (`checkpointfiles.py`). The app runs `run` beside the ticks: a slow download delays nothing else.

Whatever goes wrong here costs a checkpoint, never a round: it is noted, and the next snapshots are tried.
"""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Awaitable, Callable, Iterable, Mapping
from itertools import islice
from pathlib import Path

import structlog

from coordinator.checkpointfiles import Checkpoint, StageFiles
from coordinator.clock import Clock
from coordinator.fetching import FetchRange, WrongHashError, fetch_file
from coordinator.journal import Journal
from coordinator.ledger import Ledger
from coordinator.offers import Agreement, Offers
from coordinator.registry import Registry
from coordinator.rundir import RunDir
from coordinator.store import history
from coordinator.store.database import Database
from protocol.control import Snapshot
from protocol.errors import PeerFault, RefusedError, StorageError, TransientError, UnreachableError
from protocol.ids import PeerId, RoundId, StageId, Version

log = structlog.get_logger()

INCOMING = "incoming"
NOTE = "checkpoint"
POLL_S = 0.5
RETRY_S = 5.0
MAX_WAITS = 30  # for reports, which come with the beats
MAX_ASKED = 64

AskSnapshots = Callable[[PeerId, StageId], Awaitable[tuple[Snapshot, ...]]]
"""Ask a replica which snapshots it serves now; raises `TransientError` kinds or `PeerFault` like any call."""


class Collector:
    """Makes the run's checkpoints."""

    def __init__(
        self,
        run: RunDir,
        *,
        registry: Registry,
        ledger: Ledger,
        database: Database,
        journal: Journal,
        clock: Clock,
        fetch_range: FetchRange,
        ask_snapshots: AskSnapshots,
        on_checkpoint: Callable[[Checkpoint], None],
    ) -> None:
        self._run = run
        self._registry = registry
        self._ledger = ledger
        self._database = database
        self._journal = journal
        self._clock = clock
        self._fetch_range = fetch_range
        self._ask_snapshots = ask_snapshots
        self._on_checkpoint = on_checkpoint
        last_round = RoundId(run.manifest.batch.num_rounds)  # which only evaluates
        self._offers = Offers(num_stages=run.manifest.model.num_stages, last_round=last_round)
        self._dissent_told: set[tuple[RoundId, StageId]] = set()
        self.newest: Checkpoint | None = None

    async def load(self) -> None:
        """Find the newest sound checkpoint. Call once, before serving; hashes its files."""
        await asyncio.to_thread(shutil.rmtree, self._run.path / INCOMING, ignore_errors=True)
        newest = await asyncio.to_thread(self._run.newest_checkpoint)
        if newest is not None:
            self.take(newest)
        on_disk = await asyncio.to_thread(self._run.checkpoints.rounds)
        if on_disk and (newest is None or newest.round != on_disk[0]):
            sound = "none is sound" if newest is None else f"the newest sound one is of round {newest.round}"
            await self._journal.event("checkpoint.damaged", detail=f"round {on_disk[0]}: {sound}")

    async def run(self) -> None:
        """Collect whatever becomes complete, until cancelled."""
        while True:
            ok = await self.poll()
            await asyncio.sleep(POLL_S if ok else RETRY_S)

    async def poll(self) -> bool:
        """Look at the offers, and collect the newest complete checkpoint; False if that failed."""
        self._learn_offers()
        after = -1 if self.newest is None else self.newest.round
        await self._ask_again(self._offers.out_of_step(after=after))
        self._offers.drop(self._ledger.is_given_up)
        round_id = self._offers.newest_complete(after=after)
        if round_id is None:
            return True
        started_s = self._clock.monotonic()
        try:
            checkpoint = await self._collect(round_id)
        except (TransientError, StorageError, WrongHashError) as error:
            self._journal.note(NOTE, f"round {round_id}: {error}")
            await self._journal.event("checkpoint.failed", detail=f"round {round_id}: {error.one_line()}")
            return False
        finally:
            await asyncio.to_thread(shutil.rmtree, self._run.path / INCOMING, ignore_errors=True)
        self._journal.clear(NOTE)
        await self._write_down(checkpoint, seconds=self._clock.monotonic() - started_s)
        return True

    def _learn_offers(self) -> None:
        live = self._registry.live()
        self._offers.keep_only(peer.peer for peer in live)
        for peer in live:
            for state in peer.replicas:
                if state.snapshot is not None and state.snapshot.stage == state.stage:
                    self._offers.learn(peer.peer, state.snapshot)

    async def _ask_again(self, replicas: Iterable[tuple[PeerId, StageId]]) -> None:
        """Ask all of them at the same moment what they have, rather than wait for beats that never match."""

        async def ask(peer: PeerId, stage: StageId) -> None:
            try:
                snapshots = await self._ask_snapshots(peer, stage)
            except (TransientError, PeerFault, RefusedError) as error:
                log.debug("snapshots.unanswered", peer=peer, error=error.one_line())
                return
            for snapshot in sorted(snapshots, key=lambda one: one.round):
                if snapshot.stage == stage:
                    self._offers.learn(peer, snapshot)

        await asyncio.gather(*(ask(peer, stage) for peer, stage in islice(replicas, MAX_ASKED)))

    async def _collect(self, round_id: RoundId) -> Checkpoint:
        agreements = self._offers.agreements(round_id)
        await self._tell_dissent(round_id, agreements)
        stages = [await self._fetch_stage(round_id, agreements[stage]) for stage in sorted(agreements)]
        for stage in stages:
            await self._wait_certain(stage, agreements[stage.stage])
        async with self._run.checkpoints_turn:
            self._check_goes_on(stages)
            checkpoint = await asyncio.to_thread(self._run.write_checkpoint, round_id, stages)
            try:
                self._check_goes_on(stages)  # that may have taken minutes
            except UnreachableError:
                await asyncio.to_thread(self._run.checkpoints.set_aside_after, RoundId(round_id - 1))
                raise
            self.take(checkpoint)
        return checkpoint

    def _check_goes_on(self, stages: Iterable[StageFiles]) -> None:
        """Raise `UnreachableError` for what was given up meanwhile: a torn swarm was settled, or the run goes back."""
        if any(self._ledger.is_given_up(stage) for stage in stages):
            raise UnreachableError("it is of a state that does not go on.")

    async def _wait_certain(self, stage: StageFiles, agreement: Agreement) -> None:
        """Wait for reports of what led to files, if they might be of a state that does not go on.

        It is asked after they were fetched: with short rounds nobody has them any more when what led there is reported.
        If nobody reports it the offer is forgotten, or it would keep all others waiting, and `UnreachableError` raised.
        """
        for _ in range(MAX_WAITS):
            self._check_goes_on([stage])
            if await self._ledger.is_certain(stage):
                return
            await asyncio.sleep(POLL_S)
        for peer in agreement.sources:
            self._offers.deny(peer, stage.stage, agreement.snapshot.round)
        raise UnreachableError(f"nobody reports what led to stage {stage.stage}'s state.")

    async def _fetch_stage(self, round_id: RoundId, agreement: Agreement) -> StageFiles:
        snapshot = agreement.snapshot
        folder = self._run.path / INCOMING / f"round-{round_id}"
        parts: dict[str, Path] = {}
        for file in snapshot.files:
            parts[file.part] = folder / f"stage-{snapshot.stage}.{file.part}"
            try:
                liars = await fetch_file(
                    f"state/{snapshot.stage}/{snapshot.version}/{file.part}",
                    parts[file.part],
                    num_bytes=file.num_bytes,
                    sha256=file.digest,
                    sources=agreement.sources,
                    fetch_range=self._fetch_range,
                )
            except WrongHashError as fault:
                await self._expose(fault.liars, snapshot, file.part)
                raise
            await self._expose(liars, snapshot, file.part)
        return StageFiles(snapshot.stage, snapshot.version, snapshot.lineage, parts)

    async def _expose(self, liars: Iterable[PeerId], snapshot: Snapshot, part: str) -> None:
        """Drop the offers of peers that serve another file than they offered, and say so."""
        for peer in liars:
            self._offers.deny(peer, snapshot.stage, snapshot.round)
            detail = f"stage {snapshot.stage}, round {snapshot.round}: serves other {part} than it offered"
            await self._journal.event("checkpoint.wrong_file", peer, detail)

    async def _tell_dissent(self, round_id: RoundId, agreements: Mapping[StageId, Agreement]) -> None:
        for stage, agreement in agreements.items():
            if not agreement.dissenters or (round_id, stage) in self._dissent_told:
                continue
            self._dissent_told.add((round_id, stage))
            against = f"against {len(agreement.sources)} others"
            for peer in agreement.dissenters:
                await self._journal.event(
                    "checkpoint.dissent", peer, f"stage {stage}, round {round_id}: offers other files, {against}"
                )

    def take(self, checkpoint: Checkpoint) -> None:
        """Take a checkpoint for the newest: it was just made, or the run goes back to it."""
        self.newest = checkpoint
        self._on_checkpoint(checkpoint)

    async def _write_down(self, checkpoint: Checkpoint, *, seconds: float) -> None:
        num_bytes = sum(file.num_bytes for stage in checkpoint.record.stages for file in stage.files)
        row = history.CheckpointRow(
            round=checkpoint.round, num_bytes=num_bytes, seconds=seconds, collected_s=self._clock.wall()
        )
        on_disk = await asyncio.to_thread(self._run.checkpoints.rounds)
        try:
            await self._database.run(history.add_checkpoint, row)
            known = await self._database.run(history.load_checkpoints)
            gone = [old.round for old in known if old.round not in on_disk]
            await self._database.run(history.remove_checkpoints, gone)
        except StorageError as error:
            self._journal.note(NOTE, str(error))
        await self._journal.event("checkpoint.written", detail=f"round {checkpoint.round}, {num_bytes} bytes")


def versions(checkpoint: Checkpoint) -> Mapping[StageId, Version]:
    """Return the version of every stage in a checkpoint."""
    return {stage.stage: stage.version for stage in checkpoint.record.stages}
