"""A pipeline in virtual time: real feeders, boards, runners and waves; played engines, links and compute threads.

Nothing here waits for a clock: when all are waiting, time jumps to the next thing that is due. So patience may be
longer than any round, and whether somebody waited it out shows in how long the round took.
"""

from __future__ import annotations

import asyncio
import selectors
from collections.abc import Callable, Collection, Coroutine, Mapping, Sequence
from dataclasses import dataclass, field
from math import ceil
from random import Random
from typing import TYPE_CHECKING, Any, TypeVar, cast

import numpy

from peer.engine.span import SpanLoss, SpanTicket
from peer.pipeline.board import Board
from peer.pipeline.caller import HopCaller
from peer.pipeline.compute import ComputeThread, Priority
from peer.pipeline.demand import WAVES, Demand, InFlight
from peer.pipeline.feeder import FIRST_STAGE, Feeder
from peer.pipeline.gate import Gate
from peer.pipeline.span import SpanRunner
from peer.pipeline.view import Membership, View
from peer.pipeline.waves import Waves
from peer.tasks import Body, Outcome, Pulse, TaskId
from protocol.batches import Microbatch, TaskKind
from protocol.errors import SwarmError, TransientError
from protocol.ids import Lineage, PeerId, RoundId, RunId, StageId, Version
from protocol.signing import SigningKey

if TYPE_CHECKING:
    from peer.data.source import BatchSource
    from peer.engine.span import SpanEngine

T = TypeVar("T")

RUN = RunId("0" * 32)
ROUND = RoundId(0)
SHAPE = (1, 2, 4)
PASS_S = 10.0
"""Of a wave, however many are in it: what counts is that its layers come."""
PATIENCE_S = 5000.0
"""Longer than any round that is played here."""


class _Selector(selectors.SelectSelector):
    def __init__(self) -> None:
        super().__init__()
        self.now_s = 0.0

    def select(self, timeout: float | None = None) -> Any:
        assert timeout is not None, "everybody waits for somebody else"
        self.now_s += max(0.0, timeout)
        return super().select(0)


def in_virtual_time(work: Coroutine[None, None, T]) -> T:
    """Run `work` in a loop of its own whose time only passes when nobody has anything to do."""
    selector = _Selector()
    loop = asyncio.SelectorEventLoop(selector)
    loop.time = lambda: selector.now_s  # type: ignore[method-assign]
    try:
        return loop.run_until_complete(work)
    finally:
        loop.close()


class PlayedCompute:
    """One job at a time, the most urgent first; each takes `PASS_S`, and looks for its wave when it begins."""

    def __init__(self) -> None:
        self._jobs: list[tuple[Priority, int, int, Callable[[], Any], asyncio.Future[Any]]] = []
        self._sequence = 0
        self._is_busy = False

    async def run(self, work: Callable[[], T], *, priority: Priority, age: int = 0, size: int = 1) -> T:
        future: asyncio.Future[T] = asyncio.get_running_loop().create_future()
        self._sequence += 1
        self._jobs.append((priority, age, self._sequence, work, future))
        self._next()
        return await future

    def submit(self, work: Callable[[], T], *, priority: Priority) -> None:
        work()

    def _next(self) -> None:
        if self._is_busy or not self._jobs:
            return
        self._is_busy = True
        job = min(self._jobs, key=lambda job: job[:3])
        self._jobs.remove(job)
        result = job[3]()
        asyncio.get_running_loop().call_later(PASS_S, self._end, job[4], result)

    def _end(self, future: asyncio.Future[Any], result: Any) -> None:
        future.set_result(result)
        self._is_busy = False
        self._next()


