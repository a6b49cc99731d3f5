"""How fast this machine may send, and how fast it may receive: one token bucket for each, shared by all streams.

Owns: the order in which streams get their turn at a home line that has a limit. Must not know: streams, what is sent.

Activations come first: while one of them waits, nothing in bulk (averages, states, tokens) gets a turn, unless it has
waited for so long that its other end would take us for dead. Small messages do not wait at all; what they cost delays
what comes next. A turn is of any size, and is paid for afterwards.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from dataclasses import dataclass, field
from enum import IntEnum
from typing import NamedTuple

BURST_S = 0.1  # of credit that an idle line saves up
MAX_BULK_WAIT_S = 10.0  # behind activations; streams give up on a chunk after a minute
BITS_PER_MBIT = 1e6


class Lane(IntEnum):
    """What goes first."""

    PROMPT = 0
    """Activations and their gradients: somebody computes with them at once."""
    BULK = 1
    """What there is time for until the end of a round."""


class Turn(NamedTuple):
    """Bytes that wait to be moved."""

    number: int
    num_bytes: int
    asked_s: float


def _nobody() -> dict[Lane, deque[Turn]]:
    return {lane: deque() for lane in Lane}


@dataclass(slots=True)
class Bucket:
    """The books of one direction. Pure: whoever calls says what time it is, in seconds that only grow."""

    bytes_per_s: float
    _level: float = 0.0
    _filled_s: float = 0.0
    _waiting: dict[Lane, deque[Turn]] = field(default_factory=_nobody)
    _number: int = 0

    def spend(self, num_bytes: int, now_s: float) -> None:
        """Take note of bytes that do not wait for their turn."""
        self._fill(now_s)
        self._level -= num_bytes

    def queue(self, num_bytes: int, lane: Lane, now_s: float) -> int:
        """Ask for a turn, and return its number."""
        self._number += 1
        self._waiting[lane].append(Turn(self._number, num_bytes, now_s))
        return self._number

    def forget(self, number: int) -> None:
        """Nobody wants that turn any more."""
        for queue in self._waiting.values():
            for turn in [turn for turn in queue if turn.number == number]:
                queue.remove(turn)

    def due(self, now_s: float) -> list[int]:
        """Give all the turns that there is credit for, and return their numbers in order."""
        self._fill(now_s)
        given: list[int] = []
        while self._level >= 0 and (queue := self._next(now_s)):
            turn = queue.popleft()
            self._level -= turn.num_bytes
            given.append(turn.number)
        return given

    def wait_s(self, now_s: float) -> float | None:
        """Return how long it takes until a turn is due; None if nobody waits for one."""
        self._fill(now_s)
        return max(0.0, -self._level / self.bytes_per_s) if any(self._waiting.values()) else None

    def _fill(self, now_s: float) -> None:
        gained = self.bytes_per_s * (now_s - self._filled_s)
        self._level = min(self._level + gained, self.bytes_per_s * BURST_S)
        self._filled_s = now_s

    def _next(self, now_s: float) -> deque[Turn]:
        prompt, bulk = self._waiting[Lane.PROMPT], self._waiting[Lane.BULK]
        is_starved = bool(bulk) and now_s - bulk[0].asked_s > MAX_BULK_WAIT_S
        return bulk if is_starved or not prompt else prompt


class Throttle:
    """One direction of this machine's line."""

    def __init__(self, *, mbps: float | None = None) -> None:
        """`mbps` are megabits (10^6) per second; None: as fast as it goes."""
        self._bucket = None if mbps is None else Bucket(mbps * BITS_PER_MBIT / 8, _filled_s=time.monotonic())
        self._turns: dict[int, asyncio.Future[None]] = {}
        self._timer: asyncio.TimerHandle | None = None

    def spend(self, num_bytes: int) -> None:
        """Take note of something small that does not wait."""
        if self._bucket is not None:
            self._bucket.spend(num_bytes, time.monotonic())

    async def take(self, num_bytes: int, lane: Lane) -> None:
        """Wait until it is our turn to move `num_bytes`."""
        if self._bucket is None:
            return
        number = self._bucket.queue(num_bytes, lane, time.monotonic())
        turn = self._turns[number] = asyncio.get_running_loop().create_future()
        self._give_turns()
        try:
            await turn
        finally:
            del self._turns[number]
            self._bucket.forget(number)

    def _give_turns(self) -> None:
        assert self._bucket is not None
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        for number in self._bucket.due(time.monotonic()):
            if not self._turns[number].done():
                self._turns[number].set_result(None)
        wait_s = self._bucket.wait_s(time.monotonic())
        if wait_s is not None:
            self._timer = asyncio.get_running_loop().call_later(wait_s, self._give_turns)


@dataclass(frozen=True, slots=True)
class Line:
    """Both directions."""

    up: Throttle = field(default_factory=Throttle)
    down: Throttle = field(default_factory=Throttle)
