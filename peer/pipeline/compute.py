"""The one thread in which all device work happens.

Owns: the thread, its priority queue, and how a result gets back to the event loop. Must not know: what
the work is. Backward goes before forward (it frees memory and unblocks others), and within a class the
oldest microbatch first, so a round never waits for one forgotten number.

The thread runs at low priority: the machine's owner goes first, and so do this peer's own messages, which
others wait for.
"""

from __future__ import annotations

import asyncio
import heapq
import os
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any, TypeVar

T = TypeVar("T")

SMOOTHING = 0.2  # weight of the newest job in the mean: follows a card that throttles within a few jobs
NICENESS = 10  # of 19; a thread of normal priority gets about ten times the share


class Priority(IntEnum):
    """What runs first when several jobs wait."""

    CONTROL = 0
    """Freezing a round, applying an update: everything else waits for it anyway."""
    BACKWARD = 1
    FORWARD = 2
    AUDIT = 3
    """Recomputing what somebody else did: nobody's round waits for it."""


@dataclass(order=True, slots=True)
class _Job:
    priority: Priority
    age: int
    sequence: int
    size: int = field(compare=False)
    """How many microbatches it works on."""
    work: Callable[[], Any] = field(compare=False)
    future: asyncio.Future[Any] = field(compare=False)


@dataclass(frozen=True, slots=True)
class ComputeStatistics:
    """What the compute thread has done so far."""

    jobs_done: int
    busy_s: float
    queued: int


class ComputeThread:
    """Runs jobs one after the other. Made and stopped on the event loop."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._jobs: list[_Job] = []
        self._changed = threading.Condition()
        self._sequence = 0
        self._stopping = False
        self.jobs_done = 0
        self.progress = 0
        """Grows with every job, and with every piece of a long one: whoever waits for us sees that we live."""
        self._busy_s = 0.0
        self._task_s = 0.0
        self._thread = threading.Thread(target=self._run, name="handcar-compute", daemon=True)
        self._thread.start()

    async def run(self, work: Callable[[], T], *, priority: Priority, age: int = 0, size: int = 1) -> T:
        """Run `work` on `size` microbatches in the compute thread and return its result; smaller `age` goes first.

        A cancelled caller does not stop work that has begun; work that has not is skipped.
        """
        return await self.submit(work, priority=priority, age=age, size=size)

    def submit(self, work: Callable[[], T], *, priority: Priority, age: int = 0, size: int = 1) -> asyncio.Future[T]:
        """Queue `work` without waiting for it."""
        future: asyncio.Future[T] = self._loop.create_future()
        with self._changed:
            if self._stopping:
                future.cancel()
                return future
            self._sequence += 1
            heapq.heappush(self._jobs, _Job(priority, age, self._sequence, size, work, future))
            self._changed.notify()
        return future

    async def stop(self) -> None:
        """Finish the job at hand, drop the rest, and end the thread."""
        with self._changed:
            self._stopping = True
            dropped, self._jobs = self._jobs, []
            self._changed.notify()
        for job in dropped:
            job.future.cancel()
        await asyncio.to_thread(self._thread.join)

    def statistics(self) -> ComputeStatistics:
        """Return counters for the live line and the reports."""
        return ComputeStatistics(jobs_done=self.jobs_done, busy_s=self._busy_s, queued=len(self._jobs))

    def load_s(self) -> float:
        """Estimate the seconds of work that wait: what a microbatch takes here one way, for each in the queue."""
        with self._changed:
            return sum(job.size for job in self._jobs) * self._task_s

    def advance(self) -> None:
        """Take note that a piece of the job at hand is done. Called from within the job."""
        self.progress += 1

    @property
    def task_s(self) -> float:
        """What a microbatch takes one way, on average."""
        return self._task_s

    def _run(self) -> None:
        _yield_to_others()
        while True:
            with self._changed:
                while not self._jobs and not self._stopping:
                    self._changed.wait()
                if self._stopping:
                    return
                job = heapq.heappop(self._jobs)
            if job.future.cancelled():
                continue
            started = time.perf_counter()
            try:
                result, error = job.work(), None
            except BaseException as caught:  # noqa: BLE001 - carried to whoever awaits the job, never swallowed
                result, error = None, caught
            took_s = time.perf_counter() - started
            self._busy_s += took_s
            if job.priority is not Priority.CONTROL:
                self._task_s += SMOOTHING * (took_s / job.size - self._task_s)
            self.jobs_done += 1
            self.progress += 1
            self._loop.call_soon_threadsafe(_settle, job.future, result, error)
            del job, result, error  # or the last job's tensors would stay until there is another


def _yield_to_others() -> None:
    """Lower this thread's priority, and with it that of the threads that torch will start from it."""
    if sys.platform == "linux":  # elsewhere a thread cannot have a priority of its own
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), os.getpriority(os.PRIO_PROCESS, 0) + NICENESS)


def _settle(future: asyncio.Future[Any], result: Any, error: BaseException | None) -> None:
    if future.done():
        return
    if error is None:
        future.set_result(result)
    else:
        future.set_exception(error)
