"""Draws what the memory engine is to do: blocks of some shards, placements, passes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import strategies as st

from peer.memory.placement import Placement, Slots, Tier, check_placement
from peer.memory.schedule import Gradient, Kind, Visit
from peer.memory.units import Inventory, Section, Unit
from protocol import layout
from protocol.layout import SHARD_ALIGNMENT_ELEMENTS, BlockKind, block_layout

ELSEWHERE = (Tier.HOST, Tier.NVME)

Trial = tuple[Inventory, Placement, list[tuple[list[Visit], list[int]]]]
"""Passes of visits, each with the blocks that are said to follow it."""


def inventory_of(num_shards: Sequence[int]) -> Inventory:
    """Make blocks of so many shards each."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(layout, "SHARD_ELEMENTS", SHARD_ALIGNMENT_ELEMENTS)
        return Inventory(
            [
                block_layout(f"layer.{index}", BlockKind.LAYER, [("a", (count, SHARD_ALIGNMENT_ELEMENTS))])
                for index, count in enumerate(num_shards)
            ],
            "adamw32",
        )


def all_in_host(inventory: Inventory, *, weights: int = 1, gradient: int = 1, moments: int = 1) -> Placement:
    homes = {unit: Tier.HOST for section in Section for unit in inventory.units(section)}
    return Placement(homes=homes, slots=Slots(weights=weights, gradient=gradient, moments=moments))


@st.composite
def placements(draw: st.DrawFn, inventory: Inventory) -> Placement:
    homes: dict[Unit, Tier] = {}
    for block in range(len(inventory.blocks)):
        for section in (Section.WEIGHTS, Section.GRADIENT):
            where = draw(st.sampled_from(["device", "elsewhere", "elsewhere", "nowhere"]))
            for unit in inventory.block_units(block, section):
                if where == "device":
                    homes[unit] = Tier.DEVICE
                elif where == "elsewhere" or section is Section.WEIGHTS:
                    homes[unit] = draw(st.sampled_from(ELSEWHERE))
        for unit in inventory.block_units(block, Section.MOMENTS):
            homes[unit] = draw(st.sampled_from([Tier.DEVICE, *ELSEWHERE]))
    slots = Slots(weights=draw(st.integers(1, 4)), gradient=draw(st.integers(1, 4)), moments=draw(st.integers(1, 4)))
    placement = Placement(homes=homes, slots=slots)
    check_placement(inventory, placement)
    return placement


@dataclass
class Passes:
    """Draws visits that make sense: a sum is only asked for where there is one."""

    draw: Callable[[st.SearchStrategy[Any]], Any]
    inventory: Inventory
    placement: Placement
    has_sum: dict[int, bool] = field(default_factory=dict)

    def visit(self) -> Visit:
        block = self.draw(st.integers(0, len(self.inventory.blocks) - 1))
        may_keep = Unit(block, Section.GRADIENT, 0) in self.placement.homes
        before = Gradient.SUM if self.has_sum.get(block) else Gradient.ZERO
        work = tuple((Kind.BACKWARD, index) for index in range(self.draw(st.integers(0, 2))))
        kinds = ["forward", "backward and step", "step", "step from elsewhere", "fill", "read"]
        kind = self.draw(st.sampled_from([*kinds, *(["backward"] * 2 if may_keep else [])]))
        if kind == "forward":
            return Visit(block=block, work=tuple((Kind.FORWARD, index) for _, index in work))
        if kind in ("fill", "read"):
            return Visit(block=block, shard_work=Kind(kind), keeps_gradient=False)
        self.has_sum[block] = kind == "backward"
        if kind == "backward":
            return Visit(block=block, work=work, gradient=self.draw(st.sampled_from([before, Gradient.ZERO])))
        return Visit(
            block=block,
            work=work if kind == "backward and step" else (),
            shard_work=Kind.STEP,
            gradient=Gradient.SPACE if kind == "step from elsewhere" else before,
            keeps_gradient=False,
        )


@st.composite
def trials(draw: st.DrawFn) -> Trial:
    """Draw an inventory, a placement, and several passes with what is to follow each of them."""
    inventory = inventory_of(draw(st.lists(st.integers(1, 3), min_size=1, max_size=5)))
    placement = draw(placements(inventory))
    passes = Passes(draw, inventory, placement)
    blocks = st.integers(0, len(inventory.blocks) - 1)
    return (
        inventory,
        placement,
        [
            ([passes.visit() for _ in range(draw(st.integers(0, 6)))], draw(st.lists(blocks, max_size=3)))
            for _ in range(draw(st.integers(1, 3)))
        ],
    )
