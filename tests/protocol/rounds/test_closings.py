"""Who is believed about the end of a round, and how far ahead."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from protocol.errors import PeerFault
from protocol.ids import PeerId, RoundId, StageId
from protocol.rounds.closings import MAX_LEAP, Closings, Word
from protocol.rounds.events import Report, RosterChanged, Trouble
from protocol.rounds.messages import Credit
from protocol.rounds.neighbours import Neighbours
from protocol.rounds.slot import HeardClosing
from protocol.signing import Signed
from tests.protocol.rounds.builders import RULES, STAGE, TIMERS, B, C, closing, settings

CLOCK, OTHER = PeerId("clock"), PeerId("other clock")
FAR = 5 + MAX_LEAP + 1


def closings(*clocks: PeerId, **rules: Any) -> Closings:
    """Stand at a stage of a, b and c that knows these clocks."""
    ours = settings(rules=replace(RULES, **rules))
    neighbours = Neighbours(ours)
    neighbours.on_roster(RosterChanged({StageId(0): clocks, STAGE: (B, C)}))
    return Closings(ours, neighbours)


def word(sender: PeerId, now_s: float = 0.0) -> Word:
    """Hear something while round 5 is open."""
    return Word(sender, now_s, open_round=5)


def test_a_round_that_the_run_does_not_have_is_a_fault() -> None:
    """However good its signature is."""
    made = closings(CLOCK, last_round=RoundId(7))
    assert isinstance(made.add(closing(7, clock=CLOCK), word(CLOCK)), HeardClosing)
    with pytest.raises(PeerFault, match="no round 8"):
        made.add(closing(8, clock=CLOCK), word(CLOCK))


@pytest.mark.parametrize(("most", "credited"), [(399, 100), (400, 101)], ids=["more is counted", "more is credited"])
def test_a_closing_with_more_tokens_than_a_round_has_is_a_fault(most: int, credited: int) -> None:
    """Four numbers of 100 tokens. It would let a clock's friends count for more than everybody together."""
    made = closings(CLOCK, tokens_per_round=most)
    credits = (Credit(stage=STAGE, peer=B, tokens=credited),)
    with pytest.raises(PeerFault, match="fewer tokens"):
        made.add(closing(5, clock=CLOCK, credits=credits), word(CLOCK))


def test_a_round_far_ahead_needs_two_who_say_so() -> None:
    """Whoever signed it and whoever passed it on; one that says it twice is still one, and strangers count nothing."""
    made = closings(CLOCK, OTHER)
    far = closing(FAR, clock=CLOCK)
    assert isinstance(made.add(closing(FAR - 1, clock=CLOCK), word(CLOCK)), HeardClosing)
    for sender in (CLOCK, PeerId("stranger"), CLOCK):
        report = made.add(far, word(sender))
        assert isinstance(report, Report)
        assert report.trouble is Trouble.STRANGE_CLOCK
    assert isinstance(made.add(far, word(B)), HeardClosing)


def test_who_speaks_of_a_nearer_round_does_not_vouch_for_a_farther_one() -> None:
    """A peer that missed some rounds hears of them from an honest clock, and of the end of the run from a liar."""
    made = closings(CLOCK, OTHER)
    lie = closing(1000, clock=CLOCK)
    assert isinstance(made.add(lie, word(CLOCK)), Report)
    assert isinstance(made.add(closing(FAR, clock=OTHER), word(OTHER)), HeardClosing)
    assert isinstance(made.add(lie, word(CLOCK)), Report)


def test_leaps_do_not_add_up() -> None:
    """What counts is where we stand, not what the same source has made us believe before."""
    made = closings(CLOCK, OTHER)
    assert isinstance(made.add(closing(FAR - 1, clock=CLOCK), word(CLOCK)), HeardClosing)
    assert isinstance(made.add(closing(FAR, clock=CLOCK), word(CLOCK)), Report)


def test_the_only_replica_of_the_first_stage_is_the_clock_whatever_it_says() -> None:
    """Nobody could confirm it, and a stage that was restored may be far behind."""
    assert isinstance(closings(CLOCK).add(closing(FAR, clock=CLOCK), word(CLOCK)), HeardClosing)


def test_one_source_that_nothing_contradicts_is_believed_after_as_long_as_a_round_may_last() -> None:
    """A run that lives closes a nearer round before that, and then the waiting starts over."""
    until_s = TIMERS.round_deadline_s
    for contradicted in (False, True):
        made = closings(CLOCK, OTHER)
        far = closing(FAR, clock=CLOCK)
        assert isinstance(made.add(far, word(CLOCK)), Report)
        if contradicted:
            made.add(closing(5, clock=OTHER), word(OTHER, until_s / 2))
        assert isinstance(made.add(far, word(CLOCK, until_s)), Report if contradicted else HeardClosing)


def test_the_signer_and_the_known_payload_are_looked_at_before_anything_costs_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Everybody repeats closings, and a stranger can send as many as it likes."""
    made = closings(CLOCK)
    known = closing(5, clock=CLOCK)
    assert isinstance(made.add(known, word(CLOCK)), HeardClosing)
    monkeypatch.setattr(Closings, "_read", None)
    assert isinstance(made.add(known, word(B)), HeardClosing)
    report = made.add(Signed(payload=b"?", signer=PeerId("stranger"), signature=b"?" * 64), word(B))
    assert isinstance(report, Report)
