"""What a schedule will take, in seconds and bytes, before anything is allocated. Pure.

Owns: the prices of operations, and the executor's rules of waiting, on a clock of its own. Must not know: how a
placement is chosen (`plan.py`). The list is the one that `schedule.py` makes and `executor.py` performs: operation by
operation, this does in numbers what the executor does in threads, and tests compare the two.

Computing is one thread; every tier has one more per direction, each of which does its copies in the order in which
they were begun. So an operation's end is known when it is reached, and the time to simulate is linear in their number.
"""

from __future__ import annotations

from collections import Counter, defaultdict, deque
from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal

from peer.memory.placement import Placement, Tier
from peer.memory.planning.profile import Profile
from peer.memory.planning.workload import Mode, Pass, Workload, step_pass, wave_passes
from peer.memory.schedule import (
    CHANGING,
    NOT_NEEDED,
    PARK_BUFFERS,
    Clear,
    Enter,
    Fetch,
    Flush,
    Kind,
    Op,
    Residency,
    Work,
    schedule,
)
from peer.memory.segments import Segment, segments_of
from peer.memory.units import ELEMENT_BYTES, Inventory, Section, Unit
from protocol.layout import BlockLayout

CLOCK_STEP_S = 1e-9  # below that, nothing is worth another round

Direction = Literal["in", "out"]
_Place = tuple[Section, int]
_Pass = tuple[int, int]
"""Through a block, by which microbatch of its wave."""


@dataclass(frozen=True, slots=True)
class Simulated:
    """Sums since the beginning of a simulation, or between two of its moments."""

    seconds: float = 0.0
    compute_s: float = 0.0
    stall_s: float = 0.0
    """What computing waited for copies."""
    slowed_s: float = 0.0
    """What computing lost to copies that ran beside it. The three parts make up `seconds`."""
    fetched: Mapping[Tier, int] = field(default_factory=dict)
    """Bytes of units that came from a tier."""
    flushed: Mapping[Tier, int] = field(default_factory=dict)
    parked: Mapping[Tier, int] = field(default_factory=dict)
    """Bytes of activations that went to a tier; as many come back."""

    def since(self, earlier: Simulated) -> Simulated:
        """Return what happened after an earlier moment."""
        return self.plus(earlier, -1)

    def plus(self, other: Simulated, times: int = 1) -> Simulated:
        """Add what happened elsewhere, several times."""

        def both(mine: Mapping[Tier, int], others: Mapping[Tier, int]) -> dict[Tier, int]:
            return {tier: mine.get(tier, 0) + times * others.get(tier, 0) for tier in Tier if tier is not Tier.DEVICE}

        return Simulated(
            self.seconds + times * other.seconds,
            self.compute_s + times * other.compute_s,
            self.stall_s + times * other.stall_s,
            self.slowed_s + times * other.slowed_s,
            both(self.fetched, other.fetched),
            both(self.flushed, other.flushed),
            both(self.parked, other.parked),
        )

    def read_bytes(self, tier: Tier) -> int:
        """Return what was read from a tier, activations included."""
        return self.fetched.get(tier, 0) + self.parked.get(tier, 0)

    def written_bytes(self, tier: Tier) -> int:
        return self.flushed.get(tier, 0) + self.parked.get(tier, 0)


@dataclass(frozen=True, slots=True)
class Recomputation:
    """What of each block's forward pass is kept, and what is computed twice."""

    kept: frozenset[Segment] = frozenset()
    """Segments whose graphs stay on the device."""
    parked: Mapping[int, Tier] = field(default_factory=dict)
    """Blocks of which something is computed twice, from an input that leaves the device between the two passes."""
    spilled: Mapping[Segment, Tier] = field(default_factory=dict)
    """Segments whose graphs leave the device between the two passes."""

    @property
    def leaving(self) -> frozenset[int]:
        """Blocks of which something leaves the device."""
        return frozenset({*self.parked, *(segment.block for segment in self.spilled)})

    def is_recomputed(self, segment: Segment) -> bool:
        return segment not in self.kept and segment not in self.spilled


