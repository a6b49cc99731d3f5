"""When a peer gives up on itself. The engine and the tokens are played; the compute thread is the real one."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, cast

import pytest

from peer.engine.span import SpanLoss
from peer.memory.executor import Pause
from peer.pipeline import span
from peer.pipeline.caller import HopCaller
from peer.pipeline.compute import ComputeThread
from peer.pipeline.gate import Gate
from peer.pipeline.span import MAX_OWN_FAULTS, SpanRunner
from peer.pipeline.waves import Waves
from peer.tasks import Body, Outcome, Pulse, RoundOver, TaskId
from protocol.batches import Microbatch, TaskKind
from protocol.errors import LocalFault, PeerFault, SwarmError, WireError
from protocol.ids import PeerId, RoundId, RunId, StageId
from protocol.paths import read_path
from protocol.signing import SigningKey

if TYPE_CHECKING:
    from peer.data.source import BatchSource
    from peer.engine.span import SpanEngine

RUN = RunId("0" * 32)
LAST = StageId(2)
CALLER = PeerId("caller")


class PlayedEngine:
    """A span of the last two stages that does what it is told."""

    def __init__(self) -> None:
        self.first, self.is_last = StageId(1), True
        self.errors: list[Exception] = []
        self.paused: Pause | None = None

    def stages_from(self, entry: StageId) -> tuple[StageId, ...]:
        return tuple(stage for stage in (StageId(1), LAST) if stage >= entry)

    def pause(self) -> Pause | None:
        return self.paused

    def loss_wave(self, wave: list[object], *, entry: StageId, round_id: RoundId) -> list[SpanLoss | SwarmError]:
        if self.errors:
            raise self.errors.pop(0)
        return [SpanLoss(1.0, 2, b"gradient") for _ in wave]


class PlayedTokens:
    """Labels that nobody looks at, of a round of one."""

    def plan(self, round_id: RoundId) -> list[Microbatch]:
        return [Microbatch(0, TaskKind.TRAIN, (0,))]

    async def labels(self, task: TaskId) -> None:
        return None


class Played:
    """A runner, and the task that waits for it to break."""

    def __init__(self, compute: ComputeThread) -> None:
        self.engine = PlayedEngine()
        self.asked_for_pause: list[bool] = []
        self.blamed: list[tuple[PeerId, RoundId]] = []
        self.runner = SpanRunner(
            run=RUN,
            key=SigningKey.generate(),
            engine=cast("SpanEngine", self.engine),
            compute=compute,
            waves=Waves(compute),
            caller=cast(HopCaller, None),
            gate=Gate(run=RUN),
            batches=cast("BatchSource", PlayedTokens()),
            on_pause=lambda: self.asked_for_pause.append(True),
            on_nonsense=lambda peer, task: self.blamed.append((peer, task.round)),
        )
        self.broken = asyncio.create_task(self.runner.wait_broken())

    async def work(self, *, entry: StageId = LAST) -> Outcome:
        return await self.runner.work(
            TaskId(TaskKind.TRAIN, RoundId(0), 0),
            entry,
            Body.of(b"body", (1, 2, 4)),
            caller=CALLER,
            pulse=Pulse(furthest_stage=entry),
            deadline_s=0.0,
            retries_left=0,
        )


@pytest.fixture
async def played() -> AsyncIterator[Played]:
    compute = ComputeThread()
    one = Played(compute)
    yield one
    one.broken.cancel()
    await compute.stop()


async def test_a_machine_that_computes_nothing_but_nonsense_gives_up(played: Played) -> None:
    """Others would send it task after task, and it would cost each of them a retry."""
    played.engine.errors = [LocalFault("the gradient is not finite.") for _ in range(MAX_OWN_FAULTS)]
    for _ in range(MAX_OWN_FAULTS):
        assert not played.broken.done()
        with pytest.raises(LocalFault):
            await played.work()
    with pytest.raises(LocalFault):
        await asyncio.wait_for(played.broken, 1.0)


async def test_one_microbatch_that_works_makes_up_for_all_that_did_not(played: Played) -> None:
    for _ in range(3):
        played.engine.errors = [LocalFault("the gradient is not finite.") for _ in range(MAX_OWN_FAULTS - 1)]
        for _ in range(MAX_OWN_FAULTS - 1):
            with pytest.raises(LocalFault):
                await played.work()
        await played.work()
    assert not played.broken.done()


@pytest.mark.parametrize("kind", [PeerFault, RoundOver])
async def test_what_others_send_never_counts_as_our_fault(played: Played, kind: type[SwarmError]) -> None:
    played.engine.errors = [kind("it went wrong")] * (2 * MAX_OWN_FAULTS)
    for _ in range(2 * MAX_OWN_FAULTS):
        with pytest.raises(kind):
            await played.work()
    assert not played.broken.done()


@pytest.mark.parametrize(("kind", "blames"), [(WireError, True), (PeerFault, False), (LocalFault, False)])
async def test_whoever_sends_what_are_no_numbers_is_named(played: Played, kind: type[SwarmError], blames: bool) -> None:
    """Not who did nothing but ask. Oracle: the caller and the round."""
    played.engine.errors = [kind("it went wrong")]
    with pytest.raises(kind):
        await played.work()
    assert played.blamed == [(CALLER, RoundId(0))] * blames


async def test_a_machine_that_needs_a_pause_is_not_broken(played: Played, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its drive's writes of the day are spent, say. Oracle: more faults than make it give up; the session is told."""
    monkeypatch.setattr(span, "PAUSING_S", 0.0)
    played.engine.errors = [LocalFault("today's writes are spent.") for _ in range(2 * MAX_OWN_FAULTS)]
    played.engine.paused = Pause("today's writes are spent.", 60.0)
    for _ in range(2 * MAX_OWN_FAULTS):
        with pytest.raises(LocalFault):
            await played.work()
    assert not played.broken.done()
    assert len(played.asked_for_pause) == 2 * MAX_OWN_FAULTS


async def test_a_bug_ends_the_process_and_is_not_answered_for_ever(played: Played) -> None:
    """Oracle: an error from outside the tree, which nobody may swallow."""
    played.engine.errors = [ZeroDivisionError("a bug")]
    with pytest.raises(ZeroDivisionError):
        await played.work()
    with pytest.raises(ZeroDivisionError):
        await asyncio.wait_for(played.broken, 1.0)


@pytest.mark.parametrize(("entry", "stages"), [(StageId(1), (1, 2)), (LAST, (2,))])
async def test_the_signed_entry_names_the_stages_that_were_run(
    played: Played, entry: StageId, stages: tuple[int, ...]
) -> None:
    outcome = await played.work(entry=entry)
    assert read_path(outcome.path, caller=CALLER)[0].stages == stages
