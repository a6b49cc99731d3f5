"""Averages share by share. Oracle: who was made to lie, and how; honest answers are made from tensors.

Four members, each of which adds up a quarter.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import product

import numpy as np
import pytest

from coordinator.audit.shares import PATIENCE_S, REMEMBER_S, Blame, Disputes, ShareCases, blame_of
from coordinator.audit.sums import Given, Record
from protocol.audits import ShareReport
from protocol.ids import Lineage, PeerId, RoundId, StageId, digest
from protocol.sketch import WIDTH, ShardSketch, Values, folded, summed
from tests.coordinator.audit.people import tensor

A, B, C, D = MEMBERS = tuple(map(PeerId, "abcd"))
FACTORS = (1.0, 0.25, 1.0, 1.0)
SEED = b"seed"
NONE = bytes(4 * WIDTH)


def sketched(values: Values, share: int) -> bytes:
    made = ShardSketch(SEED)
    made.add(share, values)
    return made.packed()


def given(peer: PeerId, share: int) -> Values:
    return tensor(f"{peer} gives {share}")


@dataclass
class Average:
    """What really went where, and what is said of it. Change both as you like."""

    sent: dict[tuple[PeerId, int], Values] = field(
        default_factory=lambda: {(peer, share): given(peer, share) for peer, share in product(MEMBERS, range(4))}
    )
    added: dict[int, Values] = field(default_factory=dict)
    """To the sum of a share, by its maker."""
    said: dict[PeerId, ShareReport] = field(default_factory=dict)

    def total(self, share: int) -> Values:
        made = sum(factor * self.sent[peer, share] for peer, factor in zip(MEMBERS, FACTORS, strict=True))
        return np.asarray(made + self.added.get(share, np.float32(0)), dtype=np.float32)

    def report(self, peer: PeerId) -> ShareReport:
        own = MEMBERS.index(peer)
        return ShareReport(
            order=1,
            given=tuple(folded(sketched(given(peer, share), share)) for share in range(4)),
            taken=tuple(folded(sketched(self.sent[giver, own], own)) for giver in MEMBERS),
            totals=tuple(folded(sketched(self.total(share), share)) for share in range(4)),
        )

    def record(self) -> Record:
        own = {
            peer: Given(64, 64, summed(sketched(given(peer, share), share) for share in range(4))) for peer in MEMBERS
        }
        return Record(
            stage=StageId(1),
            round=RoundId(3),
            lineage=Lineage(digest(b"lineage")),
            seed=SEED,
            members=MEMBERS,
            factors=FACTORS,
            contributions=own,
            apart=1.0,
        )

    def blame(self, *silent: PeerId) -> Blame:
        reports = {peer: self.report(peer) for peer in MEMBERS if peer not in silent} | self.said
        return blame_of(self.record(), reports)


def everybody(blame: Blame) -> tuple[object, ...]:
    return blame.proven, blame.disputes, blame.evasive


def test_nobody_is_blamed_where_everything_fits() -> None:
    assert everybody(Average().blame()) == ((), (), ())


def test_a_maker_that_adds_something_contradicts_itself() -> None:
    """By its own word of what it was given. Also if it takes a member's part out."""
    assert everybody(Average(added={2: tensor("poison")}).blame()) == ((C,), (), ())
    assert everybody(Average(added={2: -given(A, 2)}).blame()) == ((C,), (), ())


def test_who_gives_something_else_than_it_says_contradicts_everybody() -> None:
    """It gives poison to all. Oracle: a dispute with each of the three makers, who have none with each other."""
    average = Average()
    average.sent |= {(B, share): -given(B, share) for share in range(4)}
    blame = average.blame()
    assert blame.proven == blame.evasive == ()
    assert {frozenset(pair) for pair in blame.disputes} == {frozenset((B, other)) for other in (A, C, D)}


def test_a_maker_that_lays_its_lie_on_a_member_is_in_dispute_with_it() -> None:
    """It says it was given what it has added itself. Nobody else can tell who of the two lies."""
    average = Average(added={2: tensor("poison")})
    honest = average.report(C)
    framed = given(A, 2) + tensor("poison")
    average.said[C] = honest.model_copy(update={"taken": (folded(sketched(framed, 2)), *honest.taken[1:])})
    assert everybody(average.blame()) == ((), ((A, C),), ())


def test_who_now_says_it_gave_other_than_it_said_at_first_contradicts_itself() -> None:
    average = Average()
    honest = average.report(B)
    other = tuple(folded(sketched(-given(B, share), share)) for share in range(4))
    average.said[B] = honest.model_copy(update={"given": other})
    assert everybody(average.blame()) == ((B,), (), ())


def test_one_who_lies_about_what_came_out_is_alone_with_it() -> None:
    average = Average()
    average.said[D] = average.report(D).model_copy(update={"totals": (folded(sketched(tensor("lie"), 0)),) * 4})
    assert everybody(average.blame()) == ((), (), ())


