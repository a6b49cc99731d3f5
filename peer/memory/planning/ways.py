"""Ways of training, and what each takes besides the state: activations, working space, staging, second copies. Pure.

Owns: `Way` and these bytes. Must not know: where units live and how tiers are filled (`fit.py`), how long anything
takes, the choice between ways (`plan.py`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

from peer.memory.disk.slot_table import UnitSpec, required_bytes
from peer.memory.pages import padded
from peer.memory.placement import Slots, Tier
from peer.memory.planning.profile import STEP_BYTES_PER_ELEMENT, Profile
from peer.memory.planning.simulate import Recomputation
from peer.memory.planning.workload import Workload, parts_of
from peer.memory.units import Inventory, Section, Unit
from protocol.layout import BlockKind

STREAMING_SLOTS = Slots(weights=2, gradient=2, moments=2)
"""One is computed with while another is on its way."""

Order = Literal["both", "in", "out"]
"""What a pinned byte is worth: the seconds of copying that it saves in both directions, or in one."""

Row = dict[Tier, int]
"""Bytes by tier."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Way:
    """A way of training, before anything has a place."""

    wave: int
    waves_in_flight: int = 1
    kept_layers: int = 0
    """Layers whose graphs are kept: the first ones, as `peer/engine/retention.py` keeps them."""
    inputs: Tier = Tier.DEVICE
    """Where the inputs of the other blocks wait."""
    whole: frozenset[Section] = frozenset()
    """Sections that live on the device entirely, and so need no slots."""
    order: Order = "both"
    slots: Slots = STREAMING_SLOTS
    """For sections of which something streams."""


@dataclass(frozen=True)
class Needs:
    """What ways take, for one span on one machine."""

    inventory: Inventory
    profile: Profile
    workload: Workload
    _known: dict[tuple[int, int, int, Tier], tuple[Recomputation, dict[str, Row]]] = field(default_factory=dict)

    def computing(self, way: Way) -> tuple[Recomputation, dict[str, Row]]:
        """Return what is computed twice, and what computing takes wherever the state is."""
        key = (way.wave, way.waves_in_flight, way.kept_layers, way.inputs)
        if key not in self._known:
            recomputation = self._recomputation(way)
            rows = {
                "activations": self._activations(way, recomputation),
                "working": {Tier.DEVICE: self._working_bytes(recomputation)},
            }
            self._known[key] = recomputation, rows
        recomputation, rows = self._known[key]
        return recomputation, dict(rows)

    @cached_property
    def num_layers(self) -> int:
        return sum(block.kind is BlockKind.LAYER for block in self.inventory.blocks)

    def in_flight(self, way: Way) -> int:
        """Return how many microbatches are between their forward and backward pass."""
        return min(way.wave * way.waves_in_flight, self.workload.microbatches)

    def num_places(self, way: Way) -> int:
        """Return how many blocks' inputs are outside the device at once."""
        return self.in_flight(way) * len(self._recomputation(way).parked)

    def graph_bytes(self, way: Way) -> int:
        """Return what the kept graphs of all microbatches in flight take."""
        kept = self._recomputation(way).kept
        return self.in_flight(way) * sum(self.profile.graph_bytes(self.inventory.blocks[block]) for block in kept)

    def staging_bytes(self) -> int:
        """Return what host memory lends to a drive: a buffer per direction, and for a card one to commit from.

        A processor commits while it computes nothing, so that the buffer fits into the working space.
        """
        is_card = not self.profile.is_host_memory
        staged = max(
            (size for unit, size in self.sizes.items() if is_card or self.inventory.is_narrow(unit)), default=0
        )
        return 2 * staged + is_card * max(self.sizes.values())

    def stored_bytes(self, way: Way, homes: Mapping[Unit, Tier]) -> int:
        """Return what the store on the drive takes: if any state lives there, all that lasts, and that twice.

        As `pool.unit_specs`, which knows torch.
        """
        specs: list[UnitSpec] = []
        if Tier.NVME in homes.values():
            for unit in self.sizes:
                is_durable = unit.section is not Section.GRADIENT
                if is_durable or homes.get(unit) is Tier.NVME:
                    specs.append(UnitSpec("", self.inventory.num_bytes(unit), durable=is_durable))
        if way.inputs is Tier.NVME:
            specs += [UnitSpec("", self.profile.entry_bytes, durable=False)] * self.num_places(way)
        return required_bytes(specs) if specs else 0

    @cached_property
    def sizes(self) -> Mapping[Unit, int]:
        """Of every unit outside the device, in whole pages."""
        units = (unit for section in Section for unit in self.inventory.units(section))
        return {unit: padded(self.inventory.num_bytes(unit)) for unit in units}

    @cached_property
    def device_sizes(self) -> Mapping[Unit, int]:
        """Of every unit on the device, in whole pages."""
        return {unit: padded(self.inventory.device_bytes(unit)) for unit in self.sizes}

    def _recomputation(self, way: Way) -> Recomputation:
        body = parts_of(self.inventory).body
        layers = [block for block in body if self.inventory.blocks[block].kind is BlockKind.LAYER]
        kept = set(layers[: way.kept_layers])
        if len(kept) == len(layers):  # a norm comes last, and its graph is small against a layer's
            kept |= set(body)
        parked = {} if way.inputs is Tier.DEVICE else {block: way.inputs for block in body if block not in kept}
        return Recomputation(frozenset(kept), parked)

    def _activations(self, way: Way, recomputation: Recomputation) -> Row:
        """Return what microbatches in flight leave behind, and what the wave at hand carries along."""
        embedding, body, head = parts_of(self.inventory)
        in_flight, entry_bytes = self.in_flight(way), self.profile.entry_bytes
        num_inputs = len(body) - len(recomputation.kept)
        row = {Tier.DEVICE: self.graph_bytes(way), Tier.HOST: 0, Tier.NVME: 0}
        row[way.inputs] += in_flight * num_inputs * padded(entry_bytes)
        row[Tier.DEVICE] += in_flight * self.profile.token_bytes * (bool(embedding) + bool(head))
        row[Tier.DEVICE] += way.wave * entry_bytes * (2 if head else 1)  # a head has its input and the gradient by it
        if recomputation.parked:
            # those of one block are in use while those of the next one come back
            row[Tier.DEVICE] += 2 * way.wave * entry_bytes
            if not embedding:
                row[Tier.DEVICE] += in_flight * entry_bytes  # what came from the stage before stays for a repetition
        return row

    def _working_bytes(self, recomputation: Recomputation) -> int:
        """Return the most that any piece of work takes while it runs."""
        longest = max(shard.num_elements for shards in self.inventory.shards for shard in shards)
        most_bytes = min(self.profile.step_workspace_bytes, STEP_BYTES_PER_ELEMENT * longest)
        for index, block in enumerate(self.inventory.blocks):
            num_bytes = self.profile.workspace_bytes(block) + self.profile.entry_bytes
            if index not in recomputation.kept:
                num_bytes += self.profile.graph_bytes(block)
            most_bytes = max(most_bytes, num_bytes)
        return most_bytes
