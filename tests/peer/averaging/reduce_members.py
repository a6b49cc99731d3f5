"""Real members of a reduce for tests: daemons, groups, inputs, the definition of the result, and raw calls."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass

import torch
from hivemind.p2p import P2P
from hivemind.proto.averaging_pb2 import PART_FOR_AVERAGING, AveragingData
from hivemind.proto.runtime_pb2 import Tensor as WireTensor
from torch import Tensor

from peer.averaging.group_reduce import GroupReduce
from peer.averaging.link import from_hivemind
from peer.averaging.parts import PART_ELEMENTS, cut
from peer.averaging.reduce import Reduced, ReduceGroup, ReduceTimeouts, Shards, decoded_parts
from peer.averaging.reduce_service import ReduceService
from peer.codecs import Buffer, codec
from protocol.ids import PeerId

NAMESPACE = "test"
SHARDS = (3 * PART_ELEMENTS + 1000, 500, 0, PART_ELEMENTS, 70_000)  # 7 parts, some short, one shard without any
QUICK = ReduceTimeouts(sender_s=2.0, reducer_s=4.0, deadline_s=20.0)
group_numbers = itertools.count()


@dataclass(frozen=True)
class Member:
    """A peer: its daemon and its reduce."""

    p2p: P2P
    reduce: GroupReduce

    @property
    def peer(self) -> PeerId:
        return from_hivemind(self.p2p.peer_id)


async def start_members(number: int) -> list[Member]:
    """Start daemons that know each other through the first."""
    first = await P2P.create()
    addresses = await first.get_visible_maddrs()
    rest = await asyncio.gather(*(P2P.create(initial_peers=addresses) for _ in range(number - 1)))
    members = [Member(p2p, GroupReduce(p2p, namespace=NAMESPACE, early_wait_s=2.0)) for p2p in (first, *rest)]
    for member in members:
        await member.reduce.start()
        await member.p2p.wait_for_at_least_n_peers(1)
    return members


def make_group(members: Sequence[Member], name: str = "fp32", timeouts: ReduceTimeouts = QUICK) -> ReduceGroup:
    group_id = next(group_numbers).to_bytes(8, "big")
    return ReduceGroup(group_id=group_id, members=tuple(m.peer for m in members), codec=name, timeouts=timeouts)


def make_shards(seed: int, lengths: Sequence[int] = SHARDS) -> list[Tensor]:
    """Gradients whose scale differs between members, so that the order of addition shows."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(length, generator=generator) * 10.0**seed for length in lengths]


def reference(name: str, inputs: Sequence[Sequence[Tensor]]) -> list[bytes]:
    """The definition, in plain torch: per part, decode what each member sends, add in member order, encode once.

    With a sparse codec: what each member sends.
    """
    used, expected = codec(name), []
    parts = cut([len(shard) for shard in inputs[0]], num_members=1)
    if not used.is_dense:
        return [used.encode(shards[p.shard][p.start : p.start + p.length]) for shards in inputs for p in parts]
    for part in parts:
        sent = [shards[part.shard][part.start : part.start + part.length] for shards in inputs]
        total = used.decode(used.encode(sent[0]), part.length)
        for values in sent[1:]:
            total = total + used.decode(used.encode(values), part.length)
        expected.append(used.encode(total))
    return expected


def decode_shard(name: str, data: Buffer, out: Tensor) -> None:
    """Write an encoded shard into `out`, flat fp32 of its length."""
    for part, values in decoded_parts(name, [data], len(out)):
        out[part].copy_(values)


async def reduce_all(
    members: Sequence[Member], group: ReduceGroup, inputs: Sequence[Sequence[Tensor]], order: Sequence[int] = ()
) -> list[Reduced | BaseException]:
    """Reduce at every member at once (started in `order`); return results and errors in member order."""
    order = order or range(len(members))
    tasks = {}
    for position in order:
        tasks[position] = asyncio.create_task(members[position].reduce.reduce(group, Shards.of(inputs[position])))
        await asyncio.sleep(0.02)  # lets this member call the others before they know of the group
    return await asyncio.gather(*(tasks[position] for position in range(len(members))), return_exceptions=True)


def joined(reduced: Reduced | BaseException) -> bytes:
    assert isinstance(reduced, Reduced), reduced
    return bytes(reduced.data)


async def call(caller: Member, callee: Member, requests: AsyncIterator[AveragingData]) -> list[AveragingData]:
    """Talk to a member's service with hivemind's own stub: neither `Link` nor the runner is in the way."""
    stub = ReduceService.get_stub(caller.p2p, callee.p2p.peer_id, namespace=NAMESPACE)
    return [answer async for answer in await stub.rpc_aggregate_part(requests)]


def part_message(data: bytes) -> AveragingData:
    return AveragingData(tensor_part=WireTensor(buffer=data))


async def hello(group_id: bytes, *then: AveragingData) -> AsyncIterator[AveragingData]:
    yield AveragingData(code=PART_FOR_AVERAGING, group_id=group_id)
    for message in then:
        yield message
