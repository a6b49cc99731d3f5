"""The calling end of a hop: activations out, gradient back, whatever happens in between.

Owns: finding a replica that takes the task, sending it, waiting for as long as there is progress,
picking the task up again on a new stream (RESUME), and only then giving it to another replica. Must not
know: what is computed. The wire side of the same conversation is `callee.py`.
"""

from __future__ import annotations

import asyncio
import math
import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import structlog

from peer.pipeline.router import Router
from peer.pipeline.view import Membership, View
from peer.tasks import Body, DownstreamFailed, Outcome, Pulse, RoundOver, TaskId
from protocol.batches import TaskKind
from protocol.encoding import encoded_bytes
from protocol.errors import DeadlineError, PeerFault, StrangerError, SwarmError, UnreachableError, WireError
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
    TensorSpec,
)
from protocol.ids import PeerId, RunId, StageId
from protocol.paths import read_path
from protocol.transport.streams import Stream, Streams
from protocol.wire import PROTOCOL_VERSION

log = structlog.get_logger()

OPEN_ANSWER_S = 8.0  # covers the callee's own holding time for slots and rounds (callee.py, gate.py)
MAX_LOSS_PER_TOKEN = 1e5  # nats; a model that knows nothing of a million tokens is at 14
RESUME_WINDOW_S = 3.0  # how long a peer whose stream broke is tried again before its task goes elsewhere
RESUME_PAUSE_S = 0.25
IDLE_POLL_S = 1.0  # how often "nobody hosts the next stage" is looked at again, besides on every change
MARGIN_S = 1.0  # each hop passes on a little less time than it was given, so ancestors time out last
REFRESH_CODES = (RefusalCode.LINEAGE, RefusalCode.AHEAD)
GONE_CODES = (RefusalCode.WRONG_STAGE, RefusalCode.LEAVING)


@dataclass(slots=True)
class HopStatistics:
    """Counters since the start; the reports take differences."""

    hops: int = 0
    resumed: int = 0
    resent: int = 0
    busy: int = 0
    bytes_sent: int = 0
    bytes_received: int = 0


@dataclass(slots=True)
class _Errand:
    """One task on its way to one stage, with what is left of its time and retries."""

    task: TaskId
    stage: StageId
    body: Body
    pulse: Pulse
    deadline_s: float
    retries_left: int
    attempt: int = 0
    failed_at: set[PeerId] = field(default_factory=set)
    """Replicas that answered, but not with a result: there are reasons for that which are not theirs."""
    strange_to: set[PeerId] = field(default_factory=set)
    """Replicas that did not know us (any more): they are shown our pass and asked once more."""

    def time_left_s(self) -> float:
        return self.deadline_s - time.monotonic()

    def moved(self) -> None:
        """A piece of a body went over our link, which is progress too."""
        self.pulse.advance(self.stage)


