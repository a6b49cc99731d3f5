"""AdamW on flat shards, with 8-bit or 32-bit state: the one adapter to bitsandbytes and to torch's AdamW.

Owns: the step, what is decayed, and the names under which the state is saved. Must not know: modules, rounds, where
a gradient comes from, how the state lies in its buffer (`peer/memory/moments.py`). `peer/engine/stage_engine.py`
calls `step` once per version.

A shard is updated in two segments: its matrices (with weight decay) and its vectors (norms and biases,
without). `adamw8bit` keeps 8-bit blockwise moments for the matrices of the layers; vectors, embedding and
head keep 32-bit moments, as bitsandbytes advises (tiny or rarely updated rows suffer most from 8 bits).

Same gradient bytes, same weights: both kernels are elementwise (quantisation works on blocks of 256, which
is the shards' alignment), and a segment's length is a multiple of 256, so no number depends on a vector tail
or on how threads share the work. Processors without fused multiply-add would still differ in the last bit.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, get_args

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from peer.engine.state import check_same_tensors
from peer.memory.moments import Field, Moment, OptimizerName, is_in_8_bit, moment_bytes, moment_fields, segments
from peer.model.shards import Shard
from protocol.architecture import ALIGNMENT_ELEMENTS
from protocol.errors import ConfigError, LocalFault

OPTIMIZERS: tuple[str, ...] = get_args(OptimizerName)

# bitsandbytes' CPU path makes fp32 copies of all it touches (about 20 bytes per element): bounds them to 80 MiB
STEP_ELEMENTS = 1 << 22


@dataclass(frozen=True, slots=True, kw_only=True)
class OptimizerSpec:
    """What every replica of a run has to agree on, apart from the learning rate."""

    name: OptimizerName = "adamw8bit"
    betas: tuple[float, float] = (0.9, 0.95)
    epsilon: float = 1e-8
    weight_decay: float = 0.1
    """Decoupled decay of matrices; norms and biases are never decayed."""

    def __post_init__(self) -> None:
        if self.name not in OPTIMIZERS:
            raise ConfigError(f"there is no optimizer {self.name!r}.", hint="Choose " + " or ".join(OPTIMIZERS) + ".")
        if not all(0 <= beta < 1 for beta in self.betas) or self.epsilon <= 0 or self.weight_decay < 0:
            raise ConfigError(f"the optimizer's settings make no sense: {self}.")


class Optimizer:
    """The optimizer of one stage. Every shard steps together, so one step count serves all."""

    def __init__(self, spec: OptimizerSpec, shards: Sequence[Shard]) -> None:
        self.spec = spec
        self.steps = 0
        self._shards = tuple(shards)
        self.moments = tuple(_allocate_moments(spec, shard) for shard in shards)
        """Per shard, all of its state in one flat uint8 buffer (`peer/memory/moments.py`)."""
        self._updates = [ShardUpdate(spec, shard, flat) for shard, flat in zip(shards, self.moments, strict=True)]

    def step(self, learning_rate: float) -> None:
        """Update the weights of all shards from their gradients, which stay as they are."""
        self.steps += 1
        for update in self._updates:
            update.step(self.steps, learning_rate)

    def state_tensors(self) -> dict[str, Tensor]:
        """Return the state by stable names, sharing memory (but for the step count), in hash order."""
        tensors = {"optimizer.steps": torch.tensor(self.steps, dtype=torch.int64)}
        for shard, flat in zip(self._shards, self.moments, strict=True):
            for field in moment_fields(shard.layout, self.spec.name):
                tensors[f"optimizer.{shard.name}.{field.segment}.{field.name}"] = field_view(flat, field)
        return tensors

    def load_state_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Replace the state by a saved one; raises `StorageError` and changes nothing if that does not fit."""
        own = self.state_tensors()
        check_same_tensors(own, tensors)
        for name, tensor in own.items():
            tensor.copy_(tensors[name])
        self.steps = int(tensors["optimizer.steps"])

    @property
    def state_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.state_tensors().values())


