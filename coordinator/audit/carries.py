"""What a peer did with one microbatch, as its neighbours tell it: what an audit looks at. Pure.

Owns: finding that in receipts. Must not know: who is drawn (`policy.py`), what came of it (`court.py`).

A hop counts if both of its ends tell the same of it, digests included: then nobody can lay bytes at the door of a peer
that it has never seen.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from protocol.ids import PeerId, RoundId, StageId, Version
from protocol.receipts import Hop, Window

FIRST_STAGE = StageId(0)


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

    @property
    def key(self) -> tuple[RoundId, int, PeerId, StageId]:
        return self.round, self.number, self.peer, self.first_stage

    @property
    def stages(self) -> tuple[StageId, ...]:
        return tuple(StageId(self.first_stage + index) for index in range(self.num_stages))

    @property
    def neighbours(self) -> frozenset[PeerId]:
        return frozenset(peer for peer in (self.upstream, self.downstream) if peer is not None)


class RoundHops:
    """What was said of one round so far."""

    def __init__(self, round_id: RoundId, *, num_stages: int) -> None:
        self._round, self._num_stages = round_id, num_stages
        self._sent: set[Hop] = set()
        self._served: set[Hop] = set()
        self._seen: set[tuple[RoundId, int, PeerId, StageId]] = set()

    def add(self, window: Window) -> None:
        """Take what somebody has said."""
        self._sent.update(window.sent_hops())
        self._served.update(window.served_hops())

    def fresh(self, hosts: Mapping[PeerId, Iterable[StageId]]) -> list[Carry]:
        """Return what is told from all sides now, was not before, and can be recomputed.

        `hosts` says who has which stages: whoever begins a microbatch has the first one.
        """
        fresh = [carry for carry in self.all(hosts) if carry.key not in self._seen]
        self._seen.update(carry.key for carry in fresh)
        return fresh

    def all(self, hosts: Mapping[PeerId, Iterable[StageId]]) -> list[Carry]:
        """Return everything that is told from all sides and can be recomputed."""
        matched = self._sent & self._served
        inward = {(hop.callee, hop.number): hop for hop in matched}
        onward = {(hop.caller, hop.number): hop for hop in matched}
        found = []
        for (peer, number), hop in inward.items():
            behind = onward.get((peer, number))
            is_last = hop.end_stage == self._num_stages
            if hop.local_step == 0 and (is_last or (behind is not None and behind.first_stage == hop.end_stage)):
                found.append(self._carry(peer, number, hop, None if is_last else behind))
        for (peer, number), hop in onward.items():
            if (peer, number) not in inward and hop.caller_step == 0 and FIRST_STAGE in hosts.get(peer, ()):
                found.append(self._carry(peer, number, None, hop))
        return sorted(found, key=lambda carry: carry.key)

    def _carry(self, peer: PeerId, number: int, inward: Hop | None, onward: Hop | None) -> Carry:
        first = FIRST_STAGE if inward is None else inward.first_stage
        end = self._num_stages if onward is None else onward.first_stage
        return Carry(
            peer=peer,
            round=self._round,
            number=number,
            first_stage=first,
            num_stages=end - first,
            version=None if inward is None else inward.version,
            upstream=None if inward is None else inward.caller,
            given=b"" if inward is None else inward.given,
            returned=b"" if inward is None else inward.returned,
            downstream=None if onward is None else onward.callee,
            outputs=b"" if onward is None else onward.given,
            gradient=b"" if onward is None else onward.returned,
            target_tokens=sum(hop.target_tokens for hop in (inward or onward,) if hop is not None),
        )
