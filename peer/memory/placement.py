"""Where every unit lives, and how many slots the device has for those that live elsewhere. Pure.

Owns: `Tier`, `Placement` and what it costs in bytes. Must not know: how a placement is chosen (`plan.py`), time.

A unit has one *home*. What lives on the device is used where it is; everything else is brought into a *slot* of the
device when it is needed, and written home if it has changed. Slots for weights and gradients are as long as a block,
because a layer computes with a whole one; slots for moments are as long as a shard.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from enum import IntEnum

from peer.memory.pages import padded
from peer.memory.units import APART, Inventory, Section, Unit


class Tier(IntEnum):
    """Where bytes live, from dear to cheap."""

    DEVICE = 0
    HOST = 1
    NVME = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Slots:
    """How many buffers the device has, by section, for units that live elsewhere."""

    weights: int = 0
    gradient: int = 0
    moments: int = 0

    def of(self, section: Section) -> int:
        slots = {Section.WEIGHTS: self.weights, Section.GRADIENT: self.gradient, Section.MOMENTS: self.moments}
        return slots.get(section, 0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """The home of every unit. A gradient without one lives in its slot only, from clearing to the optimizer's step."""

    homes: Mapping[Unit, Tier]
    slots: Slots

    def is_on_device(self, unit: Unit) -> bool:
        return self.homes.get(unit) is Tier.DEVICE

    def uses(self, tier: Tier) -> bool:
        """Tell whether anything lives in a tier."""
        return tier in self.homes.values()


def all_on_device(inventory: Inventory) -> Placement:
    """Return the placement of a peer whose device is large enough for everything."""
    return Placement(
        homes={unit: Tier.DEVICE for section in Section for unit in inventory.units(section)}, slots=Slots()
    )


def check_placement(inventory: Inventory, placement: Placement) -> None:
    """Raise `ValueError` for a placement that no executor could run: a bug of whoever made it."""
    for block in range(len(inventory.blocks)):
        for section in (Section.WEIGHTS, Section.GRADIENT):
            on_device = {placement.is_on_device(unit) for unit in inventory.block_units(block, section)}
            if len(on_device) > 1:
                raise ValueError(f"the {section} of block {block} are on the device in part; a layer needs all of it")
    for unit in (unit for section in Section if section is not Section.GRADIENT for unit in inventory.units(section)):
        if unit not in placement.homes:
            raise ValueError(f"{unit} has no home")
    for section in Section:
        if slot_bytes(inventory, placement, section) and not placement.slots.of(section):
            raise ValueError(f"there is no slot for {section} that live elsewhere")


def slot_bytes(inventory: Inventory, placement: Placement, section: Section) -> int:
    """Return the size of one slot: that of the largest thing that has to fit. 0 if everything lives on the device."""
    if section in APART:
        return 0
    elsewhere = [unit for unit in inventory.units(section) if not placement.is_on_device(unit)]
    if section is Section.MOMENTS:
        return padded(max((inventory.device_bytes(unit) for unit in elsewhere), default=0))
    return padded(max((inventory.block_bytes(unit.block, section) for unit in elsewhere), default=0))


def footprint(inventory: Inventory, placement: Placement) -> dict[Tier, int]:
    """Return the bytes that a placement takes in every tier, slots included; on NVMe without the frozen copies."""
    total: Counter[Tier] = Counter(dict.fromkeys(Tier, 0))
    for unit, tier in placement.homes.items():
        total[tier] += padded(inventory.device_bytes(unit) if tier is Tier.DEVICE else inventory.num_bytes(unit))
    for section in Section:
        total[Tier.DEVICE] += placement.slots.of(section) * slot_bytes(inventory, placement, section)
    return dict(total)
