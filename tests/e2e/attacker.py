"""A stranger who talks nonsense: a bare p2pd that sends bytes to the handlers of an honest process.

Owns: dialling, and what is said. Everything is random but seeded; most of it begins like an honest message and
goes wrong somewhere, because what is wrong from its first byte gets no further than the first check. Must not
know: whom it attacks and what should come of it.
"""

from __future__ import annotations

import asyncio
import random
import struct
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

from hivemind.p2p import P2P, P2PDaemonError, P2PHandlerError, PeerID
from hivemind.proto import averaging_pb2, dht_pb2, runtime_pb2
from hivemind.utils import MSGPackSerializer
from multiaddr import Multiaddr

from protocol.errors import SwarmError
from protocol.transport.dial import dial
from protocol.wire import MAX_CHUNK_BYTES, MAX_MESSAGE_BYTES, FrameKind, Message, frame_header, pack, pack_tagged

STREAM_S = 1.0  # how long one stream is talked to
UNARY_S = 3.0
READ_BYTES = 1 << 16
DEPTH = 200
MILLION = bytes(1 << 20)


@dataclass(slots=True)
class Attacker:
    """Somebody with a p2pd of its own."""

    p2p: P2P
    victim: PeerID
    random: random.Random
    sent: int = 0
    answered: int = 0

    async def stream(self, name: str, data: bytes) -> None:
        """Open a stream, send bytes, see whether anything comes back, hang up."""
        try:
            reader, writer = await dial(self.p2p, self.victim, name)
        except SwarmError:
            return
        self.sent += 1
        try:
            async with asyncio.timeout(STREAM_S):
                writer.write(data)
                await writer.drain()
                self.answered += bool(await reader.read(READ_BYTES))
        except (TimeoutError, OSError, RuntimeError):
            return
        finally:
            writer.transport.abort()

    async def unary(self, name: str, data: bytes) -> None:
        """Call a unary handler with bytes for a request."""
        self.sent += 1
        try:
            async with asyncio.timeout(UNARY_S):
                await self.p2p._client.call_unary_handler(self.victim, name, data)
        except (TimeoutError, OSError, P2PDaemonError, P2PHandlerError):
            return
        self.answered += 1


@asynccontextmanager
async def attacker(addresses: Sequence[str], *, seed: int) -> AsyncIterator[Attacker]:
    """Start a p2pd of a stranger's and connect it."""
    p2p = await P2P.create(host_maddrs=["/ip4/127.0.0.1/tcp/0"], auto_nat=False, nat_port_map=False)
    try:
        way, _, peer = addresses[0].rpartition("/p2p/")
        victim = PeerID.from_base58(peer)
        await p2p._client.connect(victim, [Multiaddr(way)])
        yield Attacker(p2p, victim, random.Random(seed))
    finally:
        await p2p.shutdown()


# -- framed streams ---------------------------------------------------------------------------------------


def framed_nonsense(
    honest: Sequence[Message], kinds: Sequence[type[Message]], chance: random.Random
) -> Iterator[bytes]:
    """Yield what a framed handler may hear: no message, half of one, a lie about its length, wrong fields, changes."""
    yield b""
    yield chance.randbytes(chance.randrange(1, 200))
    yield chance.randbytes(1 << 18)
    yield struct.pack(">BI", FrameKind.MESSAGE, 0xFFFFFFFF) + MILLION
    yield frame_header(FrameKind.MESSAGE, MAX_MESSAGE_BYTES + 1) + MILLION
    yield frame_header(FrameKind.MESSAGE, MAX_MESSAGE_BYTES) + chance.randbytes(1000)
    yield frame_header(FrameKind.CHUNK, MAX_CHUNK_BYTES) + MILLION
    for payload in (nested_arrays(), nested_extensions(), b"\xdf\xff\xff\xff\xff", b"\xc6\xff\xff\xff\xff", b""):
        yield framed(payload)
    for kind in kinds:
        yield framed(pack((kind.__name__, {name: scrap(chance) for name in kind.model_fields})))
    for message in honest:
        whole = pack_tagged(message)
        yield framed(whole)[: chance.randrange(len(whole))]
        yield framed(whole) + MILLION
        yield from (framed(mutated(whole, chance)) for _ in range(6))


def framed(payload: bytes) -> bytes:
    """Return a payload with a true header before it."""
    return frame_header(FrameKind.MESSAGE, len(payload)) + payload


