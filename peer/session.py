"""One tenure: this peer hosts one span, from getting its state to leaving.

Owns: the order of a span's life - build, restore, serve, wait for a charter or a seat, train, drain - and
how it ends: the volunteer leaves, the coordinator wants other stages, or the run is over. Must not know:
the command line; how the parts work (`peer/span_parts.py` puts them together). `peer/app.py` starts one
session after the other.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable, Mapping
from enum import Enum

import structlog

from peer.averaging.sync import Place
from peer.coordination import Condition
from peer.link import Link
from peer.memory.executor import Pause
from peer.span_parts import SpanParts
from peer.tally import Tally
from protocol.control import BeatReply, PeerState, StageState
from protocol.errors import PeerFault, TransientError, UnreachableError
from protocol.ids import PeerId, StageId
from protocol.records import HostedStage
from protocol.rounds import events
from protocol.rounds.lineage import root_lineage
from protocol.rounds.messages import CHARTER_CONTEXT, Charter, CharterNotice, Seat
from protocol.signing import Signed, unseal

log = structlog.get_logger()

RETRY_S = 1.0
ASK_AGAIN_S = 10.0  # members that could not be followed: their line may be back
DRAIN_TIMEOUT_S = 60.0
MOVE_TIMEOUT_S = 5.0  # a peer is moved to a stage that has nobody: the round it would finish may be waiting for that


class Ending(Enum):
    """Why a session ended."""

    LEFT = "left"
    REASSIGNED = "reassigned"
    LOST = "lost"
    """Nobody can bring us a stage's state (any more)."""
    FINISHED = "finished"
    PAUSED = "paused"
    """This machine's own limits leave nothing to do for a while."""


