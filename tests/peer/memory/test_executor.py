"""Transfers in the background, work in the foreground. Oracle: every unit is filled with a number that changes whenever
somebody changes it, and whoever computes looks whether all of it is there; see also tests/peer/memory/transfers.py.

What training makes of it: tests/peer/engine/test_placements.py.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path
from threading import Event as Gate
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from peer.memory.backend import CpuBackend
from peer.memory.executor import Executor, open_memory
from peer.memory.placement import Placement, Slots, Tier
from peer.memory.pool import Pool
from peer.memory.schedule import Gradient, Kind, Visit, Work, forward_visits, shard_visits
from peer.memory.units import Inventory, Section, Unit
from tests.peer.memory.drawn import Trial, all_in_host, inventory_of, trials
from tests.peer.memory.transfers import FETCH, FLUSH, Transfers

LOST = -1  # what nobody wants any more


class Numbers:
    """A worker for which contents are numbers. It is given a pass's visits, and expects to be taken through them."""

    def __init__(self, inventory: Inventory) -> None:
        self.newest = {unit: LOST for section in Section for unit in inventory.units(section)}
        self._inventory = inventory
        self._visits: Iterator[Visit] = iter(())
        self._visit = Visit(block=0)
        self._weights = self._gradient = torch.empty(0)

    def run(self, memory: Executor, visits: Sequence[Visit], *, then: Sequence[int] = ()) -> None:
        self._visits = iter(visits)
        memory.run(visits, self, then=then)
        assert next(self._visits, None) is None

    def enter(self, block: int, weights: Tensor, gradient: Tensor | None) -> None:
        self._visit = visit = next(self._visits)
        assert visit.block == block
        self._weights = weights
        if visit.shard_work is not Kind.FILL:
            self._expect_block(Section.WEIGHTS, weights)
        assert (gradient is None) == (visit.gradient is Gradient.NONE)
        if gradient is not None:
            self._gradient = gradient
            units = self._inventory.block_units(block, Section.GRADIENT)
            if visit.gradient is Gradient.SUM:
                self._expect_block(Section.GRADIENT, gradient)
            else:  # cleared after this, or ours to write to
                self.newest.update(dict.fromkeys(units, 0))
            if visit.gradient is Gradient.SPACE:
                gradient.fill_(0.0)

    def work(self, work: Work, moments: Tensor | None) -> None:
        block = self._visit.block
        assert work.block == block
        if self._visit.shard_work is not Kind.FILL:
            self._expect_block(Section.WEIGHTS, self._weights)
        if self._visit.gradient is not Gradient.NONE:
            self._expect_block(Section.GRADIENT, self._gradient)
        if work.kind is Kind.BACKWARD:
            self._gradient.add_(1.0)
            for unit in self._inventory.block_units(block, Section.GRADIENT):
                self.newest[unit] += 1
        if moments is not None:
            self._work_on_shard(work, moments)
        if not self._visit.keeps_gradient and self._visit.gradient is not Gradient.NONE:
            self._gradient.fill_(99.0)  # a step may write what it likes; nobody asks for it again
            for unit in self._inventory.block_units(block, Section.GRADIENT):
                self.newest[unit] = 99

    def _work_on_shard(self, work: Work, moments: Tensor) -> None:
        layout = self._inventory.shards[work.block][work.index]
        weights = self._weights[layout.start : layout.stop]
        unit = Unit(work.block, Section.MOMENTS, work.index)
        if work.kind is not Kind.FILL:
            self._expect(unit, moments)
        if work.kind is not Kind.READ:
            for each, buffer in ((unit, moments), (unit._replace(section=Section.WEIGHTS), weights)):
                self.newest[each] += 2 if self.newest[each] == LOST else 1
                buffer.fill_(self.newest[each])

    def _expect_block(self, section: Section, flat: Tensor) -> None:
        for unit in self._inventory.block_units(self._visit.block, section):
            layout = self._inventory.layout(unit)
            self._expect(unit, flat[layout.start : layout.stop])

    def _expect(self, unit: Unit, contents: Tensor) -> None:
        assert bool((contents == self.newest[unit]).all()), f"{unit} is not what was written last"


