"""`coordinator run`: the composition root. Who gets which object, what runs, and how it ends.

Owns: the services' order of birth and death, the tick, and deciding that the run is over. Must not know: how
any service works. Everything here may be killed at any moment: what a peer was told is in SQLite before.

    node (p2pd, DHT)  <- calls: Register, Beat, Leave, StateRequest, StatusRequest;  blobs: tokens, checkpoints
    registry -> ledger, placement        every beat
    charters -> founding                 every tick
    reunion -> forks                     every tick
    credits -> settlement                every tick
    audits -> court, policy              every tick
    collector -> offers, fetching        beside
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import structlog

from coordinator import listening, status
from coordinator.access import AccessOffice
from coordinator.alarm import Alarm
from coordinator.audit.office import AuditOffice
from coordinator.bans import Bans
from coordinator.charters import CharterOffice
from coordinator.checkpointfiles import Checkpoint
from coordinator.checkpoints import Collector, versions
from coordinator.clock import Clock
from coordinator.credits import Credits
from coordinator.finish import Finish
from coordinator.http import serving_status
from coordinator.journal import Journal
from coordinator.ledger import Ledger
from coordinator.monitor.local import SharedStatus, status_of_run
from coordinator.registry import Registry
from coordinator.reunion import Reunion
from coordinator.rollback import Rollback
from coordinator.rundir import KEY, RunDir
from coordinator.serving import Shelf
from coordinator.settings import CoordinatorSettings
from coordinator.store import peers
from coordinator.store.database import DATABASE_FILE, Database
from protocol.access import Door
from protocol.control import Beat, Leave, Register, Snapshot, StatusAnswer, StatusRequest
from protocol.errors import FinishedError, StorageError
from protocol.history import StateAnswer, StateRequest
from protocol.ids import PeerId, StageId
from protocol.invite import Invite
from protocol.process import folder_lock, interruptible, unwrapped
from protocol.transport.blobs import Blobs
from protocol.transport.calls import Calls
from protocol.transport.node import Node
from protocol.transport.passes import Passes
from protocol.transport.streams import Streams

log = structlog.get_logger()

LOCK = "coordinator.lock"
TOKENS_CHECKED = "tokens_checked"  # a key of the settings table
TOKENS_NOTE = "tokens"


@dataclass(slots=True, kw_only=True)
class Services:
    """Everything of a coordinator that needs no network."""

    run: RunDir
    settings: CoordinatorSettings
    clock: Clock
    database: Database
    journal: Journal
    ledger: Ledger
    access: AccessOffice
    registry: Registry
    charters: CharterOffice
    reunion: Reunion
    rollback: Rollback
    alarm: Alarm
    bans: Bans
    credits: Credits
    audits: AuditOffice
    finish: Finish
    shared_status: SharedStatus
    _status_turn: asyncio.Lock = field(default_factory=asyncio.Lock, init=False)

    async def load(self) -> None:
        """Take over what the database knows, in the order in which one builds on the other."""
        await self.charters.load()
        await self.ledger.load()
        await self.access.load()
        await self.registry.load()
        await self.bans.load()
        await self.audits.load()

    async def tick(self, newest: Checkpoint | None) -> None:
        """Do what is due. Once per `tick_s`."""
        await self.bans.tick()
        await self.registry.sweep()
        if not self.finish.is_reached:
            await self.alarm.tick()
            await self.rollback.tick()
            await self.charters.tick()
            await self.reunion.tick()
        await self.credits.tick()
        await self.audits.tick()
        await self.finish.tick(newest)
        await self._save_notes()

    async def status(self) -> StatusAnswer:
        """Answer a `StatusRequest`. Anybody may ask, and often: it costs one thread, and nothing where reports wait."""
        async with self._status_turn:
            return status.answer(await asyncio.to_thread(self.shared_status))

    async def _save_notes(self) -> None:
        text = json.dumps(self.journal.notes, sort_keys=True)
        try:
            if text != await self.database.run(peers.get_setting, status.NOTES):
                await self.database.run(peers.put_setting, status.NOTES, text)
        except StorageError as error:  # then they are shown to nobody but the log
            log.warning("notes.unsaved", error=error.one_line())


def make_services(run: RunDir, settings: CoordinatorSettings, *, database: Database, clock: Clock) -> Services:
    """Build the services and tie them together."""
    manifest = run.manifest
    journal = Journal(database, clock)
    ledger = Ledger(manifest, database=database, clock=clock)
    access = AccessOffice(settings, database=database, clock=clock)
    registry = Registry(
        run.signed,
        manifest,
        key=run.key,
        settings=settings,
        access=access,
        database=database,
        ledger=ledger,
        journal=journal,
        clock=clock,
    )
    charters = CharterOffice(
        manifest,
        key=run.key,
        settings=settings,
        registry=registry,
        ledger=ledger,
        database=database,
        journal=journal,
        clock=clock,
    )
    reunion = Reunion(manifest, settings=settings, registry=registry, ledger=ledger, journal=journal, clock=clock)
    rollback = Rollback(run, ledger=ledger, database=database, journal=journal)
    bans = Bans(manifest.run_id, key=run.key, registry=registry, database=database, journal=journal, clock=clock)
    credits = Credits(manifest, settings=settings, database=database, journal=journal, clock=clock)
    audits = AuditOffice(manifest, registry=registry, database=database, journal=journal, clock=clock)
    ledger.on_receipts, ledger.on_commit, ledger.on_audit = audits.hear_receipts, audits.hear_commit, audits.hear
    rollback.on_rollback = audits.forget
    finish = Finish(manifest, registry=registry, database=database, journal=journal, clock=clock)
    return Services(
        run=run,
        settings=settings,
        clock=clock,
        database=database,
        journal=journal,
        ledger=ledger,
        access=access,
        registry=registry,
        charters=charters,
        reunion=reunion,
        rollback=rollback,
        alarm=Alarm(run, settings=settings, database=database, journal=journal, clock=clock),
        bans=bans,
        credits=credits,
        audits=audits,
        finish=finish,
        shared_status=SharedStatus(lambda: status_of_run(run)),
    )


async def run_coordinator(
    directory: Path,
    settings: CoordinatorSettings,
    *,
    on_invite: Callable[[Invite], None],
    until_finished: bool = False,
    clock: Clock | None = None,
) -> None:
    """Serve the run in `directory` until SIGINT or SIGTERM, or with `until_finished` until it is over.

    Raises an error of the tree if that is not possible: no run there, finished, port in use, disk, ...
    """
    run = RunDir.open(directory)
    with folder_lock(directory / LOCK, owner="coordinator", otherwise="Stop it first."):
        async with interruptible() as stop:
            database = await Database.open(directory / DATABASE_FILE)
            try:
                if await database.run(peers.get_setting, status.FINISHED) is not None:
                    hint = f"Export it: coordinator export {directory} --to HF_DIR"
                    raise FinishedError(f"the run in {directory} has ended.", hint=hint)
                await _check_tokens(run, database)
                services = make_services(run, settings, database=database, clock=clock or Clock())
                await services.load()
                with _serving_status(services):
                    await unwrapped(_serve(services, stop, on_invite=on_invite, until_finished=until_finished))
            finally:
                await database.close()


async def _check_tokens(run: RunDir, database: Database) -> None:
    """Raise `CorpusError` if a token file is damaged. Hashes them only if they were written to since the last time."""
    stamp = run.tokens_stamp()
    if await database.run(peers.get_setting, TOKENS_CHECKED) != stamp:
        await asyncio.to_thread(run.verify_tokens)
        await database.run(peers.put_setting, TOKENS_CHECKED, stamp)


@contextmanager
def _serving_status(services: Services) -> Iterator[None]:
    """Show the status over HTTP while the block runs, if the organiser wants that."""
    address = services.settings.http
    if address is None:
        yield
        return
    with serving_status(address, services.shared_status) as port:
        log.info("http.serving", port=port)
        yield


async def _serve(
    services: Services, stop: asyncio.Event, *, on_invite: Callable[[Invite], None], until_finished: bool
) -> None:
    """Go on the network, and stay there until it is time to go."""
    node, invite = await _start_node(services)
    door = Door(services.run.manifest.run_id, services.run.manifest.coordinator, refusal=services.bans.refusal)
    door.on_banned.append(node.gate.ban)
    streams = Streams(node.p2p, door=door)
    services.bans.on_list = door.learn
    if services.bans.newest is not None:
        door.learn(services.bans.newest)
    try:
        blobs = Blobs(streams, run=services.run.manifest.run_id)
        calls = Calls(streams, run=services.run.manifest.run_id)
        Passes(calls, streams, door, me=node.peer_id).serve()
        collector = _make_collector(services, blobs, calls)
        await _answer_calls(services, calls)
        services.rollback.on_checkpoint = collector.take
        await collector.load()  # hashes gigabytes; until then there is no checkpoint to hand out, not even "none"
        shelf = Shelf(
            services.run,
            newest=lambda: collector.newest,
            on_damage=lambda text: services.journal.note(TOKENS_NOTE, text),
        )
        await blobs.serve(shelf.resolve)
        on_invite(invite)
        async with asyncio.TaskGroup() as tasks:
            beside = [
                tasks.create_task(_keep_ticking(services, collector), name="tick"),
                tasks.create_task(collector.run(), name="collector"),
                tasks.create_task(node.wait_failed(), name="node"),
            ]
            if until_finished:
                beside.append(tasks.create_task(_stop_when_over(services.finish, stop), name="finish"))
            try:
                await stop.wait()
            finally:
                for task in beside:
                    task.cancel()
    finally:
        await streams.stop()
        await asyncio.shield(node.stop())
        await services.registry.save()
        await services.credits.settle_rest()
        log.info("coordinator.stopped")


async def _start_node(services: Services) -> tuple[Node, Invite]:
    run, settings, database = services.run, services.settings, services.database
    kept = await database.run(peers.get_setting, listening.LISTEN)
    listen = listening.where_to_listen(kept, settings)
    node = await Node.start(
        run.path / KEY,
        run=run.manifest.run_id,
        coordinator=run.manifest.coordinator,
        host_maddrs=listen,
        announce_maddrs=settings.announce_maddrs,
    )
    try:
        addresses = await node.addresses()
        invite = listening.make_invite(run.manifest, addresses)
        await database.run(listening.keep, listen=listening.with_port(listen, addresses), invite=invite)
    except BaseException:
        await node.stop()
        raise
    return node, invite


async def _answer_calls(services: Services, calls: Calls) -> None:
    async def on_status(caller: PeerId, request: StatusRequest) -> StatusAnswer:
        return await services.status()

    calls.on(Register, services.registry.register, open_to_all=True)
    calls.on(Beat, services.registry.beat)
    calls.on(Leave, services.registry.leave)
    calls.on(StateRequest, services.charters.answer_state)
    calls.on(StatusRequest, on_status, open_to_all=True)
    await calls.serve()


def _make_collector(services: Services, blobs: Blobs, calls: Calls) -> Collector:
    async def fetch_range(peer: PeerId, name: str, offset: int, length: int) -> tuple[bytes, int]:
        return await blobs.fetch_range(peer, name, offset=offset, length=length)

    async def ask_snapshots(peer: PeerId, stage: StageId) -> tuple[Snapshot, ...]:
        return (await calls.call(peer, StateRequest(stage=stage), StateAnswer)).snapshots

    def on_checkpoint(checkpoint: Checkpoint) -> None:
        services.charters.floor, services.charters.floor_round = versions(checkpoint), checkpoint.round

    return Collector(
        services.run,
        registry=services.registry,
        ledger=services.ledger,
        database=services.database,
        journal=services.journal,
        clock=services.clock,
        fetch_range=fetch_range,
        ask_snapshots=ask_snapshots,
        on_checkpoint=on_checkpoint,
    )


async def _keep_ticking(services: Services, collector: Collector) -> None:
    while True:
        await services.tick(collector.newest)
        await asyncio.sleep(services.settings.tick_s)


async def _stop_when_over(finish: Finish, stop: asyncio.Event) -> None:
    await finish.wait_over()
    stop.set()
