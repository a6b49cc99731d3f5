"""protocol/ownership.py: shares follow weights, and a change of members moves no more than it must."""

from __future__ import annotations

import math
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol.ids import PeerId
from protocol.ownership import CANDIDATES, candidates, owners, rendezvous

NUMBERS = range(4000)
GOLDEN_ORDER = list("13240")
WEIGHTS = st.dictionaries(
    st.text("abcdefgh", min_size=1, max_size=6).map(PeerId), st.floats(0, 1e6, allow_nan=False), min_size=1, max_size=8
)


def _peers(count: int) -> list[PeerId]:
    return [PeerId(f"12D3KooW{index:03d}") for index in range(count)]


def test_shares_follow_the_weights() -> None:
    """Oracle: weights 1:2:5 of 4,000 numbers, each within four standard deviations of its binomial."""
    feeders = dict(zip(_peers(3), (1.0, 2.0, 5.0), strict=True))
    counts = Counter(owners("seed", NUMBERS, feeders).values())
    for peer, weight in feeders.items():
        share = weight / 8
        spread = math.sqrt(len(NUMBERS) * share * (1 - share))
        assert abs(counts[peer] - len(NUMBERS) * share) < 4 * spread


@pytest.mark.parametrize("scale", [1e-9, 1.0, 1e9])
def test_only_the_ratio_of_weights_counts(scale: float) -> None:
    """Oracle: the same owners for tokens per second as for tokens per round."""
    peers = _peers(5)
    plain = {peer: float(index + 1) for index, peer in enumerate(peers)}
    scaled = {peer: weight * scale for peer, weight in plain.items()}
    assert owners("seed", range(500), scaled) == owners("seed", range(500), plain)


def test_who_leaves_moves_only_its_own_numbers() -> None:
    """Oracle: every number that the one who left did not own keeps its owner."""
    feeders = {peer: float(index % 3 + 1) for index, peer in enumerate(_peers(8))}
    before = owners("seed", range(600), feeders)
    for gone in feeders:
        after = owners("seed", range(600), {peer: weight for peer, weight in feeders.items() if peer != gone})
        assert all(after[number] == owner for number, owner in before.items() if owner != gone)


def test_who_joins_takes_its_share_and_leaves_the_rest() -> None:
    """Oracle: numbers move to the newcomer only, about a ninth of them."""
    feeders = dict.fromkeys(_peers(8), 1.0)
    newcomer = PeerId("newcomer")
    before, after = owners("seed", NUMBERS, feeders), owners("seed", NUMBERS, {**feeders, newcomer: 1.0})
    moved = [number for number in NUMBERS if before[number] != after[number]]
    assert all(after[number] == newcomer for number in moved)
    assert len(NUMBERS) / 9 * 0.8 < len(moved) < len(NUMBERS) / 9 * 1.2


def test_a_larger_weight_only_gains() -> None:
    """Oracle: a peer whose weight grows loses no number, and nobody else gains one."""
    feeders = dict.fromkeys(_peers(6), 1.0)
    lucky = next(iter(feeders))
    before, after = owners("seed", NUMBERS, feeders), owners("seed", NUMBERS, {**feeders, lucky: 3.0})
    assert all(after[number] in (owner, lucky) for number, owner in before.items())


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
