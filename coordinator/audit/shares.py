"""Who spoilt an average whose contributions do not add up: share by share, as both sides of each saw it. Pure.

Owns: the orders to everybody who took part, and what follows from the answers. Must not know: what a doubt or a strike
means (`policy.py`), the database, the network.

Each contributor adds up a share for all (a butterfly, `peer/averaging/butterfly.py`). Asked afterwards, everybody says
in sketches what it gave into each share, what each gave into its own, and what came out of each. Sketches are linear,
so one can see whether what a maker was given, by its own word, is what it made of it; and of every pair whether the two
say the same. Whoever lies has to contradict itself, or others. Of two that contradict each other one lies, and it is
not known which; but honest members contradict liars only, so whoever contradicts more than could all be liars is one.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field

from coordinator.audit.sums import Record
from protocol.audits import ShareOrder, ShareReport
from protocol.errors import WireError
from protocol.ids import PeerId
from protocol.sketch import distance, folded, scaled, summed

PATIENCE_S = 30.0
REMEMBER_S = 3600.0
LEAST_JUDGED = 3
"""Of two members nobody can say who lies."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Blame:
    """What the answers come to."""

    record: Record
    proven: tuple[PeerId, ...] = ()
    """Whose own words do not fit each other, or what all others have seen."""
    disputes: tuple[tuple[PeerId, PeerId], ...] = ()
    """Who says different things of what one gave the other."""
    evasive: tuple[PeerId, ...] = ()
    """Who alone does not answer, when everything fits that the others say."""


@dataclass(slots=True)
class _Case:
    record: Record
    since_s: float
    orders: dict[PeerId, ShareOrder]
    reports: dict[PeerId, ShareReport] = field(default_factory=dict)


class Disputes:
    """Who has contradicted whom lately."""

    def __init__(self) -> None:
        self._last_s: defaultdict[PeerId, dict[PeerId, float]] = defaultdict(dict)

    def note(self, one: PeerId, other: PeerId, *, now_s: float) -> None:
        """Two say different things."""
        self._last_s[one][other] = self._last_s[other][one] = now_s

    def is_liar(self, peer: PeerId, *, members: Collection[PeerId], now_s: float) -> bool:
        """Tell whether a member contradicts more than half of the others that are there: they cannot all be liars."""
        known = self._last_s.get(peer, {})
        for other in [other for other, at_s in known.items() if now_s - at_s > REMEMBER_S]:
            del known[other]
        found = known.keys() & set(members)
        return len(members) >= LEAST_JUDGED and len(found) > (len(members) - 1) // 2

    def succeed(self, before: PeerId, peer: PeerId) -> None:
        """One goes by another key now."""
        for other, at_s in self._last_s.pop(before, {}).items():
            self._last_s[other].pop(before, None)
            self.note(peer, other, now_s=at_s)

    def forget(self, peer: PeerId) -> None:
        """It has been judged: what others said of it and it of them is settled."""
        for other in self._last_s.pop(peer, {}):
            self._last_s[other].pop(peer, None)


class ShareCases:
    """Averages that are being looked into."""

    def __init__(self, *, next_order: Callable[[], int]) -> None:
        self._next_order = next_order
        self._cases: list[_Case] = []

    def open(self, record: Record, *, now_s: float) -> None:
        """Ask all who have said what they gave."""
        orders = {
            peer: ShareOrder(order=self._next_order(), stage=record.stage, lineage=record.lineage)
            for peer in record.contributions
        }
        self._cases.append(_Case(record, now_s, orders))

    def orders_for(self, peer: PeerId) -> list[ShareOrder]:
        """Return what a peer is asked and has not answered."""
        return [case.orders[peer] for case in self._cases if peer in case.orders.keys() - case.reports.keys()]

    def hear(self, peer: PeerId, report: ShareReport) -> None:
        """Take an answer."""
        for case in self._cases:
            order = case.orders.get(peer)
            if order is not None and order.order == report.order:
                case.reports.setdefault(peer, report)

    def due(self, *, now_s: float) -> list[Blame]:
        """Return what comes of averages of which everybody has answered, or nobody will any more."""
        over: list[_Case] = []
        waiting: list[_Case] = []
        for case in self._cases:
            is_over = len(case.reports) == len(case.orders) or now_s - case.since_s > PATIENCE_S
            (over if is_over else waiting).append(case)
        self._cases = waiting
        return [blame_of(case.record, case.reports) for case in over]


def blame_of(record: Record, reports: Mapping[PeerId, ShareReport]) -> Blame:
    """Put the answers about one average side by side."""
    members, size, rounding = record.members, len(record.members), record.rounding
    full = {
        peer: report
        for peer, report in reports.items()
        if len(report.given) == len(report.totals) == size and len(report.taken) in (0, size)
    }
    proven = {
        peer
        for peer, report in full.items()
        if not _agree(folded(record.contributions[peer].sketch), summed(report.given), rounding)
    }
    totals = [_most_common([report.totals[share] for report in full.values()], rounding) for share in range(size)]
    disputes = []
    for share, maker in enumerate(members):
        if maker not in full or not (taken := full[maker].taken):
            continue
        made = summed(scaled(each, factor) for each, factor in zip(taken, record.factors, strict=True))
        total = totals[share]
        if total is not None and not _agree(total, made, rounding):
            proven.add(maker)
        for number, giver in enumerate(members):
            if giver in full and giver != maker and not _agree(full[giver].given[share], taken[number], rounding):
                disputes.append((giver, maker))
    silent = [peer for peer in record.contributions if peer not in full or not full[peer].taken]
    is_clear = not proven and not disputes and len(silent) == 1
    return Blame(
        record=record,
        proven=tuple(sorted(proven)),
        disputes=tuple(pair for pair in disputes if not proven & set(pair)),
        evasive=tuple(silent) if is_clear else (),
    )


def _most_common(sketches: Sequence[bytes], rounding: float) -> bytes | None:
    """Return what most say that came out; None if they are fewer than two, or no half of them agrees."""
    for one in sketches:
        if 2 * sum(_agree(one, other, rounding) for other in sketches) > max(2, len(sketches)):
            return one
    return None


def _agree(one: bytes, other: bytes, rounding: float) -> bool:
    try:
        return distance(one, other) <= rounding
    except WireError:
        return False
