"""What a peer says it has put into an average, and the microbatches that this should be the sum of. Pure.

Owns: which microbatches stand for a contribution, and how far it may be from their sum. Must not know: who recomputes
them (`auditors.py`), how a case is judged (`court.py`).

Some of what a peer worked on may not be vouched for from all sides: a neighbour is gone, or one of the two keeps it to
itself. If that kept a contribution from being looked at, one microbatch a round would hide whatever somebody likes. So
the rest is recomputed, and what is missing is allowed for: gradients of microbatches have norms of one size, and those
of k that have little in common add up to one of sqrt(k) times that. So a part `hidden` of the tokens may make a
difference of sqrt(hidden / known) times the sum of the others, a few times over. Whoever turns its sum makes one of 2.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

from coordinator.carries import Carry
from protocol.audits import MAX_WORKS
from protocol.ids import StageId, Version
from protocol.sketch import folded

MAX_HIDDEN = 0.35
"""Of the tokens: more than one of three neighbours can hide by saying nothing."""
SPREAD = 2.5
"""So many times the usual norm the hidden part may have."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Contributed:
    """What a peer says it has put into an average at one stage, and the microbatches that are recomputed for it."""

    stage: StageId
    sketch: bytes
    works: tuple[Carry, ...]
    slack: float = 0.0
    """How far it may be from their sum because of others that nobody vouches for; relative."""

    def seen(self, sketch: bytes) -> bytes:
        """Return a sketch as it is compared: piece by piece, or as a whole if there is slack, which is of the whole."""
        return folded(sketch) if self.slack else sketch


def contributed(stage: StageId, tokens: int, sketch: bytes, works: Iterable[Carry]) -> Contributed | None:
    """Return what of a contribution of so many tokens can be looked at; None if too little of it can.

    `works` is what is known of the peer's work at the stage in that round. Done with other weights than most, it counts
    as hidden; so does what is more than was counted.
    """
    alike: defaultdict[tuple[int, int, Version | None], list[Carry]] = defaultdict(list)
    for carry in works:
        alike[carry.first_stage, carry.num_stages, carry.version].append(carry)
    known = max(alike.values(), key=lambda each: sum(carry.target_tokens for carry in each), default=[])[:MAX_WORKS]
    known_tokens = sum(carry.target_tokens for carry in known)
    hidden = abs(tokens - known_tokens)
    if not known_tokens or hidden > MAX_HIDDEN * tokens:
        return None
    slack = SPREAD * math.sqrt(hidden / known_tokens)
    return Contributed(stage=stage, sketch=sketch, works=tuple(known), slack=slack)
