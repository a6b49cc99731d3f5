"""One process of a flood: it does one thing to a victim, as often as it can, for some seconds.

Started by `trust_floods.py` with: what, seconds, seed, the victim's address, names of handlers (the one for calls
first), and the run's directory if it is to be a member, else a dash.
"""

from __future__ import annotations

import asyncio
import json
import random
import resource
import socket
import struct
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from coordinator.rundir import RunDir
from protocol.control import Beat, Capability, NumberedReport, PeerState, Register, StatusRequest, WorkReport
from protocol.errors import SwarmError
from protocol.ids import PeerId, RoundId
from protocol.records import admit
from protocol.transport.blobs import MAX_RANGE_BYTES, RangeRequest
from protocol.transport.dial import dial
from protocol.transport.passes import ShowPass
from protocol.wire import MAX_CHUNK_BYTES, PROTOCOL_VERSION, FrameKind, frame_header, pack_tagged
from tests.e2e.attacker import Attacker, attacker, framed

AT_ONCE = 48
BODY_BYTES = 1 << 29  # there are two of us
PIECE_BYTES = 1 << 18
STALL_S, BODY_MORE_S = 5.0, 60.0
LARGE_FILE = "stage-0.weights.safetensors"
LIES = (frame_header(FrameKind.CHUNK, MAX_CHUNK_BYTES), struct.pack(">BI", 1, 1 << 30), b"\x00" * 5)
SLOW_STREAMS = 200
PIECE_EVERY_S = 0.5
MESSAGES = (pack_tagged(StatusRequest()), b"", b"\xc1" * 200, bytes(1000))


async def messages(attack: Attacker, name: str, ends_s: float) -> None:
    """Open streams and say something short on each, forty-eight at a time."""

    async def one(number: int) -> None:
        while time.monotonic() < ends_s:
            await attack.stream(name, framed(MESSAGES[number % len(MESSAGES)]))
            number += 1

    await asyncio.gather(*(one(number) for number in range(AT_ONCE)))


async def slow(attack: Attacker, name: str, ends_s: float) -> None:
    """Hold as many streams as one gets, and send a byte now and then."""

    async def one() -> None:
        while time.monotonic() < ends_s:
            try:
                _, writer = await dial(attack.p2p, attack.victim, name)
                attack.sent += 1
                while time.monotonic() < ends_s:
                    writer.write(b"\x01")
                    await writer.drain()
                    await asyncio.sleep(PIECE_EVERY_S)
            except (SwarmError, OSError, RuntimeError):
                await asyncio.sleep(PIECE_EVERY_S)

    await asyncio.gather(*(one() for _ in range(SLOW_STREAMS)))


async def readers(attack: Attacker, name: str, file: str, ends_s: float) -> None:
    """Ask for as much as one may, and read a little of it now and then."""
    request = framed(pack_tagged(RangeRequest(name=file, offset=0, length=MAX_RANGE_BYTES)))

    async def one() -> None:
        while time.monotonic() < ends_s:
            try:
                reader, writer = await dial(attack.p2p, attack.victim, name)
            except SwarmError:
                await asyncio.sleep(PIECE_EVERY_S)
                continue
            reader._limit = 1  # type: ignore[attr-defined]  # nothing is read ahead
            writer.write(request)
            with suppress(OSError, RuntimeError):
                while time.monotonic() < ends_s and await reader.read(1):
                    attack.answered += 1
                    await asyncio.sleep(PIECE_EVERY_S)
            attack.sent += 1
            writer.transport.abort()

    await asyncio.gather(*(one() for _ in range(SLOW_STREAMS)))


async def body(attack: Attacker, names: Sequence[str], ends_s: float) -> int:
    """Send a body to every handler, behind headers that announce it and without; return how many MiB went out."""
    sent, piece = 0, bytes(PIECE_BYTES)

    async def one(number: int) -> None:
        nonlocal sent
        while sent < BODY_BYTES and time.monotonic() < ends_s:
            number += 1
            with suppress(SwarmError, OSError, RuntimeError, TimeoutError):
                _, writer = await dial(attack.p2p, attack.victim, names[number % len(names)])
                try:
                    writer.write(LIES[number % len(LIES)])
                    while sent < BODY_BYTES and time.monotonic() < ends_s:
                        writer.write(piece)
                        async with asyncio.timeout(STALL_S):
                            await writer.drain()
                        sent += len(piece)
                finally:
                    writer.transport.abort()

    await asyncio.gather(*(one(number) for number in range(AT_ONCE)))
    return sent >> 20


