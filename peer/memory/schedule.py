"""The order of everything that happens in one pass over a peer's blocks: one list, simulated and executed alike. Pure.

Owns: which unit is brought into which slot and when, what computes, what is written home. Must not know: torch,
clocks, what a block computes. `executor.py` performs the list, `simulate.py` prices it.

The order of training is known beforehand, so nothing is guessed: a pass is a series of *visits* of blocks, and the
list brings the units of later visits in as soon as a slot is free for them. Microbatches go through a block together
(a *wave*), so the weights travel once per wave and not once per microbatch ("vertical" scheduling, GreedySnake,
arXiv 2512.17570).

A list is read from the front. `Fetch` and `Flush` begin something and go on; `Enter`, `Clear` and the work that
follows wait for what they need. Between lists, slots keep what they hold (`Residency`).
"""

from __future__ import annotations

from bisect import bisect_left
from collections import defaultdict
from collections.abc import Callable, Collection, Hashable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum

from peer.memory.placement import Placement
from peer.memory.units import Inventory, Section, Unit

AT_HOME = -1
"""Stands for a slot where a section lives on the device."""
NOT_NEEDED = -2
"""Stands for a slot where a section is not used."""


class Kind(StrEnum):
    """What a block does. The engine gives it meaning; here it only has an order and a price."""

    FORWARD = "forward"
    BACKWARD = "backward"
    SCORE = "score"
    """The head's part of the normaliser of each token, for a loss over several blocks of rows or without a gradient."""
    LOSS = "loss"
    PARK = "park"
    """Begin to move what a microbatch's forward pass through the block has left out of the device."""
    RECALL = "recall"
    """Begin to bring it back. Of the visit to come: the block need not be entered yet."""
    STEP = "step"
    """Update one shard: its weights, gradient and moments are in place."""
    MERGE = "merge"
    """Bring what replicas have averaged into the weights of one shard."""
    FILL = "fill"
    """Write new contents (initial weights, a saved state)."""
    READ = "read"
    """Look at one shard (to save or hash it)."""


CHANGING = (Kind.STEP, Kind.MERGE, Kind.FILL)
"""Work after which weights and moments of a shard are others."""

PARK_BUFFERS = 2
"""Activations that may be on their way out of the device at the same time."""


@dataclass(frozen=True, slots=True)
class Fetch:
    """Begin to copy a unit from its home into a slot."""

    unit: Unit
    slot: int


@dataclass(frozen=True, slots=True)
class Flush:
    """Begin to copy a unit from a slot to its home."""

    unit: Unit
    slot: int


@dataclass(frozen=True, slots=True)
class Enter:
    """Wait until a block's weights and gradient are in these slots, and compute with them from now on."""

    block: int
    weights: int
    gradient: int


@dataclass(frozen=True, slots=True)
class Clear:
    """Set the gradient of the entered block to zero."""

    block: int
    slot: int


@dataclass(frozen=True, slots=True)
class Work:
    """Compute with the entered block: on a microbatch of the wave, or on a shard with its moments in `moments`."""

    kind: Kind
    block: int
    index: int
    """Of the microbatch in its wave; of the shard for STEP, MERGE, FILL and READ."""
    moments: int = NOT_NEEDED


Op = Fetch | Flush | Enter | Clear | Work


class Gradient(StrEnum):
    """What a visit wants of its block's gradient."""

    NONE = "none"
    SUM = "sum"
    """What earlier visits have added up."""
    ZERO = "zero"
    """To begin a sum."""
    SPACE = "space"
    """A place to write a gradient from elsewhere."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Visit:
    """One stay at a block."""

    block: int
    work: tuple[tuple[Kind, int], ...] = ()
    """On microbatches: what, and on which."""
    shard_work: Kind | None = None
    """Afterwards, on every shard with its moments: all but READ change weights and moments."""
    parks: bool = False
    """What each microbatch's work has left, or some of it, goes to another tier until its backward pass."""
    recalls: bool = False
    """That comes back from there before the work."""
    gradient: Gradient = Gradient.NONE
    keeps_gradient: bool = True
    """Whether the gradient is still wanted after this visit (a step consumes it)."""


@dataclass(frozen=True, slots=True)
class Residency:
    """What the slots hold between two lists: blocks, or None."""

    weights: tuple[int | None, ...] = ()
    gradient: tuple[int | None, ...] = ()


def forward_visits(
    blocks: Iterable[int], wave: int, *, kind: Kind = Kind.FORWARD, leaving: Collection[int] = ()
) -> list[Visit]:
    """Pass a wave of `wave` microbatches through blocks in the order given.

    Of blocks in `leaving`, what their backward pass needs waits in another tier.
    """
    return [
        Visit(block=block, work=tuple((kind, index) for index in range(wave)), parks=block in leaving)
        for block in blocks
    ]


