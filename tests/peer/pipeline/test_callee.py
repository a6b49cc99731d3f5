"""What callers can make a replica hold: slots, bodies, answers. The stream is played, everything else is real."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import suppress
from typing import Any, cast

import pytest

from peer.pipeline import callee
from peer.pipeline.callee import MAX_UNFETCHED_PER_CALLER, HopServer, HostedTask
from peer.pipeline.gate import Gate
from peer.tasks import Outcome
from protocol.batches import TaskKind
from protocol.errors import DeadlineError, TransientError
from protocol.hops import Accepted, BodyEnd, Busy, OpenTask, Received, RefusalCode, Refused, TensorSpec
from protocol.ids import Digest, Lineage, PeerId, RoundId, RunId, StageId, Version, digest
from protocol.transport.streams import Stream, Streams
from protocol.wire import PROTOCOL_VERSION, Message

RUN = RunId("0" * 32)
STAGE = StageId(1)
SHAPE = (1, 2, 4)
BODY = bytearray(32)
NUM_SLOTS = 2
NUM_NUMBERS = 64


class PlayedStream:
    """A caller that sends its header, then its body when it is told to, and fetches no answer."""

    def __init__(self, header: OpenTask, *, remote: str = "anne", body: bytes | bytearray | None = BODY) -> None:
        self.remote = PeerId(remote)
        self.header = header
        self.body = body
        self.heard: list[Message] = []

    async def receive(self, *classes: type[Message], timeout_s: float) -> Message:
        if OpenTask in classes:
            return self.header
        if BodyEnd in classes and self.body is not None:
            return BodyEnd(digest=digest(bytes(self.body)))
        raise TransientError("gone")

    async def receive_body(self, num_bytes: int) -> tuple[bytearray, Digest]:
        if self.body is None:
            await asyncio.Event().wait()
        assert self.body is not None
        return bytearray(self.body), digest(bytes(self.body))

    async def send(self, message: Message) -> None:
        self.heard.append(message)

    async def send_body(self, body: memoryview) -> None:
        raise TransientError("gone")

    async def wait_closed(self, *, timeout_s: float) -> None:
        return


class Server:
    """A replica of two slots whose work is played."""

    def __init__(self) -> None:
        self.go = asyncio.Event()
        self.gate = Gate(run=RUN)
        self.gate.open(STAGE, round_id=RoundId(0), version=Version(0), lineage=Lineage(bytes(32)))
        self.hosted: list[HostedTask] = []
        self.answered: list[int] = []
        self.received: list[tuple[int, int]] = []
        self.server = HopServer(
            run=RUN,
            codec="fp32",
            streams=cast(Streams, None),
            gate=self.gate,
            work=self._work,
            on_answered=lambda hosted, outcome: self.answered.append(hosted.key.task.number),
            on_received=lambda task, target_tokens: self.received.append((task.number, target_tokens)),
            body_bytes=lambda shape: len(BODY),
            load_s=lambda: 0.0,
            jobs_done=lambda: 0,
            num_slots=lambda: NUM_SLOTS,
            num_numbers=lambda round_id: NUM_NUMBERS,
            round_deadline_s=60.0,
        )

    async def _work(self, hosted: HostedTask) -> Outcome:
        self.hosted.append(hosted)
        await self.go.wait()
        return Outcome(bytes(BODY), digest(bytes(BODY)), 1.0, 2, ())

    async def answer(self, stream: PlayedStream) -> None:
        await self.server._answer_stream(cast(Stream, stream))

    @property
    def num_held(self) -> int:
        return self.server._slots.num_held


def header(number: int = 0, **changes: Any) -> OpenTask:
    fields: dict[str, Any] = {
        "protocol": PROTOCOL_VERSION,
        "run": RUN,
        "kind": TaskKind.TRAIN,
        "round": RoundId(0),
        "number": number,
        "attempt": 0,
        "stage": STAGE,
        "lineage": Lineage(bytes(32)),
        "version": Version(0),
        "local_step": 0,
        "time_left_s": 30.0,
        "retries_left": 3,
        "tensors": (TensorSpec(name="hidden", shape=SHAPE),),
        "codec": "fp32",
        "body_bytes": len(BODY),
    }
    return OpenTask(**(fields | changes))


async def until(condition: Callable[[], bool]) -> None:
    for _ in range(2000):
        if condition():
            return
        await asyncio.sleep(0.001)
    raise AssertionError("that did not happen")


async def test_a_task_that_is_cancelled_before_its_first_step_gives_its_slot_back() -> None:
    """As happens at the end of every round, when a body has just come in."""
    server = Server()
    answering = asyncio.create_task(server.answer(PlayedStream(header())))
    while not server.server.num_tasks:  # noqa: ASYNC110 - the very first moment is wanted
        await asyncio.sleep(0)
    server.server.end_round(RoundId(0))
    with pytest.raises(TransientError):
        await answering
    assert server.hosted == [], "the task ran; this test wants one that did not"
    assert server.num_held == 0


async def test_the_end_of_a_round_frees_the_slots_of_bodies_that_never_came() -> None:
    server = Server()
    slow = [asyncio.create_task(server.answer(PlayedStream(header(n), body=None))) for n in range(NUM_SLOTS)]
    await until(lambda: server.num_held == NUM_SLOTS)
    server.server.end_round(RoundId(0))
    for answering in slow:
        with pytest.raises(DeadlineError):
            await answering
    assert server.num_held == 0


async def test_a_body_that_does_not_come_costs_its_caller_the_slot(monkeypatch: pytest.MonkeyPatch) -> None:
    """However much time the caller says that there is."""
    monkeypatch.setattr(callee, "SLOT_TTL_S", 0.05)
    server = Server()
    with pytest.raises(DeadlineError):
        await asyncio.wait_for(server.answer(PlayedStream(header(time_left_s=1e6), body=None)), 10.0)
    assert server.num_held == 0


async def test_what_a_caller_grants_itself_is_cut_to_what_a_round_can_need() -> None:
    server = Server()
    answering = asyncio.create_task(server.answer(PlayedStream(header(time_left_s=1e6, retries_left=10**9))))
    await until(lambda: bool(server.hosted))
    (hosted,) = server.hosted
    assert hosted.retries_left <= callee.MAX_RETRIES
    assert hosted.deadline_s - asyncio.get_running_loop().time() < 61.0
    answering.cancel()


async def test_a_number_that_the_round_does_not_have_is_refused() -> None:
    server = Server()
    stream = PlayedStream(header(NUM_NUMBERS))
    await server.answer(stream)
    (refused,) = stream.heard
    assert isinstance(refused, Refused)
    assert refused.code is RefusalCode.BAD_HEADER
    assert server.num_held == 0


async def test_answers_that_nobody_fetches_are_bounded_and_hold_no_bodies() -> None:
    server = Server()
    server.go.set()
    for number in range(2 * MAX_UNFETCHED_PER_CALLER):
        with pytest.raises(TransientError):
            await server.answer(PlayedStream(header(number)))
    assert server.server.num_tasks <= MAX_UNFETCHED_PER_CALLER + 1
    assert all(len(hosted.body.data) == 0 for hosted in server.hosted)
    assert server.num_held == 0


async def test_the_third_caller_of_two_slots_hears_busy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(callee, "SLOT_WAIT_S", 0.05)
    server = Server()
    working = [asyncio.create_task(server.answer(PlayedStream(header(n)))) for n in range(NUM_SLOTS)]
    await until(lambda: len(server.hosted) == NUM_SLOTS)
    third = PlayedStream(header(2), remote="bert")
    await server.answer(third)
    assert [type(message) for message in third.heard] == [Busy]
    assert all(not isinstance(message, Accepted) for message in third.heard)
    for answering in working:
        answering.cancel()


async def test_stage_0_is_not_entered_over_a_hop() -> None:
    server = Server()
    stream = PlayedStream(header(stage=StageId(0)))
    await server.answer(stream)
    (refused,) = stream.heard
    assert isinstance(refused, Refused)
    assert refused.code is RefusalCode.BAD_HEADER


async def test_a_span_that_stops_takes_nothing_more() -> None:
    """Its gradients go nowhere. Oracle: neither who waited in line nor whose body was coming in is worked on."""
    server = Server()
    working = asyncio.create_task(server.answer(PlayedStream(header(0))))
    coming = asyncio.create_task(server.answer(PlayedStream(header(1), body=None)))
    await until(lambda: server.num_held == NUM_SLOTS and len(server.hosted) == 1)
    waiting = PlayedStream(header(2), remote="bert")
    in_line = asyncio.create_task(server.answer(waiting))
    await asyncio.sleep(0.01)
    server.server._streams = cast(Streams, NoStreams())
    await server.server.stop()
    for task in (working, coming, in_line):
        with suppress(TransientError):
            await asyncio.wait_for(task, 5.0)
    assert [type(message) for message in waiting.heard] == [Refused]
    assert len(server.hosted) == 1
    assert server.num_held == 0


async def test_only_what_a_caller_has_got_is_counted() -> None:
    """Oracle: one caller acknowledges, another one's stream breaks under the answer."""
    server = Server()
    server.go.set()
    await server.answer(ThankfulStream(header(3)))
    with pytest.raises(TransientError):
        await server.answer(PlayedStream(header(4)))
    assert server.received == [(3, 2)]


class ThankfulStream(PlayedStream):
    """A caller that takes the gradient and says so."""

    async def receive(self, *classes: type[Message], timeout_s: float) -> Message:
        return Received() if Received in classes else await super().receive(*classes, timeout_s=timeout_s)

    async def send_body(self, body: memoryview) -> None:
        return


class NoStreams:
    """Takes a registration, and nothing else."""

    async def serve(self, name: str, handler: object) -> None:
        return
