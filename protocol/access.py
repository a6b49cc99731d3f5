"""Who may come in: passes, what was revoked, and how much each caller may ask for. Pure.

Owns: the revocation list, and `Door`, which every process of a run keeps: what it has been shown, who is banned, how
often who has knocked. Must not know: streams (`transport/streams.py` asks it about every one that is opened), why
somebody was banned.

A pass is the coordinator's signed word that a peer takes part (`records.py`). Whoever is called wants to see it once;
then the caller's streams are let in as long as the pass is valid. So nobody needs the coordinator to know its callers,
and who has no pass reaches nothing but the handlers that are open to all, slowly. What must end before a pass does is
on the revocation list: signed, numbered, handed on by everybody who has a newer one than the other.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated

from pydantic import Field

from protocol.errors import PeerFault, RefusedError
from protocol.ids import PeerId, RunId
from protocol.records import CLOCK_SLACK_S, check_admission
from protocol.signing import MAX_PEER_ID_CHARS, Signed, SigningKey, seal, unseal
from protocol.wire import Message

REVOCATION_CONTEXT = "revocations"
MAX_REVOKED = 3072  # of 52 characters each: a list that fits a message
MAX_GUESTS = 65_536  # passes kept in mind
MAX_STRANGERS = 4096  # callers without one whose knocking is counted one by one

GUEST_RATE, GUEST_BURST = 500.0, 2000.0
"""Streams per second that an admitted caller may open, and how many at once: what tiny rounds on one machine need."""
STRANGER_RATE, STRANGER_BURST = 4.0, 40.0
ALL_STRANGERS_RATE, ALL_STRANGERS_BURST = 200.0, 400.0
"""Of all callers without a pass together: an identity costs them nothing."""

_Peer = Annotated[PeerId, Field(min_length=1, max_length=MAX_PEER_ID_CHARS)]


class Revocations(Message):
    """Whom the coordinator has banned. The higher number wins; it only grows.

    Nothing is decided by `issued_s`, since clocks differ: it is there for people who compare lists.
    """

    run: RunId
    number: Annotated[int, Field(ge=0, lt=1 << 63)]
    issued_s: Annotated[float, Field(ge=0)]
    peers: Annotated[tuple[_Peer, ...], Field(max_length=MAX_REVOKED)]


@dataclass(slots=True)
class Allowance:
    """A token bucket: `rate` per second, `burst` at once."""

    rate: float
    burst: float
    left: float
    at_s: float

    def take(self, now_s: float) -> bool:
        """Take one, if there is one."""
        return self.take_some(1, now_s) == 1

    def take_some(self, most: int, now_s: float) -> int:
        """Take as many as there are, `most` at most; return how many."""
        self.left = min(self.burst, self.left + max(0.0, now_s - self.at_s) * self.rate)
        self.at_s = now_s
        taken = min(most, int(self.left))
        self.left -= taken
        return taken


@dataclass(slots=True)
class _Guest:
    expires_s: float
    allowance: Allowance


class Door:
    """One process's view of who may come in. The coordinator is always let in."""

    def __init__(
        self,
        run: RunId,
        coordinator: PeerId,
        *,
        clock: Callable[[], float] = time.time,
        monotonic: Callable[[], float] = time.monotonic,
        refusal: Callable[[PeerId], RefusedError | None] | None = None,
    ) -> None:
        """`clock` gives Unix seconds. Who is banned is not let in at all, or hears why by `refusal`."""
        self._refusal = refusal
        self._run = run
        self.coordinator = coordinator
        self._clock = clock
        self._monotonic = monotonic
        self._guests: OrderedDict[PeerId, _Guest] = OrderedDict()
        self._strangers: OrderedDict[PeerId, Allowance] = OrderedDict()
        self._all_strangers = Allowance(ALL_STRANGERS_RATE, ALL_STRANGERS_BURST, ALL_STRANGERS_BURST, monotonic())
        self.revoked: Signed | None = None
        """The newest revocation list that we have seen."""
        self.number = 0
        """Of that list."""
        self.banned: frozenset[PeerId] = frozenset()
        self.on_banned: list[Callable[[frozenset[PeerId]], None]] = []
        """Who wants to hear of every new list."""

    def show(self, caller: PeerId, admission: Signed) -> None:
        """Let a caller in who shows its pass.

        Raises `PeerFault` if that does not let it in now, `RefusedError` if the caller is banned.
        """
        if caller in self.banned:
            raise (self._refusal and self._refusal(caller)) or RefusedError(f"{caller} is banned.")
        now_s = self._clock()
        shown = check_admission(admission, run=self._run, coordinator=self.coordinator, peer=caller, now_s=now_s)
        known = self._guests.pop(caller, None)
        expires_s = shown.expires_s + CLOCK_SLACK_S
        fresh = Allowance(GUEST_RATE, GUEST_BURST, GUEST_BURST, self._monotonic())
        # two of its calls may have crossed: the older pass takes nothing away
        self._guests[caller] = (
            _Guest(expires_s, fresh) if known is None else _Guest(max(expires_s, known.expires_s), known.allowance)
        )
        while len(self._guests) > MAX_GUESTS:
            self._guests.popitem(last=False)

    def is_admitted(self, caller: PeerId) -> bool:
        """Tell whether a caller has shown a pass that is still good."""
        if caller == self.coordinator:
            return True
        guest = self._guests.get(caller)
        return guest is not None and caller not in self.banned and self._clock() <= guest.expires_s

    def knock(self, caller: PeerId) -> bool:
        """Count a stream that a caller opens; False if it, or all strangers together, have opened too many lately."""
        now_s = self._monotonic()
        if caller == self.coordinator:
            return True
        if caller in self.banned and self._refusal is None:
            return False
        if self.is_admitted(caller):
            return self._guests[caller].allowance.take(now_s)
        own = self._strangers.pop(caller, None) or Allowance(STRANGER_RATE, STRANGER_BURST, STRANGER_BURST, now_s)
        self._strangers[caller] = own
        while len(self._strangers) > MAX_STRANGERS:
            self._strangers.popitem(last=False)
        return own.take(now_s) and self._all_strangers.take(now_s)

    def learn(self, signed: Signed) -> bool:
        """Take over a revocation list if it is newer than ours; tell whether it was. Raises `PeerFault` for none."""
        if signed == self.revoked:
            return False
        revocations = unseal(signed, REVOCATION_CONTEXT, Revocations, signer=self.coordinator)
        if revocations.run != self._run:
            raise PeerFault("that revocation list is of another run")
        if self.revoked is not None and revocations.number <= self.number:
            return False
        self.revoked, self.number, self.banned = signed, revocations.number, frozenset(revocations.peers)
        for hear in self.on_banned:
            hear(self.banned)
        return True


def revoke(key: SigningKey, *, run: RunId, number: int, issued_s: float, peers: tuple[PeerId, ...]) -> Signed:
    """Sign a revocation list with the coordinator's key."""
    return seal(key, REVOCATION_CONTEXT, Revocations(run=run, number=number, issued_s=issued_s, peers=peers))
