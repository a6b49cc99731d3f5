"""Gathers microbatches into waves: those that want the same pass go through the span together.

Owns: when a wave starts. Must not know: tensors, streams, what a pass does. `peer/engine/span.py` runs a wave layer by
layer, so one load of a layer from host memory or disk serves all of it; a peer whose stages fit its device has waves
of one, and everything here is a call.

A wave never waits for more than is there: it starts when it is full, or when the first has waited long enough. What
arrives while the compute thread is still busy with something else joins it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from peer.pipeline.compute import ComputeThread, Priority
from protocol.errors import SwarmError

Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(slots=True)
class _Gathering:
    """Items of one kind that have not started yet, each with whoever waits for it; the oldest number first."""

    waiting: list[tuple[int, Any, asyncio.Future[Any]]] = field(default_factory=list)
    timer: asyncio.TimerHandle | None = None
    is_started: bool = False


class Waves:
    """The waves of one span. Used on the event loop."""

    def __init__(self, compute: ComputeThread, *, size: Callable[[], int] = lambda: 1, patience_s: float = 0.0) -> None:
        """`size` says how many a wave should have at the moment."""
        self._compute = compute
        self._size = size
        self._patience_s = patience_s
        self._gatherings: dict[Hashable, _Gathering] = {}
        self._running: set[asyncio.Task[None]] = set()

    @property
    def num_gathering(self) -> int:
        """How many microbatches wait for others."""
        return sum(len(gathering.waiting) for gathering in self._gatherings.values() if not gathering.is_started)

    def close(self) -> None:
        """Let go of everything: nothing may hold on to the span's memory."""
        for gathering in self._gatherings.values():
            if gathering.timer is not None:
                gathering.timer.cancel()
            for _, _, future in gathering.waiting:
                future.cancel()
        for task in self._running:
            task.cancel()
        self._gatherings.clear()

    async def run(
        self,
        kind: Hashable,
        item: Item,
        work: Callable[[list[Item]], Sequence[Result | SwarmError]],
        *,
        priority: Priority,
        age: int,
    ) -> Result:
        """Do `work` on a wave that `item` is part of, in the compute thread; return or raise what it says of this one.

        `work` has to be the same for all items of a kind.
        """
        if self._size() == 1:
            (result,) = await self._compute.run(lambda: work([item]), priority=priority, age=age)
            if isinstance(result, SwarmError):
                raise result
            return result
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Result] = loop.create_future()
        gathering = self._gatherings.setdefault(kind, _Gathering())
        gathering.waiting.append((age, item, future))
        if len(gathering.waiting) >= self._size():
            self._start(kind, work, priority)
        elif gathering.timer is None and not gathering.is_started:
            self._start_later(kind, work, priority)
        return await future

    def _start_later(self, kind: Hashable, work: Callable[[list[Any]], Sequence[Any]], priority: Priority) -> None:
        loop = asyncio.get_running_loop()
        self._gatherings[kind].timer = loop.call_later(self._patience_s, self._start, kind, work, priority)

    def _start(self, kind: Hashable, work: Callable[[list[Any]], Sequence[Any]], priority: Priority) -> None:
        """Queue the next wave of a kind. Who is in it is decided when the compute thread gets to it."""
        gathering = self._gatherings.get(kind)
        if gathering is None:  # closed
            return
        if gathering.timer is not None:
            gathering.timer.cancel()
            gathering.timer = None
        if gathering.is_started:
            return
        gathering.is_started = True
        task = asyncio.create_task(self._run(kind, gathering, work, priority))
        self._running.add(task)
        task.add_done_callback(self._running.discard)

    async def _run(
        self, kind: Hashable, gathering: _Gathering, work: Callable[[list[Any]], Sequence[Any]], priority: Priority
    ) -> None:
        wave: list[tuple[int, Any, asyncio.Future[Any]]] = []

        def run() -> Sequence[Any]:
            # this thread alone takes from the list while the wave is marked as started; the loop only appends
            here = sorted((each for each in list(gathering.waiting) if not each[2].done()), key=lambda each: each[0])
            wave.extend(here[: self._size()])
            return work([item for _, item, _ in wave]) if wave else ()

        oldest = min((age for age, _, _ in gathering.waiting), default=0)
        try:
            results: Sequence[Any] = await self._compute.run(
                run, priority=priority, age=oldest, size=min(len(gathering.waiting), self._size())
            )
        except asyncio.CancelledError:  # of the compute thread, or of us
            for _, _, future in gathering.waiting:
                future.cancel()
            raise
        except Exception as error:  # noqa: BLE001 - goes to whoever waits for it, like any result
            results = [error] * len(wave)
        for (_, _, future), result in zip(wave, results, strict=True):
            _settle(future, result)
        gathering.is_started = False
        gathering.waiting = [each for each in gathering.waiting if not each[2].done()]
        if len(gathering.waiting) >= self._size():
            self._start(kind, work, priority)
        elif gathering.waiting:  # they came late: others may come yet
            self._start_later(kind, work, priority)
        else:
            self._gatherings.pop(kind, None)


def _settle(future: asyncio.Future[Any], result: Any) -> None:
    if future.done():
        return
    if isinstance(result, Exception):
        future.set_exception(result)
    else:
        future.set_result(result)
