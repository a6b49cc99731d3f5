"""How fast a stage is while it has something to do.

Owns: the measurement: tokens of a round over the seconds from its opening to the last of them. What comes after that is
waiting for others, and says nothing of us. Must not know: what a task is, who compares speeds
(`protocol/ownership.py` deals numbers out by them).
"""

from __future__ import annotations

import time
from collections.abc import Callable


class Pace:
    """The speed of one stage, of the newest round in which it had anything to do."""

    def __init__(self, clock_s: Callable[[], float] = time.monotonic) -> None:
        self._clock_s = clock_s
        self._begun_s = clock_s()
        self._tokens = 0
        self.tokens_per_s: float | None = None
        """None before the first token."""

    def begin(self) -> None:
        """A round is opened."""
        self._begun_s, self._tokens = self._clock_s(), 0

    def note(self, tokens: int) -> None:
        """So many target tokens are done."""
        self._tokens += tokens
        seconds = self._clock_s() - self._begun_s
        if self._tokens > 0 and seconds > 0:
            self.tokens_per_s = self._tokens / seconds
