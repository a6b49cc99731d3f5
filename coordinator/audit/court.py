"""Audits that are under way: who was asked what, and what the answers come to. Pure.

Owns: a case from its orders to its verdict. Must not know: how often whom (`policy.py`), the database, the network.

First the auditor recomputes and sketches what comes out; the neighbours sketch what they were given. Nobody is told
what the others say. If the sketches differ, a second auditor gets the bytes themselves, whose digests the receipts
have, and recomputes again: its word does not depend on what the neighbours or the first auditor say. If it finds the
same, that is two witnesses. If not, it knows which of the others told something else.

A watcher, which is the organiser's own, gets the bytes at once, and often the first tokens only.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import StrEnum

from coordinator.audit.contributed import Contributed
from coordinator.audit.drifts import FLAGRANT, Drifts, Far
from coordinator.carries import Carry
from protocol.audits import (
    AuditOrder,
    AuditOutcome,
    AuditReport,
    Order,
    Payload,
    SketchOrder,
    SketchReport,
    SumOrder,
    Work,
)
from protocol.errors import WireError
from protocol.ids import PeerId
from protocol.sketch import distance, whole_distance

PATIENCE_S = 45.0
SLOW_PATIENCE_S = 300.0
"""For contributions, and for watchers, which may be CPUs and may have to get weights anew."""


GREY = 2.0
"""Times the tolerance: up to that it may be chance, once."""


class Finding(StrEnum):
    """What a case comes to."""

    VALID = "valid"
    DIFFERS = "differs"
    """One witness; a second one is needed."""
    CONFIRMED = "confirmed"
    CLEARED = "cleared"
    """The second witness says it is right; `liars` are those who told something else."""
    NOTHING = "nothing"
    """Weights or bytes were gone, or somebody did not answer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Tolerance:
    """How far apart honest machines may be: relative distance of activations and of gradients."""

    outputs: float
    returned: float
    contribution: float = 0.03


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """The end of a case."""

    case: Case
    finding: Finding
    outputs: float = 0.0
    returned: float = 0.0
    """Distances."""
    liars: tuple[PeerId, ...] = ()
    missing: tuple[PeerId, ...] = ()
    """Who did not bring or say what it was asked for."""
    is_flagrant: bool = False
    """Wrong by so much that no honest machine is ever: else it may be a microbatch like no other."""


@dataclass(slots=True, kw_only=True)
class Case:
    """One audit of one carry."""

    carry: Carry
    auditor: PeerId
    seed: bytes
    opened_s: float
    first: Case | None = None
    """The case of which this is the second opinion."""
    contribution: Contributed | None = None
    """What is looked at if it is not one microbatch but a sum of them."""
    is_watcher: bool = False
    """The auditor is the organiser's own."""
    prefix: int | None = None
    """Of so many tokens only, and forward only."""
    orders: dict[int, tuple[PeerId, Order]] = field(default_factory=dict)
    report: AuditReport | None = None
    sketches: dict[int, bytes] = field(default_factory=dict)

    @property
    def has_bytes(self) -> bool:
        """Tell whether the auditor sees what was sent itself: as a second witness, or as a watcher."""
        return self.is_watcher or self.first is not None

    @property
    def is_fresh(self) -> bool:
        """Tell whether it looks a second time itself: then with weights that it gets anew."""
        return self.first is not None and self.first.auditor == self.auditor

    @property
    def is_rough(self) -> bool:
        """Tell whether it is recomputed with the anchor's weights, as nobody but the audited has its own."""
        return self.contribution is None and not self.carry.is_repeatable

    @property
    def slack(self) -> float:
        """How far a contribution may be from what is known of it."""
        return 0.0 if self.contribution is None else self.contribution.slack

    @property
    def patience_s(self) -> float:
        is_slow = self.is_watcher or self.contribution is not None
        return SLOW_PATIENCE_S if is_slow else PATIENCE_S

    @property
    def unanswered(self) -> dict[int, PeerId]:
        """Who has still to answer which order."""
        return {
            number: who
            for number, (who, order) in self.orders.items()
            if (number not in self.sketches if isinstance(order, SketchOrder) else self.report is None)
        }


