"""A segment's forward pass under autograd, from a beginning of its own to an end of its own.

Owns: building it, going backward, and letting what it has saved leave the device meanwhile. Must not know: who decides
what is kept (`passes.py`), where things go (`peer/memory/arena.py`).

Neither the input nor the output is held: of the one only the gradient by it is wanted, of the other only the place in
the graph. What is left is what autograd has saved, so that a graph whose savings have left takes no device memory.

Shapes: B sequences, T positions, D model width.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge

from peer.memory.arena import Parked
from peer.model.blocks import Saved
from peer.model.stage import Stage


class Graph:
    """Made by computing. Goes backward once."""

    def __init__(
        self,
        stage: Stage,
        block: int,
        segment: int,
        entered_BTD: Tensor,
        *,
        waits: bool = True,
        may_leave: bool = False,
    ) -> None:
        """Pass hidden states through a segment of the bound block.

        `waits`: the block may be bound to other buffers before the backward pass; `may_leave`: what is saved can be
        taken away until then.
        """
        self._gradient: list[Tensor] = []
        saving = stage.saving(block, entered_BTD, may_leave=may_leave) if waits else nullcontext(Saved())
        with torch.enable_grad(), saving as self._saved:
            anchor = torch.empty((), requires_grad=True)
            begun_BTD = _Beginning.apply(entered_BTD.detach(), anchor, self._gradient)  # type: ignore[no-untyped-call]
            ended_BTD = stage.pass_segment(block, segment, begun_BTD)
        self._end = get_gradient_edge(ended_BTD)
        self.outputs_BTD: Tensor | None = ended_BTD.detach()
        """Until somebody takes it."""
        self.booked_bytes = 0
        """What the budget of kept graphs has it down for."""
        self.parked: Parked | None = None
        """Where its savings are, if they have left."""

    @property
    def num_bytes(self) -> int:
        """What autograd has saved besides weights, for a graph that waits."""
        return self._saved.num_bytes

    def take_outputs(self) -> Tensor:
        """Return the hidden states (B, T, D) at the end, and hold on to them no longer."""
        outputs_BTD, self.outputs_BTD = self.outputs_BTD, None
        assert outputs_BTD is not None, "the outputs of a graph are taken once"
        return outputs_BTD

    @property
    def savings(self) -> Sequence[Tensor]:
        """What would leave."""
        return self._saved.storages

    def take_savings(self) -> list[Tensor]:
        """Return what was saved, as flat bytes, and hold on to it no longer."""
        return self._saved.take_away()

    def return_savings(self, savings: list[Tensor]) -> None:
        """Bring copies of what was saved back, in the order in which it was taken."""
        self._saved.bring_back(savings)

    def backward(self, gradient_BTD: Tensor) -> Tensor:
        """Add the weights' gradients to those of the bound block; return that by the input."""
        torch.autograd.backward([self._end], [gradient_BTD])
        (gradient_BTD,) = self._gradient
        return gradient_BTD


class _Beginning(torch.autograd.Function):
    """Where a graph begins: on the way up it changes nothing, on the way down it hands the gradient out."""

    @staticmethod
    def forward(ctx: Any, hidden_BTD: Tensor, anchor: Tensor, found: list[Tensor]) -> Tensor:
        """`anchor` needs a gradient, so that autograd comes here; `found` receives the one by the hidden states."""
        ctx.found = found
        return hidden_BTD.view_as(hidden_BTD)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, None, None]:
        ctx.found.append(gradients[0])
        return None, None, None
