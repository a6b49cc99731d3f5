"""AdamW on flat shards, with 8-bit or 32-bit state: the one adapter to bitsandbytes and to torch's AdamW.

Owns: the step and what is decayed. Must not know: modules, rounds, where a gradient comes from, how the state lies in
its buffer (`peer/memory/moments.py`). `peer/engine/passes.py` calls `step` once per shard and version.

A shard is updated in two groups: its matrices (with weight decay) and its vectors (norms and biases,
without). `adamw8bit` keeps 8-bit blockwise moments for the matrices of the layers; vectors, embedding and
head keep 32-bit moments, as bitsandbytes advises (tiny or rarely updated rows suffer most from 8 bits).

Same gradient bytes, same weights: both kernels are elementwise (quantisation works on blocks of 256, which
is the shards' alignment), and a group's length is a multiple of 256, so no number depends on a vector tail
or on how threads share the work. Processors without fused multiply-add would still differ in the last bit.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, get_args

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from peer.engine.rounding import join, round_at_random, round_nearest, split
from peer.memory.moments import Field, Group, MasterName, Moment, OptimizerName, groups, is_in_8_bit, moment_fields
from protocol.errors import ConfigError, LocalFault
from protocol.layout import ALIGNMENT_ELEMENTS, ShardLayout

OPTIMIZERS: tuple[str, ...] = get_args(OptimizerName)
MASTERS: tuple[str, ...] = get_args(MasterName)

# bitsandbytes' CPU path makes fp32 copies of all it touches (about 20 bytes per element): bounds them to 20 MiB
STEP_ELEMENTS = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class OptimizerSpec:
    """What every replica of a run has to agree on, apart from the learning rate."""

    name: OptimizerName = "adamw8bit"
    betas: tuple[float, float] = (0.9, 0.95)
    epsilon: float = 1e-8
    weight_decay: float = 0.1
    """Decoupled decay of matrices; norms and biases are never decayed."""
    master: MasterName = "fp32"
    """How weights are kept."""
    rounding_seed: int = 0
    """Of `bf16-sr`: the same at every replica."""

    def __post_init__(self) -> None:
        if self.name not in OPTIMIZERS:
            raise ConfigError(f"there is no optimizer {self.name!r}.", hint=f"Choose {_either(OPTIMIZERS)}.")
        if self.master not in MASTERS:
            raise ConfigError(f"there is no way {self.master!r} to keep weights.", hint=f"Choose {_either(MASTERS)}.")
        if not all(0 <= beta < 1 for beta in self.betas) or self.epsilon <= 0 or self.weight_decay < 0:
            raise ConfigError(f"the optimizer's settings make no sense: {self}.")


_Fields = dict[Group, dict[Moment, Tensor]]
"""The arrays of a shard's moments, by group and name."""


