"""One task's way through the span that this peer hosts, and through the pipeline behind it.

Owns: the order forward -> next hop -> backward, and this peer's signed entry on the path. A task that
enters the span runs to its end here, so a peer only ever waits for one with a higher last stage: there
is no cycle of waiting. Must not know: streams (the caller does), tensors (the engine does).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

from peer.pipeline.caller import HopCaller
from peer.pipeline.compute import ComputeThread, Priority
from peer.pipeline.gate import Gate
from peer.tasks import Body, Outcome, Pulse, TaskId
from protocol.batches import TaskKind
from protocol.hops import ENTRY_CONTEXT, PathEntry, path_digest
from protocol.ids import Digest, RunId, StageId, digest
from protocol.signing import Signed, SigningKey, seal

if TYPE_CHECKING:
    from peer.data.source import BatchSource
    from peer.engine.span import Source, SpanEngine, SpanLoss, SpanTicket

Gradient = tuple[bytes | None, Digest]
"""An encoded gradient and its SHA-256, or what stands for none."""
NO_GRADIENT: Gradient = (None, digest())

T = TypeVar("T")


class SpanRunner:
    """Runs tasks through the local span. One per process."""

    def __init__(
        self,
        *,
        run: RunId,
        key: SigningKey,
        engine: SpanEngine,
        compute: ComputeThread,
        caller: HopCaller,
        gate: Gate,
        batches: BatchSource,
    ) -> None:
        self._run = run
        self._key = key
        self._engine = engine
        self._compute = compute
        self._caller = caller
        self._gate = gate
        self._batches = batches
        self._task_s = 0.0

    def load_s(self) -> float:
        """Estimate the seconds of work that wait for the compute thread."""
        return self._compute.statistics().queued * self._task_s

    async def feed(self, task: TaskId, *, pulse: Pulse, deadline_s: float, retries_left: int) -> Outcome:
        """Run a microbatch from its tokens: this peer hosts stage 0."""
        inputs_BT = await self._batches.inputs(task)
        body = Body(b"", tuple(inputs_BT.shape), digest(inputs_BT.tobytes()))
        return await self._run_task(task, inputs_BT, body, pulse, deadline_s, retries_left)

    async def work(self, task: TaskId, body: Body, *, pulse: Pulse, deadline_s: float, retries_left: int) -> Outcome:
        """Run a task that came in over a hop."""
        return await self._run_task(task, body.data, body, pulse, deadline_s, retries_left)

    async def _run_task(
        self, task: TaskId, source: Source, body: Body, pulse: Pulse, deadline_s: float, retries_left: int
    ) -> Outcome:
        if self._engine.is_last:
            return await self._finish(task, source, body)
        if task.kind is TaskKind.EVAL:
            onward = await self._forward(task, lambda: Body.of(*self._engine.forward_only(source, body.shape)))
            answer = await self._send(task, onward, pulse, deadline_s, retries_left)
            return self._sign(task, body, NO_GRADIENT, answer.loss_sum, answer.target_tokens, answer.path)
        return await self._train(task, source, body, pulse, deadline_s, retries_left)

    async def _train(
        self, task: TaskId, source: Source, body: Body, pulse: Pulse, deadline_s: float, retries_left: int
    ) -> Outcome:
        def forward() -> tuple[Body, SpanTicket]:
            data, shape, ticket = self._engine.forward(source, body.shape, round_id=task.round)
            return Body.of(data, shape), ticket

        onward, ticket = await self._forward(task, forward)
        try:
            answer = await self._send(task, onward, pulse, deadline_s, retries_left)
            returned = answer.gradient
            assert returned is not None, "the caller has seen that its size is right"
            gradient = await self._compute.run(
                lambda: _hashed(
                    self._engine.backward(ticket, returned, onward.shape, target_tokens=answer.target_tokens)
                ),
                priority=Priority.BACKWARD,
                age=task.number,
            )
        except BaseException:
            self._discard(ticket)
            raise
        return self._sign(task, body, gradient, answer.loss_sum, answer.target_tokens, answer.path)

    async def _finish(self, task: TaskId, source: Source, body: Body) -> Outcome:
        """Do the last stage's part: labels from our own token file, loss, and backward in one go."""
        labels_BT = await self._batches.labels(task)

        def finish() -> tuple[SpanLoss, Gradient]:
            if task.kind is TaskKind.EVAL:
                result = self._engine.evaluate(source, body.shape, labels_BT)
            else:
                result = self._engine.loss_and_backward(source, body.shape, labels_BT, round_id=task.round)
            return result, _hashed(result.gradient)

        result, gradient = await self._forward(task, finish)
        return self._sign(task, body, gradient, result.loss_sum, result.target_tokens, ())

    async def _forward(self, task: TaskId, work: Callable[[], T]) -> T:
        started_s = time.perf_counter()
        result = await self._compute.run(work, priority=Priority.FORWARD, age=task.number)
        self._task_s += 0.2 * (time.perf_counter() - started_s - self._task_s)
        return result

    async def _send(self, task: TaskId, onward: Body, pulse: Pulse, deadline_s: float, retries_left: int) -> Outcome:
        pulse.is_local = False
        outcome = await self._caller.send(
            task,
            StageId(self._engine.last + 1),
            onward,
            pulse=pulse,
            deadline_s=deadline_s,
            retries_left=retries_left,
        )
        pulse.is_local = True
        return outcome

    def _discard(self, ticket: SpanTicket) -> None:
        """Free a ticket without waiting: the reason for it may be a cancellation."""
        self._compute.submit(lambda: self._engine.discard(ticket), priority=Priority.CONTROL)

    def _sign(
        self,
        task: TaskId,
        body: Body,
        gradient: Gradient,
        loss_sum: float,
        target_tokens: int,
        behind: tuple[Signed, ...],
    ) -> Outcome:
        data, gradient_digest = gradient
        entry = PathEntry(
            run=self._run,
            kind=task.kind,
            round=task.round,
            number=task.number,
            stages=tuple(StageId(stage) for stage in self._engine.engines),
            peer=self._key.peer_id,
            version=self._gate.version_of(self._engine.first),
            local_step=0,
            input_digest=body.digest,
            output_digest=gradient_digest,
            behind=path_digest(behind),
            loss_sum=loss_sum,
            target_tokens=target_tokens,
        )
        path = (seal(self._key, ENTRY_CONTEXT, entry), *behind)
        return Outcome(data, gradient_digest, loss_sum, target_tokens, path)


def _hashed(gradient: bytes | None) -> Gradient:
    """Hash in the compute thread: a body of 64 MiB would hold up everything else on the loop."""
    return NO_GRADIENT if gradient is None else (gradient, digest(gradient))
