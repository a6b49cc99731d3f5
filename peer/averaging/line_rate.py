"""How fast this peer's line is, as far as averages have shown.

Owns: what is remembered of past averages, and the estimate that the next steward hears (`protocol/rounds/choice.py`
says what for). Must not know: codecs, the line's caps.

An average takes some seconds whatever it moves: members find each other, wait for the slowest, acknowledge. So a small
one says little about the line, and would make it look the slower the less was sent over it. What counts is the largest
of the last few, less what any of them takes.
"""

from __future__ import annotations

from collections import deque

SETUP_S = 0.5
REMEMBERED = 16


class LineRate:
    """An estimate from the averages of one stage."""

    def __init__(self) -> None:
        self._seen: deque[tuple[int, float]] = deque(maxlen=REMEMBERED)

    def note(self, bytes_sent: int, seconds: float) -> None:
        """Take in an average that this peer has made."""
        if bytes_sent > 0 and seconds > 0:
            self._seen.append((bytes_sent, seconds))

    @property
    def bytes_per_s(self) -> float | None:
        """Of the largest of the last averages, the newest of those alike; None if there were none."""
        if not self._seen:
            return None
        most = max(sent for sent, _ in self._seen)
        sent, seconds = next(each for each in reversed(self._seen) if each[0] >= 0.9 * most)
        return sent / max(seconds - SETUP_S, seconds / 10)
