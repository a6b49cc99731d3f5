"""A bounded number of tasks at a time; the oldest microbatch gets the next slot.

Owns: the slots, the line of callers that wait for one, and the quota per caller. Must not know: streams.
A stage that handed slots out at random would let a round wait for its unluckiest number.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable

from protocol.ids import PeerId, RoundId


class SlotPool:
    """Slots, of which one caller may hold at most half while others wait."""

    def __init__(self, *, num_slots: Callable[[], int]) -> None:
        """`num_slots` says how many there are at the moment; if they become fewer, those in use are not taken away."""
        self._num_slots = num_slots
        self._held: dict[PeerId, int] = {}
        self._waiting: list[tuple[RoundId, int, int, PeerId, asyncio.Future[None]]] = []
        self._sequence = itertools.count()

    async def acquire(self, caller: PeerId, *, round_id: RoundId, number: int, timeout_s: float) -> bool:
        """Take a slot, waiting up to `timeout_s`; False means busy. Among those who wait, the oldest number wins."""
        if self._has_free() and not self._has_waiters():
            self._take(caller)
            return True
        granted: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append((round_id, number, next(self._sequence), caller, granted))
        self._grant()
        try:
            async with asyncio.timeout(timeout_s):
                await granted
        except TimeoutError:
            return self._settle_late(granted)
        except asyncio.CancelledError:
            if self._settle_late(granted):
                self.release(caller)
            raise
        return True

    def release(self, caller: PeerId) -> None:
        """Give a slot back."""
        self._held[caller] -= 1
        if not self._held[caller]:
            del self._held[caller]
        self._grant()

    @property
    def num_held(self) -> int:
        """Slots in use."""
        return sum(self._held.values())

    def _settle_late(self, granted: asyncio.Future[None]) -> bool:
        """Tell whether the grant came in the same instant as the timeout; otherwise leave the line."""
        if granted.done() and not granted.cancelled():
            return True
        granted.cancel()
        return False

    def _has_free(self) -> bool:
        return self.num_held < self._num_slots()

    def _has_waiters(self) -> bool:
        return any(not entry[-1].done() for entry in self._waiting)

    def _take(self, caller: PeerId) -> None:
        self._held[caller] = self._held.get(caller, 0) + 1

    def _grant(self) -> None:
        """Hand free slots to the oldest waiting numbers; callers over quota only get what nobody else wants."""
        self._waiting = [entry for entry in self._waiting if not entry[-1].done()]
        quota = max(1, self._num_slots() // 2)
        while self._has_free() and self._waiting:
            modest = [entry for entry in self._waiting if self._held.get(entry[3], 0) < quota]
            entry = min(modest or self._waiting, key=lambda waiting: waiting[:3])
            self._waiting.remove(entry)
            self._take(entry[3])
            entry[-1].set_result(None)
