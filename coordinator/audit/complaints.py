"""Who sends others what are no numbers, by the word of those others. Pure.

Owns: how many have to say so. Must not know: who has which stage (`office.py` says who could complain), what follows.

One witness may lie, and of what was refused nothing is left to be looked at. But who sends nonsense sends it to whoever
is there: a broken machine does not choose. So most of those of a neighbouring stage have to say it, and again
later. If many are accused the training itself has gone wrong, and nobody is to blame.
"""

from __future__ import annotations

from collections import OrderedDict, defaultdict
from collections.abc import Collection, Mapping

from protocol.ids import PeerId

REMEMBER_S = 900.0
APART_S = 20.0
"""Between the first and the last time that a witness speaks: it is no single moment, and no single message."""
LEAST_WITNESSES = 2
MOST_ACCUSED = 0.25
"""Of all who are there."""
MAX_ACCUSED_BY_ONE = 64


class Complaints:
    """What was said lately."""

    def __init__(self) -> None:
        self._said: defaultdict[PeerId, OrderedDict[PeerId, tuple[float, float]]] = defaultdict(OrderedDict)
        """By witness: whom it accuses, when first and when last."""

    def note(self, peer: PeerId, by: PeerId, *, now_s: float) -> None:
        """One says that another has sent nonsense."""
        if peer == by:
            return
        said = self._said[by]
        first_s, last_s = said.pop(peer, (now_s, now_s))
        said[peer] = (now_s if now_s - last_s > REMEMBER_S else first_s), now_s
        while len(said) > MAX_ACCUSED_BY_ONE:
            said.popitem(last=False)

    def accused(self, sides: Mapping[PeerId, Collection[Collection[PeerId]]], *, now_s: float) -> list[PeerId]:
        """Return against whom most of a side speak; `sides` are those who could, for everybody who is there."""
        by: defaultdict[PeerId, set[PeerId]] = defaultdict(set)
        for witness, said in self._said.items():
            for peer, (first_s, last_s) in said.items():
                if last_s - first_s >= APART_S and now_s - last_s <= REMEMBER_S:
                    by[peer].add(witness)
        found = [
            peer
            for peer, each in sides.items()
            if any(len(by[peer] & set(side)) >= max(LEAST_WITNESSES, len(side) // 2 + 1) for side in each)
        ]
        return found if len(found) <= max(1, int(MOST_ACCUSED * len(sides))) else []

    def forget(self, peer: PeerId) -> None:
        """It has been judged."""
        for said in self._said.values():
            said.pop(peer, None)
