"""What floods do to a coordinator, to a peer, and to who honestly asks the coordinator meanwhile.

Two processes at a time flood a victim while a member asks the coordinator something twenty times a second and a small
swarm trains. The worst flood counts in each row:

* `flood_p99`: what the member waits; `flood_slow_p99` by those who write or read slowly alone
* `flood_rss`: the most memory of the coordinator and its p2pd; `flood_body_rss`: how much more than before is taken by
  the coordinator or a peer while a GiB is sent to it
* `flood_disk`: what the run's folder and the log grow by in a minute, beyond what they do in calm
* `flood_fds`: files and sockets of the coordinator, without its p2pd
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from coordinator.store import peers
from coordinator.store.database import DATABASE_FILE
from peer.pipeline.caller import hop_protocol
from protocol.access import Door
from protocol.errors import SwarmError
from protocol.history import StateAnswer, StateRequest
from protocol.ids import StageId
from protocol.invite import Invite
from protocol.records import admit
from protocol.transport.blobs import blob_protocol
from protocol.transport.calls import Calls, call_protocol
from protocol.transport.node import Node
from protocol.transport.passes import Passes
from protocol.transport.streams import MAX_STREAMS, MAX_STREAMS_OF_STRANGERS, Streams
from tests.benchmarks.harness import Row, figure
from tests.e2e.swarm import Swarm

ROWS = ("flood_p99", "flood_slow_p99", "flood_rss", "flood_body_rss", "flood_disk", "flood_fds")
ATTACKERS = 2
ASK_EVERY_S = 0.05
CEILING_MIB = 768  # of a small VPS with 1 GiB
BODY_CEILING_MIB = 128  # an eighth of what is sent
DISK_CEILING_MIB = 16  # a GiB an hour
FILES_CEILING = MAX_STREAMS + MAX_STREAMS_OF_STRANGERS + 256  # a socket for each stream; databases, pipes
ANSWER_TIMEOUT_S = 10.0
PATIENCE_S = 240.0  # a GiB takes a minute; the machine may have other things to do
CALM = "nothing"
PEER = "oak"
SETTINGS = ("batch.eval_every=100000", "keeping.checkpoint_every=20", "batch.heldout_sequences=32")


@dataclass(frozen=True, slots=True)
class Flood:
    """What each of the attackers does, whether it has a pass, and whether a peer is its victim."""

    what: str
    is_member: bool = True
    at_peer: bool = False


FLOODS = {
    "messages of strangers": Flood("messages", is_member=False),
    "messages of members": Flood("messages"),
    "slow writers": Flood("slow"),
    "slow readers": Flood("readers"),
    "10,000 connections": Flood("connections", is_member=False),
    "1 GiB to the coordinator": Flood("body"),
    "1 GiB to a peer": Flood("body", at_peer=True),
    "registrations": Flood("sessions"),
    "reports": Flood("reports"),
}


@dataclass(slots=True)
class Felt:
    """What an honest member and the victim's machine felt of a flood."""

    waits_s: list[float] = field(default_factory=list)
    unanswered: int = 0
    first_bytes: int = 0
    most_bytes: int = 0
    most_files: int = 0
    most_daemon_files: int = 0
    disk_bytes: int = 0
    seconds: float = 0.0
    done: int = 0
    rounds: int = 0

    @property
    def p99_s(self) -> float:
        return sorted(self.waits_s)[int(0.99 * (len(self.waits_s) - 1))] if self.waits_s else float("inf")

    @property
    def more_bytes(self) -> int:
        return self.most_bytes - self.first_bytes

    @property
    def disk_per_s(self) -> float:
        return self.disk_bytes / max(self.seconds, 1e-9)

    def line(self) -> str:
        asked = len(self.waits_s) + self.unanswered
        return (
            f"{self.p99_s:.2f} s, {self.unanswered} unanswered of {asked}, {self.most_bytes / 2**20:.0f} MiB "
            f"(+{self.more_bytes / 2**20:.0f}), {self.most_files} files (p2pd {self.most_daemon_files}), "
            f"disk {60 * self.disk_per_s / 2**20:.1f} MiB/min, {self.done:,} done, {self.rounds} rounds"
        )


