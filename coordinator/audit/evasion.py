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
        self._since_s: dict[PeerId, float] = {}

    def look(self, seen: Mapping[PeerId, tuple[int, int]], *, now_s: float) -> dict[PeerId, bool]:
        """Return who hides most of what it does lately, by (things, hidden ones), and whether that is proven by now."""
        shares = {peer: hidden / count for peer, (count, hidden) in seen.items() if count >= self._least}
        found = {}
        for peer, share in shares.items():
            others = [each for other, each in shares.items() if other != peer]
            if share > HIDDEN and others and statistics.median(others) <= USUAL:
                found[peer] = now_s - self._since_s.setdefault(peer, now_s) >= PATIENCE_S
        self._since_s = {peer: at_s for peer, at_s in self._since_s.items() if peer in found or peer not in shares}
        return found

    def forget(self, peer: PeerId) -> None:
        """It has been judged."""
        self._since_s.pop(peer, None)
