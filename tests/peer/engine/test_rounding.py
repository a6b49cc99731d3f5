"""From fp32 to bf16 three ways. Oracles: torch's own bfloat16, exact arithmetic on the bits, and the law of large
numbers with a fixed seed."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from peer.engine import rounding
from peer.engine.rounding import join, round_at_random, round_nearest, split

STEP = 2.0**-7  # of bf16, at and above one
LARGEST = 0x7F7F7FFF  # bits of the largest value that does not round to infinity


def values_of(bits: Tensor) -> Tensor:
    return bits.to(torch.int32).view(torch.float32)


def bits_of(values: Tensor) -> Tensor:
    return values.view(torch.int32)


def finite_values() -> Tensor:
    """Every exponent and sign, with lower halves around all that decides: zeros, ties, borders, powers of two."""
    upper = torch.arange(0, 0x7F80, dtype=torch.int64)[:, None] << 16
    lower = torch.tensor([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF])
    positive = (upper + lower).reshape(-1)
    return values_of(torch.cat([positive, positive - (1 << 31)]))


def drawn(number: int, seed: int = 0) -> Tensor:
    """Any finite bits."""
    words = np.random.default_rng(seed).integers(0, 1 << 32, number, dtype=np.uint32)
    values = torch.from_numpy(words.view(np.float32))
    return values[torch.isfinite(values)].clone()


# -- with the remainder -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [finite_values, lambda: drawn(1 << 18)], ids=["borders", "drawn"])
def test_nothing_is_lost_between_split_and_join(make: Callable[[], Tensor]) -> None:
    """Oracle: the bits from before, minus zero and subnormal numbers included."""
    values = make()
    weights, remainder = values.clone(), torch.empty(len(values), dtype=torch.int16)
    split(weights, remainder)
    assert not (bits_of(weights) & 0xFFFF).any()
    join(weights, remainder)
    assert torch.equal(bits_of(weights), bits_of(values))


@given(st.floats(width=32, allow_nan=False, allow_infinity=False))
def test_any_number_survives(value: float) -> None:
    values = torch.tensor([value], dtype=torch.float32)
    weights, remainder = values.clone(), torch.empty(1, dtype=torch.int16)
    split(weights, remainder)
    join(weights, remainder)
    assert torch.equal(bits_of(weights), bits_of(values))


@pytest.mark.parametrize("make", [finite_values, lambda: drawn(1 << 18)], ids=["borders", "drawn"])
def test_the_rounded_part_is_the_nearest_bf16(make: Callable[[], Tensor]) -> None:
    """Oracle: torch's conversion, which differs at ties alone: those it rounds to even, we away from zero."""
    values = make()
    ours, remainder = values.clone(), torch.empty(len(values), dtype=torch.int16)
    split(ours, remainder)
    rounded = values.clone()
    round_nearest(rounded)
    assert torch.equal(bits_of(ours), bits_of(rounded))
    theirs = values.to(torch.bfloat16).to(torch.float32)
    is_tie = (bits_of(values) & 0xFFFF) == 0x8000
    assert torch.equal(bits_of(ours[~is_tie]), bits_of(theirs[~is_tie]))
    exact = values[is_tie].double()
    is_small = ours[is_tie].isfinite()
    assert (ours[is_tie].double().abs() > exact.abs()).all()
    distance = (ours[is_tie].double() - exact).abs()
    assert torch.equal(
        distance[is_small], (values_of(bits_of(values[is_tie]) & -0x10000).double() - exact).abs()[is_small]
    )


def test_infinities_and_nan_stay_what_they_are() -> None:
    """A number that went wrong has to be noticed by whoever looks. NaN as CPUs make it, of both signs."""
    weights = values_of(torch.tensor([0x7F800000, 0xFF800000 - (1 << 32), 0x7FC00000, 0xFFC00000 - (1 << 32)]))
    rounded, remainder = weights.clone(), torch.empty(4, dtype=torch.int16)
    split(rounded, remainder)
    assert rounded[:2].tolist() == [math.inf, -math.inf]
    assert rounded[2:].isnan().all()
    join(rounded, remainder)
    assert torch.equal(bits_of(rounded), bits_of(weights))


@pytest.mark.parametrize("way", ["split", "nearest", "random"])
def test_nan_as_cuda_makes_it_stays_what_it_is(way: str) -> None:
    weights = values_of(torch.tensor([0x7FFFFFFF]))
    assert weights.isnan().all()
    if way == "split":
        split(weights, torch.empty(1, dtype=torch.int16))
    elif way == "nearest":
        round_nearest(weights)
    else:
        weights = at_random(weights)
    assert weights.isnan().all()


# -- at random --------------------------------------------------------------------------------------------------------


def at_random(values: Tensor, *, seed: int = 1, step: int = 2, name: str = "layer.0.0") -> Tensor:
    rounded = values.clone()
    round_at_random(rounded, seed=seed, step=step, name=name)
    return rounded


def test_only_the_two_neighbours_appear() -> None:
    """Oracle: the bits cut off, and one step away from zero."""
    values = torch.cat([finite_values(), drawn(1 << 16)])
    values = values[bits_of(values).bitwise_and(0x7FFFFFFF) <= LARGEST]
    below = bits_of(values) & -0x10000
    found = bits_of(at_random(values))
    is_exact = below == bits_of(values)
    assert is_exact.any()
    assert torch.equal(found[is_exact], below[is_exact])
    assert ((found == below) | (found == below + 0x10000)).all()
    assert (found != below).any()


