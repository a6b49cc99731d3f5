"""The parameters of one block, bound to whatever buffers hold its weights and gradient at the moment.

Owns: the views into flat buffers, and remembering saved weights by place. Must not know: what a block computes
(`stage.py`), where buffers come from. `protocol.layout.BlockLayout` says what lies where.

A block's weights are one flat fp32 buffer, and so is its gradient. Parameters are views, so autograd adds straight
into the flat gradient, and a block can be moved by binding it to another buffer.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
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
    def saving(self, *, shared: Sequence[Tensor] = (), may_leave: bool = False) -> Iterator[Saved]:
        """Build a graph inside the block that can go backward after the block was bound to another buffer.

        Autograd's references to weights are kept as places in the buffer, which may serve other blocks meanwhile. What
        it saves besides is counted, each storage once, but for what is `shared` with other blocks. With `may_leave`, it
        can leave the device until the backward pass.
        """
        not_ours = {tensor.untyped_storage().data_ptr() for tensor in shared}
        saved = Saved()

        def pack(tensor: Tensor) -> Tensor | _Place | _Piece:
            storage = tensor.untyped_storage()
            if storage.data_ptr() == self._weights.untyped_storage().data_ptr():
                offset = tensor.storage_offset() - self._weights.storage_offset()
                return _Place(int(offset), tuple(tensor.shape), tensor.stride())
            is_here = storage.device == self._weights.device  # and not, say, the state of a random generator
            if storage.data_ptr() in not_ours or not is_here or not storage.nbytes():
                return tensor.detach()
            saved.count(storage)
            # detached: a result that refers to the operation that saves it would keep a dropped graph alive for ever
            return saved.hold(tensor) if may_leave else tensor.detach()

        def unpack(packed: Tensor | _Place | _Piece) -> Tensor:
            if isinstance(packed, _Place):
                return self._weights.as_strided(
                    packed.shape, packed.stride, self._weights.storage_offset() + packed.offset
                )
            return saved.view(packed) if isinstance(packed, _Piece) else packed

        with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
            yield saved


class Saved:
    """What a graph has saved besides weights, by storage.

    What may leave the device is held here as flat bytes of whole storages, in the order of being saved first.
    """

    def __init__(self) -> None:
        self._sizes: dict[int, int] = {}
        self._numbers: dict[int, int] = {}
        self._storages: list[Tensor] = []

    @property
    def num_bytes(self) -> int:
        return sum(self._sizes.values())

    def count(self, storage: torch.UntypedStorage) -> None:
        """Take note of a storage, which is in use until the backward pass."""
        self._sizes[storage.data_ptr()] = storage.nbytes()

    def hold(self, tensor: Tensor) -> _Piece:
        """Keep a tensor's whole storage, and return where in it the tensor is."""
        storage = tensor.untyped_storage()
        number = self._numbers.setdefault(storage.data_ptr(), len(self._storages))
        if number == len(self._storages):
            flat = torch.empty(0, dtype=torch.uint8, device=tensor.device)
            self._storages.append(flat.set_(storage, 0, (storage.nbytes(),), (1,)))
        return _Piece(number, tensor.dtype, tuple(tensor.shape), tensor.stride(), int(tensor.storage_offset()))

    def view(self, piece: _Piece) -> Tensor:
        """Return a tensor that was held; its storage has to be here."""
        flat = self._storages[piece.number].view(piece.dtype)
        return flat.as_strided(piece.shape, piece.stride, flat.storage_offset() + piece.offset)

    @property
    def storages(self) -> Sequence[Tensor]:
        """What is held and may leave."""
        return self._storages

    def take_away(self) -> list[Tensor]:
        """Return the storages and hold on to them no longer."""
        storages, self._storages = self._storages, []
        return storages

    def bring_back(self, storages: list[Tensor]) -> None:
        """Go on with copies of the storages, each aligned for any type."""
        self._storages = storages


@dataclass(frozen=True, slots=True)
class _Piece:
    """A saved tensor as a view of a storage."""

    number: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int


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
