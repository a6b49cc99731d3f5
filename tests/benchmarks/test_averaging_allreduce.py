"""Both sides of the all-reduce rows reduce the same, and what is said of memory is what the kernel says.

Oracles: a mean and a sum worked out from the members' own numbers, an allocation of known size.
"""

from __future__ import annotations

import pytest
import torch

from tests.benchmarks import averaging_allreduce
from tests.benchmarks.averaging_allreduce import SHARD_BYTES, allreduces, grown_bytes, members
from tests.benchmarks.averaging_allreduce_child import _peak_of_anonymous, shard_lengths
from tests.benchmarks.harness import Options
from tests.benchmarks.memory_processes import ReportedClock

ELEMENTS = 300_000


@pytest.mark.slow
@pytest.mark.parametrize("side", ["ours", "hivemind"])
def test_members_of_either_side_end_with_the_same_values(side: str) -> None:
    """Oracle: the numbers that the members say they began with, added up or averaged."""
    with members(side, 2, ELEMENTS, ReportedClock()) as group:
        begun = group.begun
        answers = group.step()
    divisor = 1 if side == "ours" else 2
    for end in range(2):
        expected = sum(numbers[end] for numbers in begun) / divisor
        for answer in answers:
            assert answer["ends"][end] == pytest.approx(expected, abs=1e-5)
    assert begun[0] != begun[1]


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.timeout(300)  # hivemind's matchmaking takes its time where much else runs
def test_a_small_run_yields_the_rows_that_are_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(averaging_allreduce, "QUICK_ELEMENTS", ELEMENTS)
    wanted = frozenset({"allreduce_2", "allreduce_memory"})
    rows = {row.row: row for row in allreduces(Options(quick=True, repeats=1, only=wanted))}
    assert rows.keys() == wanted
    assert (rows["allreduce_2"].ratio or 0) > 0
    assert "MB fp32, 2 members" in rows["allreduce_2"].note
    assert 0 < rows["allreduce_memory"].ours.median * SHARD_BYTES < 64 << 20


@pytest.mark.slow
def test_shards_of_a_disk_are_reduced_too() -> None:
    assert 0 < grown_bytes(ELEMENTS, from_disk=True) < 64 << 20


def test_growth_is_that_of_what_was_held_at_most() -> None:
    """Oracle: a tensor of 64 MiB that is written and dropped, after one that lives on."""
    kept = torch.ones(4 << 20)
    with _peak_of_anonymous(is_wanted=True) as grown:
        for _ in range(20):  # long enough for the sampler
            torch.ones(16 << 20)
    assert 60 << 20 < grown[0] < 80 << 20
    assert len(kept)


def test_shards_have_32_mib_but_for_the_last() -> None:
    assert shard_lengths(25_000_000) == [1 << 23, 1 << 23, 25_000_000 - (2 << 23)]
