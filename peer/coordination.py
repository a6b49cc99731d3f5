"""The peer's side of its talk with the coordinator: registering, beating, saying goodbye.

Owns: what is checked of a welcome (the manifest's signature, the run, the clock), and the beat that
carries state and reports out and charters in. Must not know: what happens with charters. Everything here
may fail for hours without stopping training, except the very first registration.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass

import structlog

from peer.link import Link
from peer.reports import ReportQueue
from peer.settings import PeerSettings
from protocol.control import (
    Beat,
    BeatReply,
    Capability,
    Leave,
    PeerState,
    Register,
    Snapshot,
    StageState,
    Welcome,
)
from protocol.errors import (
    BusyError,
    ClockError,
    IncompatibleError,
    PeerFault,
    RefusedError,
    SwarmError,
    TransientError,
    UnreachableError,
)
from protocol.ids import PeerId, RunId, StageId
from protocol.invite import Invite
from protocol.manifest import MANIFEST_CONTEXT, Manifest
from protocol.records import ADMISSION_CONTEXT, Admission
from protocol.signing import Signed, unseal
from protocol.wire import PROTOCOL_VERSION

log = structlog.get_logger()

MAX_SKEW_S = 3.0  # hivemind's DHT refuses neighbours whose clocks differ by more
REGISTER_ATTEMPTS = 5
DEAF_ATTEMPTS = 2  # a coordinator that starts is in the DHT a moment before it serves calls
REGISTER_PAUSE_S = 2.0
BEAT_S = 2.0
CATCH_UP_S = 0.1
LEAVE_TIMEOUT_S = 3.0


@dataclass(frozen=True, slots=True)
class Condition:
    """What a beat says about this peer."""

    state: PeerState
    reason: str
    stages: tuple[StageState, ...]
    suspects: tuple[PeerId, ...] = ()


class Registration:
    """This peer's standing with the coordinator: entered once per tenure, renewed before its pass runs out.

    A session number belongs to one tenure: what a round machine has promised is forgotten with it, so a seat that
    was given to an earlier tenure, of this process or of one before, must not be taken for ours.
    """

    def __init__(
        self,
        link: Link,
        invite: Invite,
        settings: PeerSettings,
        *,
        capability: Capability,
        handovers: tuple[Signed, ...] = (),
        watches: bool = False,
    ) -> None:
        """`watches`: it is a watcher's (`peer/watcher.py`)."""
        self._link = link
        self._invite = invite
        self._settings = settings
        self._capability = capability
        self._handovers = handovers
        self._watches = watches
        self._session = 0
        self._welcome: Welcome | None = None
        self._renew_at_s = float("inf")
        self._manifest: Manifest | None = None

    @property
    def session(self) -> int:
        """Of the present tenure; larger than that of every earlier one."""
        return self._session

    @property
    def manifest(self) -> Manifest:
        """The run, as signed by the invite's coordinator. Only after `enter`."""
        assert self._manifest is not None
        return self._manifest

    @property
    def welcome(self) -> Welcome:
        """The coordinator's newest answer. Only after `enter`."""
        assert self._welcome is not None
        return self._welcome

    @property
    def is_due(self) -> bool:
        """Half of the pass's life is over."""
        return time.time() >= self._renew_at_s

    async def enter(self, *, kept: tuple[Snapshot, ...] = (), hosting: tuple[StageId, ...] = ()) -> Welcome:
        """Begin a tenure: a process that starts says what it has `kept`, one that was moved what it is `hosting` now.

        Raises `RefusedError` kinds if the coordinator says no, `UnreachableError` if it stays silent, `ClockError`
        on skew.
        """
        self._session = max(self._session + 1, time.time_ns() // 1_000_000)
        return await self._register(kept, hosting)

    async def renew(self, *, hosting: tuple[StageId, ...]) -> Welcome:
        """Get a new pass for the present tenure, which goes on as it is. Raises like `enter`."""
        return await self._register((), hosting)

    async def _register(self, kept: tuple[Snapshot, ...], hosting: tuple[StageId, ...]) -> Welcome:
        asked_s = time.time()
        request = Register(
            protocol=PROTOCOL_VERSION,
            run=self._invite.run,
            session=self._session,
            name=self._settings.name,
            token=self._invite.token,
            capability=self._capability,
            clock_s=asked_s,
            addresses=await self._link.node.addresses(),
            wanted_stages=tuple(StageId(stage) for stage in self._settings.stages),
            hosting=hosting,
            kept=kept,
            process=self._link.process,
            watches=self._watches,
            handovers=self._handovers,
        )
        welcome = await _ask_patiently(self._link, request)
        check_clock(welcome.clock_s, asked_s=asked_s, answered_s=time.time())
        self._manifest = check_manifest(welcome, self._invite)
        admission = unseal(welcome.admission, ADMISSION_CONTEXT, Admission, signer=self._link.coordinator)
        self._renew_at_s = (admission.issued_s + admission.expires_s) / 2
        self._welcome = welcome
        self._link.passes.own = welcome.admission
        return welcome


def check_clock(theirs_s: float, *, asked_s: float, answered_s: float) -> None:
    """Raise `ClockError` if the coordinator's clock was outside of our asking interval by over 3 s."""
    skew_s = max(asked_s - theirs_s, theirs_s - answered_s)
    if skew_s > MAX_SKEW_S:
        side = "ahead of" if asked_s > theirs_s else "behind"
        raise ClockError(f"this machine's clock is {skew_s:.0f} s {side} the coordinator's.")


def check_manifest(welcome: Welcome, invite: Invite) -> Manifest:
    """Return the manifest if it is signed by the invite's coordinator and is the invite's run."""
    try:
        manifest = unseal(welcome.manifest, MANIFEST_CONTEXT, Manifest, signer=invite.coordinator)
    except SwarmError as error:
        raise RefusedError(
            f"the run's manifest cannot be trusted: {error}.", hint="Ask the organiser for a new invite."
        ) from None
    if manifest.run_id != RunId(invite.run):
        raise RefusedError(
            f"the coordinator serves run {manifest.run_id}, the invite is for {invite.run}.",
            hint="Ask the organiser for a new invite.",
        )
    return manifest


async def keep_beating(
    link: Link,
    registration: Registration,
    *,
    condition: Callable[[], Condition],
    reports: ReportQueue,
    on_reply: Callable[[BeatReply], None],
) -> None:
    """Beat until cancelled. A coordinator that is away is tried again, one that has forgotten us is told once more.

    What does not fit into a beat follows in quick ones, if it was taken, until nothing is left of what waited: at the
    usual pace, fast rounds would bring reports as fast as they are handed in, and what led to where we stand would
    always be among those that wait.

    Raises `RefusedError` if it does not want us any more.
    """
    was_reachable = True
    while True:
        now = condition()
        hosting = tuple(state.stage for state in now.stages) or registration.welcome.stages
        sent, is_behind = reports.oldest(), False
        is_all = len(sent) == len(reports)
        try:
            if registration.is_due:
                await registration.renew(hosting=hosting)
            reply = await _beat_or_renew(link, registration, condition=now, hosting=hosting, reports=reports)
        except (TransientError, PeerFault, ClockError) as error:
            if was_reachable:
                log.warning("coordinator.silent", error=error.one_line())
            was_reachable = False
            await _rejoin(link)
        else:
            if not was_reachable:
                log.info("coordinator.back")
            was_reachable = True
            on_reply(reply)
            is_behind = not is_all and reply.acknowledged >= sent[-1].sequence
        await asyncio.sleep(CATCH_UP_S if is_behind else BEAT_S)


async def _beat_or_renew(
    link: Link, registration: Registration, *, condition: Condition, hosting: tuple[StageId, ...], reports: ReportQueue
) -> BeatReply:
    """Beat; a coordinator that does not know us has lost its memory, or took us for gone: register again, once."""
    try:
        return await beat_once(link, condition=condition, reports=reports)
    except RefusedError as error:
        log.warning("coordinator.forgot", error=error.one_line())
    await registration.renew(hosting=hosting)
    return await beat_once(link, condition=condition, reports=reports)


async def _rejoin(link: Link) -> None:
    """Dial the coordinator by address: one that was restarted knows nobody until somebody comes."""
    for address in link.coordinator_addresses:
        try:
            await link.node.join(address, timeout_s=BEAT_S)
        except TransientError as error:
            log.debug("coordinator.unreachable", address=address, error=error.one_line())
        else:
            return


async def beat_once(link: Link, *, condition: Condition, reports: ReportQueue) -> BeatReply:
    """Send one beat and take its acknowledgement over."""
    beat = Beat(
        state=condition.state,
        reason=condition.reason,
        addresses=await link.node.addresses(),
        stages=condition.stages,
        suspects=condition.suspects,
        reports=reports.oldest(),
        revocations=link.door.number,
        process=link.process,
    )
    reply = await link.calls.call(link.coordinator, beat, BeatReply)
    reports.acknowledge(reply.acknowledged)
    if reply.revoked is not None:
        link.passes.learn(reply.revoked)
    return reply


async def hand_in(link: Link, *, reports: ReportQueue) -> None:
    """Bring the last reports to the coordinator, if it is there: after the goodbye it takes none from us."""
    leaving = Condition(PeerState.DRAINING, "", ())
    try:
        async with asyncio.timeout(LEAVE_TIMEOUT_S):
            while len(reports):
                await beat_once(link, condition=leaving, reports=reports)
    except (TransientError, PeerFault, RefusedError, TimeoutError) as error:
        log.info("reports.left", num=len(reports), error=str(error))


async def say_goodbye(link: Link, *, reason: str) -> None:
    """Tell the coordinator that this peer goes; it would notice anyway."""
    try:
        await link.calls.tell(link.coordinator, Leave(reason=reason), timeout_s=LEAVE_TIMEOUT_S)
    except (TransientError, PeerFault, RefusedError) as error:  # it may have banned us: why we go is said already
        log.debug("coordinator.silent", error=error.one_line())


async def _ask_patiently(link: Link, request: Register) -> Welcome:
    deaf_attempts = 0
    for attempt in range(REGISTER_ATTEMPTS):
        try:
            return await link.calls.call(link.coordinator, request, Welcome, introduced=False)
        except BusyError as error:
            await asyncio.sleep(error.retry_after_s)
        except TransientError as error:
            log.info("coordinator.unreachable", attempt=attempt, error=error.one_line())
            if isinstance(error, UnreachableError) and error.is_deaf:
                deaf_attempts += 1
            if deaf_attempts == DEAF_ATTEMPTS:
                what = f"the coordinator is there, but does not speak protocol {PROTOCOL_VERSION}."
                raise IncompatibleError(what) from None
            await asyncio.sleep(REGISTER_PAUSE_S)
    raise UnreachableError(
        "the coordinator does not answer.", hint="Is it running? Check the invite and your connection, then try again."
    )
