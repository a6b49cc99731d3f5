"""What a case comes to, for everybody who may lie in it.

Oracle: who does lie. Tensors are told apart by name: everybody honest sketches the same ones.
"""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest

from coordinator.audit.contributed import Contributed
from coordinator.audit.court import PATIENCE_S, Case, Court, Finding, Tolerance, Verdict
from coordinator.audit.drifts import LEAST_AUDITS, Drifts
from protocol.audits import AuditOrder, AuditOutcome, SketchOrder
from protocol.ids import PeerId, StageId
from protocol.sketch import sketch
from tests.coordinator.audit.people import Person, carry, tensor

P, U, D, Q, R = (PeerId(name) for name in "PUDQR")
SEED = b"s" * 32


def court(drifts: Drifts | None = None) -> Court:
    counter = itertools.count(1)
    return Court(Tolerance(outputs=0.03, returned=0.03), next_order=lambda: next(counter), drifts=drifts)


def hold(own: Court, people: dict[PeerId, Person], case: Case) -> Verdict:
    """Have everybody answer; return the verdict."""
    verdicts = [own.hear(who, people[who].answer(order)) for who in list(people) for order in list(own.orders_for(who))]
    found = [verdict for verdict in verdicts if verdict is not None]
    assert len(found) == 1
    assert len(own) == 0
    assert found[0].case is case
    return found[0]


def tried(people: dict[PeerId, Person]) -> list[Verdict]:
    """Hold one audit by Q, and a second one by R if that differs."""
    own = court()
    first = own.open(carry(P, U, D), Q, SEED, now_s=0.0)
    verdicts = [hold(own, people, first)]
    if verdicts[0].finding is Finding.DIFFERS:
        second = own.open(carry(P, U, D), R, SEED, now_s=1.0, first=first)
        verdicts.append(hold(own, people, second))
    return verdicts


def people(*, sent: dict[str, str] | None = None, liar: PeerId | None = None) -> dict[PeerId, Person]:
    return {who: Person(who, sent=sent or {}, lies=who == liar) for who in (U, D, Q, R)}


def test_honest_work_is_valid() -> None:
    (verdict,) = tried(people())
    assert (verdict.finding, verdict.outputs, verdict.returned) == (Finding.VALID, 0.0, 0.0)


@pytest.mark.parametrize("what", ["y", "dx"])
def test_wrong_work_is_confirmed_by_a_second_witness(what: str) -> None:
    first, second = tried(people(sent={what: "nonsense"}))
    assert first.finding is Finding.DIFFERS
    assert second.finding is Finding.CONFIRMED
    assert second.liars == ()
    assert max(second.outputs, second.returned) > 1


@pytest.mark.parametrize("liar", [U, D, Q])
def test_who_tells_something_else_of_honest_work_is_found(liar: PeerId) -> None:
    """A neighbour that sketches other bytes than it was given, an auditor that answers at random."""
    first, second = tried(people(liar=liar))
    assert first.finding is Finding.DIFFERS
    assert (second.finding, second.liars) == (Finding.CLEARED, (liar,))


def test_a_second_witness_that_lies_convicts_nobody() -> None:
    """The first one has called for it because of a neighbour that lies; two liars who do not agree are no witnesses."""
    crowd = people(liar=R)
    crowd[D] = Person(D, lies=True)
    _, second = tried(crowd)
    assert (second.finding, second.liars) == (Finding.NOTHING, ())


def test_the_second_witness_is_given_the_bytes_and_the_first_is_not() -> None:
    own = court()
    first = own.open(carry(P, U, D), Q, SEED, now_s=0.0)
    (order,) = own.orders_for(Q)
    assert isinstance(order, AuditOrder)
    assert order.outputs is None
    assert order.returned is None
    assert order.inputs is not None
    assert order.gradient is not None
    assert (order.inputs.holder, order.gradient.holder) == (U, D)
    assert all(isinstance(each, SketchOrder) for who in (U, D) for each in own.orders_for(who))
    own.open(carry(P, U, D), R, SEED, now_s=0.0, first=first)
    (order,) = own.orders_for(R)
    assert isinstance(order, AuditOrder)
    assert order.outputs is not None
    assert order.returned is not None
    assert (order.outputs.holder, order.returned.holder) == (D, U)


@pytest.mark.parametrize("prefix", [None, 32])
def test_a_watcher_sees_the_bytes_at_once_and_asks_no_neighbour(prefix: int | None) -> None:
    """Oracle: neighbours that lie are not heard, and of a prefix nobody looks at what goes back."""
    for sent, finding in (({}, Finding.VALID), ({"y": "nonsense"}, Finding.DIFFERS)):
        crowd = people(sent=sent, liar=D)
        own = court()
        first = own.open(carry(P, U, D), Q, SEED, now_s=0.0, is_watcher=True, prefix=prefix)
        (order,) = own.orders_for(Q)
        assert isinstance(order, AuditOrder)
        assert order.prefix == prefix
        assert order.outputs is not None
        assert (order.returned is None) is (prefix is not None)
        assert not any(own.orders_for(who) for who in (U, D))
        assert hold(own, crowd, first).finding is finding
        if sent:
            second = own.open(carry(P, U, D), Q, SEED, now_s=1.0, first=first, is_watcher=True)
            (again,) = own.orders_for(Q)
            assert isinstance(again, AuditOrder)
            assert again.prefix == prefix, "of all of it, what is wrong in a part may be little"
            assert hold(own, crowd, second).finding is Finding.CONFIRMED


