"""When a run is over, and how its end is told.

Owns: the condition (the last checkpoint is home, the last evaluation is closed), writing it down, and how long
to wait for stragglers. Must not know: how checkpoints or closings come about. The app ticks it.
"""

from __future__ import annotations

import asyncio

from coordinator.checkpointfiles import Checkpoint
from coordinator.clock import Clock
from coordinator.journal import DISK_NOTE, Journal
from coordinator.registry import Registry
from coordinator.status import FINISHED
from coordinator.store import peers, tallies
from coordinator.store.database import Database
from protocol.errors import StorageError
from protocol.manifest import Manifest

SETTLE_BEATS = 2.0  # the last round's reports should be in before peers are told to go
EVALUATION_PATIENCE_S = 120.0  # a checkpoint without the last held-out loss is worth more than waiting for ever
GOODBYE_S = 30.0  # how long peers may take to leave once they have been told


class Finish:
    """Watches for the end of the run."""

    def __init__(
        self, manifest: Manifest, *, registry: Registry, database: Database, journal: Journal, clock: Clock
    ) -> None:
        self._manifest = manifest
        self._registry = registry
        self._database = database
        self._journal = journal
        self._clock = clock
        self._checkpoint_since_s: float | None = None
        self._complete_since_s: float | None = None
        self._told_s: float | None = None
        self._over = asyncio.Event()

    @property
    def is_reached(self) -> bool:
        """The run is over, and peers are told so."""
        return self._registry.is_finished

    async def tick(self, newest: Checkpoint | None) -> None:
        """Look whether it is over."""
        now_s = self._clock.monotonic()
        if self._told_s is not None:
            if not self._registry.live() or now_s - self._told_s >= GOODBYE_S:
                self._over.set()
            return
        if newest is None or newest.round < self._manifest.batch.num_rounds:
            return
        if self._checkpoint_since_s is None:
            self._checkpoint_since_s = now_s
        if self._complete_since_s is None:
            gave_up = now_s - self._checkpoint_since_s >= EVALUATION_PATIENCE_S
            if not gave_up and not await self._is_evaluated():
                return
            self._complete_since_s = now_s
        if now_s - self._complete_since_s >= SETTLE_BEATS * self._manifest.timing.beat_s:
            await self._finish()

    async def wait_over(self) -> None:
        """Wait until the run is over and everybody has left, or had the time to."""
        await self._over.wait()

    async def _is_evaluated(self) -> bool:
        try:
            return await self._database.run(tallies.is_evaluated, self._manifest.batch.num_rounds)
        except StorageError as error:  # asked again at the next tick
            self._journal.note(DISK_NOTE, str(error))
            return False

    async def _finish(self) -> None:
        try:
            await self._database.run(peers.put_setting, FINISHED, str(self._clock.wall()))
        except StorageError as error:  # tried again at the next tick
            self._journal.note(DISK_NOTE, str(error))
            return
        self._registry.is_finished = True
        self._told_s = self._clock.monotonic()
        missing = "" if await self._is_evaluated() else ", without the last evaluation"
        await self._journal.event("run.finished", detail=f"{self._manifest.batch.num_rounds} rounds{missing}")
