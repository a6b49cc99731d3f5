"""What is done in the current round, and what this feeder may take next.

Owns: the done-bits of one round, whose number is whose, and the rule for taking over other people's
numbers. Pure but for the time that is passed in. Must not know: how a microbatch is worked on, or how
bits travel to the clock (`peer/averaging/driver.py` carries them).

Numbers are dealt out by speed (`protocol/ownership.py`), training and evaluation apart.

Takeover: a number may be fed by somebody else once its owner has not moved for a while. Those that come next in
the number's rendezvous order get their turn one after the other, so that they do not all jump at once. Who is
certainly gone is passed over at once.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Mapping

from protocol.batches import Microbatch, TaskKind
from protocol.ids import PeerId, RoundId
from protocol.ownership import owners, rendezvous

MIN_TAKEOVER_S = 4.0
TAKEOVER_TASKS = 3.0
"""An owner that has shown nothing new for as long as this many microbatches take may be dead; sooner, it is at work."""


def takeover_s(task_s: float | None, *, at_first_s: float, wave: int = 1) -> float:
    """Return how long to leave an owner in peace: `task_s` is what a microbatch takes us, None if not known yet.

    One whose microbatches pass in waves shows something new once per wave only. How much longer that may take is no
    more than its word, and so at most `at_first_s`.
    """
    alone_s = at_first_s if task_s is None else TAKEOVER_TASKS * task_s
    return max(MIN_TAKEOVER_S, alone_s + min((wave - 1) * alone_s, at_first_s))


class Board:
    """The done-bits of one round, as this feeder knows them."""

    def __init__(
        self,
        round_id: RoundId,
        *,
        plan: Iterable[Microbatch],
        seed: str,
        me: PeerId,
        feeders: Mapping[PeerId, float],
        takeover_s: Callable[[PeerId], float],
        is_gone: Callable[[PeerId], bool] = lambda peer: False,
        now_s: float,
    ) -> None:
        """`feeders` are weighted by speed; `takeover_s` says how long to leave the owner of a number in peace."""
        self.round = round_id
        self._takeover_s = takeover_s
        self._is_gone = is_gone
        self._me = me
        self._plan = {microbatch.number: microbatch for microbatch in sorted(plan, key=lambda one: one.number)}
        self._seed, self._feeders = f"{seed}/{round_id}", dict(feeders)
        self._owners: dict[int, PeerId] = {}
        for kind in TaskKind:
            numbers = [number for number, microbatch in self._plan.items() if microbatch.kind is kind]
            self._owners |= owners(self._seed, numbers, feeders)
        self._orders: dict[int, tuple[PeerId, ...]] = {}
        self._left = list(self._plan.values())
        """What is not done, oldest first."""
        self._done: set[int] = set()
        self._own: set[int] = set()
        self._in_flight: set[int] = set()
        self._not_before_s: dict[int, float] = {}
        self._moved_s: dict[PeerId, float] = dict.fromkeys(feeders, now_s)
        self._changed = asyncio.Event()

    def take_next(self, *, now_s: float) -> Microbatch | None:
        """Return the oldest number to feed now: our own first, then what others seem to have dropped."""
        for mine in (True, False):
            for microbatch in self._left:
                number = microbatch.number
                if (self._owners[number] == self._me) is mine and self._is_takeable(number, now_s=now_s):
                    self._in_flight.add(number)
                    return microbatch
        return None

    def has_next(self, kind: TaskKind, *, now_s: float) -> bool:
        """Tell whether there is a number of a kind to feed now."""
        return any(
            microbatch.kind is kind and self._is_takeable(microbatch.number, now_s=now_s) for microbatch in self._left
        )

    def finish(self, microbatch: Microbatch, *, now_s: float) -> None:
        """Set a bit: this feeder holds the last stage's signed answer."""
        self._in_flight.discard(microbatch.number)
        self._own.add(microbatch.number)
        self.learn_done(self._done, now_s=now_s)

    def give_back(self, microbatch: Microbatch, *, not_before_s: float) -> None:
        """Return a number whose attempt failed; it may be tried again from `not_before_s` on."""
        self._in_flight.discard(microbatch.number)
        self._not_before_s[microbatch.number] = not_before_s

    def learn_done(self, numbers: Iterable[int], *, now_s: float) -> None:
        """Take over what is done by anybody, as the clock tells it: all of it, not only the news.

        A bit may fall again, when only a clock that died had vouched for it; our own never do.
        """
        before, self._done = self._done, set(numbers) & set(self._plan) | self._own
        news = self._done - before
        if self._done == before:
            return
        self._left = [microbatch for number, microbatch in self._plan.items() if number not in self._done]
        for number in news - self._own:  # of what we fed ourselves its owner has not moved
            self._moved_s[next(iter(self._living(number)), self._me)] = now_s
        self._changed.set()
        self._changed = asyncio.Event()

    def is_second_hand(self, microbatch: Microbatch) -> bool:
        """Tell whether a number that was taken is fed again: it came back once, or its owner has not brought it."""
        number = microbatch.number
        return number in self._not_before_s or self._owners[number] != self._me

    @property
    def num_in_flight(self) -> int:
        """Numbers that were taken and are neither done nor given back."""
        return len(self._in_flight)

    @property
    def num_left(self) -> int:
        """Numbers that are not done, as far as we know."""
        return len(self._left)

    async def wait_changed(self, *, timeout_s: float) -> None:
        """Wait for a bit to be set, at most `timeout_s`."""
        changed = self._changed
        try:
            async with asyncio.timeout(timeout_s):
                await changed.wait()
        except TimeoutError:
            return

    def _living(self, number: int) -> list[PeerId]:
        """Return whose number it is, and who comes after, without those that are certainly gone."""
        return [peer for peer in self._order(number) if peer == self._me or not self._is_gone(peer)]

    def _order(self, number: int) -> tuple[PeerId, ...]:
        """Return a number's owner, and then the others as they come after each other."""
        order = self._orders.get(number)
        if order is None:
            owner = self._owners[number]
            others = rendezvous(f"{self._seed}/{number}", self._feeders)
            order = self._orders[number] = (owner, *(peer for peer in others if peer != owner))
        return order

    def _is_takeable(self, number: int, *, now_s: float) -> bool:
        if number in self._done or number in self._in_flight or self._not_before_s.get(number, 0.0) > now_s:
            return False
        order = self._living(number)
        rank = order.index(self._me) if self._me in order else len(order)
        return rank == 0 or now_s - self._moved_s[order[0]] >= rank * self._takeover_s(order[0])
