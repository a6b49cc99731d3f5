"""The closings that a replica has heard: which rounds are over, and who is believed about it.

Owns: the checks on a closing, and the newest few. Must not know: what a closing sets in motion.
"""

from __future__ import annotations

from collections.abc import Collection

from protocol.errors import PeerFault
from protocol.ids import PeerId, RoundId, StageId
from protocol.rounds.events import Report, Trouble
from protocol.rounds.messages import CLOSING_CONTEXT, Closing
from protocol.rounds.neighbours import Neighbours
from protocol.rounds.settings import RoundSize, Settings
from protocol.rounds.slot import HeardClosing
from protocol.signing import Signed

FIRST_STAGE = StageId(0)  # its members feed the run and keep its clock
CLOSINGS_KEPT = 16  # for those who missed one; a later closing covers the earlier ones


class Closings:
    """What is over. Two clocks may close one round differently: the first one heard is kept (0005)."""

    def __init__(self, settings: Settings, neighbours: Neighbours) -> None:
        self._settings = settings
        self._neighbours = neighbours
        self._heard: dict[RoundId, HeardClosing] = {}

    @property
    def newest_round(self) -> int:
        """-1 if none."""
        return max(self._heard, default=-1)

    @property
    def newest(self) -> Signed | None:
        return max(self._heard.items())[1].signed if self._heard else None

    def since(self, round_id: RoundId) -> dict[RoundId, HeardClosing]:
        """Return those of this round and later ones."""
        return {number: heard for number, heard in self._heard.items() if number >= round_id}

    def has(self, signed: Signed) -> bool:
        """Tell whether we hold a closing of that round, be it another one."""
        closing = self._settings.notary.unseal(signed, CLOSING_CONTEXT, Closing)
        return closing.round in self._heard or closing.round < self.newest_round

    def add(self, signed: Signed, members: Collection[PeerId]) -> HeardClosing | Report:
        """Keep a closing, or say what is strange about it. Raises `PeerFault` if it is none of this run.

        `members` are those of our own stage, who are clocks if it is the first.
        """
        settings = self._settings
        closing = settings.notary.unseal(signed, CLOSING_CONTEXT, Closing)
        if closing.run != settings.run:
            raise PeerFault("that closing is of another run")
        if settings.rules.size_of(closing.round) != RoundSize(closing.num_train, closing.num_eval):
            raise PeerFault(f"round {closing.round} has other numbers than its closing says")
        heard = HeardClosing(closing, signed)
        if heard in self._heard.values():
            return heard
        clocks = {*self._neighbours.hosts(FIRST_STAGE), settings.me.peer}
        if settings.stage == FIRST_STAGE:
            clocks.update(members)
        if signed.signer not in clocks or signed.signer in self._neighbours.banned:
            return Report(Trouble.STRANGE_CLOCK, signed.signer, f"closing of round {closing.round}")
        heard = self._heard.setdefault(closing.round, heard)
        while len(self._heard) > CLOSINGS_KEPT:
            del self._heard[min(self._heard)]
        return heard
