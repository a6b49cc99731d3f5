"""The coordinator on a real network: real p2pd, DHT, streams, SQLite; the peer is a client in this process.

Oracles: what was put into the run directory and into the fake peer's snapshots.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from coordinator.app import run_coordinator
from coordinator.cli import coordinator
from coordinator.monitor.cli import read_status, swarm
from coordinator.rundir import RunDir
from coordinator.settings import CoordinatorSettings
from coordinator.status import FINISHED
from coordinator.store import peers
from coordinator.store.database import DATABASE_FILE, Database
from protocol.access import Door
from protocol.control import Beat, BeatReply, Capability, Leave, Register, Snapshot, StateFile, Welcome
from protocol.errors import (
    FinishedError,
    IncompatibleError,
    InviteError,
    PortError,
    RefusedError,
    StorageError,
    StrangerError,
    TransientError,
    UnreachableError,
)
from protocol.ids import Lineage, PeerId, RoundId, StageId, Version, digest
from protocol.invite import Invite
from protocol.manifest import MANIFEST_CONTEXT, Manifest
from protocol.rounds.messages import CHARTER_CONTEXT, Charter
from protocol.signing import unseal
from protocol.transport.asking import ask_status
from protocol.transport.blobs import Blobs
from protocol.transport.calls import Calls
from protocol.transport.node import Node
from protocol.transport.passes import Passes
from protocol.transport.streams import Streams
from protocol.wire import PROTOCOL_VERSION
from tests.coordinator.office import beat, state, work
from tests.coordinator.runs import make_run

LOOPBACK = ("/ip4/127.0.0.1/tcp/0",)
pytestmark = pytest.mark.slow


@asynccontextmanager
async def serving(directory: Path, **settings: object) -> AsyncIterator[Invite]:
    """Run a coordinator as a task of this loop; leave by cancelling it."""
    loop = asyncio.get_running_loop()
    invited: asyncio.Future[Invite] = loop.create_future()
    options = CoordinatorSettings(**({"host_maddrs": LOOPBACK, "start_peers": 1} | settings))  # type: ignore[arg-type]
    task = asyncio.create_task(run_coordinator(directory, options, on_invite=invited.set_result))
    waiting: set[asyncio.Future[Any]] = {task, invited}
    await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
    try:
        if task.done():
            task.result()
        yield await invited
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


@dataclass(slots=True)
class Client:
    """A peer without training: it registers, beats and serves blobs."""

    node: Node
    calls: Calls
    blobs: Blobs
    passes: Passes
    coordinator: PeerId
    served: dict[str, bytes]

    async def register(self, run: Manifest, **changes: object) -> Welcome:
        fields: dict[str, object] = {
            "protocol": PROTOCOL_VERSION,
            "run": run.run_id,
            "session": 1,
            "name": "client",
            "token": None,
            "capability": Capability(device="cpu", threads=1, memory_bytes=1, software="test"),
            "clock_s": self.node.dht_time(),
            "addresses": (),
        }
        request = Register(**(fields | changes))  # type: ignore[arg-type]
        welcome = await self.calls.call(self.coordinator, request, Welcome, introduced=False)
        self.passes.own = welcome.admission
        return welcome

    async def beat(self, message: Beat) -> BeatReply:
        return await self.calls.call(self.coordinator, message, BeatReply)

    async def beat_until(self, message: Beat, done: Callable[[BeatReply], bool]) -> BeatReply:
        for _ in range(100):
            reply = await self.beat(message)
            if done(reply):
                return reply
            await asyncio.sleep(0.1)
        raise AssertionError("the coordinator never said what was waited for")

    async def beat_until_reached(self, message: Beat) -> BeatReply:
        for _ in range(100):
            try:
                return await self.beat(message)
            except TransientError:
                await asyncio.sleep(0.2)
        raise AssertionError("the coordinator was never found again")


@asynccontextmanager
async def client(folder: Path, invite: Invite) -> AsyncIterator[Client]:
    """Go on the network as a peer would."""
    node = await Node.start(
        folder / "identity.key",
        run=invite.run,
        coordinator=invite.coordinator,
        initial_peers=invite.addresses,
        host_maddrs=LOOPBACK,
    )
    door = Door(invite.run, invite.coordinator)
    streams = Streams(node.p2p, door=door)
    served: dict[str, bytes] = {}
    try:
        blobs = Blobs(streams, run=invite.run)
        await blobs.serve(lambda caller, name: served.get(name))
        calls = Calls(streams, run=invite.run, coordinator=invite.coordinator)
        passes = Passes(calls, streams, door, me=node.peer_id)
        yield Client(node, calls, blobs, passes, invite.coordinator, served)
    finally:
        await streams.stop()
        await node.stop()


def offer(served: dict[str, bytes], stage: int, round_id: int) -> Snapshot:
    files = []
    for part in ("weights", "optimizer"):
        data = f"{part} of stage {stage} at {round_id}".encode() * 100
        served[f"state/{stage}/{round_id}/{part}"] = data
        files.append(StateFile(part=part, num_bytes=len(data), digest=digest(data)))
    return Snapshot(
        stage=StageId(stage),
        round=RoundId(round_id),
        version=Version(round_id),
        lineage=Lineage(bytes(32)),
        files=tuple(files),
    )


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    return make_run(tmp_path_factory.mktemp("run"), stages=1)


async def test_a_peer_joins_gets_tokens_reports_and_its_snapshot_becomes_a_checkpoint(
    run: RunDir, tmp_path: Path
) -> None:
    async with serving(run.path) as invite, client(tmp_path, invite) as peer:
        welcome = await peer.register(run.manifest)
        assert unseal(welcome.manifest, MANIFEST_CONTEXT, Manifest, signer=invite.coordinator) == run.manifest
        assert (welcome.stages, welcome.charters) == ((0,), ())

        spec = run.manifest.data.heldout
        chunk = await peer.blobs.fetch(invite.coordinator, f"tokens/{spec.name}/0", max_bytes=spec.chunk_bytes)
        assert chunk == (run.path / "tokens" / spec.name).read_bytes()[: spec.chunk_bytes]

        reply = await peer.beat_until(beat(state(0)), lambda reply: bool(reply.charters))
        charter = unseal(reply.charters[0], CHARTER_CONTEXT, Charter, signer=invite.coordinator)
        assert [(seat.peer, seat.session) for seat in charter.seats] == [(peer.node.peer_id, 1)]

        snapshot = offer(peer.served, 0, 2)
        at = state(0, round=2, version=2, members=1, snapshot=snapshot)
        reply = await peer.beat(beat(at, reports=((3, work(0)),), addresses=await peer.node.addresses()))
        assert reply.acknowledged == 3
        record = await until_there(peer, "checkpoint/newest/checkpoint.json")
        assert json.loads(record)["round"] == 2
        weights = await peer.blobs.fetch(invite.coordinator, "checkpoint/2/stage-0.weights.safetensors", max_bytes=9999)
        assert weights == peer.served["state/0/2/weights"]

        document = await ask_status(invite)
        assert document["ledger"]["hops"] == 4
        assert document["stages"][0]["replicas"][0]["name"] == "client"
        local = await asyncio.to_thread(read_status, str(run.path))
        assert (local["run"], local["ledger"]) == (document["run"], document["ledger"])
        await peer.calls.tell(invite.coordinator, Leave(reason="test"))


async def until_there(peer: Client, name: str) -> bytes:
    for _ in range(100):
        try:
            return await peer.blobs.fetch(peer.coordinator, name, max_bytes=1 << 20)
        except UnreachableError:
            await asyncio.sleep(0.1)
    raise AssertionError(f"{name} never appeared")


async def test_a_restart_is_found_at_the_same_address_and_knows_its_peers(run: RunDir, tmp_path: Path) -> None:
    """Oracle: the peer does nothing but go on calling the peer id that it knows."""
    async with contextlib.AsyncExitStack() as stack:
        async with serving(run.path) as first:
            peer = await stack.enter_async_context(client(tmp_path, first))
            await peer.register(run.manifest)
            await peer.beat(beat(state(0), reports=((8, work(1)),)))
        with pytest.raises(UnreachableError):
            await peer.beat(beat(state(0)))
        async with serving(run.path, host_maddrs=()) as second:
            assert second == first
            reply = await peer.beat_until_reached(beat(state(0)))
            assert (reply.acknowledged, reply.stages) == (8, (0,))


async def test_refusals_reach_the_peer_as_what_they_are(run: RunDir, tmp_path: Path) -> None:
    async with serving(run.path, access="invite") as invite, client(tmp_path, invite) as peer:
        assert invite.token is None
        with pytest.raises(IncompatibleError, match=f"protocol {PROTOCOL_VERSION + 1}"):
            await peer.register(run.manifest, protocol=PROTOCOL_VERSION + 1)
        with pytest.raises(RefusedError, match="token"):
            await peer.register(run.manifest)
        with pytest.raises(StrangerError):
            await peer.beat(beat())
        made = await asyncio.to_thread(CliRunner().invoke, coordinator, ["invite", str(run.path)])
        token = Invite.from_text(made.stdout).token
        assert token is not None
        await peer.register(run.manifest, token=token)
        await peer.calls.tell(invite.coordinator, Leave(reason="test"))
        with pytest.raises(RefusedError, match="does not know you"):
            await peer.beat(beat())


async def test_one_directory_has_one_coordinator(run: RunDir) -> None:
    async with serving(run.path):
        with pytest.raises(StorageError, match="another coordinator"):
            async with serving(run.path):
                raise AssertionError("unreachable")


async def test_a_port_in_use_is_one_clear_error(run: RunDir) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen(1)
        address = f"/ip4/127.0.0.1/tcp/{taken.getsockname()[1]}"
        with pytest.raises(PortError, match="cannot listen"):
            async with serving(run.path, host_maddrs=(address,)):
                raise AssertionError("unreachable")


async def test_a_wrong_fingerprint_reaches_nobody(run: RunDir) -> None:
    """Oracle: libp2p proves that a peer holds its id's key; the right address with another id leads nowhere."""
    async with serving(run.path) as invite:
        other = "12D3KooWRdFFg3yTbTsDq5Z1yCvCWbqznEFro9jeVivo7rkayJ4D"
        addresses = tuple(address.replace(invite.coordinator, other) for address in invite.addresses)
        forged = invite.model_copy(update={"coordinator": other, "addresses": addresses})
        with pytest.raises(InviteError, match="another key"):
            await ask_status(forged)


