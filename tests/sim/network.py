"""A simulated network: seeded delay, loss, duplicates and reordering; cuts between groups, one way or both.

Owns: what happens to one message between two peers, and which pairs can talk at the moment. Must not know:
what messages mean, except for their class when a plan drops a kind.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from random import Random

from protocol.ids import PeerId


@dataclass(frozen=True, slots=True, kw_only=True)
class Link:
    """How bad the network is. Reordering comes from the jitter."""

    delay_s: float = 0.02
    jitter_s: float = 0.03
    loss: float = 0.0
    duplicates: float = 0.0


@dataclass(frozen=True, slots=True)
class Cut:
    """Nothing passes from `sources` to `targets`."""

    sources: frozenset[PeerId]
    targets: frozenset[PeerId]


class Network:
    """Decides the fate of every message."""

    def __init__(self, rng: Random, link: Link) -> None:
        self._rng = rng
        self.link = link
        self.cuts: list[Cut] = []
        self.dropped_kinds: dict[str, float] = {}
        self.slowed: dict[PeerId, float] = {}
        self.num_sent = 0
        self.on_send: Callable[[PeerId, PeerId, str], None] | None = None

    def fates(self, sender: PeerId, to: PeerId, kind: str) -> Iterator[float]:
        """Yield the delay of every copy that arrives; none if the message is lost."""
        self.num_sent += 1
        if self.on_send is not None:
            self.on_send(sender, to, kind)
        if self.is_cut(sender, to):
            return
        if self._rng.random() < max(self.link.loss, self.dropped_kinds.get(kind, 0.0)):
            return
        yield self._delay_s(sender, to)
        if self._rng.random() < self.link.duplicates:
            yield self._delay_s(sender, to)

    def is_cut(self, sender: PeerId, to: PeerId) -> bool:
        """Tell whether nothing passes in this direction."""
        return any(sender in cut.sources and to in cut.targets for cut in self.cuts)

    def connects(self, one: PeerId, other: PeerId) -> bool:
        """Tell whether a stream between the two could live: both directions pass."""
        return not self.is_cut(one, other) and not self.is_cut(other, one)

    def worsen(self, **changes: float) -> None:
        """Change the quality from now on."""
        self.link = replace(self.link, **changes)

    def _delay_s(self, sender: PeerId, to: PeerId) -> float:
        slow_s = self.slowed.get(sender, 0.0) + self.slowed.get(to, 0.0)
        return self.link.delay_s + self._rng.random() * self.link.jitter_s + slow_s
