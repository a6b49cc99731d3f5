"""Standings, rates and sanctions. Oracles: the numbers of BOINC's rule by hand, and what must never happen."""

from __future__ import annotations

import json
import math

import pytest

from coordinator.audit.policy import (
    DOUBT_S,
    LEAST_RATE,
    PROVEN,
    STRIKES_COUNT_S,
    Standing,
    State,
    doubted,
    fields_of,
    inherited,
    kept_until,
    pardoned,
    passed,
    rate,
    renamed,
    standing_from,
    state_of,
    struck,
)
from protocol.ids import PeerId

P, Q, R = (PeerId(name) for name in "PQR")
DAY_S = 86400.0


def proven(count: int, now_s: float = 0.0) -> Standing:
    standing = Standing(peer=P)
    for _ in range(count):
        standing = passed(standing, Q, now_s=now_s)
    return standing


@pytest.mark.parametrize(
    ("count", "state", "expected"),
    [
        (0, State.NEW, 1.0),
        (19, State.PROBATION, 1.0),
        (20, State.TRUSTED, 0.5),
        (100, State.TRUSTED, 0.1),
        (500, State.TRUSTED, 0.02),
        (5000, State.TRUSTED, LEAST_RATE),
    ],
)
def test_everything_is_looked_at_first_and_then_less_and_less(count: int, state: State, expected: float) -> None:
    standing = proven(count)
    assert state_of(standing, now_s=0.0) is state
    assert rate(standing, now_s=0.0) == expected


def test_one_witness_puts_nobody_out_however_often_it_speaks() -> None:
    standing = proven(500)
    for second in range(50):
        standing, sanction = doubted(standing, Q, now_s=float(second))
        assert sanction is None
    assert state_of(standing, now_s=60.0) is State.SUSPECT
    assert rate(standing, now_s=60.0) == 1.0
    assert state_of(standing, now_s=60.0 + DOUBT_S) is State.PROBATION


def test_a_second_witness_makes_it_a_strike_and_an_old_one_does_not_count() -> None:
    standing, _ = doubted(proven(30), Q, now_s=0.0)
    _, sanction = doubted(standing, R, now_s=DOUBT_S + 1)
    assert sanction is None
    standing, sanction = doubted(standing, R, now_s=10.0)
    assert sanction is not None
    assert state_of(standing, now_s=11.0) is State.QUARANTINED


def test_an_hour_then_a_day_then_a_week_then_a_month() -> None:
    standing, now_s, hours = proven(5), 0.0, []
    for _ in range(4):
        standing, sanction = struck(standing, now_s=now_s)
        hours.append(sanction.hours)
        now_s = standing.out_until_s
    assert hours == [1.0, 24.0, 168.0, 720.0]
    assert state_of(standing, now_s=now_s - 1) is State.BANNED
    assert rate(standing, now_s=now_s + 1) == 1.0


def test_strikes_are_forgotten_after_a_month() -> None:
    standing, _ = struck(proven(5), now_s=0.0)
    _, sanction = struck(standing, now_s=STRIKES_COUNT_S + 1)
    assert sanction.hours == 1.0


def test_what_has_long_been_right_is_taken_for_broken_once() -> None:
    standing, sanction = struck(proven(PROVEN), now_s=0.0)
    assert sanction.state is State.HARDWARE_FAULT
    assert standing.strikes == ()
    assert state_of(standing, now_s=1.0) is State.HARDWARE_FAULT
    for _ in range(PROVEN):
        standing = passed(standing, Q, now_s=DAY_S)
    standing, sanction = struck(standing, now_s=DAY_S)
    assert sanction.state is State.QUARANTINED
    assert len(standing.strikes) == 1


def test_an_appeal_takes_the_last_strike_back_and_no_trust_comes_with_it() -> None:
    standing, _ = struck(proven(50), now_s=0.0)
    standing = pardoned(standing)
    assert standing.strikes == ()
    assert state_of(standing, now_s=1.0) is State.PROBATION


def test_a_new_key_is_where_the_old_one_was_and_sheds_nothing() -> None:
    old, _ = struck(proven(50), now_s=10.0)
    fresh = inherited(Standing(peer=Q), old)
    assert (fresh.peer, fresh.strikes, fresh.out_until_s, fresh.valid) == (Q, old.strikes, old.out_until_s, 0)
    assert state_of(fresh, now_s=11.0) is state_of(old, now_s=11.0) is State.QUARANTINED
    assert inherited(Standing(peer=Q), proven(500)).valid == 500, "trust goes along"
    own = passed(Standing(peer=Q), R, now_s=1.0)
    assert inherited(own, old).strikes == old.strikes, "also if it came as a newcomer first"
    assert inherited(own, proven(500)).valid == 1
    summed = passed(passed(proven(20), Q, now_s=5.0, is_sum=True), R, now_s=6.0, is_sum=True)
    assert kept_until(inherited(Standing(peer=Q), summed), is_sum=True) == 5.0
    assert kept_until(inherited(own, summed), is_sum=True) == -math.inf, "the earlier, so that more is taken back"
    assert inherited(proven(500), old).valid == 0


def test_what_one_auditor_vouches_for_is_not_kept_for_that() -> None:
    """It may be a friend. Oracle: the second latest of different ones."""
    standing = proven(20)
    for now_s in (1.0, 2.0, 3.0):
        standing = passed(standing, Q, now_s=now_s)
    assert kept_until(standing) == -math.inf
    assert kept_until(standing, own=[Q]) == 3.0, "but the organiser's own is no friend of anybody"
    standing = passed(standing, R, now_s=2.5)
    assert kept_until(standing) == 2.5
    standing = passed(standing, R, now_s=1.0)
    assert kept_until(standing) == 2.5, "a word about earlier work takes nothing back"
    for number in range(20):
        standing = passed(standing, PeerId(f"auditor {number}"), now_s=float(number))
    assert kept_until(standing) == 18.0
    assert kept_until(standing, is_sum=True) == -math.inf
    assert kept_until(passed(passed(proven(17), R, now_s=1.0), Q, now_s=2.0)) == -math.inf, "two of a few say little"
    assert standing_from(P, json.loads(json.dumps(fields_of(standing)))) == standing


def test_what_an_earlier_version_kept_of_a_peer_can_be_read() -> None:
    """Oracle: a field that there is no more is passed over."""
    assert standing_from(P, {**fields_of(proven(3)), "last_valid_s": 5.0}) == proven(3)


def test_a_witness_with_another_key_is_the_same_witness() -> None:
    standing, _ = doubted(proven(5), Q, now_s=0.0)
    standing, sanction = doubted(renamed(standing, Q, R), R, now_s=1.0)
    assert sanction is None
    assert renamed(standing, Q, P) == standing
