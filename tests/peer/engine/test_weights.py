"""Past weights within a bound. Oracle: which versions must be there, by hand."""

from __future__ import annotations

import torch

from peer.engine.weights import MAX_VERSIONS, PastWeights
from protocol.ids import StageId, Version


def keep(past: PastWeights, stage: int, version: int, elements: int = 10) -> None:
    past.keep(
        StageId(stage),
        Version(version),
        num_elements=elements,
        copy=lambda: [torch.full((elements,), float(version))],
    )


def versions(past: PastWeights, stage: int) -> list[int]:
    return [version for version in range(100) if past.find(StageId(stage), Version(version)) is not None]


def test_the_newest_stay() -> None:
    past = PastWeights(max_bytes=120)  # three of forty bytes
    for version in range(5):
        keep(past, 0, version)
    assert versions(past, 0) == [2, 3, 4]
    keep(past, 1, 7)
    assert (versions(past, 0), versions(past, 1)) == ([3, 4], [7])


def test_no_stage_has_more_than_audits_can_ask_for() -> None:
    past = PastWeights(max_bytes=1 << 20)
    for version in range(MAX_VERSIONS + 5):
        keep(past, 0, version)
    assert versions(past, 0) == list(range(5, MAX_VERSIONS + 5))


def test_a_stage_that_is_too_large_is_not_even_copied() -> None:
    past = PastWeights(max_bytes=100)
    copied: list[int] = []

    def copy() -> list[torch.Tensor]:
        copied.append(1)
        return [torch.zeros(26)]

    past.keep(StageId(0), Version(0), num_elements=26, copy=copy)
    assert not copied
    assert versions(past, 0) == []


def test_a_version_that_comes_again_is_that_of_the_lineage_that_goes_on() -> None:
    past = PastWeights(max_bytes=1000)
    keep(past, 0, 3, elements=10)
    keep(past, 0, 3, elements=20)
    found = past.find(StageId(0), Version(3))
    assert found is not None
    assert len(found[0]) == 20
