"""Reach into the memory of an engine, which shows its buffers to nobody. Everything has to live on the device, as it
does by default; blocks are counted from 0 within the stage."""

from __future__ import annotations

import torch
from torch import Tensor

from peer.engine.stage_engine import StageEngine
from peer.memory.schedule import AT_HOME
from peer.memory.units import Section
from peer.model.blocks import named_views
from protocol.ids import Digest


def weights(engine: StageEngine, block: int = 0) -> Tensor:
    """Return a block's weights as they lie in memory: flat fp32, shared."""
    return engine._memory.pool.block_tensor(engine._blocks[block], Section.WEIGHTS, AT_HOME)


def moments(engine: StageEngine, block: int = 0, shard: int = 0) -> Tensor:
    """Return a shard's moments as they lie in memory: flat bytes, shared."""
    return engine._memory.pool.moments(engine._blocks[block], shard, AT_HOME)


def gradient(engine: StageEngine, block: int = 0) -> Tensor:
    """Return a block's gradient sum as it lies in memory, to be written to: flat fp32, shared."""
    index = engine._blocks[block]
    buffer = engine._memory.pool.block_tensor(index, Section.GRADIENT, AT_HOME)
    if index in engine._fresh:  # it counts as zero, whatever the buffer holds
        engine._fresh.discard(index)
        buffer.zero_()
    return buffer


def gradients(engine: StageEngine) -> list[Tensor]:
    """Return a copy of the gradient sums, shard by shard."""
    return [shard.clone() for shard in engine.gradient_shards()]


def named_gradients(engine: StageEngine) -> dict[str, Tensor]:
    """Return a copy of the gradient sums by Hugging Face name."""
    shards = iter(engine.gradient_shards())
    parts: dict[str, list[Tensor]] = {}
    for layout in engine._stage.layouts:
        flat = torch.cat([next(shards) for _ in layout.shards()])
        for name, view in named_views(layout, flat).items():
            parts.setdefault(name, []).append(view)
    return {name: torch.cat(rows) for name, rows in parts.items()}


def digest(engine: StageEngine) -> Digest:
    """Hash what lies in memory now; the engine itself may remember the hash of a state that was not changed by it."""
    engine._digest = None
    return engine.state_digest()