async def sessions(attack: Attacker, name: str, run: RunDir, ends_s: float) -> None:
    """Register again and again, as if one had been restarted each time."""
    first = time.time_ns() // 1_000_000

    async def one(number: int) -> None:
        while time.monotonic() < ends_s:
            await attack.stream(name, framed(pack_tagged(registration(run, first + number))))
            number += 8

    await asyncio.gather(*(one(number) for number in range(8)))


async def reports(attack: Attacker, name: str, run: RunDir, ends_s: float) -> None:
    """Register, and report work that nobody did."""
    await attack.stream(name, framed(pack_tagged(registration(run, time.time_ns() // 1_000_000))))
    number = time.time_ns() // 1_000_000
    while time.monotonic() < ends_s:
        done = [
            WorkReport(
                round=RoundId(each % 100_000),
                tasks_fed=1,
                tasks_resent=1,
                hops=1,
                activation_bytes=1,
                target_tokens=1,
                seconds=1.0,
                compute_seconds=1.0,
            )
            for each in range(64)
        ]
        numbered = tuple(NumberedReport(sequence=number + each, report=one) for each, one in enumerate(done))
        number += len(numbered)
        beat = Beat(state=PeerState.TRAINING, addresses=(), stages=(), reports=numbered)
        await attack.stream(name, framed(pack_tagged(beat)))


def registration(run: RunDir, session: int) -> Register:
    """Return what a peer that begins says."""
    return Register(
        protocol=PROTOCOL_VERSION,
        run=run.manifest.run_id,
        session=session,
        name="attacker",
        token=None,
        capability=Capability(device="cpu", threads=1, memory_bytes=1 << 30, software="x"),
        clock_s=time.time(),
        addresses=(),
    )


def connections(address: str, num: int, ends_s: float) -> int:
    """Open plain TCP connections and say nothing on them; return how many there were at the end."""
    resource.setrlimit(resource.RLIMIT_NOFILE, (resource.getrlimit(resource.RLIMIT_NOFILE)[1],) * 2)
    _, _, host, _, port, *_ = address.split("/")
    opened: list[socket.socket] = []
    try:
        while len(opened) < num and time.monotonic() < ends_s:
            opened.append(socket.create_connection((host, int(port)), timeout=2.0))
    except OSError as error:
        print(f"after {len(opened)}: {error}", file=sys.stderr)
    time.sleep(max(0.0, ends_s - time.monotonic()))
    for each in opened:
        each.close()
    return len(opened)


async def attack_with(what: str, seconds: float, seed: int, address: str, names: list[str], directory: str) -> None:
    """Flood the victim; print how many streams were opened, or MiB sent."""
    async with attacker([address], seed=seed) as attack:
        name, run = names[0], None if directory == "-" else RunDir.open(Path(directory))
        if run is not None:
            me, now_s = PeerId(attack.p2p.peer_id.to_base58()), int(time.time())
            run_id = run.manifest.run_id
            admission = admit(run.key, run=run_id, peer=me, name="attacker", issued_s=now_s, valid_hours=1.0)
            await attack.stream(name, framed(pack_tagged(ShowPass(admission=admission, number=0))))
        await asyncio.to_thread(wait_for_others)
        ends_s = time.monotonic() + seconds
        match what:
            case "messages":
                await messages(attack, name, ends_s)
            case "slow":
                await slow(attack, name, ends_s)
            case "readers":
                await readers(attack, names[1], f"checkpoint/newest/{LARGE_FILE}", ends_s)
            case "body":
                attack.sent = await body(attack, names, ends_s + BODY_MORE_S)
            case "sessions" if run is not None:
                await sessions(attack, name, run, ends_s)
            case "reports" if run is not None:
                await reports(attack, name, run, ends_s)
        print(json.dumps({"done": attack.sent}), flush=True)


def wait_for_others() -> None:
    """Say that we are ready, and wait until all are."""
    print("ready", flush=True)
    sys.stdin.readline()


def main() -> None:
    """Do what the command line says; print how often."""
    what, seconds, seed, address, names, directory = sys.argv[1:]
    random.seed(int(seed))
    if what == "connections":
        wait_for_others()
        print(json.dumps({"done": connections(address, 5000, time.monotonic() + float(seconds))}), flush=True)
    else:
        asyncio.run(attack_with(what, float(seconds), int(seed), address, names.split(","), directory))


if __name__ == "__main__":
    main()
