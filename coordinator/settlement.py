"""What receipts are worth: whose work both ends of its hops vouch for. Pure.

Owns: matching what peers say of each other, and adding it up. Must not know: the database, clocks, what a token is
worth (`credits.py`). The result depends on what was said only, not on the order in which it came.

A peer is credited with a microbatch at its stages if all of its hops of it are vouched for by both ends: the one
through which the microbatch came in (the feeder has none), and the one through which it went on (the last stage has
none). And never with more than the closings of the round credit it with, which add up the signed paths of the numbers
that counted: work that was done twice is paid once, and a ring that vouches for itself has to show the paths as well.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum

from coordinator.carries import FIRST_STAGE, carries_of
from protocol.ids import PeerId, RoundId, StageId
from protocol.receipts import Hop, Window

Earned = Mapping[tuple[StageId, PeerId], int]
"""Target tokens by stage and peer."""


class Quarrel(StrEnum):
    """How two ends of a hop disagree."""

    DENIED = "denied"
    """The caller says it had an answer, the callee has signed all it says and knows of none."""
    UNRECEIVED = "unreceived"
    """The callee says it answered, the caller has signed all it says and had nothing: lines break like that, too."""
    CONTRADICTED = "contradicted"
    """Both speak of the hop, and name other bytes, stages or tokens. One of them lies."""


@dataclass(frozen=True, slots=True)
class Dispute:
    """One hop that its ends do not agree on."""

    number: int
    first_stage: StageId
    caller: PeerId
    callee: PeerId
    quarrel: Quarrel


@dataclass(frozen=True, slots=True)
class Settlement:
    """What one round comes to."""

    earned: Earned
    disputes: tuple[Dispute, ...]


def settle(windows: Iterable[Window], *, caps: Earned, num_stages: int) -> Settlement:
    """Settle a round by all windows that were handed in for it, and by what its closings credit at most."""
    said = _Said()
    for window in windows:
        said.add(window)
    matched = said.sent & said.served
    return Settlement(
        earned=_capped(_earned(matched, round_id=said.round, caps=caps, num_stages=num_stages), caps),
        disputes=tuple(sorted(_disputes(said, matched), key=lambda each: (each.number, each.first_stage, each.caller))),
    )


class _Said:
    """All that anybody says of a round."""

    def __init__(self) -> None:
        self.round = RoundId(0)
        self.sent: set[Hop] = set()
        self.served: set[Hop] = set()
        self._parts: defaultdict[tuple[PeerId, int], set[int]] = defaultdict(set)
        self._num_parts: dict[tuple[PeerId, int], int] = {}

    def add(self, window: Window) -> None:
        self.round = window.round
        self.sent.update(window.sent_hops())
        self.served.update(window.served_hops())
        life = window.peer, window.session
        self._parts[life].add(window.part)
        self._num_parts[life] = max(window.parts, self._num_parts.get(life, 0))

    def finished(self) -> frozenset[PeerId]:
        """Return who has said all that it said: no part is missing."""
        missing = {life[0] for life, parts in self._parts.items() if len(parts) < self._num_parts[life]}
        return frozenset({peer for peer, _ in self._parts} - missing)


def _earned(
    matched: set[Hop], *, round_id: RoundId, caps: Earned, num_stages: int
) -> dict[tuple[StageId, PeerId], int]:
    def is_feeder(peer: PeerId) -> bool:
        return caps.get((FIRST_STAGE, peer), 0) > 0

    tokens: dict[tuple[PeerId, int, StageId], int] = {}  # a microbatch that was done twice is paid once
    for carry in carries_of(matched, round_id=round_id, num_stages=num_stages, is_feeder=is_feeder):
        tokens |= {(carry.peer, carry.number, stage): carry.target_tokens for stage in carry.stages}
    earned: defaultdict[tuple[StageId, PeerId], int] = defaultdict(int)
    for (peer, _, stage), num_tokens in tokens.items():
        earned[stage, peer] += num_tokens
    return earned


def _capped(earned: Earned, caps: Earned) -> Earned:
    capped = {place: min(tokens, caps.get(place, 0)) for place, tokens in sorted(earned.items())}
    return {place: tokens for place, tokens in capped.items() if tokens}


def _disputes(said: _Said, matched: set[Hop]) -> set[Dispute]:
    finished = said.finished()
    sent = {_place(hop) for hop in said.sent - matched}
    served = {_place(hop) for hop in said.served - matched}
    settled = {_place(hop) for hop in matched}
    found = {Dispute(*place, Quarrel.CONTRADICTED) for place in sent & served}
    found |= {Dispute(*place, Quarrel.DENIED) for place in sent - served - settled if place[3] in finished}
    found |= {Dispute(*place, Quarrel.UNRECEIVED) for place in served - sent - settled if place[2] in finished}
    return found


def _place(hop: Hop) -> tuple[int, StageId, PeerId, PeerId]:
    return hop.number, hop.first_stage, hop.caller, hop.callee
