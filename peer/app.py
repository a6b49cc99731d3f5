"""`peer join`: connect, register, and live one session after the other until told to stop.

Owns: the process's life - signals, the single compute thread, the data folder's lock, the beat, the live
line. Must not know: how a session works. This is the composition root of a peer.
"""

from __future__ import annotations

import asyncio
import fcntl
import os
import platform
import secrets
import signal
from collections.abc import AsyncIterator, Coroutine, Iterator
from contextlib import asynccontextmanager, contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil
import structlog

from peer.averaging.history import kept_snapshots
from peer.coordination import Admitted, Condition, keep_beating, register, say_goodbye
from peer.engine.build import build_span, choose_device
from peer.link import Link, connected
from peer.pipeline.compute import ComputeThread, Priority
from peer.presence import Presence
from peer.reports import ReportQueue
from peer.session import Ending, Session
from peer.settings import PeerSettings
from peer.span_parts import SpanParts
from peer.ui.live import Line, show_live
from protocol.control import BeatReply, Capability, PeerState
from protocol.errors import StorageError, SwarmError
from protocol.ids import RunId, StageId
from protocol.invite import Invite

log = structlog.get_logger()


async def join_run(invite: Invite, settings: PeerSettings) -> None:
    """Take part in a run until it is over or the volunteer stops it.

    Raises an error of the tree if this machine cannot take part or is not wanted.
    """
    with _data_dir_lock(settings.data_dir):
        async with _interruptible() as stop, connected(invite, settings) as link:
            session = secrets.randbits(62)
            admitted = await register(
                link,
                invite,
                settings,
                capability=_capability(settings),
                session=session,
                kept=kept_snapshots(_run_folder(settings, invite.run)),
            )
            try:
                await _unwrap(_live(link, settings, admitted, session=session, stop=stop))
            finally:
                await say_goodbye(link, reason="stopped")


async def _live(link: Link, settings: PeerSettings, admitted: Admitted, *, session: int, stop: asyncio.Event) -> None:
    """Run sessions until one ends for good."""
    reports = ReportQueue()
    compute = ComputeThread()
    stages = admitted.welcome.stages
    present = _Present()
    try:
        async with asyncio.TaskGroup() as tasks:
            beside = [
                tasks.create_task(
                    keep_beating(link, condition=present.condition, reports=reports, on_reply=present.on_reply)
                ),
                tasks.create_task(link.node.wait_failed()),
            ]
            ending = Ending.REASSIGNED
            while ending is Ending.REASSIGNED and not stop.is_set():
                ending, stages = await _one_session(
                    link,
                    settings,
                    admitted,
                    stages,
                    session=session,
                    stop=stop,
                    reports=reports,
                    compute=compute,
                    present=present,
                )
                log.info("session.ended", ending=ending.value)
            for task in beside:
                task.cancel()
    finally:
        await compute.stop()


class _Present:
    """The session of the moment, for the beat, which goes on while there is none: building can take minutes."""

    def __init__(self) -> None:
        self.session: Session | None = None

    def condition(self) -> Condition:
        if self.session is None:
            return Condition(PeerState.STARTING, "building", ())
        return self.session.condition()

    def on_reply(self, reply: BeatReply) -> None:
        if self.session is not None:
            self.session.on_reply(reply)


async def _one_session(
    link: Link,
    settings: PeerSettings,
    admitted: Admitted,
    stages: tuple[StageId, ...],
    *,
    session: int,
    stop: asyncio.Event,
    reports: ReportQueue,
    compute: ComputeThread,
    present: _Present,
) -> tuple[Ending, tuple[StageId, ...]]:
    """Host one span; return why that ended and which stages are wanted next."""
    manifest = admitted.manifest
    engine = await compute.run(lambda: build_span(manifest, stages, settings), priority=Priority.CONTROL)
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
    tenure = Session(parts, link=link, session=session, charters=admitted.welcome.charters)
    presence = Presence(
        link,
        name=settings.name,
        software=f"handcar {version('handcar')}",
        admission=admitted.welcome.admission,
        num_stages=manifest.model.num_stages,
        hosted=tenure.hosted,
        load_s=parts.load_s,
        on_found=tenure.on_found,
    )
    async with asyncio.TaskGroup() as tasks:
        present.session = tenure
        beside = [
            tasks.create_task(presence.keep_published()),
            tasks.create_task(presence.keep_looking()),
            tasks.create_task(show_live(lambda: _line(tenure, settings, manifest.batch.num_rounds))),
        ]
        ending = await tenure.run(stop)
        present.session = None
        for task in beside:
            task.cancel()
    await presence.withdraw()
    return ending, tenure.wanted_stages


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
    )


def _capability(settings: PeerSettings) -> Capability:
    return Capability(
        device=choose_device(settings.device),
        threads=settings.threads,
        memory_bytes=psutil.virtual_memory().available,
        software=f"handcar {version('handcar')} Python {platform.python_version()} {settings.system}",
    )


async def _unwrap(work: Coroutine[Any, Any, None]) -> None:
    """Await work made of task groups; raise the first error of our tree out of their wrapping."""
    try:
        await work
    except BaseExceptionGroup as group:
        found = _first_known(group)
        if found is None:
            raise
        raise found from group


def _first_known(group: BaseExceptionGroup[BaseException]) -> SwarmError | None:
    for error in group.exceptions:
        found = _first_known(error) if isinstance(error, BaseExceptionGroup) else error
        if isinstance(found, SwarmError):
            return found
    return None


@contextmanager
def _data_dir_lock(folder: Path) -> Iterator[None]:
    """Hold the data folder for this process: two peers with one identity would fight for it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder / "lock", os.O_RDWR | os.O_CREAT, 0o600)
    except OSError as error:
        raise StorageError(
            f"cannot write to {folder}: {error.strerror}.", hint="Choose another folder with --data-dir."
        ) from None
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise StorageError(
                f"another peer is running in {folder}.", hint="Stop it, or give this one its own --data-dir."
            ) from None
        yield
    finally:
        os.close(descriptor)


@asynccontextmanager
async def _interruptible() -> AsyncIterator[asyncio.Event]:
    """Turn the first SIGINT or SIGTERM into an event; the second one ends the process at once."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()

    def on_signal() -> None:
        if stop.is_set():
            os._exit(130)
        stop.set()

    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, on_signal)
    try:
        yield stop
    finally:
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.remove_signal_handler(number)
