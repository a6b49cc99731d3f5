"""Whether the organiser's watcher may be believed alone, or may itself be what is broken. Pure.

Owns: what each watcher has found right since it first accused somebody. Must not know: how it was asked.

A watcher that computes wrongly finds everything wrong; one that has wrong weights of a stage, everything there. So
nothing follows from its word alone until it has found other things right since, at the same stage. Where it finds
nothing right at all, as somebody is alone there and never does right, it has to find things right elsewhere, and some
minutes have to pass.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from protocol.ids import PeerId, StageId

ENOUGH = 4  # audits that found nothing, since the first one that did
PATIENCE_S = 300.0
FORGET_S = 3600.0
"""An accusation that is not repeated for so long is none any more."""


@dataclass(slots=True)
class _Accusation:
    since_s: float
    last_s: float
    valid_here: int
    """How often the watcher had found nothing at that stage, and anywhere, when it began."""
    valid: int


class Soundness:
    """What watchers have found, in this process."""

    def __init__(self) -> None:
        self._valid: Counter[tuple[PeerId, StageId]] = Counter()
        self._accusations: dict[tuple[PeerId, PeerId, StageId], _Accusation] = {}

    def note_valid(self, watcher: PeerId, stage: StageId) -> None:
        """A watcher has found nothing wrong with work at a stage."""
        self._valid[watcher, stage] += 1

    def accuse(self, watcher: PeerId, peer: PeerId, stage: StageId, *, now_s: float) -> bool:
        """A watcher has found somebody wrong, twice over; tell whether its word is enough by now."""
        key = watcher, peer, stage
        here = self._valid[watcher, stage]
        anywhere = sum(count for (who, _), count in self._valid.items() if who == watcher)
        known = self._accusations.get(key)
        if known is None or now_s - known.last_s > FORGET_S:
            known = self._accusations[key] = _Accusation(now_s, now_s, here, anywhere)
        known.last_s = now_s
        if here - known.valid_here >= ENOUGH:
            return True
        return now_s - known.since_s >= PATIENCE_S and anywhere - known.valid >= ENOUGH

    def forget(self, peer: PeerId) -> None:
        """What was held against a peer was taken back."""
        for key in [key for key in self._accusations if key[1] == peer]:
            del self._accusations[key]
