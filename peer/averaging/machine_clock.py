"""The time that a round machine is told: monotonic seconds without the driver's own work.

Owns: that difference. Must not know: rounds. The machine takes a long gap between two events for sleep, and gives up
what depends on not having slept (a tie is then not ours to break). While the driver takes a step of the optimizer or
writes a snapshot it hears nobody either, but if that is over before anybody can have given us up, nothing was missed:
what came meanwhile waits in the inbox.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager


class MachineClock:
    """Seconds that do not pass while the driver works, unless it works for longer than `limit_s` at a stretch."""

    def __init__(self, *, limit_s: float) -> None:
        """`limit_s` is below the patience of others: after more than that they may have gone on without us."""
        self._limit_s = limit_s
        self._worked_s = 0.0

    def now_s(self) -> float:
        """Return the time to tell the machine."""
        return time.monotonic() - self._worked_s

    @contextmanager
    def working(self) -> Iterator[None]:
        """Do not count the time that the block takes."""
        started_s = time.monotonic()
        try:
            yield
        finally:
            took_s = time.monotonic() - started_s
            if took_s <= self._limit_s:
                self._worked_s += took_s
