"""Who takes part: registrations, beats, goodbyes, and when silence means loss.

Owns: the live view of all peers, and its copy in the database. Must not know: how charters are decided,
what reports say, who fetches checkpoints; it carries their words to the peers and back. The app registers
`register`, `beat` and `leave` as call handlers and calls `sweep` once per tick.

The live view is memory; what is needed after a crash (who was admitted, where it was placed, what it
reported) is on disk before the peer gets its answer. After a restart every peer that was live counts as live
and unheard, so that nobody's stage is given away before it had time to come back.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import structlog

from coordinator.access import AccessOffice
from coordinator.clock import Clock
from coordinator.doubles import Doubles
from coordinator.journal import DISK_NOTE, Journal
from coordinator.ledger import Ledger
from coordinator.pace import Pace
from coordinator.placement import Host, place
from coordinator.settings import CoordinatorSettings
from coordinator.store import history, peers
from coordinator.store.database import Database
from protocol.audits import MAX_ORDERS, AuditOrder, Order, ShareOrder, SketchOrder, SumOrder
from protocol.control import Beat, BeatReply, GivenUp, Leave, PeerState, Register, StageState, Welcome
from protocol.errors import ClockError, IncompatibleError, RefusedError, StorageError, WireError
from protocol.ids import PeerId, StageId
from protocol.manifest import Manifest
from protocol.ownership import rendezvous
from protocol.records import admit
from protocol.signing import Signed, SigningKey
from protocol.transport.calls import CALL_TIMEOUT_S, Done
from protocol.wire import PROTOCOL_VERSION

log = structlog.get_logger()

MAX_SKEW_S = 3.0  # hivemind's DHT refuses neighbours whose clocks differ by more
MAX_HINTS = 256  # members named in one answer; keeps a beat's answer well below a message's limit
DOUBT, SUSPECT = 0.5, 0.3  # of `lost_after_s`: silent for so long, or that and missed by others
KEPT_PEERS = 20_000  # of whom most have never done anything: 30 MB on disk, 20 in memory
FORGET_AFTER_S, FORGET_AT_ONCE = 3600.0, 500
SAVE_EVERY_S = 1.0  # how old the database's picture of the swarm may be


@dataclass(slots=True, kw_only=True)
class LivePeer:
    """One peer as the registry knows it. Only the registry changes it."""

    peer: PeerId
    session: int
    """Of its present life; seats are given to (peer, session)."""
    name: str
    joined_s: float
    seen_s: float
    """Monotonic."""
    seen_wall_s: float
    stages: tuple[StageId, ...]
    wanted: tuple[StageId, ...] = ()
    follows: tuple[StageId, ...] = ()
    """Stages that it only watches: it hosts none then, and is no part of the swarm's work."""
    addresses: tuple[str, ...] = ()
    presence: peers.Presence = "live"
    state: PeerState = PeerState.STARTING
    reason: str = ""
    heard: bool = True
    """Has spoken to us since we started."""
    replicas: tuple[StageState, ...] = ()
    suspects: tuple[PeerId, ...] = ()
    acknowledged: int = 0
    changed: bool = field(default=True, repr=False)


class BanList(Protocol):
    """Who is kept out, as far as the registry needs to know."""

    @property
    def number(self) -> int: ...

    @property
    def newest(self) -> Signed | None: ...

    def refusal(self, peer: PeerId) -> RefusedError | None: ...

    async def freeze(self, peer: PeerId) -> None: ...


async def _nothing(peer: PeerId, before: Sequence[PeerId]) -> None:
    """Nobody has to be told."""


