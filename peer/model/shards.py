"""The flat buffers in which a stage's weights and gradients live.

Owns: allocation of a shard and the views of single tensors into it. Must not know: modules, optimizers,
what a layer computes. The layout itself is `protocol.architecture.ShardLayout`.

Weights and gradient of a shard are two one-dimensional tensors of `layout.num_elements`; everything that
moves, averages, hashes or steps a shard works on these. Whoever writes to them keeps the padding zero.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from protocol.architecture import ShardLayout, TensorSlot


@dataclass(frozen=True, slots=True)
class Shard:
    """One layer's (or the embedding's, or the head's) training buffers."""

    layout: ShardLayout
    weights: Tensor  # (num_elements,)
    gradient: Tensor  # (num_elements,) sum over target tokens

    @property
    def name(self) -> str:
        return self.layout.name

    def weight_view(self, slot: TensorSlot) -> Tensor:
        """Return one tensor of the weights, sharing memory."""
        return self.weights[slot.offset : slot.end].view(slot.shape)

    def gradient_view(self, slot: TensorSlot) -> Tensor:
        """Return one tensor of the gradient, sharing memory."""
        return self.gradient[slot.offset : slot.end].view(slot.shape)

    def set_gradient(self, gradient: Tensor) -> None:
        """Replace the whole gradient, e.g. by the averaged one.

        The padding is cleared: bytes from elsewhere may carry anything there, and it shares quantisation
        blocks with the tensors before it.
        """
        if gradient.shape != self.gradient.shape or gradient.dtype != self.gradient.dtype:
            raise ValueError(
                f"shard {self.name} wants {self.gradient.shape} {self.gradient.dtype}, not {gradient.shape}"
            )
        self.gradient.copy_(gradient)
        self._clear_padding(self.gradient)

    def clear_weight_padding(self) -> None:
        """Set the weights' padding to zero again."""
        self._clear_padding(self.weights)

    def _clear_padding(self, buffer: Tensor) -> None:
        for start, end in self.layout.padding():
            buffer[start:end].zero_()


def allocate_shard(layout: ShardLayout, *, device: torch.device, dtype: torch.dtype) -> Shard:
    """Return a shard of zeros; torch aligns both buffers to 64 bytes at least."""
    weights = torch.zeros(layout.num_elements, dtype=dtype, device=device)
    return Shard(layout, weights, torch.zeros_like(weights))
