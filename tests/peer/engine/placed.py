"""Training one stage under a placement, and everything that comes of it: the yardstick of test_placements.py.

Where the state lives, how many microbatches go through a layer together, what is kept and when the step is taken are
matters of speed alone: not a bit of `Outcome` may depend on them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from peer.engine.optimizer import OptimizerSpec
from peer.engine.stage_engine import StageEngine
from peer.engine.stage_state import Step
from peer.memory.backend import CpuBackend
from peer.memory.executor import open_memory
from peer.memory.placement import Placement, Slots, Tier, all_on_device
from peer.memory.segments import segments_of
from peer.memory.units import Inventory, Section, Unit
from peer.model.stage import build_stage
from protocol.architecture import preset, stage_blocks

TINY = preset("tiny")
PLENTY = 1 << 30
MICROBATCHES = 4  # per step
STEPS = 2
SHAPE = (2, 8)  # sequences, tokens
TARGETS = MICROBATCHES * SHAPE[0] * SHAPE[1]
ACTIVATION_BYTES = 4 * SHAPE[0] * SHAPE[1] * int(TINY["hidden_size"])
GRAPH_BYTES = 1 << 16  # more than any segment of a layer saves of such a microbatch

MakePlacement = Callable[[Inventory], Placement]


@dataclass(slots=True)
class Outcome:
    """What training has brought: hidden states and gradients by the inputs, losses, the sums before each step, and the
    digest after it."""

    tensors: list[Tensor] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    sums: list[list[Tensor]] = field(default_factory=list)
    digests: list[bytes] = field(default_factory=list)


def same(ours: Outcome, theirs: Outcome) -> bool:
    """Tell whether every bit is the same; sums are compared if both know them."""
    return (
        ours.digests == theirs.digests
        and ours.losses == theirs.losses
        and equal(ours.tensors, theirs.tensors)
        and (not ours.sums or not theirs.sums or all(map(equal, ours.sums, theirs.sums)))
    )


def equal(ours: list[Tensor], theirs: list[Tensor]) -> bool:
    return len(ours) == len(theirs) and all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def room(
    *, parked: Tier | None = None, places: int = 0, spilled: Tier | None = None, graph_places: int = 0
) -> dict[Tier, list[int]]:
    """Return the sizes of places for inputs in one tier and for graphs in another, or the same."""
    sizes: dict[Tier, list[int]] = {}
    for tier, size, number in ((parked, ACTIVATION_BYTES, places), (spilled, GRAPH_BYTES, graph_places)):
        if tier is not None:
            sizes.setdefault(tier, []).extend([size] * number)
    return sizes


def free_places(engine: StageEngine, tier: Tier) -> list[int]:
    """Return the places that nobody uses at the moment."""
    assert engine._parking is not None
    engine._parking.arena.reclaim()
    return sorted(place for places in engine._parking.arena._free[tier].values() for place in places)


def build(
    stage: int,
    placement: MakePlacement = all_on_device,
    *,
    keep: int = 0,
    config: Any = TINY,
    parked: Tier | None = None,
    places: int = 0,
    spilled: Tier | None = None,
    graph_places: int = 0,
    **options: Any,
) -> StageEngine:
    layouts = stage_blocks(config, 3, stage)
    body = [block for block, layout in enumerate(layouts) if segments_of(block, layout.kind)]
    graphs = [segment for block in body for segment in segments_of(block, layouts[block].kind)]
    return StageEngine.build(
        config,
        num_stages=3,
        stage=stage,
        optimizer=OptimizerSpec(),
        seed=2,
        placement=placement,
        keep_budget_bytes=keep,
        inputs={} if parked is None else dict.fromkeys(body, parked),
        graphs={} if spilled is None else dict.fromkeys(graphs, spilled),
        places=room(parked=parked, places=places, spilled=spilled, graph_places=graph_places),
        **options,
    )


def build_span(placement: MakePlacement, stages: Sequence[int]) -> dict[int, StageEngine]:
    """Build several stages over one memory."""
    spec = OptimizerSpec()
    models = {stage: build_stage(TINY, num_stages=3, stage=stage) for stage in stages}
    inventory = Inventory([each for model in models.values() for each in model.layouts], spec.name)
    memory = open_memory(inventory, placement(inventory), CpuBackend())
    engines, first = {}, 0
    for stage, model in models.items():
        engines[stage] = StageEngine(model, spec, memory, first_block=first)
        engines[stage].initialise(2)
        first += len(model.blocks)
    return engines


def hidden(seed: int) -> Tensor:
    width = int(TINY["hidden_size"])
    return torch.randn(*SHAPE, width, generator=torch.Generator().manual_seed(seed))


def tokens(seed: int) -> Tensor:
    return torch.randint(0, int(TINY["vocab_size"]), SHAPE, generator=torch.Generator().manual_seed(seed))


def train(engine: StageEngine, *, wave: int = 1, step_inside: bool = False, versions: range = range(STEPS)) -> Outcome:
    """Train on the microbatches of some versions, `wave` of them at a time."""
    outcome = Outcome()
    for version in versions:
        numbers = range(version * MICROBATCHES, (version + 1) * MICROBATCHES)
        for start in range(0, MICROBATCHES, wave):
            is_last = start + wave >= MICROBATCHES
            pass_wave(
                engine,
                list(numbers[start : start + wave]),
                outcome,
                Step(1e-3, 1 / TARGETS) if step_inside and is_last else None,
            )
        if not step_inside:
            outcome.sums.append([shard.clone() for shard in engine.gradient_shards()])
            engine.step(1e-3, scale=1 / TARGETS)
        outcome.digests.append(engine.state_digest())
    return outcome


def pass_wave(engine: StageEngine, numbers: list[int], outcome: Outcome, step: Step | None = None) -> None:
    """Take microbatches forth and back."""
    if engine.is_last:
        results = engine.loss_wave([(hidden(number), tokens(number)) for number in numbers], step=step)
        outcome.losses += [result.loss_sum for result in results]
        outcome.tensors += [result.grad_inputs for result in results if result.grad_inputs is not None]
        return
    inputs = tokens if engine.is_first else hidden
    passes = engine.forward_wave([inputs(number) for number in numbers])
    back = engine.backward_wave(
        [(ticket, hidden(100 + number)) for (_, ticket), number in zip(passes, numbers, strict=True)], step=step
    )
    for index, (outputs, _) in enumerate(passes):  # in the order in which single microbatches would bring them
        gradient = back[index]
        outcome.tensors += [outputs] if gradient is None else [outputs, gradient]


# -- placements -----------------------------------------------------------------------------------------------------


def homes(inventory: Inventory, tier: Callable[[Unit], Tier]) -> dict[Unit, Tier]:
    return {unit: tier(unit) for section in Section for unit in inventory.units(section)}


def in_host(inventory: Inventory) -> Placement:
    return Placement(homes=homes(inventory, lambda unit: Tier.HOST), slots=Slots(weights=2, gradient=2, moments=2))


def in_host_with_one_slot(inventory: Inventory) -> Placement:
    return Placement(homes=homes(inventory, lambda unit: Tier.HOST), slots=Slots(weights=1, gradient=1, moments=1))


def in_host_with_many_slots(inventory: Inventory) -> Placement:
    return Placement(homes=homes(inventory, lambda unit: Tier.HOST), slots=Slots(weights=9, gradient=3, moments=5))


def mixed(inventory: Inventory) -> Placement:
    """Weights of every other block on the device, gradients of the others, and every third shard's moments."""

    def tier(unit: Unit) -> Tier:
        on_device = {
            Section.WEIGHTS: unit.block % 2 == 0,
            Section.GRADIENT: unit.block % 2 == 1,
            Section.MOMENTS: (unit.block + unit.shard) % 3 == 0,
        }
        return Tier.DEVICE if on_device.get(unit.section) else Tier.HOST

    return Placement(homes=homes(inventory, tier), slots=Slots(weights=1, gradient=2, moments=1))