class AdamW:
    """The AdamW step of single shards, on whatever buffers it is given: wherever they live, they are updated in place.

    It has no state of its own; the caller counts the steps, and all shards of a stage step together.
    """

    def __init__(self, spec: OptimizerSpec, device: torch.device) -> None:
        self._spec = spec
        if spec.name == "adamw8bit":
            functional = _bitsandbytes()
            self._update_8_bit = functional.optimizer_update_8bit_blockwise
            self._maps = tuple(functional.create_dynamic_map(signed=signed).to(device) for signed in (True, False))

    def step(
        self,
        layout: ShardLayout,
        weights: Tensor,
        gradient: Tensor,
        moments: Tensor,
        *,
        step: int,
        learning_rate: float,
    ) -> None:
        """Take step number `step` (from 1). The gradient stays as it is.

        `weights` and `gradient` are flat fp32 of the shard's length, `moments` flat bytes as `peer/memory/moments.py`
        lays them out.
        """
        if weights.dtype != torch.float32 or gradient.dtype != torch.float32:
            # bitsandbytes' CUDA kernel would take the second buffer's bytes for the first one's type
            raise LocalFault("training needs fp32 weights and gradients.")
        self.widen(layout, weights, moments)
        fields = self._views(layout, moments)
        for group, part in groups(layout):
            own, piece = fields[group], weights[part]
            update = self._step_8_bit if is_in_8_bit(layout, group, self._spec.name) else self._step_32_bit
            decay = self._spec.weight_decay if group == "matrices" else 0.0
            update(piece, gradient[part], own, step, learning_rate, decay)
        # bitsandbytes' CPU quantiser has no code for zero (0.50.2 takes 2e-5 of the block's largest instead),
        # so its moments push even weights that never had a gradient
        for start, end in layout.padding:
            weights[start:end].zero_()
        self.narrow(layout, weights, moments, step=step)

    def begin(self, layout: ShardLayout, weights: Tensor, moments: Tensor) -> None:
        """Make initial weights (fp32) ones that are kept as this optimizer keeps them, with moments of nothing."""
        moments.zero_()
        if self._spec.master == "bf16-sr":
            round_nearest(weights)
        else:
            self.narrow(layout, weights, moments, step=0)

    def widen(self, layout: ShardLayout, weights: Tensor, moments: Tensor) -> None:
        """Make the master weights of what is kept of them, in place."""
        if self._spec.master == "bf16+16":
            fields = self._views(layout, moments)
            for group, part in groups(layout):
                join(weights[part], fields[group]["remainder"])

    def narrow(self, layout: ShardLayout, weights: Tensor, moments: Tensor, *, step: int) -> None:
        """Make what is kept of master weights, in place. What is rounded at random, is so by the number of the step."""
        if self._spec.master == "bf16-sr":
            round_at_random(weights, seed=self._spec.rounding_seed, step=step, name=layout.name)
        elif self._spec.master == "bf16+16":
            fields = self._views(layout, moments)
            for group, part in groups(layout):
                split(weights[part], fields[group]["remainder"])

    def _views(self, layout: ShardLayout, moments: Tensor) -> _Fields:
        views: _Fields = {}
        for each in moment_fields(layout, self._spec.name, self._spec.master):
            views.setdefault(each.group, {})[each.name] = field_view(moments, each)
        return views

    def _step_32_bit(
        self,
        weights: Tensor,
        gradient: Tensor,
        state: Mapping[Moment, Tensor],
        step: int,
        learning_rate: float,
        decay: float,
    ) -> None:
        steps_before = torch.tensor(float(step - 1), device=weights.device)  # the kernel counts it up
        with torch.no_grad():
            adamw(
                [weights],
                [gradient],
                [state["moment1"]],
                [state["moment2"]],
                [],
                [steps_before],
                fused=True,
                amsgrad=False,
                beta1=self._spec.betas[0],
                beta2=self._spec.betas[1],
                lr=learning_rate,
                weight_decay=decay,
                eps=self._spec.epsilon,
                maximize=False,
            )

    def _step_8_bit(
        self,
        weights: Tensor,
        gradient: Tensor,
        state: Mapping[Moment, Tensor],
        step: int,
        learning_rate: float,
        decay: float,
    ) -> None:
        for start in range(0, weights.numel(), STEP_ELEMENTS):
            part = slice(start, start + STEP_ELEMENTS)
            blocks = slice(start // ALIGNMENT_ELEMENTS, (start + STEP_ELEMENTS) // ALIGNMENT_ELEMENTS)
            self._update_8_bit(
                "adam",  # bitsandbytes' name for Adam with decoupled decay
                gradient[part],
                weights[part],
                state["moment1"][part],
                state["moment2"][part],
                self._spec.betas[0],
                self._spec.betas[1],
                0.0,  # beta3 and alpha belong to AdEMAMix
                0.0,
                self._spec.epsilon,
                step,
                learning_rate,
                *self._maps,
                state["scale1"][blocks],
                state["scale2"][blocks],
                decay,
            )


def _either(names: tuple[str, ...]) -> str:
    return " or ".join(names)


def field_view(moments: Tensor, field: Field) -> Tensor:
    """Return one array of a shard's moments, sharing memory."""
    return moments[field.offset_bytes : field.end_bytes].view(getattr(torch, field.dtype))


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
