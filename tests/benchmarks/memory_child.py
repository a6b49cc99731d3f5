"""Our side of `memory.py`: a stage in the memory engine, in a process that is told what to do.

Answers the requests of `memory_plain.py`, by the same clocks. Knows the engine; the one place of the benchmark that
does. A step is over when everything that it began to write is written: the other side's turn must not pay for it. The
optimizer's step is taken inside the (last) backward pass. One request more:

    profile {"config", "batch", "length", "threads", "nvme"}  -> {"profile"}: this machine, as plans want it
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from peer.engine.measure import measure
from peer.engine.optimizer import OptimizerSpec
from peer.engine.stage_engine import StageEngine
from peer.engine.stage_state import Step
from peer.memory.pages import padded
from peer.memory.placement import Placement, Slots, Tier, all_on_device, footprint
from peer.memory.planning.budgets import Budgets
from peer.memory.planning.plan import Plan, plan
from peer.memory.planning.profile import Profile, graph_bytes, place_bytes
from peer.memory.planning.workload import Mode, Workload
from peer.memory.segments import Segment, segments_of
from peer.memory.units import ELEMENT_BYTES, Inventory, Section
from protocol.architecture import stage_blocks
from tests.benchmarks.memory_plain import (
    BETAS,
    EPSILON,
    LEARNING_RATE,
    WEIGHT_DECAY,
    Answer,
    Microbatch,
    Trainer,
    serve,
)

STATE = (Section.WEIGHTS, Section.MOMENTS)
Place = Callable[[Inventory], Placement]


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """How a stage is laid out in memory."""

    placement: Placement
    keep_bytes: int = 0
    """How much of the activations may stay instead of being recomputed."""
    kept: frozenset[Segment] | None = None
    """Of which segments; None: of the first."""
    inputs: Mapping[int, Tier] = field(default_factory=dict)
    """Where the inputs of layers wait for the backward pass, if not on the device."""
    graphs: Mapping[Segment, Tier] = field(default_factory=dict)
    """Where what graphs have saved does."""
    places: Mapping[Tier, Sequence[int]] = field(default_factory=dict)
    """The sizes of the places for these."""
    wave: int | None = None
    """Microbatches that go through a layer together; None: all of a step."""


class Ours(Trainer):
    """A stage whose state lives where it is told to, or where a plan puts it."""

    def build(
        self,
        *,
        config: dict[str, Any],
        num_stages: int,
        stage: int,
        threads: int,
        wave: dict[str, int],
        tier: str,
        nvme: str | None = None,
        optimizer: str = "adamw8bit",
        master: str = "fp32",
        **layout: Any,
    ) -> Answer:
        """Build one stage for steps of `wave`. `tier` names a placement or is `planned`; for the rest see below."""
        torch.set_num_threads(threads)
        self.width, self.wave = config["hidden_size"], None
        spec: Any = OptimizerSpec  # names come as plain strings
        arguments: dict[str, Any] = {
            "num_stages": num_stages,
            "stage": stage,
            "optimizer": spec(name=optimizer, master=master, betas=BETAS, epsilon=EPSILON, weight_decay=WEIGHT_DECAY),
        }
        inventory = _inventory(config, **arguments)
        answer: Answer = {}
        if tier == "planned":
            made = _planned(inventory, wave, **layout)
            chosen, answer = _as_layout(made), {"predicted": _predicted(made)}
        else:
            chosen = _laid_out(inventory, tier, wave, **layout)
        self.footprint = footprint(inventory, chosen.placement)
        for there, sizes in chosen.places.items():
            self.footprint[there] += sum(sizes)
        self.footprint[Tier.HOST] += 2 * padded(max(chosen.places.get(Tier.NVME, (0,))))  # on their way
        self.wave = chosen.wave
        self.engine = StageEngine.build(
            config,
            **arguments,
            seed=1,
            keep_budget_bytes=chosen.keep_bytes,
            placement=lambda _: chosen.placement,
            nvme=None if nvme is None else Path(nvme),
            kept=chosen.kept,
            inputs=chosen.inputs,
            graphs=chosen.graphs,
            places=chosen.places,
        )
        self.executor = self.engine._memory
        self.executor.settle()
        return {"parameters": self.engine.num_parameters, **answer}

    def profile(
        self, *, config: dict[str, Any], batch: int, length: int, threads: int, nvme: str | None = None
    ) -> Answer:
        """Measure this machine."""
        torch.set_num_threads(threads)
        profile = measure(config, sequences=batch, sequence_length=length, nvme=None if nvme is None else Path(nvme))
        return {"profile": profile.to_json()}

    def train(self, microbatches: Sequence[Microbatch]) -> list[tuple[Tensor, Tensor]]:
        size = self.wave or len(microbatches)
        results: list[tuple[Tensor, Tensor]] = []
        for start in range(0, len(microbatches), size):
            is_last = start + size >= len(microbatches)
            step = Step(LEARNING_RATE, 1.0) if is_last else None
            results += self._there_and_back(microbatches[start : start + size], step)
        self.executor.settle()
        return results

    def weights(self) -> dict[str, Tensor]:
        return self.engine.weight_tensors()

    def state(self) -> dict[str, int]:
        return {
            "state": self.engine.state_bytes,
            "device": self.footprint[Tier.DEVICE],
            "host": self.footprint[Tier.HOST],
        }

    def stalled_s(self) -> float:
        return self.executor.stalls.waited_s

    def _there_and_back(self, wave: Sequence[Microbatch], step: Step | None) -> list[tuple[Tensor, Tensor]]:
        forward = self.engine.forward_wave([inputs for inputs, _ in wave])
        gradients = self.engine.backward_wave(
            [(ticket, gradient) for (_, ticket), (_, gradient) in zip(forward, wave, strict=True)], step=step
        )
        results = zip(forward, gradients, strict=True)
        return [(output, gradient) for (output, _), gradient in results if gradient is not None]


def placements(slots: Slots) -> dict[str, Place]:
    """Return the placements by the tier that holds the state. Gradients live in their slot only, but for `device`."""

    def elsewhere(tier: Tier) -> Place:
        return lambda inventory: Placement(
            homes={unit: tier for section in STATE for unit in inventory.units(section)}, slots=slots
        )

    return {"device": all_on_device, "host": elsewhere(Tier.HOST), "nvme": elsewhere(Tier.NVME)}


def _laid_out(
    inventory: Inventory,
    tier: str,
    wave: dict[str, int],
    *,
    slots: Sequence[int] = (2, 1, 2),
    keep_bytes: int = 0,
    parked: str | None = None,
    spilled: str | None = None,
) -> Layout:
    """Return a layout by hand. `slots` are for weights, gradients and moments that do not live on the device.

    The inputs of all layers wait in tier `parked`, or their graphs in tier `spilled`.
    """
    place = placements(Slots(weights=slots[0], gradient=slots[1], moments=slots[2]))[tier]
    there: dict[str, Any] = {}
    if parked is not None:
        width = inventory.blocks[0].slots[0].shape[1]
        entry_bytes = ELEMENT_BYTES * wave["batch"] * wave["length"] * width
        inputs = dict.fromkeys(range(len(inventory.blocks)), Tier[parked.upper()])
        there = {"inputs": inputs, "places": {Tier[parked.upper()]: [entry_bytes] * len(inputs) * wave["microbatches"]}}
    if spilled is not None:
        layers = enumerate(inventory.blocks)
        sizes = {
            segment: place_bytes(num_bytes)
            for block, layer in layers
            for segment, num_bytes in zip(
                segments_of(block, layer.kind), graph_bytes(layer, wave["batch"], wave["length"]), strict=True
            )
        }
        graphs = dict.fromkeys(sizes, Tier[spilled.upper()])
        there = {"graphs": graphs, "places": {Tier[spilled.upper()]: [*sizes.values()] * wave["microbatches"]}}
    return Layout(placement=place(inventory), keep_bytes=keep_bytes, **there)


def _planned(inventory: Inventory, wave: dict[str, int], *, profile: str, **budgets: int) -> Plan:
    """Make a plan for steps of `wave`, all of whose microbatches are there at once. `budgets` are those of tiers."""
    workload = Workload(mode=Mode.LOCAL, microbatches=wave["microbatches"])
    return plan(inventory, Profile.from_json(profile), Budgets(**budgets), workload)


def _as_layout(made: Plan) -> Layout:
    return Layout(
        placement=made.placement,
        keep_bytes=made.keep_bytes,
        kept=made.kept,
        inputs=made.parked,
        graphs=made.spilled,
        places=made.places,
        wave=made.wave,
    )


def _predicted(made: Plan) -> dict[str, Any]:
    homes = made.placement.homes
    tiers = {
        tier.name.lower(): sum(made.inventory.num_bytes(unit) for unit in homes if homes[unit] is tier) for tier in Tier
    }
    prediction = made.prediction
    return {
        "step_s": prediction.step_s,
        "stall_s": prediction.stall_s,
        "process": prediction.process_bytes,
        "wave": made.wave,
        "kept": sum(not activation.is_recomputed for activation in made.activations.values()),
        **tiers,
    }


def _inventory(config: dict[str, Any], *, num_stages: int, stage: int, optimizer: OptimizerSpec) -> Inventory:
    return Inventory(stage_blocks(config, num_stages, stage), optimizer.name, optimizer.master)


if __name__ == "__main__":
    serve(Ours(), "profile")