class Simulation:
    """A clock and everything that is under way on it. Lists are run one after the other, as the executor does."""

    def __init__(
        self,
        inventory: Inventory,
        placement: Placement,
        profile: Profile,
        recomputation: Recomputation = Recomputation(),
    ) -> None:
        self._inventory, self._placement, self._profile = inventory, placement, profile
        self._leaves: dict[int, list[tuple[Tier, int]]] = defaultdict(list)
        for block, tier in recomputation.parked.items():
            self._leaves[block].append((tier, profile.entry_bytes))
        for (block, index), tier in recomputation.spilled.items():
            self._leaves[block].append((tier, profile.place_bytes(inventory.blocks[block], index)))
        self._now = self._compute_s = self._stall_s = self._slowed_s = 0.0
        self._fetched: Counter[Tier] = Counter()
        self._flushed: Counter[Tier] = Counter()
        self._parked: Counter[Tier] = Counter()
        self._threads: dict[tuple[Tier, Direction], _Thread] = {}
        self._arriving: dict[_Place, dict[Unit, float]] = defaultdict(dict)
        self._leaving: dict[_Place, dict[Unit, float]] = defaultdict(dict)
        self._going_home: dict[Unit, float] = {}
        self._waiting: dict[_Pass, list[float]] = {}
        """When what a pass has left is in its tier, or back on the device once it was recalled."""
        self._recalled: set[_Pass] = set()
        self._parking: deque[float] = deque()
        """When activations that were the last to go are in their tier."""
        self._prices = _Prices(inventory, profile, recomputation)

    def result(self) -> Simulated:
        """Return the sums up to now. What was begun may not have ended yet."""
        return Simulated(
            self._now,
            self._compute_s,
            self._stall_s,
            self._slowed_s,
            dict(self._fetched),
            dict(self._flushed),
            dict(self._parked),
        )

    def run(self, ops: Iterable[Op]) -> None:
        """Perform a list."""
        for op in ops:
            match op:
                case Work() if op.moments == NOT_NEEDED:
                    self._work(op)
                case Fetch(unit, slot):
                    self._fetch(unit, slot)
                case Flush(unit, slot):
                    self._flush(unit, slot)
                case Enter(block, weights, gradient):
                    self._enter(block, weights, gradient)
                case Clear(block):
                    self._compute(self._prices.clear_s(block))
                case Work():
                    self._work_on_shard(op)

    # -- as the executor does it ------------------------------------------------------------------------

    def _enter(self, block: int, weights: int, gradient: int) -> None:
        self._wait(self._arriving.pop((Section.WEIGHTS, weights), {}).values())
        self._wait(self._arriving.pop((Section.GRADIENT, gradient), {}).values())
        leaving = self._leaving[Section.WEIGHTS, weights]
        self._wait([leaving.pop(unit) for unit in list(leaving) if unit.block != block])
        self._wait(self._leaving.pop((Section.GRADIENT, gradient), {}).values())

    def _work_on_shard(self, work: Work) -> None:
        self._wait(self._arriving.pop((Section.MOMENTS, work.moments), {}).values())
        self._wait(self._leaving.pop((Section.MOMENTS, work.moments), {}).values())
        if work.kind in CHANGING:
            home_s = self._going_home.get(Unit(work.block, Section.WEIGHTS, work.index))
            self._wait([] if home_s is None else [home_s])
        if work.kind is Kind.STEP:  # nobody plans by the others
            self._compute(self._prices.step_s(work.block, work.index))

    def _fetch(self, unit: Unit, slot: int) -> None:
        place = (unit.section, slot)
        arriving, leaving = self._arriving[place], self._leaving[place]
        for earlier in [other for other in arriving if other.block != unit.block]:
            leaving[earlier] = arriving.pop(earlier)
        before = list(leaving.values())
        if unit in self._going_home:
            before.append(self._going_home[unit])
        tier, num_bytes = self._placement.homes[unit], self._prices.num_bytes(unit)
        self._fetched[tier] += num_bytes
        arriving[unit] = self._copy(tier, "in", num_bytes, max(before, default=0.0))

    def _flush(self, unit: Unit, slot: int) -> None:
        tier, num_bytes = self._placement.homes[unit], self._prices.num_bytes(unit)
        self._flushed[tier] += num_bytes
        self._leaving[unit.section, slot][unit] = self._going_home[unit] = self._copy(tier, "out", num_bytes, 0.0)

    def _copy(self, tier: Tier, direction: Direction, num_bytes: int, after_s: float) -> float:
        """Begin a copy, behind those before it in its thread; return its end."""
        thread = self._threads.get((tier, direction))
        if thread is None:
            link = self._profile.link(tier)
            rate = link.in_bytes_per_s if direction == "in" else link.out_bytes_per_s
            thread = self._threads[tier, direction] = _Thread(rate, link.compute_share)
        return thread.copy(num_bytes, max(self._now, after_s))

    def _wait(self, ends_s: Iterable[float]) -> None:
        until_s = max(ends_s, default=0.0)
        if until_s > self._now:
            self._stall_s += until_s - self._now
            self._now = until_s

    def _compute(self, seconds: float) -> None:
        self._compute_s += seconds
        owed_s = seconds
        while owed_s > CLOCK_STEP_S:
            until_s = self._now + owed_s
            owed_s = sum(thread.taken_s(self._now, until_s) for thread in self._threads.values())
            self._now = until_s
            self._slowed_s += owed_s
        self._now += owed_s

    # -- work on microbatches ---------------------------------------------------------------------------

    def _work(self, work: Work) -> None:
        key = (work.block, work.index)
        if work.kind is Kind.PARK:
            self._waiting[key] = [self._park(tier, num_bytes) for tier, num_bytes in self._leaves[work.block]]
            return
        if work.kind is Kind.RECALL or (work.kind is Kind.BACKWARD and key in self._waiting):
            self._recall(key)
        if work.kind is Kind.BACKWARD and key in self._waiting:
            self._recalled.remove(key)
            self._wait(self._waiting.pop(key))
        if work.kind is not Kind.RECALL:
            self._compute(self._prices.work_s(work))

    def _park(self, tier: Tier, num_bytes: int) -> float:
        while len(self._parking) >= PARK_BUFFERS:
            self._wait([self._parking.popleft()])
        self._parked[tier] += num_bytes
        self._parking.append(self._copy(tier, "out", num_bytes, 0.0))
        return self._parking[-1]

    def _recall(self, key: _Pass) -> None:
        if key not in self._recalled:
            self._recalled.add(key)
            self._waiting[key] = [
                self._copy(tier, "in", num_bytes, there_s)
                for (tier, num_bytes), there_s in zip(self._leaves[key[0]], self._waiting[key], strict=True)
            ]


