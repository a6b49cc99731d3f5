"""How fast the coordinator's disk may be filled by those it takes things from.

Owns: how often who may begin anew, how many newcomers there may be, how many reports are taken. Must not know: what is
in them, where it is kept. Pure but for the clock that it is given.

All of it becomes rows that are kept, and who sends them need not have worked for any. An honest peer restarts now and
then, and reports a few lines a round; what is above that waits at the sender, who keeps it until it is acknowledged.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

from protocol.access import Allowance
from protocol.errors import BusyError
from protocol.ids import PeerId

START_RATE, START_BURST = 0.1, 20.0
"""Lives per second that one peer may begin."""
NEWCOMER_RATE, NEWCOMER_BURST = 10.0, 1000.0
"""Of all peers that were never here before: an identity costs nothing."""
REPORT_RATE, REPORT_BURST = 100.0, 2000.0
"""Of one peer. After a day without a coordinator there are 20,000, which takes three minutes then."""
MAX_KNOWN = 8192  # peers whose pace is remembered; who is forgotten begins with all of it
RETRY_AFTER_S = 5.0


@dataclass(slots=True)
class _Paces:
    starts: Allowance
    reports: Allowance


class Pace:
    """What each peer, and all newcomers together, may still do now."""

    def __init__(self, monotonic: Callable[[], float]) -> None:
        self._monotonic = monotonic
        self._newcomers = Allowance(NEWCOMER_RATE, NEWCOMER_BURST, NEWCOMER_BURST, monotonic())
        self._peers: OrderedDict[PeerId, _Paces] = OrderedDict()

    def start(self, peer: PeerId, *, is_new: bool) -> None:
        """Count a new life of a peer. Raises `BusyError` if it, or the newcomers together, begin too many."""
        now_s = self._monotonic()
        if not self._of(peer).starts.take(now_s) or (is_new and not self._newcomers.take(now_s)):
            raise BusyError("too many registrations at once.", retry_after_s=RETRY_AFTER_S)

    def reports(self, peer: PeerId, num: int) -> int:
        """Return how many of `num` reports of a peer are taken now."""
        return self._of(peer).reports.take_some(num, self._monotonic())

    def _of(self, peer: PeerId) -> _Paces:
        now_s = self._monotonic()
        paces = self._peers.pop(peer, None)
        if paces is None:
            starts = Allowance(START_RATE, START_BURST, START_BURST, now_s)
            paces = _Paces(starts, Allowance(REPORT_RATE, REPORT_BURST, REPORT_BURST, now_s))
        self._peers[peer] = paces
        while len(self._peers) > MAX_KNOWN:
            self._peers.popitem(last=False)
        return paces