class PlayedEngine:
    """Notes how large the waves are that pass it."""

    def __init__(self, stage: StageId, num_stages: int, wave: int) -> None:
        self.first = self.last = stage
        self.is_first, self.is_last = stage == 0, stage == num_stages - 1
        self.wave = wave
        self.waves: dict[str, list[int]] = {
            "forward": [],
            "backward": [],
            "finish": [],
            "forward only": [],
            "score": [],
        }

    def stages_from(self, entry: StageId) -> tuple[StageId, ...]:
        return (entry,)

    def pause(self) -> None:
        return None

    def discard(self, ticket: object) -> None:
        """Nothing is kept."""

    def _note(self, what: str, wave: Sequence[object], result: T) -> list[T | SwarmError]:
        self.waves[what].append(len(wave))
        return [result] * len(wave)

    def forward_wave(self, wave: Sequence[object], *, entry: StageId, round_id: RoundId) -> object:
        ticket = SpanTicket(round_id, entry, [], SHAPE)
        return self._note("forward", wave, (b"body", SHAPE, ticket))

    def forward_only_wave(self, wave: Sequence[object], *, entry: StageId) -> object:
        return self._note("forward only", wave, (b"body", SHAPE))

    def backward_wave(self, wave: Sequence[object]) -> object:
        return self._note("backward", wave, b"gradient")

    def loss_wave(self, wave: Sequence[object], *, entry: StageId, round_id: RoundId) -> object:
        return self._note("finish", wave, SpanLoss(1.0, 2, b"gradient"))

    def evaluate_wave(self, wave: Sequence[object], *, entry: StageId) -> object:
        return self._note("score", wave, SpanLoss(1.0, 2, None))


class PlayedTokens:
    """A round of so many microbatches to train and to evaluate, read from a disk that takes its time."""

    def __init__(self, num_train: int, num_eval: int, delay_s: Callable[[], float]) -> None:
        kinds = [TaskKind.TRAIN] * num_train + [TaskKind.EVAL] * num_eval
        self._plan = tuple(Microbatch(number, kind, (number,)) for number, kind in enumerate(kinds))
        self._delay_s = delay_s

    def plan(self, round_id: RoundId) -> tuple[Microbatch, ...]:
        return self._plan

    async def inputs(self, task: TaskId) -> object:
        await asyncio.sleep(self._delay_s())
        return numpy.zeros((1, 2), dtype=numpy.int64)

    async def labels(self, task: TaskId) -> object:
        await asyncio.sleep(self._delay_s())
        return numpy.zeros((1, 2), dtype=numpy.int64)


class PlayedLink:
    """Hands a task to a replica of the next stage, in turn, and brings back what it answers."""

    def __init__(self, me: PeerId, peers: Callable[[StageId], Sequence[Peer]], delay_s: Callable[[], float]) -> None:
        self._me, self._peers, self._delay_s = me, peers, delay_s
        self.failing: set[int] = set()
        """Numbers whose next attempt comes to nothing."""

    async def send(
        self, task: TaskId, stage: StageId, body: Body, *, pulse: Pulse, deadline_s: float, retries_left: int
    ) -> Outcome:
        await asyncio.sleep(self._delay_s())
        if task.number in self.failing:
            self.failing.remove(task.number)
            raise TransientError("the next stage is gone")
        replicas = self._peers(stage)
        peer = replicas[task.number % len(replicas)]
        pulse_there = Pulse(furthest_stage=stage)
        outcome = await peer.runner.work(
            task, stage, body, caller=self._me, pulse=pulse_there, deadline_s=0.0, retries_left=0
        )
        await asyncio.sleep(self._delay_s())
        return outcome


@dataclass
class Peer:
    """One peer of a stage."""

    id: PeerId
    engine: PlayedEngine
    gate: Gate
    runner: SpanRunner


