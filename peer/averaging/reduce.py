"""Summing shards over the members of a group: the interface, its result, and its one kind of failure.

Owns: `Reduce` (what the steward calls), `ReduceGroup`, `Reduced`, `ReduceError`, and the reading of encoded
shards (`decode_shard`), which the history uses to replay them. Must not know: hivemind, sockets, stewards.
`butterfly.py` implements `Reduce` for dense codecs; a sparse codec will need an exchange instead.

The promise: the result is the fp32 sum of what the members sent, added in member order, encoded once; every
member ends with the very same bytes, or raises. Nobody is ever left out silently, and inputs are not touched.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor

from peer.averaging.parts import spans_of
from peer.codecs import Buffer, Codec, codec
from protocol.errors import TransientError, WireError
from protocol.ids import Digest, PeerId

MAX_GROUP_ID_BYTES = 64


class ReduceError(TransientError):
    """The reduce came to nothing, because of `peer`; the state is as before and a smaller group may try again.

    `witness` is who told us, None if we saw it ourselves. Neither is proof: a broken link has two ends.
    """

    def __init__(self, message: str, *, peer: PeerId, witness: PeerId | None = None) -> None:
        super().__init__(message)
        self.peer = peer
        self.witness = witness


@dataclass(frozen=True, slots=True, kw_only=True)
class ReduceTimeouts:
    """How long to wait for whom.

    A reducer gives a sender up first, so that the blame falls on who was late and not on who waited for it.
    """

    sender_s: float = 30.0
    """A reducer waits this long for everybody's next part."""
    reducer_s: float = 60.0
    """A sender waits this long for a reducer's next result, and everybody for the last acknowledgement."""
    deadline_s: float = 600.0
    """The whole reduce."""

    def __post_init__(self) -> None:
        if not 0 < self.sender_s < self.reducer_s:
            raise ValueError("a reduce needs 0 < sender_s < reducer_s")


@dataclass(frozen=True, slots=True, kw_only=True)
class ReduceGroup:
    """Who sums what together: the same on every member, from the steward's frozen list."""

    group_id: bytes
    """Used once. Another try (ballot) is another id."""
    members: tuple[PeerId, ...]
    """In the order in which contributions are added."""
    codec: str
    timeouts: ReduceTimeouts = field(default_factory=ReduceTimeouts)

    def __post_init__(self) -> None:
        if not 0 < len(self.group_id) <= MAX_GROUP_ID_BYTES:
            raise ValueError(f"a group id has 1 to {MAX_GROUP_ID_BYTES} bytes")
        if not self.members or len(set(self.members)) != len(self.members):
            raise ValueError("a group's members are distinct and at least one")


@dataclass(frozen=True, slots=True, kw_only=True)
class Reduced:
    """The committed bytes of a reduce, the same at every member."""

    codec: str
    shard_elements: tuple[int, ...]
    parts: tuple[tuple[bytes, ...], ...]
    """For each shard its encoded parts; joined, they are what the update log stores."""
    digest: Digest
    """Over all bytes, in order."""
    bytes_sent: int
    bytes_received: int
    seconds: float


class Reduce(Protocol):
    """Sums shards over a group."""

    async def reduce(self, group: ReduceGroup, shards: Sequence[Tensor]) -> Reduced:
        """Sum flat fp32 `shards` (equal lengths at every member) over `group`, of which we are a member.

        Raises `ReduceError` naming a peer, or `LocalFault` if our own values cannot be sent. Leaves no task
        behind, however it ends. Several groups may run at the same time.
        """


def encoded_shard_bytes(name: str, num_elements: int) -> int:
    """Return the exact number of bytes of an encoded shard."""
    return sum(codec(name).encoded_bytes(length) for _, length in spans_of(num_elements))


def decode_shard(name: str, data: Buffer, out: Tensor) -> None:
    """Write an encoded shard (its parts joined) into `out`, flat fp32 of the shard's length.

    Raises `WireError` unless `data` is exactly such a shard.
    """
    expected = encoded_shard_bytes(name, len(out))
    if len(data) != expected:
        raise WireError(f"encoded shard of {len(data)} bytes where {len(out)} elements take {expected}")
    view, offset = memoryview(data), 0
    for start, length in spans_of(len(out)):
        size = codec(name).encoded_bytes(length)
        out[start : start + length].copy_(codec(name).decode(view[offset : offset + size], length))
        offset += size


def contribution(values: Tensor, *, using: Codec) -> Tensor:
    """Return what a member's values are worth after the wire; a member treats its own just like the others'."""
    return using.decode(using.encode(values), len(values))
