"""What a forward pass leaves behind for its backward: the whole autograd graph, or only its input.

Owns: the byte budget for kept graphs and the measurement of what one costs. Must not know: stages, tickets.
A kept graph saves the second forward pass; a dropped one saves memory. Both give the same bits.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(slots=True)
class Retention:
    """Decides by budget. The cost of a graph depends on the input's shape alone, so each shape is measured once."""

    budget_bytes: int
    kept_bytes: int = 0
    _costs: dict[tuple[int, ...], int] = field(default_factory=dict)

    def may_keep(self, shape: tuple[int, ...]) -> bool:
        """Return whether to try: a shape that was never measured is tried as long as anything is left."""
        return self.kept_bytes + self._costs.get(shape, 1) <= self.budget_bytes

    def keep(self, shape: tuple[int, ...], measured_bytes: int) -> int | None:
        """Book a graph of `measured_bytes`; None (and nothing booked) if it turned out not to fit."""
        self._costs[shape] = measured_bytes
        if self.kept_bytes + measured_bytes > self.budget_bytes:
            return None
        self.kept_bytes += measured_bytes
        return measured_bytes

    def release(self, kept_bytes: int) -> None:
        """Give the bytes of a graph back."""
        self.kept_bytes -= kept_bytes


@dataclass(slots=True)
class SavedBytes:
    """Result of `measure_saved`."""

    total: int = 0


@contextmanager
def measure_saved(*, besides: Iterable[Tensor]) -> Iterator[SavedBytes]:
    """Count the bytes that autograd saves for backward inside the block, each storage once.

    Storages of `besides` (the weights, which live anyway) are left out.
    """
    seen = {tensor.untyped_storage().data_ptr() for tensor in besides}
    saved = SavedBytes()

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in seen:
            seen.add(storage.data_ptr())
            saved.total += storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield saved
