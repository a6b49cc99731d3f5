"""What decodes bytes of strangers, each as one function, with honest bytes to begin with.

Owns: the list. A decoder that is missing here is tried by nobody: whoever adds one adds it here; messages come by
themselves. Must not know: how bytes are changed, or what may come of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache, partial
from random import Random
from types import ModuleType

import torch
from hivemind.dht.storage import DictionaryDHTValue
from hivemind.utils.serializer import MSGPackSerializer

from peer.averaging.group_message import GroupMessage
from peer.codecs import codec, codec_names
from protocol import access, control, history, hops, manifest, receipts, records
from protocol.ids import RoundId, RunId, StageId
from protocol.invite import Invite
from protocol.paths import read_path
from protocol.records import key_id
from protocol.rounds import messages as rounds
from protocol.signing import Signed, unseal
from protocol.tensors import PREFIX_BYTES, format_header, header_length, parse_header
from protocol.transport import blobs, calls, hardening, passes
from protocol.transport.validator import RecordGate
from protocol.wire import (
    HEADER,
    FrameKind,
    Message,
    frame_header,
    pack,
    parse_frame_header,
    unpack,
    unpack_tagged,
)
from tests.fuzz.hostile import hostile
from tests.fuzz.plausible import plausible
from tests.protocol.paths import sign_path
from tests.protocol.test_records import ALICE, COORDINATOR, NOW, RUN, publication

MODULES: tuple[ModuleType, ...] = (
    access,
    blobs,
    calls,
    control,
    history,
    hops,
    manifest,
    passes,
    receipts,
    records,
    rounds,
)
SEEDS_PER_KIND = 6
NUM_ELEMENTS = 1000


@dataclass(frozen=True, slots=True)
class Target:
    """One decoder: it returns something, or raises one of the project's own errors."""

    name: str
    decode: Callable[[bytes], object]
    seeds: tuple[bytes, ...]


def kinds_of_messages() -> tuple[type[Message], ...]:
    """Return all message classes that cross the network."""
    found = {
        each.__name__: each
        for module in MODULES
        for each in vars(module).values()
        if isinstance(each, type) and issubclass(each, Message) and each not in (Message, rounds.StageMessage)
    }
    return tuple(found[name] for name in sorted(found))


@cache
def targets() -> dict[str, Target]:
    """Return all targets, by name."""
    hardening.install()
    return {target.name: target for target in (*_messages(), *_envelopes(), *_dht(), *_tensors())}


def hostile_seeds() -> tuple[bytes, ...]:
    """Return what is worth changing in any decoder of msgpack although none of them takes it."""
    return tuple(data for size in (1000, 9000, 60_000) for data in hostile(size).values())


def _messages() -> Iterator[Target]:
    chance = Random(0)
    kinds = kinds_of_messages()
    seeds: list[bytes] = []
    for kind in kinds:
        for _ in range(SEEDS_PER_KIND):
            seeds.append(pack((kind.__name__, plausible(kind, chance))))
    yield Target("unpack", unpack, tuple(seeds[::7]))
    yield Target("messages", lambda data: unpack_tagged(data, kinds), tuple(seeds))
    yield Target(
        "frame header",
        lambda data: parse_frame_header(data[: HEADER.size].ljust(HEADER.size, b"\0")),
        (frame_header(FrameKind.MESSAGE, 100), frame_header(FrameKind.CHUNK, 100), frame_header(FrameKind.STRANGER, 0)),
    )


def _envelopes() -> Iterator[Target]:
    signed = records.admit(COORDINATOR, run=RUN, peer=ALICE.peer_id, name="oak", issued_s=int(NOW), valid_hours=1.0)

    def open_signed(data: bytes) -> object:
        return unseal(Signed.from_bytes(data), records.ADMISSION_CONTEXT, records.Admission)

    yield Target("signed envelope", open_signed, (signed.to_bytes(),))

    hop = receipts.Hop(3, ALICE.peer_id, COORDINATOR.peer_id, StageId(1), 2, 64, b"g" * 16, b"r" * 16)
    answered = replace(hop, caller=COORDINATOR.peer_id, callee=ALICE.peer_id)
    windows = receipts.draw_windows(
        ALICE, run=RunId(RUN), session=7, round_id=RoundId(2), sent=[hop] * 3, served=[answered] * 2
    )

    def open_window(data: bytes) -> object:
        window = receipts.Window.from_bytes(data)
        return list(window.sent_hops()), list(window.served_hops())

    yield Target("receipts", open_window, tuple(each.payload for each in windows))
    shown = hops.Evidence(path=sign_path()).to_bytes()
    yield Target("signed path", lambda data: read_path(hops.Evidence.from_bytes(data).path), (shown,))
    invite = Invite(addresses=("/ip4/192.0.2.1/tcp/4001",), run=RUN, coordinator=COORDINATOR.peer_id).to_text()
    yield Target("invite", lambda data: Invite.from_text(data.decode("utf-8", "replace")), (invite.encode(),))


def _dht() -> Iterator[Target]:
    gate = RecordGate(RunId(RUN), COORDINATOR.peer_id, clock=lambda: NOW)
    said = publication()
    value = records.seal_publication(ALICE, said)
    key = key_id(said.dht_keys()[0])
    dictionary = DictionaryDHTValue()
    dictionary.store(ALICE.peer_id, value, said.expires_s)
    packed = MSGPackSerializer.dumps(dictionary)
    subkey = MSGPackSerializer.dumps(ALICE.peer_id)

    packed_value = MSGPackSerializer.dumps(value)

    def check_value(data: bytes) -> object:
        return gate.check(key, subkey, data, said.expires_s)

    def check_subkey(data: bytes) -> object:
        return gate.check(key, data, packed_value, said.expires_s)

    yield Target("DHT record", check_value, (packed_value,))
    yield Target("DHT subkey", check_subkey, (subkey,))
    yield Target("DHT value", MSGPackSerializer.loads, (packed, MSGPackSerializer.dumps((1, "a", (b"x", 2.5)))))
    yield Target("DHT dictionary", DictionaryDHTValue.unpackb, (dictionary.packb(),))


def _tensors() -> Iterator[Target]:
    for name in codec_names():
        made = codec(name)
        honest = made.encode(torch.randn(NUM_ELEMENTS, generator=torch.Generator().manual_seed(0)))
        yield Target(f"codec {name}", partial(made.decode, num_elements=NUM_ELEMENTS), (honest,))
    part = b"".join(bytes(piece) for piece in GroupMessage(code=3, data=b"part" * 50).to_wire())
    first = b"".join(bytes(piece) for piece in GroupMessage(code=1, group_id=b"g" * 32, peer_id=b"p" * 38).to_wire())
    yield Target("reduce message", lambda data: GroupMessage.from_wire(bytearray(data)), (part, first))
    header = format_header({"weight": ("F32", (4, 5)), "bias": ("BF16", (5,))})

    def read_header(data: bytes) -> object:
        length = header_length(data)
        return parse_header(data[PREFIX_BYTES : PREFIX_BYTES + length], file_bytes=len(data) + 90)

    yield Target("tensor header", read_header, (header,))
