"""One reduce of one group, seen from one member: the same bytes for everybody, or nothing.

Owns: the talk between the members, on `link.py` (the streams). `butterfly.py` and `exchange.py` say what is talked
about: who makes which part of the result, and from what. Must not know: who else is reducing in this process, what
happens to the result.

From hivemind's `AllReduceRunner` come the group's bookkeeping, the stream protocol (each member sends every
reducer its parts and gets each sum back on the same stream), the stubs and the outcome future. Replaced is
what made members end with different bytes: sums in order of arrival, differences that are rounded anew for
each receiver, going on with fewer members, zeros in the place of a dead reducer.

One stream, `AveragingData` messages; a maker is who makes parts of the result (a butterfly's reducer):
    member -> maker    PART_FOR_AVERAGING {group_id}, then what the maker needs of us: {tensor_part.buffer}
    maker  -> member   per part AVERAGED_PART {tensor_part.buffer}
    member -> maker    ACCEPTED {tensor_part.buffer = digest of the whole result, and how long everybody's values were
                       that it has added up (fp64 squares, one per member, if others cannot know)}, end of stream
    either way         CANCELLED {peer_id = whom we blame}: the reduce has failed
A member accepts only when it holds *all* results, and returns only when all others have accepted and name the
same digest. So a maker that tells members different things is found out, and a death before the end fails
everybody; only one in the very last message can leave some with a result and some without, which is what the
steward's commit is for.
"""

from __future__ import annotations

import asyncio
import itertools
import math
import struct
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine, Sequence
from contextlib import aclosing
from pathlib import Path
from typing import Any

import structlog
from hivemind.averaging.allreduce import AllReduceRunner
from hivemind.p2p import P2PContext, PeerID
from hivemind.proto.averaging_pb2 import (
    ACCEPTED,
    AVERAGED_PART,
    CANCELLED,
    PART_FOR_AVERAGING,
    PROTOCOL_VIOLATION,
    MessageCode,
)
from torch import Tensor

from peer.averaging.group_message import GroupMessage
from peer.averaging.link import CallContext, Exchange, Inbox, Link, Traffic, to_hivemind
from peer.averaging.merge import MergeStopped
from peer.averaging.parts import Part
from peer.averaging.reduce import ReduceError, ReduceGroup, Shards
from peer.averaging.reduce_service import ReduceService
from peer.averaging.spool import Spool
from peer.averaging.taken import Taken
from peer.codecs import Buffer, codec
from protocol.errors import PeerFault, SwarmError, TransientError, WireError
from protocol.ids import DIGEST_BYTES, Digest, RunningDigest
from protocol.transport.dial import LAST_WORD_S

log = structlog.get_logger()

NORM_SLACK = 1.1  # codecs round, and noise adds to a norm
HASHED_BYTES = 4 << 20  # at a time, in another thread: a few milliseconds