class Registry:
    """The roster and its live view."""

    def __init__(
        self,
        signed_manifest: Signed,
        manifest: Manifest,
        *,
        key: SigningKey,
        settings: CoordinatorSettings,
        access: AccessOffice,
        database: Database,
        ledger: Ledger,
        journal: Journal,
        clock: Clock,
    ) -> None:
        self._signed_manifest = signed_manifest
        self._manifest = manifest
        self._key = key
        self._settings = settings
        self._access = access
        self._database = database
        self._ledger = ledger
        self._journal = journal
        self._clock = clock
        self._peers: dict[PeerId, LivePeer] = {}
        self._doubles = Doubles()
        self._pace = Pace(clock.monotonic)
        self._saved_s = float("-inf")
        self.charters: Callable[[], tuple[Signed, ...]] = tuple
        """Newest charter of every stage; the charter office puts itself here."""
        self.astray: Callable[[LivePeer], tuple[GivenUp, ...]] = lambda peer: ()
        """Where a peer should not stand any more, and whom to follow instead; the reunion puts itself here."""
        self.succeeded: Callable[[PeerId, Sequence[PeerId]], Awaitable[None]] = _nothing
        """Hears which keys a peer went by before; the audit office puts itself here."""
        self.orders: Callable[[PeerId], Sequence[Order]] = lambda peer: ()
        """What a peer should recompute and sketch; the audit office puts itself here."""
        self.bans: BanList | None = None
        """Who is kept out; `bans.py` puts itself here."""
        self.is_finished = False
        """The run has its last checkpoint: peers are told so."""
        self.awake_since_s: float | None = None
        """Monotonic time since when we have been hearing from anybody; None while nobody is heard."""

    async def load(self) -> None:
        """Take over what the database knows. Call once, before serving."""
        now_s = self._clock.monotonic()
        for row in await self._database.run(peers.load_peers):
            follows = () if row.stages else self._followed(row.peer, row.wanted)
            self._peers[row.peer] = LivePeer(
                peer=row.peer,
                session=row.session,
                name=row.name,
                joined_s=row.joined_s,
                seen_s=now_s,
                seen_wall_s=row.seen_s,
                stages=row.stages,
                wanted=row.wanted,
                follows=follows,
                addresses=row.addresses,
                presence=row.presence if row.stages or follows else "left",  # a watcher that is named no more
                state=PeerState(row.state),
                reason=row.reason,
                acknowledged=await self._database.run(history.acknowledged, row.peer),
                heard=False,
                changed=False,
            )

    def everybody(self) -> Sequence[LivePeer]:
        """Return all peers that ever registered, also those that are lost or have left."""
        return tuple(self._peers.values())

    def live(self) -> Sequence[LivePeer]:
        """Return the peers that are here and take part, as far as we know."""
        return tuple(peer for peer in self._peers.values() if peer.presence == "live" and not peer.follows)

    @property
    def watchers(self) -> frozenset[PeerId]:
        """Return who has registered as one of the organiser's watchers. The same key as a replica is none."""
        return frozenset(key for key in self._settings.watchers if key in self._peers and self._peers[key].follows)

    def watching(self) -> Sequence[LivePeer]:
        """Return the organiser's watchers that are here."""
        named = (self._peers[key] for key in self.watchers)  # few, where there may be many peers
        return tuple(peer for peer in named if peer.presence == "live")

    def suspects(self) -> frozenset[PeerId]:
        """Return whom live peers fail to reach."""
        return frozenset(suspect for peer in self.live() if peer.heard for suspect in peer.suspects)

    def may_be_replaced(self, peer: LivePeer, suspects: Collection[PeerId]) -> bool:
        """Tell whether a peer that is not live may be replaced: others miss it too, or it is silent for too long."""
        silent_s = self._clock.monotonic() - peer.seen_s
        return (
            peer.presence == "left"
            or peer.peer in suspects
            or silent_s > self._settings.lost_after_s * self._settings.bury_factor
        )

    def hosts(self, *, without: PeerId | None = None) -> list[Host]:
        """Return the live peers as placement sees them. Who is probably dead already holds no place for itself."""
        now_s, suspects = self._clock.monotonic(), self.suspects()
        return [
            Host(
                peer=peer.peer,
                stages=peer.stages,
                ready=frozenset(state.stage for state in peer.replicas if state.ready),
                pinned=bool(peer.wanted),
                joined_s=peer.joined_s,
            )
            for peer in self.live()
            if peer.peer != without
            and now_s - peer.seen_s <= self._settings.lost_after_s * (SUSPECT if peer.peer in suspects else DOUBT)
        ]

    async def register(self, caller: PeerId, request: Register) -> Welcome:
        """Let a peer in: check it, place it, write it down, and give it its pass.

        One that is in already gets a new pass: for the same tenure, or for one on the stages it was moved to.
        """
        self._check_request(request)
        self._refuse_banned(caller)
        follows = self._followed(caller, request.wanted_stages) if request.watches else ()
        if request.watches and not follows:
            raise self._no_watcher(caller)
        before = () if follows else await self._access.admit(caller, request.token, request.handovers)
        await self._refuse_clones(caller, request.process)
        if before:
            await self.succeeded(caller, before)
        known = self._peers.get(caller)
        if known is None or known.session != request.session:
            self._pace.start(caller, is_new=known is None)
        wall_s = self._clock.wall()
        joined_s = [self._peers[peer].joined_s for peer in (caller, *before) if peer in self._peers]
        newcomer = LivePeer(
            peer=caller,
            session=request.session,
            name=request.name,
            joined_s=min(joined_s, default=wall_s),
            seen_s=self._clock.monotonic(),
            seen_wall_s=wall_s,
            stages=() if follows else self._place(caller, request),
            wanted=tuple(request.wanted_stages),
            follows=follows,
            addresses=request.addresses,
            acknowledged=known.acknowledged if known else 0,
        )
        is_renewal = known is not None and known.session == request.session
        if known is not None and is_renewal:  # nothing has happened to it but that it was given a new pass
            newcomer.state, newcomer.reason, newcomer.suspects = known.state, known.reason, known.suspects
            newcomer.replicas = known.replicas
        admission = self._admit(caller, request.name, issued_s=int(wall_s))
        self._peers[caller] = newcomer  # before the first await, or two joiners would be given the same place
        self._wake()
        try:
            row = _row(newcomer, request.capability.to_bytes(), admission.to_bytes())
            await self._database.run(peers.save_peer, row)
        except StorageError as error:
            self._forget(newcomer, known)
            self._journal.note(DISK_NOTE, str(error))
            raise
        if kind := _entrance(known, request.session):
            what = f"watches stages {_listed(follows)}" if follows else f"stages {_listed(newcomer.stages)}"
            await self._journal.event(kind, caller, f"{request.name}: {what}")
        return Welcome(
            manifest=self._signed_manifest,
            admission=admission,
            stages=newcomer.stages or follows,
            charters=self.charters(),
            clock_s=self._clock.wall(),
        )

    async def beat(self, caller: PeerId, beat: Beat) -> BeatReply:
        """Take a sign of life and its reports; answer with what the peer should know."""
        self._refuse_banned(caller)
        peer = self._peers.get(caller)
        if peer is None or peer.presence == "left":
            raise RefusedError("this coordinator does not know you (any more).", hint="Register again.")
        await self._refuse_clones(caller, beat.process)
        self._check_states(beat.stages)
        returned = peer.presence == "lost"
        self._take(peer, beat)
        if returned:
            await self._journal.event("peer.returned", caller, peer.name)
        if beat.reports:
            await self._record(peer, beat)
        peer.replicas = beat.stages  # not before what led there is known
        orders = self.orders(caller)
        return BeatReply(
            acknowledged=peer.acknowledged,
            stages=peer.stages or peer.follows,
            charters=self.charters(),
            members=self._hints(caller),
            given_up=self.astray(peer),
            revoked=None if self.bans is None or beat.revocations >= self.bans.number else self.bans.newest,
            audits=tuple(order for order in orders if isinstance(order, AuditOrder))[:MAX_ORDERS],
            sketches=tuple(order for order in orders if isinstance(order, SketchOrder))[: 4 * MAX_ORDERS],
            sums=tuple(order for order in orders if isinstance(order, SumOrder))[:1],
            shares=tuple(order for order in orders if isinstance(order, ShareOrder))[:MAX_ORDERS],
            finished=self.is_finished,
        )

    async def leave(self, caller: PeerId, leave: Leave) -> Done:
        """Take a goodbye: the peer is gone at once."""
        peer = self._peers.get(caller)
        if peer is not None and peer.presence != "left":
            self._go(peer, "left", PeerState.STOPPED, leave.reason)
            await self._journal.event("peer.left", caller, f"{peer.name}: {leave.reason}")
            await self.save()
        return Done()

    async def expel(self, caller: PeerId, reason: str) -> None:
        """Take a peer for gone that is kept out now."""
        self._doubles.forget(caller)
        peer = self._peers.get(caller)
        if peer is not None and peer.presence != "left":
            self._go(peer, "left", PeerState.REFUSED, reason[:200])
            await self.save()

    def _refuse_banned(self, caller: PeerId) -> None:
        refusal = None if self.bans is None else self.bans.refusal(caller)
        if refusal is not None:
            raise refusal

    async def _refuse_clones(self, caller: PeerId, process: int) -> None:
        """Freeze an identity that two processes use, and tell each of them with its next word."""
        if self._doubles.hear(caller, process, now_s=self._clock.monotonic()) and self.bans is not None:
            await self.bans.freeze(caller)
            self._refuse_banned(caller)

    async def sweep(self) -> None:
        """Mark the silent as lost, and write the picture down. Once per tick."""
        now_s = self._clock.monotonic()
        for peer in (*self.live(), *self.watching()):
            silent_s = now_s - peer.seen_s
            if silent_s > self._settings.lost_after_s:
                self._go(peer, "lost", PeerState.STALLED, f"silent for {silent_s:.0f} s")
                await self._journal.event("peer.lost", peer.peer, f"{peer.name}: silent for {silent_s:.0f} s")
        if not any(peer.heard for peer in self.live()):
            self.awake_since_s = None
        await self._forget_strangers(now_s)
        if now_s - self._saved_s >= SAVE_EVERY_S:
            await self.save()

    async def _forget_strangers(self, now_s: float) -> None:
        """Forget who registered, never reported anything and has gone, once there are too many: they have no end."""
        too_many = len(self._peers) - KEPT_PEERS
        if too_many <= 0:
            return
        gone = [
            peer.peer
            for peer in sorted(self._peers.values(), key=lambda one: one.seen_s)
            if peer.presence != "live" and not peer.acknowledged and now_s - peer.seen_s > FORGET_AFTER_S
        ][: min(too_many, FORGET_AT_ONCE)]
        if not gone:
            return
        try:
            await self._database.run(peers.forget, gone)
        except StorageError as error:
            self._journal.note(DISK_NOTE, str(error))
            return
        for peer in gone:
            known = self._peers.get(peer)
            if known is not None and known.presence != "live":  # it may have come back meanwhile
                del self._peers[peer]

    async def save(self) -> None:
        """Write down what has changed since the last time."""
        changed = [peer for peer in self._peers.values() if peer.changed]
        for peer in changed:
            peer.changed = False
        self._saved_s = self._clock.monotonic()
        if not changed:
            return
        try:
            await self._database.run(peers.save_sightings, [_sighting(peer) for peer in changed])
        except StorageError as error:
            for peer in changed:
                peer.changed = True
            self._journal.note(DISK_NOTE, str(error))
        else:
            self._journal.clear(DISK_NOTE)

    async def assign(self, peer_id: PeerId, stages: tuple[StageId, ...]) -> None:
        """Ask a peer to host other stages; it hears of it with its next beat."""
        peer = self._peers[peer_id]
        detail = f"{peer.name}: from stages {_listed(peer.stages)} to {_listed(stages)}"
        peer.stages = stages
        peer.changed = True
        await self._journal.event("peer.moved", peer_id, detail)
        await self.save()

    def _place(self, caller: PeerId, request: Register) -> tuple[StageId, ...]:
        """Choose a newcomer's stages; who hosts some already keeps what it was last told."""
        known = self._peers.get(caller)
        hosting = request.hosting
        if hosting and known is not None and known.presence == "live":
            hosting = known.stages
        return place(
            request.wanted_stages or hosting,
            self.hosts(without=caller),
            num_stages=self._manifest.model.num_stages,
            span=self._settings.stages_per_peer,
            kept=[snapshot.stage for snapshot in request.kept],
        )

    def _followed(self, peer: PeerId, wanted: Collection[StageId]) -> tuple[StageId, ...]:
        """Return what one of the organiser's watchers follows: what it asks for, or everything."""
        if peer not in self._settings.watchers:
            return ()
        stages = (StageId(stage) for stage in range(self._manifest.model.num_stages))
        return tuple(stage for stage in stages if stage in wanted or not wanted)

    def _no_watcher(self, peer: PeerId) -> RefusedError:
        if peer in self._settings.watchers:
            return RefusedError(f"this run has {self._manifest.model.num_stages} stages, and none that it asks for.")
        hint = f"Its organiser has to name it: coordinator run DIR --watcher {peer}"
        return RefusedError(f"{peer} is no watcher of this run.", hint=hint)

    def _forget(self, newcomer: LivePeer, before: LivePeer | None) -> None:
        """Take a registration back that could not be written down."""
        if self._peers.get(newcomer.peer) is newcomer:
            del self._peers[newcomer.peer]
            if before is not None:
                self._peers[newcomer.peer] = before

    def _wake(self) -> None:
        if self.awake_since_s is None:
            self.awake_since_s = self._clock.monotonic()

    def _check_request(self, request: Register) -> None:
        if request.protocol != PROTOCOL_VERSION:
            raise IncompatibleError(
                f"the coordinator speaks protocol {PROTOCOL_VERSION}, this peer protocol {request.protocol}."
            )
        if request.run != self._manifest.run_id:
            raise RefusedError(f"this coordinator serves run {self._manifest.run_id}, not {request.run}.")
        skew_s = request.clock_s - self._clock.wall()
        # a request may have been under way for as long as its deadline allows, so that a clock which only
        # seems late is left to the peer's own check against `Welcome.clock_s`
        if not -(MAX_SKEW_S + CALL_TIMEOUT_S) <= skew_s <= MAX_SKEW_S:
            side = "ahead of" if skew_s > 0 else "behind"
            raise ClockError(f"this machine's clock is {abs(skew_s):.0f} s {side} the coordinator's.")

    def _check_states(self, states: Iterable[StageState]) -> None:
        last_round = self._manifest.batch.num_rounds + 1  # one past the round that only evaluates
        seen = set()
        for state in states:
            if not 0 <= state.stage < self._manifest.model.num_stages or state.stage in seen:
                raise WireError(f"a beat speaks of stage {state.stage}")
            if not (0 <= state.round <= last_round and 0 <= state.version <= last_round and state.members < 1 << 31):
                raise WireError(f"a beat speaks of round {state.round}, version {state.version}")
            seen.add(state.stage)

    def _admit(self, peer: PeerId, name: str, *, issued_s: int) -> Signed:
        return admit(
            self._key,
            run=self._manifest.run_id,
            peer=peer,
            name=name,
            issued_s=issued_s,
            valid_hours=self._settings.admission_hours,
        )

    def _take(self, peer: LivePeer, beat: Beat) -> None:
        self._wake()
        peer.presence = "live"
        peer.seen_s = self._clock.monotonic()
        peer.seen_wall_s = self._clock.wall()
        peer.state = beat.state
        peer.reason = beat.reason
        peer.addresses = beat.addresses
        peer.suspects = beat.suspects
        peer.heard = True
        peer.changed = True

    async def _record(self, peer: LivePeer, beat: Beat) -> None:
        """Store reports. If that fails they stay unacknowledged: the peer keeps them and training goes on.

        So do those beyond its pace.
        """
        taken = beat.reports[: self._pace.reports(peer.peer, len(beat.reports))]
        try:
            peer.acknowledged = await self._ledger.record(peer.peer, taken)
        except StorageError as error:
            self._journal.note(DISK_NOTE, str(error))

    def _hints(self, caller: PeerId) -> tuple[tuple[StageId, PeerId, tuple[str, ...]], ...]:
        """Name who hosts what. In a large stage every caller hears of other members, so that load spreads."""
        by_stage: dict[StageId, dict[PeerId, float]] = {}
        for peer in self.live():
            for stage in peer.stages:
                if peer.peer != caller:
                    by_stage.setdefault(stage, {})[peer.peer] = 1.0
        share = max(1, MAX_HINTS // self._manifest.model.num_stages)
        return tuple(
            (stage, member, self._peers[member].addresses)
            for stage in sorted(by_stage)
            for member in _some(f"hint/{caller}", by_stage[stage], share)
        )

    def _go(self, peer: LivePeer, presence: peers.Presence, state: PeerState, reason: str) -> None:
        peer.presence = presence
        peer.state = state
        peer.reason = reason
        peer.changed = True


def _entrance(known: LivePeer | None, session: int) -> str | None:
    """Name the event that a registration is; None for a new pass. Who has not gone cannot join once more."""
    if known is None or known.presence == "left":
        return "peer.joined"
    is_same_life = known.session == session
    if known.presence == "lost":
        return "peer.returned" if is_same_life else "peer.joined"
    return None if is_same_life else "peer.rejoined"


def _some(key: str, members: dict[PeerId, float], limit: int) -> Iterable[PeerId]:
    return members if len(members) <= limit else rendezvous(key, members)[:limit]


def _listed(stages: Iterable[StageId]) -> str:
    return ", ".join(str(stage) for stage in stages)


def _sighting(peer: LivePeer) -> peers.Sighting:
    return peers.Sighting(
        peer=peer.peer,
        presence=peer.presence,
        state=peer.state.value,
        reason=peer.reason,
        stages=peer.stages,
        addresses=peer.addresses,
        seen_s=peer.seen_wall_s,
        replicas=peer.replicas if peer.presence == "live" and not peer.follows else (),
    )


def _row(peer: LivePeer, capability: bytes, admission: bytes) -> peers.PeerRow:
    return peers.PeerRow(
        peer=peer.peer,
        session=peer.session,
        name=peer.name,
        capability=capability,
        admission=admission,
        presence=peer.presence,
        state=peer.state.value,
        reason=peer.reason,
        stages=peer.stages,
        wanted=peer.wanted,
        addresses=peer.addresses,
        joined_s=peer.joined_s,
        seen_s=peer.seen_wall_s,
    )