def test_weights_that_are_gone_find_nothing() -> None:
    crowd = people()
    crowd[Q].outcome = AuditOutcome.STALE
    (verdict,) = tried(crowd)
    assert verdict.finding is Finding.NOTHING


def test_who_does_not_answer_is_named_and_the_case_ends() -> None:
    own = court()
    own.open(carry(P, U, D), Q, SEED, now_s=0.0)
    (order,) = own.orders_for(U)
    assert own.hear(U, Person(U).answer(order)) is None
    assert own.expire(now_s=PATIENCE_S - 1) == []
    (verdict,) = own.expire(now_s=PATIENCE_S + 1)
    assert (verdict.finding, verdict.missing) == (Finding.NOTHING, (D, Q))
    assert len(own) == 0
    assert own.orders_for(Q) == []


def contributed(given: np.ndarray, slack: float) -> Contributed:
    """Return what P says it has given, where `sum` is what its microbatches come to."""
    works = tuple(carry(P, U, D, number) for number in range(3))
    return Contributed(stage=StageId(1), sketch=sketch(given, SEED), works=works, slack=slack)


def tried_sum(given: str | np.ndarray, liar: PeerId | None = None, *, slack: float = 0.0) -> list[Verdict]:
    own, crowd = court(), people(liar=liar)
    contribution = contributed(tensor(given) if isinstance(given, str) else given, slack)
    first = own.open(contribution.works[0], Q, SEED, now_s=0.0, contribution=contribution)
    verdicts = [hold(own, crowd, first)]
    if verdicts[0].finding is Finding.DIFFERS:
        second = own.open(contribution.works[0], R, SEED, now_s=1.0, contribution=contribution, first=first)
        verdicts.append(hold(own, crowd, second))
    return verdicts


def test_a_contribution_that_is_the_sum_of_its_microbatches_is_valid() -> None:
    (verdict,) = tried_sum("sum")
    assert verdict.finding is Finding.VALID


def test_a_contribution_that_is_something_else_is_confirmed_by_a_second_witness() -> None:
    first, second = tried_sum("nonsense")
    assert (first.finding, second.finding) == (Finding.DIFFERS, Finding.CONFIRMED)


def test_who_adds_up_wrongly_is_found_and_two_who_do_not_agree_convict_nobody() -> None:
    _, second = tried_sum("sum", liar=Q)
    assert (second.finding, second.liars) == (Finding.CLEARED, (Q,))
    _, second = tried_sum("nonsense", liar=Q)
    assert second.finding is Finding.NOTHING


def test_what_is_hidden_of_a_contribution_may_make_a_difference_and_no_more() -> None:
    """Oracle: with a slack of 1.2, half of the known sum on top is right, and the sum turned is wrong."""
    (verdict,) = tried_sum(tensor("sum") + tensor("hidden") / 2, slack=1.2)
    assert verdict.finding is Finding.VALID
    first, second = tried_sum(-tensor("sum") - tensor("hidden") / 2, slack=1.2)
    assert (first.finding, second.finding) == (Finding.DIFFERS, Finding.CONFIRMED)


def test_slack_is_for_the_audited_and_not_for_auditors() -> None:
    """Two auditors sketch the same microbatches. Oracle: one whose sum is another is a liar, slack or not."""
    _, second = tried_sum("nonsense", liar=Q, slack=1.2)
    assert second.finding is Finding.NOTHING


@pytest.mark.parametrize(
    ("sent", "findings"),
    [("a drift", ["valid"]), ("nonsense", ["differs", "confirmed"]), ("turned", ["differs", "confirmed"])],
)
def test_what_was_done_with_weights_of_its_own_is_looked_at_by_about(sent: str, findings: list[str]) -> None:
    """Others of the stage are a tenth off. Oracle: distances in fp64; a third is near enough, other work is not."""
    made = {
        "a drift": tensor("y") + tensor("of its own") / 3,
        "nonsense": tensor("other"),
        "turned": -tensor("y"),
    }[sent]
    drifts, work = Drifts(), replace(carry(P, U, D), is_repeatable=False)
    for peer, _ in itertools.product((Q, R, U), range(LEAST_AUDITS)):
        drifts.note(work.stages, peer, (0.1, 0.1))
    own = court(drifts)
    crowd = people()
    for person in crowd.values():
        person.tensors = {"y": made}
    first = own.open(work, Q, SEED, now_s=0.0)
    assert first.is_rough
    verdicts = [hold(own, crowd, first)]
    if verdicts[0].finding is Finding.DIFFERS:
        verdicts.append(hold(own, crowd, own.open(work, R, SEED, now_s=1.0, first=first)))
    assert [verdict.finding for verdict in verdicts] == findings
    exact = float(np.linalg.norm(made - tensor("y")) / np.linalg.norm(tensor("y")))
    assert verdicts[-1].outputs == pytest.approx(exact, rel=0.1)


def test_only_who_was_asked_can_answer_and_only_once() -> None:
    own = court()
    own.open(carry(P, U, D), Q, SEED, now_s=0.0)
    (order,) = own.orders_for(Q)
    assert own.hear(P, Person(P).answer(order)) is None
    assert own.orders_for(Q) == [order]
    assert own.hear(Q, Person(Q).answer(order)) is None
    assert own.orders_for(Q) == []
    assert own.hear(Q, Person(Q, lies=True).answer(order)) is None
    for who in (U, D):
        (wanted,) = own.orders_for(who)
        verdict = own.hear(who, Person(who).answer(wanted))
    assert verdict is not None
    assert verdict.finding is Finding.VALID
