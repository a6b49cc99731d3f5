"""How many microbatches a peer keeps under way: so many that the waves of the peers behind it fill, if it has room.

Owns: the waves that others announce, and the arithmetic. Must not know: how they are announced (the DHT's records),
what a microbatch takes. Where everybody's stages fit their device, there are no waves to fill, and nothing is wanted.

A stage can hold back two waves that lack one microbatch each: of what goes on, and of the gradients that come back. If
all that is under way is held back like that somewhere, everybody waits for everybody. So what is wanted is two waves of
every stage, all together, on top of what keeps this peer itself busy; then one of them always fills.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from peer.pipeline.view import View
from protocol.ids import PeerId, StageId

WAVES = 2  # of a stage: one passes while the next one gathers; or both gather, one in each direction


class Demand:
    """What is wanted of one replica of the stage `last`, which all that go on to the stages behind it pass."""

    def __init__(self, view: View, *, last: StageId) -> None:
        self._view = view
        self._last = last
        self._waves: dict[StageId, Mapping[PeerId, int]] = {}
        self.wanted = 0
        """How many microbatches the others would have this peer keep under way, by what is known of them."""

    def learn(self, waves: Mapping[StageId, Mapping[PeerId, int]]) -> None:
        """Take over what the peers of each stage announce. Of a stage that is not among them, the last word stands."""
        self._waves |= waves
        self.wanted = sum(self._wanted_by(stage, known) for stage, known in self._waves.items() if stage > self._last)

    def wave_of(self, stage: StageId, peer: PeerId) -> int:
        """Return what a peer of a stage announces; 1 as long as it is unknown."""
        return self._waves.get(stage, {}).get(peer, 1)

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
        return max(1, min(self.most, self.own + self.demand.wanted))
