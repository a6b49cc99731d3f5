"""The learning rate as a function of the version: linear warm-up, cosine decay, then constant. Pure.

By version, not by round or by clock: a void round must not move it, and every replica that applies the same
commit has to use the same number.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from protocol.errors import ConfigError

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


def _rounded(rate: float) -> float:
    return float(f"{rate:.{SIGNIFICANT_DIGITS}g}")
