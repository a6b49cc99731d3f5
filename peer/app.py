"""`peer join` and `peer watch`: connect, register, and live one session after the other until told to stop.

Owns: the process's life - signals, the single compute thread, the data folder's lock, the beat, the live
line. Must not know: how a session works. This is the composition root of a peer.
"""

from __future__ import annotations

import asyncio
import platform
from collections.abc import Callable, Coroutine, Mapping, Sequence
from contextlib import AsyncExitStack
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil
import structlog

from peer.averaging.history import kept_snapshots
from peer.coordination import Condition, Registration, hand_in, keep_beating, say_goodbye
from peer.engine.build import build_span, choose_device
from peer.identity import load_handovers
from peer.link import Link, connected
from peer.memory.executor import Pause
from peer.pipeline.compute import ComputeThread, Priority
from peer.presence import Presence
from peer.report_spool import ReportSpool
from peer.reports import ReportQueue
from peer.session import Ending, Session
from peer.settings import LOCK, PeerSettings
from peer.span_parts import SpanParts
from peer.ui.live import Line, show_live
from peer.watcher import Watcher
from protocol.control import BeatReply, Capability, PeerState
from protocol.errors import ClockError, PeerFault, TransientError
from protocol.ids import RunId, StageId
from protocol.invite import Invite
from protocol.manifest import Manifest
from protocol.process import folder_lock, interruptible, until_stopped, unwrapped
from protocol.records import ReplicaRecord

log = structlog.get_logger()

RETRY_S = 2.0

_Life = Callable[..., Coroutine[Any, Any, None]]
"""What a process does between its registration and its goodbye."""
OTHER_FOLDER = "Choose another folder with --data-dir, or stop the peer that runs there."


async def join_run(invite: Invite, settings: PeerSettings) -> None:
    """Take part in a run until it is over or the volunteer stops it.

    Raises an error of the tree if this machine cannot take part or is not wanted.
    """
    await _enter(invite, settings, _live)


async def watch_run(invite: Invite, settings: PeerSettings) -> None:
    """Recompute what others did in a run, for its organiser, until it is over or somebody stops it. Raises likewise."""
    await _enter(invite, settings, _watch, watches=True)


async def _enter(invite: Invite, settings: PeerSettings, live: _Life, *, watches: bool = False) -> None:
    """Connect, register, live, and say goodbye."""
    with folder_lock(settings.data_dir / LOCK, owner="peer", otherwise=OTHER_FOLDER):
        async with interruptible() as stop, AsyncExitStack() as connection:
            link = await until_stopped(stop, connection.enter_async_context(connected(invite, settings)))
            if link is None:
                return
            handovers = load_handovers(settings.data_dir, link.peer_id)
            capability = _capability(settings)
            registration = Registration(
                link, invite, settings, capability=capability, handovers=handovers, watches=watches
            )
            kept = () if watches else kept_snapshots(_run_folder(settings, invite.run))
            entered = await until_stopped(stop, registration.enter(kept=kept))
            try:
                if entered is not None:
                    await unwrapped(live(link, settings, registration, stop=stop))
            finally:  # also if we were stopped while it was letting us in
                await say_goodbye(link, reason="stopped")


async def _live(link: Link, settings: PeerSettings, registration: Registration, *, stop: asyncio.Event) -> None:
    """Run sessions until one ends for good."""
    folder = _run_folder(settings, registration.manifest.run_id)
    reports = await asyncio.to_thread(ReportQueue, ReportSpool(folder / "reports"))
    compute = ComputeThread()
    present = _Present()
    try:
        async with asyncio.TaskGroup() as tasks:
            beside = [
                tasks.create_task(
                    keep_beating(
                        link, registration, condition=present.condition, reports=reports, on_reply=present.on_reply
                    )
                ),
                tasks.create_task(link.node.wait_failed()),
            ]
            while True:
                ending, stages = await _one_session(
                    link, settings, registration, stop=stop, reports=reports, compute=compute, present=present
                )
                log.info("session.ended", ending=ending.value)
                if ending in (Ending.LEFT, Ending.FINISHED):
                    break
                if present.pause is not None:
                    await _pause(present, settings, manifest=registration.manifest, stop=stop)
                if not await _moved(registration, stages, stop=stop):
                    break
            for task in beside:
                task.cancel()
        await hand_in(link, reports=reports)
    finally:
        await compute.stop()


async def _watch(link: Link, settings: PeerSettings, registration: Registration, *, stop: asyncio.Event) -> None:
    """Follow the stages that the coordinator names until the run is over or we are stopped."""
    manifest, stages = registration.manifest, registration.welcome.stages
    folder = _run_folder(settings, manifest.run_id)
    reports = await asyncio.to_thread(ReportQueue, ReportSpool(folder / "reports"))
    compute = ComputeThread()
    try:
        engine = await compute.run(lambda: build_span(manifest, stages, settings), priority=Priority.CONTROL)
        watcher = Watcher(
            link=link,
            manifest=manifest,
            engine=engine,
            compute=compute,
            reports=reports,
            session=registration.session,
            folder=folder,
            audit_bytes=settings.audit_bytes,
        )
        try:
            async with asyncio.TaskGroup() as tasks:
                beat = keep_beating(
                    link, registration, condition=watcher.condition, reports=reports, on_reply=watcher.on_reply
                )
                line = show_live(lambda: _watching_line(watcher, settings, manifest.batch.num_rounds))
                beside = [tasks.create_task(work) for work in (beat, line, link.node.wait_failed())]
                await until_stopped(stop, watcher.run())
                for task in beside:
                    task.cancel()
        finally:
            await watcher.close()
        await hand_in(link, reports=reports)
    finally:
        await compute.stop()


