"""p2pd's life and death, and starts that fail (`protocol/transport/daemon.py`, `node.py`); every node is real."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from hivemind.p2p import P2PDaemonError, PeerID
from hivemind.proto import dht_pb2

from protocol.errors import (
    ClockError,
    ConfigError,
    InviteError,
    LocalFault,
    PortError,
    StorageError,
    TransientError,
    UnreachableError,
)
from protocol.transport import daemon, identity
from protocol.transport.daemon import Daemon, wait_ports_free
from tests.protocol.transport.network import COORDINATOR, ROOT, STRANGER, StartNode, found_by, record_of

pytestmark = pytest.mark.slow


# --- life and death -----------------------------------------------------------------------------------------------


async def test_a_dead_p2pd_is_noticed_within_a_second_and_nothing_hangs(start: StartNode) -> None:
    """Oracle: wait_failed raises, the pending call fails, new calls fail at once, stop returns."""
    victim = await start("victim")
    other = await start("other", peers=await victim.addresses())
    forever = asyncio.Event()

    async def never_answer(request: bytes, remote: object) -> bytes:
        await forever.wait()
        return b""

    await other.p2p._client.add_unary_handler("test.slow", never_answer)
    pending = asyncio.create_task(
        victim.p2p._client.call_unary_handler(PeerID.from_base58(other.peer_id), "test.slow", b"")
    )
    failed = asyncio.create_task(victim.wait_failed())
    await asyncio.sleep(0.2)
    assert not pending.done()
    os.kill(victim.p2p.pid, signal.SIGKILL)
    async with asyncio.timeout(1):
        with pytest.raises(TransientError, match="p2pd"):
            await failed
        with pytest.raises(P2PDaemonError):
            await pending
        with pytest.raises(UnreachableError):
            await victim.clock_offset(other.peer_id)
        with pytest.raises(UnreachableError):
            await victim.connect((await other.addresses())[0])
        assert await victim.addresses() == ()
    async with asyncio.timeout(8):
        await victim.stop()
    forever.set()


async def test_stopping_is_quick_and_leaves_neither_process_nor_sockets(start: StartNode) -> None:
    """Oracle: the process table and the two socket paths; wait_failed returns instead of raising."""
    node = await start("node")
    watch = asyncio.create_task(node.wait_failed())
    pid = node.p2p.pid
    sockets = [node.p2p._daemon_listen_maddr["unix"], node.p2p._client_listen_maddr["unix"]]
    await asyncio.wait_for(node.stop(), 5)
    await asyncio.wait_for(watch, 1)
    assert not psutil.pid_exists(pid)
    assert not any(Path(path).exists() for path in sockets)
    await node.stop()  # a second time is harmless
    with pytest.raises(LocalFault):
        node.dht  # noqa: B018


async def test_a_frozen_p2pd_does_not_keep_us_from_stopping(start: StartNode) -> None:
    """Oracle: with p2pd stopped by SIGSTOP, stop() still ends it, within its two timeouts."""
    node = await start("node")
    pid = node.p2p.pid
    os.kill(pid, signal.SIGSTOP)
    await asyncio.wait_for(node.stop(), 10)
    assert not psutil.pid_exists(pid)


async def test_an_answer_to_a_call_that_was_given_up_does_not_end_the_reader(start: StartNode) -> None:
    """Oracle: hivemind's reader meets a cancelled future, as when answer and deadline fall into one turn of the loop;
    with a plain dict in the place of our table it ends with InvalidStateError and no later call gets an answer."""
    server = await start("server")
    client = await start("client", peers=await server.addresses())
    calls, answer_now = client.p2p._client.control._pending_calls, asyncio.Event()

    async def answer_later(request: bytes, remote: object) -> bytes:
        await answer_now.wait()
        return b"late"

    await server.p2p._client.add_unary_handler("test.late", answer_later)
    before = set(calls)
    call = asyncio.create_task(
        client.p2p._client.call_unary_handler(PeerID.from_base58(server.peer_id), "test.late", b"")
    )
    while not (started := set(calls) - before):  # noqa: ASYNC110 - hivemind has no event for it
        await asyncio.sleep(0)
    (call_id,) = started
    given_up = calls[call_id]
    given_up.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    calls[call_id] = given_up  # the caller has not come to remove it yet
    answer_now.set()
    for _ in range(3):
        await client.clock_offset(server.peer_id)
    assert not client.p2p._client.control._read_task.done()


async def test_an_answer_that_is_too_large_becomes_an_error(start: StartNode) -> None:
    """Oracle: hivemind as shipped leaves such a caller waiting for ever."""
    server = await start("server")
    client = await start("client", peers=await server.addresses())

    async def huge(request: dht_pb2.PingRequest, context: object) -> dht_pb2.FindResponse:
        return dht_pb2.FindResponse(results=[dht_pb2.FindResult(value=bytes(5 * 2**20))])

    await server.p2p.add_protobuf_handler("test.huge", huge, dht_pb2.PingRequest)
    async with asyncio.timeout(5):
        with pytest.raises(Exception, match="bytes"):
            await client.p2p.call_protobuf_handler(
                PeerID.from_base58(server.peer_id), "test.huge", dht_pb2.PingRequest(), dht_pb2.FindResponse
            )


CHILD = """
import asyncio, json, sys
from pathlib import Path
import uvloop
from protocol.console import set_up_logging
from protocol.transport.node import Node

