"""A reduce among members who have to show passes. Oracles: sums that come about or do not; what each door has seen."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
from hivemind.p2p import P2P

from peer.averaging.group_reduce import GroupReduce
from peer.averaging.link import from_hivemind
from peer.averaging.reduce import Reduced
from protocol.access import Door, revoke
from protocol.ids import RunId
from protocol.records import admit
from protocol.signing import SigningKey
from protocol.transport.calls import Calls
from protocol.transport.passes import Passes
from protocol.transport.streams import Streams
from tests.peer.averaging.reduce_members import NAMESPACE, Member, make_group, make_shards, reduce_all

pytestmark = pytest.mark.slow  # every test starts two daemons

RUN = RunId("ab" * 16)
COORDINATOR = SigningKey.generate()
LENGTHS = (1000, 50)


@asynccontextmanager
async def members() -> AsyncIterator[tuple[list[Member], list[Passes]]]:
    """Start two members, each with a pass."""
    first = await P2P.create()
    both = [first, await P2P.create(initial_peers=await first.get_visible_maddrs())]
    made, passes, streams = [], [], []
    for p2p in both:
        me, door = from_hivemind(p2p.peer_id), Door(RUN, COORDINATOR.peer_id)
        own_streams = Streams(p2p, door=door)
        calls = Calls(own_streams, run=RUN)
        own = Passes(calls, own_streams, door, me=me)
        own.own = admit(COORDINATOR, run=RUN, peer=me, name="x", issued_s=int(time.time()), valid_hours=1.0)
        own.serve()
        await calls.serve()
        reduce = GroupReduce(p2p, namespace=NAMESPACE, passes=own, early_wait_s=2.0)
        await reduce.start()
        await p2p.wait_for_at_least_n_peers(1)
        made.append(Member(p2p, reduce))
        passes.append(own)
        streams.append(own_streams)
    try:
        yield made, passes
    finally:
        for member, own_streams in zip(made, streams, strict=True):
            await member.reduce.stop()
            await own_streams.stop()
            await member.p2p.shutdown()


async def succeeds(made: list[Member]) -> bool:
    results = await reduce_all(made, make_group(made), [make_shards(seed, LENGTHS) for seed in range(2)])
    return all(isinstance(result, Reduced) for result in results)


async def test_members_show_each_other_their_passes_by_themselves() -> None:
    async with members() as (made, passes):
        assert await succeeds(made)
        assert all(own.door.is_admitted(other.peer) for own, other in zip(passes, reversed(made), strict=True))


async def test_without_a_pass_nobody_is_summed_with() -> None:
    async with members() as (made, passes):
        passes[0].own = None
        assert not await succeeds(made)


async def test_a_restarted_reducer_is_shown_the_pass_again() -> None:
    """It has forgotten its guests, and cannot say so in this protocol: it hangs up. One averaging is lost, no more."""
    async with members() as (made, passes):
        assert await succeeds(made)
        passes[1].door._guests.clear()
        assert not await succeeds(made)
        assert await succeeds(made)


async def test_a_ban_ends_the_streams_of_a_reduce() -> None:
    """The banned one waits in a group of whom the other has not heard. Oracle: its stream ends at once."""
    async with members() as (made, passes):
        assert await succeeds(made)
        shards = [make_shards(0, LENGTHS)]
        lonely = asyncio.create_task(reduce_all(made[:1], make_group(made), shards))
        link = made[1].reduce._link
        for _ in range(200):
            if link._serving:
                break
            await asyncio.sleep(0.01)
        assert link._serving
        passes[1].door.learn(revoke(COORDINATOR, run=RUN, number=1, issued_s=1.0, peers=(made[0].peer,)))
        await asyncio.sleep(0.2)
        assert not link._serving
        (result,) = await lonely
        assert not isinstance(result, Reduced)
        assert not await succeeds(made)
