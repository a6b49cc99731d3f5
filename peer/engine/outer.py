"""The outer step of `diloco`: what many local steps have changed becomes one step of the anchor.

Owns: the arithmetic on flat fp32 pieces of any length. Must not know: where anchor and velocity live, how the mean
drift was agreed on, rounds.

Replicas train on from a common *anchor* with steps of their own; their *drift* is anchor minus weights, which points
where a gradient points. The mean drift of all is taken for a gradient of the anchor by SGD with Nesterov momentum
(DiLoCo, arXiv 2311.08105, algorithm 1), in the form of `torch.optim.SGD(nesterov=True)`.

Every operation is one correctly rounded fp32 operation per element, a product never fused with a sum: so two machines
with the same mean drift have the same anchor, bit by bit, whatever they compute on.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from protocol.errors import ConfigError
from protocol.ids import RoundId


@dataclass(frozen=True, slots=True)
class OuterSpec:
    """What every replica of a run has to agree on."""

    learning_rate: float = 0.7
    momentum: float = 0.9
    fragments: int = 1
    """In how many turns a stage is averaged (`protocol/fragments.py`)."""
    last_round: RoundId | None = None
    """The last one that trains; None: the run has no end."""

    def __post_init__(self) -> None:
        if not 0 < self.learning_rate <= 2 or not 0 <= self.momentum < 1:
            raise ConfigError(
                f"an outer learning rate of {self.learning_rate:g} and momentum of {self.momentum:g} make no sense.",
                hint="The rate is above 0 and at most 2, the momentum at least 0 and below 1.",
            )


def outer_step(anchor: Tensor, velocity: Tensor, mean_drift: Tensor, spec: OuterSpec) -> None:
    """Move `anchor` against `mean_drift`, in place. All three are flat fp32 of one length; the drift stays as it is."""
    for each in (anchor, velocity, mean_drift):
        if each.dtype != torch.float32 or each.shape != anchor.shape or each.dim() != 1:
            raise ValueError(f"an outer step takes flat fp32 of one length, not {each.dtype} {tuple(each.shape)}")
    velocity.mul_(spec.momentum).add_(mean_drift)
    step = velocity.mul(spec.momentum).add_(mean_drift).mul_(spec.learning_rate)
    anchor.sub_(step)
