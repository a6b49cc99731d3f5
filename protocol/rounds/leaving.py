"""When a replica that wants to leave may do so.

Owns: the wish, and who could take over. Must not know: rounds, ballots.
"""

from __future__ import annotations

from protocol.ids import PeerId
from protocol.rounds.events import Left, Send, Step
from protocol.rounds.lineage import Chain, Link
from protocol.rounds.messages import Goodbye
from protocol.rounds.settings import Settings


class Leaving:
    """One replica's way out."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self.is_wanted = False
        self._heirs: set[PeerId] = set()

    def forget_heirs(self) -> None:
        """There is a new commit, which nobody else has applied yet as far as we know."""
        self._heirs.clear()

    def note_heir(self, peer: PeerId) -> None:
        """Somebody else has applied our head as well."""
        self._heirs.add(peer)

    def if_safe(self, chain: Chain | None, applied: Link | None) -> list[Step]:
        """Say that we may go, unless only leavers hold what the next members still have to fetch."""
        if not self.is_wanted:
            return []
        if chain is None:
            return [Left()]
        head, me = chain.head, self._settings.me.peer
        if applied is not head:
            return []
        others = {peer for peer in head.members if peer != me}
        summed = {each.peer for each in head.step.commit.contributors} if head.step is not None else others
        return [Left()] if not others or others & (summed | self._heirs) else []

    def goodbyes(self, chain: Chain | None) -> list[Step]:
        """Tell those who may still count on us that this process ends."""
        members = chain.head.members if chain is not None else ()
        goodbye = Goodbye(stage=self._settings.stage, session=self._settings.me.session)
        return [Send(peer, goodbye) for peer in members if peer != self._settings.me.peer]