async def main():
    set_up_logging(level="warning")
    node = await Node.start(Path(sys.argv[1]), run="0" * 32, coordinator=sys.argv[2], host_maddrs=(sys.argv[3],))
    print(json.dumps({"pid": node.p2p.pid, "addresses": await node.addresses()}), flush=True)
    await asyncio.sleep(600)

try:
    uvloop.run(main())
except KeyboardInterrupt:
    sys.exit(130)
"""


def start_child(tmp_path: Path, listen: str) -> tuple[subprocess.Popen[str], dict[str, Any]]:
    command = [sys.executable, "-c", CHILD, str(tmp_path / "child.key"), COORDINATOR.peer_id, listen]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True, cwd=ROOT)
    assert child.stdout is not None
    line = child.stdout.readline()
    child.stdout.close()
    return child, json.loads(line)


def wait_gone(pid: int, limit_s: float) -> float:
    """Return after how many seconds a process had ended (a zombie that nobody reaps has)."""
    started_s = time.monotonic()
    while time.monotonic() - started_s < limit_s:
        if not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
            return time.monotonic() - started_s
        time.sleep(0.01)
    raise AssertionError(f"process {pid} is still there after {limit_s} s")


async def test_killing_us_ends_p2pd_and_frees_the_port_for_a_successor(tmp_path: Path, start: StartNode) -> None:
    """Oracle: SIGKILL of the parent; p2pd is gone within seconds, and a new node gets the same identity and address."""
    child, said = start_child(tmp_path, "/ip4/127.0.0.1/tcp/0")
    listen = said["addresses"][0].split("/p2p/")[0]
    child.kill()
    child.wait(10)
    assert wait_gone(said["pid"], 5) < 3
    successor = await start("child", host_maddrs=(listen,))
    assert await successor.addresses() == tuple(said["addresses"])


def test_ctrl_c_in_a_terminal_does_not_reach_p2pd(tmp_path: Path) -> None:
    """Oracle: SIGINT to the whole process group ends us, and p2pd only because we have ended."""
    child, said = start_child(tmp_path, "/ip4/127.0.0.1/tcp/0")
    assert os.getpgid(said["pid"]) != os.getpgid(child.pid)
    os.killpg(child.pid, signal.SIGINT)
    assert child.wait(10) == 130
    wait_gone(said["pid"], 5)


# --- bad starts ---------------------------------------------------------------------------------------------------


async def test_a_port_in_use_is_a_port_error_whoever_uses_it(start: StartNode) -> None:
    """Oracle: E-PORT both for another p2pd (which would share the port without a word) and for a plain socket."""
    first = await start("first")
    taken = (await first.addresses())[0].split("/p2p/")[0]
    with pytest.raises(PortError):
        await start("second", host_maddrs=(taken,))
    with socket.socket() as plain:
        plain.bind(("127.0.0.1", 0))
        plain.listen()
        with pytest.raises(PortError):
            await wait_ports_free((f"/ip4/127.0.0.1/tcp/{plain.getsockname()[1]}",), wait_s=0)
    with pytest.raises(PortError):
        await wait_ports_free(("/ip4/203.0.113.7/tcp/4001",))


async def test_p2pds_own_listen_error_is_a_port_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: the race in which somebody takes the port after we looked."""

    async def looks_free(host_maddrs: object, **_: object) -> None:
        return None

    monkeypatch.setattr("protocol.transport.daemon.wait_ports_free", looks_free)
    identity.create(tmp_path / "key")
    with socket.socket() as plain:
        plain.bind(("127.0.0.1", 0))
        plain.listen()
        with pytest.raises(PortError):
            await Daemon.launch(tmp_path / "key", host_maddrs=(f"/ip4/127.0.0.1/tcp/{plain.getsockname()[1]}",))
    failed = daemon._newest.get()
    assert failed is not None
    assert failed._child.returncode is not None
    assert not Path(failed._daemon_listen_maddr["unix"]).exists()


