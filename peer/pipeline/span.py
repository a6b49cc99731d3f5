"""One task's way through the span that this peer hosts, and through the pipeline behind it.

Owns: the order forward -> next hop -> backward, this peer's signed entry on the path, and noticing that this
machine cannot compute (any more). A task that enters the span runs to its end here, so a peer only ever
waits for one with a higher last stage: there is no cycle of waiting. Must not know: streams (the caller does),
tensors (the engine does).
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, TypeVar

from peer.pipeline.attendance import Attendance
from peer.pipeline.caller import HopCaller
from peer.pipeline.compute import ComputeThread, Priority
from peer.pipeline.gate import Gate
from peer.pipeline.waves import Waves, nobody
from peer.tasks import Body, Outcome, Pulse, TaskId
from protocol.batches import TaskKind
from protocol.errors import PeerFault, SwarmError, TransientError, WireError
from protocol.hops import ENTRY_CONTEXT, PathEntry, path_digest
from protocol.ids import Digest, PeerId, RoundId, RunId, StageId, Version, digest
from protocol.signing import Signed, SigningKey, seal

if TYPE_CHECKING:
    from peer.data.source import BatchSource
    from peer.engine.span import Source, SpanEngine, SpanLoss, SpanTicket, TokenArray

Gradient = tuple[bytes | None, Digest]
"""An encoded gradient and its SHA-256, or what stands for none."""
NO_GRADIENT: Gradient = (None, digest())

PAUSING_S = 1.0
MAX_OWN_FAULTS = 8  # in a row: then it is this machine, and not what somebody sent

Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True, slots=True)
class _Entering:
    """A task at the stage of our span at which it came in."""

    task: TaskId
    caller: PeerId
    stage: StageId
    source: Source
    """Tokens at stage 0, else the body's bytes."""
    body: Body
    may_follow: Callable[[], bool]
    """Whether others of its round and kind may come in that are not expected yet."""


