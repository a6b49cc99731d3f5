"""The order of transfers and work. Oracle: a replay of the list with numbered contents, in a model of slots and homes.

Every change of a unit gives its contents a new number. A `Fetch` copies the home's number into a slot and a `Flush`
copies it back, in the order of the list, which is the order that the executor keeps. Whoever computes must find the
newest number.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from peer.memory.placement import Placement, Tier, all_on_device
from peer.memory.schedule import (
    AT_HOME,
    NOT_NEEDED,
    Clear,
    Enter,
    Fetch,
    Flush,
    Gradient,
    Kind,
    Op,
    Residency,
    Visit,
    Work,
    backward_visits,
    forward_visits,
    schedule,
    shard_visits,
)
from peer.memory.units import Inventory, Section, Unit
from tests.peer.memory.drawn import ELSEWHERE, Passes, Trial, all_in_host, inventory_of, trials

NOTHING = -1  # contents of a slot that nobody has written to, and of a gradient that nobody wants any more


@dataclass
class Replay:
    """Slots and homes, and what is in them."""

    inventory: Inventory
    placement: Placement
    newest: dict[Unit, int] = field(init=False)
    home: dict[Unit, int] = field(init=False)
    slots: dict[tuple[Section, int], dict[Unit, int]] = field(default_factory=dict)
    fetched: Counter[Unit] = field(default_factory=Counter)
    residency: Residency = field(default_factory=Residency)
    parked: set[tuple[int, int]] = field(default_factory=set)
    """Inputs, by block and microbatch, that are out of the device."""
    recalled: set[tuple[int, int]] = field(default_factory=set)
    """Inputs that are back, for a visit to come."""

    def __post_init__(self) -> None:
        units = [unit for section in Section for unit in self.inventory.units(section)]
        self.newest = dict.fromkeys(units, 0)
        self.home = {unit: 0 for unit in units if unit in self.placement.homes}

    def run(self, visits: Sequence[Visit], *, then: Sequence[int] = ()) -> list[Op]:
        """Schedule a pass and replay it, checking everything on the way."""
        self.fetched.clear()
        ops, self.residency = schedule(visits, self.inventory, self.placement, self.residency, then=then)
        enters = [index for index, op in enumerate(ops) if isinstance(op, Enter)]
        assert len(enters) == len(visits)
        self._begin(ops[: enters[0]] if enters else ops)
        ends = [*enters[1:], len(ops)][: len(enters)]
        for visit, start, end in zip(visits, enters, ends, strict=True):
            self._visit(visit, ops[start:end])
        assert not self.recalled, "inputs came back for nobody"
        for unit, number in self.home.items():
            if self.newest[unit] != NOTHING:
                assert number == self.newest[unit], f"{unit} was not written home"
        self._check_residency()
        return ops

    def _visit(self, visit: Visit, ops: list[Op]) -> None:
        enter, *rest = ops
        assert isinstance(enter, Enter)
        assert enter.block == visit.block
        self._check_place(Section.WEIGHTS, enter.weights, visit.block)
        if visit.gradient is Gradient.NONE:
            assert enter.gradient == NOT_NEEDED
        else:
            self._check_place(Section.GRADIENT, enter.gradient, visit.block)
        if visit.shard_work is not Kind.FILL:
            self._expect(visit.block, Section.WEIGHTS, enter.weights)
        if visit.gradient is Gradient.SUM:
            self._expect(visit.block, Section.GRADIENT, enter.gradient)
        if visit.gradient is Gradient.ZERO:
            assert rest.pop(0) == Clear(visit.block, enter.gradient)
        if visit.recalls:
            for _, index in visit.work:
                self.recalled.remove((visit.block, index))
        work = [op for op in rest if isinstance(op, Work) and op.kind is not Kind.RECALL]
        expected = []
        for each in visit.work:
            expected += [each, (Kind.PARK, each[1])] if visit.parks else [each]
        if visit.shard_work is not None:
            expected += [(visit.shard_work, shard) for shard in range(len(self.inventory.shards[visit.block]))]
        assert [(op.kind, op.index) for op in work] == expected
        assert {op.block for op in work} <= {visit.block}
        if visit.gradient is not Gradient.NONE:
            self._change(visit.block, Section.GRADIENT, enter.gradient, keep=visit.keeps_gradient)

        flushed: Counter[Unit] = Counter()
        dirty: set[Unit] = set()
        if visit.keeps_gradient and visit.gradient is not Gradient.NONE:
            dirty.update(self.inventory.block_units(visit.block, Section.GRADIENT))
        num_left = len(work)
        for op in rest:
            match op:
                case Fetch(unit, slot):
                    assert num_left == 0 or unit.section is Section.MOMENTS, "a slot was taken before the visit's end"
                    self._fetch(unit, slot)
                case Flush(unit, slot):
                    assert unit in dirty, "a clean unit was written home"
                    assert unit.section is Section.MOMENTS or slot == (
                        enter.weights if unit.section is Section.WEIGHTS else enter.gradient
                    )
                    assert self.slots[unit.section, slot][unit] == self.newest[unit]
                    self.home[unit] = self.newest[unit]
                    flushed[unit] += 1
                case Work() if op.kind is Kind.RECALL:
                    assert num_left == 0, "the block of a visit that is not over was not entered to recall others"
                    self._recall(op)
                case Work():
                    num_left -= 1
                    if op.kind is Kind.PARK:
                        assert (op.block, op.index) not in self.parked
                        self.parked.add((op.block, op.index))
                    if op.kind is not Kind.FILL:
                        self._expect(visit.block, Section.WEIGHTS, enter.weights)
                    self._work(op, enter.weights, dirty)
                case _:
                    raise AssertionError(f"{op} in the middle of a visit")
        assert num_left == 0
        assert flushed == {unit: 1 for unit in dirty if self.placement.homes.get(unit) in ELSEWHERE}

    def _work(self, work: Work, weights_slot: int, dirty: set[Unit]) -> None:
        if work.kind not in (Kind.STEP, Kind.FILL, Kind.READ):
            assert work.moments == NOT_NEEDED
            return
        moments = Unit(work.block, Section.MOMENTS, work.index)
        assert (work.moments == AT_HOME) == self.placement.is_on_device(moments)
        if work.moments != AT_HOME:
            assert 0 <= work.moments < self.placement.slots.moments
        contents = self.home if work.moments == AT_HOME else self.slots.get((Section.MOMENTS, work.moments), {})
        if work.kind is not Kind.FILL:
            assert contents.get(moments, NOTHING) == self.newest[moments], f"{moments} is out of date"
        if work.kind is not Kind.READ:
            weights = Unit(work.block, Section.WEIGHTS, work.index)
            for unit, slot in ((weights, weights_slot), (moments, work.moments)):
                self._write(unit, slot)
                dirty.add(unit)

    def _change(self, block: int, section: Section, slot: int, *, keep: bool) -> None:
        for unit in self.inventory.block_units(block, section):
            self._write(unit, slot)
            if not keep:
                self.newest[unit] = NOTHING

    def _write(self, unit: Unit, slot: int) -> None:
        """Give a unit new contents where it is; a slot belongs to one block (one shard, for moments) at a time."""
        self.newest[unit] += 1 if self.newest[unit] != NOTHING else 1000
        if slot == AT_HOME:
            self.home[unit] = self.newest[unit]
        else:
            self._claim(unit, slot)[unit] = self.newest[unit]

    def _claim(self, unit: Unit, slot: int) -> dict[Unit, int]:
        held = self.slots.setdefault((unit.section, slot), {})
        for other in [other for other in held if other.block != unit.block or unit.section is Section.MOMENTS]:
            del held[other]
        return held

    def _fetch(self, unit: Unit, slot: int) -> None:
        assert self.placement.homes.get(unit) in ELSEWHERE
        assert 0 <= slot < self.placement.slots.of(unit.section)
        self._claim(unit, slot)[unit] = self.home[unit]
        self.fetched[unit] += 1

    def _begin(self, ops: Sequence[Op]) -> None:
        """Replay what stands before the first visit."""
        for op in ops:
            if isinstance(op, Work):
                self._recall(op)
            else:
                assert isinstance(op, Fetch)
                self._fetch(op.unit, op.slot)

    def _recall(self, work: Work) -> None:
        assert work.kind is Kind.RECALL
        assert work.moments == NOT_NEEDED
        self.parked.remove((work.block, work.index))
        self.recalled.add((work.block, work.index))

    def _check_place(self, section: Section, slot: int, block: int) -> None:
        if self.placement.is_on_device(Unit(block, section, 0)):
            assert slot == AT_HOME
        else:
            assert 0 <= slot < self.placement.slots.of(section)

    def _expect(self, block: int, section: Section, slot: int) -> None:
        contents = self.home if slot == AT_HOME else self.slots.get((section, slot), {})
        for unit in self.inventory.block_units(block, section):
            assert contents.get(unit, NOTHING) == self.newest[unit] != NOTHING, f"{unit} is out of date"

    def _check_residency(self) -> None:
        """What the slots are said to hold, they hold, and the newest of it."""
        for section, blocks in ((Section.WEIGHTS, self.residency.weights), (Section.GRADIENT, self.residency.gradient)):
            assert len(blocks) == self.placement.slots.of(section)
            named = [block for block in blocks if block is not None]
            assert len(named) == len(set(named))
            for slot, block in enumerate(blocks):
                if block is not None:
                    self._expect(block, section, slot)


@given(trials())
@settings(max_examples=150)
def test_whoever_computes_finds_the_newest_contents_and_every_change_comes_home_once(
    trial: Trial,
) -> None:
    """Random visits in random order. No slot is used that is not there; weights come at most once per visit, and
    moments once per shard that is looked at."""
    inventory, placement, passes = trial
    replay = Replay(inventory, placement)
    for visits, then in passes:
        replay.run(visits, then=then)
        asked = Counter(visit.block for visit in visits if visit.shard_work is not Kind.FILL) + Counter(then)
        looked = Counter(visit.block for visit in visits if visit.shard_work in (Kind.STEP, Kind.READ))
        summed = Counter(visit.block for visit in visits if visit.gradient is Gradient.SUM)
        limits = {Section.WEIGHTS: asked, Section.GRADIENT: summed, Section.MOMENTS: looked}
        assert all(count <= limits[unit.section][unit.block] for unit, count in replay.fetched.items())


@given(
    num_shards=st.lists(st.integers(1, 3), min_size=1, max_size=6),
    slots=st.tuples(st.integers(1, 7), st.integers(1, 3), st.integers(1, 3)),
    keep_up_to=st.integers(0, 6),
    waves=st.integers(1, 3),
    step_inside=st.booleans(),
    parked=st.sets(st.integers(0, 5)),
)
def test_training_is_such_a_pass(
    num_shards: list[int],
    slots: tuple[int, int, int],
    keep_up_to: int,
    waves: int,
    step_inside: bool,
    parked: set[int],
) -> None:
    """As an engine trains: up and down in waves, a step inside the last one or after it, for three versions. What was
    parked on the way up is back before its block is entered on the way down, once."""
    inventory = inventory_of(num_shards)
    placement = all_in_host(inventory, weights=slots[0], gradient=slots[1], moments=slots[2])
    on_device = {unit: Tier.DEVICE for section in Section for unit in inventory.units(section)}
    homes = {unit: on_device[unit] if unit.block >= keep_up_to else tier for unit, tier in placement.homes.items()}
    replay = Replay(inventory, Placement(homes=homes, slots=placement.slots))
    blocks = range(len(num_shards))
    replay.run(shard_visits(blocks, Kind.FILL))
    for _ in range(3):
        fresh = set(blocks)
        for wave in range(waves):
            replay.run(forward_visits(blocks, 2, leaving=parked), then=[*reversed(blocks)])
            assert {block for block, _ in replay.parked} == parked & {*blocks}
            down = backward_visits(
                reversed(blocks),
                2,
                is_fresh=fresh.__contains__,
                step=step_inside and wave == waves - 1,
                leaving=parked,
            )
            replay.run(down, then=blocks)
            assert not replay.parked
            fresh.clear()
        if not step_inside:
            replay.run(shard_visits(blocks, Kind.STEP, gradient=Gradient.SUM))
        replay.run(shard_visits(blocks, Kind.READ))


@given(num_shards=st.lists(st.integers(1, 3), min_size=1, max_size=5), spare=st.integers(0, 2), data=st.data())
def test_with_a_slot_for_every_block_no_weights_are_fetched_twice(
    num_shards: list[int], spare: int, data: st.DataObject
) -> None:
    """Oracle: one fetch per unit over several passes; steps change weights where they are."""
    inventory = inventory_of(num_shards)
    placement = all_in_host(inventory, weights=len(num_shards) + spare)
    replay, passes = Replay(inventory, placement), Passes(data.draw, inventory, placement)
    total: Counter[Unit] = Counter()
    for _ in range(3):
        replay.run([passes.visit() for _ in range(data.draw(st.integers(0, 6)))])
        total += Counter({unit: n for unit, n in replay.fetched.items() if unit.section is Section.WEIGHTS})
    assert max(total.values(), default=0) <= 1


@pytest.mark.parametrize("slots", [1, 2, 3, 5])
@pytest.mark.parametrize("together", [False, True])
def test_the_last_block_of_the_way_up_is_there_at_the_turn(slots: int, together: bool) -> None:
    """Oracle: by hand. Of n blocks each way, the k that the slots hold at the turn are not fetched again."""
    num_blocks = 5
    inventory = inventory_of([2] * num_blocks)
    replay = Replay(inventory, all_in_host(inventory, weights=slots))
    up = forward_visits(range(num_blocks), 1)
    down = backward_visits([*reversed(range(num_blocks))], 1, is_fresh=lambda block: True)

    def loads() -> Counter[int]:
        return Counter(unit.block for unit in replay.fetched if unit.section is Section.WEIGHTS)

    if together:
        replay.run([*up, *down])
        by_block = Counter({block: replay.fetched[Unit(block, Section.WEIGHTS, 0)] for block in range(num_blocks)})
        assert by_block[num_blocks - 1] == 1
        assert by_block.total() == 2 * num_blocks - slots
        return
    replay.run(up, then=[*reversed(range(num_blocks))])
    assert set(loads()) == set(range(num_blocks))
    replay.run(down)
    assert num_blocks - 1 not in loads()
    assert set(loads()) == set(range(num_blocks - slots))


def test_the_next_block_is_under_way_while_one_computes() -> None:
    """Oracle: by hand, with two slots: each fetch stands before the work of the block before it."""
    inventory = inventory_of([1] * 3)
    ops, residency = schedule(forward_visits(range(3), 1), inventory, all_in_host(inventory, weights=2), then=[2, 1, 0])

    def fetch(block: int, slot: int) -> Fetch:
        return Fetch(Unit(block, Section.WEIGHTS, 0), slot)

    def compute(block: int, slot: int) -> list[Op]:
        return [Enter(block, slot, NOT_NEEDED), Work(Kind.FORWARD, block, 0)]

    assert ops == [
        fetch(0, 0),
        fetch(1, 1),
        *compute(0, 0),
        fetch(2, 0),
        *compute(1, 1),
        *compute(2, 0),
    ]
    assert residency.weights == (2, 1)


@pytest.mark.parametrize(("slots", "held"), [(1, (0,)), (2, (0, 1)), (3, (0, 1, 2))])
def test_what_comes_next_is_brought_in_at_the_end(slots: int, held: tuple[int, ...]) -> None:
    """Oracle: the first blocks of the next pass, as many as there are slots, each fetched after the last one's work at
    the latest, and not again in that pass."""
    replay = Replay(inventory_of([1] * 5), all_in_host(inventory_of([1] * 5), weights=slots))
    ops = replay.run(forward_visits([4, 3], 1), then=range(5))
    assert {block for block in replay.residency.weights if block is not None} == set(held)
    assert isinstance(ops[-1], Fetch)
    again = replay.run(forward_visits(range(5), 1))
    assert [op.unit.block for op in again if isinstance(op, Fetch)] == [*range(slots, 5)]


def test_a_block_that_is_filled_is_not_fetched_before() -> None:
    """Oracle: whatever was there is overwritten, weights and moments."""
    inventory = inventory_of([2, 3])
    replay = Replay(inventory, all_in_host(inventory))
    ops = replay.run(shard_visits(range(2), Kind.FILL))
    assert not any(isinstance(op, Fetch) for op in ops)
    assert sum(isinstance(op, Flush) for op in ops) == 2 * (2 + 3)


def test_a_gradient_without_a_home_stays_in_its_slot() -> None:
    """Oracle: the replay over two passes; it is neither fetched nor written anywhere."""
    inventory = inventory_of([2, 1])
    host = all_in_host(inventory, gradient=2)
    homes = {unit: tier for unit, tier in host.homes.items() if unit.section is not Section.GRADIENT}
    replay = Replay(inventory, Placement(homes=homes, slots=host.slots))
    ops = replay.run(backward_visits([1, 0], 1, is_fresh=lambda block: True))
    ops += replay.run(backward_visits([1, 0], 1, is_fresh=lambda block: False, step=True))
    moved = [op.unit for op in ops if isinstance(op, (Fetch, Flush))]
    assert moved
    assert not any(unit.section is Section.GRADIENT for unit in moved)


def test_inputs_are_recalled_one_visit_ahead() -> None:
    """Oracle: by hand: those of the first two visits at once, then those of the next one before each is entered."""
    inventory = inventory_of([1] * 4)
    visits = backward_visits([3, 2, 1, 0], 1, is_fresh=lambda block: True, leaving=[0, 1, 2, 3])
    ops, _ = schedule(visits, inventory, all_on_device(inventory))
    order = [f"{'recall' if op.kind is Kind.RECALL else 'work'} {op.block}" for op in ops if isinstance(op, Work)]
    assert order == [
        "recall 3", "recall 2", "work 3", "recall 1", "work 2", "recall 0", "work 1", "work 0",
    ]  # fmt: skip


def test_with_one_slot_blocks_come_one_after_the_other() -> None:
    """Oracle: by hand, for a step: moments through one slot, shard by shard."""
    inventory = inventory_of([2, 1])
    placement = all_in_host(inventory)
    ops, residency = schedule(shard_visits(range(2), Kind.STEP, gradient=Gradient.SPACE), inventory, placement)
    weights = [[Unit(0, Section.WEIGHTS, 0), Unit(0, Section.WEIGHTS, 1)], [Unit(1, Section.WEIGHTS, 0)]]
    moments = [[Unit(0, Section.MOMENTS, 0), Unit(0, Section.MOMENTS, 1)], [Unit(1, Section.MOMENTS, 0)]]
    assert ops == [
        Fetch(weights[0][0], 0),
        Fetch(weights[0][1], 0),
        Fetch(moments[0][0], 0),
        Enter(0, 0, 0),
        Work(Kind.STEP, 0, 0, 0),
        Flush(weights[0][0], 0),
        Flush(moments[0][0], 0),
        Fetch(moments[0][1], 0),
        Work(Kind.STEP, 0, 1, 0),
        Flush(weights[0][1], 0),
        Flush(moments[0][1], 0),
        Fetch(weights[1][0], 0),
        Fetch(moments[1][0], 0),
        Enter(1, 0, 0),
        Work(Kind.STEP, 1, 0, 0),
        Flush(weights[1][0], 0),
        Flush(moments[1][0], 0),
    ]
    assert residency == Residency((1,), (None,))


@given(num_shards=st.lists(st.integers(1, 3), min_size=1, max_size=5), data=st.data())
def test_nothing_moves_where_everything_lives_on_the_device(num_shards: list[int], data: st.DataObject) -> None:
    inventory = inventory_of(num_shards)
    placement = all_on_device(inventory)
    passes = Passes(data.draw, inventory, placement)
    ops = Replay(inventory, placement).run([passes.visit() for _ in range(5)], then=[0])
    assert not any(isinstance(op, (Fetch, Flush)) for op in ops)
