"""Stage 0's duty: bring every microbatch of the round into the pipeline.

Owns: how many microbatches this peer keeps in flight, and trying again what failed. Must not know:
who closes the round (the gate says when it is over) or how bits travel (the board holds them).
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

import structlog

from peer.data.source import BatchSource
from peer.pipeline.board import Board, takeover_s
from peer.pipeline.gate import Gate, Opening
from peer.pipeline.span import SpanRunner
from peer.pipeline.view import View
from peer.tasks import Outcome, Pulse, RoundOver, TaskId
from protocol.batches import Microbatch, TaskKind
from protocol.errors import SwarmError
from protocol.ids import PeerId, RunId, StageId

log = structlog.get_logger()

FIRST_STAGE = StageId(0)
RETRIES = 3  # re-sends that one attempt may spend over all hops together (each hop passes on what is left)
BACKOFF_S = 0.5
SMOOTHING = 0.2
IDLE_S = 0.5  # how often a feeder with nothing to do looks for numbers to take over


class Feeder:
    """Feeds one round after the other, for as long as this peer hosts stage 0."""

    def __init__(
        self,
        *,
        run: RunId,
        me: PeerId,
        runner: SpanRunner,
        gate: Gate,
        view: View,
        batches: BatchSource,
        on_board: Callable[[Board], None],
        on_finished: Callable[[Board, Microbatch, Outcome], None],
        in_flight: Callable[[], int],
        wave_of: Callable[[PeerId], int],
        round_deadline_s: float,
        first_takeover_s: float,
    ) -> None:
        """`on_board` is called with every round's board before anything is fed, `on_finished` with every done bit.

        `in_flight` says how many microbatches to keep in the pipeline at the moment, `wave_of` how many pass another
        feeder together; `first_takeover_s` is how long others are left in peace before we know what a microbatch takes.
        """
        self._run = run
        self._me = me
        self._runner = runner
        self._gate = gate
        self._view = view
        self._batches = batches
        self._on_board = on_board
        self._on_finished = on_finished
        self._in_flight = in_flight
        self._wave_of = wave_of
        self._round_deadline_s = round_deadline_s
        self._first_takeover_s = first_takeover_s
        self._task_s: float | None = None
        self.num_fed_again = 0
        """Microbatches that had been fed before, by us or by an owner who did not bring them."""

    async def run(self) -> None:
        """Feed rounds until cancelled."""
        while True:
            await self._feed_round(await self._gate.wait_open(FIRST_STAGE))

    async def _feed_round(self, opening: Opening) -> None:
        round_id = opening.round
        membership = self._view.membership(FIRST_STAGE)
        feeders = {self._me: 1.0} if membership is None else membership.members
        board = Board(
            round_id,
            plan=self._batches.plan(round_id),
            seed=self._run,
            me=self._me,
            feeders=feeders,
            takeover_s=self._takeover_s,
            is_gone=self._view.is_gone,
            now_s=time.monotonic(),
        )
        self._on_board(board)
        over = asyncio.create_task(self._gate.wait_over(opening))
        lanes: list[asyncio.Task[None]] = []
        try:
            while not over.done():
                for lane in range(len(lanes), self._in_flight()):  # never fewer; those that are too many rest
                    feeding = self._feed_lane(board, opening)
                    lanes.append(asyncio.create_task(feeding, name=f"feed-{round_id}-{lane}"))
                await asyncio.wait({over, *lanes}, timeout=IDLE_S, return_when=asyncio.FIRST_COMPLETED)
                for ended in filter(asyncio.Task.done, lanes):
                    ended.result()  # a lane only ends before the round by an error of ours
        finally:
            for task in (over, *lanes):
                task.cancel()
            await asyncio.gather(over, *lanes, return_exceptions=True)

    async def _feed_lane(self, board: Board, opening: Opening) -> None:
        """Keep one microbatch in flight until the round is over, if so many are wanted.

        Not until everything is done: what only a clock knew to be done has to be fed again if it dies.
        """
        deadline_s = time.monotonic() + self._round_deadline_s
        while opening.is_open:
            microbatch = board.take_next(now_s=time.monotonic()) if self._has_room(board) else None
            if microbatch is None:
                await board.wait_changed(timeout_s=IDLE_S)
                continue
            self.num_fed_again += board.is_second_hand(microbatch)
            await self._feed_one(board, microbatch, deadline_s)

    async def _feed_one(self, board: Board, microbatch: Microbatch, deadline_s: float) -> None:
        task = TaskId(microbatch.kind, board.round, microbatch.number)
        started_s = time.monotonic()
        try:
            outcome = await self._runner.feed(
                task,
                pulse=Pulse(furthest_stage=FIRST_STAGE),
                deadline_s=deadline_s,
                retries_left=RETRIES,
                may_follow=lambda: self._may_follow(board, microbatch.kind),
            )
            self._on_finished(board, microbatch, outcome)
        except RoundOver as error:
            log.debug("feed.over", round=board.round, number=microbatch.number, why=str(error))
            board.give_back(microbatch, not_before_s=time.monotonic() + BACKOFF_S)
        except SwarmError as error:  # whatever a remote peer did: the number is fed again
            log.info("feed.retry", round=board.round, number=microbatch.number, why=error.one_line())
            board.give_back(microbatch, not_before_s=time.monotonic() + BACKOFF_S)
        else:
            board.finish(microbatch, now_s=time.monotonic())
            self._learn(time.monotonic() - started_s)

    def _has_room(self, board: Board) -> bool:
        """Tell whether another may be fed before any that are under way have come back."""
        return board.num_in_flight < self._in_flight()

    def _may_follow(self, board: Board, kind: TaskKind) -> bool:
        """Tell whether a wave should wait for another number of a kind.

        Not for one that can only be fed once a gradient has come back: those come in waves, and so does what follows
        them. But evaluations come back one by one, and each that follows one would pass alone.
        """
        is_awaited = kind is TaskKind.EVAL or self._has_room(board)
        return is_awaited and board.has_next(kind, now_s=time.monotonic())

    def _takeover_s(self, owner: PeerId) -> float:
        return takeover_s(self._task_s, at_first_s=self._first_takeover_s, wave=self._wave_of(owner))

    def _learn(self, task_s: float) -> None:
        """One microbatch went all the way: this is how long one takes."""
        self._task_s = task_s if self._task_s is None else self._task_s + SMOOTHING * (task_s - self._task_s)
