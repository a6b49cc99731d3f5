"""What a replica knows about other peers: who hosts what, who is banned, who has died, who wants a seat.

Owns: these sets and their expiry. Must not know: ballots, lineages' contents.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

from protocol.ids import Lineage, PeerId, StageId
from protocol.rounds.events import RosterChanged
from protocol.rounds.messages import MAX_SEATS, Ready, Seat, Seats
from protocol.rounds.settings import Settings

READY_BEATS = 3  # a joiner that misses so many of its own announcements is not seated


class Neighbours:
    """Facts about others, none of them about agreement."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self.replicas: Mapping[StageId, tuple[PeerId, ...]] = {}
        self.banned: frozenset[PeerId] = frozenset()
        self.heard_s = 0.0
        """When anybody at all was last heard."""
        self.company_since_s = 0.0
        """Since when somebody has been heard again and again, with no gap as long as the patience."""
        self._dead: set[Seat] = set()
        self._refused: set[PeerId] = set()
        """Whose hosts refused the last connection, with a seat or without."""
        self._ready: dict[PeerId, tuple[Ready, float]] = {}

    def on_roster(self, event: RosterChanged) -> None:
        """Replace what the DHT and the coordinator said before."""
        self.replicas, self.banned = event.replicas, event.banned
        self._refused &= self.everybody()

    def note_session(self, seats: Seats, peer: PeerId, session: int) -> None:
        """A peer that speaks under a later session than its seat's has been restarted: that seat is dead."""
        self._dead.update(seat for seat in seats if seat.peer == peer and seat.session < session)

    def note_gone(self, seats: Seats, peer: PeerId) -> None:
        """Believe the driver that this peer's process is dead."""
        self._refused.add(peer)
        self._dead.update(seat for seat in seats if seat.peer == peer)
        self._ready.pop(peer, None)

    def note_heard(self, peer: PeerId, now_s: float) -> None:
        """Anybody said anything."""
        if now_s - self.heard_s >= self._settings.timers.patience_s:
            self.company_since_s = now_s
        self.heard_s = now_s
        self._refused.discard(peer)

    def note_alive(self, seats: Seats, peer: PeerId) -> None:
        """It spoke as the holder of its seat, so it lives."""
        self._dead.difference_update([seat for seat in seats if seat.peer == peer])

    def gone(self, seats: Seats) -> set[PeerId]:
        """Return those of `seats` that are certainly dead, or banned: nobody takes anything from those any more.

        Nobody dials them either, so we would never hear that their process has ended.
        """
        return {seat.peer for seat in seats if seat in self._dead or seat.peer in self.banned}

    def keep_only(self, seats: Seats) -> None:
        """Forget the dead of earlier rounds."""
        self._dead &= set(seats)

    def note_ready(self, sender: PeerId, ready: Ready, now_s: float) -> None:
        """Remember a joiner, wherever it stands, but no more of them than a stage has seats."""
        self._forget_silent_joiners(now_s)
        if sender not in self.banned and (sender in self._ready or len(self._ready) < MAX_SEATS):
            self._ready[sender] = (ready, now_s)

    def ready_at(self, lineage: Lineage, now_s: float) -> dict[PeerId, Ready]:
        """Return the joiners that hold the state of `lineage` and were heard lately."""
        self._forget_silent_joiners(now_s)
        return {peer: ready for peer, (ready, _) in self._ready.items() if ready.lineage == lineage}

    def listeners(self) -> set[PeerId]:
        """Return the joiners heard lately, wherever they stand: they want to hear of commits, too."""
        return set(self._ready)

    def has_listeners(self, members: Collection[PeerId]) -> bool:
        """Tell whether there may be living replicas of our stage besides its members."""
        others = {*self.hosts(self._settings.stage), *self._ready} - {*members, *self._refused}
        return bool(others)

    def hosts(self, stage: StageId) -> tuple[PeerId, ...]:
        """Return the known replicas of a stage without ourselves."""
        return tuple(peer for peer in self.replicas.get(stage, ()) if peer != self._settings.me.peer)

    def everybody(self) -> frozenset[PeerId]:
        """Return all known replicas of all stages without ourselves."""
        return frozenset(peer for stage in self.replicas for peer in self.hosts(stage))

    def _forget_silent_joiners(self, now_s: float) -> None:
        since_s = now_s - READY_BEATS * self._settings.timers.ready_s
        self._ready = {peer: (ready, at_s) for peer, (ready, at_s) in self._ready.items() if at_s >= since_s}
