"""What a peer says it has put into an average, and the microbatches that this should be the sum of. Pure.

Owns: which microbatches stand for a contribution, and how far it may be from their sum. Must not know: who recomputes
them (`auditors.py`), how a case is judged (`court.py`).

Some of what a peer tells of its work its neighbours may not tell alike: one of the two is silent, or lies. If that kept
a contribution from being looked at, one microbatch a round would hide whatever somebody likes. So the rest is
recomputed, and what is missing is allowed for: gradients of microbatches have norms of about one size, and those of k
that have little in common add up to one of sqrt(k) times that. So a part `hidden` of the tokens makes a difference of
sqrt(hidden / known) times the sum of the others; twice as much is let pass.
"""

from __future__ import annotations

import itertools
import math
from collections import defaultdict, deque
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial

from coordinator.audit.by_peer import ByPeer
from coordinator.audit.sums import Given
from coordinator.carries import Carry, Told
from protocol.audits import MAX_WORKS
from protocol.ids import PeerId, RoundId, StageId, Version
from protocol.sketch import folded

MAX_HIDDEN = 0.35
"""Of the tokens: more than one of three neighbours can hide."""
LATELY_S, LEAST_ROUNDS, MAX_REMEMBERED = 3600.0, 3, 16
SPREAD = 2.0
"""So many times what is usual the norm of the hidden sum may be."""
MAX_LIARS = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Contributed:
    """What a peer says it has put into an average at one stage, and the microbatches that are recomputed for it."""

    stage: StageId
    sketch: bytes
    works: tuple[Carry, ...]
    slack: float = 0.0
    """How far it may be from their sum because of others that are not known; relative."""
    contradicted_by: frozenset[PeerId] = frozenset()
    """Whose word, or whose silence, hides the others."""

    def seen(self, sketch: bytes) -> bytes:
        """Return a sketch as it is compared: piece by piece, or as a whole if there is slack, which is of the whole."""
        return folded(sketch) if self.slack else sketch


_Wrong = tuple[float, RoundId, frozenset[PeerId], int]
"""When, of which round, who was in contradiction with the peer, and how many neighbours it had on a side, at least."""


class Wrongs(ByPeer[deque[_Wrong]]):
    """Contributions with a hidden part that were found wrong, and who may have caused that besides their givers.

    A neighbour can send something odd, which an honest peer passes into its sum, and hide that hop: it is in all of
    such findings then, or one of a few that lie together is. Whoever hides its own work has it with one neighbour after
    the other.
    """

    def __init__(self) -> None:
        super().__init__(partial(deque, maxlen=MAX_REMEMBERED))

    def note(
        self, peer: PeerId, round_id: RoundId, others: frozenset[PeerId], *, num_neighbours: int, now_s: float
    ) -> None:
        """Take a finding, and who is in contradiction with the peer in that round."""
        self.of(peer).append((now_s, round_id, others, num_neighbours))

    def is_liar(self, peer: PeerId, *, now_s: float) -> bool:
        """Tell whether more others than may lie would have to, half of the smaller neighbouring stage at most.

        That stage as it was at the largest of the findings: nobody is framed by who leaves afterwards.

        What is hidden without a contradiction somebody may have caused who is not known: it does not count.
        """
        recent = [each for each in self.of(peer) if now_s - each[0] < LATELY_S]
        found = {round_id: others for _, round_id, others, _ in recent}
        lately = [others for others in found.values() if others]
        if len(lately) < LEAST_ROUNDS:
            return False
        accused, num_neighbours = frozenset().union(*lately), max(each[3] for each in recent)
        num_liars = min(max(1, num_neighbours // 2), len(accused), MAX_LIARS)
        return not any(
            all(others.intersection(few) for others in lately)
            for few in itertools.combinations(sorted(accused), num_liars)
        )


def contributed(stage: StageId, given: Given, told: Told, works: Iterable[Carry]) -> Contributed | None:
    """Return what of a contribution can be looked at; None if that is too little.

    `told` is what the peer itself says of its work at the stage in that round, `works` what all sides say alike. Done
    with other weights than most it counts as hidden; so does what is beyond `MAX_WORKS` microbatches.
    """
    alike: defaultdict[tuple[int, int, Version | None], list[Carry]] = defaultdict(list)
    for carry in works:
        alike[carry.first_stage, carry.num_stages, carry.version].append(carry)
    most = max(alike.values(), key=lambda each: sum(carry.target_tokens for carry in each), default=[])
    known = tuple(most[:MAX_WORKS])
    known_tokens = sum(carry.target_tokens for carry in known)
    hidden = max(abs(given.tokens - known_tokens), told.tokens - known_tokens)
    if not known_tokens or hidden > MAX_HIDDEN * given.tokens:  # held against it elsewhere, if it is by its own word
        return None
    return Contributed(
        stage=stage,
        sketch=given.sketch,
        works=known,
        slack=SPREAD * math.sqrt(hidden / known_tokens),
        contradicted_by=told.contradicted_by,
    )
