"""When two halves of a torn swarm have met again: settling which one goes on, and telling the other.

Owns: noticing that it is time, keeping the settlement, and whom a replica of the lost half should follow. Must not
know: the choice itself (`forks.py`). The app calls `tick`; `registry.py` hands every peer what concerns it.

It is settled once, when replicas say that they have met others who went on without them: before that the lost half
could not fetch what the other has. What is given up is on disk before anybody hears of it, and so is whatever is built
on it later: a restart, or a half that trains on because it has not heard of it, changes nothing.
"""

from __future__ import annotations

import structlog

from coordinator.clock import Clock
from coordinator.forks import Settlement, settle
from coordinator.journal import DISK_NOTE, Journal
from coordinator.ledger import Ledger
from coordinator.registry import LivePeer, Registry
from coordinator.settings import CoordinatorSettings
from protocol.control import GivenUp
from protocol.errors import StorageError
from protocol.ids import Lineage, PeerId, StageId
from protocol.manifest import Manifest

log = structlog.get_logger()

MAX_SOURCES = 64  # named to a replica that has to fetch what the other half has


class Reunion:
    """Watches for halves that have met."""

    def __init__(
        self,
        manifest: Manifest,
        *,
        settings: CoordinatorSettings,
        registry: Registry,
        ledger: Ledger,
        journal: Journal,
        clock: Clock,
    ) -> None:
        self._manifest = manifest
        self._settings = settings
        self._registry = registry
        self._ledger = ledger
        self._journal = journal
        self._clock = clock
        self._met_since_s: float | None = None
        registry.given_up = self.given_up

    async def tick(self) -> None:
        """Look whether halves have met, and settle it when both had the time to report what they have done."""
        if not self._have_met():
            self._met_since_s = None
            return
        now_s = self._clock.monotonic()
        if self._met_since_s is None:
            self._met_since_s = now_s
        if now_s - self._met_since_s < self._settings.lost_after_s:
            return
        try:
            settlement = settle(
                await self._ledger.links(), self._standing(), most_tokens=self._manifest.batch.tokens_per_round
            )
            if settlement is None:
                return
            await self._ledger.give_up([link.lineage for links in settlement.given_up.values() for link in links])
        except StorageError as error:  # tried again at the next tick
            self._journal.note(DISK_NOTE, str(error))
            return
        await self._tell(settlement)

    def given_up(self, peer: LivePeer) -> tuple[GivenUp, ...]:
        """Say what a peer should not stand on any more, and who stands where its stages go on."""
        return tuple(
            GivenUp(stage=state.stage, lineage=state.lineage, members=sources)
            for state in peer.replicas
            if self._ledger.is_given_up(state.lineage) and (sources := self._sources(state.stage))
        )

    def _have_met(self) -> bool:
        return any(state.rival is not None for peer in self._registry.live() if peer.heard for state in peer.replicas)

    def _standing(self) -> dict[StageId, dict[PeerId, Lineage]]:
        """Return where members stand who are here."""
        found: dict[StageId, dict[PeerId, Lineage]] = {}
        for peer in self._registry.live():
            for state in peer.replicas:
                if peer.heard and state.ready and state.members:
                    found.setdefault(state.stage, {})[peer.peer] = state.lineage
        return found

    def _sources(self, stage: StageId) -> tuple[PeerId, ...]:
        """List some who have a stage's state in a lineage that goes on."""
        return tuple(
            peer for peer, lineage in self._standing().get(stage, {}).items() if not self._ledger.is_given_up(lineage)
        )[:MAX_SOURCES]

    async def _tell(self, settlement: Settlement) -> None:
        for stage, lost in settlement.given_up.items():
            kept = settlement.kept[stage]
            tokens = sum(link.tokens for link in lost)
            await self._journal.event(
                "stage.torn",
                detail=f"stage {stage}: {len(lost)} committed rounds with {tokens} tokens, up to version "
                f"{lost[0].version}, are given up for version {kept.links[0].version} of the other half",
            )
