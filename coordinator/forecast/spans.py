"""What one peer hosts, in numbers: parameters, arithmetic, bytes that are averaged and kept. Pure.

Owns: `Span` and its formulas, from the same layouts that peers allocate. Must not know: links, cards, rounds.

Arithmetic is counted as `peer bench plan` counts it: 2 operations per matrix element and token one way, causal
attention on top; backward twice that; and layers once more if their forward pass is repeated. So a layer of P
parameters takes 6 P per token, or 8 P. A look-up (the embedding) and norms take nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

from protocol.architecture import stage_blocks
from protocol.encoding import encoded_bytes, num_blocks
from protocol.layout import ALIGNMENT_ELEMENTS, BlockKind, BlockLayout
from protocol.manifest import MasterName, OptimizerName, OptimizerSpec

PART_ELEMENTS = 131_072
"""Shards are averaged in parts of so many elements (`peer/averaging/parts.py`): a multiple of every codec's block."""

_FP32_BYTES = 4
_SCALES_BYTES = 2 * _FP32_BYTES / ALIGNMENT_ELEMENTS  # of both 8-bit moments


@dataclass(frozen=True, slots=True, kw_only=True)
class Span:
    """Stages that follow each other, on one peer."""

    stages: tuple[int, ...]
    num_parameters: int
    shards: tuple[int, ...]
    """Elements of each shard, padding included."""
    num_8bit: int
    """Elements whose moments may be kept in 8 bit: matrices of layers."""
    layer_matrices: int
    """Elements of matrices in layers."""
    head_matrices: int
    head_blocks: int
    attention_width: int
    """Of all layers together: query heads times their size."""

    @classmethod
    def of(cls, stages: Sequence[Span]) -> Span:
        """Join stages that follow each other."""
        return cls(
            stages=tuple(number for stage in stages for number in stage.stages),
            num_parameters=sum(stage.num_parameters for stage in stages),
            shards=tuple(shard for stage in stages for shard in stage.shards),
            num_8bit=sum(stage.num_8bit for stage in stages),
            layer_matrices=sum(stage.layer_matrices for stage in stages),
            head_matrices=sum(stage.head_matrices for stage in stages),
            head_blocks=sum(stage.head_blocks for stage in stages),
            attention_width=sum(stage.attention_width for stage in stages),
        )

    @property
    def num_elements(self) -> int:
        return sum(self.shards)

    # -- arithmetic -------------------------------------------------------------------------------------

    def forward_flop(self, sequence_length: int) -> float:
        """Operations per token of a forward pass."""
        return self._layers_flop(sequence_length) + 2.0 * self.head_matrices

    def training_flop(self, sequence_length: int, *, recomputes: bool) -> float:
        """Operations per token of a forward and a backward pass.

        A head's scores are only computed in its backward pass, unless it is cut into several blocks: then once more.
        """
        head_passes = 4 if self.head_blocks > 1 else 3
        layer_passes = 4 if recomputes else 3
        return layer_passes * self._layers_flop(sequence_length) + head_passes * 2.0 * self.head_matrices

    def _layers_flop(self, sequence_length: int) -> float:
        return (
            2.0 * self.layer_matrices + 2.0 * sequence_length * self.attention_width
        )  # half of each score matrix, twice

    # -- bytes ------------------------------------------------------------------------------------------

    @property
    def num_parts(self) -> int:
        """Messages in which a contribution, or what becomes of them, travels."""
        return sum(num_blocks(shard, PART_ELEMENTS) for shard in self.shards)

    def encoded_bytes(self, codec: str) -> int:
        """Return the size of a contribution, part by part; as parts are whole blocks, that is shard by shard."""
        return sum(encoded_bytes(codec, shard) for shard in self.shards)

    def moment_bytes(self, optimizer: OptimizerSpec) -> int:
        """Return the size of AdamW's two moments, and of what a bf16 weight leaves to fp32."""
        narrow = self.num_8bit if optimizer.name is OptimizerName.ADAMW8BIT else 0
        wide = self.num_elements - narrow
        remainder_bytes = 2 * self.num_elements if optimizer.master is MasterName.SPLIT else 0
        return int(narrow * (2 + _SCALES_BYTES)) + 2 * _FP32_BYTES * wide + remainder_bytes


def spans_of(config: Mapping[str, Any], num_stages: int) -> tuple[Span, ...]:
    """Return every stage of a model. Raises `ModelError` if it cannot be cut like that."""
    return tuple(_span(stage, stage_blocks(config, num_stages, stage)) for stage in range(num_stages))


def _span(stage: int, blocks: Sequence[BlockLayout]) -> Span:
    layers = [block for block in blocks if block.kind is BlockKind.LAYER]
    heads = [block for block in blocks if block.kind is BlockKind.HEAD]
    return Span(
        stages=(stage,),
        num_parameters=sum(block.num_parameters for block in blocks),
        shards=tuple(shard.num_elements for block in blocks for shard in block.shards()),
        num_8bit=sum(block.num_matrix_elements for block in layers),
        layer_matrices=sum(map(_matrices, layers)),
        head_matrices=sum(map(_matrices, heads)),
        head_blocks=len(heads),
        attention_width=sum(_query_width(layer) for layer in layers),
    )


def _matrices(block: BlockLayout) -> int:
    return sum(prod(slot.shape) for slot in block.slots if len(slot.shape) > 1)


def _query_width(layer: BlockLayout) -> int:
    return next(slot.shape[0] for slot in layer.slots if ".q_proj.weight" in slot.name)
