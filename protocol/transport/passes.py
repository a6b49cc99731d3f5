"""Showing passes: ours to whom we call, others' to our door.

Owns: the messages of it, when it is shown again, and handing on the revocation list. Must not know: what a pass means
(`protocol/access.py`). Coordinator and peers serve it alike; only peers have a pass to show.
"""

from __future__ import annotations

import asyncio
import random
import time
from typing import Annotated, Any

import structlog
from pydantic import Field

from protocol.access import MAX_GUESTS, Allowance, Door
from protocol.errors import BusyError, PeerFault, RefusedError, TransientError
from protocol.ids import PeerId
from protocol.signing import Signed
from protocol.transport.calls import Calls, Done
from protocol.transport.streams import Streams
from protocol.wire import Message

log = structlog.get_logger()

SHOW_TIMEOUT_S = 10.0
MAX_KNOWN = MAX_GUESTS  # peers of whom we remember what they were shown; who is forgotten is shown it again
HAND_ON_RATE, HAND_ON_BURST = 1.0, 8.0
"""Lists per second that we look at from each: honest peers hand a list on once, and a signature costs a millisecond."""
HANDED_ON_TO = 4  # peers that hear of a new revocation list from each who learns it: with beats, far more than enough


class ShowPass(Message):
    """This is my pass. `number` is that of the newest revocation list that I know."""

    admission: Signed
    number: Annotated[int, Field(ge=0)]


class Seen(Message):
    """You are in. If your revocation list is older than ours, here it is; if it is newer, hand it on."""

    number: Annotated[int, Field(ge=0)]
    revoked: Signed | None = None


class HandOn(Message):
    """A revocation list that you do not have."""

    revoked: Signed


class Passes:
    """Shows our pass to everybody whom we call, once, and looks at what others show."""

    def __init__(self, calls: Calls, streams: Streams, door: Door, *, me: PeerId) -> None:
        self.door = door
        self._calls = calls
        self._me = me
        self._shown: dict[PeerId, Signed] = {}
        self._showing: dict[PeerId, asyncio.Task[None]] = {}
        self._handed: dict[PeerId, int] = {}
        """Who was given which revocation list: nobody gets one twice, whatever it says of itself."""
        self._hearing: dict[PeerId, Allowance] = {}
        """Of whom we look at how many lists."""
        self._handing: set[asyncio.Task[None]] = set()
        self.own: Signed | None = None
        """Our newest pass, once we have one."""
        streams.introduce = self.introduce
        streams.on_stranger = self.forget
        door.on_banned.append(streams.hang_up_on)

    def serve(self) -> None:
        """Look at what is shown from now on."""
        self._calls.on(ShowPass, self._on_show, open_to_all=True)
        self._calls.on(HandOn, self._on_hand_on)

    async def introduce(self, peer: PeerId) -> None:
        """Show our pass to a peer that has not seen it. Raises what the call raises if it cannot be shown.

        Everybody who waits for the same peer waits for the same call, and no longer than that.
        """
        if self.own is None or peer == self._me or self._shown.get(peer) == self.own:
            return
        showing = self._showing.get(peer)
        if showing is None:
            showing = self._showing[peer] = asyncio.create_task(self._show(peer))
            showing.add_done_callback(lambda task: self._end_showing(peer, task))
        await asyncio.shield(showing)

    async def _show(self, peer: PeerId) -> None:
        own = self.own
        assert own is not None, "it is never taken back"
        shown = ShowPass(admission=own, number=self.door.number)
        seen = await self._calls.call(peer, shown, Seen, timeout_s=SHOW_TIMEOUT_S, introduced=False)
        self._shown.pop(peer, None)  # the newest last
        self._shown[peer] = own
        _prune(self._shown)
        if seen.revoked is not None:
            try:
                self.learn(seen.revoked)
            except PeerFault as fault:  # it is in, whatever else it says
                log.info("revocations.refused", peer=peer, error=fault.one_line())
        elif seen.number < self.door.number:
            self._hand_on(peer)

    def _end_showing(self, peer: PeerId, task: asyncio.Task[None]) -> None:
        self._showing.pop(peer, None)
        if not task.cancelled():
            task.exception()  # who waited has it; nobody may have

    def learn(self, revoked: Signed) -> None:
        """Take over a revocation list, from whomever, and hand a new one on. Raises `PeerFault` if it is none."""
        if self.door.learn(revoked):
            known = [peer for peer in self._shown if peer not in self.door.banned and peer != self.door.coordinator]
            for peer in random.sample(known, min(len(known), HANDED_ON_TO)):
                self._hand_on(peer)

    def forget(self, peer: PeerId) -> None:
        """A peer does not know us (any more): it will be shown our pass again."""
        self._shown.pop(peer, None)

    async def _on_show(self, caller: PeerId, shown: ShowPass) -> Seen:
        self.door.show(caller, shown.admission)
        is_behind = shown.number < self.door.number
        return Seen(number=self.door.number, revoked=self.door.revoked if is_behind else None)

    async def _on_hand_on(self, caller: PeerId, handed: HandOn) -> Done:
        now_s = time.monotonic()
        fresh = Allowance(HAND_ON_RATE, HAND_ON_BURST, HAND_ON_BURST, now_s)
        allowance = self._hearing[caller] = self._hearing.pop(caller, fresh)
        _prune(self._hearing)
        if handed.revoked != self.door.revoked and not allowance.take(now_s):
            raise BusyError("too many revocation lists", retry_after_s=1 / HAND_ON_RATE)
        self.learn(handed.revoked)
        return Done()

    def _hand_on(self, peer: PeerId) -> None:
        if self._handed.get(peer, -1) >= self.door.number:
            return
        self._handed[peer] = self.door.number
        _prune(self._handed)
        task = asyncio.create_task(self._tell(peer))
        self._handing.add(task)
        task.add_done_callback(self._handing.discard)

    async def _tell(self, peer: PeerId) -> None:
        assert self.door.revoked is not None, "its number is above another's"
        try:
            await self._calls.tell(peer, HandOn(revoked=self.door.revoked), timeout_s=SHOW_TIMEOUT_S, introduced=False)
        except (TransientError, PeerFault, RefusedError) as error:  # it will hear of it from others
            log.debug("revocations.undelivered", peer=peer, error=error.one_line())


def _prune(known: dict[PeerId, Any]) -> None:
    while len(known) > MAX_KNOWN:
        del known[next(iter(known))]
