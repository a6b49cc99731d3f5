"""The parameters of one block, bound to whatever buffers hold its weights and gradient at the moment.

Owns: the views into flat buffers, and remembering saved weights by place. Must not know: what a block computes
(`stage.py`), where buffers come from. `protocol.layout.BlockLayout` says what lies where.

A block's weights are one flat fp32 buffer, and so is its gradient. Parameters are views, so autograd adds straight
into the flat gradient, and a block can be moved by binding it to another buffer.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from protocol.layout import BlockLayout, TensorSlot


class Block:
    """One block of a stage. Unbound until `bind`; its parameters are empty until then."""

    def __init__(self, layout: BlockLayout, device: torch.device) -> None:
        self.layout = layout
        self.parameters: dict[str, nn.Parameter] = {
            slot.name: nn.Parameter(torch.empty(0, device=device)) for slot in layout.slots
        }
        self._weights = torch.empty(0, device=device)

    def bind(self, weights: Tensor, gradient: Tensor | None) -> None:
        """Compute with these flat buffers from now on. Without a gradient, nothing may go backward."""
        self._weights = weights
        for slot in self.layout.slots:
            parameter = self.parameters[slot.name]
            parameter.grad = None
            parameter.data = view_of(slot, weights)
            parameter.grad = None if gradient is None else view_of(slot, gradient)

    @contextmanager
    def saving(self) -> Iterator[SavedBytes]:
        """Build a graph inside the block that can go backward after the block was bound to another buffer.

        Autograd's references to weights are kept as places in the buffer, which may serve other blocks meanwhile. What
        it saves besides is counted, each storage once.
        """
        seen: set[int] = set()
        saved = SavedBytes()

        def pack(tensor: Tensor) -> Tensor | _Place:
            storage = tensor.untyped_storage()
            if storage.data_ptr() == self._weights.untyped_storage().data_ptr():
                offset = tensor.storage_offset() - self._weights.storage_offset()
                return _Place(int(offset), tuple(tensor.shape), tensor.stride())
            if storage.data_ptr() not in seen:
                seen.add(storage.data_ptr())
                saved.num_bytes += storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, self._unpack):
            yield saved

    def _unpack(self, saved: Tensor | _Place) -> Tensor:
        if isinstance(saved, Tensor):
            return saved
        return self._weights.as_strided(saved.shape, saved.stride, self._weights.storage_offset() + saved.offset)


@dataclass(slots=True)
class SavedBytes:
    """How much a graph has saved."""

    num_bytes: int = 0


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a saved tensor lies in the weights."""

    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


def view_of(slot: TensorSlot, flat: Tensor) -> Tensor:
    """Return one tensor of a block's flat buffer, sharing memory."""
    return flat[slot.offset : slot.end].view(slot.shape)


def named_views(layout: BlockLayout, flat: Tensor) -> Mapping[str, Tensor]:
    """Return the tensors of a block's flat buffer by name, sharing memory."""
    return {slot.name: view_of(slot, flat) for slot in layout.slots}
