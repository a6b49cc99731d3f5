"""Which microbatches stand for a contribution of which not everything is known.

Oracle: tokens counted by hand; and norms of random gradients, of which the slack is an upper bound.
"""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from coordinator.audit.contributed import SPREAD, Contributed, contributed
from coordinator.audit.sums import Given
from coordinator.carries import Carry, Told
from protocol.ids import PeerId, StageId, Version
from protocol.sketch import folded, sketch
from tests.coordinator.audit.people import carry, tensor

P, U, D = (PeerId(name) for name in "PUD")
STAGE = StageId(1)
TOKENS = 128
SKETCH = sketch(tensor("sum"), b"s" * 32)


def works(count: int) -> list[Carry]:
    return [replace(carry(P, U, D, number), target_tokens=TOKENS) for number in range(count)]


def of(count: int, known: list[Carry], *, told: int | None = None, weight: int | None = None) -> Contributed | None:
    """Return what can be looked at of a contribution of so many microbatches, told and credited as many, or others."""
    given = Given(count * TOKENS, (count if weight is None else weight) * TOKENS, SKETCH)
    said = Told((count if told is None else told) * TOKENS, frozenset({D}))
    return contributed(STAGE, given, said, known)


def test_of_what_is_known_whole_there_is_no_slack() -> None:
    found = of(4, works(4))
    assert found is not None
    assert (len(found.works), found.slack, found.seen(SKETCH)) == (4, 0.0, SKETCH)


@pytest.mark.parametrize("hidden", [1, 2])
def test_a_third_at_most_may_be_hidden_and_makes_slack(hidden: int) -> None:
    found = of(4 + hidden, works(4))
    assert found is not None
    assert found.slack == pytest.approx(SPREAD * math.sqrt(hidden / 4))
    assert found.seen(SKETCH) == folded(SKETCH)
    assert found.contradicted_by == {D}


def test_more_than_that_is_too_much() -> None:
    assert of(7, works(4)) is None
    assert of(1, []) is None
    assert of(4, works(7)) is None, "so is more work than was given"


def test_slack_cannot_be_claimed() -> None:
    """Half as much again is claimed than is credited, or than the peer itself tells of. Oracle: it is not looked at."""
    assert of(6, works(4), weight=4) is None
    assert of(6, works(4), told=4) is None


@pytest.mark.parametrize(("known", "told"), [(5, 5), (4, 5)])
def test_more_work_than_was_given_makes_slack_as_well(known: int, told: int) -> None:
    """What was finished late, or is told of and was never done."""
    found = of(4, works(known), told=told)
    assert found is not None
    assert found.slack == pytest.approx(SPREAD * math.sqrt(1 / known))


def test_work_with_other_weights_than_most_counts_as_hidden() -> None:
    known = works(5)
    found = of(5, [*known[:4], replace(known[4], version=Version(7))])
    assert found is not None
    assert [each.number for each in found.works] == [0, 1, 2, 3]
    assert found.slack == pytest.approx(SPREAD * math.sqrt(1 / 4))


@pytest.mark.parametrize("common", [0.0, 0.3, 1.0])
@pytest.mark.parametrize(("count", "hidden"), [(3, 1), (8, 1), (8, 2), (64, 20)])
def test_honest_gradients_stay_within_the_slack_and_a_turned_sum_does_not(
    common: float, count: int, hidden: int
) -> None:
    """Gradients of microbatches have something in common, or nothing; one of the hidden ones is half as large again."""
    chance = np.random.default_rng(count)
    shared = common * chance.standard_normal(4096)
    gradients = [shared + chance.standard_normal(4096) for _ in range(count)]
    gradients[-1] *= 1.5
    known, whole = np.sum(gradients[:-hidden], axis=0), np.sum(gradients, axis=0)
    found = of(count, works(count - hidden))
    assert found is not None

    def apart(given: np.ndarray) -> float:
        return float(np.linalg.norm(given - known) / np.linalg.norm(known))

    assert apart(whole) < found.slack < apart(-whole)
