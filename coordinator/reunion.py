"""When two halves of a torn swarm have met again: settling which one goes on, and telling the other.

Owns: noticing that it is time, keeping the settlement, and whom a replica of the lost half should follow. Must not
know: the choice itself (`forks.py`). The app calls `tick`; `registry.py` hands every peer what concerns it.

It is settled once, when replicas say that they have met others who went on without them: before that the lost half
could not fetch what the other has. What is given up is on disk before anybody hears of it, and so is whatever is built
on it later: a restart, or a half that trains on because it has not heard of it, changes nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import islice

import structlog

from coordinator.clock import Clock
from coordinator.forks import Branch, Settlement, branches, have_met, settle
from coordinator.journal import DISK_NOTE, Journal
from coordinator.ledger import Ledger
from coordinator.registry import LivePeer, Registry
from coordinator.settings import CoordinatorSettings
from protocol.control import GivenUp, StageState
from protocol.errors import StorageError
from protocol.ids import Lineage, PeerId, StageId
from protocol.manifest import Manifest

log = structlog.get_logger()

MAX_SOURCES = 64  # named to a replica that has to fetch what the other half has
LOOK_EVERY_S = 2.0
UNDECIDED = 3  # times as long is waited for members of whom it is not known with whom they have gone on

Seat = tuple[StageId, PeerId]


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
        self._look_at_s = float("-inf")
        self._met_since_s: float | None = None
        self._stood: dict[Seat, Lineage] = {}
        """Where members stood last, as far as what had led there was reported."""
        registry.astray = self.astray

    async def tick(self) -> None:
        """Look whether halves have met, and settle it when both had the time to report what they have done."""
        now_s = self._clock.monotonic()
        rivals = self._rivals()
        if not rivals:
            self._met_since_s = None
        if not rivals or now_s < self._look_at_s:
            return
        self._look_at_s = now_s + LOOK_EVERY_S
        try:
            await self._look(rivals, now_s)
        except StorageError as error:  # tried again at the next look
            self._journal.note(DISK_NOTE, str(error))

    def astray(self, peer: LivePeer) -> tuple[GivenUp, ...]:
        """Say where a peer should not stand any more, and who stands where its stages go on.

        Of what the run has gone back from nobody is named: it starts over.
        """
        found = []
        for state in peer.replicas:
            is_gone = self._ledger.is_gone(state)
            sources = () if is_gone else self._sources(state.stage)
            if is_gone or (sources and self._ledger.is_given_up(state)):
                found.append(GivenUp(stage=state.stage, lineage=state.lineage, members=sources))
        return tuple(found)

    async def _look(self, rivals: Mapping[StageId, Mapping[PeerId, Lineage]], now_s: float) -> None:
        found = await self._branches()
        if not any(have_met(found.get(stage, ()), met.items()) for stage, met in rivals.items()):
            self._met_since_s = None
            return
        if self._met_since_s is None:
            self._met_since_s = now_s
        patience = UNDECIDED if self._is_anybody_undecided(found) else 1
        if now_s - self._met_since_s < patience * self._settings.lost_after_s:
            return
        settlement = settle(found, most_tokens=self._manifest.batch.tokens_per_round)
        if settlement is not None:
            await self._ledger.give_up([link.lineage for links in settlement.given_up.values() for link in links])
            await self._tell(settlement)

    def _is_anybody_undecided(self, found: Mapping[StageId, Sequence[Branch]]) -> bool:
        """Tell whether a member still stands where the others have parted: the next beat will tell whom it is with."""
        standing = self._standing()
        return any(
            len(each) > 1 and not standing.get(stage, {}).keys() <= {peer for branch in each for peer in branch.peers}
            for stage, each in found.items()
        )

    async def _branches(self) -> dict[StageId, Sequence[Branch]]:
        """Return the branches of all stages; of those that are not torn what they did while others were."""
        found: dict[StageId, Sequence[Branch]] = {}
        for stage, standing in self._standing().items():
            known = await self._known(stage, standing)
            paths = await self._ledger.paths(stage, frozenset(known.values()))
            found[stage] = branches(stage, paths, known)
        parted = [link.round for each in found.values() if len(each) > 1 for one in each for link in one.links]
        for stage, each in found.items():
            if parted and len(each) == 1:
                (whole,) = each
                links = tuple(await self._ledger.path_since(whole.tip, min(parted)))
                found[stage] = (replace(whole, links=links),)
        return found

    async def _known(self, stage: StageId, standing: Mapping[PeerId, Lineage]) -> dict[PeerId, Lineage]:
        """Return where members stand, or stood last if what they have done since has not been reported yet."""
        known = await self._ledger.known(stage, frozenset(standing.values()))
        self._stood |= {(stage, peer): lineage for peer, lineage in standing.items() if lineage in known}
        return {peer: self._stood[stage, peer] for peer in standing if (stage, peer) in self._stood}

    def _rivals(self) -> dict[StageId, dict[PeerId, Lineage]]:
        """Return who says that it has met others of its stage who went on without it, and where those stood."""
        found: dict[StageId, dict[PeerId, Lineage]] = {}
        for peer, state in self._members():
            if state.rival is not None:
                found.setdefault(state.stage, {})[peer.peer] = state.rival
        return found

    def _standing(self) -> dict[StageId, dict[PeerId, Lineage]]:
        """Return where members stand who are here."""
        found: dict[StageId, dict[PeerId, Lineage]] = {}
        for peer, state in self._members():
            found.setdefault(state.stage, {})[peer.peer] = state.lineage
        return found

    def _members(self) -> Iterator[tuple[LivePeer, StageState]]:
        """Return the replicas that say that they are members, and are not known to be none."""
        for peer in self._registry.live():
            for state in peer.replicas:
                is_denied = self._ledger.is_seated(peer.peer, peer.session, state.lineage) is False
                if peer.heard and state.ready and state.members and not is_denied:
                    yield peer, state

    def _sources(self, stage: StageId) -> tuple[PeerId, ...]:
        """List some who certainly sit in a lineage of a stage that goes on."""
        return tuple(
            islice(
                (
                    peer.peer
                    for peer, state in self._members()
                    if state.stage == stage
                    and not self._ledger.is_given_up(state)
                    and self._ledger.is_seated(peer.peer, peer.session, state.lineage)
                ),
                MAX_SOURCES,
            )
        )

    async def _tell(self, settlement: Settlement) -> None:
        for stage, lost in settlement.given_up.items():
            kept = settlement.kept[stage]
            tokens = sum(link.tokens for link in lost)
            await self._journal.event(
                "stage.torn",
                detail=f"stage {stage}: {len(lost)} committed rounds with {tokens} tokens, up to version "
                f"{lost[0].version}, are given up for version {kept.links[0].version} of the other half",
            )
