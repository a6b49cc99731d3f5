"""Ways of training, and what each takes besides the state: activations, working space, staging, second copies. Pure.

Owns: `Way` and these bytes. Must not know: where units live and how tiers are filled (`fit.py`), how long anything
takes, the choice between ways (`plan.py`).
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import chain, groupby
from typing import Literal, TypeVar

from peer.memory.disk.slot_table import UnitSpec, required_bytes
from peer.memory.pages import padded
from peer.memory.placement import Slots, Tier
from peer.memory.planning.profile import STEP_BYTES_PER_ELEMENT, Profile
from peer.memory.planning.simulate import Recomputation
from peer.memory.planning.workload import Workload, parts_of
from peer.memory.schedule import PARK_BUFFERS
from peer.memory.segments import Segment, segments_of
from peer.memory.units import PASSING, Inventory, Section, Unit
from protocol.layout import BlockKind

STREAMING_SLOTS = Slots(weights=2, gradient=2, moments=2)
"""One is computed with while another is on its way."""

_Item = TypeVar("_Item")

Order = Literal["both", "in", "out"]
"""What a pinned byte is worth: the seconds of copying that it saves in both directions, or in one."""

Row = dict[Tier, int]
"""Bytes by tier."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Way:
    """A way of training, before anything has a place."""

    wave: int
    waves_in_flight: int = 1
    kept: int = 0
    """How many segments of layers keep their graphs on the device; which, `Needs.preferred` says."""
    spilled: int = 0
    """How many more keep them elsewhere."""
    spill: Tier = Tier.HOST
    """Where."""
    inputs: Tier = Tier.DEVICE
    """Where the inputs of all others wait."""
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
    _recomputations: dict[Hashable, Recomputation] = field(default_factory=dict)
    _rows: dict[Hashable, dict[str, Row]] = field(default_factory=dict)

    def computing(self, way: Way) -> tuple[Recomputation, dict[str, Row]]:
        """Return what is computed twice, and what computing takes wherever the state is."""
        key = (way.wave, way.waves_in_flight, way.kept, way.spilled, way.spill, way.inputs)
        recomputation = self._recomputation(way)
        if key not in self._rows:
            activations, working_bytes = self._activations(way, recomputation), self._working_bytes(recomputation)
            gap_bytes = int(self.profile.gap_share * (activations[Tier.DEVICE] + working_bytes))
            self._rows[key] = {
                "activations": activations,
                "working": {Tier.DEVICE: working_bytes},
                "gaps": {Tier.DEVICE: gap_bytes},
            }
        return recomputation, dict(self._rows[key])

    @cached_property
    def preferred(self) -> list[Segment]:
        """All segments of layers, those first whose graphs spare most computing per byte that they take."""
        blocks = self.inventory.blocks

        def spared_s(segment: Segment) -> float:
            block = blocks[segment.block]
            return self.profile.segment_forward_s(block, segment.part) / self.profile.segment_bytes(block, segment.part)

        of_layers = [segment for segment in self._segments if blocks[segment.block].kind is BlockKind.LAYER]
        return sorted(of_layers, key=spared_s, reverse=True)

    @cached_property
    def _segments(self) -> list[Segment]:
        blocks = self.inventory.blocks
        return [
            segment for block in parts_of(self.inventory).body for segment in segments_of(block, blocks[block].kind)
        ]

    def in_flight(self, way: Way) -> int:
        """Return how many microbatches are between their forward and backward pass."""
        return min(way.wave * way.waves_in_flight, self.workload.microbatches)

    def places(self, way: Way) -> dict[Tier, tuple[int, ...]]:
        """Return the sizes of the places that activations need outside the device, for all microbatches in flight."""
        recomputation = self._recomputation(way)
        found: dict[Tier, list[int]] = defaultdict(list)
        for tier in recomputation.parked.values():
            found[tier].append(self.profile.entry_bytes)
        for (block, index), tier in recomputation.spilled.items():
            found[tier].append(self.profile.place_bytes(self.inventory.blocks[block], index))
        return {tier: tuple(sorted(sizes * self.in_flight(way))) for tier, sizes in found.items()}

    def graph_bytes(self, way: Way) -> int:
        """Return what the kept graphs of all microbatches in flight take."""
        blocks, kept = self.inventory.blocks, self._recomputation(way).kept
        return self.in_flight(way) * sum(self.profile.segment_bytes(blocks[block], index) for block, index in kept)

    def staging_bytes(self, way: Way, homes: Mapping[Unit, Tier]) -> int:
        """Return what host memory lends to a drive: a buffer per direction, as long as the longest that needs one."""
        is_card, staged = not self.profile.is_host_memory, self.places(way).get(Tier.NVME, ())
        if Tier.NVME in homes.values():
            sizes = self.sizes.items()
            staged = (*staged, *(size for unit, size in sizes if is_card or self.inventory.is_narrow(unit)))
        return 2 * max(map(padded, staged), default=0)

    def stored_bytes(self, way: Way, homes: Mapping[Unit, Tier]) -> int:
        """Return what the store on the drive takes: if any state lives there, all that lasts, and that twice.

        As `pool.unit_specs`, which knows torch.
        """
        specs: list[UnitSpec] = []
        if Tier.NVME in homes.values():
            for unit in self.sizes:
                is_durable = unit.section not in PASSING
                if is_durable or homes.get(unit) is Tier.NVME:
                    specs.append(UnitSpec("", self.inventory.num_bytes(unit), durable=is_durable))
        specs += [UnitSpec("", size, durable=False) for size in self.places(way).get(Tier.NVME, ())]
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
        key = (way.kept, way.spilled, way.spill, way.inputs)
        if key not in self._recomputations:
            self._recomputations[key] = self._new_recomputation(way)
        return self._recomputations[key]

    def _new_recomputation(self, way: Way) -> Recomputation:
        kept, rest = {*self.preferred[: way.kept]}, self.preferred[way.kept :]
        by_worth = [spread(alike) for _, alike in groupby(rest, key=lambda segment: segment.part)]
        spilled = dict.fromkeys([*chain.from_iterable(by_worth)][: way.spilled], way.spill)
        if len(kept) == len(self.preferred):  # a norm comes last, and its graph is small against a layer's
            kept = {*self._segments}
        found = Recomputation(frozenset(kept), spilled=spilled)
        return (
            found if way.inputs is Tier.DEVICE else replace(found, parked=dict.fromkeys(self._again(found), way.inputs))
        )

    def _again(self, recomputation: Recomputation) -> list[int]:
        """List the blocks of which something is computed twice: each keeps one input for that."""
        return sorted({segment.block for segment in self._segments if recomputation.is_recomputed(segment)})

    def _activations(self, way: Way, recomputation: Recomputation) -> Row:
        """Return what microbatches in flight leave behind, and what the wave at hand carries along."""
        embedding, _, head = parts_of(self.inventory)
        in_flight, entry_bytes = self.in_flight(way), self.profile.entry_bytes
        row = {Tier.DEVICE: self.graph_bytes(way), Tier.HOST: 0, Tier.NVME: 0}
        if way.inputs is Tier.DEVICE:
            row[Tier.DEVICE] += in_flight * len(self._again(recomputation)) * padded(entry_bytes)
        for tier, sizes in self.places(way).items():
            row[tier] += sum(map(padded, sizes))
        row[Tier.DEVICE] += in_flight * self.profile.token_bytes * (bool(embedding) + bool(head))
        row[Tier.DEVICE] += way.wave * entry_bytes * (2 if head else 1)  # a head has its input and the gradient by it
        if recomputation.parked:
            # those of one block are in use while those of the next one come back
            row[Tier.DEVICE] += 2 * way.wave * entry_bytes
        if recomputation.spilled:
            # the same; and on the way up one is made while others leave
            row[Tier.DEVICE] += max(2 * way.wave, PARK_BUFFERS + 1) * self._most_spilled_bytes(recomputation)
        if way.spill is Tier.NVME:  # a day's budget that is spent keeps their inputs here instead
            row[Tier.DEVICE] += in_flight * len({segment.block for segment in recomputation.spilled}) * entry_bytes
        if recomputation.leaving:
            # what came from the stage before stays for a repetition, in each stage that is hosted
            row[Tier.DEVICE] += in_flight * entry_bytes * (self.workload.stages - bool(embedding))
        return row

    def _most_spilled_bytes(self, recomputation: Recomputation) -> int:
        """Return the most that a microbatch's graphs of one block take that leave the device."""
        by_block: Counter[int] = Counter()
        for block, index in recomputation.spilled:
            by_block[block] += self.profile.place_bytes(self.inventory.blocks[block], index)
        return max(by_block.values())

    def _working_bytes(self, recomputation: Recomputation) -> int:
        """Return the most that any piece of work takes while it runs."""
        longest = max(shard.num_elements for shards in self.inventory.shards for shard in shards)
        most_bytes = min(self.profile.step_workspace_bytes, STEP_BYTES_PER_ELEMENT * longest)
        for index, block in enumerate(self.inventory.blocks):
            num_bytes = self.profile.workspace_bytes(block) + self.profile.entry_bytes
            num_bytes += sum(
                self.profile.segment_bytes(block, segment.part)
                for segment in segments_of(index, block.kind)
                if recomputation.is_recomputed(segment)
            )
            most_bytes = max(most_bytes, num_bytes)
        return most_bytes


def spread(items: Iterable[_Item]) -> list[_Item]:
    """Reorder so that every beginning of the result is spread about evenly over the original (van der Corput)."""
    listed = list(items)
    num_bits = max(1, (len(listed) - 1).bit_length())
    order = (int(f"{number:0{num_bits}b}"[::-1], 2) for number in range(1 << num_bits))
    return [listed[index] for index in order if index < len(listed)]
