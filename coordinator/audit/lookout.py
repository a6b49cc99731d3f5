"""Who should not go on like that: what is kept out of sight of audits, and what goes against everybody. Pure.

Owns: what is counted of everybody for that, and the words for it. Must not know: what follows (`office.py`), the
database.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from coordinator.audit.complaints import Complaints
from coordinator.audit.evasion import Evasion
from coordinator.audit.sums import Sums
from protocol.ids import PeerId, StageId

LEAST_ROUNDS, LEAST_AVERAGES, LEAST_HOPS = 8, 5, 20
NONSENSE = "most of its neighbours refuse what it sends, as it is no numbers"
SILENT = "it hands in no receipts for its work, so that nobody can look at it"
MUTE = "it does not say what it gives into averages"
CONTRARY = "what it gives into averages goes against what all others give, again and again"
UNSTEADY = "it says of most of its work that nobody can do it again"
CLAIMING = "it claims more work than it is credited with, again and again"
UNTOLD = "it gives more into averages than what it tells of, or lets anybody do again, again and again"
ALONE = (SILENT, UNTOLD)
"""Nobody else sees anything of what begins and ends at one and the same peer: it has nothing to tell then."""

EXCUSED_S = 1200.0
"""After an appeal: what is counted then is older, or may be."""

Counts = Mapping[PeerId, tuple[int, int]]
"""Of everybody how much there was, and how much of that is what is looked for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sighting:
    """Something that is held against a peer."""

    peer: PeerId
    why: str
    is_proven: bool
    """It has gone on for long enough."""


class Lookout:
    """Watches what everybody shows of its work."""

    def __init__(self, *, num_stages: int) -> None:
        self._ends = {StageId(0), StageId(num_stages - 1)}
        self._complaints = Complaints()
        self._evasions = {
            SILENT: Evasion(least=LEAST_ROUNDS),
            MUTE: Evasion(least=LEAST_ROUNDS),
            CONTRARY: Evasion(least=LEAST_AVERAGES),
            UNSTEADY: Evasion(least=LEAST_HOPS),
            CLAIMING: Evasion(least=LEAST_AVERAGES),
            UNTOLD: Evasion(least=LEAST_AVERAGES),
        }
        self._excused_s: dict[PeerId, float] = {}

    def complain(self, peer: PeerId, by: PeerId, *, now_s: float) -> None:
        """One says that another has sent nonsense."""
        self._complaints.note(peer, by, now_s=now_s)

    def is_alone(self, stages: Collection[StageId]) -> bool:
        """Tell whether who hosts these needs nobody else for a microbatch."""
        return self._ends <= {*stages}

    def start_over(self) -> None:
        """The run goes back: what was sent with the weights of before says nothing."""
        self._complaints = Complaints()

    def look(
        self,
        live: Mapping[PeerId, Collection[StageId]],
        handed_in: Counts,
        unsteady: Counts,
        sums: Sums,
        *,
        now_s: float,
    ) -> list[Sighting]:
        """Return what is held against whom; `live` says who is there, and with which stages.

        `handed_in` are rounds with and without receipts, `unsteady` microbatches that can be done again or not.
        """
        found = []
        for peer in self._complaints.accused(sides_of(live), now_s=now_s):
            self._complaints.forget(peer)
            found.append(Sighting(peer=peer, why=NONSENSE, is_proven=True))
        seen = {
            SILENT: {peer: counts for peer, counts in handed_in.items() if peer in live},
            MUTE: sums.silence(),
            CONTRARY: sums.against(),
            UNSTEADY: unsteady,
            CLAIMING: sums.claiming(),
            UNTOLD: sums.untold(),
        }
        alone = {peer for peer, stages in live.items() if self.is_alone(stages)}
        excused = {peer for peer, until_s in self._excused_s.items() if now_s < until_s}
        for why, evasion in self._evasions.items():
            passed_over = excused | alone if why in ALONE else excused
            counts = {peer: each for peer, each in seen[why].items() if peer not in passed_over}
            for peer, is_proven in evasion.look(counts, now_s=now_s).items():
                found.append(Sighting(peer=peer, why=why, is_proven=is_proven))
        return found

    def forget(self, peer: PeerId, *, now_s: float) -> None:
        """What was held against a peer was taken back: nothing is, for a while."""
        self._excused_s[peer] = now_s + EXCUSED_S
        for evasion in self._evasions.values():
            evasion.forget(peer)


def sides_of(live: Mapping[PeerId, Collection[StageId]]) -> dict[PeerId, tuple[list[PeerId], list[PeerId]]]:
    """Return for everybody who has the stages before its own, and who those behind."""
    return {
        peer: (
            [other for other, theirs in live.items() if theirs and stages and max(theirs) + 1 == min(stages)],
            [other for other, theirs in live.items() if theirs and stages and min(theirs) == max(stages) + 1],
        )
        for peer, stages in live.items()
    }
