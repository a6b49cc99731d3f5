"""How long a piece of work takes, work on the device included.

Owns: repeating, and waiting for the device. Must not know: what the work is.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

REPEATS = 3


def run_s(
    work: Callable[[Tensor], object], *, repeats: int = REPEATS, prepare: Callable[[], Tensor] | None = None
) -> float:
    """Return the median seconds of a piece of work after a first, unmeasured run. `prepare` makes what it gets."""
    times_s: Sequence[float] = [
        once_s(lambda given=given: work(given))  # type: ignore[misc]
        for given in (torch.empty(0) if prepare is None else prepare() for _ in range(repeats + 1))
    ]
    return statistics.median(times_s[1:])


def once_s(work: Callable[[], object]) -> float:
    """Return the seconds of a piece of work, and of all that it gives the device to do."""
    _finish()
    started_s = time.perf_counter()
    work()
    _finish()
    return time.perf_counter() - started_s


def _finish() -> None:
    """Wait for the device, which computes on after a call has returned."""
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call, unused-ignore]
        torch.cuda.synchronize()