class Court:
    """All cases that are open. In memory: a coordinator that is started again forgets them, and draws others."""

    def __init__(self, tolerance: Tolerance, *, next_order: Callable[[], int], drifts: Drifts | None = None) -> None:
        self._tolerance, self._next_order, self._drifts = tolerance, next_order, drifts or Drifts()
        self._cases: dict[int, Case] = {}
        """By the numbers of their orders."""
        self._waiting: defaultdict[PeerId, dict[int, Order]] = defaultdict(dict)
        """What everybody is asked and has not answered, oldest first."""

    def __len__(self) -> int:
        return len({id(case) for case in self._cases.values()})

    def open(
        self,
        carry: Carry,
        auditor: PeerId,
        seed: bytes,
        *,
        now_s: float,
        contribution: Contributed | None = None,
        first: Case | None = None,
        is_watcher: bool = False,
        prefix: int | None = None,
    ) -> Case:
        """Begin an audit of a microbatch, or of the contribution that it is a part of; its orders wait to be asked for.

        Of a contribution both witnesses get the same bytes, and the sketch is its sender's. A second witness looks at
        the `prefix` that the first one has looked at.
        """
        case = Case(
            carry=carry,
            auditor=auditor,
            seed=seed,
            opened_s=now_s,
            first=first,
            contribution=contribution,
            is_watcher=is_watcher,
            prefix=prefix if first is None else first.prefix,
        )
        if contribution is not None:
            self._ask(case, auditor, self._sum_order(case, contribution))
            return case
        self._ask(case, auditor, self._audit_order(case))
        for holder, digest, is_gradient in (
            (carry.downstream, carry.outputs, False),
            (carry.upstream, carry.returned, True),
        ):
            if holder is not None and not case.has_bytes:
                number = self._next_order()
                self._ask(case, holder, SketchOrder(order=number, digest=digest, is_gradient=is_gradient, seed=seed))
        return case

    def cases_of(self, carry: Carry) -> list[Case]:
        """Return the open cases of a piece of work."""
        return list({id(case): case for case in self._cases.values() if case.carry.key == carry.key}.values())

    def load(self, peer: PeerId, *, is_sum: bool) -> int:
        """Return how many audits wait for a peer: of contributions, or of microbatches."""
        kind = SumOrder if is_sum else AuditOrder
        return sum(isinstance(order, kind) for order in self.orders_for(peer))

    def orders_for(self, peer: PeerId) -> list[Order]:
        """Return what a peer is asked, oldest first."""
        return list(self._waiting[peer].values()) if peer in self._waiting else []

    def hear(self, peer: PeerId, report: AuditReport | SketchReport) -> Verdict | None:
        """Take an answer; return the verdict if it was the last one that was missing."""
        order = self._waiting.get(peer, {}).get(report.order)
        if order is None or isinstance(order, SketchOrder) is not isinstance(report, SketchReport):
            return None
        case = self._cases[report.order]
        if isinstance(report, SketchReport):
            case.sketches[report.order] = report.sketch
        else:
            case.report = report
        self._ask_no_more(peer, report.order)
        if case.unanswered:
            return None
        self._close(case)
        return self._judge(case)

    def expire(self, *, now_s: float) -> list[Verdict]:
        """Close what has waited for too long."""
        late = {id(case): case for case in self._cases.values() if now_s - case.opened_s > case.patience_s}
        for case in late.values():
            self._close(case)
        return [
            Verdict(case=case, finding=Finding.NOTHING, missing=tuple(sorted(case.unanswered.values())))
            for case in late.values()
        ]

    # -- orders -----------------------------------------------------------------------------------------

    def _audit_order(self, case: Case) -> AuditOrder:
        carry, is_whole = case.carry, case.prefix is None
        return AuditOrder(
            order=self._next_order(),
            round=carry.round,
            number=carry.number,
            first_stage=carry.first_stage,
            num_stages=carry.num_stages,
            version=carry.version,
            seed=case.seed,
            inputs=_payload(carry.upstream, carry.given),
            gradient=_payload(carry.downstream, carry.gradient),
            outputs=_payload(carry.downstream, carry.outputs) if case.has_bytes else None,
            returned=_payload(carry.upstream, carry.returned) if case.has_bytes and is_whole else None,
            prefix=case.prefix,
            is_fresh=case.is_fresh,
        )

    def _sum_order(self, case: Case, contribution: Contributed) -> SumOrder:
        carry = case.carry
        works = (
            Work(
                number=each.number,
                inputs=_payload(each.upstream, each.given),
                gradient=_payload(each.downstream, each.gradient),
            )
            for each in contribution.works
        )
        return SumOrder(
            order=self._next_order(),
            round=carry.round,
            first_stage=carry.first_stage,
            num_stages=carry.num_stages,
            version=carry.version,
            stage=contribution.stage,
            seed=case.seed,
            works=tuple(works),
            is_fresh=case.is_fresh,
        )

    def _ask(self, case: Case, peer: PeerId, order: Order) -> None:
        case.orders[order.order] = peer, order
        self._cases[order.order] = case
        self._waiting[peer][order.order] = order

    def _ask_no_more(self, peer: PeerId, number: int) -> None:
        self._waiting[peer].pop(number, None)
        if not self._waiting[peer]:
            del self._waiting[peer]

    def _close(self, case: Case) -> None:
        for number, (peer, _) in case.orders.items():
            del self._cases[number]
            self._ask_no_more(peer, number)

    # -- verdicts ---------------------------------------------------------------------------------------

    def _judge(self, case: Case) -> Verdict:
        report = case.report
        assert report is not None
        if report.outcome is not AuditOutcome.DONE:
            missing = () if report.missing is None else (report.missing,)
            return Verdict(case=case, finding=Finding.NOTHING, missing=missing)
        if not _is_complete(case, report):
            return Verdict(case=case, finding=Finding.NOTHING, missing=(case.auditor,))
        silent = tuple(case.orders[number][0] for number, sketch in case.sketches.items() if not sketch)
        if silent:
            return Verdict(case=case, finding=Finding.NOTHING, missing=silent)
        apart = _apart(_sent(case, report), _found(case, report), is_whole=case.is_rough)
        if case.first is not None:
            return self._judge_second(case, case.first, report, apart)
        if apart is None:  # one of the two is no sketch
            return Verdict(case=case, finding=Finding.DIFFERS, outputs=2.0, returned=2.0)
        if case.is_rough:
            self._drifts.note(case.carry.stages, case.carry.peer, _far(case, apart))
        finding = Finding.VALID if self._is_right(case, apart) else Finding.DIFFERS
        return Verdict(case=case, finding=finding, outputs=apart[0], returned=apart[1])

    def _judge_second(self, case: Case, first: Case, report: AuditReport, apart: tuple[float, float] | None) -> Verdict:
        assert first.report is not None
        if apart is None:
            return Verdict(case=case, finding=Finding.NOTHING)
        between = _apart(_found(first, first.report), _found(case, report), is_whole=case.is_rough)
        agrees = between is not None and self._is_near(case, between)
        liars: tuple[PeerId, ...] = ()
        if not self._is_right(case, apart):
            # two who recompute and come to different results: one of them lies, and it may be the second
            finding = Finding.CONFIRMED if agrees else Finding.NOTHING
        else:
            finding = Finding.CLEARED
            liars = (*(() if agrees else (first.auditor,)), *_false_neighbours(first, report))
        return Verdict(
            case=case,
            finding=finding,
            outputs=apart[0],
            returned=apart[1],
            liars=liars,
            is_flagrant=self._is_flagrant(case, apart),
        )

    def _is_flagrant(self, case: Case, apart: tuple[float, float]) -> bool:
        if case.is_rough:
            return self._drifts.is_beyond(case.carry.stages, _far(case, apart), factor=FLAGRANT)
        return not self._is_near(case, (apart[0] / GREY, apart[1] / GREY))

    def _is_right(self, case: Case, apart: tuple[float, float]) -> bool:
        """Tell whether the audited may have sent that."""
        if case.is_rough:
            return not self._drifts.is_beyond(case.carry.stages, _far(case, apart))
        return self._is_near(case, apart, case.slack)

    def _is_near(self, case: Case, apart: tuple[float, float], slack: float = 0.0) -> bool:
        """Tell whether that may be two machines of which both do what they should."""
        outputs, returned = apart
        if case.contribution is not None:
            return outputs <= self._tolerance.contribution + slack
        return outputs <= self._tolerance.outputs and returned <= self._tolerance.returned