def simulate_step(
    inventory: Inventory,
    placement: Placement,
    profile: Profile,
    workload: Workload,
    *,
    wave: int,
    recomputation: Recomputation,
) -> Simulated:
    """Return what a step takes in the middle of training. Waves inside a step are alike: few of them are simulated."""
    run = _Run(inventory, placement, Simulation(inventory, placement, profile, recomputation))
    sizes = workload.waves(wave)
    last = len(sizes) - 1

    def one_wave(index: int) -> None:
        step = workload.mode is Mode.LOCAL and index == last
        passes = wave_passes(inventory, sizes[index], is_first=index == 0, step=step, leaving=recomputation.leaving)
        for number, each in enumerate(passes):
            run(each, key=(number, sizes[index], index == 0, step))

    def end() -> None:
        if workload.mode is Mode.AVERAGED:
            run(step_pass(inventory), key=())

    one_wave(last)  # from here on the slots hold what they hold at the start of any step
    end()
    start = run.simulation.result()
    alike = Simulated()
    for index in range(len(sizes)):
        if 3 <= index < last:
            continue
        before = run.simulation.result()
        one_wave(index)
        if index == 2:
            alike = run.simulation.result().since(before)
    end()
    return run.simulation.result().since(start).plus(alike, max(0, last - 3))


