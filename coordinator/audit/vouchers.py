"""Who has found whose work right lately. Pure.

Owns: remembering that, so that a wrong word can be held against who said it. Must not know: what follows (`office.py`).
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field

from coordinator.carries import Carry, WorkKey
from protocol.ids import PeerId

MAX_WORKS = 4096  # microbatches; of older ones nobody has the inputs any more


@dataclass(slots=True)
class _Work:
    carry: Carry
    by: set[PeerId] = field(default_factory=set)


class Vouchers:
    """Microbatches that were found right."""

    def __init__(self) -> None:
        self._works: OrderedDict[WorkKey, _Work] = OrderedDict()

    def note(self, carry: Carry, auditor: PeerId) -> None:
        """An auditor has found nothing."""
        work = self._works.setdefault(carry.key, _Work(carry))
        work.by.add(auditor)
        self._works.move_to_end(carry.key)
        while len(self._works) > MAX_WORKS:
            self._works.popitem(last=False)

    def of(self, carry: Carry) -> set[PeerId]:
        """Return who has found this right."""
        work = self._works.get(carry.key)
        return set() if work is None else set(work.by)

    def newest(self, peer: PeerId, limit: int) -> list[Carry]:
        """Return what was found right of a peer, the latest first, but of every auditor something before the rest."""
        works = [work for work in reversed(self._works.values()) if work.carry.peer == peer]
        seen: set[PeerId] = set()
        first: list[Carry] = []
        rest: list[Carry] = []
        for work in works:
            (rest if work.by <= seen else first).append(work.carry)
            seen |= work.by
        return [*first, *rest][:limit]