def scrap(chance: random.Random) -> Any:
    """Return a value of any type that a message can hold."""
    scraps = (
        None,
        True,
        -1,
        2**63,
        2**64 - 1,
        1.5,
        float("nan"),
        float("inf"),
        "",
        "x" * 1000,
        b"",
        chance.randbytes(32),
    )
    return chance.choice((*scraps, {}, {"a": [1, {"b": []}]}, [], [chance.randbytes(32)] * 500, ["/ip4/1.2.3.4"]))


def mutated(data: bytes, chance: random.Random) -> bytes:
    """Return bytes with a few changed, left out or put in."""
    changed = bytearray(data)
    for _ in range(chance.randrange(1, 5)):
        at = chance.randrange(len(changed))
        match chance.randrange(3):
            case 0:
                changed[at] = chance.randrange(256)
            case 1:
                del changed[at : at + chance.randrange(1, 9)]
            case _:
                changed[at:at] = chance.randbytes(chance.randrange(1, 9))
        if not changed:
            return b"\x00"
    return bytes(changed)


def nested_arrays() -> bytes:
    """Return msgpack that nests far deeper than any reader should follow."""
    return b"\x91" * 100_000 + b"\xc0"


def nested_extensions() -> bytes:
    """Return hivemind's tuples in tuples: as shipped, decoding this ends the process."""
    value = b"\xc0"
    for _ in range(DEPTH):
        value = b"\xc9" + struct.pack(">IB", len(value) + 1, 0x40) + b"\x91" + value
    return value


# -- hivemind's own calls ---------------------------------------------------------------------------------


def dht_nonsense(name: str, chance: random.Random) -> Iterator[bytes]:
    """Yield what a unary DHT handler may be called with."""
    yield b""
    yield chance.randbytes(chance.randrange(1, 2000))
    yield chance.randbytes(3 << 20)
    yield b"\x0a\xff\xff\xff\xff\x0f" + chance.randbytes(100)  # a field that claims 4 GiB
    for request in _dht_requests(chance):
        if type(request).__name__.removesuffix("Request").lower() == name.rpartition("_")[2]:
            honest = request.SerializeToString()
            yield honest
            yield from (mutated(honest, chance) for _ in range(6) if honest)


def _dht_requests(chance: random.Random) -> Iterator[Any]:
    node = dht_pb2.NodeInfo(node_id=chance.randbytes(20))
    serializer = MSGPackSerializer
    yield dht_pb2.PingRequest(peer=node, validate=True)
    yield dht_pb2.FindRequest(keys=[chance.randbytes(20) for _ in range(5000)], peer=node)
    yield dht_pb2.FindRequest(keys=[chance.randbytes(1 << 20)], peer=node)
    for value in (nested_extensions(), nested_arrays(), chance.randbytes(1 << 19), serializer.dumps({"a": 1})):
        for subkey in (b"", serializer.dumps("x"), nested_extensions()):
            yield dht_pb2.StoreRequest(
                keys=[chance.randbytes(20)],
                subkeys=[subkey],
                values=[value],
                expiration_time=[chance.choice((2e9, float("inf"), float("nan"), -1.0))],
                in_cache=[False],
                peer=node,
            )
    many = 3000
    yield dht_pb2.StoreRequest(
        keys=[chance.randbytes(20) for _ in range(many)],
        subkeys=[b""] * many,
        values=[b"x"] * many,
        expiration_time=[2e9] * many,
        in_cache=[False] * many,
        peer=node,
    )


def reduce_nonsense(chance: random.Random) -> Iterator[bytes]:
    """Yield what the all-reduce's protobuf stream may hear: hivemind frames messages by an 8-byte length."""
    yield b""
    yield chance.randbytes(chance.randrange(1, 200))
    yield b"\x00" + struct.pack(">Q", 1 << 62) + MILLION
    yield b"\x00" + struct.pack(">Q", 1 << 19) + chance.randbytes(1000)
    yield struct.pack(">Q", 0) * 1000
    part = runtime_pb2.Tensor(buffer=chance.randbytes(1000), size=[1 << 31, 1 << 31], dtype="float32", compression=9)
    for data in (
        averaging_pb2.AveragingData(group_id=chance.randbytes(16), code=averaging_pb2.PART_FOR_AVERAGING),
        averaging_pb2.AveragingData(group_id=chance.randbytes(1 << 16), tensor_part=part, weight=float("nan")),
        averaging_pb2.AveragingData(group_id=b"", tensor_part=part, weight=-1.0),
    ):
        honest = data.SerializeToString()
        for payload in (honest, *(mutated(honest, chance) for _ in range(6))):
            yield b"\x00" + struct.pack(">Q", len(payload)) + payload
