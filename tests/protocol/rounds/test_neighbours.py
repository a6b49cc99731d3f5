"""What is remembered about others, and for how long."""

from __future__ import annotations

from protocol.ids import PeerId, StageId, Version
from protocol.rounds.events import RosterChanged
from protocol.rounds.messages import MAX_SEATS, Ready
from protocol.rounds.neighbours import READY_BEATS, Neighbours
from tests.protocol.rounds.builders import STAGE, TIMERS, A, B, C, chain, settings

HEAD = chain().head.lineage
READY = Ready(stage=STAGE, session=1, generation=1, lineage=HEAD, version=Version(0), state_digest=None)


def test_joiners_are_forgotten_and_never_more_than_a_stage_has_seats() -> None:
    """Also where nobody asks for them: a replica that only listens has no list of members to write."""
    made = Neighbours(settings())
    for number in range(2 * MAX_SEATS):
        made.note_ready(PeerId(f"joiner {number}"), READY, 0.0)
    made.note_ready(PeerId("joiner 0"), READY, 1.0)
    assert len(made.listeners()) == MAX_SEATS
    made.note_ready(B, READY, READY_BEATS * TIMERS.ready_s + 0.5)
    assert made.listeners() == {PeerId("joiner 0"), B}


def test_a_replica_without_a_seat_is_a_listener_until_its_host_refuses() -> None:
    """Or until it is heard again."""
    made = Neighbours(settings())
    made.on_roster(RosterChanged({StageId(0): (C,), STAGE: (A, B)}))
    assert made.has_listeners((A,))
    assert not made.has_listeners((A, B))
    made.note_gone((), B)
    assert not made.has_listeners((A,))
    made.note_heard(B, 1.0)
    assert made.has_listeners((A,))


def test_a_gap_as_long_as_the_patience_means_that_our_line_was_down() -> None:
    """Oracle: since when there is company; shorter gaps are a quiet swarm."""
    made = Neighbours(settings())
    for now_s in (1.0, 2.0, 2.0 + TIMERS.patience_s / 2):
        made.note_heard(B, now_s)
    assert made.company_since_s == 0.0
    made.note_heard(C, now_s + TIMERS.patience_s)
    assert made.company_since_s == now_s + TIMERS.patience_s
    made.note_heard(B, now_s + TIMERS.patience_s + 1.0)
    assert made.company_since_s == now_s + TIMERS.patience_s
