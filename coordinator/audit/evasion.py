"""Who keeps out of sight: work of which nobody could ever be asked to recompute anything. Pure.

Owns: comparing with the others how much of what a peer does cannot be looked at. Must not know: why it cannot
(`office.py` counts), what follows.

Work that is under way while weights change cannot be recomputed, and receipts may be late. That happens to everybody
alike, and to nobody most of the time. Whoever hides most of its work is told from others by that.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping

from protocol.ids import PeerId

HIDDEN = 0.5
"""Of what a peer does. More of it hides who wants to."""
USUAL = 0.25
"""If others hide as much as this it is the run's way, and nobody's."""
PATIENCE_S = 300.0
"""So long may it go on before it counts as meant."""


class Evasion:
    """Watches how much everybody hides."""

    def __init__(self, *, least: int) -> None:
        """`least` things have to be known of a peer."""
        self._least = least
        self._seen_s: dict[PeerId, tuple[float, float]] = {}
        """Since when somebody hides its work, and when that was last seen."""

    def look(self, seen: Mapping[PeerId, tuple[int, int]], *, now_s: float) -> dict[PeerId, bool]:
        """Return who hides most of what it does lately, by (things, hidden ones), and whether that is proven by now."""
        shares = {peer: hidden / count for peer, (count, hidden) in seen.items() if count >= self._least}
        found = {}
        for peer, share in shares.items():
            others = [each for other, each in shares.items() if other != peer]
            if share > HIDDEN and others and statistics.median(others) <= USUAL:
                first_s, last_s = self._seen_s.get(peer, (now_s, now_s))
                first_s = now_s if now_s - last_s > PATIENCE_S else first_s
                self._seen_s[peer] = first_s, now_s
                found[peer] = now_s - first_s >= PATIENCE_S
        for peer, (_, last_s) in list(self._seen_s.items()):
            if peer not in found and (peer in shares or now_s - last_s > PATIENCE_S):
                del self._seen_s[peer]
        return found

    def forget(self, peer: PeerId) -> None:
        """It has been judged, and that was taken back."""
        self._seen_s.pop(peer, None)
