"""The one handler behind which all reduces of this process live.

Owns: routing an incoming stream to the live reduce that its first message names, letting calls that come a
little too early wait, and bounding what callers can occupy. Must not know: tensors, sums. The runners in
`runner.py` do the talking.
"""

from __future__ import annotations

import asyncio
from collections import Counter, OrderedDict
from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing, contextmanager
from typing import AsyncIterator, Protocol  # noqa: UP035 - hivemind reads these hints and knows only typing's form

import structlog
from hivemind.p2p import P2PContext, PeerID, ServicerBase
from hivemind.proto.averaging_pb2 import BAD_GROUP_ID, PROTOCOL_VIOLATION, AveragingData
from hivemind.utils.asyncio import achain, as_aiter

from peer.averaging.group_message import GroupMessage
from peer.averaging.link import Inbox
from peer.averaging.reduce import MAX_GROUP_ID_BYTES, ReduceError
from protocol.errors import SwarmError
from protocol.ids import PeerId
from protocol.transport.dial import LAST_WORD_S

log = structlog.get_logger()

HELLO_TIMEOUT_S = 10.0
MAX_EARLY_CALLS_PER_CALLER = 8  # more stages than two peers are likely to share
MAX_FAREWELLS = 64


class Runner(Protocol):
    """What can be routed to."""

    def rpc_aggregate_part(
        self, stream: AsyncIterator[GroupMessage], context: P2PContext
    ) -> AsyncGenerator[AveragingData, None]:
        """Serve one member's stream."""


class ReduceService(ServicerBase):  # type: ignore[misc]
    """hivemind's averaging handler, for any number of groups at a time."""

    def __init__(self, me: PeerId, *, early_wait_s: float) -> None:
        self._me = me
        self._early_wait_s = early_wait_s
        self._live: dict[bytes, Runner] = {}
        self._farewells: OrderedDict[bytes, GroupMessage] = OrderedDict()
        self._early: Counter[PeerID] = Counter()
        self._changed = asyncio.Condition()

    @contextmanager
    def serving(self, group_id: bytes, runner: Runner) -> Iterator[None]:
        """Route calls for `group_id` to `runner` while the block runs.

        Raises `ReduceError` if that id has been used before: whoever wants the reduce may ask for it twice, by mistake
        or not. It blames ourselves, for nobody else can be known to have failed.
        """
        if group_id in self._live or group_id in self._farewells:
            raise ReduceError(f"group id {group_id.hex()} has been used before", peer=self._me)
        self._live[group_id] = runner
        try:
            yield
        finally:
            del self._live[group_id]
            self.say_farewell(group_id, GroupMessage(code=BAD_GROUP_ID))

    async def announce(self) -> None:
        """Wake the calls that came early. Call it inside `serving`."""
        async with self._changed:
            self._changed.notify_all()

    def say_farewell(self, group_id: bytes, message: GroupMessage) -> None:
        """Answer later calls for `group_id`, which has ended, with `message`. The first farewell stays."""
        self._farewells.setdefault(group_id, message)
        while len(self._farewells) > MAX_FAREWELLS:
            self._farewells.popitem(last=False)

    async def rpc_aggregate_part(
        self, stream: AsyncIterator[AveragingData], context: P2PContext
    ) -> AsyncIterator[AveragingData]:
        """A caller wants to take part in the group that its first message names."""
        try:
            async with asyncio.timeout(HELLO_TIMEOUT_S):
                hello = await anext(stream)
        except (TimeoutError, StopAsyncIteration, SwarmError):
            return
        runner = await self._route(hello.group_id, context.remote_id)
        if not isinstance(runner, GroupMessage):
            async with aclosing(runner.rpc_aggregate_part(achain(as_aiter(hello), stream), context)) as answers:
                async for answer in answers:
                    yield answer
        else:
            yield runner
            await Inbox(stream).wait_ended(timeout_s=LAST_WORD_S)

    async def _route(self, group_id: bytes, caller: PeerID) -> Runner | GroupMessage:
        """Return the runner of a group, waiting for it a while, or the message that says there is none."""
        if not 0 < len(group_id) <= MAX_GROUP_ID_BYTES or self._early[caller] >= MAX_EARLY_CALLS_PER_CALLER:
            log.info("reduce.refused", caller=str(caller), reason="bad group id or too many calls")
            return GroupMessage(code=PROTOCOL_VIOLATION)
        self._early[caller] += 1
        try:
            async with asyncio.timeout(self._early_wait_s), self._changed:
                await self._changed.wait_for(lambda: group_id in self._live or group_id in self._farewells)
        except TimeoutError:
            return GroupMessage(code=BAD_GROUP_ID)
        finally:
            self._early[caller] -= 1
            if not self._early[caller]:
                del self._early[caller]
        return self._live.get(group_id) or self._farewells[group_id]
