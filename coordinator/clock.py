"""The two clocks of the coordinator, as one value that tests replace.

`monotonic` measures silence and waiting; `wall` (seconds since the epoch) is what is written down and signed.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Clock:
    """Where the time comes from."""

    monotonic: Callable[[], float] = time.monotonic
    wall: Callable[[], float] = time.time
