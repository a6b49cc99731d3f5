"""What hostile bytes cost, and what attacks come to: decoders, floods of a coordinator, and peers that cheat.

`python -m tests.benchmarks.trust`. `decode_ms`: CPU time for 64 KiB of honest bytes, the slowest decoder;
`decode_ms_hostile`: of bytes that are made to be expensive.
`flood_p99`, `flood_rss`: two processes flood a real coordinator, with short messages as strangers and as members, with
slow streams, with bodies of 1 GiB, with plain connections, while a member asks it something twenty times a second and a
small swarm trains. The worst flood counts. `flood_body_rss`, `flood_slow_p99`: of these two floods alone. `flood_disk`:
by what a flood makes the folder with the database and all logs grow. `attack_*` and `clean_*`: see `trust_attacks.py`;
`--calibrate`: `trust_calibrate.py`.
"""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import median

import psutil
import torch
from hivemind.dht.storage import DictionaryDHTValue

from peer.codecs import codec, codec_names
from protocol.access import Door, Revocations
from protocol.control import BeatReply
from protocol.errors import SwarmError, WireError
from protocol.history import StateAnswer, StateRequest
from protocol.ids import PeerId, RunId, StageId
from protocol.invite import Invite
from protocol.records import admit
from protocol.tensors import format_header
from protocol.transport.calls import Calls, call_protocol
from protocol.transport.hardening import MAX_SUBKEYS
from protocol.transport.node import Node
from protocol.transport.passes import Passes
from protocol.transport.streams import Streams
from protocol.wire import pack_tagged
from tests.benchmarks import trust_attacks, trust_calibrate
from tests.benchmarks.harness import Options, Row, figure, run
from tests.e2e.swarm import Swarm
from tests.fuzz.hostile import hostile
from tests.fuzz.targets import targets

DECODE_BYTES = 64 * 1024
FLOODS = {  # name: what each of the two does, and whether it has a pass
    "messages of strangers": ("messages", False),
    "messages of members": ("messages", True),
    "slow streams of members": ("slow", True),
    "bodies of 1 GiB of members": ("bodies", True),
    "10,000 connections": ("connections", False),
}
ATTACKERS = 2
ASK_EVERY_S = 0.05
CEILING_MIB = 768  # of a small VPS with 1 GiB
ANSWER_TIMEOUT_S = 10.0
GRACE_S = 120.0
DISK_MIB = 16  # by which a flood may make the run's folder grow: what a swarm that trains writes anyway is about 1
SETTINGS = ("batch.eval_every=100000", "keeping.checkpoint_every=100000", "batch.heldout_sequences=32")


def measure(options: Options) -> Iterator[Row]:
    if options.wants("decode_ms", "decode_ms_hostile"):
        yield _slowest_decoder(repeats=options.repeats_or(quick=20, full=200))
        yield _slowest_on_hostile(repeats=options.repeats_or(quick=3, full=15))
    if options.wants("flood_p99", "flood_rss", "flood_body_rss", "flood_slow_p99", "flood_disk"):
        yield from _floods(seconds=4.0 if options.quick else 10.0, floods=FLOODS)
    yield from trust_attacks.rows(options)


# -- decoders -------------------------------------------------------------------------------------------


def _slowest_decoder(*, repeats: int) -> Row:
    took = {name: _decode_ms(*case, repeats=repeats) for name, case in _large_cases().items()}
    worst = max(took, key=lambda name: took[name])
    note = ", ".join(f"{name} {ms:.2f}" for name, ms in sorted(took.items(), key=lambda each: -each[1]))
    return figure("decode_ms", took[worst], unit="ms", bar="<= 50", note=f"{note}; median of honest 64 KiB, CPU time")


def _slowest_on_hostile(*, repeats: int) -> Row:
    """Measure the shapes that are made to be expensive: most are refused, and that is what takes the time."""
    known, took = targets(), dict[str, float]()
    for name in ("messages", "DHT value", "DHT dictionary"):
        for shape, case in hostile(DECODE_BYTES - 64).items():
            took[f"{name}, {shape}"] = _decode_ms(partial(_taken_or_refused, known[name].decode), case, repeats=repeats)
    slow = sorted(took, key=lambda each: -took[each])
    note = "; ".join(f"{each} {took[each]:.2f}" for each in slow[:4])
    return figure("decode_ms_hostile", took[slow[0]], unit="ms", bar="<= 50", note=f"{note}; of {len(took)}, CPU time")