@dataclass
class Pipeline:
    """Stages of one peer each, unless `replicas` says more, and a round that passes them."""

    waves: Sequence[int]
    """By stage."""
    num_train: int
    in_flight: int | None
    """None: what a feeder grants that knows everybody's waves, and has room."""
    num_eval: int = 0
    patience_s: float = PATIENCE_S
    replicas: Mapping[int, int] = field(default_factory=dict)
    failing: Collection[int] = ()
    """Numbers whose first attempt fails behind the first stage."""
    seed: int | None = None
    """For delays of 0 to 3 s; None: there are none."""
    peers: dict[StageId, list[Peer]] = field(default_factory=dict)
    round_s: float = 0.0
    """How long the last round took."""

    def loads(self, stage: int, what: str) -> list[int]:
        """Return the sizes of the waves of a kind that passed a stage."""
        return [size for peer in self.peers[StageId(stage)] for size in peer.engine.waves[what]]

    def run(self) -> Pipeline:
        """Let one round pass; return us."""
        in_virtual_time(self._run())
        return self

    async def _run(self) -> None:
        random = Random(self.seed)

        def delay_s() -> float:
            return 0.0 if self.seed is None else random.uniform(0.0, 3.0)

        tokens, view = PlayedTokens(self.num_train, self.num_eval, delay_s), View()
        for number, wave in enumerate(self.waves):
            stage = StageId(number)
            self.peers[stage] = [self._peer(stage, wave, tokens, delay_s) for _ in range(self.replicas.get(number, 1))]
            members = {peer.id: 1.0 for peer in self.peers[stage]}
            lineage, version = Lineage(bytes(32)), Version(0)
            view.learn(
                Membership(stage=stage, generation=1, round=ROUND, version=version, lineage=lineage, members=members)
            )
            for peer in self.peers[stage]:
                peer.gate.open(stage, round_id=ROUND, version=version, lineage=lineage)
        done: set[int] = set()
        everything = asyncio.Event()

        def note(board: Board, microbatch: Microbatch, outcome: Outcome) -> None:
            done.add(microbatch.number)
            if len(done) == self.num_train + self.num_eval:
                everything.set()

        in_flight = self._granted(view) if self.in_flight is None else self.in_flight
        feeding = [
            asyncio.create_task(self._feeder(peer, view, tokens, note, in_flight).run())
            for peer in self.peers[FIRST_STAGE]
        ]
        await everything.wait()
        self.round_s = asyncio.get_running_loop().time()
        for task in feeding:
            task.cancel()
        await asyncio.gather(*feeding, return_exceptions=True)

    def _peer(self, stage: StageId, wave: int, tokens: PlayedTokens, delay_s: Callable[[], float]) -> Peer:
        key, gate, engine = SigningKey.generate(), Gate(run=RUN), PlayedEngine(stage, len(self.waves), wave)
        compute = cast(ComputeThread, PlayedCompute())
        link = PlayedLink(key.peer_id, lambda following: self.peers[following], delay_s)
        link.failing = set(self.failing) if stage == FIRST_STAGE else set()
        runner = SpanRunner(
            run=RUN,
            key=key,
            engine=cast("SpanEngine", engine),
            compute=compute,
            waves=Waves(compute, size=lambda: engine.wave, patience_s=self.patience_s),
            caller=cast(HopCaller, link),
            gate=gate,
            batches=cast("BatchSource", tokens),
        )
        return Peer(key.peer_id, engine, gate, runner)

    def _granted(self, view: View) -> int:
        demand = Demand(view, last=FIRST_STAGE)
        demand.learn({stage: {peer.id: peer.engine.wave for peer in peers} for stage, peers in self.peers.items()})
        own = max(len(self.waves) + 1, WAVES * self.waves[0])
        return InFlight(demand, own=own, most=self.num_train + self.num_eval).limit()

    def _feeder(
        self, peer: Peer, view: View, tokens: PlayedTokens, note: Callable[..., None], in_flight: int
    ) -> Feeder:
        return Feeder(
            run=RUN,
            me=peer.id,
            runner=peer.runner,
            gate=peer.gate,
            view=view,
            batches=cast("BatchSource", tokens),
            on_board=lambda board: None,
            on_finished=note,
            in_flight=lambda: in_flight,
            wave_of=lambda peer: 1,
            round_deadline_s=3600.0,
            first_takeover_s=3600.0,
        )


def full_waves(count: int, wave: int) -> list[int]:
    """Return the sizes of the waves of `count` microbatches, the last one with the rest."""
    return [min(wave, count - start * wave) for start in range(ceil(count / wave))]
