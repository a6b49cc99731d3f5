"""Everybody gets everybody's contribution as it was sent: the reduce for codecs whose sums cannot be encoded again.

Of a sparse contribution a few values are sent, and no two members send the same ones: their sum has more of them than
the codec has room for. So the result is the contributions themselves, in member order, and whoever decodes it
adds them up in that order (`peer.averaging.reduce.decoded_parts`).

Owns: who makes which part of the result: each member its own. `runner.py` has the talk. Must not know: streams, what
the shards mean.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from pathlib import Path

from hivemind.utils.asyncio import as_aiter
from torch import Tensor

from peer.averaging.group_message import GroupMessage
from peer.averaging.link import Inbox, Link
from peer.averaging.merge import check_summable, squares
from peer.averaging.parts import Part, cut_for_each
from peer.averaging.reduce import ReduceGroup, Shards
from peer.averaging.runner import GroupRunner


class ExchangeRunner(GroupRunner):
    """A reduce in which every member makes the parts of one contribution, and needs nothing for it."""

    sees_everything = True

    def __init__(
        self, link: Link, *, group: ReduceGroup, shards: Shards, namespace: str, folder: Path | None = None
    ) -> None:
        """As `GroupRunner`."""
        parts = cut_for_each(shards.lengths, num_members=len(group.members))
        super().__init__(link, group=group, shards=shards, parts=parts, namespace=namespace, folder=folder)
        self._grown = asyncio.Event()
        self.acceptance_timeout_s = None  # nobody waits for anybody's parts, so links of all speeds end when they do

    def _check(self, maker: int, values: Tensor) -> None:
        check_summable(values, num_senders=self.group_size)
        self._squares[maker] += squares(values)

    def finalize(self, *, cancel: bool = False, exception: BaseException | None = None) -> None:
        super().finalize(cancel=cancel, exception=exception)
        self._grown.set()

    async def _make_own_parts(self) -> None:
        for part in self._parts_of(self._me):
            values = await self._values(part)
            self._take_result(part, await asyncio.to_thread(self._codec.encode, values))
            self._grown.set()

    def _parts_for(self, maker: int) -> AsyncGenerator[bytes, None]:
        nothing: AsyncGenerator[bytes, None] = as_aiter()
        return nothing

    async def _own_parts(self, inbox: Inbox[GroupMessage], member: int) -> AsyncGenerator[bytes, None]:
        for part in self._parts_of(self._me):
            yield await self._made_part(part)

    async def _made_part(self, part: Part) -> bytes:
        """Return a part of our own contribution as soon as it is encoded; raise if the reduce fails first."""
        while part.index not in self._results:
            if (failure := self._failure()) is not None:
                raise failure
            self._grown.clear()
            await self._grown.wait()
        return bytes(self.result[self._offsets[part.index] : self._offsets[part.index + 1]])
