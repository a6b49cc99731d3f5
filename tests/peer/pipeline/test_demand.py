"""How many microbatches a peer keeps under way. Oracle: arithmetic by hand."""

from __future__ import annotations

import pytest

from peer.pipeline.demand import Demand, InFlight
from peer.pipeline.view import Membership, View
from protocol.ids import Lineage, PeerId, RoundId, StageId, Version

ANNE, BERT, CARA, DORA = (PeerId(name) for name in ("anne", "bert", "cara", "dora"))


def view(**members: tuple[PeerId, ...]) -> View:
    """Return a view of stages `s0`, `s1` and so on."""
    made = View()
    for name, peers in members.items():
        made.learn(
            Membership(
                stage=StageId(int(name[1:])),
                generation=1,
                round=RoundId(0),
                version=Version(0),
                lineage=Lineage(bytes(32)),
                members=dict.fromkeys(peers, 1.0),
            )
        )
    return made


def by_stage(waves: dict[str, dict[PeerId, int]]) -> dict[StageId, dict[PeerId, int]]:
    return {StageId(int(name[1:])): announced for name, announced in waves.items()}


def wanted(known: View, last: int, **waves: dict[PeerId, int]) -> int:
    demand = Demand(known, last=StageId(last))
    demand.learn(by_stage(waves))
    return demand.wanted


def test_every_stage_behind_us_wants_two_waves() -> None:
    """Stages before ours, and ours, want nothing of us."""
    known = view(s0=(ANNE,), s1=(BERT,), s2=(CARA,))
    waves = {"s0": {ANNE: 64}, "s1": {BERT: 4}, "s2": {CARA: 8}}
    assert [wanted(known, last, **waves) for last in (0, 1, 2)] == [24, 16, 0]


def test_of_a_stage_that_could_not_be_looked_up_the_last_word_stands() -> None:
    """Oracle: what was wanted before; less once the stage is known to have nobody who gathers."""
    demand = Demand(view(s0=(ANNE,), s1=(BERT,), s2=(CARA,)), last=StageId(0))
    demand.learn(by_stage({"s0": {ANNE: 32}, "s1": {BERT: 4}, "s2": {CARA: 8}}))
    steps: list[tuple[dict[str, dict[PeerId, int]], int]] = [({"s1": {BERT: 4}}, 24), ({}, 24), ({"s2": {}}, 8)]
    for found, expected in steps:
        demand.learn(by_stage(found))
        assert demand.wanted == expected
    assert demand.wave_of(StageId(0), ANNE) == 32
    assert demand.wave_of(StageId(0), DORA) == demand.wave_of(StageId(3), ANNE) == 1


def test_where_nobody_has_waves_nothing_is_wanted() -> None:
    known = view(s0=(ANNE,), s1=(BERT, CARA, DORA))
    assert wanted(known, 0, s1={BERT: 1, CARA: 1, DORA: 1}) == 0
    assert wanted(known, 0) == 0


def test_replicas_that_send_share_what_all_that_receive_want() -> None:
    """Two of stage 0, three of stage 1 that gather 8, 3 and nothing: 22 under way, 11 from each."""
    assert wanted(view(s0=(ANNE, BERT), s1=(BERT, CARA, DORA)), 0, s1={BERT: 8, CARA: 3, DORA: 1}) == 11


def test_who_is_no_member_does_not_count() -> None:
    """Oracle: a newcomer announces a wave before it works; while no members are known, all count."""
    waves = {BERT: 4, DORA: 100}
    assert wanted(view(s0=(ANNE,), s1=(BERT, CARA)), 0, s1=waves) == 8
    assert wanted(view(s0=(ANNE,)), 0, s1=waves) == 208


@pytest.mark.parametrize(("own", "most", "limit"), [(3, 64, 19), (32, 64, 48), (3, 10, 10), (8, 0, 1)])
def test_a_peer_keeps_what_others_want_if_it_has_room(own: int, most: int, limit: int) -> None:
    demand = Demand(view(s0=(ANNE,), s1=(BERT,)), last=StageId(0))
    in_flight = InFlight(demand, own=own, most=most)
    assert in_flight.limit() == max(1, min(own, most))
    demand.learn({StageId(1): {BERT: 8}})
    assert in_flight.limit() == limit
