"""How large a step is: the learning rate by version, and the norm to which gradients are clipped. Pure.

Linear warm-up, cosine decay, then constant. By version, not by round or by clock: a void round must not move it, and
every replica that applies the same commit has to use the same number.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from protocol.architecture import num_parameters
from protocol.errors import ConfigError
from protocol.ids import StageId
from protocol.manifest import Manifest

SIGNIFICANT_DIGITS = 9  # float32 has 7.2: enough, and coarse enough that two C libraries' cosines agree


@dataclass(frozen=True, slots=True, kw_only=True)
class LearningRate:
    """Peak rate and the versions at which it is reached and has decayed."""

    peak: float
    warmup: int
    """Versions of linear warm-up; the first update already moves."""
    total: int
    """Version at which `final_fraction` of the peak is reached and kept."""
    final_fraction: float = 0.1

    def __post_init__(self) -> None:
        if not (self.peak > 0 and math.isfinite(self.peak)):
            raise ConfigError(f"the learning rate must be positive, not {self.peak}.")
        if not 0 <= self.warmup <= self.total:
            raise ConfigError(f"learning-rate warm-up ({self.warmup}) must lie between 0 and the total ({self.total}).")
        if not 0 <= self.final_fraction <= 1:
            raise ConfigError(f"the final learning-rate fraction must lie between 0 and 1, not {self.final_fraction}.")

    def at(self, version: int) -> float:
        """Return the rate of the update that leads from `version` to the next."""
        if version < self.warmup:
            return _rounded(self.peak * (version + 1) / self.warmup)
        if version >= self.total:
            return _rounded(self.peak * self.final_fraction)
        progress = (version - self.warmup) / (self.total - self.warmup)
        cosine = 0.5 * (1 + math.cos(math.pi * progress))
        return _rounded(self.peak * (self.final_fraction + (1 - self.final_fraction) * cosine))


def learning_rate(manifest: Manifest) -> LearningRate:
    """Return the run's schedule."""
    spec = manifest.optimizer
    return LearningRate(
        peak=spec.learning_rate,
        warmup=min(spec.warmup_rounds, manifest.batch.num_rounds),
        total=manifest.batch.num_rounds,
        final_fraction=spec.final_lr_fraction,
    )


def clip_threshold(manifest: Manifest, stage: StageId) -> float:
    """Return c * sqrt(P_stage / P_total): the stages' thresholds add up to c in the Euclidean sense."""
    config, num_stages = manifest.model.config, manifest.model.num_stages
    counts = [num_parameters(config, num_stages, each) for each in range(num_stages)]
    return manifest.optimizer.clip * math.sqrt(counts[stage] / sum(counts))


def _rounded(rate: float) -> float:
    return float(f"{rate:.{SIGNIFICANT_DIGITS}g}")
