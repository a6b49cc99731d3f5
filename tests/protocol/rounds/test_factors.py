"""By what contributions are multiplied. Oracle: by hand, or what must not depend on who computes it."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol.ids import PeerId
from protocol.rounds.factors import CLIP, clips_of, factors_of
from protocol.rounds.messages import MAX_COUNT, MAX_NORM, Contribution


def group(*members: tuple[int, int, float]) -> tuple[Contribution, ...]:
    """Make contributions of (tokens, weight, norm)."""
    return tuple(
        Contribution(peer=PeerId(f"peer-{number}"), tokens=tokens, weight=weight, norm=norm)
        for number, (tokens, weight, norm) in enumerate(members)
    )


def test_a_sum_is_made_smaller_by_what_does_not_count() -> None:
    """And by nothing if all of it does: honest members' sums are not even multiplied."""
    assert factors_of(group((10, 10, 3.0), (30, 30, 5.0)), is_mean=False) == ()
    assert factors_of(group((10_000, 10, 3.0), (30, 30, 5.0)), is_mean=False) == (0.001, 1.0)
    assert factors_of(group((10, 10, 3.0), (7, 0, 5.0)), is_mean=False) == (1.0, 0.0)
    assert factors_of(group((10, 10, 3.0), (0, 0, 5.0)), is_mean=False) == (1.0, 0.0), "no claim, nothing to add"
    assert factors_of(group((10_000, 10, 3.0), (30, 30, 5.0)), is_mean=True) == (0.25, 0.75)


@pytest.mark.parametrize("is_mean", [False, True])
def test_what_is_longer_than_usual_is_cut_to_twice_that(is_mean: bool) -> None:
    ten_times = group((10, 10, 1.0), (10, 10, 1.1), (10, 10, 10.0), (10, 10, 0.9))
    clips = clips_of(ten_times, is_mean=is_mean)
    assert clips == pytest.approx((1.0, 1.0, CLIP * 1.05 / 10.0, 1.0))
    assert [clip for clip in clips if clip == 1.0] == [1.0] * 3, "the others are not touched at all"


def test_of_two_nobody_is_unusual() -> None:
    assert clips_of(group((10, 10, 1.0), (10, 10, 100.0)), is_mean=False) == (1.0, 1.0)
    with_one_who_does_not_count = group((10, 10, 1.0), (10, 10, 100.0), (10, 0, 1.0))
    assert clips_of(with_one_who_does_not_count, is_mean=False) == (1.0, 1.0, 1.0)


def test_a_slow_card_is_not_clipped_for_its_noise() -> None:
    """Noise grows with the square root of the tokens: one with a 64th of them has 8 times as much per token."""
    noise = group(*((tokens, tokens, math.sqrt(tokens)) for tokens in (64, 64, 64, 1)))
    assert clips_of(noise, is_mean=False) == (1.0,) * 4
    signal = group(*((tokens, tokens, float(tokens)) for tokens in (64, 64, 64, 1, 1024)))
    assert clips_of(signal, is_mean=False) == (1.0,) * 5


def test_a_claim_of_few_tokens_buys_no_length() -> None:
    """What a member may add, per token that all have, is bounded by the square root of its part of them."""
    few = group((100, 100, 10.0), (100, 100, 10.0), (100, 100, 10.0), (1, 1, 10.0))
    (*_, clip) = clips_of(few, is_mean=False)
    assert clip * 10.0 == pytest.approx(CLIP * 0.1 * math.sqrt(1 * 100))


def test_a_majority_of_nothings_takes_nobody_out() -> None:
    """Factors that are all 0 would be no group."""
    assert clips_of(group((10, 10, 0.0), (10, 10, 0.0), (10, 10, 5.0)), is_mean=False) == (1.0, 1.0, 1.0)


counts = st.one_of(st.integers(0, 10), st.integers(0, MAX_COUNT))
norms = st.one_of(st.just(0.0), st.floats(0, MAX_NORM))


@given(members=st.lists(st.tuples(counts, counts, norms), min_size=1, max_size=6), is_mean=st.booleans())
def test_factors_are_numbers_from_0_to_1_whatever_is_claimed(
    members: list[tuple[int, int, float]], is_mean: bool
) -> None:
    """A group with others is refused, and nobody may be able to make one."""
    claims = group(*((max(tokens, weight), weight, norm) for tokens, weight, norm in members))
    if not any(each.weight for each in claims):
        return
    factors = factors_of(claims, is_mean=is_mean)
    assert all(0 <= factor <= 1 for factor in factors)
    assert not factors or any(factors)
