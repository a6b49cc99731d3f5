"""The passes that make up one optimizer step of a peer's span, and how often each section travels in them. Pure.

Owns: which blocks a wave visits and in which order, as the engine does it (`peer/engine/stage_engine.py`). Must not
know: placement, time.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple

from peer.memory.schedule import Gradient, Kind, Visit, backward_visits, forward_visits, shard_visits
from peer.memory.units import APART, Inventory, Section
from protocol.layout import BlockKind


class Mode(StrEnum):
    """When the optimizer's step is taken."""

    AVERAGED = "averaged"
    """After the round, once gradients have been averaged with other peers: a pass of its own."""
    LOCAL = "local"
    """Inside the backward pass of the last wave."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """What a span has to do for one step."""

    mode: Mode
    microbatches: int
    """Per optimizer step."""
    stages_behind: int = 0
    """How many stages of other peers a microbatch visits before its gradient comes back."""
    stages: int = 1
    """How many stages the span has."""
    longest_pass_s: float | None = None
    """How long a wave's way up or down may take: a round that closes does not wait longer for what is under way."""

    def __post_init__(self) -> None:
        if self.microbatches < 1 or self.stages_behind < 0 or (self.longest_pass_s or 1.0) <= 0:
            raise ValueError(f"this is no work: {self}")

    def waves(self, wave: int) -> list[int]:
        """Return the sizes of the waves of a step; the last one may be smaller."""
        full, rest = divmod(self.microbatches, wave)
        return [wave] * full + [rest] * (rest > 0)

    def keeps_sums(self, wave: int) -> bool:
        """Tell whether gradients outlive a visit, and so need a home."""
        return self.mode is Mode.AVERAGED or wave < self.microbatches


class Pass(NamedTuple):
    """One call of the executor."""

    visits: list[Visit]
    then: Sequence[int]


class Parts(NamedTuple):
    """Which blocks of a span are what, in forward order."""

    embedding: range
    body: range
    head: range


def parts_of(inventory: Inventory) -> Parts:
    """Return the parts of a span by its blocks' kinds."""
    kinds = [block.kind for block in inventory.blocks]
    first = kinds.count(BlockKind.EMBEDDING)
    last = len(kinds) - kinds.count(BlockKind.HEAD)
    return Parts(range(first), range(first, last), range(last, len(kinds)))


def wave_passes(
    inventory: Inventory, wave: int, *, is_first: bool, step: bool, leaving: Collection[int] = ()
) -> list[Pass]:
    """Return the passes up and down of one wave. `is_first` of its step; `step` if the optimizer is in it.

    Of blocks in `leaving`, what their backward pass needs waits outside the device.
    """
    embedding, body, head = parts_of(inventory)
    down = [*reversed([*body, *head])]
    up_visits = forward_visits([*embedding, *body], wave, leaving=leaving)
    if len(head) > 1:
        up_visits += forward_visits(head, wave, kind=Kind.SCORE)
    down_visits: list[Visit] = []
    for block in (*down, *reversed(embedding)):
        kind = Kind.LOSS if block in head else Kind.BACKWARD
        down_visits += backward_visits(
            [block], wave, kind=kind, is_fresh=lambda _: is_first, step=step, leaving=leaving
        )
    return [Pass(up_visits, down if head else ()), Pass(down_visits, range(len(inventory.blocks)))]


def step_pass(inventory: Inventory) -> Pass:
    """Return the optimizer's own pass after averaging."""
    return Pass(shard_visits(range(len(inventory.blocks)), Kind.STEP, gradient=Gradient.SUM), ())


class Phase(StrEnum):
    """The parts of a step that follow each other."""

    UP = "up"
    DOWN = "down"
    STEP = "step"
    """The optimizer's own pass."""


class Trips(NamedTuple):
    """How often a section of a block comes to the device, and how often it goes home."""

    fetches: int
    flushes: int


def trips(inventory: Inventory, block: int, section: Section, workload: Workload, wave: int) -> dict[Phase, Trips]:
    """Count the trips of a section that lives elsewhere in one step.

    What slots hold from visit to visit is not subtracted.
    """
    num_waves, head = len(workload.waves(wave)), parts_of(inventory).head
    is_local = workload.mode is Mode.LOCAL
    step = Phase.DOWN if is_local else Phase.STEP
    if section in APART:
        return {}
    if section is Section.MOMENTS:
        return {step: Trips(1, 1)}
    if section is Section.GRADIENT:
        if not workload.keeps_sums(wave):
            return {}
        found = {Phase.DOWN: Trips(num_waves - 1, num_waves - is_local)}
        return found if is_local else found | {step: Trips(1, 0)}
    found = {Phase.DOWN: Trips(num_waves, int(is_local))}
    if block not in head or len(head) > 1:
        found[Phase.UP] = Trips(num_waves, 0)
    return found if is_local else found | {step: Trips(1, 1)}


def total(found: Mapping[Phase, Trips]) -> Trips:
    """Add up the trips of all phases."""
    return Trips(sum(each.fetches for each in found.values()), sum(each.flushes for each in found.values()))
