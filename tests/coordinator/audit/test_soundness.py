"""Whether a watcher may be believed alone. Oracle: which of the two is broken in the scenario."""

from __future__ import annotations

from coordinator.audit.soundness import ENOUGH, FORGET_S, PATIENCE_S, Soundness
from protocol.ids import PeerId, StageId

OWL, P, Q = (PeerId(name) for name in ("owl", "P", "Q"))
HERE, THERE = StageId(1), StageId(0)


def test_who_is_wrong_now_and_then_is_found_out_at_its_own_stage() -> None:
    own = Soundness()
    assert not own.accuse(OWL, P, HERE, now_s=0.0)
    for _ in range(ENOUGH):
        own.note_valid(OWL, HERE)
    assert own.accuse(OWL, P, HERE, now_s=1.0)


def test_who_is_never_right_is_found_out_by_what_is_right_elsewhere_and_not_at_once() -> None:
    own = Soundness()
    assert not own.accuse(OWL, P, HERE, now_s=0.0)
    for _ in range(ENOUGH):
        own.note_valid(OWL, THERE)
    assert not own.accuse(OWL, P, HERE, now_s=PATIENCE_S - 1)
    assert own.accuse(OWL, P, HERE, now_s=PATIENCE_S)


def test_what_was_found_right_before_says_nothing_of_now() -> None:
    """It may have broken since: a watcher that finds nothing right any more."""
    own = Soundness()
    for _ in range(100):
        own.note_valid(OWL, HERE)
    for at_s in (0.0, PATIENCE_S, 2 * PATIENCE_S):
        assert not own.accuse(OWL, P, HERE, now_s=at_s)
        assert not own.accuse(OWL, Q, HERE, now_s=at_s)


def test_an_accusation_is_forgotten_if_it_is_not_repeated_or_was_taken_back() -> None:
    own = Soundness()
    own.accuse(OWL, P, HERE, now_s=0.0)
    for _ in range(ENOUGH):
        own.note_valid(OWL, HERE)
    assert not own.accuse(OWL, P, HERE, now_s=FORGET_S + 1)
    for _ in range(ENOUGH):
        own.note_valid(OWL, HERE)
    own.forget(P)
    assert not own.accuse(OWL, P, HERE, now_s=FORGET_S + 2)