def backward_visits(
    blocks: Iterable[int],
    wave: int,
    *,
    kind: Kind = Kind.BACKWARD,
    is_fresh: Callable[[int], bool],
    step: bool = False,
    leaving: Collection[int] = (),
) -> list[Visit]:
    """Pass a wave's gradients back through blocks in the order given (last block first).

    `is_fresh` tells whose sum begins with this wave. With `step`, every block takes its optimizer step as soon as its
    gradient is complete, which is then not kept.
    """
    return [
        Visit(
            block=block,
            work=tuple((kind, index) for index in range(wave)),
            recalls=block in leaving,
            gradient=Gradient.ZERO if is_fresh(block) else Gradient.SUM,
            shard_work=Kind.STEP if step else None,
            keeps_gradient=not step,
        )
        for block in blocks
    ]


def shard_visits(blocks: Iterable[int], kind: Kind, *, gradient: Gradient = Gradient.NONE) -> list[Visit]:
    """Go through the shards of blocks: an optimizer step after averaging, loading, saving, hashing."""
    return [Visit(block=block, shard_work=kind, gradient=gradient, keeps_gradient=False) for block in blocks]


def schedule(
    visits: Sequence[Visit],
    inventory: Inventory,
    placement: Placement,
    residency: Residency = Residency(),
    *,
    then: Sequence[int] = (),
) -> tuple[list[Op], Residency]:
    """Return the operations of a pass, and what the slots hold after it.

    `then` names the blocks whose weights will be wanted next; they are brought in while the last visits compute.
    """
    return _Scheduler(inventory, placement, residency).run(visits, then)


class _Scheduler:
    def __init__(self, inventory: Inventory, placement: Placement, residency: Residency) -> None:
        self._inventory, self._placement, self._before = inventory, placement, residency
        self._ops: list[Op] = []

    def run(self, visits: Sequence[Visit], then: Sequence[int]) -> tuple[list[Op], Residency]:
        weights = self._ring(Section.WEIGHTS, self._before.weights, [*map(self._weights, visits), *map(self._of, then)])
        gradient = self._ring(Section.GRADIENT, self._before.gradient, [self._gradient(visit) for visit in visits])
        moments = self._ring(Section.MOMENTS, (), [need for visit in visits for need in self._moments(visit)])
        next_moments = 0
        for number, visit in enumerate(visits):
            for ring in (weights, gradient, moments):
                ring.fill(self._ops)
            for soon in visits[number : number + 2] if number == 0 else visits[number + 1 : number + 2]:
                self._ops += _recalls(soon)
            weights_slot, gradient_slot = weights.slot_of(number), gradient.slot_of(number)
            self._ops.append(Enter(visit.block, weights_slot, gradient_slot))
            if visit.gradient is Gradient.ZERO:
                self._ops.append(Clear(visit.block, gradient_slot))
            for kind, index in visit.work:
                self._ops.append(Work(kind, visit.block, index))
                if visit.parks:
                    self._ops.append(Work(Kind.PARK, visit.block, index))
            if visit.shard_work is not None:
                changes = visit.shard_work is not Kind.READ
                for unit in self._inventory.block_units(visit.block, Section.MOMENTS):
                    moments.fill(self._ops)
                    slot = moments.slot_of(next_moments)
                    self._ops.append(Work(visit.shard_work, visit.block, unit.shard, slot))
                    if changes:
                        self._flush(Unit(visit.block, Section.WEIGHTS, unit.shard), weights_slot)
                        self._flush(unit, slot)
                    moments.release(next_moments)
                    next_moments += 1
            if visit.gradient is not Gradient.NONE and visit.keeps_gradient:
                for unit in self._inventory.block_units(visit.block, Section.GRADIENT):
                    self._flush(unit, gradient_slot)
            elif visit.gradient is not Gradient.NONE:
                gradient.forget(number)
            weights.release(number)
            gradient.release(number)
        weights.fill(self._ops)
        return self._ops, Residency(weights.contents(), gradient.contents())

    def _flush(self, unit: Unit, slot: int) -> None:
        if slot != AT_HOME and unit in self._placement.homes:
            self._ops.append(Flush(unit, slot))

    def _ring(self, section: Section, resident: tuple[int | None, ...], needs: list[_Need]) -> _Ring:
        num_slots = self._placement.slots.of(section)
        return _Ring([*resident[:num_slots], *[None] * (num_slots - len(resident))], needs)

    def _weights(self, visit: Visit) -> _Need:
        if visit.shard_work is Kind.FILL:  # whatever was there is overwritten
            return _Need(visit.block, AT_HOME if self._is_at_home(visit.block, Section.WEIGHTS) else None)
        return self._of(visit.block)

    def _of(self, block: int) -> _Need:
        return self._need(block, Section.WEIGHTS)

    def _gradient(self, visit: Visit) -> _Need:
        if visit.gradient is Gradient.NONE:
            return _Need(visit.block, NOT_NEEDED)
        need = self._need(visit.block, Section.GRADIENT)
        if visit.gradient is not Gradient.SUM:
            return _Need(need.key, need.fixed)
        return replace(need, is_homeless=not need.units)

    def _need(self, block: int, section: Section) -> _Need:
        if self._is_at_home(block, section):
            return _Need(block, AT_HOME)
        units = self._inventory.block_units(block, section)
        return _Need(block, None, tuple(unit for unit in units if unit in self._placement.homes))

    def _moments(self, visit: Visit) -> list[_Need]:
        if visit.shard_work is None:
            return []
        needs = []
        for unit in self._inventory.block_units(visit.block, Section.MOMENTS):
            if self._placement.is_on_device(unit):
                needs.append(_Need(unit, AT_HOME))
            else:
                needs.append(_Need(unit, None, () if visit.shard_work is Kind.FILL else (unit,)))
        return needs

    def _is_at_home(self, block: int, section: Section) -> bool:
        return self._placement.is_on_device(Unit(block, section, 0))


