"""How fast a stage is while it has something to do.

Owns: the measurement: tokens of a round over the seconds from its opening to the last of them. What comes after that is
waiting for others, and says nothing of us; nor does a long pause before we take over what somebody else has dropped.
Must not know: what a task is, who compares speeds
(`protocol/ownership.py` deals numbers out by them).
"""

from __future__ import annotations

import time
from collections.abc import Callable

PAUSE = 5.0  # of the usual time between two tasks: then we were waiting
ENOUGH = 4  # tasks to tell what is usual


class Pace:
    """The speed of one stage, of the newest round in which it had anything to do."""

    def __init__(self, clock_s: Callable[[], float] = time.monotonic) -> None:
        self._clock_s = clock_s
        self._last_s = clock_s()
        self._busy_s = 0.0
        self._tokens = self._count = 0
        self.tokens_per_s: float | None = None
        """None before the first token."""

    def begin(self) -> None:
        """A round is opened."""
        self._last_s, self._busy_s = self._clock_s(), 0.0
        self._tokens = self._count = 0

    def note(self, tokens: int) -> None:
        """So many target tokens are done."""
        now_s = self._clock_s()
        seconds, usual_s = now_s - self._last_s, self._busy_s / max(self._count, 1)
        is_pause = self._count >= ENOUGH and seconds > PAUSE * usual_s
        self._last_s, self._busy_s = now_s, self._busy_s + (usual_s if is_pause else seconds)
        self._tokens, self._count = self._tokens + tokens, self._count + 1
        if self._tokens > 0 and self._busy_s > 0:
            self.tokens_per_s = self._tokens / self._busy_s
