"""A simulated all-reduce: everybody joins, everybody ends with the same bytes or an error, at their own moment.

Owns: the groups under way. A member that dies late may leave some with the sum and others without, which is
what makes commits necessary at all.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from protocol.ids import Digest, PeerId, digest
from protocol.rounds.events import ReduceDone, ReduceFailed, StartReduce

if TYPE_CHECKING:
    from tests.sim.replica import Replica
    from tests.sim.world import World

JOIN_TIMEOUT_S = 2.5  # a member that does not join in time is named
Entry = tuple[int, int, int]
"""(round, number, tokens) of one accumulated microbatch."""


@dataclass(frozen=True, slots=True)
class Sum:
    """Update bytes: what they are made of, so that the books can be checked."""

    digest: Digest
    norm: float
    parts: tuple[tuple[PeerId, tuple[Entry, ...]], ...]


@dataclass(slots=True)
class _Group:
    start: StartReduce
    joined: dict[PeerId, tuple[Replica, int, tuple[Entry, ...]]] = field(default_factory=dict)
    ended: set[PeerId] = field(default_factory=set)


class Reduces:
    """All groups of the world."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._groups: dict[Digest, _Group] = {}
        self.broken_links: set[frozenset[PeerId]] = set()
        self.fail_next = 0
        self.corrupt: set[PeerId] = set()
        self.wrong_norm: dict[PeerId, float] = {}

    def join(self, replica: Replica, start: StartReduce, entries: tuple[Entry, ...]) -> None:
        """Take part; the end comes as an event."""
        group = self._groups.setdefault(start.group_id, _Group(start))
        me = replica.process.name
        group.joined[me] = (replica, replica.process.session, entries)
        if len(group.joined) == len(start.group):
            for name in group.joined:
                self._schedule_end(group, name)
        else:
            replica.process.later(JOIN_TIMEOUT_S, lambda: self._give_up(group, me))

    def abort(self, replica: Replica, group_id: Digest) -> None:
        """Forget that this one waits for an end."""
        if group_id in self._groups:
            self._groups[group_id].ended.add(replica.process.name)

    def _schedule_end(self, group: _Group, name: PeerId) -> None:
        replica = group.joined[name][0]
        took_s = self._world.options.reduce_s * self._world.rng.uniform(0.8, 1.2)
        replica.process.later(took_s, lambda: self._end(group, name))

    def _give_up(self, group: _Group, name: PeerId) -> None:
        missing = [each.peer for each in group.start.group if each.peer not in group.joined]
        if missing:
            self._fail(group, name, missing[0])

    def _end(self, group: _Group, name: PeerId) -> None:
        if name in group.ended:
            return
        if self.fail_next > 0:
            self.fail_next -= 1
            self._fail(group, name, None)
            return
        for other, (replica, session, _) in group.joined.items():
            dead = not replica.process.alive or replica.process.session != session or replica.process.paused
            broken = frozenset((name, other)) in self.broken_links or not self._world.network.connects(name, other)
            if other != name and (dead or broken):
                self._fail(group, name, other)
                return
        group.ended.add(name)
        total = self._sum(group, name)
        replica = group.joined[name][0]
        replica.staged = {total.digest}
        noise = 1.0 + self._world.options.norm_noise * self._world.rng.uniform(-1.0, 1.0)
        norm = total.norm * noise * self.wrong_norm.get(name, 1.0)
        replica.feed(ReduceDone(group.start.group_id, total.digest, norm))

    def _fail(self, group: _Group, name: PeerId, suspect: PeerId | None) -> None:
        if name not in group.ended:
            group.ended.add(name)
            event = ReduceFailed(group.start.group_id, "somebody is missing", suspect)
            group.joined[name][0].feed(event)

    def _sum(self, group: _Group, name: PeerId) -> Sum:
        parts = tuple((each.peer, group.joined[each.peer][2]) for each in group.start.group)
        salt = name.encode() if name in self.corrupt else b""
        total = Sum(digest(repr(parts).encode(), salt), 0.5 * sum(len(entries) for _, entries in parts), parts)
        self._world.sums[total.digest] = total
        return total