class GroupRunner(AllReduceRunner, ABC):  # type: ignore[misc]
    """One reduce of one group, seen from one member. Use it once."""

    def __init__(
        self,
        link: Link,
        *,
        group: ReduceGroup,
        shards: Shards,
        parts: Sequence[Part],
        namespace: str,
        folder: Path | None = None,
    ) -> None:
        """`parts` make up the result, in order. `folder` is for long results, which then are not in memory."""
        members = tuple(to_hivemind(member) for member in group.members)
        super().__init__(
            p2p=link,
            servicer_type=ReduceService,
            prefix=namespace,
            group_id=group.group_id,
            tensors=(),  # hivemind's own containers stay empty: the cut, the sums and the results are ours
            ordered_peer_ids=members,
            peer_fractions=(1.0,) * len(members),
            sender_timeout=group.timeouts.sender_s,
            reducer_timeout=group.timeouts.reducer_s,
        )
        self._group, self._shards, self._codec = group, shards, codec(group.codec)
        self._me = members.index(link.peer_id)
        self._parts = tuple(parts)
        sizes = [self._codec.encoded_bytes(part.length) for part in self._parts]
        self._offsets = [0, *itertools.accumulate(sizes)]
        self.taken: Taken | None = None
        """What we were sent to add up, if the group keeps that."""
        self._squares = [0.0] * len(members)
        """How long what each member contributed was, as far as we have seen it, squared."""
        self._folder = folder
        self._spool: Spool | None = None
        self._results: set[int] = set()
        self._more_results = asyncio.Event()
        self._digest: Digest | None = None
        self._settled = asyncio.Event()  # the digest is known, or the reduce has failed
        self._accepted: dict[int, bytes] = {}
        self._someone_accepted = asyncio.Event()
        self._serving: set[asyncio.Task[Any]] = set()
        self._traffic: list[Traffic] = []
        self.acceptance_timeout_s = group.timeouts.reducer_s

    async def reduce(self) -> Digest:
        """Run to the end and return the digest of `result`. Raises `ReduceError` or `LocalFault`."""
        deadline = asyncio.get_running_loop().call_later(self._group.timeouts.deadline_s, self._fail_at_deadline)
        stopped = False
        try:
            async with asyncio.TaskGroup() as tasks:
                try:
                    await self._work(tasks)
                except asyncio.CancelledError:  # before the tasks see it: they tell the others why
                    stopped = self._failure() is None
                    self.finalize(exception=self._blame(self._me, "was stopped"))
                    raise
        except BaseExceptionGroup as failures:
            raise self._first_cause(failures, stopped=stopped) from None
        finally:
            deadline.cancel()
            self.finalize()
            await self._end_serving()
        assert self._digest is not None
        return self._digest

    async def run(self) -> AsyncIterator[bytes]:
        """As hivemind's `run`, but what is yielded are the encoded sums, in order, once all members have them."""
        await self.reduce()
        for start, end in itertools.pairwise(self._offsets):
            yield bytes(self.result[start:end])

    @property
    def result(self) -> memoryview:
        """The encoded sums of all parts, in order."""
        assert self._spool is not None, "there is room for them once the reduce has begun"
        return self._spool.view

    @property
    def bytes_sent(self) -> int:
        return sum(traffic.sent for traffic in self._traffic)

    @property
    def bytes_received(self) -> int:
        return sum(traffic.received for traffic in self._traffic)

    def farewell(self) -> GroupMessage:
        """What to tell members who call after this reduce has failed."""
        error = self._failure()
        blamed = error.peer if isinstance(error, ReduceError) else self._group.members[self._me]
        return GroupMessage(code=CANCELLED, peer_id=to_hivemind(blamed).to_bytes())

    def finalize(self, *, cancel: bool = False, exception: BaseException | None = None) -> None:
        """Settle the outcome; the first one stands. As in hivemind, from any side and any number of times."""
        if not self._future.done():
            super().finalize(cancel=cancel, exception=exception)
            if not self._future.cancelled():
                self._future.exception()  # seen: `_watch` may be gone already
        self._settled.set()

    # --- what kinds of reduce differ in -----------------------------------------------------------------

    @abstractmethod
    async def _make_own_parts(self) -> None:
        """Put the parts that are ours to make into the result."""

    @abstractmethod
    def _parts_for(self, maker: int) -> AsyncGenerator[bytes, None]:
        """Yield what a maker needs of us."""

    @abstractmethod
    def _own_parts(self, inbox: Inbox[GroupMessage], member: int) -> AsyncGenerator[bytes, None]:
        """Yield the parts that we make, for a member, from whose stream comes what we need of it."""

    sees_everything: bool
    """Whether every member decodes all that the others contribute, or only what it adds up itself."""
    acceptance_timeout_s: float | None
    """How long everybody may take to accept once we have the result; None: until the deadline."""

    def _check(self, maker: int, values: Tensor) -> None:
        """Raise `WireError` for decoded values that a maker should not have sent."""

    # --- our own side ---------------------------------------------------------------------------------

    async def _work(self, tasks: asyncio.TaskGroup) -> None:
        watch = tasks.create_task(self._watch())
        await self._guard(self._make_room)
        tasks.create_task(self._guard(self._make_own_parts))
        others = [peer for peer in self.ordered_peer_ids if peer != self.peer_id]
        talks = [tasks.create_task(self._guard(self._communicate_with_peer, peer)) for peer in others]
        self._digest = await self._digest_of_results()
        self._settled.set()
        await self._guard(self._wait_until_all_accepted)
        _, unended = await asyncio.wait(talks, timeout=self.reducer_timeout)
        for task in (watch, *unended):  # all have accepted: a stream that is not closed properly costs nobody anything
            task.cancel()

    async def _make_room(self) -> None:
        """Make room for the result while others are served already: if there is none, they hear of it at once."""
        # in a thread: some file systems make room by writing all of it
        self._spool = await asyncio.to_thread(Spool, self._offsets[-1], self._folder)

    async def _watch(self) -> None:
        """Raise what a served stream or the deadline has reported."""
        await asyncio.wait({self._future})
        self._future.result()

    async def _guard(self, work: Callable[..., Coroutine[Any, Any, None]], *args: object) -> None:
        """Settle the outcome before an error cancels the others, so that they know whom to blame."""
        try:
            await work(*args)  # begun here: a task that is cancelled before it begins leaves nothing behind
        except SwarmError as error:
            self.finalize(exception=error)
            raise

    async def _communicate_with_peer(self, peer_id: PeerID) -> None:
        """Send a reducer our parts, take its sums, accept, and wait for it to end the stream."""
        reducer = self.ordered_peer_ids.index(peer_id)
        try:
            exchange: Exchange = await self._get_peer_stub(peer_id).rpc_aggregate_part(
                self._generate_input_for_peer(reducer)
            )
        except (TransientError, PeerFault) as error:
            raise self._blame(reducer, f"cannot be reached ({error})") from None
        self._traffic.append(exchange.traffic)
        try:
            for part in self._parts_of(reducer):
                self._take_result(part, await self._next_sum(exchange, reducer, part))
            # The end comes after our acceptance, which has to wait for the slowest of all reducers: no clock here.
            if await self._next_answer(exchange, reducer, timeout_s=None) is not None:
                raise self._blame(reducer, "sent more sums than it has parts")
        finally:
            await exchange.aclose(grace_s=LAST_WORD_S if self._failure() else 0.0)

    async def _generate_input_for_peer(self, maker: int) -> AsyncGenerator[GroupMessage, None]:
        yield GroupMessage(code=PART_FOR_AVERAGING, group_id=self.group_id)
        async with aclosing(self._parts_for(maker)) as parts:
            while not self._future.done():
                try:
                    data = await anext(parts, None)
                except SwarmError as error:
                    self.finalize(exception=error)
                    break
                if data is None:
                    break
                yield GroupMessage(data=data)
        await self._settled.wait()
        if self._failure() or self._digest is None:
            yield self.farewell()
        else:
            told = [] if self.sees_everything or not self._group.norms else self._squares
            yield GroupMessage(code=ACCEPTED, data=self._digest + struct.pack(f"<{len(told)}d", *told))

    async def _next_sum(self, exchange: Exchange, reducer: int, part: Part) -> Buffer:
        answer = await self._next_answer(exchange, reducer, timeout_s=self.reducer_timeout)
        if answer is None:
            raise self._blame(reducer, "ended the stream before its last sum")
        try:
            self._check(reducer, self._codec.decode(answer.data, part.length))  # now, while nothing depends on it
        except WireError as error:
            raise self._blame(reducer, f"sent a bad sum ({error})") from None
        return answer.data

    async def _next_answer(self, exchange: Exchange, reducer: int, *, timeout_s: float | None) -> GroupMessage | None:
        """Return the reducer's next message, which must be a sum; None if it has ended the stream."""
        try:
            async with asyncio.timeout(timeout_s):
                answer = await anext(exchange, None)
        except TimeoutError:
            raise self._blame(reducer, f"sent nothing for {timeout_s:g} s") from None
        except SwarmError as error:
            raise self._blame(reducer, f"broke the protocol ({error})") from None
        if answer is None:
            return None
        if answer.code == CANCELLED:
            raise self._relayed_blame(reducer, answer)
        if answer.code != AVERAGED_PART:
            raise self._blame(reducer, f"refused us ({_code_name(answer.code)})")
        return answer

    def _take_result(self, part: Part, data: Buffer) -> None:
        assert self._spool is not None, "nobody is asked for a sum before there is room for it"
        self._spool.put(self._offsets[part.index], data)
        self._results.add(part.index)
        self._more_results.set()

    async def _digest_of_results(self) -> Digest:
        """Wait for all results; what is there from the first one on is hashed while the rest comes in."""
        running, begin, end = RunningDigest(), 0, 0  # parts: hashed, and there
        while end < len(self._parts):
            self._more_results.clear()
            while end in self._results:
                end += 1
            start, stop = self._offsets[begin], self._offsets[end]
            if end == len(self._parts) or stop - start >= HASHED_BYTES:
                await asyncio.to_thread(running.update, self.result[start:stop])
                begin = end
            else:
                await self._more_results.wait()
        return running.value()

    async def _wait_until_all_accepted(self) -> None:
        try:
            async with asyncio.timeout(self.acceptance_timeout_s):
                while len(self._accepted) < self.group_size - 1:
                    self._someone_accepted.clear()
                    await self._someone_accepted.wait()
        except TimeoutError:
            raise self._blame(self._not_accepted()[0], "did not acknowledge the result") from None
        for member, accepted in sorted(self._accepted.items()):
            if accepted[:DIGEST_BYTES] != self._digest:
                raise self._blame(member, "ended with another result than ours")
        self._check_norms()

    def _check_norms(self) -> None:
        """Raise for a member that has sent more than it said: by that it was weighed."""
        if not self._group.norms:
            return
        seen = [self._squares]
        for maker, accepted in self._accepted.items() if not self.sees_everything else ():
            packed = accepted[DIGEST_BYTES:]
            if len(packed) != 8 * self.group_size:
                raise self._blame(maker, "does not say how much it was sent")
            seen.append([*struct.unpack(f"<{self.group_size}d", packed)])
            if not all(0 <= each < math.inf for each in seen[-1]):
                raise self._blame(maker, "says that it was sent what cannot be")
        for member, norm in enumerate(self._group.norms):
            square = sum(each[member] for each in seen)
            if member != self._me and not square <= (NORM_SLACK * norm) ** 2:
                raise self._blame(member, f"sent values of norm {math.sqrt(abs(square)):.3g}, and had said {norm:.3g}")

    # --- the side that other members call ---------------------------------------------------------------

    async def rpc_aggregate_part(
        self, stream: AsyncIterator[GroupMessage], context: CallContext
    ) -> AsyncGenerator[GroupMessage, None]:
        """A member sends its parts; give it each sum, and take its acceptance of the whole."""
        hello = await anext(stream)
        refusal = self._check_reasons_to_reject(hello, context)
        if refusal is not None:
            log.info("reduce.refused", caller=str(context.remote_id), reason=_code_name(refusal.code))
            yield refusal
            await Inbox(stream).wait_ended(timeout_s=LAST_WORD_S)
            return
        task = asyncio.current_task()
        assert task is not None
        self._serving.add(task)
        sender = self.ordered_peer_ids.index(context.remote_id)
        self.active_senders.add(context.remote_id)
        self._traffic.append(context.traffic)
        inbox = Inbox(stream)
        try:
            async with aclosing(self._accumulate_parts_streaming(inbox, sender)) as sums:
                async for answer in sums:
                    yield answer
        except (asyncio.CancelledError, GeneratorExit):
            if sender not in self._accepted:
                self.finalize(exception=self._blame(sender, "ended its stream before the end"))
            raise
        except (SwarmError, MergeStopped) as error:
            if isinstance(error, SwarmError):
                self.finalize(exception=error)
            yield self.farewell()
            await inbox.wait_ended(timeout_s=LAST_WORD_S)
        finally:
            await inbox.close()
            self._serving.discard(task)

    def _check_reasons_to_reject(self, request: GroupMessage, context: P2PContext) -> GroupMessage | None:
        if context.remote_id in self.ordered_peer_ids and self._failure() is not None:
            return self.farewell()
        if context.remote_id in self.active_senders or request.code != PART_FOR_AVERAGING:
            return GroupMessage(code=PROTOCOL_VIOLATION)
        refusal = super()._check_reasons_to_reject(request, context)  # it looks at the group id
        return None if refusal is None else GroupMessage(code=refusal.code)

    async def _accumulate_parts_streaming(
        self, inbox: Inbox[GroupMessage], sender_index: int
    ) -> AsyncGenerator[GroupMessage, None]:
        async with aclosing(self._own_parts(inbox, sender_index)) as parts:
            async for data in parts:
                yield GroupMessage(code=AVERAGED_PART, data=data)
        request = await self._next_request(inbox, sender_index)
        if request.code != ACCEPTED:
            raise self._blame(sender_index, f"sent {_code_name(request.code)} instead of its acceptance")
        self._accepted[sender_index] = bytes(request.data)
        self._someone_accepted.set()

    async def _next_request(self, inbox: Inbox[GroupMessage], sender: int) -> GroupMessage:
        """Return a sender's next message, or raise if the reduce fails first. The kind of reduce has the clock."""
        try:
            request = await inbox.next_unless(self._future)
        except (TransientError, WireError) as error:
            raise self._blame(sender, f"is gone or garbled ({error})") from None
        if (failure := self._failure()) is not None:
            raise failure
        if request is None:
            raise self._blame(sender, "ended its stream before the end")
        if request.code == CANCELLED:
            raise self._relayed_blame(sender, request)
        return request

    async def _end_serving(self) -> None:
        """Wait for the streams that members opened to us, so that nothing of this reduce is left running."""
        if self._serving:
            await asyncio.wait(self._serving, timeout=LAST_WORD_S)
        for task in self._serving:
            task.cancel()
        if self._serving:
            await asyncio.wait(self._serving, timeout=LAST_WORD_S)

    # --- small things ---------------------------------------------------------------------------------

    def _parts_of(self, reducer: int) -> list[Part]:
        return [part for part in self._parts if part.reducer == reducer]

    async def _values(self, part: Part) -> Tensor:
        return await self._shards.part_soon(part.shard, part.start, part.length)

    def _failure(self) -> SwarmError | None:
        if not self._future.done() or self._future.cancelled():
            return None
        error = self._future.exception()
        return error if isinstance(error, SwarmError) else None

    def _blame(self, member: int, what: str) -> ReduceError:
        peer = self._group.members[member]
        return ReduceError(f"reduce failed: {peer} {what}", peer=peer)

    def _relayed_blame(self, member: int, message: GroupMessage) -> ReduceError:
        """Read a CANCELLED message. A name from outside the group is the messenger's own doing."""
        witness = self._group.members[member]
        named = [m for m, peer_id in enumerate(self.ordered_peer_ids) if peer_id.to_bytes() == message.peer_id]
        if named in ([], [member]):
            return self._blame(member, "gave up")
        peer = self._group.members[named[0]]
        return ReduceError(f"reduce failed: {witness} gave up because of {peer}", peer=peer, witness=witness)

    def _not_accepted(self) -> list[int]:
        return [member for member in range(self.group_size) if member != self._me and member not in self._accepted]

    def _fail_at_deadline(self) -> None:
        owing = [part.reducer for part in self._parts if part.index not in self._results and part.reducer != self._me]
        late = (owing or self._not_accepted() or [self._me])[0]
        self.finalize(
            exception=self._blame(late, f"was not done within the deadline of {self._group.timeouts.deadline_s:g} s")
        )

    def _first_cause(self, failures: BaseExceptionGroup[BaseException], *, stopped: bool) -> BaseException:
        """Return our own bug if there is one, else our caller's cancellation, else what failed first."""
        bugs = [error for error in failures.exceptions if not isinstance(error, SwarmError)]
        if bugs:
            return bugs[0]
        return asyncio.CancelledError() if stopped else self._failure() or failures


def _code_name(code: int) -> str:
    return MessageCode.Name(code) if code in MessageCode.values() else f"code {code}"
