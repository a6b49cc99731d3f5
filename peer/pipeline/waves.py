"""Gathers microbatches into waves: those that want the same pass go through the span together.

Owns: when a wave starts. Must not know: tensors, streams, what a pass does. `peer/engine/span.py` runs a wave layer by
layer, so one load of a layer from host memory or disk serves all of it; a peer whose stages fit its device has waves
of one, and everything here is a call.

A wave starts when it is full, when nobody else can come, or when the first in it has waited long enough. Who can come
is what a peer knows by itself: those that it expects (a gradient that another peer is at, say), and whatever may follow
them (`may_follow`: others of the round that have not been here). What arrives while the compute thread is still busy
with something else joins as well.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

from peer.pipeline.compute import ComputeThread, Priority
from protocol.errors import SwarmError

Item = TypeVar("Item")
Result = TypeVar("Result")


def nobody() -> bool:
    """Say that nothing follows but what is expected."""
    return False


@dataclass(slots=True)
class _Gathering:
    """Items of one kind that have not started yet, each with whoever waits for it; the oldest number first."""

    work: Callable[[list[Any]], Sequence[Any]]
    priority: Priority
    may_follow: Callable[[], bool]
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
        self._expected: Counter[Hashable] = Counter()
        self._gatherings: dict[Hashable, _Gathering] = {}
        self._running: set[asyncio.Task[None]] = set()

    @property
    def num_gathering(self) -> int:
        """How many microbatches wait for others."""
        return sum(len(gathering.waiting) for gathering in self._gatherings.values() if not gathering.is_started)

    def close(self) -> None:
        """Let go of everything: nothing may hold on to the span's memory."""
        for gathering in self._gatherings.values():
            _stop_timer(gathering)
            for _, _, future in gathering.waiting:
                future.cancel()
        for task in self._running:
            task.cancel()
        self._gatherings.clear()

    @contextmanager
    def expecting(self, kind: Hashable) -> Iterator[None]:
        """Expect one more of a kind while the block runs: what has gathered waits for it.

        Afterwards it has to come before the caller awaits anything else; otherwise it never will.
        """
        self._expected[kind] += 1
        try:
            yield
        finally:
            self._expected[kind] -= 1
            if not self._expected[kind]:
                del self._expected[kind]
            asyncio.get_running_loop().call_soon(self._consider, kind)  # it may be that it will not come

    async def run(
        self,
        kind: Hashable,
        item: Item,
        work: Callable[[list[Item]], Sequence[Result | SwarmError]],
        *,
        priority: Priority,
        age: int,
        may_follow: Callable[[], bool],
    ) -> Result:
        """Do `work` on a wave that `item` is part of, in the compute thread; return or raise what it says of this one.

        `may_follow` tells whether any may come of whom `expecting` says nothing yet; that of the newest item counts: a
        round that is opened again has another board. `work` has to be the same for all items of a kind.
        """
        if self._size() == 1:
            (result,) = await self._compute.run(lambda: work([item]), priority=priority, age=age)
            if isinstance(result, SwarmError):
                raise result
            return result
        future: asyncio.Future[Result] = asyncio.get_running_loop().create_future()
        gathering = self._gatherings.setdefault(kind, _Gathering(work, priority, may_follow))
        gathering.may_follow = may_follow
        gathering.waiting.append((age, item, future))
        self._consider(kind)
        try:
            return await future
        except asyncio.CancelledError:
            self._consider(kind)  # whoever is left may have nobody to wait for any more
            raise

    def _consider(self, kind: Hashable) -> None:
        """Start the next wave of a kind if there is nothing to wait for."""
        gathering = self._gatherings.get(kind)
        if gathering is None or gathering.is_started:
            return
        _drop_done(gathering)
        if not gathering.waiting:
            _stop_timer(gathering)
            del self._gatherings[kind]
        elif len(gathering.waiting) >= self._size() or not (kind in self._expected or gathering.may_follow()):
            self._start(kind, gathering)
        elif gathering.timer is None:
            loop = asyncio.get_running_loop()
            gathering.timer = loop.call_later(self._patience_s, self._start, kind, gathering)

    def _start(self, kind: Hashable, gathering: _Gathering) -> None:
        """Queue the next wave of a kind. Who is in it is decided when the compute thread gets to it."""
        _stop_timer(gathering)
        gathering.is_started = True
        task = asyncio.create_task(self._run(kind, gathering))
        self._running.add(task)
        task.add_done_callback(self._running.discard)

    async def _run(self, kind: Hashable, gathering: _Gathering) -> None:
        wave: list[tuple[int, Any, asyncio.Future[Any]]] = []

        def run() -> Sequence[Any]:
            # this thread alone takes from the list while the wave is marked as started; the loop only appends
            here = sorted((each for each in list(gathering.waiting) if not each[2].done()), key=lambda each: each[0])
            wave.extend(here[: self._size()])
            return gathering.work([item for _, item, _ in wave]) if wave else ()

        oldest = min((age for age, _, _ in gathering.waiting), default=0)
        try:
            results: Sequence[Any] = await self._compute.run(
                run, priority=gathering.priority, age=oldest, size=min(len(gathering.waiting), self._size())
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
        self._consider(kind)


def _drop_done(gathering: _Gathering) -> None:
    """Forget who has a result, or has given up."""
    gathering.waiting = [each for each in gathering.waiting if not each[2].done()]


def _stop_timer(gathering: _Gathering) -> None:
    if gathering.timer is not None:
        gathering.timer.cancel()
        gathering.timer = None


def _settle(future: asyncio.Future[Any], result: Any) -> None:
    if future.done():
        return
    if isinstance(result, Exception):
        future.set_exception(result)
    else:
        future.set_result(result)