async def test_nobody_at_the_initial_address_is_unreachable(start: StartNode) -> None:
    """Oracle: E-NET-01, exit 6, within seconds; one living address among dead ones is enough."""
    dead = f"/ip4/127.0.0.1/tcp/9/p2p/{STRANGER.peer_id}"
    with pytest.raises(UnreachableError) as caught:
        await asyncio.wait_for(start("lonely", peers=(dead,)), 10)
    assert caught.value.exit_code == 6
    first = await start("first")
    second = await start("second", peers=(dead, *await first.addresses()))
    assert await second.publish(record_of(second))
    assert await found_by(first) == {second.peer_id}


async def test_the_wrong_key_at_the_right_address_is_named_as_such(start: StartNode) -> None:
    """Oracle: libp2p's handshake; an impostor at the coordinator's address is nobody to us, and no mere silence."""
    first = await start("first")
    way = (await first.addresses())[0].split("/p2p/")[0]
    with pytest.raises(InviteError, match="another key"):
        await start("second", peers=(f"{way}/p2p/{STRANGER.peer_id}",))


@pytest.mark.parametrize("skew_s", [-10.0, 10.0])
async def test_a_clock_that_is_off_is_a_clock_error(
    start: StartNode, monkeypatch: pytest.MonkeyPatch, skew_s: float
) -> None:
    """Oracle: E-CLOCK, exit 5, with the size and the direction; hivemind's own check would only say that it failed."""
    first = await start("first")
    monkeypatch.setattr("hivemind.dht.protocol.get_dht_time", lambda: time.time() + skew_s)
    with pytest.raises(ClockError) as caught:
        await start("second", peers=await first.addresses())
    assert caught.value.exit_code == 5
    assert f"10.0 s {'behind' if skew_s > 0 else 'ahead of'}" in str(caught.value)


async def test_bad_arguments_start_nothing(start: StartNode, tmp_path: Path) -> None:
    """Oracle: an error before any child process exists."""
    before = {child.pid for child in psutil.Process().children()}
    with pytest.raises(ConfigError):
        await start("node", peers=("/ip4/127.0.0.1/tcp/1",))  # no peer id
    with pytest.raises(ConfigError):
        await start("node", host_maddrs=("nonsense",))
    with pytest.raises(ConfigError):
        await start("node", announce_maddrs=("/ip4/203.0.113.5/tcp/0",))
    (tmp_path / "node.key").chmod(0o644)
    with pytest.raises(StorageError):
        await start("node")
    assert {child.pid for child in psutil.Process().children()} == before


async def test_a_failed_start_leaves_no_process(start: StartNode, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: p2pd is up when the clock check fails, and gone when the error arrives."""
    first = await start("first")
    before = {child.pid for child in psutil.Process().children()}
    monkeypatch.setattr("hivemind.dht.protocol.get_dht_time", lambda: time.time() + 60)
    with pytest.raises(ClockError):
        await start("second", peers=await first.addresses())
    assert {child.pid for child in psutil.Process().children()} == before
