"""Who works on which stage right now, as this peer sees it.

Owns: for every stage the newest membership (from charters and commits, verified by whoever calls
`learn`), and which peers did not answer, or take tasks, lately. Must not know: how a commit comes about. The router
draws from it, the feeder takes its weights from it, the rounds driver keeps it fresh.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from protocol.ids import Lineage, PeerId, RoundId, StageId, Version

SUSPECT_S = 5.0  # a peer that did not answer, or refused, is passed over this long, if there is another


@dataclass(frozen=True, slots=True, kw_only=True)
class Membership:
    """The replicas of one stage after its last commit (or charter)."""

    stage: StageId
    generation: int
    """Of the charter that began the lineage; a higher one wins over any version."""
    round: RoundId
    """The round that these members work on."""
    version: Version
    lineage: Lineage
    members: Mapping[PeerId, float]
    """What each weighs against the others: by its speed at the first stage, by what it did at the others."""

    def is_newer_than(self, other: Membership) -> bool:
        return (self.generation, self.round, self.version) > (other.generation, other.round, other.version)


class View:
    """The newest memberships, by stage."""

    def __init__(self) -> None:
        self._stages: dict[StageId, Membership] = {}
        self._suspects: dict[PeerId, float] = {}
        self._passed_over: dict[PeerId, float] = {}
        self._gone: set[PeerId] = set()
        self._changed = asyncio.Event()
        self.on_change: Callable[[], None] = lambda: None
        """Called after every newly learnt membership."""

    def learn(self, membership: Membership) -> bool:
        """Take over a membership if it is newer than what is known; tell whether it was."""
        known = self._stages.get(membership.stage)
        if known is not None and not membership.is_newer_than(known):
            return False
        self._stages[membership.stage] = membership
        for peer in membership.members:  # a peer that took part in a commit is alive
            self._suspects.pop(peer, None)
            self._passed_over.pop(peer, None)
            self._gone.discard(peer)
        self._notify()
        self.on_change()
        return True

    def forget(self, stage: StageId) -> None:
        """Forget a stage's membership: it was of a lineage that does not go on, and the next one may be older."""
        self._stages.pop(stage, None)

    def membership(self, stage: StageId) -> Membership | None:
        """Return the newest membership of a stage, or None if nothing is known yet."""
        return self._stages.get(stage)

    def live_members(self, stage: StageId, *, now_s: float) -> Mapping[PeerId, float]:
        """Return the members without those that are passed over; all of them if nobody else is left."""
        known = self._stages.get(stage)
        if known is None:
            return {}
        live = {peer: weight for peer, weight in known.members.items() if not self._is_passed_over(peer, now_s)}
        return live or known.members

    def has_live(self, stage: StageId, *, now_s: float) -> bool:
        """Tell whether a stage has a member that is not passed over."""
        known = self._stages.get(stage)
        return known is not None and any(not self._is_passed_over(peer, now_s) for peer in known.members)

    def suspect(self, peer: PeerId, *, now_s: float) -> None:
        """Note that `peer` did not answer: others should hear of it."""
        self._suspects[peer] = now_s + SUSPECT_S
        self.pass_over(peer, now_s=now_s)

    def note_gone(self, peer: PeerId, *, now_s: float) -> None:
        """Note that `peer`'s own machine says that its process is gone. It is until a commit names it again."""
        self._gone.add(peer)
        self.suspect(peer, now_s=now_s)

    def is_gone(self, peer: PeerId) -> bool:
        """Tell whether there is certainly nobody who works under that name."""
        return peer in self._gone

    def pass_over(self, peer: PeerId, *, now_s: float) -> None:
        """Try others first for a while: `peer` answers, but does not take tasks."""
        self._passed_over[peer] = now_s + SUSPECT_S

    def suspects(self, *, now_s: float) -> tuple[PeerId, ...]:
        """Return who did not answer lately."""
        self._suspects = {peer: until_s for peer, until_s in self._suspects.items() if until_s > now_s}
        return tuple(self._suspects)

    async def wait_changed(self, *, timeout_s: float) -> None:
        """Wait for any membership to change, at most `timeout_s`."""
        changed = self._changed
        try:
            async with asyncio.timeout(timeout_s):
                await changed.wait()
        except TimeoutError:
            return

    def _is_passed_over(self, peer: PeerId, now_s: float) -> bool:
        return self._passed_over.get(peer, 0.0) > now_s

    def _notify(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()
