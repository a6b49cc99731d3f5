"""How many microbatches a peer keeps under way: so many that the waves of the peers behind it fill, if it has room.

Owns: the waves that others announce, and the arithmetic. Must not know: how they are announced (the DHT's records),
what a microbatch takes. Where everybody's stages fit their device, there are no waves to fill, and nothing is wanted.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from peer.pipeline.view import View
from protocol.ids import PeerId, StageId

WAVES = 2  # one passes a span while the next one gathers


class Demand:
    """What is wanted of one replica of the stage `last`, which all that go on to the stages behind it pass."""

    def __init__(self, view: View, *, last: StageId) -> None:
        self._view = view
        self._last = last
        self.wanted = 0
        """How many microbatches this peer should keep under way, by what is known of the others."""

    def learn(self, waves: Mapping[StageId, Mapping[PeerId, int]]) -> None:
        """Take over what the peers of each stage announce."""
        self.wanted = max((self._wanted_by(stage, waves[stage]) for stage in waves if stage > self._last), default=0)

    def _wanted_by(self, stage: StageId, waves: Mapping[PeerId, int]) -> int:
        """Return our share of what fills the waves of a stage's members, which all replicas of ours send to."""
        known, ours = self._view.membership(stage), self._view.membership(self._last)
        members = waves if known is None else known.members
        gathering = sum(waves[peer] for peer in members if waves.get(peer, 1) > 1)
        return math.ceil(WAVES * gathering / (len(ours.members) if ours is not None and ours.members else 1))


@dataclass(frozen=True, slots=True)
class InFlight:
    """How many microbatches a peer keeps under way at the moment."""

    demand: Demand
    own: int
    """What it would by itself."""
    most: int
    """What it has room for."""

    def limit(self) -> int:
        return max(1, min(self.most, max(self.own, self.demand.wanted)))
