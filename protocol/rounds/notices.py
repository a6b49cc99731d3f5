"""Records that are repeated until each receiver has acknowledged them, for a while.

Owns: who still lacks which closing or commit. Must not know: what they say. Whoever is not reached in time
learns it from gossip.
"""

from __future__ import annotations

from dataclasses import dataclass

from protocol.ids import Digest, PeerId
from protocol.rounds.events import Announce, Send, Step
from protocol.rounds.messages import StageMessage


@dataclass(slots=True)
class _Notice:
    message: StageMessage
    missing: set[PeerId]
    until_s: float


class Notices:
    """The announcements of one replica. At most two or three are open at a time: a closing, a commit."""

    def __init__(self, notice_s: float) -> None:
        self._notice_s = notice_s
        self._open: dict[Digest, _Notice] = {}

    def announce(self, what: Announce, now_s: float) -> list[Step]:
        """Send to all, and remember who has not acknowledged."""
        self._open[what.key] = _Notice(what.message, set(what.to), now_s + self._notice_s)
        return [Send(peer, what.message) for peer in sorted(what.to)]

    def on_ack(self, sender: PeerId, key: Digest) -> None:
        """Stop repeating to that one."""
        if key in self._open:
            self._open[key].missing.discard(sender)

    def tick(self, now_s: float) -> list[Step]:
        """Repeat to who is missing; forget what is complete or too old."""
        self._open = {key: each for key, each in self._open.items() if each.missing and now_s < each.until_s}
        return [Send(peer, each.message) for each in self._open.values() for peer in sorted(each.missing)]