def _is_complete(case: Case, report: AuditReport) -> bool:
    """Tell whether an auditor has sketched what there is, and nothing else."""
    if case.contribution is not None:
        return len(report.outputs) == len(case.contribution.sketch)
    has_outputs = case.carry.downstream is not None
    has_returned = case.carry.upstream is not None and case.prefix is None
    wanted = (has_outputs, has_returned, has_outputs and case.has_bytes, has_returned and case.has_bytes)
    given = (report.outputs, report.returned, report.seen_outputs, report.seen_returned)
    return all(bool(sketch) == is_wanted for sketch, is_wanted in zip(given, wanted, strict=True))


_Pair = tuple[bytes, bytes]
"""Sketches of what went out and of what went back; empty where there is nothing. A contribution goes out."""


def _found(case: Case, report: AuditReport) -> _Pair:
    if case.contribution is not None:
        return case.contribution.seen(report.outputs), b""
    return report.outputs, report.returned


def _sent(case: Case, report: AuditReport) -> _Pair:
    """Return what the audited has sent: as it says, as the auditor has seen it, or as its neighbours say."""
    if case.contribution is not None:
        return case.contribution.seen(case.contribution.sketch), b""
    return (report.seen_outputs, report.seen_returned) if case.has_bytes else _told(case)


