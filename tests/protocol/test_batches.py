"""protocol/batches.py: the training order is a permutation per epoch, and a plan holds what it should."""

from __future__ import annotations

from itertools import chain, pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol.batches import (
    TaskKind,
    check_enough_tokens,
    has_evaluation,
    num_windows,
    plan_round,
    training_window,
)
from protocol.errors import CorpusError
from protocol.ids import RoundId
from protocol.manifest import BatchSpec, DataSpec
from tests.protocol.manifests import batch_spec, data_spec

T = 32
GOLDEN_EPOCH = [2, 6, 11, 8, 5, 0, 9, 3, 1, 10, 7, 4]


def _data_of(windows: int, *, heldout_windows: int = 8) -> DataSpec:
    return data_spec(train_tokens=windows * T + 1, heldout_tokens=heldout_windows * T + 1)


def _epoch(data: DataSpec, batch: BatchSpec, epoch: int) -> list[int]:
    windows = num_windows(data.train.num_tokens, batch.sequence_length)
    return [training_window(data, batch, epoch * windows + index) for index in range(windows)]


@pytest.mark.parametrize("windows", [1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 33, 64, 65, 100, 127, 255, 256, 257, 1000])
def test_every_epoch_visits_every_window_once(windows: int) -> None:
    """Oracle: sorted, an epoch is range(windows); sizes at, below and above powers of two and of four."""
    data, batch = _data_of(windows), batch_spec()
    for epoch in range(3):
        assert sorted(_epoch(data, batch, epoch)) == list(range(windows))


@given(windows=st.integers(1, 120), seed=st.integers(-(2**63), 2**63 - 1), epoch=st.integers(0, 2**40))
def test_any_size_seed_and_epoch_is_a_permutation(windows: int, seed: int, epoch: int) -> None:
    """Oracle: as above, entered at any epoch without having walked there."""
    assert sorted(_epoch(_data_of(windows), batch_spec(data_seed=seed), epoch)) == list(range(windows))


def test_epochs_and_seeds_differ() -> None:
    """Oracle: of 200 random orders no two agree at more than a few of 500 places (expected: 1)."""
    data = _data_of(500)
    orders = [_epoch(data, batch_spec(data_seed=seed), epoch) for seed in range(4) for epoch in range(4)]
    for index, one in enumerate(orders):
        for other in orders[:index]:
            assert sum(a == b for a, b in zip(one, other, strict=True)) < 12


def test_the_order_looks_shuffled() -> None:
    """Oracle: neighbours in training lie a third of the file apart on average, as for random places (n/3)."""
    order = _epoch(_data_of(3000), batch_spec(), 0)
    steps = [abs(a - b) for a, b in pairwise(order)]
    assert 900 < sum(steps) / len(steps) < 1100
    assert sum(step == 1 for step in steps) < 12  # expected: 2


def test_the_order_is_part_of_the_protocol() -> None:
    """Oracle: written down; another order would make two versions of Handcar train on different data."""
    assert _epoch(_data_of(12), batch_spec(), 0) == GOLDEN_EPOCH


def test_large_files_are_entered_anywhere_at_once() -> None:
    """Oracle: a window inside a file of 2^40 windows, without a table (which would not fit)."""
    data = _data_of(2**40)
    places = {training_window(data, batch_spec(), 2**39 + index) for index in range(100)}
    assert len(places) == 100
    assert all(0 <= place < 2**40 for place in places)


@given(windows=st.integers(8, 60), rounds=st.integers(1, 12))
def test_rounds_lay_the_order_end_to_end(windows: int, rounds: int) -> None:
    """Oracle: the rounds' windows, joined, are the endless order; nothing is skipped or repeated in between."""
    data, batch = _data_of(windows), batch_spec(num_rounds=rounds)
    plans = [plan_round(data, batch, RoundId(number)) for number in range(rounds)]
    training = [task.windows for plan in plans for task in plan if task.kind is TaskKind.TRAIN]
    joined = list(chain.from_iterable(training))
    assert joined == [training_window(data, batch, position) for position in range(rounds * 8)]


def test_a_plan_is_numbered_from_zero_and_trains_before_it_evaluates() -> None:
    """Oracle: by hand; 4 training microbatches of 2, then 8 held-out sequences as 4 of 2, in file order."""
    plan = plan_round(_data_of(100), batch_spec(), RoundId(4))
    assert [task.number for task in plan] == list(range(8))
    assert [task.kind for task in plan] == [TaskKind.TRAIN] * 4 + [TaskKind.EVAL] * 4
    assert [task.windows for task in plan[4:]] == [(0, 1), (2, 3), (4, 5), (6, 7)]


def test_an_uneven_evaluation_ends_with_a_short_microbatch() -> None:
    """Oracle: by hand; 5 sequences in microbatches of 2."""
    plan = plan_round(_data_of(100), batch_spec(heldout_sequences=5), RoundId(4))
    assert [task.windows for task in plan[4:]] == [(0, 1), (2, 3), (4,)]


def test_evaluations_come_every_few_rounds_and_at_the_end() -> None:
    """Oracle: by hand; 10 rounds, every 4: the states before rounds 4 and 8, and the final one."""
    batch = batch_spec()
    assert [number for number in range(11) if has_evaluation(batch, RoundId(number))] == [4, 8, 10]
    last = plan_round(_data_of(100), batch, RoundId(10))
    assert last
    assert all(task.kind is TaskKind.EVAL for task in last)
    assert [task.number for task in last] == [0, 1, 2, 3]


def test_enough_tokens_means_one_round_and_one_evaluation() -> None:
    """Oracle: by hand; 8 sequences of 32 need 257 tokens, and one token fewer is too few."""
    check_enough_tokens(data_spec(train_tokens=257, heldout_tokens=257), batch_spec())
    with pytest.raises(CorpusError, match=r"train\.bin holds 256 tokens, 7 sequences of 32, but 8"):
        check_enough_tokens(data_spec(train_tokens=256, heldout_tokens=257), batch_spec())
    with pytest.raises(CorpusError, match=r"heldout\.bin holds 256 tokens"):
        check_enough_tokens(data_spec(train_tokens=257, heldout_tokens=256), batch_spec())


@pytest.mark.parametrize(("tokens", "expected"), [(1, 0), (32, 0), (33, 1), (64, 1), (65, 2)])
def test_a_window_needs_one_token_more_than_its_length(tokens: int, expected: int) -> None:
    """Oracle: by hand; the labels are the inputs shifted by one."""
    assert num_windows(tokens, T) == expected