class HopCaller:
    """Sends tasks to the next stage."""

    def __init__(
        self,
        *,
        run: RunId,
        me: PeerId,
        codec: str,
        gradient_codec: str,
        num_stages: int,
        streams: Streams,
        view: View,
        router: Router,
        hop_silence_s: float,
    ) -> None:
        self._run = run
        self._me = me
        self._codec, self._gradient_codec = codec, gradient_codec
        self._num_stages = num_stages
        self._name = hop_protocol(run)
        self._streams = streams
        self._view = view
        self._router = router
        self._hop_silence_s = hop_silence_s
        self.statistics = HopStatistics()
        self.on_stale_view: asyncio.Queue[tuple[StageId, PeerId | None]] = asyncio.Queue()
        """Whose newest membership should be asked for, and of whom (None: of anybody who may know)."""
        self._asked: set[tuple[StageId, PeerId | None]] = set()
        self.on_answer: Callable[[TaskId, PeerId, StageId, Body, Outcome], None] = lambda *_: None
        """Called with every checked answer: to which task, of whom, from which stage on, to what."""
        self.on_lost: Callable[[PeerId], None] = lambda peer: None
        """Called when a peer could not be dialled, or has gone silent."""

    async def send(
        self, task: TaskId, stage: StageId, body: Body, *, pulse: Pulse, deadline_s: float, retries_left: int
    ) -> Outcome:
        """Have `stage` and all behind it work on `body`; return the gradient and the signed path.

        `deadline_s` is on the monotonic clock. Raises `RoundOver` if the round has ended there,
        `DownstreamFailed` if a later stage gave up, `DeadlineError` when time or retries are used up.
        """
        errand = _Errand(task, stage, body, pulse, deadline_s, retries_left)
        while True:
            outcome, why = await self._try_replicas(errand)
            if outcome is not None:
                return outcome
            errand.attempt += 1
            errand.retries_left -= 1
            if errand.retries_left < 0 or errand.time_left_s() <= 0:
                raise DownstreamFailed(f"stage {stage} did not finish the task: {why}", stage=stage)
            log.info("hop.again", stage=stage, round=task.round, number=task.number, why=why)

    async def _try_replicas(self, errand: _Errand) -> tuple[Outcome | None, str]:
        """Offer the task to replicas until one has worked on it; return its outcome, or why it failed."""
        while errand.time_left_s() > 0:
            membership = self._view.membership(errand.stage)
            replicas = self._view.live_members(errand.stage, now_s=time.monotonic()) if membership else {}
            replicas = {peer: share for peer, share in replicas.items() if peer not in errand.failed_at} or replicas
            if membership is None or not replicas:
                await self._wait_for_replicas(errand)
                continue
            pause_s = 0.1
            for peer in self._router.order(
                round_id=errand.task.round,
                number=errand.task.number,
                stage=errand.stage,
                replicas=replicas,
                now_s=time.monotonic(),
            ):
                try:
                    answer = await self._offer(peer, membership, errand)
                except (RoundOver, DownstreamFailed):
                    raise
                except (UnreachableError, DeadlineError) as error:
                    self._lost(peer, error)
                    return None, error.one_line()
                except SwarmError as error:
                    log.info("hop.failed", peer=peer, error=error.one_line())
                    errand.failed_at.add(peer)
                    self._router.penalise(peer, now_s=time.monotonic())
                    return None, error.one_line()
                if isinstance(answer, Outcome):
                    return answer, ""
                pause_s = max(pause_s, answer)
            if not self._view.has_live(errand.stage, now_s=time.monotonic()):
                self.ask_for_news(errand.stage, None)  # all have gone: what we know of the stage may be old
                pause_s = IDLE_POLL_S
                errand.pulse.waiting = True  # until somebody takes it: we are well, the stage is not
            await self._view.wait_changed(timeout_s=pause_s * random.uniform(0.5, 1.0))
        return None, "no replica took it in time"

    async def _wait_for_replicas(self, errand: _Errand) -> None:
        """Hold the task while its stage has nobody: that is waiting, not failure."""
        errand.pulse.waiting = True
        await self._view.wait_changed(timeout_s=min(IDLE_POLL_S, max(0.0, errand.time_left_s())))

    async def _offer(self, peer: PeerId, membership: Membership, errand: _Errand) -> Outcome | float:
        """Offer the task to one replica. Returns its outcome, or seconds to wait if it does not take the task.

        Raises once the replica had taken the task and could not be reached again in time.
        """
        started_s: float | None = None
        try:
            async with self._streams.open(peer, self._name) as stream:
                await stream.send(self._header(membership, errand))
                reply = await stream.receive(Accepted, Busy, Refused, timeout_s=OPEN_ANSWER_S)
                if isinstance(reply, Busy):
                    self.statistics.busy += 1
                    return reply.retry_after_s
                if isinstance(reply, Refused):
                    return self._refused(peer, reply, errand)
                started_s = time.monotonic()
                errand.pulse.waiting = False
                self.statistics.resent += errand.attempt > 0
                await self._send_body(stream, errand)
                return await self._collect(stream, peer, errand, started_s)
        except StrangerError:  # it was restarted, which is nobody's fault; who says so again is to blame
            if started_s is not None or peer in errand.strange_to:
                raise
            errand.strange_to.add(peer)
            return 0.0
        except (UnreachableError, DeadlineError) as error:
            if started_s is None:
                self._lost(peer, error)
                return 0.0
            if isinstance(error, DeadlineError):  # reachable, but nothing moves: a new stream would not help
                raise
            log.debug("hop.broken", peer=peer, error=error.one_line())
        return await self._resume(peer, errand, started_s)

    def _header(self, membership: Membership, errand: _Errand) -> OpenTask:
        return OpenTask(
            protocol=PROTOCOL_VERSION,
            run=self._run,
            kind=errand.task.kind,
            round=errand.task.round,
            number=errand.task.number,
            attempt=errand.attempt,
            stage=errand.stage,
            lineage=membership.lineage,
            version=membership.version,
            local_step=errand.body.local_step,
            time_left_s=max(0.0, errand.time_left_s() - MARGIN_S),
            retries_left=max(0, errand.retries_left),
            tensors=(TensorSpec(name="hidden", shape=errand.body.shape),),
            codec=self._codec,
            body_bytes=len(errand.body.data),
        )

    def _refused(self, peer: PeerId, reply: Refused, errand: _Errand) -> float:
        """Decide what a refusal means: the end of the round, a stale view, or somebody to pass over."""
        if reply.code in (RefusalCode.BEHIND, RefusalCode.FROZEN):
            raise RoundOver(f"stage {errand.stage} is past round {errand.task.round}: {reply.detail}")
        if reply.code in GONE_CODES:  # it cannot say who hosts the stage now
            self._view.pass_over(peer, now_s=time.monotonic())
            self.ask_for_news(errand.stage, None)
            return 0.2
        if reply.code in REFRESH_CODES:
            self.ask_for_news(errand.stage, peer)
            return 0.2
        log.warning("hop.refused", peer=peer, code=reply.code, detail=reply.detail)
        self._view.pass_over(peer, now_s=time.monotonic())
        return 0.5

    async def _send_body(self, stream: Stream, errand: _Errand) -> None:
        body = errand.body
        digest = await stream.send_body(memoryview(body.data), on_chunk=errand.moved)
        assert digest == body.digest, "a body changed between being hashed and being sent"
        await stream.send(BodyEnd(digest=digest))
        self.statistics.bytes_sent += len(body.data)

    async def _collect(self, stream: Stream, peer: PeerId, errand: _Errand, started_s: float) -> Outcome:
        """Wait for the answer for as long as there is progress, check it, and acknowledge it."""
        answer = await self._wait_answer(stream, errand)
        if answer.status is AnswerStatus.DOWNSTREAM_FAILED:
            await stream.send(Received())
            raise DownstreamFailed(answer.detail, stage=StageId(answer.failed_stage or errand.stage))
        if answer.status is AnswerStatus.ROUND_OVER:
            await stream.send(Received())
            raise RoundOver(f"stage {errand.stage}: {answer.detail}")
        if answer.status is AnswerStatus.FAILED:
            await stream.send(Received())
            raise PeerFault(f"{peer} failed at stage {errand.stage}: {answer.detail}")
        # a gradient has the shape of what it is the gradient of; else a stranger would make us take any memory
        size = encoded_bytes(self._gradient_codec, math.prod(errand.body.shape))
        expected = size if errand.task.kind is TaskKind.TRAIN else 0
        if answer.body_bytes != expected:
            raise WireError(f"{peer} answers with {answer.body_bytes} bytes where {expected} are due")
        gradient, gradient_digest = await stream.receive_body(answer.body_bytes, on_chunk=errand.moved)
        check_answer(
            answer,
            gradient_digest,
            peer=peer,
            caller=self._me,
            run=self._run,
            errand_body=errand.body,
            task=errand.task,
            stage=errand.stage,
            num_stages=self._num_stages,
        )
        outcome = Outcome(
            gradient=gradient or None,
            gradient_digest=gradient_digest,
            loss_sum=answer.loss_sum,
            target_tokens=answer.target_tokens,
            path=answer.path,
        )
        self.on_answer(errand.task, peer, errand.stage, errand.body, outcome)
        await stream.send(Received())
        self.statistics.hops += 1
        self.statistics.bytes_received += len(gradient)
        now_s = time.monotonic()
        self._router.observe(peer, task_s=now_s - started_s, load_s=answer.load_s, now_s=now_s)
        return outcome

    async def _wait_answer(self, stream: Stream, errand: _Errand) -> Answer:
        """Read progress until the answer comes. Only real progress, or waiting downstream, resets the timer.

        Progress is measured against what this replica said before: an earlier one may have come further.
        """
        alive_s = time.monotonic()
        newest: tuple[int, int] | None = None
        while True:
            patience_s = min(alive_s + self._hop_silence_s - time.monotonic(), errand.time_left_s())
            if patience_s <= 0:
                raise DeadlineError(f"no progress at {stream.remote} for {self._hop_silence_s:g} s")
            message: Progress | Answer = await stream.receive(Progress, Answer, timeout_s=patience_s)
            if isinstance(message, Answer):
                return message
            errand.pulse.waiting = message.waiting
            news = (message.furthest_stage, message.work)
            if newest is None or news > newest:
                newest = news
                errand.pulse.advance(message.furthest_stage)
                alive_s = time.monotonic()
            elif message.waiting:
                alive_s = time.monotonic()

    async def _resume(self, peer: PeerId, errand: _Errand, started_s: float) -> Outcome:
        """Pick the task up again on a new stream to the same peer, for a short while."""
        give_up_s = time.monotonic() + RESUME_WINDOW_S
        request = ResumeTask(
            run=self._run,
            kind=errand.task.kind,
            round=errand.task.round,
            number=errand.task.number,
            stage=errand.stage,
            body_digest=errand.body.digest,
        )
        error: SwarmError = UnreachableError(f"{peer} was lost in the middle of a task")
        while time.monotonic() < give_up_s:
            try:
                async with self._streams.open(peer, self._name, timeout_s=RESUME_WINDOW_S) as stream:
                    await stream.send(request)
                    reply = await stream.receive(Accepted, Refused, timeout_s=OPEN_ANSWER_S)
                    if isinstance(reply, Refused):
                        raise PeerFault(f"{peer} does not know the task any more: {reply.detail}")
                    self.statistics.resumed += 1
                    outcome = await self._collect(stream, peer, errand, started_s)
                    log.info("hop.resumed", peer=peer, round=errand.task.round, number=errand.task.number)
                    return outcome
            except (UnreachableError, StrangerError) as unreachable:  # the second is shown our pass next time
                error = unreachable
                await asyncio.sleep(RESUME_PAUSE_S)
        raise error

    def _lost(self, peer: PeerId, error: SwarmError) -> None:
        log.info("hop.lost", peer=peer, error=error.one_line())
        self._view.suspect(peer, now_s=time.monotonic())
        self._router.penalise(peer, now_s=time.monotonic())
        self.on_lost(peer)

    def ask_for_news(self, stage: StageId, peer: PeerId | None) -> None:
        """Have somebody ask `peer`, or anybody who may know, for the newest membership of `stage`."""
        if (stage, peer) not in self._asked:
            self._asked.add((stage, peer))
            self.on_stale_view.put_nowait((stage, peer))

    def news_asked(self, stage: StageId, peer: PeerId | None) -> None:
        """The question was put, with or without an answer: it may be put again."""
        self._asked.discard((stage, peer))


