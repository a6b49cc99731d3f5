"""How far off work with local steps may be, and how often.

Oracles: quantiles by hand, and the findings that were put in.
"""

from __future__ import annotations

import math

import pytest

from coordinator.audit.drifts import (
    AWAY_S,
    FLAGRANT_SCORE,
    LATELY,
    LEAST,
    LEAST_AUDITS,
    LEAST_PEERS,
    MAX_PEERS,
    MAX_REMEMBERED,
    MOST,
    Drifts,
    FarOff,
)
from protocol.ids import PeerId, RoundId, StageId

STAGE = (StageId(1),)
PEERS = tuple(PeerId(name) for name in "pqrs")


def known(*usual: float, audits: int = LEAST_AUDITS) -> Drifts:
    """Return what is known once each of as many peers has so usual distances; gradients are half as far."""
    drifts = Drifts()
    for peer, distance in zip(PEERS, usual, strict=False):
        for _ in range(audits):
            drifts.note(STAGE, peer, (distance, distance / 2))
    return drifts


def test_until_a_few_peers_are_known_nothing_is_too_far() -> None:
    for drifts in (known(), known(0.1, 0.1), known(*[0.1] * LEAST_PEERS, audits=LEAST_AUDITS - 1)):
        assert drifts.limits(STAGE) == (math.inf, math.inf)
        assert not drifts.is_beyond(STAGE, (100.0, 100.0))


def test_what_is_usual_at_a_stage_is_the_measure() -> None:
    drifts = known(0.4, 0.4, 0.4)
    assert drifts.limits(STAGE) == pytest.approx((1.0, LEAST))
    assert drifts.is_beyond(STAGE, (1.1, 0.1))
    assert drifts.is_beyond(STAGE, (0.1, 0.7))
    assert drifts.is_beyond(STAGE, (None, 0.7))
    assert not drifts.is_beyond(STAGE, (0.9, 0.5))
    assert not drifts.is_beyond(STAGE, (1.1, 0.1), factor=3.0)


def test_work_that_passed_other_stages_or_has_one_side_only_is_no_measure() -> None:
    """A longer span drifts further, and its last stage sends no activations on. Oracle: limits of the one."""
    drifts = known(0.4, 0.4, 0.4)
    for peer in PEERS:
        for _ in range(LEAST_AUDITS):
            drifts.note((StageId(1), StageId(2)), peer, (None, 0.1))
    assert drifts.limits(STAGE) == pytest.approx((1.0, LEAST))
    assert drifts.limits((StageId(1), StageId(2))) == (math.inf, LEAST)


def test_one_that_is_always_far_off_does_not_move_the_limit() -> None:
    assert known(0.1, 0.1, 0.1, 2.0).limits(STAGE) == (LEAST, LEAST)


def test_a_turned_sign_is_beyond_unless_everybody_is_far_off() -> None:
    """A run that diverges is nobody's fault."""
    assert known(1.0, 1.0, 1.0).limits(STAGE)[0] == MOST < 2
    diverging = known(2.5, 2.5, 2.5)
    assert not diverging.is_beyond(STAGE, (3.0, 1.5))


def test_what_was_usual_long_ago_is_forgotten_and_so_are_the_first_of_many_peers() -> None:
    drifts = known(0.6, 0.6, 0.6)
    for peer in PEERS[:3]:
        for _ in range(MAX_REMEMBERED):
            drifts.note(STAGE, peer, (0.01, 0.01))
    assert drifts.limits(STAGE) == (LEAST, LEAST)
    for number in range(MAX_PEERS):
        drifts.note(STAGE, PeerId(f"new {number}"), (0.0, 0.0))
    assert drifts.limits(STAGE) == (math.inf, math.inf)


def test_who_is_away_for_long_is_no_measure_for_those_who_are_there() -> None:
    """They have trained on, further from the anchor than anybody was then. Oracle: limits of those alone."""
    drifts = known(0.02, 0.02, 0.02, 0.5)
    for peer in (PeerId("t"), PeerId("u")):
        for _ in range(LEAST_AUDITS):
            drifts.note(STAGE, peer, (0.5, 0.25))
    drifts.keep_only([*PEERS, PeerId("t"), PeerId("u")], now_s=0.0)
    there = [PEERS[3], PeerId("t"), PeerId("u")]
    drifts.keep_only(there, now_s=AWAY_S)
    assert drifts.limits(STAGE)[0] < 1.0, "it may come back"
    drifts.keep_only(there, now_s=AWAY_S + 1.0)
    assert drifts.limits(STAGE) == pytest.approx((1.25, 0.625))


P = PEERS[0]


def work(round_id: int, number: int = 0) -> tuple[RoundId, int, PeerId, StageId]:
    return RoundId(round_id), number, P, StageId(1)


def noted(*scores: float) -> list[bool]:
    """Note audits of as many rounds."""
    far_off = FarOff()
    return [far_off.note(P, work(round_id), score) for round_id, score in enumerate(scores)]


def test_it_takes_three_of_the_last_sixteen_or_two_that_are_flagrant() -> None:
    assert noted(1.0, 0.0, 1.0, 0.0, 1.0) == [False, False, False, False, True]
    assert noted(FLAGRANT_SCORE, 0.0, FLAGRANT_SCORE) == [False, False, True]
    assert not any(noted(1.0, 1.0, *[0.0] * (LATELY - 1), 1.0))


def test_all_of_one_round_may_be_chance_and_one_microbatch_counts_once() -> None:
    far_off = FarOff()
    assert not any(far_off.note(P, work(0, number), 1.0) for number in range(8))
    far_off = FarOff()
    assert not any(far_off.note(P, work(0), 1.0) for _ in range(8))
    assert not far_off.note(P, work(1), 1.0)


def test_what_is_held_against_a_key_goes_with_its_successor_and_is_forgotten_with_an_appeal() -> None:
    far_off, new = FarOff(), PeerId("new")
    far_off.note(P, work(1), FLAGRANT_SCORE)
    far_off.succeed(P, new)
    assert not far_off.note(P, work(2), FLAGRANT_SCORE)
    assert far_off.note(new, work(2), FLAGRANT_SCORE)
    far_off.forget(new)
    assert not far_off.note(new, work(3), FLAGRANT_SCORE)