def on_nvme(inventory: Inventory) -> Placement:
    return Placement(homes=homes(inventory, lambda unit: Tier.NVME), slots=Slots(weights=2, gradient=2, moments=2))


def in_three_tiers(inventory: Inventory) -> Placement:
    """Shards of one block in different tiers, and gradients of the first blocks on the device."""

    def tier(unit: Unit) -> Tier:
        if unit.section is Section.GRADIENT and unit.block < 2:
            return Tier.DEVICE
        if unit.section is Section.MOMENTS and unit.shard % 3 == 0:
            return Tier.DEVICE
        return Tier.HOST if (unit.block + unit.shard) % 2 else Tier.NVME

    return Placement(homes=homes(inventory, tier), slots=Slots(weights=2, gradient=1, moments=2))


def without_home_for_gradients(inventory: Inventory) -> Placement:
    everywhere = homes(inventory, lambda unit: Tier.HOST)
    return Placement(
        homes={unit: tier for unit, tier in everywhere.items() if unit.section is not Section.GRADIENT},
        slots=Slots(weights=2, gradient=1, moments=2),
    )


PLACEMENTS: Mapping[str, MakePlacement] = {
    "device": all_on_device,
    "host": in_host,
    "host, one slot": in_host_with_one_slot,
    "host, many slots": in_host_with_many_slots,
    "mixed": mixed,
    "nvme": on_nvme,
    "three tiers": in_three_tiers,
}


def options_of(placement: str, folder: Path) -> dict[str, Any]:
    """Return what a placement needs besides."""
    return {"nvme": folder / "nvme"} if placement in ("nvme", "three tiers") else {}