def test_who_alone_is_silent_must_have_done_it() -> None:
    """All that the others say fits. If something else does not, silence says nothing."""
    average = Average(added={2: tensor("poison")})
    assert everybody(average.blame(C)) == ((), (), (C,))
    average.said[C] = ShareReport(order=1)
    assert everybody(average.blame()) == ((), (), (C,)), "to know nothing of it is no answer"
    assert everybody(Average(added={2: tensor("poison")}).blame(C, D)) == ((), (), ())
    average = Average()
    average.sent |= {(B, share): -given(B, share) for share in range(4)}
    assert average.blame(C).evasive == ()


@pytest.mark.parametrize("size", [1, 3, 5])
def test_answers_of_another_length_are_none(size: int) -> None:
    average = Average()
    average.said[A] = ShareReport(order=1, given=(NONE,) * size, taken=(NONE,) * size, totals=(NONE,) * size)
    assert everybody(average.blame()) == ((), (), (A,))


def test_sketches_of_no_numbers_are_the_doing_of_who_sends_them() -> None:
    average = Average()
    wrong = np.full(WIDTH, np.nan, "<f4").tobytes()
    average.said[A] = ShareReport(order=1, given=(wrong,) * 4, taken=(wrong,) * 4, totals=(wrong,) * 4)
    assert everybody(average.blame()) == ((A,), (), ())


# -- who contradicts whom ----------------------------------------------------------------------------------


def test_who_contradicts_more_than_could_all_be_liars_is_one() -> None:
    """Of four, one may lie; of five, two; of two, nobody knows."""
    disputes = Disputes()
    disputes.note(A, B, now_s=0.0)
    assert not any(disputes.is_liar(peer, members=MEMBERS, now_s=0.0) for peer in (A, B))
    disputes.note(A, B, now_s=1.0)
    assert not disputes.is_liar(A, members=MEMBERS, now_s=1.0), "the same pair again is the same dispute"
    disputes.note(A, C, now_s=2.0)
    assert disputes.is_liar(A, members=MEMBERS, now_s=2.0)
    assert not disputes.is_liar(A, members=(*MEMBERS, PeerId("e")), now_s=2.0)
    assert not any(disputes.is_liar(peer, members=MEMBERS, now_s=2.0) for peer in (B, C))
    assert not disputes.is_liar(A, members=(A, B), now_s=2.0)
    assert not disputes.is_liar(A, members=(A, C, D), now_s=2.0), "one of them is gone, and comes back under other keys"


def test_disputes_are_forgotten_and_settled() -> None:
    disputes = Disputes()
    disputes.note(A, B, now_s=0.0)
    disputes.note(A, C, now_s=REMEMBER_S)
    assert disputes.is_liar(A, members=MEMBERS, now_s=REMEMBER_S)
    assert not disputes.is_liar(A, members=MEMBERS, now_s=REMEMBER_S + 1.0)
    disputes.note(B, C, now_s=REMEMBER_S)
    disputes.forget(A)
    assert not disputes.is_liar(C, members=MEMBERS, now_s=REMEMBER_S)


# -- asking ------------------------------------------------------------------------------------------------


def test_everybody_is_asked_until_it_answers_and_an_average_is_over_when_all_have() -> None:
    numbers = iter(range(1, 100))
    cases, average = ShareCases(next_order=lambda: next(numbers)), Average(added={2: tensor("poison")})
    cases.open(average.record(), now_s=0.0)
    for peer in MEMBERS:
        (order,) = cases.orders_for(peer)
        assert (order.stage, order.lineage) == (StageId(1), Lineage(digest(b"lineage")))
        assert cases.due(now_s=0.0) == []
        cases.hear(peer, average.report(peer).model_copy(update={"order": order.order + 50}))
        assert cases.orders_for(peer), "it answers something else"
        cases.hear(peer, average.report(peer).model_copy(update={"order": order.order}))
        assert cases.orders_for(peer) == []
    (blame,) = cases.due(now_s=0.0)
    assert blame.proven == (C,)
    assert cases.due(now_s=1e9) == []


def test_nobody_is_waited_for_for_ever() -> None:
    numbers = iter(range(1, 100))
    cases, average = ShareCases(next_order=lambda: next(numbers)), Average(added={2: tensor("poison")})
    cases.open(average.record(), now_s=0.0)
    for peer in (A, B, D):
        (order,) = cases.orders_for(peer)
        cases.hear(peer, average.report(peer).model_copy(update={"order": order.order}))
    assert cases.due(now_s=PATIENCE_S) == []
    (blame,) = cases.due(now_s=PATIENCE_S + 1.0)
    assert blame.evasive == (C,)
    assert cases.orders_for(C) == []