class ShardUpdate:
    """The AdamW step of one shard, on whatever buffers it is given: wherever they live, they are updated in place."""

    def __init__(self, spec: OptimizerSpec, shard: Shard, moments: Tensor) -> None:
        if shard.weights.dtype != torch.float32 or shard.gradient.dtype != torch.float32:
            # bitsandbytes' CUDA kernel would take the second buffer's bytes for the first one's type
            raise LocalFault("training needs fp32 weights and gradients.")
        self._shard = shard
        views = {(f.segment, f.name): field_view(moments, f) for f in moment_fields(shard.layout, spec.name)}
        self._segments: list[_EightBit | _ThirtyTwoBit] = []
        for segment, part in segments(shard.layout):
            make = _EightBit if is_in_8_bit(shard.layout, segment, spec.name) else _ThirtyTwoBit
            own = {name: view for (owner, name), view in views.items() if owner == segment}
            decay = spec.weight_decay if segment == "matrices" else 0.0
            self._segments.append(make(spec, shard.weights[part], shard.gradient[part], own, decay=decay))

    def step(self, step: int, learning_rate: float) -> None:
        """Take step number `step` (from 1). The gradient stays as it is."""
        for segment in self._segments:
            segment.update(step, learning_rate)
        # bitsandbytes' CPU quantiser has no code for zero (0.50.2 takes 2e-5 of the block's largest instead),
        # so its moments push even weights that never had a gradient
        self._shard.clear_weight_padding()


def field_view(moments: Tensor, field: Field) -> Tensor:
    """Return one array of a shard's moments, sharing memory."""
    return moments[field.offset_bytes : field.end_bytes].view(getattr(torch, field.dtype))


def _allocate_moments(spec: OptimizerSpec, shard: Shard) -> Tensor:
    return torch.zeros(moment_bytes(shard.layout, spec.name), dtype=torch.uint8, device=shard.weights.device)


class _ThirtyTwoBit:
    """torch's fused AdamW on a segment of a shard."""

    def __init__(
        self, spec: OptimizerSpec, weights: Tensor, gradient: Tensor, state: Mapping[Moment, Tensor], *, decay: float
    ) -> None:
        self._spec, self._decay = spec, decay
        self._weights, self._gradient = weights, gradient
        self._moment1, self._moment2 = state["moment1"], state["moment2"]

    def update(self, step: int, learning_rate: float) -> None:
        steps_before = torch.tensor(float(step - 1), device=self._weights.device)  # the kernel counts it up
        with torch.no_grad():
            adamw(
                [self._weights],
                [self._gradient],
                [self._moment1],
                [self._moment2],
                [],
                [steps_before],
                fused=True,
                amsgrad=False,
                beta1=self._spec.betas[0],
                beta2=self._spec.betas[1],
                lr=learning_rate,
                weight_decay=self._decay,
                eps=self._spec.epsilon,
                maximize=False,
            )


class _EightBit:
    """bitsandbytes' blockwise AdamW on a segment of a shard."""

    def __init__(
        self, spec: OptimizerSpec, weights: Tensor, gradient: Tensor, state: Mapping[Moment, Tensor], *, decay: float
    ) -> None:
        functional = _bitsandbytes()
        self._update = functional.optimizer_update_8bit_blockwise
        self._spec, self._decay = spec, decay
        self._weights, self._gradient = weights, gradient
        self._codes1, self._codes2 = state["moment1"], state["moment2"]
        self._scales1, self._scales2 = state["scale1"], state["scale2"]
        self._map1, self._map2 = (
            functional.create_dynamic_map(signed=signed).to(weights.device) for signed in (True, False)
        )

    def update(self, step: int, learning_rate: float) -> None:
        for start in range(0, self._weights.numel(), STEP_ELEMENTS):
            part = slice(start, start + STEP_ELEMENTS)
            blocks = slice(start // ALIGNMENT_ELEMENTS, (start + STEP_ELEMENTS) // ALIGNMENT_ELEMENTS)
            self._update(
                "adam",  # bitsandbytes' name for Adam with decoupled decay
                self._gradient[part],
                self._weights[part],
                self._codes1[part],
                self._codes2[part],
                self._spec.betas[0],
                self._spec.betas[1],
                0.0,  # beta3 and alpha belong to AdEMAMix
                0.0,
                self._spec.epsilon,
                step,
                learning_rate,
                self._map1,
                self._map2,
                self._scales1[blocks],
                self._scales2[blocks],
                self._decay,
            )


def _bitsandbytes() -> Any:
    """Return bitsandbytes' functions, which it leaves untyped. Takes 3 s, and 32-bit runs do without.

    On processors with bf16 units it advises to install kernels for 4-bit weights, which nobody uses here.
    """
    logger = logging.getLogger("bitsandbytes")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        from bitsandbytes import functional
    finally:
        logger.setLevel(level)
    return functional
