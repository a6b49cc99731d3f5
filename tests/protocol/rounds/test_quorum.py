"""Who conducts, and how many are enough."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from protocol.ids import Lineage, PeerId, RunId, StageId
from protocol.rounds.quorum import is_quorum, may_go_on, steward_order

ORDERS = st.integers(1, 9).map(lambda size: tuple(PeerId(f"p{index}") for index in range(size)))


@given(st.data())
def test_any_two_quorums_share_a_member(data: st.DataObject) -> None:
    """The property that safety rests on; oracle: plain set intersection."""
    order = data.draw(ORDERS)
    one, other = (data.draw(st.sets(st.sampled_from(order))) for _ in range(2))
    if is_quorum(one, order, break_tie=True) and is_quorum(other, order, break_tie=True):
        assert one & other


@given(ORDERS)
def test_everybody_is_a_quorum_and_nobody_is_none(order: tuple[PeerId, ...]) -> None:
    """The two ends of the scale."""
    assert is_quorum(order, order, break_tie=False)
    assert not is_quorum((), order, break_tie=True)


def test_of_two_halves_only_the_one_with_the_first_member_counts() -> None:
    """And not even that one for a steward that has slept."""
    order = (PeerId("a"), PeerId("b"))
    assert is_quorum({PeerId("a")}, order, break_tie=True)
    assert not is_quorum({PeerId("b")}, order, break_tie=True)
    assert not is_quorum({PeerId("a")}, order, break_tie=False)


def test_the_dead_are_not_waited_for_but_stay_in_the_count() -> None:
    """Of three, one is dead and one silent: the third is half of the living, and still no quorum."""
    a, b, c = (PeerId(name) for name in "abc")
    facts = {"has_listeners": False, "break_tie": True}
    assert may_go_on({a}, (a, b, c), gone={b, c}, **facts)
    assert may_go_on({a, b}, (a, b, c), gone=set(), **facts)
    assert not may_go_on({a}, (a, b, c), gone={b}, **facts)


def test_dead_who_were_a_quorum_may_have_told_somebody_without_a_seat() -> None:
    """Then the survivor is not enough at once; it is, if those who are dead could not decide without it."""
    a, b, c = (PeerId(name) for name in "abc")
    facts = {"has_listeners": True, "break_tie": True}
    assert not may_go_on({b}, (a, b), gone={a}, **facts)
    assert may_go_on({a}, (a, b), gone={b}, **facts)
    assert may_go_on({a, b}, (a, b, c), gone={c}, **facts)
    assert not may_go_on({a}, (a, b, c), gone={b, c}, **facts)


def test_strangers_do_not_count() -> None:
    """A crowd of non-members is no quorum."""
    order = (PeerId("a"), PeerId("b"), PeerId("c"))
    assert not is_quorum({PeerId("x"), PeerId("y"), PeerId("z"), PeerId("a")}, order, break_tie=True)


def test_the_order_changes_with_the_lineage_and_does_not_depend_on_how_members_are_listed() -> None:
    """Work is spread over rounds, and everybody computes the same order."""
    members = [PeerId(f"p{index}") for index in range(6)]
    firsts = set()
    for number in range(40):
        lineage = Lineage(bytes([number]) * 32)
        order = steward_order(RunId("r"), StageId(0), lineage, members)
        assert order == steward_order(RunId("r"), StageId(0), lineage, members[::-1])
        firsts.add(order[0])
    assert firsts == set(members)
