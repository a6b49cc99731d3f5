"""Which microbatches stand for a contribution of which not everything is known.

Oracle: tokens counted by hand; and norms of random gradients, of which the slack is an upper bound.
"""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from coordinator.audit.contributed import SPREAD, Contributed, Wrongs, contributed
from coordinator.audit.sums import Given
from coordinator.carries import Carry, Told
from protocol.ids import PeerId, RoundId, StageId, Version
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
    tokens = (count if told is None else told) * TOKENS
    said = Told(tokens, alike_tokens=tokens, contradicted_by=frozenset({D}))
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


def test_what_is_claimed_or_given_beyond_is_hidden_too() -> None:
    """Oracle: the slack for two of six."""
    for found in (of(6, works(4), weight=4), of(6, works(4), told=4)):
        assert found is not None
        assert found.slack == pytest.approx(SPREAD * math.sqrt(2 / 4))


def blamed(*found: str, neighbours: int = 4, hours: float = 0.0) -> bool:
    """Tell whether P is a liar once its sums of as many rounds were wrong, in contradiction with these."""
    wrongs = Wrongs()
    for round_id, others in enumerate(found):
        wrongs.note(P, RoundId(round_id), frozenset(map(PeerId, others)), num_neighbours=neighbours, now_s=0.0)
    return wrongs.is_liar(P, now_s=3600.0 * hours)


def test_who_falls_out_with_one_after_the_other_is_a_liar() -> None:
    """Oracle: whether two of four neighbours could have done it all."""
    assert blamed("ab", "cd", "ef")
    assert blamed("a", "b", "c")
    assert not blamed("a", "b", "c", hours=1.1)
    assert not blamed("a", "b", "a", "b", "a"), "two that lie together"
    assert blamed("a", "b", "c", "d", neighbours=3)
    assert not blamed("a", "b"), "that is too few"


def test_a_neighbour_that_spoils_and_hides_a_microbatch_every_round_gets_nobody_struck() -> None:
    """Whatever answers others have lost meanwhile. Oracle: it alone could have done it all."""
    assert not blamed("a", "ab", "ac", "ad", "a", "abcd", neighbours=4)
    assert not blamed("a", "ab", "ac", "a", neighbours=1)


def test_nobody_is_framed_by_a_liar_that_leaves_afterwards() -> None:
    """Two of four neighbours take turns; then there are three."""
    wrongs = Wrongs()
    for round_id, other in enumerate("abab"):
        wrongs.note(P, RoundId(round_id), frozenset({PeerId(other)}), num_neighbours=4, now_s=0.0)
    wrongs.note(P, RoundId(4), frozenset({PeerId("b")}), num_neighbours=3, now_s=0.0)
    assert not wrongs.is_liar(P, now_s=0.0)


def test_what_is_hidden_without_a_contradiction_is_held_against_nobody() -> None:
    assert not blamed(*[""] * 10)


def test_wrong_sums_follow_a_key_and_are_forgotten_with_an_appeal() -> None:
    wrongs, new = Wrongs(), PeerId("new")
    for round_id, other in enumerate("ab"):
        wrongs.note(P, RoundId(round_id), frozenset({PeerId(other)}), num_neighbours=2, now_s=0.0)
    wrongs.succeed(P, new)
    wrongs.note(new, RoundId(2), frozenset({PeerId("c")}), num_neighbours=2, now_s=0.0)
    assert wrongs.is_liar(new, now_s=1.0)
    wrongs.forget(new)
    assert not wrongs.is_liar(new, now_s=1.0)


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
