"""In which order the members of a stage conduct a round, and when so many of them are enough.

Owns: the order of stewards and clocks, and the quorum rule. Pure functions of what all members know alike,
so nobody has to be elected.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

from protocol.ids import Lineage, PeerId, RunId, StageId
from protocol.ownership import rendezvous


def steward_order(run: RunId, stage: StageId, parent: Lineage, members: Collection[PeerId]) -> tuple[PeerId, ...]:
    """Order the members for the round after `parent`: the first conducts it, the next ones stand by.

    Keyed by the lineage and not by the round number: after a void round members may for a moment disagree
    about the number, but never about the lineage.
    """
    return rendezvous(f"{run}/{stage}/{parent.hex()}", dict.fromkeys(members, 1.0))


def may_go_on(
    present: Collection[PeerId],
    order: Sequence[PeerId],
    *,
    gone: Collection[PeerId],
    has_listeners: bool,
    break_tie: bool,
) -> bool:
    """Tell whether `present` may decide at once: they are a quorum of all, or all others are certainly dead.

    The dead (`gone`) need not be waited for, but they stay in the count of the quorum: what they had accepted may
    be final with somebody who is only silent now. If they were a quorum themselves, they may even have told those
    who have no seat, and whom nobody asks.
    """
    if is_quorum(present, order, break_tie=break_tie):
        return True
    others = {peer for peer in order if peer not in present}
    return others <= set(gone) and not (has_listeners and is_quorum(others, order, break_tie=True))


def is_quorum(present: Collection[PeerId], order: Sequence[PeerId], *, break_tie: bool) -> bool:
    """Tell whether `present` may go on without the others, whatever those are doing.

    Any two quorums share a member: more than half do, and of two halves only the one with the first member
    in `order` counts. `order` names every seat, that of the dead as well. `break_tie` is false for who cannot be
    sure to have been awake all the time.
    """
    count = sum(peer in present for peer in order)
    if 2 * count == len(order):
        return break_tie and order[0] in present
    return 2 * count > len(order)
