"""What a peer did with one microbatch, between the hop in and the hop out: that is paid, and audited. Pure.

Owns: finding that in receipts. Must not know: what it earns (`settlement.py`), who is drawn and what came of it
(`audit/`).

A hop counts if both of its ends tell the same of it, digests included: then nobody can lay bytes at the door of a peer
that it has never seen.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

from protocol.ids import PeerId, RoundId, StageId, Version
from protocol.receipts import Hop, Window

FIRST_STAGE = StageId(0)

WorkKey = tuple[RoundId, int, PeerId, StageId]
"""Round, number, peer and first stage of a piece of work."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Carry:
    """One microbatch at one peer, between the hop in and the hop out. Digests are shortened."""

    peer: PeerId
    round: RoundId
    number: int
    first_stage: StageId
    num_stages: int
    version: Version | None
    """None if nobody has named it: that with which the round began."""
    upstream: PeerId | None
    """None at the first stage."""
    given: bytes
    returned: bytes
    downstream: PeerId | None
    """None at the last stage."""
    outputs: bytes
    gradient: bytes
    target_tokens: int = 0
    is_repeatable: bool = True
    """Whether it was done with the weights of a version, and not with some that nobody else has."""

    @property
    def key(self) -> WorkKey:
        return self.round, self.number, self.peer, self.first_stage

    @property
    def stages(self) -> tuple[StageId, ...]:
        return tuple(StageId(self.first_stage + index) for index in range(self.num_stages))

    @property
    def neighbours(self) -> frozenset[PeerId]:
        return frozenset(peer for peer in (self.upstream, self.downstream) if peer is not None)


def carries_of(
    matched: Collection[Hop], *, round_id: RoundId, num_stages: int, is_feeder: Callable[[PeerId], bool]
) -> list[Carry]:
    """Return what peers did whose hops in and out are both among those that both ends tell alike, in order.

    The last stage has no hop out. A feeder has no hop in: it is one of whom `is_feeder` says that it has stage 0.
    """
    inward = {(hop.callee, hop.number) for hop in matched}
    onward = {(hop.caller, hop.number, hop.first_stage): hop for hop in matched}
    found = []
    for hop in matched:
        behind = onward.get((hop.callee, hop.number, StageId(hop.end_stage)))
        if behind is not None or hop.end_stage == num_stages:
            found.append(_carry(round_id, num_stages, hop, None if hop.end_stage == num_stages else behind))
        if (hop.caller, hop.number) not in inward and is_feeder(hop.caller):
            found.append(_carry(round_id, num_stages, None, hop))
    return sorted(found, key=lambda carry: (*carry.key, carry.given, carry.outputs))


def _carry(round_id: RoundId, num_stages: int, inward: Hop | None, onward: Hop | None) -> Carry:
    hop = inward or onward
    assert hop is not None, "a microbatch comes in or goes out by a hop"
    first = FIRST_STAGE if inward is None else inward.first_stage
    end = num_stages if onward is None else onward.first_stage
    return Carry(
        peer=hop.caller if inward is None else hop.callee,
        round=round_id,
        number=hop.number,
        first_stage=first,
        num_stages=end - first,
        version=None if inward is None else inward.version,
        upstream=None if inward is None else inward.caller,
        given=b"" if inward is None else inward.given,
        returned=b"" if inward is None else inward.returned,
        downstream=None if onward is None else onward.callee,
        outputs=b"" if onward is None else onward.given,
        gradient=b"" if onward is None else onward.returned,
        target_tokens=hop.target_tokens,
        is_repeatable=(hop.caller_step if inward is None else hop.local_step) == 0,
    )


@dataclass(frozen=True, slots=True)
class Told:
    """What one peer itself says of its work at a stage in one round."""

    tokens: int
    alike_tokens: int
    """Of these done with the weights of one version, of which there are most: nothing else can be done again."""
    contradicted_by: frozenset[PeerId]
    """At the other ends of hops of which only one of the two tells so."""


class RoundHops:
    """What was said of one round so far."""

    def __init__(self, round_id: RoundId, *, num_stages: int) -> None:
        self._round, self._num_stages = round_id, num_stages
        self._sent: set[Hop] = set()
        self._served: set[Hop] = set()
        self._seen: set[WorkKey] = set()

    def add(self, window: Window) -> None:
        """Take what somebody has said."""
        self._sent.update(window.sent_hops())
        self._served.update(window.served_hops())

    def told_by(self, peer: PeerId, stage: StageId) -> Told:
        """Return of how much work at a stage a peer tells itself, each number once, and who does not tell the same."""
        served = {hop for hop in self._served if hop.callee == peer}
        sent = {hop for hop in self._sent if hop.caller == peer}
        inward = {hop for hop in served if hop.first_stage <= stage < hop.end_stage}
        came_in = {(hop.number, hop.end_stage) for hop in served}
        fed = {hop for hop in sent if stage < hop.first_stage and (hop.number, hop.first_stage) not in came_in}
        callers = {hop.caller for hop in served ^ {hop for hop in self._sent if hop.callee == peer}}
        callees = {hop.callee for hop in sent ^ {hop for hop in self._served if hop.caller == peer}}
        alike: defaultdict[Version | None, dict[int, int]] = defaultdict(dict)
        for hop in inward | fed:
            if (hop.local_step if hop in inward else hop.caller_step) == 0:
                alike[hop.version if hop in inward else None][hop.number] = hop.target_tokens
        return Told(
            tokens=sum({hop.number: hop.target_tokens for hop in inward | fed}.values()),
            alike_tokens=max((sum(each.values()) for each in alike.values()), default=0),
            contradicted_by=frozenset(callers | callees),
        )

    def fresh(self, hosts: Mapping[PeerId, Collection[StageId]], *, is_rough: bool = False) -> list[Carry]:
        """Return what is told from all sides now, was not before, and can be recomputed.

        That is exactly, or with `is_rough` approximately. `hosts` says who has which stages: whoever begins a
        microbatch has the first one.
        """
        found = self.told(hosts) if is_rough else self.all(hosts)
        fresh = list({carry.key: carry for carry in found if carry.key not in self._seen}.values())
        self._seen.update(carry.key for carry in fresh)
        return fresh

    def all(self, hosts: Mapping[PeerId, Collection[StageId]]) -> list[Carry]:
        """Return everything that is told from all sides and can be recomputed; a number once of every peer."""
        return [carry for carry in self.told(hosts) if carry.is_repeatable]

    def told(self, hosts: Mapping[PeerId, Collection[StageId]]) -> list[Carry]:
        """Return everything that is told from all sides, also what cannot be recomputed by what is said of it."""
        found = carries_of(
            self._sent & self._served,
            round_id=self._round,
            num_stages=self._num_stages,
            is_feeder=lambda peer: FIRST_STAGE in hosts.get(peer, ()),
        )
        return list({(carry.peer, carry.number, carry.is_repeatable): carry for carry in found}.values())
