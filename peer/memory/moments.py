"""Where the optimizer's state of one shard lies: one flat byte buffer, so that it moves and is kept in one piece.

Owns: the fields of that buffer (names, types, offsets) and its size. Must not know: torch, which optimizer step
uses them (`peer/engine/optimizer.py` does), where the buffer lives. Pure, so that a plan can be made before
anything is allocated.

A shard is updated in two groups: its matrices and, behind them, its vectors (norms and biases). AdamW keeps two
moments per element, in 32 bit or as 8-bit codes with one fp32 scale per block of 256 (Dettmers et al. 2022,
"8-bit Optimizers via Block-wise Quantization"). Only matrices of layers are kept in 8 bit: tiny or rarely updated
tensors suffer most from it.

With master weights of bf16 and 16 bits, what a weight has beyond its nearest bf16 lies here too: it is needed when the
moments are, and nowhere else.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from protocol.layout import ALIGNMENT_ELEMENTS, BlockKind, ShardLayout

FIELD_ALIGNMENT_BYTES = 256  # of a field in its buffer: enough for every vector unit and for CUDA

OptimizerName = Literal["adamw8bit", "adamw32"]
MasterName = Literal["fp32", "bf16+16", "bf16-sr"]
"""How weights are kept: as fp32; as bf16 with the remainder to fp32; as bf16, rounded at random after each step."""
Group = Literal["matrices", "vectors"]
Moment = Literal["moment1", "moment2", "scale1", "scale2", "remainder"]
DType = Literal["uint8", "int16", "float32"]

_ITEM_BYTES = {"uint8": 1, "int16": 2, "float32": 4}


@dataclass(frozen=True, slots=True)
class Field:
    """One array in the buffer. `name` says which moment, or which moment's scales."""

    group: Group
    name: Moment
    dtype: DType
    offset_bytes: int
    num_elements: int

    @property
    def end_bytes(self) -> int:
        return self.offset_bytes + self.num_elements * _ITEM_BYTES[self.dtype]


def is_in_8_bit(layout: ShardLayout, group: Group, optimizer: OptimizerName) -> bool:
    """Tell whether a group's moments are kept in 8 bit."""
    return optimizer == "adamw8bit" and layout.kind is BlockKind.LAYER and group == "matrices"


def moment_fields(layout: ShardLayout, optimizer: OptimizerName, master: MasterName = "fp32") -> tuple[Field, ...]:
    """List the fields of a shard's moments in their order in the buffer, which is also the order of hashing."""
    fields: list[Field] = []
    end_bytes = 0
    for group, name, dtype, num_elements in _arrays(layout, optimizer, master):
        offset_bytes = _aligned(end_bytes)
        fields.append(Field(group, name, dtype, offset_bytes, num_elements))
        end_bytes = fields[-1].end_bytes
    return tuple(fields)


def moment_bytes(layout: ShardLayout, optimizer: OptimizerName, master: MasterName = "fp32") -> int:
    """Return the size of a shard's moments, padding included."""
    fields = moment_fields(layout, optimizer, master)
    return _aligned(fields[-1].end_bytes) if fields else 0


def groups(layout: ShardLayout) -> Iterator[tuple[Group, slice]]:
    """Yield the groups that a shard has, with their part of its elements."""
    border, end = layout.num_matrix_elements, layout.num_elements
    assert border % ALIGNMENT_ELEMENTS == 0
    assert end % ALIGNMENT_ELEMENTS == 0
    if border:
        yield "matrices", slice(0, border)
    if border < end:
        yield "vectors", slice(border, end)


def _arrays(
    layout: ShardLayout, optimizer: OptimizerName, master: MasterName
) -> Iterator[tuple[Group, Moment, DType, int]]:
    for group, part in groups(layout):
        num_elements = part.stop - part.start
        if is_in_8_bit(layout, group, optimizer):
            yield group, "moment1", "uint8", num_elements
            yield group, "moment2", "uint8", num_elements
            yield group, "scale1", "float32", num_elements // ALIGNMENT_ELEMENTS
            yield group, "scale2", "float32", num_elements // ALIGNMENT_ELEMENTS
        else:
            yield group, "moment1", "float32", num_elements
            yield group, "moment2", "float32", num_elements
        if master == "bf16+16":
            yield group, "remainder", "int16", num_elements


def _aligned(num_bytes: int) -> int:
    return -(-num_bytes // FIELD_ALIGNMENT_BYTES) * FIELD_ALIGNMENT_BYTES