def _told(case: Case) -> _Pair:
    """Return what the neighbours have sketched: activations that went out, and the gradient that went back."""
    outputs = returned = b""
    for number, sketch in case.sketches.items():
        order = case.orders[number][1]
        if isinstance(order, SketchOrder) and order.is_gradient:
            returned = sketch
        else:
            outputs = sketch
    return outputs, returned


def _false_neighbours(first: Case, report: AuditReport) -> tuple[PeerId, ...]:
    """Return which neighbours have sketched something else than the bytes that they were given."""
    if first.contribution is not None or first.has_bytes:  # none of them was asked
        return ()
    holders = (first.carry.downstream, first.carry.upstream)
    said = zip(holders, _told(first), (report.seen_outputs, report.seen_returned), strict=True)
    return tuple(holder for holder, told, seen in said if holder is not None and not _same(told, seen))


def _apart(sent: _Pair, found: _Pair, *, is_whole: bool = False) -> tuple[float, float] | None:
    """Return how far two pairs are apart, piece by piece or as a whole; None if one of them is no sketch."""
    measure = whole_distance if is_whole else distance
    try:
        outputs, returned = (
            0.0 if not one and not other else measure(other, one) for one, other in zip(sent, found, strict=True)
        )
    except WireError:
        return None
    return outputs, returned


def _far(case: Case, apart: tuple[float, float]) -> Far:
    """Return distances of what there is: activations that went on, a gradient that went back."""
    has_returned = case.carry.upstream is not None and case.prefix is None
    return apart[0] if case.carry.downstream is not None else None, apart[1] if has_returned else None


def _same(told: bytes, seen: bytes) -> bool:
    """Two sketches of the same bytes with the same seed: they differ in the order of adding up at most."""
    apart = _apart((told, b""), (seen, b""))
    return apart is not None and apart[0] < 1e-4


def _payload(holder: PeerId | None, digest: bytes) -> Payload | None:
    return None if holder is None else Payload(holder=holder, digest=digest)
