"""coordinator/forecast/crew.py: the shortest time in which unequal replicas get through a round.

Oracles: on paper; a greedy schedule, which is the best there is for equal tasks.
"""

from __future__ import annotations

import heapq
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coordinator.forecast.crew import Limit, Load, finish

seconds = st.floats(0.01, 100.0)
loads = st.builds(
    Load,
    compute_s=seconds,
    upload_s=seconds | st.just(0.0),
    download_s=seconds | st.just(0.0),
    round_upload_s=seconds | st.just(0.0),
    round_download_s=seconds | st.just(0.0),
)
crews = st.lists(st.tuples(loads, st.integers(1, 5)), min_size=1, max_size=4)


def greedy_s(crew: list[tuple[Load, int]], count: int) -> float:
    """Give each microbatch to whoever would end it first; everybody waits for what goes beside them."""
    ends = [(load.finish_s(1), 1, index) for index, (load, number) in enumerate(crew) for _ in range(number)]
    heapq.heapify(ends)
    longest_s = max(load.finish_s(0) for load, _ in crew)
    for _ in range(count):
        end_s, done, index = heapq.heappop(ends)
        longest_s = max(longest_s, end_s)
        heapq.heappush(ends, (crew[index][0].finish_s(done + 1), done + 1, index))
    return longest_s


def test_one_replica_takes_one_after_the_other() -> None:
    assert finish([(Load(compute_s=2.0), 1)], 7).seconds == 14.0


def test_equal_replicas_wait_for_the_one_with_the_odd_one() -> None:
    found = finish([(Load(compute_s=2.0), 3)], 7)
    assert found.seconds == 6.0
    assert found.shares == (7 / 3,)


def test_a_link_that_is_slower_than_the_card_decides() -> None:
    load = Load(compute_s=1.0, upload_s=3.0, download_s=2.0)
    assert finish([(load, 1)], 5).seconds == 15.0
    assert load.limit(5) is Limit.UPLOAD


def test_what_travels_beside_takes_its_part_of_the_link() -> None:
    load = Load(compute_s=1.0, upload_s=1.0, round_upload_s=10.0)
    assert finish([(load, 1)], 5).seconds == 15.0
    assert finish([(Load(compute_s=1.0, round_download_s=10.0), 1)], 5).seconds == 10.0


def test_work_is_shared_by_speed() -> None:
    """Oracle: on paper. In 6 s the fast one does 6, each slow one 2."""
    found = finish([(Load(compute_s=1.0), 1), (Load(compute_s=3.0), 2)], 10)
    assert found.seconds == 6.0
    assert found.shares == (6.0, 2.0)


@settings(max_examples=25)
@given(crew=crews, count=st.integers(1, 60))
def test_nobody_schedules_better_or_worse(crew: list[tuple[Load, int]], count: int) -> None:
    found = finish(crew, count)
    assert found.seconds == pytest.approx(greedy_s(crew, count), rel=1e-6)
    total = sum(share * number for share, (_, number) in zip(found.shares, crew, strict=True))
    assert total == pytest.approx(count)


@settings(max_examples=25)
@given(crew=crews, more=loads, count=st.integers(1, 60))
def test_one_more_replica_never_makes_it_slower(crew: list[tuple[Load, int]], more: Load, count: int) -> None:
    """But for what is averaged, which is not the crew's to say: here the newcomer has nothing beside."""
    alone = Load(compute_s=more.compute_s, upload_s=more.upload_s)
    assert finish([*crew, (alone, 1)], count).seconds <= finish(crew, count).seconds * (1 + 1e-9)


@settings(max_examples=25)
@given(load=loads, within=st.floats(0.0, 1e4))
def test_counts_and_times_are_each_others_inverse(load: Load, within: float) -> None:
    count = load.count_within(within)
    assert load.finish_s(count + 1) > within * (1 - 1e-6)
    if count:
        assert load.finish_s(count) <= within * (1 + 1e-6)
    assert load.count_within(load.finish_s(count + 1)) >= count + 1
    assert math.isclose(load.service_s, max(load.compute_s, load.upload_s, load.download_s))
