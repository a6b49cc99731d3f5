"""Copies that take their time, or fail, and that must not get in each other's way.

Stands between an executor and its pool. Oracle for what may happen at once: nothing else goes to or from a slot while
it is filled, and a unit is neither read while it is written home nor the other way round.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from threading import Lock

import pytest

from peer.memory.backend import Event
from peer.memory.pool import Pool
from peer.memory.units import Section, Unit

FETCH, FLUSH = "fetch", "flush"


@dataclass(frozen=True, slots=True, eq=False)
class Transfer:
    """One copy under way."""

    what: str
    unit: Unit
    slot: int

    def is_in_the_way_of(self, other: Transfer) -> bool:
        if self.what == other.what == FLUSH:
            return False
        if self.unit == other.unit:
            return True
        if (self.unit.section, self.slot) != (other.unit.section, other.slot):
            return False
        return self.unit.block != other.unit.block or self.unit.section is Section.MOMENTS  # else another part of it


class Transfers:
    """All copies of all pools while it is in place: what was seen, what is under way, what went wrong."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.delay_s: Callable[[], float] = lambda: 0.0
        self.fails: Callable[[str, Unit], bool] = lambda what, unit: False
        self.seen: list[Transfer] = []
        self.under_way: list[Transfer] = []
        self.collisions: list[tuple[Transfer, Transfer]] = []
        self._lock = Lock()
        for what in (FETCH, FLUSH):
            monkeypatch.setattr(Pool, what, self._watched(what, getattr(Pool, what)))

    def _watched(self, what: str, copy: Callable[..., None]) -> Callable[..., None]:
        def watched(pool: Pool, unit: Unit, slot: int, after: Event) -> None:
            transfer = Transfer(what, unit, slot)
            with self._lock:
                self.collisions += [(each, transfer) for each in self.under_way if each.is_in_the_way_of(transfer)]
                self.seen.append(transfer)
                self.under_way.append(transfer)
            try:
                delay_s = self.delay_s()
                time.sleep(delay_s)
                if self.fails(what, unit):
                    raise OSError(5, "Input/output error")
                copy(pool, unit, slot, after)
                time.sleep(delay_s)
            finally:
                with self._lock:
                    self.under_way.remove(transfer)

        return watched