def open_trial(inventory: Inventory, placement: Placement, folder: Path) -> tuple[Executor, Numbers]:
    """Open memory and give everything a first number."""
    memory, numbers = open_memory(inventory, placement, CpuBackend(), nvme=folder), Numbers(inventory)
    numbers.run(memory, shard_visits(range(len(inventory.blocks)), Kind.FILL))
    return memory, numbers


def check_homes(memory: Executor, numbers: Numbers) -> None:
    """Everything that has a home and is still wanted is there."""
    for unit, number in numbers.newest.items():
        if unit in memory.pool.placement.homes and number not in (LOST, 99):
            kind = torch.uint8 if unit.section is Section.MOMENTS else torch.float32
            assert bool((memory.look(unit).view(kind) == number).all()), unit


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(trial=trials(), seed=st.integers(0, 1000))
def test_whoever_computes_finds_what_was_written_last_however_long_copies_take(
    trial: Trial, seed: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Random visits, placements and delays. No two copies get in each other's way."""
    check_trial(trial, seed, tmp_path_factory.mktemp("nvme"))


@pytest.mark.slow
@settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(trial=trials(), seed=st.integers(0, 1000))
def test_and_that_is_so_for_many_more_of_them(
    trial: Trial, seed: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    check_trial(trial, seed, tmp_path_factory.mktemp("nvme"))


def check_trial(trial: Trial, seed: int, folder: Path) -> None:
    inventory, placement, passes = trial
    chance = random.Random(seed)
    with pytest.MonkeyPatch.context() as patch:
        transfers = Transfers(patch)
        memory, numbers = open_trial(inventory, placement, folder)
        transfers.delay_s = lambda: chance.choice([0.0, 0.0, 0.0, 0.0005, 0.001])
        with closing(memory):
            for visits, then in passes:
                numbers.run(memory, visits, then=then)
            check_homes(memory, numbers)
            memory.settle()
            check_homes(memory, numbers)
        assert not transfers.collisions


# -- one thing at a time ----------------------------------------------------------------------------------------------


class Held:
    """Holds some transfers back until they are let go, and tells which have begun."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.gates: dict[tuple[str, Unit], Gate] = {}
        self.begun: list[tuple[str, Unit]] = []
        for what in (FETCH, FLUSH):
            monkeypatch.setattr(Pool, what, self._held(what, getattr(Pool, what)))

    def hold(self, what: str, unit: Unit) -> Gate:
        return self.gates.setdefault((what, unit), Gate())

    def _held(self, what: str, copy: Any) -> Any:
        def held(pool: Pool, unit: Unit, slot: int, after: Any) -> None:
            self.begun.append((what, unit))
            if (what, unit) in self.gates:
                assert self.gates[what, unit].wait(5.0)
            copy(pool, unit, slot, after)

        return held


def waits(memory: Executor, tier: Tier) -> bool:
    """Tell whether what a tier was asked to bring in last has not begun: what is asked for now comes after it."""
    try:
        memory.start(tier, "in", lambda: None).result(timeout=0.02)
    except TimeoutError:
        return True
    return False


def test_every_shard_waits_until_its_slot_is_empty_whichever_thread_brings_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A block is on its way home from a slot, and the next one there has two shards from two tiers. Oracle: neither of
    the two fetches begins before the slow flush has ended."""
    inventory = inventory_of([1, 2])
    homes = dict(all_in_host(inventory).homes)
    homes[Unit(1, Section.WEIGHTS, 1)] = Tier.NVME
    memory, numbers = open_trial(
        inventory, Placement(homes=homes, slots=Slots(weights=1, gradient=1, moments=1)), tmp_path
    )
    with closing(memory):
        memory.settle()
        held = Held(monkeypatch)
        gate = held.hold(FLUSH, Unit(0, Section.WEIGHTS, 0))
        step = Visit(block=0, shard_work=Kind.STEP, gradient=Gradient.ZERO, keeps_gradient=False)
        numbers.run(memory, [step], then=[1])
        fetches = [(FETCH, Unit(1, Section.WEIGHTS, shard)) for shard in (0, 1)]
        assert waits(memory, Tier.HOST)
        assert waits(memory, Tier.NVME)
        assert not {*fetches} & {*held.begun}
        gate.set()
        numbers.run(memory, forward_visits([1], 1))
        assert {*fetches} <= {*held.begun}


def test_what_was_brought_in_for_nobody_has_arrived_before_the_slot_is_filled_again(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Blocks of two shards in two tiers; the one that nobody wants comes slowly from the one tier. Oracle: the wanted
    one does not come from the other meanwhile, and the contents."""
    inventory = inventory_of([2, 2])
    homes = dict(all_in_host(inventory).homes)
    homes[Unit(0, Section.WEIGHTS, 1)] = homes[Unit(1, Section.WEIGHTS, 0)] = Tier.NVME
    memory, numbers = open_trial(
        inventory, Placement(homes=homes, slots=Slots(weights=1, gradient=1, moments=1)), tmp_path
    )
    with closing(memory):
        memory.settle()
        held = Held(monkeypatch)
        gate = held.hold(FETCH, Unit(0, Section.WEIGHTS, 1))
        numbers.run(memory, [], then=[0])
        wait = memory._wait

        def let_go(futures: Any) -> None:
            """Computing is about to wait for what the list has begun so far."""
            if not gate.is_set():
                assert waits(memory, Tier.HOST)
                assert (FETCH, Unit(1, Section.WEIGHTS, 1)) not in held.begun
                gate.set()
            wait(futures)

        monkeypatch.setattr(memory, "_wait", let_go)
        numbers.run(memory, forward_visits([1], 1))
        assert gate.is_set()
        numbers.run(memory, forward_visits([0, 1, 0], 1))


def test_a_pass_that_fails_leaves_nothing_under_way(transfers: Transfers) -> None:
    """Not even what a failed copy should have waited for. Oracle: the copies themselves."""
    inventory = inventory_of([3, 3, 3])
    memory, numbers = open_trial(inventory, all_in_host(inventory, weights=1, moments=2), Path())
    with closing(memory):
        memory.settle()
        transfers.delay_s = lambda: 0.002
        transfers.fails = lambda what, unit: unit == Unit(0, Section.WEIGHTS, 0) and what == FLUSH
        step = [
            Visit(block=block, shard_work=Kind.STEP, gradient=Gradient.ZERO, keeps_gradient=False) for block in range(3)
        ]
        with pytest.raises(OSError, match="Input/output"):
            numbers.run(memory, step)
        assert not transfers.under_way
        num_seen = len(transfers.seen)
        memory.settle()
        assert len(transfers.seen) == num_seen


def test_what_did_not_come_home_is_lost_until_it_is_filled_anew(transfers: Transfers) -> None:
    """Oracle: the same error whenever it is asked for, in a pass or from outside; other blocks are not affected."""
    inventory = inventory_of([1, 1])
    memory, numbers = open_trial(inventory, all_in_host(inventory), Path())
    with closing(memory):
        memory.settle()
        lost = Unit(0, Section.WEIGHTS, 0)
        transfers.fails = lambda what, unit: unit == lost and what == FLUSH
        step = Visit(block=0, shard_work=Kind.STEP, gradient=Gradient.ZERO, keeps_gradient=False)
        with pytest.raises(OSError, match="Input/output"):
            numbers.run(memory, [step, *forward_visits([1], 1)])
        transfers.fails = lambda what, unit: False
        for _ in range(2):
            with pytest.raises(OSError, match="Input/output"):
                numbers.run(memory, forward_visits([0], 1))
            with pytest.raises(OSError, match="Input/output"):
                memory.look(lost)
        numbers.run(memory, forward_visits([1], 1))
        numbers.run(memory, shard_visits([0], Kind.FILL))
        numbers.run(memory, forward_visits([1, 0], 1))
        check_homes(memory, numbers)


@pytest.fixture
def transfers(monkeypatch: pytest.MonkeyPatch) -> Iterator[Transfers]:
    watched = Transfers(monkeypatch)
    yield watched
    assert not watched.collisions
