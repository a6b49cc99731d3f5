"""How much of what forward passes leave behind for backward passes may stay: the byte budget of kept graphs.

Owns: the budget and the book. Must not know: blocks, tickets, what a graph is.
A kept graph saves a second forward pass through its block; a dropped one saves memory. Both give the same bits.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field


@dataclass(slots=True)
class Retention:
    """Decides by budget. Graphs of one kind (same layers, same shape of input) cost the same: it is measured once."""

    budget_bytes: int
    kept_bytes: int = 0
    _costs: dict[Hashable, int] = field(default_factory=dict)

    def may_keep(self, kind: Hashable) -> bool:
        """Return whether to try: a kind that was never measured is tried as long as anything is left."""
        return self.kept_bytes + self._costs.get(kind, 1) <= self.budget_bytes

    def keep(self, kind: Hashable, measured_bytes: int) -> bool:
        """Book a graph of `measured_bytes`; False (and nothing booked) if it turned out not to fit."""
        self._costs[kind] = measured_bytes
        if self.kept_bytes + measured_bytes > self.budget_bytes:
            return False
        self.kept_bytes += measured_bytes
        return True

    def release(self, kept_bytes: int) -> None:
        """Give the bytes of a graph back."""
        self.kept_bytes -= kept_bytes