def _recalls(visit: Visit) -> list[Op]:
    return [Work(Kind.RECALL, visit.block, index) for _, index in visit.work] if visit.recalls else []


@dataclass(frozen=True, slots=True)
class _Need:
    """One visit's wish for a slot: what it is to hold, and the units to fetch if it does not hold it yet."""

    key: Hashable
    fixed: int | None
    """AT_HOME or NOT_NEEDED where no slot is needed."""
    units: tuple[Unit, ...] = ()
    is_homeless: bool = False
    """Whether it is nowhere if no slot holds it."""


@dataclass(slots=True)
class _Ring:
    """The slots of one section. Needs are met in order, each as early as a slot is free for it.

    Which slot: one that holds nothing, else the one whose contents are wanted last (Belady 1966); all are clean, or
    on their way home, once they are free.
    """

    holding: list[Hashable]
    needs: list[_Need]
    _users: list[int] = field(init=False)
    _slots: list[int] = field(init=False, default_factory=list)
    _uses: dict[Hashable, list[int]] = field(init=False)

    def __post_init__(self) -> None:
        self._users = [0] * len(self.holding)
        self._uses = defaultdict(list)
        for number, need in enumerate(self.needs):
            self._uses[need.key].append(number)

    def fill(self, ops: list[Op]) -> None:
        """Fetch for as many needs to come as there are free slots."""
        while len(self._slots) < len(self.needs):
            need = self.needs[len(self._slots)]
            slot = need.fixed if need.fixed is not None else self._take(need, ops)
            if slot is None:
                return
            self._slots.append(slot)

    def slot_of(self, number: int) -> int:
        assert number < len(self._slots), "a section has fewer slots than one visit needs"
        return self._slots[number]

    def release(self, number: int) -> None:
        if self._slots[number] >= 0:
            self._users[self._slots[number]] -= 1

    def forget(self, number: int) -> None:
        """Take note that a slot's contents are of no use to anybody any more."""
        if self._slots[number] >= 0:
            self.holding[self._slots[number]] = None

    def contents(self) -> tuple[int | None, ...]:
        return tuple(key if isinstance(key, int) else None for key in self.holding)

    def _take(self, need: _Need, ops: list[Op]) -> int | None:
        if need.key in self.holding:
            slot = self.holding.index(need.key)
        elif need.is_homeless:
            raise ValueError(f"the gradient of block {need.key} has no home, and lost its slot before its sum was used")
        else:
            free = [slot for slot, users in enumerate(self._users) if not users]
            if not free:
                return None
            slot = max(free, key=self._next_use)
            self.holding[slot] = need.key
            ops += [Fetch(unit, slot) for unit in need.units]
        self._users[slot] += 1
        return slot

    def _next_use(self, slot: int) -> float:
        """Return when a slot's contents are wanted again, as the number of a need; empty slots come first."""
        if self.holding[slot] is None:
            return float("inf")
        uses = self._uses.get(self.holding[slot], [])
        later = bisect_left(uses, len(self._slots))
        return uses[later] if later < len(uses) else len(self.needs)
