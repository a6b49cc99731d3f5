"""The closings that a replica has heard: which rounds are over, and who is believed about it.

Owns: the checks on a closing, and the newest few. Must not know: what a closing sets in motion.
"""

from __future__ import annotations

from dataclasses import dataclass

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
MAX_LEAP = 4  # rounds ahead of ours; a peer that works seldom misses as many, and a lone liar can skip no more


@dataclass(frozen=True, slots=True)
class Word:
    """Who has brought a closing, and where we stood then."""

    sender: PeerId
    now_s: float
    members: tuple[PeerId, ...] = ()
    """Of our own stage, who are clocks if it is the first."""
    open_round: int = 0
    """The one whose tasks we take, or would take if we had a seat."""


class Closings:
    """What is over. Two clocks may close one round differently: the first one heard is kept (0005)."""

    def __init__(self, settings: Settings, neighbours: Neighbours) -> None:
        self._settings = settings
        self._neighbours = neighbours
        self._heard: dict[RoundId, HeardClosing] = {}
        self._far: dict[PeerId, tuple[RoundId, float]] = {}
        """Who says which round far ahead is over, the farthest of each, and since when."""

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

    def add(self, signed: Signed, word: Word) -> HeardClosing | Report:
        """Keep a closing, or say what is strange about it. Raises `PeerFault` if it is none of this run.

        The cheap checks come first: everybody repeats closings, and anybody can make one up.
        """
        for known in self._heard.values():
            if known.signed.payload == signed.payload:
                return known
        if signed.signer not in self._clocks(word) or signed.signer in self._neighbours.banned:
            return Report(Trouble.STRANGE_CLOCK, signed.signer, "it has signed a closing")
        closing = self._read(signed)
        if not self._is_vouched_for(closing.round, signed.signer, word):
            return Report(Trouble.STRANGE_CLOCK, signed.signer, f"only it has closed round {closing.round}")
        heard = self._heard.setdefault(closing.round, HeardClosing(closing, signed))
        while len(self._heard) > CLOSINGS_KEPT:
            del self._heard[min(self._heard)]
        return heard

    # -- checks ------------------------------------------------------------------------------------

    def _clocks(self, word: Word) -> set[PeerId]:
        clocks = {*self._neighbours.hosts(FIRST_STAGE), self._settings.me.peer}
        return clocks | set(word.members) if self._settings.stage == FIRST_STAGE else clocks

    def _read(self, signed: Signed) -> Closing:
        settings = self._settings
        closing = settings.notary.unseal(signed, CLOSING_CONTEXT, Closing)
        last_round = settings.rules.last_round
        if closing.run != settings.run:
            raise PeerFault("that closing is of another run")
        if last_round is not None and closing.round > last_round:
            raise PeerFault(f"the run has no round {closing.round}")
        if settings.rules.size_of(closing.round) != RoundSize(closing.num_train, closing.num_eval):
            raise PeerFault(f"round {closing.round} has other numbers than its closing says")
        if max([closing.target_tokens, *closing.carried.values()]) > settings.rules.tokens_per_round:
            raise PeerFault(f"round {closing.round} has fewer tokens than its closing counts or credits")
        return closing

    def _is_vouched_for(self, round_id: RoundId, signer: PeerId, word: Word) -> bool:
        """Tell whether a round is near, or known to be over by more than one peer: the signer, and who passed it on.

        A member of stage 0 that closes a round far ahead would end the run for everybody. Who was away for long
        hears of such a round from others, too. One source is enough if it is all there is of stage 0, which has the
        say anyway, or if no nearer closing has come for as long as a round may last.
        """
        settings, me = self._settings, self._settings.me.peer
        if round_id <= word.open_round + MAX_LEAP:
            self._far.clear()
            return True
        if settings.stage != FIRST_STAGE and self._clocks(word) <= {signer, me}:
            return True
        known = {*self._neighbours.everybody(), *word.members} - {me}
        for source in {signer, word.sender} & known:
            farthest, since_s = self._far.get(source, (round_id, word.now_s))
            self._far[source] = (max(farthest, round_id), since_s)
        since = [since_s for farthest, since_s in self._far.values() if farthest >= round_id - MAX_LEAP]
        return len(since) > 1 or word.now_s - min(since, default=word.now_s) >= settings.timers.round_deadline_s