def flood_rows(*, seconds: float, floods: Mapping[str, Flood]) -> Iterator[Row]:
    """Let one flood after the other come over a swarm, and yield the rows."""
    corpus = Path(sysconfig.get_path("stdlib")) / "asyncio"
    felt: dict[str, Felt] = {}
    with (
        tempfile.TemporaryDirectory(prefix="handcar-bench-") as name,
        Swarm(Path(name), corpus=corpus, rounds=100_000, stages=1, settings=SETTINGS, log_level="info") as swarm,
    ):
        swarm.start_coordinator("--start-peers", "1")
        swarm.start_peers([PEER])
        swarm.wait_version(21)
        for flood in (CALM, *floods):
            felt[flood] = asyncio.run(_one_flood(swarm, Path(name), floods.get(flood), seconds))
            print(f"{flood}: {felt[flood].line()}", file=sys.stderr, flush=True)
        with swarm.database() as db:
            (intact,) = db.execute("PRAGMA integrity_check").fetchone()
    assert intact == "ok", intact
    yield from _rows(felt, floods)


def _rows(felt: Mapping[str, Felt], floods: Mapping[str, Flood]) -> Iterator[Row]:
    calm = felt[CALM]
    hit = {flood: one for flood, one in felt.items() if flood != CALM}
    note = "; ".join(f"{flood}: {one.line()}" for flood, one in felt.items()) + "; database intact"
    yield figure("flood_p99", _worst_wait(hit.values()), unit="s", bar="<= 2", note=note)
    slow = [one for flood, one in hit.items() if floods[flood].what in ("slow", "readers")]
    if slow:
        yield figure("flood_slow_p99", _worst_wait(slow), unit="s", bar="<= 2", note=f"calm {calm.p99_s:.2f} s")
    most = max(one.most_bytes for flood, one in hit.items() if not floods[flood].at_peer)
    note = f"the coordinator and its p2pd, ceiling {CEILING_MIB} MiB"
    yield figure("flood_rss", most / 2**20, unit="MiB", bar=f"<= {CEILING_MIB}", note=note)
    bodies = [one for flood, one in hit.items() if floods[flood].what == "body"]
    if bodies:
        most, sent = max(one.more_bytes for one in bodies), ", ".join(f"{one.done:,} MiB" for one in bodies)
        note = f"more than before; sent {sent}; calm {_mib(calm.more_bytes)}"
        yield figure("flood_body_rss", most / 2**20, unit="MiB", bar=f"<= {BODY_CEILING_MIB}", note=note)
    growth = {flood: 60 * (one.disk_per_s - calm.disk_per_s) for flood, one in hit.items()}
    worst = max(growth, key=lambda flood: growth[flood])
    note = f"a minute of {worst}, more than in calm ({_mib(60 * calm.disk_per_s)})"
    yield figure("flood_disk", growth[worst] / 2**20, unit="MiB", bar=f"<= {DISK_CEILING_MIB}", note=note)
    files = max(one.most_files for flood, one in hit.items() if not floods[flood].at_peer)
    note = f"calm {calm.most_files}; p2pd, which has no limit: {max(one.most_daemon_files for one in hit.values()):,}"
    yield figure("flood_fds", files, unit="files", bar=f"<= {FILES_CEILING}", note=note)


def _mib(num_bytes: float) -> str:
    return f"{num_bytes / 2**20:.1f} MiB"


def _worst_wait(felt: Iterable[Felt]) -> float:
    everybody = list(felt)
    return float("inf") if any(one.unanswered for one in everybody) else max(one.p99_s for one in everybody)