def check_answer(
    answer: Answer,
    gradient_digest: bytes,
    *,
    peer: PeerId,
    caller: PeerId,
    run: RunId,
    errand_body: Body,
    task: TaskId,
    stage: StageId,
    num_stages: int,
) -> None:
    """Raise unless the signed path names us, what we sent and what we received, from `stage` to the last word.

    Every entry is checked, not only the callee's: whoever feeds makes the proof of the microbatch out of them. The
    loss must be one that a microbatch of that many tokens can have; whether it is true is for validators.
    """
    entries = read_path(answer.path, caller=caller)
    first, last = entries[0], entries[-1]
    if first.peer != peer:
        raise WireError(f"{peer} brought a path that begins with {first.peer}")
    if (first.input_digest, first.output_digest) != (errand_body.digest, gradient_digest):
        raise WireError(f"{peer} signed something else than it sent")
    same_task = (first.run, first.kind, first.round, first.number) == (run, task.kind, task.round, task.number)
    same_result = (first.loss_sum, first.target_tokens) == (answer.loss_sum, answer.target_tokens)
    if not (same_task and same_result):
        raise WireError(f"{peer} brought a path of another task or loss")
    if (first.stages[0], last.stages[-1]) != (stage, num_stages - 1):
        raise WireError(f"{peer} brought a path from stage {first.stages[0]} to {last.stages[-1]}")
    num_tokens = math.prod(errand_body.shape[:2])
    if not (0 < answer.target_tokens <= num_tokens and 0 <= answer.loss_sum <= MAX_LOSS_PER_TOKEN * num_tokens):
        raise WireError(f"{peer} claims a loss of {answer.loss_sum} over {answer.target_tokens} of {num_tokens} tokens")


def hop_protocol(run: RunId) -> str:
    """Return the libp2p protocol name of a run's hops."""
    return f"/handcar/{PROTOCOL_VERSION}/{run}/hop"
