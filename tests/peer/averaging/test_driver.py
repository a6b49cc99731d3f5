"""What a stage's driver does with its queue. The machine and everything around it are played.

Oracle: the events that reach the machine, and the steps that reach the engine.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, cast

import pytest

from peer.averaging.driver import MAX_INBOX, Hooks, StageDriver
from peer.reports import ReportQueue
from protocol.errors import BusyError, UnreachableError
from protocol.ids import Digest, Lineage, PeerId, RoundId, StageId, Version, digest
from protocol.rounds import events
from protocol.rounds.messages import Hello

STAGE = StageId(1)
ANNE = PeerId("anne")
BEAT_S = 0.01


class Machine:
    """Notes what it is told; may be held up, and asked for actions."""

    def __init__(self) -> None:
        self.seen: list[events.Event] = []
        self.answers: list[list[Any]] = []

    def handle(self, event: events.Event, now_s: float) -> list[Any]:
        self.seen.append(event)
        return self.answers.pop(0) if self.answers else []


@dataclass
class Engine:
    version: int = 5

    def state_digest(self) -> Digest:
        return digest(str(self.version).encode())


class Sync:
    """Replays by counting up; the first attempt at `fails_at` finds nobody."""

    def __init__(self, engine: Engine, *, fails_at: int) -> None:
        self._engine = engine
        self._fails_at = fails_at
        self.replayed: list[int] = []

    async def replay(self, commits: tuple[Any, ...], *, sources: object) -> None:
        (signed,) = commits
        if signed.version == self._fails_at:
            self._fails_at = 0
            raise UnreachableError("nobody has it")
        self.replayed.append(signed.version)
        self._engine.version = signed.version


class Case:
    def __init__(self, *, fails_at: int = 0) -> None:
        self.machine = Machine()
        self.engine = Engine()
        self.sync = Sync(self.engine, fails_at=fails_at)
        self.held = asyncio.Event()
        self.held.set()
        self.driver = StageDriver(
            STAGE,
            manifest=cast(
                Any, SimpleNamespace(batch=SimpleNamespace(num_rounds=9), keeping=SimpleNamespace(checkpoint_every=9))
            ),
            machine=cast(Any, self.machine),
            me=PeerId("me"),
            engine=cast(Any, SimpleNamespace(engines={STAGE: self.engine}, open=lambda *_, **__: None)),
            compute=cast(Any, self),
            calls=cast(Any, None),
            reduce=cast(Any, None),
            sync=cast(Any, self.sync),
            history=cast(Any, None),
            gate=cast(Any, SimpleNamespace(open=lambda *_, **__: None)),
            view=cast(Any, SimpleNamespace(learn=lambda membership: None)),
            reports=ReportQueue(),
            hooks=Hooks(
                on_freeze=lambda closing: None,
                on_commit=lambda commit, signed: None,
                sources=lambda: (),
                on_own_closing=lambda message: None,
                on_lost=lambda: None,
            ),
            beat_s=BEAT_S,
        )

    async def run(self, work: Any, **_: object) -> Any:
        """As the compute thread, which may be busy."""
        await self.held.wait()
        return work()


def step(version: int) -> events.CommitStep:
    """A commit that only its version is looked at of."""
    commit = SimpleNamespace(version=Version(version))
    return cast(events.CommitStep, SimpleNamespace(commit=commit, signed=commit, lineage=Lineage(bytes(32))))


async def until(condition: Any) -> None:
    for _ in range(2000):
        if condition():
            return
        await asyncio.sleep(0.001)
    raise AssertionError("that did not happen")


def hello() -> Hello:
    return cast(Hello, SimpleNamespace(stage=STAGE))


async def test_strangers_cannot_fill_the_memory_of_a_stage_that_is_busy() -> None:
    case = Case()
    for _ in range(MAX_INBOX):
        case.driver.receive(ANNE, hello())
    with pytest.raises(BusyError):
        case.driver.receive(ANNE, hello())
    case.driver.post(events.Tick())  # what is our own is never refused
    running = asyncio.create_task(case.driver.run())
    await until(lambda: len(case.machine.seen) > MAX_INBOX)
    case.driver.receive(ANNE, hello())
    running.cancel()


async def test_a_long_step_is_followed_by_one_tick_and_not_by_all_that_were_missed() -> None:
    """Each of them would repeat every message that nobody has acknowledged."""
    case = Case()
    opening = events.OpenRound(
        round=RoundId(1), version=Version(5), lineage=Lineage(bytes(32)), members=(ANNE,), fresh=True
    )
    case.machine.answers = [[opening]]
    case.held.clear()
    running = asyncio.create_task(case.driver.run())
    await asyncio.sleep(20 * BEAT_S)
    assert len(case.machine.seen) == 1
    case.held.set()
    await until(lambda: len(case.machine.seen) >= 2)
    assert len(case.machine.seen) <= 3
    assert all(isinstance(event, events.Tick) for event in case.machine.seen)
    running.cancel()


async def test_a_replay_goes_on_where_the_last_attempt_ended() -> None:
    """Otherwise a source that dies in the middle would cost a download of the whole state."""
    case = Case(fails_at=7)
    steps = (step(6), step(7), step(8))
    case.driver._after_step = cast(Any, lambda *_, **__: None)  # type: ignore[method-assign]
    running = asyncio.create_task(case.driver.run())
    await case.driver._replay(steps, ())
    await until(lambda: any(isinstance(event, events.ApplyFailed) for event in case.machine.seen))
    await case.driver._replay(steps, ())
    assert case.sync.replayed == [6, 7, 8]
    running.cancel()
