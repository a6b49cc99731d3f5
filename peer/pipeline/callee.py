"""The serving end of a hop: let tasks in, keep them alive beyond their streams, answer.

Owns: slots, the table of hosted tasks, progress frames, and how long an answer is kept. A task is a
task of ours once its body has arrived whole; its stream is only one way to hear about it. Must not know:
what is computed (`work` is given), nor rounds beyond the gate. The calling end is `caller.py`.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field, replace

import structlog

from peer.pipeline.caller import hop_protocol
from peer.pipeline.gate import Gate
from peer.pipeline.slots import SlotPool
from peer.tasks import Body, DownstreamFailed, Outcome, Pulse, RoundOver, TaskId
from protocol.errors import DeadlineError, PeerFault, SwarmError, TransientError, WireError
from protocol.hops import (
    Accepted,
    Answer,
    AnswerStatus,
    BodyEnd,
    Busy,
    OpenTask,
    Progress,
    Received,
    RefusalCode,
    Refused,
    ResumeTask,
)
from protocol.ids import Digest, PeerId, RoundId, RunId, StageId
from protocol.transport.streams import Stream, Streams

log = structlog.get_logger()

HEADER_TIMEOUT_S = 10.0
SLOT_WAIT_S = 2.0  # a caller waits in line this long before it is told to try elsewhere
SLOT_TTL_S = 15.0  # a granted slot lapses if the body is not there by then, plus what its size takes on a slow link
MIN_BYTES_PER_S = 64 * 1024
MAX_UNFETCHED_PER_CALLER = 16  # answers that nobody came for; an honest caller leaves one only when its stream breaks
MAX_UNFETCHED = 64  # from all callers together: a peer id costs a stranger nothing
MAX_RETRIES = 8
RETRY_AFTER_S = 0.2
PROGRESS_EVERY_S = 0.5
RECEIVED_TIMEOUT_S = 30.0
LAST_WORDS_S = 1.0  # for callers of a span that ends

Work = Callable[["HostedTask"], Awaitable[Outcome]]


@dataclass(frozen=True, slots=True)
class TaskKey:
    """What makes two requests the same task: who asks, what for, and with which bytes."""

    caller: PeerId
    task: TaskId
    stage: StageId
    body_digest: Digest


@dataclass(slots=True)
class HostedTask:
    """A task that this peer has taken on."""

    key: TaskKey
    body: Body
    deadline_s: float
    retries_left: int
    pulse: Pulse
    result: asyncio.Task[Outcome] | None = field(default=None)


class HopServer:
    """Serves hops into the span that this peer hosts."""

    def __init__(
        self,
        *,
        run: RunId,
        codec: str,
        streams: Streams,
        gate: Gate,
        work: Work,
        on_answered: Callable[[HostedTask, Outcome], None],
        on_received: Callable[[TaskId, int], None],
        body_bytes: Callable[[tuple[int, ...]], int],
        load_s: Callable[[], float],
        jobs_done: Callable[[], int],
        num_slots: Callable[[], int],
        num_numbers: Callable[[RoundId], int],
        round_deadline_s: float,
    ) -> None:
        """`work` runs a task to its end; `on_received` hears of what a caller has got, and its target tokens.

        `on_answered` hears of every answer that went out whole, received or not, as often as it was sent.

        `body_bytes` gives the exact size of a body of a shape, or raises. `num_numbers` says how many microbatches a
        round has. No caller gets more than `round_deadline_s`.
        """
        self._num_numbers = num_numbers
        self._round_deadline_s = round_deadline_s
        self._jobs_done = jobs_done
        self._run = run
        self._codec = codec
        self._streams = streams
        self._gate = gate
        self._work = work
        self._on_answered = on_answered
        self._on_received = on_received
        self._body_bytes = body_bytes
        self._load_s = load_s
        self._slots = SlotPool(num_slots=num_slots)
        self._tasks: dict[TaskKey, HostedTask] = {}
        self._is_stopped = False
        self._serving: set[asyncio.Task[None]] = set()
        self._taking: dict[asyncio.Timeout, RoundId] = {}
        """Bodies that are coming in, by the deadline that they have."""

    async def serve(self) -> None:
        """Start taking tasks."""
        await self._streams.serve(hop_protocol(self._run), self._answer_stream)

    def end_round(self, round_id: RoundId) -> None:
        """Forget every task of `round_id` and before; whoever still waits for one is told that the round is over.

        Bodies that are still coming in for those rounds are not waited for: they would keep slots from the next one.
        """
        for deadline in [deadline for deadline, taken in self._taking.items() if taken <= round_id]:
            if not deadline.expired():
                deadline.reschedule(0.0)
        for key in [key for key in self._tasks if key.task.round <= round_id]:
            hosted = self._tasks.pop(key)
            if hosted.result is not None:
                hosted.result.cancel()

    async def stop(self) -> None:
        """Cancel all tasks and wait for them; from now on callers hear that we are leaving."""
        self._is_stopped = True
        await self._streams.serve(hop_protocol(self._run), say_leaving)  # which holds on to nothing of ours
        for deadline in self._taking:
            if not deadline.expired():
                deadline.reschedule(0.0)
        results = [hosted.result for hosted in self._tasks.values() if hosted.result is not None]
        self._tasks.clear()
        for result in results:
            result.cancel()
        await asyncio.gather(*results, return_exceptions=True)
        if self._serving:  # they have a moment to say so; nothing may hold on to the span that is ending
            _, slow = await asyncio.wait(self._serving, timeout=LAST_WORDS_S)
            for task in slow:
                task.cancel()

    @property
    def num_tasks(self) -> int:
        """Tasks in progress or waiting for their answer to be fetched."""
        return len(self._tasks)

    async def _answer_stream(self, stream: Stream) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._serving.add(task)
        task.add_done_callback(self._serving.discard)
        request: OpenTask | ResumeTask = await stream.receive(OpenTask, ResumeTask, timeout_s=HEADER_TIMEOUT_S)
        if isinstance(request, ResumeTask):
            await self._resume(stream, request)
        else:
            await self._open(stream, request)

    async def _open(self, stream: Stream, header: OpenTask) -> None:
        """Check a header, promise a slot, take the body, start the task, and report until it is answered."""
        refusal = self._check(header) or await self._gate.admit(header) or self._check_number(header)
        if refusal is not None:
            await self._say_last(stream, refusal)
            return
        if not await self._slots.acquire(
            stream.remote, round_id=header.round, number=header.number, timeout_s=min(SLOT_WAIT_S, header.time_left_s)
        ):
            await self._say_last(stream, Busy(retry_after_s=RETRY_AFTER_S))
            return
        started = False
        try:
            if self._is_stopped:  # it had been waiting in line
                await self._say_last(stream, Refused(code=RefusalCode.LEAVING))
                return
            await stream.send(Accepted(ttl_s=SLOT_TTL_S))
            body = await self._take_body(stream, header)
            hosted, started = self._start(stream.remote, header, body)
        finally:
            if not started:
                self._slots.release(stream.remote)
        await self._report(stream, hosted)

    async def _resume(self, stream: Stream, request: ResumeTask) -> None:
        task = TaskId(request.kind, request.round, request.number)
        hosted = self._tasks.get(TaskKey(stream.remote, task, request.stage, request.body_digest))
        if request.run != self._run or hosted is None:
            await self._say_last(stream, Refused(code=RefusalCode.UNKNOWN_TASK))
            return
        await stream.send(Accepted(ttl_s=SLOT_TTL_S))
        await self._report(stream, hosted)

    def _check(self, header: OpenTask) -> Refused | None:
        """Refuse a header that cannot be right, before any byte of the body is accepted."""
        if header.stage == 0:
            return Refused(code=RefusalCode.BAD_HEADER, detail="stage 0 is fed from token files, not over hops")
        if header.codec != self._codec:
            return Refused(code=RefusalCode.BAD_HEADER, detail=f"this run sends {self._codec}, not {header.codec}")
        if len(header.tensors) != 1:
            return Refused(code=RefusalCode.BAD_HEADER, detail="exactly one tensor is expected")
        try:
            expected = self._body_bytes(header.tensors[0].shape)
        except WireError as error:
            return Refused(code=RefusalCode.BAD_HEADER, detail=str(error)[:500])
        if header.body_bytes != expected:
            return Refused(code=RefusalCode.BAD_HEADER, detail=f"such a body has {expected} bytes")
        return None

    def _check_number(self, header: OpenTask) -> Refused | None:
        """Refuse a number that the round, which is the open one here, does not have."""
        if header.number < self._num_numbers(header.round):
            return None
        return Refused(code=RefusalCode.BAD_HEADER, detail=f"round {header.round} has no number {header.number}")

    async def _take_body(self, stream: Stream, header: OpenTask) -> Body:
        patience_s = min(self._time_left_s(header), SLOT_TTL_S + header.body_bytes / MIN_BYTES_PER_S)
        try:
            async with asyncio.timeout(patience_s) as deadline:
                self._taking[deadline] = header.round
                try:
                    data, digest = await stream.receive_body(header.body_bytes)
                    end = await stream.receive(BodyEnd, timeout_s=SLOT_TTL_S)
                finally:
                    del self._taking[deadline]
        except TimeoutError:
            raise DeadlineError(f"{stream.remote} let its slot lapse") from None
        if end.digest != digest:
            raise WireError(f"{stream.remote} sent a body that does not fit its own digest")
        return Body(data, header.tensors[0].shape, digest, header.local_step)

    def _time_left_s(self, header: OpenTask) -> float:
        return min(header.time_left_s, self._round_deadline_s)

    def _start(self, caller: PeerId, header: OpenTask, body: Body) -> tuple[HostedTask, bool]:
        """Start the task unless the same one is here already; tell whether a slot is now in use for it."""
        if self._is_stopped:
            raise PeerFault("this span is no longer served")
        key = TaskKey(caller, TaskId(header.kind, header.round, header.number), header.stage, body.digest)
        known = self._tasks.get(key)
        if known is not None:
            return known, False
        hosted = HostedTask(
            key=key,
            body=body,
            deadline_s=time.monotonic() + self._time_left_s(header),
            retries_left=min(header.retries_left, MAX_RETRIES),
            pulse=Pulse(furthest_stage=header.stage),
        )
        self._tasks[key] = hosted
        hosted.result = asyncio.create_task(self._run_task(hosted), name=f"task-{header.round}-{header.number}")
        # not in the task itself: one that is cancelled before its first step runs none of its code
        hosted.result.add_done_callback(lambda result: self._slots.release(caller))
        hosted.result.add_done_callback(_note_outcome)
        return hosted, True

    async def _run_task(self, hosted: HostedTask) -> Outcome:
        try:
            return await self._work(hosted)
        finally:
            hosted.body = replace(hosted.body, data=b"")  # only the answer is still wanted
            self._drop_unfetched(hosted.key.caller)

    def _drop_unfetched(self, caller: PeerId) -> None:
        """Forget the oldest answers beyond what honest callers can have left behind."""
        done = [key for key, hosted in self._tasks.items() if hosted.result is not None and hosted.result.done()]
        from_caller = [key for key in done if key.caller == caller]
        surplus = from_caller[: max(0, len(from_caller) - MAX_UNFETCHED_PER_CALLER)]
        for key in {*surplus, *done[: max(0, len(done) - MAX_UNFETCHED)]}:
            del self._tasks[key]

    async def _report(self, stream: Stream, hosted: HostedTask) -> None:
        """Send progress until the task ends, then its answer; forget it once the caller has it."""
        assert hosted.result is not None
        while not hosted.result.done():
            pulse = hosted.pulse
            pulse.tick(self._jobs_done())
            await stream.send(Progress(furthest_stage=pulse.furthest_stage, work=pulse.work, waiting=pulse.waiting))
            await asyncio.wait({hosted.result}, timeout=PROGRESS_EVERY_S)
        answer, gradient = self._answer_of(hosted)
        await stream.send(answer)
        if gradient is not None:
            await stream.send_body(memoryview(gradient))
        if answer.status is AnswerStatus.DONE:
            self._on_answered(hosted, hosted.result.result())
        await stream.receive(Received, timeout_s=RECEIVED_TIMEOUT_S)
        is_first_time = self._tasks.pop(hosted.key, None) is not None
        if is_first_time and answer.status is AnswerStatus.DONE:
            self._on_received(hosted.key.task, answer.target_tokens)

    def _answer_of(self, hosted: HostedTask) -> tuple[Answer, bytes | bytearray | None]:
        assert hosted.result is not None
        error = RoundOver("the round is over") if hosted.result.cancelled() else hosted.result.exception()
        if isinstance(error, RoundOver):
            return Answer(status=AnswerStatus.ROUND_OVER, detail=str(error)[:500]), None
        if isinstance(error, DownstreamFailed):
            return (
                Answer(status=AnswerStatus.DOWNSTREAM_FAILED, detail=str(error)[:500], failed_stage=error.stage),
                None,
            )
        if isinstance(error, SwarmError):
            return Answer(status=AnswerStatus.FAILED, detail=error.one_line()[:500]), None
        if error is not None:
            raise error
        outcome = hosted.result.result()
        answer = Answer(
            status=AnswerStatus.DONE,
            loss_sum=outcome.loss_sum,
            target_tokens=outcome.target_tokens,
            path=outcome.path,
            body_bytes=len(outcome.gradient or b""),
            digest=outcome.gradient_digest,
            load_s=self._load_s(),
        )
        return answer, outcome.gradient

    async def _say_last(self, stream: Stream, message: Busy | Refused) -> None:
        await stream.send(message)
        await stream.wait_closed(timeout_s=RECEIVED_TIMEOUT_S)


async def say_leaving(stream: Stream) -> None:
    """Refuse whatever comes, for a span that is no longer here."""
    await stream.receive(OpenTask, ResumeTask, timeout_s=HEADER_TIMEOUT_S)
    await stream.send(Refused(code=RefusalCode.LEAVING))
    await stream.wait_closed(timeout_s=RECEIVED_TIMEOUT_S)


def _note_outcome(result: asyncio.Task[Outcome]) -> None:
    """Log a task's failure where it happened; the caller hears of it in the answer."""
    if result.cancelled():
        return
    error = result.exception()
    if isinstance(error, TransientError):
        log.debug("task.ended", name=result.get_name(), error=error.one_line())
    elif error is not None:
        log.warning("task.failed", name=result.get_name(), error=repr(error))
