"""Sketches of tensors.

Oracles: the exact relative distance in fp64, and what a sketch must not do: see nothing where a public one would.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from protocol.errors import WireError
from protocol.sketch import (
    MAX_PIECES,
    SEGMENT,
    WIDTH,
    ShardSketch,
    Values,
    directions,
    distance,
    pattern,
    sketch,
    sketch_shards,
    summed,
    whole_distance,
)

SEED = b"s" * 32


def values(seed: int, count: int = 64 * 1024) -> Values:
    return np.random.default_rng(seed).standard_normal(count).astype(np.float32)


@pytest.mark.parametrize("size", [0.003, 0.03, 0.3])
def test_the_distance_is_about_the_exact_one(size: float) -> None:
    x, noise = values(1), values(2)
    y = x + np.float32(size) * noise
    exact = np.linalg.norm((x - y).astype(np.float64)) / np.linalg.norm(x.astype(np.float64))
    found = distance(sketch(x, SEED), sketch(y, SEED))
    assert exact * 0.8 < found < exact * 1.4  # the largest of eight estimates with 7 % each


def test_it_sees_signs_scale_and_a_few_spoilt_tokens() -> None:
    x = values(1)
    flipped, scaled, spoilt = -x, np.float32(1.5) * x, x.copy()
    spoilt[:640] *= -1  # one percent
    ours = sketch(x, SEED)
    assert distance(ours, sketch(x, SEED)) == 0
    assert distance(ours, sketch(flipped, SEED)) == pytest.approx(2)
    assert distance(ours, sketch(scaled, SEED)) == pytest.approx(0.5)
    assert distance(ours, sketch(spoilt, SEED)) > 0.4  # two of the square root of eight percent, in its piece


def test_who_does_not_know_the_seed_cannot_hide_in_its_null_space() -> None:
    x = values(1, 4096)
    buckets, signs = pattern(SEED, 4096)
    first = int(np.flatnonzero(buckets == buckets[0])[0])
    second = int(np.flatnonzero(buckets == buckets[0])[1])
    hidden = x.copy()
    hidden[first] += 100 * signs[first]
    hidden[second] -= 100 * signs[second]
    one_piece = {"pieces": 1}
    assert distance(sketch(x, SEED, **one_piece), sketch(hidden, SEED, **one_piece)) < 1e-4
    assert distance(sketch(x, b"t" * 32, **one_piece), sketch(hidden, b"t" * 32, **one_piece)) > 0.5


def test_the_distance_of_a_whole_is_not_that_of_its_worst_piece() -> None:
    """Oracle: the exact distance in fp64."""
    x, y = values(1), values(1)
    y[:8192] *= -1  # the first of eight pieces
    ours, theirs = sketch(x, SEED), sketch(y, SEED)
    assert distance(ours, theirs) == pytest.approx(2)
    assert whole_distance(ours, theirs) == pytest.approx(2 / np.sqrt(8), rel=0.1)
    nothing, broken = sketch(0 * x, SEED), sketch(x * np.float32("nan"), SEED)
    assert whole_distance(nothing, nothing) == 0
    assert whole_distance(nothing, ours) == whole_distance(ours, broken) == math.inf
    with pytest.raises(WireError):
        whole_distance(ours, sketch(x, SEED, pieces=1))


def test_directions_are_about_the_exact_ones_whatever_the_scale() -> None:
    """Oracle: cosines in fp64, of tensors that share a direction but for one, which has it the other way round."""
    common, factors = values(0), (1.0, 1e-3, -10.0, 1.0)
    given = [np.float32(factor) * (common + values(number)) for number, factor in enumerate(factors, start=1)]
    units = [each / np.linalg.norm(each) for each in given]
    exact = [float(unit @ (sum(units) - unit) / np.linalg.norm(sum(units) - unit)) for unit in units]
    found = directions([sketch(each, SEED) for each in given])
    assert found == pytest.approx(exact, abs=0.1)
    assert [each < 0 for each in found] == [False, False, True, False]
    assert directions([sketch(0 * common, SEED), sketch(common, SEED)]) == [-1.0, 0.0]
    with pytest.raises(WireError):
        directions([sketch(common, SEED), sketch(common * np.float32("nan"), SEED)])
    with pytest.raises(WireError):
        directions([sketch(common, SEED), sketch(common, SEED, pieces=1)])


@given(st.integers(1, 5000), st.integers(0, 3))
def test_a_sketch_of_a_sum_is_the_sum_of_sketches(count: int, seed: int) -> None:
    x, y = values(seed, count), values(seed + 10, count)
    packed = [np.frombuffer(sketch(each, SEED), "<f4") for each in (x, y, x + y)]
    assert np.allclose(packed[0] + packed[1], packed[2], atol=1e-3)
    assert len(packed[0]) <= MAX_PIECES * WIDTH


@given(st.integers(1, 6 * SEGMENT), st.integers(1, 3))
@settings(max_examples=20)
def test_a_shard_may_come_in_parts_and_to_several_hands(count: int, hands: int) -> None:
    """Oracle: the sketch of whole shards; sums are made in another order, so the last bits differ."""
    shards = [values(1, count), values(2, 3 * SEGMENT + 5)]
    makers = [ShardSketch(SEED) for _ in range(hands)]
    for number, shard in enumerate(shards):
        for index, start in enumerate(range(0, len(shard), 2 * SEGMENT)):
            makers[index % hands].add(number, shard[start : start + 2 * SEGMENT], start=start)
    assert distance(sketch_shards(shards, SEED), summed(each.packed() for each in makers)) < 1e-5


@pytest.mark.parametrize("size", [0.003, 0.03, 2.0])
def test_the_distance_of_stages_is_about_the_exact_one(size: float) -> None:
    """Segments that are turned alike are added up before they are sketched. Oracle: the exact distance in fp64."""
    shards = [values(number, 40 * SEGMENT) for number in range(2)]
    others = [x + np.float32(size) * values(10 + number, len(x)) for number, x in enumerate(shards)]
    exact = size  # of noise that is as large as the values
    found = distance(sketch_shards(shards, SEED), sketch_shards(others, SEED))
    assert exact * 0.8 < found < exact * 1.4


def test_what_is_spoilt_at_one_place_of_all_segments_is_seen_whatever_the_seed() -> None:
    """That is what segments that share a pattern see worst. Oracle: the exact distance; none of 50 seeds misses it."""
    shard = values(1, 64 * SEGMENT)
    spoilt = shard.copy()
    spoilt[17::SEGMENT] += 100
    exact = np.linalg.norm(spoilt - shard) / np.linalg.norm(shard)
    seeds = [bytes([number]) * 32 for number in range(50)]
    found = [distance(sketch_shards([shard], seed), sketch_shards([spoilt], seed)) for seed in seeds]
    assert min(found) > exact / 4
    assert exact / 1.2 < np.sqrt(np.mean(np.square(found))) < exact * 1.2


def test_numbers_that_are_none_are_far_from_everything() -> None:
    x = values(1, 512)
    broken = x.copy()
    broken[3] = math.nan
    assert distance(sketch(x, SEED), sketch(broken, SEED)) == math.inf
    assert distance(sketch(np.zeros(512, np.float32), SEED), sketch(x, SEED)) == math.inf
    assert distance(sketch(np.zeros(512, np.float32), SEED), sketch(np.zeros(512, np.float32), SEED)) == 0


@pytest.mark.parametrize("packed", [b"", b"x" * 3, b"x" * (4 * WIDTH * (MAX_PIECES + 1))])
def test_what_is_no_sketch_is_refused(packed: bytes) -> None:
    with pytest.raises(WireError):
        distance(sketch(values(1), SEED), packed)
    with pytest.raises(WireError):
        distance(sketch(values(1), SEED), sketch(values(1), SEED, pieces=3))
