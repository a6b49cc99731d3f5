"""Summing shards over the members of a group: the interface, its result, and its one kind of failure.

Owns: `Reduce` (what the steward calls), `ReduceGroup`, `Reduced`, `ReduceError`, and the reading of encoded
shards (`decoded_parts`), which the history uses to replay them. Must not know: hivemind, sockets, stewards.
`group_reduce.py` implements `Reduce`.

The promise: the result is the fp32 sum of what the members sent, each times its factor, added in member order. With a
dense codec it is encoded once (a butterfly); with a sparse one it stays what the members sent, one behind the other,
and is added up by whoever reads it (an exchange). Every member ends with the very same bytes, or raises. Nobody is ever
left out silently, and inputs are not touched.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol, Self

import torch
from torch import Tensor

from peer.averaging.parts import spans_of
from peer.averaging.taken import Taken
from peer.codecs import Buffer, Codec, codec
from protocol.errors import TransientError, WireError
from protocol.ids import Digest, PeerId

MAX_GROUP_ID_BYTES = 64
SHARDS_AT_HAND = 3  # at most 32 MiB each


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
    factors: tuple[float, ...] = ()
    """By what each member's values are multiplied before they are added (`protocol.rounds.factors`); without them
    nobody's are."""
    norms: tuple[float, ...] = ()
    """How long each member says that what it brings is; without them nothing is compared with that."""
    keeps: bool = False
    """Whether members keep what they were sent to add up, until the sum is committed."""
    timeouts: ReduceTimeouts = field(default_factory=ReduceTimeouts)

    def __post_init__(self) -> None:
        if not 0 < len(self.group_id) <= MAX_GROUP_ID_BYTES:
            raise ValueError(f"a group id has 1 to {MAX_GROUP_ID_BYTES} bytes")
        if not self.members or len(set(self.members)) != len(self.members):
            raise ValueError("a group's members are distinct and at least one")
        if self.factors and (len(self.factors) != len(self.members) or not any(self.factors)):
            raise ValueError("a group has a factor for each of its members, and not only zeros")
        if self.norms and len(self.norms) != len(self.members):
            raise ValueError("a group has a norm for each of its members")
        if not all(0 <= factor <= 1 for factor in self.factors):
            raise ValueError("a group's factors make nobody's values larger")


@dataclass(frozen=True, slots=True, kw_only=True)
class Reduced:
    """The committed bytes of a reduce, the same at every member."""

    codec: str
    shard_elements: tuple[int, ...]
    data: memoryview
    """The encoded shards, one behind the other, of an exchange those of every member: what the update log stores."""
    digest: Digest
    """Over all bytes, in order."""
    bytes_sent: int
    bytes_received: int
    seconds: float
    taken: Taken | None = None
    """What we were sent to add up, if the group keeps that and its codec has sums."""


class Shards:
    """A member's flat fp32 shards, read one at a time when they are needed: they may live on a disk.

    The latest few stay at hand, as members work on the same shards at the same time, but not in step.
    """

    def __init__(self, lengths: Sequence[int], read: Callable[[int], Tensor]) -> None:
        """`read(number)` returns a shard; it is called in other threads, and what it returns is not changed.

        Meanwhile other stages that share the memory may be computed: their passes leave this stage's sums alone.
        """
        self.lengths = tuple(lengths)
        self._read = read
        self._at_hand: OrderedDict[int, Tensor] = OrderedDict()
        self._reading: dict[int, asyncio.Future[Tensor]] = {}

    @classmethod
    def of(cls, tensors: Sequence[Tensor]) -> Self:
        """Wrap shards that are in memory."""
        return cls([len(tensor) for tensor in tensors], tensors.__getitem__)

    def part(self, shard: int, start: int, length: int) -> Tensor:
        """Return some elements of a shard; waits for the disk."""
        return self._read_checked(shard)[start : start + length]

    async def part_soon(self, shard: int, start: int, length: int) -> Tensor:
        """Return some elements of a shard, without holding up the event loop."""
        values = self._at_hand.get(shard)
        if values is None:
            reading = self._reading.get(shard)
            if reading is None:
                reading = self._reading[shard] = asyncio.ensure_future(asyncio.to_thread(self._read_checked, shard))
                reading.add_done_callback(lambda read: self._keep(shard, read))
            values = await asyncio.shield(reading)
        return values[start : start + length]

    def _keep(self, shard: int, read: asyncio.Future[Tensor]) -> None:
        del self._reading[shard]
        if not read.cancelled() and read.exception() is None:
            self._at_hand[shard] = read.result()
            while len(self._at_hand) > SHARDS_AT_HAND:
                self._at_hand.popitem(last=False)

    def _read_checked(self, shard: int) -> Tensor:
        values, expected = self._read(shard), (torch.float32, (self.lengths[shard],))
        if (values.dtype, tuple(values.shape)) != expected or not values.is_contiguous():
            raise ValueError(f"a shard is flat contiguous fp32, not {values.dtype} {tuple(values.shape)}")
        return values


class Reduce(Protocol):
    """Sums shards over a group."""

    async def reduce(self, group: ReduceGroup, shards: Shards) -> Reduced:
        """Sum `shards` (of equal lengths at every member) over `group`, of which we are a member.

        Raises `ReduceError` naming a peer, or `LocalFault` if our own values cannot be sent. Leaves no task
        behind, however it ends. Several groups may run at the same time.
        """


def encoded_shard_bytes(name: str, num_elements: int) -> int:
    """Return the exact number of bytes of an encoded shard."""
    return sum(codec(name).encoded_bytes(length) for _, length in spans_of(num_elements))


def decoded_parts(
    name: str, contributions: Sequence[Buffer], num_elements: int, *, factors: Sequence[float] = ()
) -> Iterator[tuple[slice, Tensor]]:
    """Yield a shard part by part: the sum of one encoded shard per member, each times its factor, in member order.

    Raises `WireError` as soon as one of them turns out not to be exactly such a shard.
    """
    for each in zip(*(_decoded(name, data, num_elements) for data in contributions), strict=True):
        total = None
        for member, (_, values) in enumerate(each):
            if factors:
                values.mul_(factors[member])
            total = values if total is None else total.add_(values)
        assert total is not None
        yield each[0][0], total


def encode_shard(name: str, values: Tensor, *, factor: float = 1.0) -> bytes:
    """Encode a shard, flat fp32, part by part."""
    parts = (values[start : start + length] for start, length in spans_of(len(values)))
    return b"".join(codec(name).encode(part if factor == 1.0 else part * factor) for part in parts)


def _decoded(name: str, data: Buffer, num_elements: int) -> Iterator[tuple[slice, Tensor]]:
    expected = encoded_shard_bytes(name, num_elements)
    if len(data) != expected:
        raise WireError(f"encoded shard of {len(data)} bytes where {num_elements} elements take {expected}")
    view, offset = memoryview(data), 0
    for start, length in spans_of(num_elements):
        size = codec(name).encoded_bytes(length)
        yield slice(start, start + length), codec(name).decode(view[offset : offset + size], length)
        offset += size


def contribution(values: Tensor, *, using: Codec) -> Tensor:
    """Return what a member's values are worth after the wire; a member treats its own just like the others'."""
    return using.decode(using.encode(values), len(values))
