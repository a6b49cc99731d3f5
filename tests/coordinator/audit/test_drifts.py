"""How far off work with local steps may be, and how often.

Oracles: quantiles by hand, and the findings that were put in.
"""

from __future__ import annotations

import pytest

from coordinator.audit.drifts import (
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

STAGE = StageId(1)
PEERS = tuple(PeerId(name) for name in "pqrs")


def known(*usual: float, audits: int = LEAST_AUDITS) -> Drifts:
    """Return what is known once each of as many peers has so usual distances; gradients are half as far."""
    drifts = Drifts()
    for peer, distance in zip(PEERS, usual, strict=False):
        for _ in range(audits):
            drifts.note(STAGE, peer, (distance, distance / 2))
    return drifts


def test_until_a_few_peers_are_known_only_nonsense_is_too_far() -> None:
    for drifts in (known(), known(0.1, 0.1), known(*[0.1] * LEAST_PEERS, audits=LEAST_AUDITS - 1)):
        assert drifts.limits(STAGE) == (MOST, MOST)


def test_what_is_usual_at_a_stage_is_the_measure() -> None:
    drifts = known(0.4, 0.4, 0.4)
    outputs, returned = drifts.limits(STAGE)
    assert (outputs, returned) == pytest.approx((1.0, LEAST))
    assert drifts.limits(StageId(2)) == (MOST, MOST), "every stage by itself"
    assert drifts.is_beyond(STAGE, (1.1, 0.1))
    assert drifts.is_beyond(STAGE, (0.1, 0.7))
    assert not drifts.is_beyond(STAGE, (0.9, 0.5))
    assert not drifts.is_beyond(STAGE, (1.1, 0.1), factor=3.0)


def test_one_that_is_always_far_off_does_not_move_the_limit() -> None:
    assert known(0.1, 0.1, 0.1, 2.0).limits(STAGE) == (LEAST, LEAST)


def test_a_limit_is_never_beyond_what_a_turned_sign_makes() -> None:
    assert known(1.5, 1.5, 1.5).limits(STAGE) == (MOST, MOST)
    assert MOST < 2


def test_what_was_usual_long_ago_is_forgotten_and_so_are_the_first_of_many_peers() -> None:
    drifts = known(0.6, 0.6, 0.6)
    for peer in PEERS[:3]:
        for _ in range(MAX_REMEMBERED):
            drifts.note(STAGE, peer, (0.01, 0.01))
    assert drifts.limits(STAGE) == (LEAST, LEAST)
    for number in range(MAX_PEERS):
        drifts.note(STAGE, PeerId(f"new {number}"), (0.0, 0.0))
    assert drifts.limits(STAGE) == (MOST, MOST)


P = PEERS[0]


def noted(*scores: float, rounds: bool = True) -> list[bool]:
    far_off = FarOff()
    return [far_off.note(P, RoundId(number if rounds else 0), score) for number, score in enumerate(scores)]


def test_it_takes_three_of_the_last_sixteen_or_two_that_are_flagrant() -> None:
    assert noted(1.0, 0.0, 1.0, 0.0, 1.0) == [False, False, False, False, True]
    assert noted(FLAGRANT_SCORE, 0.0, FLAGRANT_SCORE) == [False, False, True]
    assert not any(noted(1.0, 1.0, *[0.0] * (LATELY - 1), 1.0))


def test_all_of_one_round_may_be_chance() -> None:
    assert not any(noted(1.0, 1.0, 1.0, 1.0, rounds=False))


def test_what_is_held_against_a_key_goes_with_its_successor_and_is_forgotten_with_an_appeal() -> None:
    far_off, new = FarOff(), PeerId("new")
    far_off.note(P, RoundId(1), FLAGRANT_SCORE)
    far_off.succeed(P, new)
    assert not far_off.note(P, RoundId(2), FLAGRANT_SCORE)
    assert far_off.note(new, RoundId(2), FLAGRANT_SCORE)
    far_off.forget(new)
    assert not far_off.note(new, RoundId(3), FLAGRANT_SCORE)
