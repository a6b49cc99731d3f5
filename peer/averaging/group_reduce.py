"""The swarm's `Reduce`: a butterfly for codecs whose sums can be encoded again, an exchange for those whose cannot.

Owns: `GroupReduce`, one per process: checks what it is asked to sum, runs one runner per group (`butterfly.py`,
`exchange.py`), and puts the result together. Sits between the steward, who decides the group, and the runner. Must not
know: rounds, commits, what the shards mean.
"""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

import structlog
from hivemind.p2p import P2P

from peer.averaging.butterfly import ButterflyRunner
from peer.averaging.exchange import ExchangeRunner
from peer.averaging.link import Link, from_hivemind
from peer.averaging.reduce import (
    Reduced,
    ReduceError,
    ReduceGroup,
    Shards,
    encode_shard,
    encoded_shard_bytes,
)
from peer.averaging.reduce_service import ReduceService
from peer.averaging.spool import Spool
from peer.averaging.taken import Taken
from peer.codecs import codec
from protocol.errors import LocalFault
from protocol.ids import Digest, digest
from protocol.transport.passes import Passes
from protocol.transport.throttle import Line

log = structlog.get_logger()

EARLY_WAIT_S = 10.0  # for a member that gets the steward's list a little later than the others


class GroupReduce:
    """Sums shards over groups. One per process and namespace; any number of groups at a time."""

    def __init__(
        self,
        p2p: P2P,
        *,
        namespace: str,
        folder: Path | None = None,
        line: Line | None = None,
        passes: Passes | None = None,
        early_wait_s: float = EARLY_WAIT_S,
    ) -> None:
        """Long results are put into `folder` while they come in; without one they are in memory.

        `passes` shows ours to whom we call, and its door says who may come in.
        """
        self._link, self._passes = Link(p2p, line, passes=passes), passes
        self._namespace, self._folder = namespace, folder
        self._service = ReduceService(from_hivemind(p2p.peer_id), early_wait_s=early_wait_s)

    async def start(self) -> None:
        """Begin to answer other members."""
        if self._passes is not None:
            self._passes.door.on_banned.append(self._link.hang_up_on)
        await self._service.add_p2p_handlers(self._link, namespace=self._namespace)

    async def stop(self) -> None:
        """Stop answering. Reduces under way belong to their callers, who cancel them first."""
        if self._passes is not None:
            self._passes.door.on_banned.remove(self._link.hang_up_on)
        await self._service.remove_p2p_handlers(self._link, namespace=self._namespace)

    async def reduce(self, group: ReduceGroup, shards: Shards) -> Reduced:
        """Sum `shards` over `group` (see `peer.averaging.reduce.Reduce`)."""
        me = from_hivemind(self._link.peer_id)
        if me not in group.members:
            raise ValueError(f"{me} is no member of the group it is asked to reduce with")
        started_s = time.monotonic()
        if len(group.members) == 1:
            result = await asyncio.to_thread(_encode_alone, group, shards, self._folder)
            return _reduced(group, shards, result, await asyncio.to_thread(digest, result), started_s)
        kind = ButterflyRunner if codec(group.codec).is_dense else ExchangeRunner
        runner = kind(self._link, group=group, shards=shards, namespace=self._namespace, folder=self._folder)
        with self._service.serving(group.group_id, runner):
            await self._service.announce()
            try:
                total = await runner.reduce()
            except (ReduceError, LocalFault) as error:
                self._service.say_farewell(group.group_id, runner.farewell())
                blamed = error.peer if isinstance(error, ReduceError) else me
                log.info("reduce.failed", group=group.group_id.hex(), blamed=blamed, reason=str(error))
                if isinstance(error, LocalFault):
                    raise
                if not await self._link.is_daemon_alive():
                    raise ReduceError("this peer's own p2p daemon is gone", peer=me) from None
                raise
        return _reduced(
            group,
            shards,
            runner.result,
            total,
            started_s,
            sent=runner.bytes_sent,
            received=runner.bytes_received,
            taken=runner.taken,
        )


def _encode_alone(group: ReduceGroup, shards: Shards, folder: Path | None) -> memoryview:
    """Sum over ourselves: nothing is added to what we have, so it is encoded once. Takes long; not for the loop."""
    name = group.codec
    factor = group.factors[0] if group.factors else 1.0
    spool = Spool(sum(encoded_shard_bytes(name, length) for length in shards.lengths), folder)
    offset = 0
    for shard, length in enumerate(shards.lengths):  # each is read once, and not at all if nothing is in it
        if length:
            data = encode_shard(name, shards.part(shard, 0, length), factor=factor)
            spool.put(offset, data)
            offset += len(data)
    return spool.view


def _reduced(
    group: ReduceGroup,
    shards: Shards,
    result: memoryview,
    total: Digest,
    started_s: float,
    *,
    sent: int = 0,
    received: int = 0,
    taken: Taken | None = None,
) -> Reduced:
    return Reduced(
        codec=group.codec,
        shard_elements=shards.lengths,
        data=result,
        digest=total,
        bytes_sent=sent,
        bytes_received=received,
        seconds=time.monotonic() - started_s,
        taken=taken,
    )