def _taken_or_refused(decode: Callable[[bytes], object], case: bytes) -> None:
    with suppress(WireError):
        decode(case)


def _large_cases() -> dict[str, tuple[Callable[[bytes], object], bytes]]:
    """Return decoders with 64 KiB that they take: nothing is refused early."""
    known, peer = targets(), PeerId("1" * 52)
    revocations = Revocations(run=RunId("ab" * 16), number=1, issued_s=1.0, peers=(peer,) * 1200)
    members = tuple((StageId(number % 8), peer, ("/ip4/192.0.2.1/tcp/4001",)) for number in range(700))
    reply = BeatReply(acknowledged=1, stages=(StageId(0),), charters=(), members=members)
    dictionary = DictionaryDHTValue()
    for number in range(MAX_SUBKEYS):
        dictionary.store(f"{number:052}", bytes(DECODE_BYTES // MAX_SUBKEYS), 1e10)
    cases: dict[str, tuple[Callable[[bytes], object], bytes]] = {
        "revocations": (known["messages"].decode, pack_tagged(revocations)),
        "reply to a beat": (known["messages"].decode, pack_tagged(reply)),
        "DHT dictionary": (known["DHT dictionary"].decode, dictionary.packb()),
        "tensor header": (known["tensor header"].decode, _header()),
    }
    for name in codec_names():
        made, num = codec(name), 1024
        while made.encoded_bytes(2 * num) <= DECODE_BYTES:
            num *= 2
        cases[f"codec {name}"] = partial(made.decode, num_elements=num), made.encode(torch.randn(num))
    return cases


def _header() -> bytes:
    """Return a header of many tensors, the last of which leave the 90 bytes that the target's file has behind it."""
    tensors = {f"model.layers.{number}.weight": ("U8", (0,)) for number in range(900)}
    return format_header({**tensors, "last": ("U8", (90,))})


def _decode_ms(decode: Callable[[bytes], object], case: bytes, *, repeats: int) -> float:
    took = []
    for _ in range(repeats):
        started_s = time.thread_time()
        decode(case)
        took.append(time.thread_time() - started_s)
    return 1000 * median(took) * DECODE_BYTES / len(case)


# -- floods ---------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Felt:
    """What an honest member and the victim's machine felt of a flood."""

    waits_s: list[float] = field(default_factory=list)
    unanswered: int = 0
    most_bytes: int = 0
    written_bytes: int = 0
    """By which the folder with the database and everybody's logs has grown."""
    done: int = 0
    rounds: int = 0

    @property
    def p99_s(self) -> float:
        return sorted(self.waits_s)[int(0.99 * (len(self.waits_s) - 1))] if self.waits_s else float("inf")


def _floods(*, seconds: float, floods: dict[str, tuple[str, bool]]) -> Iterator[Row]:
    corpus = Path(sysconfig.get_path("stdlib")) / "asyncio"
    felt: dict[str, Felt] = {}
    with (
        tempfile.TemporaryDirectory(prefix="handcar-bench-") as name,
        Swarm(Path(name), corpus=corpus, rounds=100_000, stages=1, settings=SETTINGS) as swarm,
    ):
        swarm.start_coordinator("--start-peers", "1")
        swarm.start_peers(["oak"])
        swarm.wait_version(3)
        for flood in ("nothing", *floods):
            before = _folder_bytes(Path(name))
            felt[flood] = asyncio.run(_one_flood(swarm, Path(name), floods.get(flood), seconds))
            felt[flood].written_bytes = _folder_bytes(Path(name)) - before
        with swarm.database() as db:
            (intact,) = db.execute("PRAGMA integrity_check").fetchone()
    assert intact == "ok", intact
    calm = felt.pop("nothing")
    each = "; ".join(
        f"{flood}: {one.p99_s:.2f} s, {one.unanswered} unanswered of {len(one.waits_s) + one.unanswered}, "
        f"{one.most_bytes / 2**20:.0f} MiB, {one.done:,} opened, {one.rounds} rounds"
        for flood, one in felt.items()
    )
    worst = max(felt.values(), key=lambda one: (one.unanswered > 0, one.p99_s))
    note = f"calm {calm.p99_s:.2f} s, {calm.most_bytes / 2**20:.0f} MiB, {calm.rounds} rounds; {each}; database intact"
    yield figure("flood_p99", worst.p99_s, unit="s", bar="<= 2", note=note)
    most = max(one.most_bytes for one in felt.values())
    note = f"the coordinator and its p2pd, ceiling {CEILING_MIB} MiB"
    yield figure("flood_rss", most / 2**20, unit="MiB", bar=f"<= {CEILING_MIB}", note=note)
    for flood, (what, _) in floods.items():
        one = felt[flood]
        if what == "bodies":
            note = f"the coordinator and its p2pd, {ATTACKERS} times 1 GiB pushed, {one.done:,} streams"
            yield figure("flood_body_rss", one.most_bytes / 2**20, unit="MiB", bar=f"<= {CEILING_MIB}", note=note)
        if what == "slow":
            note = f"{one.done:,} slow streams, {one.unanswered} unanswered"
            yield figure("flood_slow_p99", one.p99_s, unit="s", bar="<= 2", note=note)
    grown = {flood: one.written_bytes / 2**20 for flood, one in felt.items()}
    worst_flood = max(grown, key=lambda each: grown[each])
    note = f"{worst_flood}; {calm.written_bytes / 2**20:.1f} when nothing happens; database intact"
    yield figure("flood_disk", grown[worst_flood], unit="MiB", bar=f"<= {DISK_MIB}", note=note)


def _folder_bytes(folder: Path) -> int:
    total = 0
    for path in folder.rglob("*"):
        with suppress(OSError):  # it went while we looked
            total += path.lstat().st_blocks * 512
    return total


async def _one_flood(swarm: Swarm, folder: Path, attack: tuple[str, bool] | None, seconds: float) -> Felt:
    """Ask the coordinator honestly while others flood it; nobody does if there is no `attack`."""
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
    try:
        await calls.call(invite.coordinator, StateRequest(stage=StageId(0)), StateAnswer)
        with _watching(swarm.coordinator.pid, felt):
            if attack is not None:
                attackers = [_start(attack, seconds, number, invite, swarm.directory) for number in range(ATTACKERS)]
            ends_s = time.monotonic() + seconds + (2.0 if attackers else 0.0)
            while time.monotonic() < ends_s:
                await _ask(calls, invite, felt)
                await asyncio.sleep(ASK_EVERY_S)
        for attacker in attackers:
            said, complaints = await asyncio.to_thread(attacker.communicate, timeout=GRACE_S)
            assert attacker.returncode == 0, complaints
            felt.done += json.loads(said)["done"]
    finally:
        for attacker in attackers:
            attacker.kill()
            attacker.wait()
        await streams.stop()
        await node.stop()
    felt.rounds = swarm.version() - before
    return felt


async def _ask(calls: Calls, invite: Invite, felt: Felt) -> None:
    started_s = time.monotonic()
    request = StateRequest(stage=StageId(0))
    try:
        await calls.call(invite.coordinator, request, StateAnswer, timeout_s=ANSWER_TIMEOUT_S)
    except SwarmError:
        felt.unanswered += 1
    else:
        felt.waits_s.append(time.monotonic() - started_s)


def _start(
    attack: tuple[str, bool], seconds: float, seed: int, invite: Invite, directory: Path
) -> subprocess.Popen[str]:
    what, is_member = attack
    arguments = [what, str(seconds), str(seed), invite.addresses[0], call_protocol(invite.run)]
    argv = [
        sys.executable,
        "-m",
        "tests.benchmarks.trust_flood_child",
        *arguments,
        str(directory) if is_member else "-",
    ]
    return subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@contextmanager
def _watching(pid: int, felt: Felt) -> Iterator[None]:
    """Note the most memory that a process and its children take while the block runs."""
    process, ended = psutil.Process(pid), threading.Event()

    def look() -> None:
        while not ended.wait(0.1):
            everybody = [process, *process.children(recursive=True)]
            felt.most_bytes = max(felt.most_bytes, sum(one.memory_info().rss for one in everybody))

    watcher = threading.Thread(target=look)
    watcher.start()
    try:
        yield
    finally:
        ended.set()
        watcher.join()


def main(argv: Sequence[str] | None = None) -> int:
    if "--calibrate" in (sys.argv[1:] if argv is None else argv):
        print(trust_calibrate.table())
        return 0
    return run("trust: what hostile bytes and attacks cost", measure, argv)


if __name__ == "__main__":
    sys.exit(main())