def test_the_command_prints_its_invite_survives_kill_9_and_ends_cleanly(tmp_path: Path) -> None:
    """Oracle: the invite is all that stands on stdout, and after a kill it is the same; SIGTERM exits with 0."""
    run = make_run(tmp_path)
    command = [sys.executable, "-m", "coordinator.cli", "run", str(run.path)]
    invites = []
    for arguments, number in ((["--host-maddr", *LOOPBACK], signal.SIGKILL), ([], signal.SIGTERM)):
        process = subprocess.Popen([*command, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        assert process.stdout is not None
        invites.append(process.stdout.readline())
        process.send_signal(number)
        rest, errors = process.communicate(timeout=30)
        assert (process.returncode, rest) == (0 if number is signal.SIGTERM else -number, ""), errors
        assert "Traceback" not in errors
    assert invites[0] == invites[1]
    assert Invite.from_text(invites[0]).coordinator == run.manifest.coordinator


async def test_a_coordinator_that_is_not_there_is_one_clear_error(run: RunDir) -> None:
    async with serving(run.path) as invite:
        pass
    done = await asyncio.to_thread(CliRunner().invoke, swarm, ["status", invite.to_text()])
    assert (done.exit_code, done.stdout) == (6, "")
    assert done.stderr.startswith("swarm status: E-NET")
    assert len(done.stderr.splitlines()) == 1


async def test_a_finished_run_is_not_served_again(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    database = await Database.open(run.path / DATABASE_FILE)
    await database.run(peers.put_setting, FINISHED, "1")
    await database.close()
    with pytest.raises(FinishedError, match="has ended"):
        await run_coordinator(run.path, CoordinatorSettings(), on_invite=lambda invite: None)
