"""Finding in receipts what an audit can look at. Oracle: paths that are written out by hand."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from coordinator.carries import RoundHops
from protocol.ids import RoundId, RunId, StageId, Version
from protocol.receipts import Hop, Window, draw_windows
from tests.coordinator.audit.people import named
from tests.coordinator.office import Volunteer
from tests.protocol import hops as builders

A, B, C = Volunteer("a"), Volunteer("b"), Volunteer("c")
HOSTS = {A.peer: (StageId(0),), B.peer: (StageId(1),), C.peer: (StageId(2),)}


def hop(caller: Volunteer, callee: Volunteer, stage: int, *, number: int = 0, step: int = 0, data: str = "") -> Hop:
    return builders.hop(
        number,
        caller.peer,
        callee.peer,
        stage,
        given=named(f"forward {stage}{data}"),
        returned=named(f"back {stage}"),
        version=Version(5),
        local_step=step,
    )


def windows(who: Volunteer, *, sent: Sequence[Hop] = (), served: Sequence[Hop] = ()) -> list[Window]:
    signed = draw_windows(who.key, run=RunId("r"), session=1, round_id=RoundId(3), sent=sent, served=served)
    return [Window.from_bytes(each.payload) for each in signed]


def told(*said: list[Window]) -> RoundHops:
    hops = RoundHops(RoundId(3), num_stages=3)
    for each in said:
        for window in each:
            hops.add(window)
    return hops


AB, BC = hop(A, B, 1), hop(B, C, 2)


def test_a_path_of_three_is_three_pieces_of_work_and_each_comes_once() -> None:
    hops = told(windows(A, sent=[AB]), windows(B, served=[AB], sent=[BC]), windows(C, served=[BC]))
    feeder, middle, last = hops.fresh(HOSTS)
    assert {feeder.peer, middle.peer, last.peer} == {A.peer, B.peer, C.peer}
    by_peer = {carry.peer: carry for carry in (feeder, middle, last)}
    first, second, third = (by_peer[who.peer] for who in (A, B, C))
    assert (first.upstream, first.downstream, first.stages, first.version) == (None, B.peer, (0,), None)
    assert (second.upstream, second.downstream, second.stages, second.version) == (A.peer, C.peer, (1,), 5)
    assert (third.upstream, third.downstream, third.stages) == (B.peer, None, (2,))
    assert (second.given, second.returned) == (named("forward 1"), named("back 1"))
    assert (second.outputs, second.gradient) == (named("forward 2"), named("back 2"))
    assert hops.fresh(HOSTS) == []


def test_what_a_peer_tells_itself_is_known_with_who_contradicts_it() -> None:
    """B works on three numbers: one all tell alike, one of which C says nothing, one of which A tells other bytes."""
    given, passed = [hop(A, B, 1, number=n) for n in range(3)], [hop(B, C, 2, number=n) for n in range(3)]
    other = hop(A, B, 1, number=2, data=" other")
    hops = told(
        windows(A, sent=[given[0], given[1], other]),
        windows(B, served=given, sent=passed),
        windows(C, served=[passed[0], passed[2]]),
    )
    assert [hops.told_by(who.peer, StageId(stage)).tokens for stage, who in enumerate((A, B, C))] == [192, 192, 128]
    assert hops.told_by(B.peer, StageId(1)).contradicted_by == {A.peer, C.peer}
    assert hops.told_by(A.peer, StageId(0)).contradicted_by == {B.peer}
    assert hops.told_by(C.peer, StageId(2)).contradicted_by == {B.peer}, "its silence contradicts B too"
    assert hops.told_by(B.peer, StageId(0)).tokens == hops.told_by(C.peer, StageId(1)).tokens == 0


def test_work_that_nobody_can_do_again_is_told_and_not_alike() -> None:
    """By the word of who has done it: with weights of its own, or of another version than most."""
    hops = told(
        windows(
            B,
            served=[
                hop(A, B, 1, number=0),
                hop(A, B, 1, number=1),
                replace(hop(A, B, 1, number=2), local_step=1),
                replace(hop(A, B, 1, number=3), version=Version(7)),
                replace(hop(A, B, 1, number=4), caller_step=1),
            ],
        )
    )
    found = hops.told_by(B.peer, StageId(1))
    assert (found.tokens, found.alike_tokens) == (5 * 64, 3 * 64)


def test_what_comes_later_completes_what_was_there() -> None:
    hops = told(windows(A, sent=[AB]), windows(C, served=[BC]))
    assert hops.fresh(HOSTS) == []
    for window in windows(B, served=[AB], sent=[BC]):
        hops.add(window)
    assert len(hops.fresh(HOSTS)) == 3


def test_a_neighbour_that_names_other_bytes_lays_nothing_at_anybodys_door() -> None:
    """Neither does it keep the others from being looked at."""
    lie = hop(A, B, 1, data="!")
    hops = told(windows(A, sent=[lie]), windows(B, served=[AB], sent=[BC]), windows(C, served=[BC]))
    assert [carry.peer for carry in hops.fresh(HOSTS)] == [C.peer]


def test_who_works_with_weights_of_its_own_cannot_be_recomputed() -> None:
    stepped = hop(A, B, 1, step=1)
    hops = told(windows(A, sent=[stepped]), windows(B, served=[stepped], sent=[BC]), windows(C, served=[BC]))
    assert {carry.peer for carry in hops.fresh(HOSTS)} == {A.peer, C.peer}
