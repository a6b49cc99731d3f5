"""hivemind's butterfly all-reduce: every member sums an equal share of all parts, and encodes each sum once.

Owns: which member sums what, and when a member is late with a part. `runner.py` has the talk, `merge.py` the sums. Must
not know: streams, what the shards mean.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from pathlib import Path

import structlog

from peer.averaging.group_message import GroupMessage
from peer.averaging.link import Inbox, Link
from peer.averaging.merge import MergeStopped, OrderedMerger
from peer.averaging.parts import cut
from peer.averaging.reduce import ReduceGroup, Shards
from peer.averaging.runner import GroupRunner
from peer.averaging.taken import Taken
from peer.codecs import Buffer
from protocol.errors import LocalFault, StorageError, WireError

log = structlog.get_logger()


class ButterflyRunner(GroupRunner):
    """A reduce in which the makers of parts are reducers: each needs that part of all members."""

    sees_everything = False

    def __init__(
        self, link: Link, *, group: ReduceGroup, shards: Shards, namespace: str, folder: Path | None = None
    ) -> None:
        """As `GroupRunner`."""
        parts = cut(shards.lengths, num_members=len(group.members))
        super().__init__(link, group=group, shards=shards, parts=parts, namespace=namespace, folder=folder)
        self.tensor_part_reducer = OrderedMerger(
            self._codec,
            [part.length for part in self._parts_of(self._me)],
            num_senders=len(group.members),
            factors=group.factors,
        )
        self._squares = self.tensor_part_reducer.squares
        self._has_room = asyncio.Event()

    async def _make_room(self) -> None:
        try:
            await super()._make_room()
            if self._group.keeps:
                self.taken = await asyncio.to_thread(self._make_room_for_taken)
        finally:
            self._has_room.set()

    def _make_room_for_taken(self) -> Taken | None:
        try:
            own = self._parts_of(self._me)
            return Taken(own, num_members=self.group_size, using=self._codec, folder=self._folder)
        except StorageError as error:  # the sum needs none of it; we cannot say afterwards what we were sent
            log.warning("reduce.not_kept", error=error.one_line())
            return None

    async def _make_own_parts(self) -> None:
        """Contribute to the parts we reduce, and see to it that the others do so in time."""
        for slot, part in enumerate(self._parts_of(self._me)):
            sent = self._codec.encode(await self._values(part))
            values = self._codec.decode(sent, part.length)
            await self._keep(self._me, slot, sent)
            merging = asyncio.create_task(self.tensor_part_reducer.accumulate_part(self._me, slot, values))
            try:
                await asyncio.wait({merging}, timeout=self.sender_timeout)
                if not merging.done() and (late := self.tensor_part_reducer.missing(slot)):
                    raise self._blame(late[0], f"sent no part for {self.sender_timeout:g} s")
                self._take_result(part, await merging)
            except WireError as error:
                raise LocalFault(f"our own shards cannot be summed: {error}") from None
            except MergeStopped:
                return
            finally:
                merging.cancel()
                await asyncio.gather(merging, return_exceptions=True)  # its `MergeStopped` is nobody's news

    async def _parts_for(self, maker: int) -> AsyncGenerator[bytes, None]:
        for part in self._parts_of(maker):
            yield self._codec.encode(await self._values(part))

    async def _own_parts(self, inbox: Inbox[GroupMessage], member: int) -> AsyncGenerator[bytes, None]:
        for slot, part in enumerate(self._parts_of(self._me)):
            request = await self._next_request(inbox, member)
            try:
                values = self._codec.decode(request.data, part.length)
                await self._keep(member, slot, request.data)
                merged = await self.tensor_part_reducer.accumulate_part(member, slot, values)
            except WireError as error:
                raise self._blame(member, f"sent a bad part ({error})") from None
            yield merged

    async def _keep(self, member: int, slot: int, data: Buffer) -> None:
        """Keep what was sent, as it came. Members may send before there is room."""
        await self._has_room.wait()
        try:
            if self.taken is not None:
                self.taken.put(member, slot, data)
        except StorageError as error:
            log.warning("reduce.not_kept", error=error.one_line())
            self.taken = None
