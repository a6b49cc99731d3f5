"""Buffers for a stage's blocks, as the memory engine would bind them: flat weights and a flat gradient."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from peer.model.blocks import named_views
from peer.model.stage import Stage


@dataclass(frozen=True, slots=True)
class Buffers:
    """Flat fp32, by block."""

    weights: list[Tensor]
    gradients: list[Tensor]


def bind(stage: Stage, *, seed: int | None = None) -> Buffers:
    """Bind every block to buffers of its own: initial weights of `seed` (None: zeros), gradients of zero."""
    bound = Buffers(
        [torch.zeros(layout.num_elements) for layout in stage.layouts],
        [torch.zeros(layout.num_elements) for layout in stage.layouts],
    )
    for index, block in enumerate(stage.blocks):
        block.bind(bound.weights[index], bound.gradients[index])
        if seed is not None:
            stage.initialise(index, bound.weights[index], seed=seed)
    return bound


def tensors(stage: Stage, flats: list[Tensor]) -> dict[str, Tensor]:
    """Return copies of all tensors in flat buffers (weights or gradients) by name; blocks of rows are joined."""
    parts: dict[str, list[Tensor]] = {}
    for layout, flat in zip(stage.layouts, flats, strict=True):
        for name, view in named_views(layout, flat).items():
            parts.setdefault(name, []).append(view)
    return {name: torch.cat(rows) for name, rows in parts.items()}
