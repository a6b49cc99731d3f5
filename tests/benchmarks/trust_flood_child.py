"""One process of a flood: it does one thing to a victim, as often as it can, for some seconds.

Started by `trust.py` with: what, seconds, seed, the victim's address, the handler's name, and the run's directory if it
is to be a member, else a dash.
"""

from __future__ import annotations

import asyncio
import json
import random
import resource
import socket
import sys
import time
from pathlib import Path

from coordinator.rundir import RunDir
from protocol.control import StatusRequest
from protocol.errors import SwarmError
from protocol.ids import PeerId
from protocol.records import admit
from protocol.transport.dial import dial
from protocol.transport.passes import ShowPass
from protocol.wire import HEADER, MAX_CHUNK_BYTES, MAX_MESSAGE_BYTES, FrameKind, frame_header, pack_tagged
from tests.e2e.attacker import MILLION, Attacker, attacker, framed

AT_ONCE = 48
SLOW_STREAMS = 200
PIECE_EVERY_S = 0.5
BODY_BYTES, BODIES_AT_ONCE = 1 << 30, 8
CLAIMS = (  # what a body begins with: as much as may come, more than that, a body where a message is due
    frame_header(FrameKind.MESSAGE, MAX_MESSAGE_BYTES),
    HEADER.pack(FrameKind.MESSAGE, BODY_BYTES),
    frame_header(FrameKind.CHUNK, MAX_CHUNK_BYTES),
)
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


async def bodies(attack: Attacker, name: str, ends_s: float) -> None:
    """Push a gibibyte on several streams, whatever is claimed or answered, until it is sent or time is up."""

    async def one(number: int) -> None:
        left = BODY_BYTES // BODIES_AT_ONCE
        while left > 0 and time.monotonic() < ends_s:
            try:
                async with asyncio.timeout(max(0.1, ends_s - time.monotonic())):
                    _, writer = await dial(attack.p2p, attack.victim, name)
                    attack.sent += 1
                    writer.write(CLAIMS[number % len(CLAIMS)])
                    number += 1
                    while left > 0:
                        writer.write(MILLION)
                        await writer.drain()
                        left -= len(MILLION)
            except (SwarmError, OSError, RuntimeError):
                continue

    await asyncio.gather(*(one(number) for number in range(BODIES_AT_ONCE)))


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


WAYS = {"messages": messages, "slow": slow, "bodies": bodies}


async def attack_with(what: str, seconds: float, seed: int, address: str, name: str, directory: str) -> int:
    """Flood the victim; return how many streams were opened."""
    async with attacker([address], seed=seed) as attack:
        if directory != "-":
            run, me = RunDir.open(Path(directory)), PeerId(attack.p2p.peer_id.to_base58())
            run_id, now_s = run.manifest.run_id, int(time.time())
            admission = admit(run.key, run=run_id, peer=me, name="attacker", issued_s=now_s, valid_hours=1.0)
            await attack.stream(name, framed(pack_tagged(ShowPass(admission=admission, number=0))))
        ends_s = time.monotonic() + seconds
        await WAYS[what](attack, name, ends_s)
        return attack.sent


def main() -> None:
    """Do what the command line says; print how often."""
    what, seconds, seed, address, name, directory = sys.argv[1:]
    random.seed(int(seed))
    if what == "connections":
        done = connections(address, 5000, time.monotonic() + float(seconds))
    else:
        done = asyncio.run(attack_with(what, float(seconds), int(seed), address, name, directory))
    print(json.dumps({"done": done}))


if __name__ == "__main__":
    main()