async def _one_flood(swarm: Swarm, folder: Path, flood: Flood | None, seconds: float) -> Felt:
    """Ask the coordinator honestly while others flood it or a peer; nobody does if there is no `flood`."""
    assert swarm.coordinator is not None
    invite, run_dir, felt, before = Invite.from_text(swarm.invite), swarm.run_dir(), Felt(), swarm.version()
    node = await Node.start(
        folder / "honest.key",
        run=invite.run,
        coordinator=invite.coordinator,
        initial_peers=invite.addresses,
        host_maddrs=("/ip4/127.0.0.1/tcp/0",),
    )
    door = Door(invite.run, invite.coordinator)
    streams = Streams(node.p2p, door=door)
    calls = Calls(streams, run=invite.run, coordinator=invite.coordinator)
    passes = Passes(calls, streams, door, me=node.peer_id)
    now_s = int(time.time())
    passes.own = admit(
        run_dir.key, run=run_dir.manifest.run_id, peer=node.peer_id, name="honest", issued_s=now_s, valid_hours=1.0
    )
    attackers: list[subprocess.Popen[str]] = []
    victim = swarm.peers[PEER] if flood is not None and flood.at_peer else swarm.coordinator
    try:
        await calls.call(invite.coordinator, StateRequest(stage=StageId(0)), StateAnswer)
        if flood is not None:
            attackers = [_start(flood, seconds, number, swarm) for number in range(ATTACKERS)]
        assert [await _said(attacker) for attacker in attackers] == ["ready"] * len(attackers)
        on_disk, started_s = _on_disk(swarm), time.monotonic()
        with _watching(victim.pid, felt):
            for attacker in attackers:
                _go(attacker)
            ending = asyncio.gather(*(_said(attacker) for attacker in attackers))
            while not ending.done() or time.monotonic() < started_s + seconds:
                await _ask(calls, invite, felt)
                await asyncio.sleep(ASK_EVERY_S)
        felt.seconds, felt.disk_bytes = time.monotonic() - started_s, _on_disk(swarm) - on_disk
        felt.done = sum(json.loads(said)["done"] for said in await ending)
    finally:
        for attacker in attackers:
            with suppress(ProcessLookupError):  # it has ended, and its p2pd, which takes its time
                os.killpg(attacker.pid, signal.SIGKILL)
            attacker.communicate()
        await streams.stop()
        await node.stop()
    felt.rounds = swarm.version() - before
    return felt


async def _said(attacker: subprocess.Popen[str]) -> str:
    """Return an attacker's next line. Whoever says nothing is killed by the caller, which also ends the reading."""
    assert attacker.stdout is not None
    async with asyncio.timeout(PATIENCE_S):
        line = (await asyncio.to_thread(attacker.stdout.readline)).strip()
    assert line, "an attacker has ended before its time"
    return line


def _go(attacker: subprocess.Popen[str]) -> None:
    assert attacker.stdin is not None
    attacker.stdin.write("go\n")
    attacker.stdin.flush()


def _on_disk(swarm: Swarm) -> int:
    """Return the size of what grows: the coordinator's database, and all logs. Of checkpoints it keeps the last few."""
    files = [*swarm.directory.glob(f"{DATABASE_FILE}*"), *swarm.folder.glob("*.jsonl*")]
    return sum(file.stat().st_size for file in files if file.is_file())


async def _ask(calls: Calls, invite: Invite, felt: Felt) -> None:
    started_s = time.monotonic()
    request = StateRequest(stage=StageId(0))
    try:
        await calls.call(invite.coordinator, request, StateAnswer, timeout_s=ANSWER_TIMEOUT_S)
    except SwarmError:
        felt.unanswered += 1
    else:
        felt.waits_s.append(time.monotonic() - started_s)


def _start(flood: Flood, seconds: float, seed: int, swarm: Swarm) -> subprocess.Popen[str]:
    invite = Invite.from_text(swarm.invite)
    address, names = invite.addresses[0], [call_protocol(invite.run), blob_protocol(invite.run)]
    if flood.at_peer:
        with swarm.database() as db:
            address = next(row.addresses[0] for row in peers.load_peers(db) if row.name == PEER)
        names.append(hop_protocol(invite.run))
    argv = [sys.executable, "-m", "tests.benchmarks.trust_flood_child", flood.what, str(seconds), str(seed), address]
    argv += [",".join(names), str(swarm.directory) if flood.is_member else "-"]
    pipe = subprocess.PIPE
    return subprocess.Popen(argv, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, text=True, process_group=0)


@contextmanager
def _watching(pid: int, felt: Felt) -> Iterator[None]:
    """Note the most memory and files that a process and its children take while the block runs."""
    process, ended = psutil.Process(pid), threading.Event()

    def look() -> None:
        while True:
            helpers = process.children(recursive=True)
            taken = sum(one.memory_info().rss for one in (process, *helpers))
            felt.first_bytes = felt.first_bytes or taken
            felt.most_bytes = max(felt.most_bytes, taken)
            felt.most_files = max(felt.most_files, process.num_fds())
            felt.most_daemon_files = max(felt.most_daemon_files, sum(one.num_fds() for one in helpers))
            if ended.wait(0.1):
                return

    watcher = threading.Thread(target=look)
    watcher.start()
    try:
        yield
    finally:
        ended.set()
        watcher.join()
