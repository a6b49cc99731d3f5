"""How the training state of a stage lies in memory and on disk: blocks, and the shards they are made of. Pure.

Owns: the flat layout of a block, and its cut into shards. Must not know: torch, configs (`architecture.py` makes
the layouts), where a shard lives. Replicas average, hash and save shard by shard, so the cut is part of the protocol.

A *block* is what computes in one piece: a layer, the final norm, or some rows of the embedding or of the head. Its
weights are one flat buffer of elements, and so are its gradient and whatever else is kept per element. A *shard* is
a range of that buffer, at most 32 MiB of fp32: small enough to be moved while another one is in use.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from math import prod

Shape = tuple[int, ...]

ALIGNMENT_ELEMENTS = 256
"""Every tensor of a block starts at a multiple of this: bitsandbytes' quantisation block, so none spans two tensors."""

SHARD_ELEMENTS = 1 << 23
"""A shard has no more elements than this."""

SHARD_ALIGNMENT_ELEMENTS = 4096
"""A shard starts at a multiple of this, so that in any type it starts at a multiple of a disk's 4 KiB."""


class BlockKind(StrEnum):
    """What a block computes; the optimizer keeps 32-bit state for all but `LAYER`."""

    EMBEDDING = "embedding"
    LAYER = "layer"
    NORM = "norm"
    HEAD = "head"


@dataclass(frozen=True, slots=True)
class TensorSlot:
    """Where one tensor, or some of its rows, lies in its block's flat buffer."""

    name: str
    shape: Shape
    offset: int
    first_row: int = 0
    """Which row of the whole tensor comes first here; not zero only in a table that is cut into several blocks."""

    @property
    def num_elements(self) -> int:
        return prod(self.shape)

    @property
    def end(self) -> int:
        """Index behind the last element; from here to the next slot the buffer is padding and stays zero."""
        return self.offset + self.num_elements


@dataclass(frozen=True, slots=True)
class ShardLayout:
    """One range of a block's buffer. Offsets in it count from its own start."""

    name: str
    kind: BlockKind
    start: int
    """Of the block's elements."""
    num_matrix_elements: int
    """Length of the leading part that belongs to matrices, padding included; what follows are norms and biases."""
    num_elements: int
    padding: tuple[tuple[int, int], ...]
    """The (start, end) of every gap between tensors."""

    @property
    def stop(self) -> int:
        return self.start + self.num_elements


@dataclass(frozen=True, slots=True)
class BlockLayout:
    """The flat buffer of one block: matrices first (they are decayed), then norms and biases (they are not).

    Name and layout depend on the model alone, not on the cut into stages, so state that was saved under one cut can
    be loaded under another.
    """

    name: str
    kind: BlockKind
    slots: tuple[TensorSlot, ...]
    num_matrix_elements: int
    """Length of the leading part that holds the matrices, padding included."""
    num_elements: int
    """Length of the buffer, padding included."""

    @property
    def num_parameters(self) -> int:
        return sum(slot.num_elements for slot in self.slots)

    def padding(self) -> Iterator[tuple[int, int]]:
        """Yield the (start, end) of every non-empty gap."""
        ends = [slot.offset for slot in self.slots[1:]] + [self.num_elements]
        for slot, end in zip(self.slots, ends, strict=True):
            if slot.end < end:
                yield slot.end, end

    def shards(self) -> tuple[ShardLayout, ...]:
        """Cut the buffer into the fewest shards of about equal length."""
        count = -(-self.num_elements // SHARD_ELEMENTS)
        length = _rounded_up(-(-self.num_elements // count), SHARD_ALIGNMENT_ELEMENTS)
        return tuple(
            self._shard(index, start, min(start + length, self.num_elements))
            for index, start in enumerate(range(0, self.num_elements, length))
        )

    def _shard(self, index: int, start: int, stop: int) -> ShardLayout:
        gaps = ((max(first, start), min(end, stop)) for first, end in self.padding())
        return ShardLayout(
            f"{self.name}.{index}",
            self.kind,
            start,
            min(max(self.num_matrix_elements - start, 0), stop - start),
            stop - start,
            tuple((first - start, end - start) for first, end in gaps if first < end),
        )


def block_layout(name: str, kind: BlockKind, tensors: list[tuple[str, Shape]], *, first_row: int = 0) -> BlockLayout:
    """Lay tensors out one behind the other, each at an aligned offset. Matrices have to come first."""
    slots, offset, matrices = [], 0, 0
    for tensor_name, shape in tensors:
        slots.append(TensorSlot(tensor_name, shape, offset, first_row))
        offset += _rounded_up(prod(shape), ALIGNMENT_ELEMENTS)
        if len(shape) > 1:
            matrices = offset
    return BlockLayout(name, kind, tuple(slots), matrices, offset)


def _rounded_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple
