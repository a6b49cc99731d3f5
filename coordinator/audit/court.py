"""Audits that are under way: who was asked what, and what the answers come to. Pure.

Owns: a case from its orders to its verdict. Must not know: how often whom (`policy.py`), the database, the network.

First the auditor recomputes and sketches what comes out; the neighbours sketch what they were given. Nobody is told
what the others say. If the sketches differ, a second auditor gets the bytes themselves, whose digests the receipts
have, and recomputes again: its word does not depend on what the neighbours or the first auditor say. If it finds the
same, that is two witnesses. If not, it knows which of the others told something else.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from enum import StrEnum

from coordinator.carries import Carry
from protocol.audits import (
    AuditOrder,
    AuditOutcome,
    AuditReport,
    Payload,
    SketchOrder,
    SketchReport,
    SumOrder,
    Work,
)
from protocol.errors import WireError
from protocol.ids import PeerId, StageId
from protocol.sketch import distance

PATIENCE_S = 45.0
SUM_PATIENCE_S = 300.0

Order = AuditOrder | SketchOrder | SumOrder


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


@dataclass(frozen=True, slots=True, kw_only=True)
class Contributed:
    """What a peer says it has put into an average at one stage, and the microbatches that this is the sum of."""

    stage: StageId
    sketch: bytes
    works: tuple[Carry, ...]


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
    orders: dict[int, tuple[PeerId, Order]] = field(default_factory=dict)
    report: AuditReport | None = None
    sketches: dict[int, bytes] = field(default_factory=dict)


class Court:
    """All cases that are open. In memory: a coordinator that is started again forgets them, and draws others."""

    def __init__(self, tolerance: Tolerance, *, next_order: Callable[[], int]) -> None:
        self._tolerance, self._next_order = tolerance, next_order
        self._cases: dict[int, Case] = {}

    def __len__(self) -> int:
        return len({id(case) for case in self._cases.values()})

    def open(self, carry: Carry, auditor: PeerId, seed: bytes, *, now_s: float, first: Case | None = None) -> Case:
        """Begin an audit; its orders wait to be asked for."""
        case = Case(carry=carry, auditor=auditor, seed=seed, opened_s=now_s, first=first)
        is_second = first is not None
        order = AuditOrder(
            order=self._next_order(),
            round=carry.round,
            number=carry.number,
            first_stage=carry.first_stage,
            num_stages=carry.num_stages,
            version=carry.version,
            seed=seed,
            inputs=_payload(carry.upstream, carry.given),
            gradient=_payload(carry.downstream, carry.gradient),
            outputs=_payload(carry.downstream, carry.outputs) if is_second else None,
            returned=_payload(carry.upstream, carry.returned) if is_second else None,
        )
        self._add(case, auditor, order)
        if not is_second:
            for holder, digest, is_gradient in (
                (carry.downstream, carry.outputs, False),
                (carry.upstream, carry.returned, True),
            ):
                if holder is not None:
                    number = self._next_order()
                    wanted = SketchOrder(order=number, digest=digest, is_gradient=is_gradient, seed=seed)
                    self._add(case, holder, wanted)
        return case

    def open_sum(
        self,
        contributed: Contributed,
        auditor: PeerId,
        seed: bytes,
        *,
        now_s: float,
        first: Case | None = None,
    ) -> Case:
        """Begin an audit of a contribution: both witnesses get the same bytes, and the sketch is its sender's."""
        carry = contributed.works[0]
        case = Case(carry=carry, auditor=auditor, seed=seed, opened_s=now_s, first=first, contribution=contributed)
        order = SumOrder(
            order=self._next_order(),
            round=carry.round,
            first_stage=carry.first_stage,
            num_stages=carry.num_stages,
            version=carry.version,
            stage=contributed.stage,
            seed=seed,
            works=tuple(
                Work(
                    number=each.number,
                    inputs=_payload(each.upstream, each.given),
                    gradient=_payload(each.downstream, each.gradient),
                )
                for each in contributed.works
            ),
        )
        self._add(case, auditor, order)
        return case

    def cases_of(self, carry: Carry) -> list[Case]:
        """Return the open cases of a piece of work."""
        return list({id(case): case for case in self._cases.values() if case.carry.key == carry.key}.values())

    def load(self, peer: PeerId) -> int:
        """Return how many audits wait for a peer."""
        return sum(who == peer and not isinstance(order, SketchOrder) for who, order in self._waiting())

    def orders_for(self, peer: PeerId) -> list[Order]:
        """Return what a peer is asked, oldest first."""
        return [order for who, order in self._waiting() if who == peer]

    def hear(self, peer: PeerId, report: AuditReport | SketchReport) -> Verdict | None:
        """Take an answer; return the verdict if it was the last one that was missing."""
        case = self._cases.get(report.order)
        if case is None or case.orders[report.order][0] != peer:
            return None
        order = case.orders[report.order][1]
        if isinstance(report, AuditReport) and not isinstance(order, SketchOrder):
            case.report = case.report or report
        elif isinstance(report, SketchReport) and isinstance(order, SketchOrder):
            case.sketches.setdefault(report.order, report.sketch)
        if case.report is None or len(case.sketches) < len(case.orders) - 1:
            return None
        self._close(case)
        return self._judge(case)

    def expire(self, *, now_s: float) -> list[Verdict]:
        """Close what has waited for too long."""
        late = {id(case): case for case in self._cases.values() if now_s - case.opened_s > _patience_s(case)}
        for case in late.values():
            self._close(case)
        return [
            Verdict(case=case, finding=Finding.NOTHING, missing=tuple(sorted(who for who, _ in _open(case))))
            for case in late.values()
        ]

    # -- inside ---------------------------------------------------------------------------------------

    def _judge(self, case: Case) -> Verdict:
        report = case.report
        assert report is not None
        if report.outcome is not AuditOutcome.DONE:
            missing = () if report.missing is None else (report.missing,)
            return Verdict(case=case, finding=Finding.NOTHING, missing=missing)
        if case.contribution is not None:
            return self._judge_sum(case, case.contribution, report)
        if not _is_complete(case, report):
            return Verdict(case=case, finding=Finding.NOTHING, missing=(case.auditor,))
        if case.first is not None:
            return self._judge_second(case, case.first, report)
        silent = tuple(case.orders[number][0] for number, sketch in case.sketches.items() if not sketch)
        if silent:
            return Verdict(case=case, finding=Finding.NOTHING, missing=silent)
        outputs, returned = _told(case)
        try:
            apart = _apart(outputs, report.outputs), _apart(returned, report.returned)
        except WireError:
            return Verdict(case=case, finding=Finding.DIFFERS, outputs=2.0, returned=2.0)
        finding = Finding.VALID if self._is_near(*apart) else Finding.DIFFERS
        return Verdict(case=case, finding=finding, outputs=apart[0], returned=apart[1])

    def _judge_sum(self, case: Case, contributed: Contributed, report: AuditReport) -> Verdict:
        try:
            apart = distance(report.outputs, contributed.sketch)
        except WireError:
            return Verdict(case=case, finding=Finding.NOTHING, missing=(case.auditor,))
        if case.first is None:
            finding = Finding.VALID if apart <= self._tolerance.contribution else Finding.DIFFERS
            return Verdict(case=case, finding=finding, outputs=apart)
        assert case.first.report is not None
        agree = distance(case.first.report.outputs, report.outputs) <= self._tolerance.contribution
        if apart <= self._tolerance.contribution:
            liars = () if agree else (case.first.auditor,)
            return Verdict(case=case, finding=Finding.CLEARED, outputs=apart, liars=liars)
        return Verdict(case=case, finding=Finding.CONFIRMED if agree else Finding.NOTHING, outputs=apart)

    def _judge_second(self, case: Case, first: Case, report: AuditReport) -> Verdict:
        try:
            apart = _apart(report.seen_outputs, report.outputs), _apart(report.seen_returned, report.returned)
        except WireError:
            return Verdict(case=case, finding=Finding.NOTHING)
        if not self._is_near(*apart):
            agrees = self._agrees(first, report)
            # two who recompute and come to different results: one of them lies, and it may be the second
            finding = Finding.CONFIRMED if agrees else Finding.NOTHING
            return Verdict(case=case, finding=finding, outputs=apart[0], returned=apart[1])
        liars = () if self._agrees(first, report) else (first.auditor,)
        for told, seen, holder in zip(
            _told(first),
            (report.seen_outputs, report.seen_returned),
            (case.carry.downstream, case.carry.upstream),
            strict=True,
        ):
            if holder is not None and not _same(told, seen):
                liars = (*liars, holder)
        return Verdict(case=case, finding=Finding.CLEARED, outputs=apart[0], returned=apart[1], liars=liars)

    def _agrees(self, first: Case, report: AuditReport) -> bool:
        """Tell whether the two auditors have come to the same."""
        assert first.report is not None
        try:
            return self._is_near(
                _apart(first.report.outputs, report.outputs), _apart(first.report.returned, report.returned)
            )
        except WireError:
            return False

    def _is_near(self, outputs: float, returned: float) -> bool:
        return outputs <= self._tolerance.outputs and returned <= self._tolerance.returned

    def _add(self, case: Case, peer: PeerId, order: Order) -> None:
        case.orders[order.order] = peer, order
        self._cases[order.order] = case

    def _close(self, case: Case) -> None:
        for number in case.orders:
            del self._cases[number]

    def _waiting(self) -> Iterator[tuple[PeerId, Order]]:
        for number, case in self._cases.items():
            is_answered = number in case.sketches or (
                case.report is not None and not isinstance(case.orders[number][1], SketchOrder)
            )
            if not is_answered:
                yield case.orders[number]


def _patience_s(case: Case) -> float:
    return PATIENCE_S if case.contribution is None else SUM_PATIENCE_S


def _open(case: Case) -> Iterator[tuple[PeerId, Order]]:
    for number, (who, order) in case.orders.items():
        if not isinstance(order, SketchOrder) and case.report is None:
            yield who, order
        if isinstance(order, SketchOrder) and number not in case.sketches:
            yield who, order


def _is_complete(case: Case, report: AuditReport) -> bool:
    """Tell whether an auditor has sketched what there is, and nothing else."""
    has_outputs, has_returned = case.carry.downstream is not None, case.carry.upstream is not None
    is_second = case.first is not None
    wanted = (has_outputs, has_returned, has_outputs and is_second, has_returned and is_second)
    given = (report.outputs, report.returned, report.seen_outputs, report.seen_returned)
    return all(bool(sketch) == is_wanted for sketch, is_wanted in zip(given, wanted, strict=True))


def _told(case: Case) -> tuple[bytes, bytes]:
    """Return what the neighbours have sketched: activations that went out, and the gradient that went back."""
    outputs = returned = b""
    for number, sketch in case.sketches.items():
        order = case.orders[number][1]
        if isinstance(order, SketchOrder) and order.is_gradient:
            returned = sketch
        else:
            outputs = sketch
    return outputs, returned


def _apart(seen: bytes, recomputed: bytes) -> float:
    return 0.0 if not seen and not recomputed else distance(recomputed, seen)


def _same(told: bytes, seen: bytes) -> bool:
    """Two sketches of the same bytes with the same seed: they differ in the order of adding up at most."""
    try:
        return _apart(told, seen) < 1e-4
    except WireError:
        return False


def _payload(holder: PeerId | None, digest: bytes) -> Payload | None:
    return None if holder is None else Payload(holder=holder, digest=digest)