@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize("fraction", [1 / 4096, 0.1, 0.25, 0.5, 0.9, 4095 / 4096])
@pytest.mark.parametrize("scale", [1.0, 2.0**-130, 2.0**100])
def test_it_is_right_on_average(fraction: float, sign: float, scale: float) -> None:
    """Oracle: the share that is rounded up, within five standard deviations of the fraction; with the fixed seed this
    holds or does not. Subnormal numbers have the same bits behind the border, and so the same odds."""
    number = 1 << 16
    value = sign * (1 + fraction * STEP) * scale
    exact = torch.full((number,), value, dtype=torch.float32)
    bits = int(bits_of(exact[:1]))
    share = (bits & 0xFFFF) / 65536  # what is left of the fraction in fp32
    found = (bits_of(at_random(exact)) != (bits & -0x10000)).double().mean()
    deviation = math.sqrt(share * (1 - share) / number)
    assert abs(float(found) - share) < 5 * deviation


def test_one_element_is_right_on_average_over_steps() -> None:
    """A weight sees many steps, not many neighbours. Oracle: as above, for some elements of a shard."""
    share, number = 0.25, 400
    value = 1 + share * STEP
    total = torch.zeros(64)
    for step in range(number):
        total += at_random(torch.full((64,), value), step=step) > 1
    deviation = math.sqrt(share * (1 - share) * number)
    assert (total - share * number).abs().max() < 5 * deviation


def test_neighbours_and_steps_are_independent() -> None:
    """Oracle: correlations of fair coins, within five standard deviations: of elements at some distances, of the same
    element at two steps, of two shards, of two seeds."""
    number = 1 << 16
    tie = torch.full((number,), 1 + STEP / 2)
    coins = (at_random(tie) > 1).double() * 2 - 1
    others = {
        "next step": at_random(tie, step=3),
        "shard": at_random(tie, name="layer.0.1"),
        "seed": at_random(tie, seed=2),
    }
    bound = 5 / math.sqrt(number)
    for what, other in others.items():
        assert abs(float((coins * ((other > 1).double() * 2 - 1)).mean())) < bound, what
    for distance in (1, 2, 3, 256, 4096, 32768):
        assert abs(float((coins[distance:] * coins[:-distance]).mean())) < 5 / math.sqrt(number - distance), distance


@pytest.mark.parametrize("length", [1, 255, 4096, 10_000])
def test_the_size_of_the_pieces_does_not_matter(length: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is a matter of memory. Oracle: one piece."""
    values = drawn(12_000)[:length]
    whole = at_random(values)
    halves, remainder = values.clone(), torch.empty(length, dtype=torch.int16)
    split(halves, remainder)
    monkeypatch.setattr(rounding, "PIECE_ELEMENTS", 257)
    assert torch.equal(bits_of(at_random(values)), bits_of(whole))
    again, kept = values.clone(), torch.empty(length, dtype=torch.int16)
    split(again, kept)
    assert torch.equal(bits_of(again), bits_of(halves))
    assert torch.equal(kept, remainder)


def test_it_is_a_function_of_seed_step_and_name() -> None:
    """Oracle: the same again, whatever the random state of the process; another one for each of them."""
    values = torch.full((4096,), 1 + STEP / 2)
    torch.manual_seed(1)
    first = at_random(values)
    torch.manual_seed(2)
    assert torch.equal(at_random(values), first)
    others = [at_random(values, seed=2), at_random(values, step=3), at_random(values, name="layer.0.1")]
    found = {each.numpy().tobytes() for each in [first, *others]}
    assert len(found) == 4


def test_the_bits_are_those_of_the_protocol() -> None:
    """Replicas with other versions of Handcar and torch have to get the same. Oracle: the hash in plain integers."""

    def expected(index: int, low: int, high: int) -> int:
        mixed = index ^ low
        mixed ^= mixed >> 16
        mixed = mixed * 0x7FEB352D & 0xFFFFFFFF
        mixed ^= mixed >> 15
        mixed ^= high
        mixed = mixed * 0x846CA68B & 0xFFFFFFFF
        return (mixed ^ (mixed >> 16)) & 0xFFFF

    key = hashlib.sha256(b"handcar/rounding/7/11/layer.3.1").digest()
    low, high = (int.from_bytes(key[start : start + 4], "little") for start in (0, 4))
    values = drawn(3000, seed=4)
    values = values[bits_of(values).bitwise_and(0x7FFFFFFF) <= LARGEST]
    found = bits_of(at_random(values, seed=7, step=11, name="layer.3.1")).tolist()
    for index, (bits, rounded) in enumerate(zip(bits_of(values).tolist(), found, strict=True)):
        assert rounded & 0xFFFFFFFF == ((bits & 0xFFFFFFFF) + expected(index, low, high)) & 0xFFFF0000


def test_small_updates_are_not_lost() -> None:
    """A hundred updates of 1e-4 at 1.0, where a step of bf16 is 78 times as large. Oracle: plain rounding, which never
    leaves 1.0; exact arithmetic, for the mean of many weights within five standard deviations."""
    number, updates, update = 4096, 100, 1e-4
    plain, random = torch.ones(number), torch.ones(number)
    for step in range(updates):
        for weights in (plain, random):
            weights.sub_(update)
        round_nearest(plain)
        round_at_random(random, seed=0, step=step, name="layer.0.0")
    assert (plain == 1.0).all()
    deviation = math.sqrt(updates * update * STEP / 2 / number)  # below one, a step is half as large
    assert abs(float(random.double().mean()) - (1 - updates * update)) < 5 * deviation