def recomputed_s(profile: Profile, recomputation: Recomputation, index: int, block: BlockLayout) -> float:
    """Return the seconds that a microbatch's backward pass through a block spends on computing forward once more."""
    segments = (segment for segment in segments_of(index, block.kind) if recomputation.is_recomputed(segment))
    return sum(profile.segment_forward_s(block, segment.part) for segment in segments)


@dataclass(slots=True)
class _Run:
    """Schedules and simulates passes as the executor would run them; equal passes are scheduled once."""

    inventory: Inventory
    placement: Placement
    simulation: Simulation
    _residency: Residency = field(default_factory=Residency)
    _lists: dict[Hashable, tuple[list[Op], Residency]] = field(default_factory=dict)

    def __call__(self, each: Pass, *, key: Hashable) -> None:
        place = (key, self._residency)
        if place not in self._lists:
            self._lists[place] = schedule(each.visits, self.inventory, self.placement, self._residency, then=each.then)
        ops, self._residency = self._lists[place]
        self.simulation.run(ops)


@dataclass(slots=True)
class _Thread:
    """One direction of one tier."""

    bytes_per_s: float
    compute_share: float
    free_s: float = 0.0
    _busy: deque[tuple[float, float]] = field(default_factory=deque)

    def copy(self, num_bytes: int, not_before_s: float) -> float:
        start_s = max(self.free_s, not_before_s)
        self.free_s = start_s + num_bytes / self.bytes_per_s
        if self.compute_share:
            self._busy.append((start_s, self.free_s))
        return self.free_s

    def taken_s(self, start_s: float, end_s: float) -> float:
        """Return what this thread's copies take away from computing between two times, of which none comes back."""
        taken_s = 0.0
        while self._busy and self._busy[0][0] < end_s:
            first_s, last_s = self._busy[0]
            taken_s += max(0.0, min(last_s, end_s) - max(first_s, start_s))
            if last_s > end_s:
                break
            self._busy.popleft()
        return self.compute_share * taken_s


class _Prices:
    """Seconds and bytes, each worked out once."""

    def __init__(self, inventory: Inventory, profile: Profile, recomputation: Recomputation) -> None:
        self._inventory, self._profile = inventory, profile
        self._bytes: dict[Unit, int] = {}
        self._steps: dict[tuple[int, int], float] = {}
        self._works: dict[tuple[Kind, int], float] = {}
        for index, block in enumerate(inventory.blocks):
            forward_s, backward_s = profile.forward_s(block), profile.backward_s(block)
            self._works |= {
                (Kind.FORWARD, index): forward_s,
                (Kind.SCORE, index): forward_s,
                (Kind.LOSS, index): backward_s,
                (Kind.BACKWARD, index): backward_s + recomputed_s(profile, recomputation, index, block),
            }

    def work_s(self, work: Work) -> float:
        return self._works[work.kind, work.block]

    def step_s(self, block: int, shard: int) -> float:
        if (block, shard) not in self._steps:
            layout = self._inventory.shards[block][shard]
            self._steps[block, shard] = self._profile.step_s(layout, self._inventory.optimizer)
        return self._steps[block, shard]

    def clear_s(self, block: int) -> float:
        return self._profile.clear_s * self._inventory.block_bytes(block, Section.GRADIENT) / ELEMENT_BYTES

    def num_bytes(self, unit: Unit) -> int:
        if unit not in self._bytes:
            self._bytes[unit] = self._inventory.num_bytes(unit)
        return self._bytes[unit]