async def _pause(present: _Present, settings: PeerSettings, *, manifest: Manifest, stop: asyncio.Event) -> None:
    """Do nothing for as long as this machine needs, and say so."""
    pause = present.pause
    assert pause is not None
    log.warning("peer.paused", reason=pause.reason, seconds=pause.seconds)
    line = Line(
        name=settings.name,
        state=PeerState.PAUSED,
        reason=pause.reason,
        stages=(),
        round=None,
        num_rounds=manifest.batch.num_rounds,
    )
    showing = asyncio.create_task(show_live(lambda: line))
    try:
        await until_stopped(stop, asyncio.sleep(pause.seconds))
    finally:
        showing.cancel()
        present.pause = None


async def _moved(registration: Registration, stages: tuple[StageId, ...], *, stop: asyncio.Event) -> bool:
    """Begin a new tenure, perhaps on other stages, however long that takes; False if stopped before."""
    while not stop.is_set():
        try:
            return await until_stopped(stop, registration.enter(hosting=stages)) is not None
        except (TransientError, PeerFault, ClockError) as error:  # the next answer may be better
            log.warning("coordinator.silent", error=error.one_line())
            await until_stopped(stop, asyncio.sleep(RETRY_S))
    return False


class _Present:
    """The session of the moment, for the beat, which goes on while there is none: building can take minutes."""

    def __init__(self) -> None:
        self.session: Session | None = None
        self.pause: Pause | None = None
        """Set while there is no session for a reason of this machine's own."""

    def condition(self) -> Condition:
        if self.pause is not None:
            return Condition(PeerState.PAUSED, self.pause.reason[:200], ())
        if self.session is None:
            return Condition(PeerState.STARTING, "building", ())
        return self.session.condition()

    def on_reply(self, reply: BeatReply) -> None:
        if self.session is not None:
            self.session.on_reply(reply)


async def _one_session(
    link: Link,
    settings: PeerSettings,
    registration: Registration,
    *,
    stop: asyncio.Event,
    reports: ReportQueue,
    compute: ComputeThread,
    present: _Present,
) -> tuple[Ending, tuple[StageId, ...]]:
    """Host the span that the coordinator gave us; return why that ended and which stages are wanted next."""
    manifest, session = registration.manifest, registration.session
    stages = registration.welcome.stages
    nvme = settings.nvme_folder(manifest.run_id, link.peer_id)
    engine = await compute.run(lambda: build_span(manifest, stages, settings, nvme=nvme), priority=Priority.CONTROL)
    parts = SpanParts(
        link=link,
        settings=settings,
        manifest=manifest,
        engine=engine,
        compute=compute,
        reports=reports,
        session=session,
        folder=_run_folder(settings, manifest.run_id),
    )
    tenure = Session(parts, link=link, session=session, charters=registration.welcome.charters)
    presence = Presence(
        link,
        name=settings.name,
        software=f"handcar {version('handcar')}",
        admission=lambda: registration.welcome.admission,
        num_stages=manifest.model.num_stages,
        hosted=tenure.hosted,
        load_s=parts.load_s,
        wave=lambda: engine.wave,
        on_found=partial(_take_records, tenure, parts),
    )
    async with asyncio.TaskGroup() as tasks:
        present.session = tenure
        beside = [
            tasks.create_task(presence.keep_published()),
            tasks.create_task(presence.keep_looking()),
            tasks.create_task(show_live(lambda: _line(tenure, settings, manifest.batch.num_rounds))),
        ]
        ending = await tenure.run(stop)
        present.session, present.pause = None, tenure.pause
        for task in beside:
            task.cancel()
    await presence.withdraw()
    return ending, tenure.wanted_stages


def _take_records(tenure: Session, parts: SpanParts, found: Mapping[StageId, Sequence[ReplicaRecord]]) -> None:
    """Pass on what the DHT says: who hosts what, and how many microbatches pass each peer together."""
    tenure.on_found({stage: tuple(record.peer for record in records) for stage, records in found.items()})
    parts.learn_waves({stage: {record.peer: record.wave for record in records} for stage, records in found.items()})


def _run_folder(settings: PeerSettings, run: RunId) -> Path:
    return settings.data_dir / "runs" / run


def _line(tenure: Session, settings: PeerSettings, num_rounds: int) -> Line:
    tally = tenure.tally
    condition = tenure.condition()
    return Line(
        name=settings.name,
        state=tenure.state,
        reason=tenure.reason,
        stages=tenure.stages,
        round=tally.round,
        num_rounds=num_rounds,
        loss=tally.loss,
        target_tokens=tally.target_tokens,
        tokens_per_s=tally.tokens_per_s,
        accepted_s=tally.accepted_s,
        replicas=max((stage.members for stage in condition.stages), default=0),
        drive_bytes=tenure.drive_bytes,
    )


def _watching_line(watcher: Watcher, settings: PeerSettings, num_rounds: int) -> Line:
    condition = watcher.condition()
    return Line(
        name=settings.name,
        state=condition.state,
        reason=condition.reason,
        stages=watcher.stages,
        round=watcher.round,
        num_rounds=num_rounds,
        recomputed=watcher.recomputed,
    )


def _capability(settings: PeerSettings) -> Capability:
    return Capability(
        device=choose_device(settings.device),
        threads=settings.threads,
        memory_bytes=psutil.virtual_memory().available,
        software=f"handcar {version('handcar')} Python {platform.python_version()} {settings.system}",
    )
