"""Performs a schedule: moves units in the background, computes in the foreground, and waits where the list says so.

Owns: the transfer threads, what is under way, and the order of what depends on each other - a slot is not filled
before it was emptied, a unit is not read before it was written, nothing is changed while it is being copied. Must not
know: how the list came about (`schedule.py`), what a block computes (the worker does).

One thread calls `run`; each tier has a thread per direction. They only ever wait for what was begun before, so they
cannot wait for each other.
"""

from __future__ import annotations

import time
from collections import defaultdict, deque
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

from torch import Tensor

from peer.memory.backend import Backend
from peer.memory.disk.slot_table import Json
from peer.memory.disk.store import NvmeStore
from peer.memory.disk.wear import WriteBudgetSpent
from peer.memory.placement import Placement, Tier
from peer.memory.pool import DURABLE, Pool, unit_specs
from peer.memory.schedule import (
    CHANGING,
    NOT_NEEDED,
    Clear,
    Enter,
    Fetch,
    Flush,
    Kind,
    Op,
    Residency,
    Visit,
    Work,
    schedule,
)
from peer.memory.units import Inventory, Section, Unit

T = TypeVar("T")

_Place = tuple[Section, int]
"""A slot of a section."""


def open_memory(
    inventory: Inventory,
    placement: Placement,
    backend: Backend,
    *,
    nvme: Path | None = None,
    fingerprint: str = "",
    limit_bytes: int | None = None,
    writes_per_day_bytes: int | None = None,
    books: Path | None = None,
    activations: Sequence[int] = (),
) -> Executor:
    """Allocate the memory of a placement, or open what of it is on NVMe already.

    `fingerprint` says whose state it is; what the folder holds of another one is thrown away. On NVMe there are also
    places for `activations` of these sizes. `books` has the writes of the day, if another folder is to count them.
    """
    specs = unit_specs(inventory, placement, activations=activations)
    if not specs:
        return Executor(Pool(inventory, placement, backend), backend)
    if nvme is None:
        raise ValueError("a placement on NVMe needs a folder")
    store = NvmeStore.open(
        nvme,
        specs,
        fingerprint=fingerprint,
        limit_bytes=limit_bytes,
        writes_per_day_bytes=writes_per_day_bytes,
        replace=True,
        books=books,
    )
    pool = Pool(inventory, placement, backend, store, activations=activations)
    return Executor(pool, backend)


class Worker(Protocol):
    """What computes."""

    def enter(self, block: int, weights: Tensor, gradient: Tensor | None) -> None:
        """Compute with these buffers (flat fp32) from now on, until the next block is entered."""

    def work(self, work: Work, moments: Tensor | None) -> None:
        """Do one piece of work with the entered block; `moments` (flat bytes) are there for work on a shard."""


@dataclass(frozen=True, slots=True)
class Pause:
    """Why nothing more can be done today, and for how long."""

    reason: str
    seconds: float


@dataclass(slots=True)
class Stalls:
    """How long computing has waited for copies, in seconds."""

    waited_s: float = 0.0


