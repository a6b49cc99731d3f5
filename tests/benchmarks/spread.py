"""The small statistics of a benchmark: a bar, a spread, and how sure a ratio of medians is.

Pure: numbers in, numbers out; the bootstrap is seeded, so the same samples give the same interval.
"""

from __future__ import annotations

import operator
import random
import re
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

_OPERATORS: dict[str, Callable[[float, float], bool]] = {
    "<=": operator.le,
    ">=": operator.ge,
    "<": operator.lt,
    ">": operator.gt,
    "==": operator.eq,
}
_BAR = re.compile(r"(<=|>=|<|>|==)\s*(-?\d+(?:\.\d+)?(?:[eE][-+]?\d+)?)")

RESAMPLES = 2000  # the ends of a 95 % interval then move by less than a printed digit
CONFIDENCE = 0.95


@dataclass(frozen=True, slots=True)
class Bar:
    """What a ratio has to reach, as written: "<= 1.10", ">= 0.80"."""

    text: str
    comparison: str
    limit: float

    @classmethod
    def parse(cls, text: str) -> Bar:
        """Read an operator and a number; a bar that cannot be read is a mistake in the benchmark."""
        match = _BAR.fullmatch(text.strip())
        if match is None:
            raise ValueError(f"not a bar: {text!r} (like '<= 1.10' or '>= 0.80')")
        return cls(text=f"{match[1]} {match[2]}", comparison=match[1], limit=float(match[2]))

    def holds(self, value: float) -> bool:
        return _OPERATORS[self.comparison](value, self.limit)

    def holds_within(self, slack: float, value: float, interval: tuple[float, float]) -> bool:
        """Tell whether the interval's better end meets the bar, and the value itself misses it by `slack` at most."""
        is_upper = self.comparison in ("<=", "<")
        better = min(interval) if is_upper else max(interval)
        return self.holds(better) and self.holds(value - slack if is_upper else value + slack)


@dataclass(frozen=True, slots=True)
class Spread:
    """The median of some repeats and how far they lie apart. `iqr` is the middle half's width."""

    median: float
    minimum: float
    maximum: float
    iqr: float
    repeats: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        if not values:
            raise ValueError("nothing was measured")
        lower, middle, upper = (
            statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else (values[0],) * 3
        )
        return cls(median=middle, minimum=min(values), maximum=max(values), iqr=upper - lower, repeats=len(values))

    def to_json(self) -> dict[str, object]:
        return {"min": self.minimum, "max": self.maximum, "iqr": self.iqr, "repeats": self.repeats}

    def __str__(self) -> str:
        if self.repeats == 1:
            return f"{self.median:.4g}"
        return f"{self.median:.4g} ({self.minimum:.4g} - {self.maximum:.4g})"


def ratio_interval(ours: Sequence[float], reference: Sequence[float], *, seed: int = 0) -> tuple[float, float] | None:
    """Return the percentile bootstrap interval of median(ours) / median(reference); None for a single pair.

    Pairs are drawn together, so that a slow minute that hit both sides does not widen the interval.
    """
    pairs = list(zip(ours, reference, strict=True))
    if len(pairs) < 2:
        return None
    rng = random.Random(seed)
    ratios = []
    for _ in range(RESAMPLES):
        drawn = rng.choices(pairs, k=len(pairs))
        below = statistics.median(pair[1] for pair in drawn)
        if below != 0:
            ratios.append(statistics.median(pair[0] for pair in drawn) / below)
    ratios.sort()
    tail = (1 - CONFIDENCE) / 2
    return ratios[int(tail * (len(ratios) - 1))], ratios[int((1 - tail) * (len(ratios) - 1) + 0.5)]
