"""Stage 0 feeds every number of a round until the round is over, whoever was said to have done it.

Oracle: the numbers that reach the runner. The runner is played; gate, view and board are the real ones.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import cast

import pytest

from peer.data.source import BatchSource
from peer.pipeline import feeder
from peer.pipeline.board import Board
from peer.pipeline.feeder import FIRST_STAGE, Feeder
from peer.pipeline.gate import Gate
from peer.pipeline.span import SpanRunner
from peer.pipeline.view import View
from peer.tasks import Outcome, TaskId
from protocol.batches import Microbatch, TaskKind
from protocol.errors import LocalFault, PeerFault, RefusedError, SwarmError, TransientError, WireError
from protocol.ids import Lineage, PeerId, RoundId, RunId, Version, digest

ME = PeerId("me")
RUN = RunId("0" * 32)
COUNT = 3
ERRORS = 7
DONE = Outcome(None, digest(), 1.0, 10, ())


class Played:
    """A round of three numbers and a runner that notes what it is fed."""

    def __init__(self) -> None:
        self.fed: list[tuple[RoundId, int]] = []
        self.boards: list[Board] = []
        self.go = asyncio.Event()
        self.errors: list[SwarmError] = []
        """What the next microbatches end in."""
        self.in_flight = 2
        self.may_follow: Callable[[], bool] = lambda: False
        """As the last one that was fed has it."""
        self.gate = Gate(run=RUN)
        self.feeder = Feeder(
            run=RUN,
            me=ME,
            runner=cast(SpanRunner, self),
            gate=self.gate,
            view=View(),
            batches=cast(BatchSource, self),
            on_board=self.boards.append,
            on_finished=lambda board, microbatch, outcome: None,
            in_flight=lambda: self.in_flight,
            wave_of=lambda peer: 1,
            round_deadline_s=60.0,
            first_takeover_s=4.0,
        )

    def plan(self, round_id: RoundId) -> list[Microbatch]:
        return [Microbatch(kind=TaskKind.TRAIN, number=number, windows=(number,)) for number in range(COUNT)]

    async def feed(self, task: TaskId, *, may_follow: Callable[[], bool], **_: object) -> Outcome:
        self.fed.append((task.round, task.number))
        self.may_follow = may_follow
        await self.go.wait()
        if self.errors:
            raise self.errors.pop()
        return DONE

    def open(self, round_id: int, lineage: bytes = bytes(32)) -> None:
        self.gate.open(FIRST_STAGE, round_id=RoundId(round_id), version=Version(0), lineage=Lineage(lineage))


async def until(condition: Callable[[], bool]) -> None:
    for _ in range(2000):
        if condition():
            return
        await asyncio.sleep(0.001)
    raise AssertionError("that did not happen")


async def test_a_number_that_only_a_dead_clock_knew_to_be_done_is_fed_after_all() -> None:
    played = Played()
    feeding = asyncio.create_task(played.feeder.run())
    played.open(0)
    await until(lambda: len(played.fed) == 2)  # in flight
    played.boards[0].learn_done(range(COUNT), now_s=0.0)  # the clock says that everything is done, and dies
    played.go.set()
    await asyncio.sleep(0.01)
    assert len(played.fed) == 2
    played.boards[0].learn_done((), now_s=0.0)
    await until(lambda: len(played.fed) == COUNT)
    feeding.cancel()


async def test_more_are_kept_under_way_as_soon_as_more_are_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: one number at first, and in the same round a second one; no more when fewer are wanted again."""
    monkeypatch.setattr(feeder, "IDLE_S", 0.01)
    played = Played()
    played.in_flight = 1
    feeding = asyncio.create_task(played.feeder.run())
    played.open(0)
    await until(lambda: len(played.fed) == 1)
    await asyncio.sleep(0.03)
    assert len(played.fed) == 1
    played.in_flight = 2
    await until(lambda: len(played.fed) == 2)
    played.in_flight = 1
    await asyncio.sleep(0.03)
    assert len(played.fed) == 2
    feeding.cancel()


async def test_nothing_follows_before_something_comes_back_if_no_more_is_wanted_under_way() -> None:
    """Or a wave would wait for a number that nobody brings. Oracle: of three numbers two are wanted, then all."""
    played = Played()
    feeding = asyncio.create_task(played.feeder.run())
    played.open(0)
    await until(lambda: len(played.fed) == 2)
    assert not played.may_follow()
    played.in_flight = 3
    assert played.may_follow()
    feeding.cancel()


async def test_a_round_that_is_opened_again_in_a_new_lineage_is_fed_again() -> None:
    """Oracle: every number once per opening: the new lineage begins with empty sums."""
    played = Played()
    played.go.set()
    feeding = asyncio.create_task(played.feeder.run())
    played.open(4)
    await until(lambda: len(played.fed) == COUNT)
    played.open(4, lineage=bytes([1] * 32))
    await until(lambda: len(played.fed) == 2 * COUNT)
    played.gate.freeze(FIRST_STAGE)
    played.open(5)
    await until(lambda: len(played.fed) == 3 * COUNT)
    assert sorted(played.fed) == sorted(2 * [(4, n) for n in range(COUNT)] + [(5, n) for n in range(COUNT)])
    feeding.cancel()


@pytest.mark.parametrize("kind", [TransientError, PeerFault, WireError, RefusedError, LocalFault])
async def test_whatever_a_microbatch_ends_in_its_number_is_fed_again(
    kind: type[SwarmError], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A wrong token chunk or a gradient that is not finite comes from somebody else, and must not end this peer."""
    monkeypatch.setattr(feeder, "BACKOFF_S", 0.0)
    monkeypatch.setattr(feeder, "IDLE_S", 0.01)
    played = Played()
    played.errors = [kind("it went wrong")] * ERRORS
    played.go.set()
    feeding = asyncio.create_task(played.feeder.run())
    played.open(0)
    await until(lambda: len(played.fed) == COUNT + ERRORS)
    await until(lambda: played.boards[0].num_left == 0)
    feeding.cancel()