class Executor:
    """Runs passes over one pool. Used from one thread, but for `look`."""

    def __init__(self, pool: Pool, backend: Backend) -> None:
        self.pool = pool
        self.stalls = Stalls()
        self.on_progress: Callable[[], None] = lambda: None
        """Called with every piece of a pass, which as a whole can take long: so can one visit of a large wave."""
        self.round_bytes = pool.round_bytes
        """What a round writes to the drive, at most, as far as is known."""
        self._written_before: int | None = None
        self.backend = backend
        self._residency = Residency()
        self._threads: dict[tuple[Tier, str], ThreadPoolExecutor] = {}
        self._arriving: dict[_Place, dict[Unit, Future[None]]] = defaultdict(dict)
        self._leaving: dict[_Place, dict[Unit, Future[None]]] = defaultdict(dict)
        self._going_home: dict[Unit, Future[None]] = {}
        self._writing: deque[tuple[Future[Any], int]] = deque()
        """What is on its way to the drive, and its bytes."""

    def run(self, visits: Sequence[Visit], worker: Worker, *, then: Sequence[int] = (), drive_bytes: int = 0) -> None:
        """Perform a pass. If anything fails, what is under way is waited for and the slots count as empty.

        `drive_bytes` is what the worker itself will write to the drive (`put`).
        """
        ops, residency = schedule(visits, self.pool.inventory, self.pool.placement, self._residency, then=then)
        self._check_write_budget(ops, drive_bytes)
        try:
            for op in ops:
                self._perform(op, worker)
        except BaseException:
            self._abandon()
            raise
        self._residency = residency

    def look(self, unit: Unit) -> Tensor:
        """Return a unit's own bytes, once it is home.

        May be called from any thread while no pass changes this unit; passes of other stages may run.
        """
        future = self._going_home.get(unit)
        if future is not None:
            future.result()
        return self.pool.home(unit)

    def put(self, unit: Unit, source: Tensor) -> None:
        """Write a unit that never comes to the device, from flat bytes in host memory. May wait for the disk."""
        self.pool.put_home(unit, source)

    def settle(self) -> None:
        """Wait until everything that was begun is done; raises what went wrong."""
        for future in self._under_way():
            future.result()

    def let_go(self) -> None:
        """Wait for what was begun, whatever comes of it: a whole state is about to be written over it."""
        self._abandon()

    def mark_round(self) -> None:
        """Take note that a round is over: what it has written is what the next one will."""
        if self.pool.store is not None:
            written = self.pool.store.statistics().bytes_written
            if self._written_before is not None:
                self.round_bytes = max(self.round_bytes, written - self._written_before)
            self._written_before = written

    def pause(self) -> Pause | None:
        """Return a pause if what the drive may still take today does not cover another round. From any thread."""
        try:
            if self.pool.store is not None:
                self.pool.store.require_budget(self.round_bytes)
        except WriteBudgetSpent as error:
            return Pause(str(error), error.resumes_in_s)
        return None

    def commit(self, meta: Mapping[str, Json]) -> None:
        """Make the present state the one that the NVMe store survives a crash with. Raises `StorageError`."""
        self.settle()
        self._wait_idle()  # activations on their way pass through the buffers that a commit needs
        for unit, future in self._going_home.items():
            if unit.section in DURABLE:
                future.result()  # what failed while a pass ran is in this book only, and is not at home
        self.pool.commit(meta)

    def recover(self) -> None:
        """Go back to the NVMe store's last commit, every byte of which is checked. Raises `StorageError`."""
        self._abandon()
        self.pool.recover()
        self._going_home.clear()

    def close(self) -> None:
        """End the transfer threads."""
        for thread in self._threads.values():
            thread.shutdown(wait=True)
        self.backend.close()
        if self.pool.store is not None:
            self.pool.store.close()

    # -- one operation --------------------------------------------------------------------------------

    def _perform(self, op: Op, worker: Worker) -> None:
        if isinstance(op, Enter | Work):
            self.on_progress()
        match op:
            case Fetch(unit, slot):
                self._fetch(unit, slot)
            case Flush(unit, slot):
                self._flush(unit, slot)
            case Enter(block, weights, gradient):
                self._enter(block, weights, gradient, worker)
            case Clear(block, slot):
                self.pool.block_tensor(block, Section.GRADIENT, slot).zero_()
            case Work() if op.moments == NOT_NEEDED:
                worker.work(op, None)
            case Work():
                self._work_on_shard(op, worker)

    def _enter(self, block: int, weights: int, gradient: int, worker: Worker) -> None:
        self._wait(self._arriving.pop((Section.WEIGHTS, weights), {}).values())
        self._wait(self._arriving.pop((Section.GRADIENT, gradient), {}).values())
        # a slot that was taken without a fetch may still be copied for the block before
        leaving = self._leaving[Section.WEIGHTS, weights]
        self._wait([leaving.pop(unit) for unit in list(leaving) if unit.block != block])
        self._wait(self._leaving.pop((Section.GRADIENT, gradient), {}).values())  # who asks for a gradient changes it
        worker.enter(
            block,
            self.pool.block_tensor(block, Section.WEIGHTS, weights),
            None if gradient == NOT_NEEDED else self.pool.block_tensor(block, Section.GRADIENT, gradient),
        )

    def _work_on_shard(self, work: Work, worker: Worker) -> None:
        self._wait(self._arriving.pop((Section.MOMENTS, work.moments), {}).values())
        self._wait(self._leaving.pop((Section.MOMENTS, work.moments), {}).values())
        if work.kind in CHANGING:
            self._wait_until_home(Unit(work.block, Section.WEIGHTS, work.index), is_lost=work.kind is Kind.FILL)
        worker.work(work, self.pool.moments(work.block, work.index, work.moments))

    def _wait_until_home(self, unit: Unit, *, is_lost: bool) -> None:
        """Wait until a unit may be changed where it is. What `is_lost` need not have come home well."""
        future = self._going_home.get(unit)
        if future is not None and not (is_lost and future.done()):
            self._wait([future])

    def _fetch(self, unit: Unit, slot: int) -> None:
        place = (unit.section, slot)
        for earlier in [other for other in self._arriving[place] if other.block != unit.block]:
            self._leaving[place][earlier] = self._arriving[place].pop(earlier)  # brought in early, and then not wanted
        before = list(self._leaving[place].values())  # for each unit that goes there: they come in different threads
        if unit in self._going_home:
            before.append(self._going_home[unit])
        after = self.backend.record()

        def fetch() -> None:
            for future in before:
                future.result()
            self.pool.fetch(unit, slot, after)

        self._arriving[place][unit] = self.start(self.pool.placement.homes[unit], "in", fetch)

    def _flush(self, unit: Unit, slot: int) -> None:
        after = self.backend.record()
        tier, num_bytes = self.pool.placement.homes[unit], self.pool.nvme_bytes(unit)
        future = self.start(tier, "out", lambda: self.pool.flush(unit, slot, after), num_bytes=num_bytes)
        self._leaving[unit.section, slot][unit] = self._going_home[unit] = future

    def wait_for(self, future: Future[T]) -> T:
        """Return what comes of a copy; the time until then counts as stalled."""
        self._wait([future])
        return future.result()

    def outwait(self, futures: Collection[Future[Any]]) -> None:
        """Wait until copies are over, whatever has come of them; the time until then counts as stalled."""
        if not all(future.done() for future in futures):
            started = time.perf_counter()
            wait(futures)
            self.stalls.waited_s += time.perf_counter() - started

    def _wait(self, futures: Collection[Future[Any]]) -> None:
        self.outwait(futures)
        for future in futures:
            future.result()

    def wait_counted(self, num_bytes: int) -> None:
        """Wait for what is on its way to the drive, if the budget of the day may not cover `num_bytes` besides.

        What is written counts only when it gets there.
        """
        left_bytes = None if self.pool.store is None else self.pool.store.budget_left_bytes()
        if left_bytes is not None and left_bytes < num_bytes + self._bytes_on_their_way():
            self._wait_idle()

    def _bytes_on_their_way(self) -> int:
        self._let_go_of_written()
        return sum(num_bytes for _, num_bytes in self._writing)

    def _let_go_of_written(self) -> None:
        while self._writing and self._writing[0][0].done():  # one thread writes them all, in this order
            self._writing.popleft()

    def start(self, tier: Tier, direction: str, copy: Callable[[], T], *, num_bytes: int = 0) -> Future[T]:
        """Do a copy in the thread of a tier and direction, after those that were asked for before.

        `num_bytes` is what it writes to the drive.
        """
        threads = self._threads.get((tier, direction))
        if threads is None:
            name = f"handcar-{tier.name.lower()}-{direction}"
            threads = self._threads[tier, direction] = ThreadPoolExecutor(1, thread_name_prefix=name)
        future = threads.submit(copy)
        if num_bytes:
            self._let_go_of_written()
            self._writing.append((future, num_bytes))
        return future

    def _check_write_budget(self, ops: Sequence[Op], more_bytes: int) -> None:
        """Raise `WriteBudgetSpent` before a pass that the drive's budget of the day does not cover to its end."""
        if self.pool.store is not None:
            needed_bytes = more_bytes + sum(self.pool.nvme_bytes(op.unit) for op in ops if isinstance(op, Flush))
            self.wait_counted(needed_bytes)
            self.pool.store.require_budget(needed_bytes)

    def _under_way(self) -> list[Future[None]]:
        places = (*self._arriving.values(), *self._leaving.values())
        return [future for futures in places for future in futures.values()]

    def _abandon(self) -> None:
        """Wait for what is under way, whatever comes of it: of a pass that has failed, which says why itself, or of one
        whose results are of no use any more.

        What could not be written home stays in the book: fetching it would bring back what it was before.
        """
        self._wait_idle()  # not only for the book's: a copy that failed has not waited for all that it was to wait for
        self._arriving.clear()
        self._leaving.clear()
        self._going_home = {unit: future for unit, future in self._going_home.items() if future.exception() is not None}
        self._residency = Residency()

    def _wait_idle(self) -> None:
        wait([thread.submit(lambda: None) for thread in self._threads.values()])