class SpanRunner:
    """Runs tasks through the local span. One per process."""

    def __init__(
        self,
        *,
        run: RunId,
        key: SigningKey,
        engine: SpanEngine,
        compute: ComputeThread,
        waves: Waves,
        caller: HopCaller,
        gate: Gate,
        batches: BatchSource,
        on_pause: Callable[[], None] = lambda: None,
        on_nonsense: Callable[[PeerId, TaskId], None] = lambda peer, task: None,
    ) -> None:
        """`on_pause` is called when work fails because this machine needs a pause, `on_nonsense` when a peer has sent
        what are no numbers."""
        self._run = run
        self._key = key
        self._engine = engine
        self._compute = compute
        self._waves = waves
        self._caller = caller
        self._gate = gate
        self._batches = batches
        self._attendance = Attendance(gate)
        self._on_pause, self._on_nonsense = on_pause, on_nonsense
        self._own_faults = 0
        self._last_fault: SwarmError | None = None
        self._broken: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    async def wait_broken(self) -> None:
        """Wait until this machine proves unable to compute, and raise why: what it took for others is lost on it."""
        await self._broken

    async def feed(
        self, task: TaskId, *, pulse: Pulse, deadline_s: float, retries_left: int, may_follow: Callable[[], bool]
    ) -> Outcome:
        """Run a microbatch from its tokens: this peer hosts stage 0.

        `may_follow` tells whether others of its kind may be fed for which a wave should wait.
        """

        async def feed() -> Outcome:
            with self._waves.expecting(_inward(task, self._engine.first)):
                inputs_BT = await self._batches.inputs(task)
            body = Body(b"", tuple(inputs_BT.shape), digest(inputs_BT.tobytes()))
            entering = _Entering(task, self._key.peer_id, self._engine.first, inputs_BT, body, may_follow)
            return await self._run_task(entering, pulse, deadline_s, retries_left)

        return await self._watched(feed())

    async def work(
        self,
        task: TaskId,
        entry: StageId,
        body: Body,
        *,
        caller: PeerId,
        pulse: Pulse,
        deadline_s: float,
        retries_left: int,
    ) -> Outcome:
        """Run a task that `caller` has brought over a hop, at stage `entry` of the span."""
        self._attendance.note(task, entry, self._batches.plan(task.round))
        may_follow = partial(self._attendance.is_missing_any, entry, task.kind)
        entering = _Entering(task, caller, entry, body.data, body, may_follow)
        return await self._watched(self._run_task(entering, pulse, deadline_s, retries_left))

    async def _watched(self, work: Coroutine[None, None, Outcome]) -> Outcome:
        """Do the work, and tell a machine that cannot compute from one to whom somebody sent nonsense."""
        try:
            outcome = await work
        except (PeerFault, TransientError):
            raise
        except SwarmError as error:
            if self._engine.pause() is not None:  # known, and dealt with by the session: nothing is broken
                self._on_pause()
                await asyncio.sleep(PAUSING_S)  # or one number after the other would fail here until it has left
                raise
            if error is not self._last_fault:  # a wave that fails is one fault, however many are in it
                self._own_faults += 1
            self._last_fault = error
            if self._own_faults >= MAX_OWN_FAULTS:
                self._break(error)
            raise
        except Exception as error:  # a bug of ours: it ends the process, whoever it was that asked
            self._break(error)
            raise
        self._own_faults = 0
        return outcome

    def _break(self, error: Exception) -> None:
        if not self._broken.done():
            self._broken.set_exception(error)

    async def _run_task(self, entering: _Entering, pulse: Pulse, deadline_s: float, retries_left: int) -> Outcome:
        if self._engine.is_last:
            return await self._finish(entering)
        if entering.task.kind is TaskKind.EVAL:
            onward = await self._enter(entering, entering, self._forward_only_wave)
            answer = await self._send(entering.task, onward, pulse, deadline_s, retries_left)
            return self._sign(entering, NO_GRADIENT, answer.loss_sum, answer.target_tokens, answer.path)
        return await self._train(entering, pulse, deadline_s, retries_left)

    async def _train(self, entering: _Entering, pulse: Pulse, deadline_s: float, retries_left: int) -> Outcome:
        task, returning = entering.task, _returning(entering.task, entering.stage)
        onward, ticket = await self._enter(entering, entering, self._forward_wave)
        try:
            with self._waves.expecting(returning):
                answer = await self._send(task, onward, pulse, deadline_s, retries_left)
            returned = answer.gradient
            assert returned is not None, "the caller has seen that its size is right"
            with self._blaming(answer.path[0].signer, task):
                gradient = await self._waves.run(
                    returning,
                    (ticket, returned, onward.shape, answer.target_tokens),
                    self._backward_wave,
                    priority=Priority.BACKWARD,
                    age=task.number,
                    may_follow=nobody,  # what has yet to go forward comes back much later
                )
        except BaseException:
            self._discard(ticket)
            raise
        standing = ticket.standing if ticket.is_steady else None
        return self._sign(entering, gradient, answer.loss_sum, answer.target_tokens, answer.path, standing=standing)

    async def _finish(self, entering: _Entering) -> Outcome:
        """Do the last stage's part: labels from our own token file, loss, and backward in one go."""
        task, entry = entering.task, entering.stage
        with self._waves.expecting(_inward(task, entry)):
            labels_BT = await self._batches.labels(task)
        item = (entering.source, entering.body.shape, labels_BT)
        if task.kind is TaskKind.EVAL:
            result = await self._enter(entering, item, lambda wave: self._engine.evaluate_wave(wave, entry=entry))
            return self._sign(entering, NO_GRADIENT, result.loss_sum, result.target_tokens, ())
        result, gradient = await self._enter(entering, item, lambda wave: self._finish_wave(wave, entry, task.round))
        return self._sign(entering, gradient, result.loss_sum, result.target_tokens, (), standing=result.standing)

    async def _enter(
        self, entering: _Entering, item: Item, work: Callable[[list[Item]], Sequence[Result | SwarmError]]
    ) -> Result:
        """Take a task through the span's stages for the first time, in a wave with others."""
        with self._blaming(entering.caller, entering.task):
            return await self._waves.run(
                _inward(entering.task, entering.stage),
                item,
                work,
                priority=Priority.FORWARD,
                age=entering.task.number,
                may_follow=entering.may_follow,
            )

    @contextmanager
    def _blaming(self, peer: PeerId, task: TaskId) -> Iterator[None]:
        """Say who has sent us what the block cannot take for numbers: no honest machine can be made to send that.

        Not if they are too large: somebody behind it may have seen to it that what it computes is.
        """
        try:
            yield
        except WireError:
            if peer != self._key.peer_id:
                self._on_nonsense(peer, task)
            raise

    def _forward_wave(self, wave: Sequence[_Entering]) -> list[tuple[Body, SpanTicket] | SwarmError]:
        results = self._engine.forward_wave(
            [(each.source, each.body.shape) for each in wave], entry=wave[0].stage, round_id=wave[0].task.round
        )
        return [each if isinstance(each, SwarmError) else (_onward(*each), each[2]) for each in results]

    def _forward_only_wave(self, wave: Sequence[_Entering]) -> list[Body | SwarmError]:
        results = self._engine.forward_only_wave([(each.source, each.body.shape) for each in wave], entry=wave[0].stage)
        return [each if isinstance(each, SwarmError) else Body.of(*each) for each in results]

    def _backward_wave(
        self, wave: Sequence[tuple[SpanTicket, bytes | bytearray, tuple[int, ...], int]]
    ) -> list[Gradient | SwarmError]:
        results = self._engine.backward_wave(wave)
        return [each if isinstance(each, SwarmError) else _hashed(each) for each in results]

    def _finish_wave(
        self, wave: Sequence[tuple[Source, tuple[int, ...], TokenArray]], entry: StageId, round_id: RoundId
    ) -> list[tuple[SpanLoss, Gradient] | SwarmError]:
        results = self._engine.loss_wave(wave, entry=entry, round_id=round_id)
        return [each if isinstance(each, SwarmError) else (each, _hashed(each.gradient)) for each in results]

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
        entering: _Entering,
        gradient: Gradient,
        loss_sum: float,
        target_tokens: int,
        behind: tuple[Signed, ...],
        *,
        standing: tuple[Version, ...] | None = None,
    ) -> Outcome:
        """`standing` is known if the weights were those of these versions, both ways."""
        task, (data, gradient_digest) = entering.task, gradient
        entry = PathEntry(
            run=self._run,
            kind=task.kind,
            round=task.round,
            number=task.number,
            stages=self._engine.stages_from(entering.stage),
            peer=self._key.peer_id,
            caller=entering.caller,
            version=self._gate.version_of(entering.stage) if standing is None else standing[0],
            local_step=int(standing is None and task.kind is TaskKind.TRAIN),
            input_digest=entering.body.digest,
            output_digest=gradient_digest,
            behind=path_digest(behind),
            loss_sum=loss_sum,
            target_tokens=target_tokens,
        )
        path = (seal(self._key, ENTRY_CONTEXT, entry), *behind)
        return Outcome(data, gradient_digest, loss_sum, target_tokens, path)


def _inward(task: TaskId, entry: StageId) -> Hashable:
    """Name the waves in which tasks like this one pass the span first."""
    return ("in", task.kind, entry, task.round)


def _returning(task: TaskId, entry: StageId) -> Hashable:
    """Name the waves in which the gradients of tasks like this one pass the span."""
    return ("back", task.kind, entry, task.round)


def _onward(data: bytes, shape: tuple[int, ...], ticket: SpanTicket) -> Body:
    """Hash what goes to the next stage, in the compute thread as well."""
    return Body.of(data, shape, local_step=int(ticket.standing is None))


def _hashed(gradient: bytes | None) -> Gradient:
    """Hash in the compute thread: a body of 64 MiB would hold up everything else on the loop."""
    return NO_GRADIENT if gradient is None else (gradient, digest(gradient))