class Session:
    """Everything that lives as long as the span stays the same."""

    def __init__(self, parts: SpanParts, *, link: Link, session: int, charters: Iterable[Signed]) -> None:
        self._parts = parts
        self._link = link
        self._seat = Seat(peer=link.peer_id, session=session)
        self._charters: dict[StageId, tuple[Charter, Signed]] = {}
        self._members: dict[StageId, tuple[PeerId, ...]] = {}
        self._found: dict[StageId, tuple[PeerId, ...]] = {}
        self._places: dict[StageId, Place] = {}
        self._restorers = {stage: parts.restorer(stage) for stage in parts.stages}
        self._changes: dict[StageId, int] = {}
        """Of every stage's state when it stood at its place: whatever changes it later ends that."""
        self._joined: set[StageId] = set()
        self._finished = self._lost = False
        self._wanted = parts.stages
        self._changed = asyncio.Event()
        self.pause: Pause | None = None
        """Why the session has ended, and for how long, if this machine needs a pause."""
        self.state, self.reason = PeerState.STARTING, ""
        self._take_charters(charters)
        parts.view.on_change = self._post_roster
        parts.sources_of = self._members_of
        parts.on_lost = self._start_over
        parts.on_pause = self._notify

    # -- what others see ------------------------------------------------------------------------------

    def condition(self) -> Condition:
        """Return what the next beat says."""
        return Condition(
            state=self.state,
            reason=self.reason,
            stages=tuple(self._stage_state(stage) for stage in self._parts.stages if self._is_placed(stage)),
            suspects=self._parts.view.suspects(now_s=time.monotonic())[:64],
        )

    @property
    def drive_bytes(self) -> int | None:
        """How much was written to the NVMe drive today, if one is used."""
        return self._parts.drive_bytes()

    @property
    def stages(self) -> tuple[StageId, ...]:
        return self._parts.stages

    @property
    def wanted_stages(self) -> tuple[StageId, ...]:
        """The stages that the coordinator wants from us, by its last word."""
        return self._wanted

    @property
    def tally(self) -> Tally:
        return self._parts.tally

    def on_reply(self, reply: BeatReply) -> None:
        """Take over what the coordinator says."""
        self._take_charters(reply.charters)
        for each in reply.given_up:
            if each.members:
                self._parts.give_up(each)
            elif any(state.lineage == each.lineage for state in self.condition().stages if state.stage == each.stage):
                log.warning("stage.goes_back", stage=each.stage)
                self._start_over()
        self._parts.audit((*reply.shares, *reply.sketches, *reply.audits, *reply.sums))
        members: dict[StageId, list[PeerId]] = {}
        for stage, peer, addresses in reply.members:
            members.setdefault(stage, []).append(peer)
            self._parts.introduce(peer, addresses)
        if members:
            self._members = {stage: tuple(peers) for stage, peers in members.items()}
            self._post_roster()
        self._finished = self._finished or reply.finished
        self._wanted = reply.stages or self._wanted
        self._notify()

    def on_found(self, replicas: Mapping[StageId, tuple[PeerId, ...]]) -> None:
        """Take over what the DHT says. Of a stage that could not be read this time, the last answer stands."""
        self._found |= replicas
        self._post_roster()
        self._notify()

    def hosted(self) -> tuple[HostedStage, ...]:
        """Return what our DHT record should say: the stages whose state we hold, or are bringing up to date."""
        return tuple(
            HostedStage(stage=state.stage, version=state.version, lineage=state.lineage)
            for state in self.condition().stages
        )

    # -- life -----------------------------------------------------------------------------------------

    async def run(self, stop: asyncio.Event) -> Ending:
        """Live until `stop` is set (then drain), the assignment changes, the state is lost, or the run is over."""
        async with asyncio.TaskGroup() as tasks:
            running = tasks.create_task(self._train(), name="session")
            ending = await self._wait_ending(stop)
            if ending in (Ending.LEFT, Ending.PAUSED, Ending.REASSIGNED):
                await self._drain(MOVE_TIMEOUT_S if ending is Ending.REASSIGNED else DRAIN_TIMEOUT_S)
            running.cancel()
        await self._parts.stop()
        return ending

    async def _train(self) -> None:
        parts = self._parts
        self._say(PeerState.DOWNLOADING, "tokens")
        await self._open_tokens()
        await parts.serve()
        async with asyncio.TaskGroup() as tasks:
            for stage in parts.stages:
                tasks.create_task(self._bring_up(stage), name=f"stage-{stage}")
            for work in parts.background():
                tasks.create_task(work)

    async def _open_tokens(self) -> None:
        """Open the token files; whoever has their indexes may be away for a while."""
        while True:
            try:
                return await self._parts.open_tokens()
            except (TransientError, PeerFault) as error:
                self._say(PeerState.WAITING, "tokens")
                log.info("tokens.waiting", error=error.one_line())
                await self._wait_news()

    async def _bring_up(self, stage: StageId) -> None:
        """Get one stage's state, and from then on drive its rounds."""
        driver = self._parts.drivers[stage]
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(driver.run(), name=f"driver-{stage}")
            charter = None
            while charter is None:
                await self._hold(stage, await self._restore(stage))
                charter = self._places[stage].charter or await self._wait_charter(stage)
            place = self._places[stage]
            self._joined.add(stage)
            driver.post(events.Synced(charter, place.commits, driver.state_digest))
            if stage in self._charters:  # one that came while we were at it was for nobody
                self._post_charter(stage)
            self.tally.begin()
            self._say(PeerState.TRAINING, "")

    async def _hold(self, stage: StageId, place: Place) -> None:
        """Take note of where a stage's state stands, and of its digest."""
        restorer = self._restorers[stage]
        self._parts.drivers[stage].state_digest = await restorer.state_digest()
        self._places[stage], self._changes[stage] = place, restorer.changes

    def _is_placed(self, stage: StageId) -> bool:
        """Tell whether a stage's state stands where we say: not while something else is being loaded over it."""
        return stage in self._joined or self._changes.get(stage) == self._restorers[stage].changes

    async def _restore(self, stage: StageId) -> Place:
        """Follow the members if there are any; otherwise start from our own NVMe, a checkpoint or the beginning."""
        restorer = self._restorers[stage]
        while True:
            self._say(PeerState.DOWNLOADING, f"state of stage {stage}")
            known = self._charters.get(stage)
            members = self._members_of(stage)
            if members:
                try:
                    return await restorer.from_members(members)
                except UnreachableError as error:
                    log.info("restore.no_members", stage=stage, error=error.one_line())
            try:
                return await restorer.from_scratch(allow_initial=known is None or known[0].version == 0)
            except (TransientError, PeerFault) as error:
                self._say(PeerState.WAITING, "checkpoint")
                log.info("restore.waiting", stage=stage, error=error.one_line())
                await self._wait_news()

    async def _wait_charter(self, stage: StageId) -> Signed | None:
        """Hold a restored state ready until a charter seats us, or until there are members to follow.

        None: following them has failed half-way, and what is here now is of no place; or the run has a checkpoint by
        now that is ahead of what is here, which the coordinator would not found the stage on any more.
        """
        restorer = self._restorers[stage]
        asked, ask_again_s, look_again_s = None, 0.0, time.monotonic() + ASK_AGAIN_S
        while True:
            self._say(PeerState.WAITING, "charter")
            known = self._charters.get(stage)
            if known is not None:
                charter, signed = known
                if self._seat in charter.seats and charter.version == self._places[stage].version:
                    return signed
                others = self._members_of(stage)
                if others and (asked != (signed, others) or time.monotonic() >= ask_again_s):
                    asked, ask_again_s = (signed, others), time.monotonic() + ASK_AGAIN_S
                    try:
                        followed = await restorer.from_members(others)
                    except UnreachableError as error:
                        log.info("restore.no_members", stage=stage, error=error.one_line())
                        if not self._is_placed(stage):
                            return None
                    else:
                        await self._hold(stage, followed)
                        return followed.charter
            if time.monotonic() >= look_again_s:
                look_again_s = time.monotonic() + ASK_AGAIN_S
                is_outdated = await restorer.is_outdated(self._places[stage].version)
                if is_outdated and self._charters.get(stage) is known:  # no charter has come meanwhile
                    log.info("restore.outdated", stage=stage, version=self._places[stage].version)
                    return None
            await self._wait_news()

    async def _wait_ending(self, stop: asyncio.Event) -> Ending:
        stopped = asyncio.create_task(stop.wait())
        try:
            while True:
                if stop.is_set():
                    return Ending.LEFT
                if self._finished:
                    return Ending.FINISHED
                if self._lost:
                    return Ending.LOST
                if self._wanted != self._parts.stages:
                    return Ending.REASSIGNED
                self.pause = self._parts.pause()  # looked at with every beat
                if self.pause is not None:
                    return Ending.PAUSED
                changed = asyncio.create_task(self._changed.wait())
                await asyncio.wait({stopped, changed}, return_when=asyncio.FIRST_COMPLETED)
                changed.cancel()
        finally:
            stopped.cancel()

    async def _drain(self, timeout_s: float) -> None:
        """Finish this round's work where we have any, so that nothing of it is lost, and say goodbye."""
        self._say(PeerState.DRAINING, "")
        waiting = [self._parts.drivers[stage] for stage in self._joined]
        for driver in waiting:
            driver.post(events.Drain())
        try:
            async with asyncio.timeout(timeout_s):
                await asyncio.gather(*(driver.wait_left() for driver in waiting))
        except TimeoutError:
            log.warning("drain.timeout", after_s=timeout_s)
        await asyncio.gather(*(driver.say_goodbye() for driver in waiting))

    # -- private --------------------------------------------------------------------------------------

    def _members_of(self, stage: StageId) -> tuple[PeerId, ...]:
        """List everybody who may hold this stage's state: newest membership, charter, coordinator's hint."""
        known = self._charters.get(stage)
        seats = [seat.peer for seat in known[0].seats] if known else []
        membership = self._parts.view.membership(stage)
        members = list(membership.members) if membership else []
        hinted = [*self._members.get(stage, ()), *self._found.get(stage, ())] if known else []
        return tuple(peer for peer in dict.fromkeys([*members, *hinted, *seats]) if peer != self._link.peer_id)

    def _take_charters(self, charters: Iterable[Signed]) -> None:
        for signed in charters:
            charter = unseal(signed, CHARTER_CONTEXT, Charter, signer=self._link.coordinator)
            known = self._charters.get(charter.stage)
            if known is not None and known[0].generation >= charter.generation:
                continue
            self._charters[charter.stage] = (charter, signed)
            self._parts.learn_charter(charter, root_lineage(signed))
            if charter.stage in self._joined:
                self._post_charter(charter.stage)
        self._notify()

    def _post_charter(self, stage: StageId) -> None:
        """Tell a round machine the newest charter of its stage; it knows what to make of one that it has."""
        _, signed = self._charters[stage]
        notice = CharterNotice(stage=stage, charter=signed)
        self._parts.drivers[stage].post(events.Received(self._link.coordinator, notice))

    def _post_roster(self) -> None:
        """Tell every round machine who hosts what, as far as anybody says."""
        stages = range(self._parts.num_stages)
        known = {stage: self._parts.view.membership(StageId(stage)) for stage in stages}
        roster = {
            StageId(stage): tuple(
                dict.fromkeys(
                    [
                        *(membership.members if (membership := known[stage]) else ()),
                        *self._members.get(StageId(stage), ()),
                        *self._found.get(StageId(stage), ()),
                    ]
                )
            )
            for stage in stages
        }
        for driver in self._parts.drivers.values():
            driver.post(events.RosterChanged(roster, self._link.door.banned))

    def _stage_state(self, stage: StageId) -> StageState:
        driver, place = self._parts.drivers[stage], self._places[stage]
        link = driver.standing if stage in self._joined else None
        is_member = link is not None and self._link.peer_id in link.members
        return StageState(
            stage=stage,
            round=place.round if link is None else link.next_round,
            version=place.version if link is None else link.version,
            lineage=place.lineage if link is None else link.lineage,
            ready=link is not None or stage not in self._joined,
            members=len(link.members) if link is not None and is_member else 0,
            state_digest=driver.state_digest,
            snapshot=driver.snapshot,
            rival=driver.rival,
        )

    def _start_over(self) -> None:
        self._lost = True
        self._notify()

    def _say(self, state: PeerState, reason: str) -> None:
        if self.state is not PeerState.DRAINING:
            self.state, self.reason = state, reason

    async def _wait_news(self) -> None:
        """Wait for the coordinator to say something new, or a moment."""
        changed = self._changed
        try:
            async with asyncio.timeout(RETRY_S):
                await changed.wait()
        except TimeoutError:
            return

    def _notify(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()
