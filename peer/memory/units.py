"""What there is to keep: the sections of every shard of every block that a peer hosts, and their sizes. Pure.

Owns: the names of things (`Unit`) and their bytes. Must not know: torch, where a unit lives (`placement.py`), what
computes with it. Planner, schedule, simulator and executor all speak of the same units.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from enum import StrEnum
from typing import NamedTuple

from peer.memory.moments import MasterName, OptimizerName, moment_bytes
from protocol.layout import BlockLayout, ShardLayout

ELEMENT_BYTES = 4  # of weights and gradients on the device
NARROW_BYTES = 2  # of weights that are kept as bf16, elsewhere


class Section(StrEnum):
    """What is kept per element of a block."""

    WEIGHTS = "weights"
    GRADIENT = "gradient"
    MOMENTS = "moments"
    ANCHOR = "anchor"
    """The weights that all replicas of a stage agree on, while each trains on from them."""
    VELOCITY = "velocity"
    """The momentum of the anchor."""
    ERROR = "error"
    """What a codec has not sent yet of our drift from the anchor."""
    SYNC = "sync"
    """The weights as they were when our drift was last taken."""
    HELD = "held"
    """The gradient sum of a round that is averaged while the next one adds up."""


SLOTTED = (Section.WEIGHTS, Section.GRADIENT, Section.MOMENTS)
"""What computing needs on the device: it comes into a slot there unless it lives there."""

OUTER = (Section.ANCHOR, Section.VELOCITY, Section.ERROR, Section.SYNC)
"""What replicas with steps of their own keep."""

PASSING = (Section.GRADIENT, Section.HELD)
"""What nobody needs after a restart."""

APART = (*OUTER, Section.HELD)
"""What is touched when a round ends, where it lives: it takes no slots. fp32."""


class Unit(NamedTuple):
    """One section of one shard: what moves between tiers in one piece."""

    block: int
    section: Section
    shard: int


class Inventory:
    """The blocks of a peer's span in forward order, and how many bytes their parts take."""

    def __init__(
        self,
        blocks: Sequence[BlockLayout],
        optimizer: OptimizerName,
        master: MasterName = "fp32",
        *,
        apart: Collection[Section] = (),
    ) -> None:
        """`apart` names those of the sections in APART that there are."""
        self.blocks = tuple(blocks)
        self.optimizer, self.master = optimizer, master
        self._absent = {*APART} - {*apart}
        self.shards: tuple[tuple[ShardLayout, ...], ...] = tuple(block.shards() for block in blocks)

    def units(self, section: Section) -> Iterator[Unit]:
        """Yield the units of one section in forward order."""
        for block in range(len(self.blocks)):
            yield from self.block_units(block, section)

    def block_units(self, block: int, section: Section) -> tuple[Unit, ...]:
        """Return the units of one section of one block."""
        if section in self._absent:
            return ()
        return tuple(Unit(block, section, shard) for shard in range(len(self.shards[block])))

    def layout(self, unit: Unit) -> ShardLayout:
        return self.shards[unit.block][unit.shard]

    def is_narrow(self, unit: Unit) -> bool:
        """Tell whether a unit takes less room at home, outside the device, than on it."""
        return unit.section is Section.WEIGHTS and self.master != "fp32"

    def num_bytes(self, unit: Unit) -> int:
        """Return the size of a unit in host memory and on NVMe, and so of its transfers."""
        return NARROW_BYTES * self.layout(unit).num_elements if self.is_narrow(unit) else self.device_bytes(unit)

    def device_bytes(self, unit: Unit) -> int:
        """Return the size of a unit on the device, where weights are fp32."""
        layout = self.layout(unit)
        if unit.section is Section.MOMENTS:
            return moment_bytes(layout, self.optimizer, self.master)
        return ELEMENT_BYTES * layout.num_elements

    def block_bytes(self, block: int, section: Section) -> int:
        """Return the size of a section of a whole block on the device."""
        return sum(self.device_bytes(unit) for unit in self.block_units(block, section))
