"""Whom receipts credit with what, and who quarrels. Oracle: three stages on three or four peers, by hand."""

from __future__ import annotations

from dataclasses import replace
from itertools import permutations

import pytest

from coordinator.settlement import Dispute, Quarrel, settle
from protocol.ids import StageId
from protocol.receipts import SHORT_DIGEST_BYTES, Hop, Window
from protocol.signing import SigningKey
from tests.protocol import hops as builders
from tests.protocol.hops import window

FEEDER, MIDDLE, LAST, TWIN = (SigningKey(bytes([number]) * 32) for number in range(4))
TOKENS = 64
S0, S1, S2 = StageId(0), StageId(1), StageId(2)
CAPS = {(S0, FEEDER.peer_id): 1000, (S1, MIDDLE.peer_id): 1000, (S2, LAST.peer_id): 1000, (S1, TWIN.peer_id): 1000}


def hop(number: int, caller: SigningKey, callee: SigningKey, stage: int, *, stages: int = 1, returned: int = 1) -> Hop:
    return builders.hop(number, caller.peer_id, callee.peer_id, stage, num_stages=stages, returned=returned)


FIRST_HOP, SECOND_HOP = hop(1, FEEDER, MIDDLE, 1), hop(1, MIDDLE, LAST, 2)
HONEST = [window(FEEDER, FIRST_HOP), window(MIDDLE, FIRST_HOP, SECOND_HOP), window(LAST, SECOND_HOP)]


def test_everybody_on_a_path_that_both_ends_vouch_for_is_credited() -> None:
    settled = settle(HONEST, caps=CAPS, num_stages=3)
    assert settled.earned == {(S0, FEEDER.peer_id): 64, (S1, MIDDLE.peer_id): 64, (S2, LAST.peer_id): 64}
    assert settled.disputes == ()


def test_the_order_in_which_receipts_come_changes_nothing() -> None:
    results = {
        (tuple(sorted(settled.earned.items())), settled.disputes)
        for order in permutations(HONEST)
        for settled in [settle(order, caps=CAPS, num_stages=3)]
    }
    assert len(results) == 1


def test_receipts_handed_in_twice_count_once() -> None:
    again = [*HONEST, *HONEST, window(MIDDLE, FIRST_HOP, SECOND_HOP, session=2)]
    assert settle(again, caps=CAPS, num_stages=3) == settle(HONEST, caps=CAPS, num_stages=3)


@pytest.mark.parametrize("silent", range(3))
def test_who_says_nothing_earns_nothing_and_neither_does_its_neighbour(silent: int) -> None:
    """Of FEEDER - MIDDLE - LAST: a hop that only one end speaks of earns neither of them anything."""
    said = [each for index, each in enumerate(HONEST) if index != silent]
    earned = settle(said, caps=CAPS, num_stages=3).earned
    expected = {
        0: {(S2, LAST.peer_id): 64},
        1: {},
        2: {(S0, FEEDER.peer_id): 64},
    }
    assert earned == expected[silent]


def test_a_span_of_two_stages_is_credited_with_both() -> None:
    through = hop(3, FEEDER, LAST, 1, stages=2)
    caps = {**CAPS, (S1, LAST.peer_id): 1000}
    earned = settle([window(FEEDER, through), window(LAST, through)], caps=caps, num_stages=3).earned
    assert earned == {(S0, FEEDER.peer_id): 64, (S1, LAST.peer_id): 64, (S2, LAST.peer_id): 64}


def test_nobody_earns_more_than_the_closings_say() -> None:
    """MIDDLE and TWIN both did number 1, and LAST twice; the signed path that counted names MIDDLE."""
    other, onward = hop(1, FEEDER, TWIN, 1), hop(1, TWIN, LAST, 2)
    said = [
        window(FEEDER, FIRST_HOP, other),
        window(MIDDLE, FIRST_HOP, SECOND_HOP),
        window(TWIN, other, onward),
        window(LAST, SECOND_HOP, onward),
    ]
    caps = {(S0, FEEDER.peer_id): 64, (S1, MIDDLE.peer_id): 64, (S2, LAST.peer_id): 64}
    assert settle(said, caps=caps, num_stages=3).earned == caps


def test_a_pair_that_vouches_for_itself_has_no_path_to_show() -> None:
    made_up = [hop(number, TWIN, LAST, 2) for number in range(50)]
    caps = {(S2, LAST.peer_id): 64}
    said = [*HONEST, window(TWIN, *made_up), window(LAST, *made_up, session=2)]
    assert settle(said, caps={**CAPS, **caps, (S1, TWIN.peer_id): 0}, num_stages=3).earned == {
        (S0, FEEDER.peer_id): 64,
        (S1, MIDDLE.peer_id): 64,
        (S2, LAST.peer_id): 64,
    }


def test_a_middle_peer_is_no_feeder_because_its_caller_keeps_silent() -> None:
    """It carried the task on, but nobody says that it ever came to it."""
    earned = settle([HONEST[1], HONEST[2]], caps=CAPS, num_stages=3).earned
    assert (S1, MIDDLE.peer_id) not in earned
    assert (S0, MIDDLE.peer_id) not in earned


def quarrel(*said: Window) -> set[Dispute]:
    return set(settle(said, caps=CAPS, num_stages=3).disputes)


def test_who_names_other_bytes_than_its_neighbour_quarrels_with_it() -> None:
    lie = replace(FIRST_HOP, returned=bytes(SHORT_DIGEST_BYTES))
    assert quarrel(window(FEEDER, FIRST_HOP), window(MIDDLE, lie)) == {
        Dispute(1, S1, FEEDER.peer_id, MIDDLE.peer_id, Quarrel.CONTRADICTED)
    }


def test_who_has_said_all_and_not_this_denies_it() -> None:
    other = hop(2, FEEDER, MIDDLE, 1)
    assert quarrel(window(FEEDER, FIRST_HOP, other), window(MIDDLE, other)) == {
        Dispute(1, S1, FEEDER.peer_id, MIDDLE.peer_id, Quarrel.DENIED)
    }
    assert quarrel(window(FEEDER, other), window(MIDDLE, FIRST_HOP, other)) == {
        Dispute(1, S1, FEEDER.peer_id, MIDDLE.peer_id, Quarrel.UNRECEIVED)
    }


def test_who_has_not_handed_in_yet_denies_nothing() -> None:
    assert quarrel(window(FEEDER, FIRST_HOP)) == set()


def test_half_of_the_parts_deny_nothing() -> None:
    """Parts come one by one; what is missing may be in the next."""
    other = hop(2, FEEDER, MIDDLE, 1)
    half = window(MIDDLE, other).model_copy(update={"parts": 2})
    assert quarrel(window(FEEDER, FIRST_HOP, other), half) == set()


def test_a_lie_beside_the_truth_settles_nothing_against_the_truth() -> None:
    """A second session that says something else takes no credit from what fits."""
    lie = replace(FIRST_HOP, returned=bytes(SHORT_DIGEST_BYTES))
    said = [*HONEST, window(MIDDLE, lie, session=9)]
    assert settle(said, caps=CAPS, num_stages=3).earned == settle(HONEST, caps=CAPS, num_stages=3).earned
