"""protocol/ownership.py: numbers are dealt out so that nobody waits, and everybody comes to the same answer."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol.ids import PeerId
from protocol.ownership import CANDIDATES, SPARE, candidates, owners, rendezvous

NUMBERS = range(4000)
GOLDEN_ORDER = list("13240")
GOLDEN_OWNERS = "332322313012"
WEIGHTS = st.dictionaries(
    st.text("abcdefgh", min_size=1, max_size=6).map(PeerId), st.floats(0, 1e6, allow_nan=False), min_size=1, max_size=8
)


def _peers(count: int) -> list[PeerId]:
    return [PeerId(f"12D3KooW{index:03d}") for index in range(count)]


def test_all_are_done_at_about_the_same_time() -> None:
    """Oracle: with half a number to spare, no other division ends sooner: moving one makes its new owner the last."""
    feeders = dict(zip(_peers(4), (1.0, 2.0, 5.0, 0.1), strict=True))
    counts = Counter(owners("seed", range(121), feeders).values())
    end_s = max((counts[peer] + SPARE) / weight for peer, weight in feeders.items() if counts[peer])
    assert all((counts[peer] + 1 + SPARE) / weight >= end_s for peer, weight in feeders.items())
    assert sum(counts.values()) == 121


def test_a_slow_one_makes_nobody_wait() -> None:
    """One of a tenth of the speed beside two: of 21 shares of 120 numbers it gets less than one share, never more."""
    fast, other, slow = _peers(3)
    counts = Counter(owners("seed", range(120), {fast: 1.0, other: 1.0, slow: 0.1}).values())
    assert counts[slow] == 5
    assert {counts[fast], counts[other]} == {57, 58}


@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e9])
def test_only_the_ratio_of_weights_counts(scale: float) -> None:
    """Oracle: the same owners for tokens per second as for tokens per hour."""
    peers = _peers(5)
    plain = {peer: float(index + 1) for index, peer in enumerate(peers)}
    scaled = {peer: weight * scale for peer, weight in plain.items()}
    assert owners("seed", range(500), scaled) == owners("seed", range(500), plain)


def test_who_weighs_nothing_gets_nothing_while_others_are_there() -> None:
    """And all of it alone. Oracle: by hand."""
    one, two = _peers(2)
    assert set(owners("seed", range(50), {one: 0.0, two: 1.0}).values()) == {two}
    assert set(owners("seed", range(50), {one: 0.0}).values()) == {one}


def test_numbers_are_drawn_and_not_cut_into_stretches() -> None:
    """Or the same feeder would see the same part of the text. Oracle: runs of one owner as often as by coin (2,000)."""
    first, _ = feeders = dict.fromkeys(_peers(2), 1.0)
    found = owners("seed", NUMBERS, feeders)
    changes = sum(found[number] != found[number + 1] for number in NUMBERS[:-1])
    assert 1850 < changes < 2150
    assert sum(owner == first for owner in found.values()) == len(NUMBERS) / 2


@given(weights=WEIGHTS, key=st.text(max_size=20))
def test_everybody_is_in_the_order_once_and_the_weightless_come_last(weights: dict[PeerId, float], key: str) -> None:
    """Oracle: a permutation of the peers; a steward must be found even if nobody has worked yet."""
    order = rendezvous(key, weights)
    assert sorted(order) == sorted(weights)
    positions = [weights[peer] > 0 for peer in order]
    assert positions == sorted(positions, reverse=True)


@given(weights=WEIGHTS, key=st.text(max_size=20))
def test_the_order_does_not_depend_on_who_is_listed_first(weights: dict[PeerId, float], key: str) -> None:
    """Oracle: the same mapping in reverse."""
    assert rendezvous(key, dict(reversed(weights.items()))) == rendezvous(key, weights)


def test_the_next_steward_is_what_remains_without_the_first() -> None:
    """Oracle: striking the head of the order leaves the order of the others."""
    weights = {peer: float(index + 1) for index, peer in enumerate(_peers(10))}
    order = rendezvous("stage/3", weights)
    for position in range(1, 10):
        rest = {peer: weights[peer] for peer in order[position:]}
        assert rendezvous("stage/3", rest) == order[position:]


def test_candidates_differ_between_stages_and_numbers() -> None:
    """Oracle: the first choices of 200 numbers spread over all replicas, and two stages agree only by chance (1/6)."""
    replicas = dict.fromkeys(_peers(6), 1.0)
    one = [candidates("seed", number, 1, replicas)[0] for number in range(200)]
    two = [candidates("seed", number, 2, replicas)[0] for number in range(200)]
    assert set(one) == set(replicas)
    assert sum(a == b for a, b in zip(one, two, strict=True)) < 60


def test_candidates_spread_evenly_over_the_first_places() -> None:
    """Oracle: each of 6 equal replicas is among the first three for half of 1,200 microbatches."""
    replicas = dict.fromkeys(_peers(6), 1.0)
    chosen = Counter(peer for number in range(1200) for peer in candidates("s", number, 0, replicas)[:CANDIDATES])
    assert all(520 < chosen[peer] < 680 for peer in replicas)


def test_seeds_change_owners() -> None:
    """Oracle: two rounds agree on an owner only by chance (1/4)."""
    feeders = dict.fromkeys(_peers(4), 1.0)
    one, two = owners("round 1", NUMBERS, feeders), owners("round 2", NUMBERS, feeders)
    same = sum(one[number] == two[number] for number in NUMBERS)
    assert 900 < same < 1100


def test_the_order_is_part_of_the_protocol() -> None:
    """Oracle: written down; two versions that order differently would both or neither feed a number."""
    weights = {peer: float(index) for index, peer in enumerate(_peers(5))}
    assert [peer[-1] for peer in rendezvous("golden", weights)] == GOLDEN_ORDER


def test_dealing_is_part_of_the_protocol() -> None:
    """Oracle: written down, as above."""
    weights = {peer: float(index + 1) for index, peer in enumerate(_peers(4))}
    found = owners("golden", range(12), weights)
    assert "".join(found[number][-1] for number in range(12)) == GOLDEN_OWNERS
