"""Who is accused by whom. Oracle: by hand. Anne feeds, with three others; bert is one of four at the stage behind."""

from __future__ import annotations

from coordinator.audit.complaints import APART_S, MAX_ACCUSED_BY_ONE, REMEMBER_S, Complaints
from protocol.ids import PeerId

FEEDERS = [PeerId(name) for name in ("anne", "adam", "ada", "alf")]
WORKERS = [PeerId(name) for name in ("bert", "bea", "bob", "bill")]
SIDES = {**{peer: ([], WORKERS) for peer in FEEDERS}, **{peer: (FEEDERS, []) for peer in WORKERS}}
BERT = WORKERS[0]


def complain(made: Complaints, about: PeerId, *witnesses: PeerId, times: int = 2) -> None:
    """The last time is now, at 0."""
    for witness in witnesses:
        for number in reversed(range(times)):
            made.note(about, witness, now_s=-number * APART_S)


def test_most_of_a_side_and_not_in_one_moment() -> None:
    made = Complaints()
    complain(made, BERT, *FEEDERS[:2])
    assert made.accused(SIDES, now_s=0.0) == [], "half of them may be liars"
    complain(made, BERT, FEEDERS[2], times=1)
    assert made.accused(SIDES, now_s=0.0) == [], "once may be a broken line"
    made.note(BERT, FEEDERS[2], now_s=0.0)
    assert made.accused(SIDES, now_s=0.0) == [], "nor is one message that says it twice"
    made.note(BERT, FEEDERS[2], now_s=APART_S)
    assert made.accused(SIDES, now_s=APART_S) == [BERT]
    made.forget(BERT)
    assert made.accused(SIDES, now_s=0.0) == []


def test_who_could_not_have_been_sent_anything_is_no_witness() -> None:
    """Nor is anybody against itself."""
    made = Complaints()
    complain(made, BERT, *WORKERS, PeerId("stranger"))
    assert made.accused(SIDES, now_s=0.0) == []


def test_one_alone_is_never_enough() -> None:
    made = Complaints()
    complain(made, BERT, FEEDERS[0])
    assert made.accused({BERT: (FEEDERS[:1], [])}, now_s=0.0) == []


def test_if_many_are_accused_the_training_has_gone_wrong() -> None:
    made = Complaints()
    for worker in WORKERS[:3]:
        complain(made, worker, *FEEDERS)
    assert made.accused(SIDES, now_s=0.0) == []


def test_complaints_are_forgotten_and_nobody_makes_more_of_them_than_can_be_kept() -> None:
    made = Complaints()
    complain(made, BERT, *FEEDERS)
    assert made.accused(SIDES, now_s=REMEMBER_S) == [BERT]
    assert made.accused(SIDES, now_s=REMEMBER_S + 1.0) == []
    complain(made, BERT, *FEEDERS)
    for number in range(2 * MAX_ACCUSED_BY_ONE):
        complain(made, PeerId(f"made up {number}"), FEEDERS[0])
    assert len(made._said[FEEDERS[0]]) == MAX_ACCUSED_BY_ONE
    assert made.accused(SIDES, now_s=0.0) == [BERT], "the others' words stay"
