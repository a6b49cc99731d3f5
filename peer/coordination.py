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
from protocol.errors import BusyError, ClockError, RefusedError, SwarmError, TransientError, UnreachableError
from protocol.ids import PeerId, RunId, StageId
from protocol.invite import Invite
from protocol.manifest import MANIFEST_CONTEXT, Manifest
from protocol.signing import unseal
from protocol.wire import PROTOCOL_VERSION

log = structlog.get_logger()

MAX_SKEW_S = 3.0  # hivemind's DHT refuses neighbours whose clocks differ by more
REGISTER_ATTEMPTS = 5
REGISTER_PAUSE_S = 2.0
BEAT_S = 2.0
LEAVE_TIMEOUT_S = 3.0


@dataclass(frozen=True, slots=True)
class Admitted:
    """What a successful registration brings, verified."""

    manifest: Manifest
    welcome: Welcome


@dataclass(frozen=True, slots=True)
class Condition:
    """What a beat says about this peer."""

    state: PeerState
    reason: str
    stages: tuple[StageState, ...]
    suspects: tuple[PeerId, ...] = ()


async def register(
    link: Link,
    invite: Invite,
    settings: PeerSettings,
    *,
    capability: Capability,
    session: int,
    kept: tuple[Snapshot, ...] = (),
) -> Admitted:
    """Ask the coordinator to take part; check what it answers.

    Raises `RefusedError` kinds if it says no, `UnreachableError` if it stays silent, `ClockError` on skew.
    """
    request = Register(
        protocol=PROTOCOL_VERSION,
        run=invite.run,
        session=session,
        name=settings.name,
        token=invite.token,
        capability=capability,
        clock_s=time.time(),
        addresses=await link.node.addresses(),
        wanted_stages=tuple(StageId(stage) for stage in settings.stages),
        kept=kept,
    )
    asked_s = time.time()
    welcome = await _ask_patiently(link, request)
    check_clock(welcome.clock_s, asked_s=asked_s, answered_s=time.time())
    return Admitted(check_manifest(welcome, invite), welcome)


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
    *,
    condition: Callable[[], Condition],
    reports: ReportQueue,
    on_reply: Callable[[BeatReply], None],
) -> None:
    """Beat until cancelled. An unreachable coordinator is noted and tried again."""
    was_reachable = True
    while True:
        try:
            reply = await beat_once(link, condition=condition(), reports=reports)
        except TransientError as error:
            if was_reachable:
                log.warning("coordinator.silent", error=error.one_line())
            was_reachable = False
            await _rejoin(link)
        else:
            if not was_reachable:
                log.info("coordinator.back")
            was_reachable = True
            on_reply(reply)
        await asyncio.sleep(BEAT_S)


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
    )
    reply = await link.calls.call(link.coordinator, beat, BeatReply)
    reports.acknowledge(reply.acknowledged)
    return reply


async def say_goodbye(link: Link, *, reason: str) -> None:
    """Tell the coordinator that this peer goes; it would notice anyway."""
    try:
        await link.calls.tell(link.coordinator, Leave(reason=reason), timeout_s=LEAVE_TIMEOUT_S)
    except TransientError as error:
        log.debug("coordinator.silent", error=error.one_line())


async def _ask_patiently(link: Link, request: Register) -> Welcome:
    for attempt in range(REGISTER_ATTEMPTS):
        try:
            return await link.calls.call(link.coordinator, request, Welcome)
        except BusyError as error:
            await asyncio.sleep(error.retry_after_s)
        except TransientError as error:
            log.info("coordinator.unreachable", attempt=attempt, error=error.one_line())
            await asyncio.sleep(REGISTER_PAUSE_S)
    raise UnreachableError(
        "the coordinator does not answer.", hint="Is it running? Check the invite and your connection, then try again."
    )
