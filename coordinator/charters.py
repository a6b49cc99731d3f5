"""Issuing charters: the coordinator's signed word on where a stage's lineage begins.

Owns: the view that decisions are made on, signing and keeping charters, and carrying out moves. Must not
know: the rules (`founding.py`). The app calls `tick` once per tick; `registry.py` hands `newest()` to every peer, and
`answer_state` is the call handler for a peer that has nobody of its stage to ask.

A charter is on disk before anybody sees it: after a crash the same generation is never issued twice.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass

import structlog

from coordinator.clock import Clock
from coordinator.founding import Decision, Founding, Participant, Replica, Standing, View, decide, is_hosted, is_short
from coordinator.journal import DISK_NOTE, Journal
from coordinator.ledger import Ledger
from coordinator.registry import LivePeer, Registry
from coordinator.settings import CoordinatorSettings
from coordinator.store import history, tallies
from coordinator.store.database import Database
from protocol.control import StageState
from protocol.errors import StorageError
from protocol.history import StateAnswer, StateRequest
from protocol.ids import Lineage, PeerId, RoundId, StageId, Version
from protocol.manifest import Manifest
from protocol.rounds.lineage import next_lineage, root_lineage
from protocol.rounds.messages import CHARTER_CONTEXT, MAX_SEATS, Charter, Seat
from protocol.signing import Signed, SigningKey, seal, unseal

log = structlog.get_logger()

WAITING_NOTE = "run"


@dataclass(frozen=True, slots=True)
class Issued:
    """A charter, its envelope, and when we issued it (or took it over), on the monotonic clock."""

    charter: Charter
    signed: Signed
    issued_s: float


class CharterOffice:
    """Keeps every stage's newest charter, and issues the next one when the rules say so."""

    def __init__(
        self,
        manifest: Manifest,
        *,
        key: SigningKey,
        settings: CoordinatorSettings,
        registry: Registry,
        ledger: Ledger,
        database: Database,
        journal: Journal,
        clock: Clock,
    ) -> None:
        self._manifest = manifest
        self._key = key
        self._settings = settings
        self._registry = registry
        self._ledger = ledger
        self._database = database
        self._journal = journal
        self._clock = clock
        self._newest: dict[StageId, Issued] = {}
        self._vacant_since_s: dict[StageId, float] = {}
        self._short_since_s: dict[StageId, float] = {}
        self.floor: Mapping[StageId, Version] = {}
        """Versions of the newest checkpoint, kept up to date by the collector."""
        self.floor_round = RoundId(0)
        """And its round."""
        registry.charters = self.newest

    async def load(self) -> None:
        """Take over the charters that were issued before. Call once, before serving."""
        for row in await self._database.run(history.newest_charters):
            signed = Signed.from_bytes(row.signed)
            charter = unseal(signed, CHARTER_CONTEXT, Charter, signer=self._key.peer_id)
            self._keep(Issued(charter, signed, self._clock.monotonic()))

    def newest(self) -> tuple[Signed, ...]:
        """Return the newest charter of every stage that has one."""
        return tuple(self._newest[stage].signed for stage in sorted(self._newest))

    async def answer_state(self, caller: PeerId, request: StateRequest) -> StateAnswer:
        """Tell a peer that has nobody else to ask where a stage stands: its newest charter, and what followed it."""
        newest = self._newest.get(request.stage)
        is_lost = request.standing is not None and self._ledger.has_given_up(request.standing)
        if newest is None:
            return StateAnswer(charter=None, commit=None, version=Version(0), lineage=Lineage(bytes(32)), snapshots=())
        version, lineage, commit = newest.charter.version, root_lineage(newest.signed), None
        if reported := self._ledger.newest_commit(request.stage):
            commit, message = reported
            version, lineage = message.version, next_lineage(message.parent, commit.payload)
        return StateAnswer(
            charter=newest.signed, commit=commit, version=version, lineage=lineage, snapshots=(), is_lost=is_lost
        )

    async def tick(self) -> None:
        """Look at the swarm, and found or move what has to be."""
        decision = decide(self._view())
        if decision.foundings:
            await self._issue(decision)
        for move in decision.moves:
            await self._registry.assign(move.peer, (move.stage,))
        if decision.waiting_for:
            self._journal.note(WAITING_NOTE, f"waiting for {decision.waiting_for}")
        else:
            self._journal.clear(WAITING_NOTE)

    async def _issue(self, decision: Decision) -> None:
        issued = [self._sign(founding) for founding in decision.foundings]
        taken_back = {lineage for founding in decision.foundings for lineage in self._lost_lineages(founding)}
        try:
            for lineage in taken_back:  # there is nothing else to go on from
                await self._ledger.take_back(lineage)
            await self._database.run(history.add_charters, [self._row(entry) for entry in issued])
        except StorageError as error:  # tried again at the next tick
            self._journal.note(DISK_NOTE, str(error))
            return
        for entry in issued:
            self._keep(entry)
            charter = entry.charter
            await self._journal.event(
                "stage.founded",
                detail=f"stage {charter.stage} generation {charter.generation}: round {charter.round}, "
                f"version {charter.version}, {len(charter.seats)} members",
            )
        await self._tell_rollbacks({(entry.charter.stage, entry.charter.generation) for entry in issued})

    async def _tell_rollbacks(self, founded: Collection[tuple[StageId, int]]) -> None:
        """Say which committed updates are not in the states that stages were just founded on."""
        try:
            rollbacks = await self._database.run(tallies.rollbacks)
        except StorageError as error:  # the ledger has it all the same
            self._journal.note(DISK_NOTE, str(error))
            return
        for rollback in rollbacks:
            if (rollback.stage, rollback.generation) in founded:
                await self._journal.event(
                    "stage.rolled_back",
                    detail=f"stage {rollback.stage} generation {rollback.generation}: from version "
                    f"{rollback.version_before} to {rollback.version}, {rollback.rounds} committed rounds with "
                    f"{rollback.tokens} tokens are gone",
                )

    def _lost_lineages(self, founding: Founding) -> Iterator[Lineage]:
        """Return where those stand whom a charter is to name, if that was given up."""
        seats = {seat.peer for seat in founding.seats}
        for peer in self._registry.live():
            for state in peer.replicas:
                is_named = peer.peer in seats and (state.stage, state.version) == (founding.stage, founding.version)
                if is_named and self._ledger.has_given_up(state.lineage):
                    yield state.lineage

    def _sign(self, founding: Founding) -> Issued:
        charter = Charter(
            run=self._manifest.run_id,
            stage=founding.stage,
            generation=founding.generation,
            round=founding.round,
            version=founding.version,
            state_digest=founding.state_digest,
            seats=founding.seats[:MAX_SEATS],
        )
        return Issued(charter, seal(self._key, CHARTER_CONTEXT, charter), self._clock.monotonic())

    def _keep(self, entry: Issued) -> None:
        self._newest[entry.charter.stage] = entry
        self._ledger.learn_charter(entry.signed, entry.charter)

    def _row(self, entry: Issued) -> history.CharterRow:
        charter = entry.charter
        return history.CharterRow(
            stage=charter.stage,
            generation=charter.generation,
            round=charter.round,
            version=charter.version,
            signed=entry.signed.to_bytes(),
            issued_s=self._clock.wall(),
        )

    # -- the view ---------------------------------------------------------------------------------------

    def _view(self) -> View:
        now_s = self._clock.monotonic()
        awake_since_s = self._registry.awake_since_s
        reached = {stage: self._reached(stage) for stage in self._newest}
        view = View(
            num_stages=self._manifest.model.num_stages,
            participants=self._participants(),
            generations={stage: entry.charter.generation for stage, entry in self._newest.items()},
            start_peers=self._settings.start_peers,
            floor=self.floor,
            reached={stage: version for stage, (version, _) in reached.items()},
            next_round=max((next_round for _, next_round in reached.values()), default=RoundId(0)),
            vacant_s={stage: now_s - since_s for stage, since_s in self._vacant_since_s.items()},
            short_s={stage: now_s - since_s for stage, since_s in self._short_since_s.items()},
            awake_s=0.0 if awake_since_s is None else now_s - awake_since_s,
            settle_s=self._settings.lost_after_s,
            move_after_s=self._settings.move_after_s,
        )
        for stage in map(StageId, range(view.num_stages)):
            _note(self._vacant_since_s, stage, not is_hosted(view, stage), now_s)
            _note(self._short_since_s, stage, is_short(view, stage), now_s)
        return view

    def _reached(self, stage: StageId) -> tuple[Version, RoundId]:
        """Return the newest version of a stage that is not rolled back, and the round after it, as far as we know."""
        reported = self._ledger.newest_commit(stage)
        if reported is None:
            charter = self._newest[stage].charter
            version, round_id = charter.version, charter.round
        else:
            version, round_id = reported[1].version, RoundId(reported[1].round + 1)
        # of what is gone nothing is known to follow the checkpoint's own commit
        return max(version, self.floor.get(stage, Version(0))), max(round_id, self.floor_round)

    def _participants(self) -> tuple[Participant, ...]:
        suspects = self._registry.suspects()
        return tuple(
            Participant(
                peer=peer.peer,
                standing=_standing(peer),
                stages=peer.stages,
                replicas=tuple(self._replica(peer, state) for state in peer.replicas),
                pinned=bool(peer.wanted),
                joined_s=peer.joined_s,
            )
            for peer in self._registry.everybody()
            if peer.presence == "live" or not self._registry.may_be_replaced(peer, suspects)
        )

    def _replica(self, peer: LivePeer, state: StageState) -> Replica:
        seat, is_lost = Seat(peer=peer.peer, session=peer.session), self._ledger.is_given_up(state)
        return Replica(
            seat=seat,
            stage=state.stage,
            round=state.round,
            version=state.version,
            ready=state.ready and not self._ledger.is_gone(state),
            acting=not (is_lost or self._ledger.is_to_be_founded(state.stage))
            and (self._is_freshly_seated(seat, state.stage) or self._is_member(seat, state)),
            is_lost=is_lost,
            state_digest=state.state_digest,
        )

    def _is_member(self, seat: Seat, state: StageState) -> bool:
        """Ask the peer, which may have lost its state, and the lineage, if we have heard of it (reports take time)."""
        return state.members > 0 and self._ledger.is_seated(seat.peer, seat.session, state.lineage) is not False

    def _is_freshly_seated(self, seat: Seat, stage: StageId) -> bool:
        """Whoever the newest charter names has some time to hear of it before it could be replaced."""
        newest = self._newest.get(stage)
        if newest is None or seat not in newest.charter.seats:
            return False
        grace_s = self._settings.lost_after_s * self._settings.bury_factor
        return self._clock.monotonic() - newest.issued_s < grace_s


def _note(since_s: dict[StageId, float], stage: StageId, holds: bool, now_s: float) -> None:
    """Keep track of since when something holds of a stage."""
    if holds:
        since_s.setdefault(stage, now_s)
    else:
        since_s.pop(stage, None)


def _standing(peer: LivePeer) -> Standing:
    if not peer.heard:
        return Standing.UNHEARD
    return Standing.HERE if peer.presence == "live" else Standing.MISSING
