"""Which half of a torn swarm goes on. Oracle: halves that are put together by hand, and tokens added up."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

import pytest

from coordinator.forks import Branch, Settlement, branches, have_met, settle
from coordinator.store.tree import CommitLink
from protocol.ids import Lineage, PeerId, RoundId, StageId, Version, digest

MOST = 100


def grow(
    stage: int,
    half: str,
    rounds: range,
    *,
    after: Sequence[CommitLink] = (),
    tokens: int = 30,
    members: int = 2,
    takers: int = 2,
    closed_by: str = "",
) -> list[CommitLink]:
    """Let one half commit some rounds of a stage, after others; oldest first."""
    links = list(after)
    for number in rounds:
        parent = links[-1].lineage if links else Lineage(digest(b"root", bytes([stage])))
        links.append(
            CommitLink(
                stage=StageId(stage),
                round=RoundId(number),
                version=Version(number + 1),
                lineage=Lineage(digest(parent, half.encode(), bytes([stage, number]))),
                parent=parent,
                closing=(digest(b"round", bytes([number])), PeerId(closed_by or half)),
                tokens=tokens,
                members=members,
                takers=takers,
            )
        )
    return links


def branch(*peers: str, links: Sequence[CommitLink]) -> Branch:
    newest_first = tuple(reversed(links))
    return Branch(stage=links[-1].stage, tip=links[-1].lineage, peers=frozenset(map(PeerId, peers)), links=newest_first)


def chosen(*found: Branch, order: int = 0) -> Settlement:
    """Settle between branches, whoever is heard first."""
    shuffled = list(found)
    Random(order).shuffle(shuffled)
    by_stage: dict[StageId, list[Branch]] = {}
    for each in shuffled:
        by_stage.setdefault(each.stage, []).append(each)
    settlement = settle(by_stage, most_tokens=MOST)
    assert settlement is not None
    return settlement


def tips(settlement: Settlement) -> dict[int, Lineage]:
    return {stage: each.tip for stage, each in settlement.kept.items()}


# -- telling branches apart -----------------------------------------------------------------------------


def test_who_is_behind_stands_in_no_branch_of_its_own() -> None:
    """A has not heard of the newest commits. Oracle: one branch, which B alone stands for."""
    links = grow(0, "whole", range(3))
    paths = {links[0].lineage: (), links[2].lineage: tuple(reversed(links[1:]))}
    (found,) = branches(StageId(0), paths, {PeerId("a"): links[0].lineage, PeerId("b"): links[2].lineage})
    assert (found.tip, found.peers) == (links[2].lineage, frozenset({PeerId("b")}))


def test_who_stands_where_others_have_parted_is_a_witness_of_neither() -> None:
    """A is a beat behind; B has gone on, and C elsewhere."""
    trunk = grow(0, "trunk", range(1))
    left, right = (grow(0, half, range(1, 3), after=trunk) for half in ("left", "right"))
    paths = {
        trunk[-1].lineage: (),
        left[-1].lineage: tuple(reversed(left[1:])),
        right[-1].lineage: tuple(reversed(right[1:])),
    }
    standing = {PeerId("a"): trunk[-1].lineage, PeerId("b"): left[-1].lineage, PeerId("c"): right[-1].lineage}
    found = {each.tip: each.peers for each in branches(StageId(0), paths, standing)}
    assert found == {left[-1].lineage: {"b"}, right[-1].lineage: {"c"}}


def test_they_have_met_if_one_has_seen_where_the_other_stood() -> None:
    left, right = (branch(half[0], links=grow(0, half, range(4))) for half in ("left", "right"))
    seen = right.links[2].lineage  # it has gone on since
    assert have_met([left, right], [(PeerId("l"), seen)])
    assert not have_met([left, right], [(PeerId("r"), seen)]), "its own branch"
    assert not have_met([left, right], [(PeerId("x"), seen)]), "it stands nowhere"
    assert not have_met([left, right], [(PeerId("l"), Lineage(bytes(32)))]), "nobody has been there"
    assert not have_met([left], [(PeerId("l"), seen)])


# -- the choice -----------------------------------------------------------------------------------------


def test_a_swarm_that_is_whole_has_nothing_to_settle() -> None:
    first, second = (branch("a", "b", links=grow(stage, "whole", range(3))) for stage in (0, 1))
    assert settle({StageId(0): [first], StageId(1): [second]}, most_tokens=MOST) is None
    assert settle({}, most_tokens=MOST) is None


@pytest.mark.parametrize("order", range(6))
def test_the_half_that_has_done_more_goes_on_with_all_of_its_stages(order: int) -> None:
    """The right half has more tokens in all, though not at stage 1."""
    left = [grow(0, "left", range(2, 4)), grow(1, "left", range(2, 4), tokens=60)]
    right = [grow(0, "right", range(2, 5), tokens=90), grow(1, "right", range(2, 4))]
    found = [branch("a", "b", links=links) for links in left] + [branch("c", "d", links=links) for links in right]
    settlement = chosen(*found, order=order)
    assert tips(settlement) == {0: right[0][-1].lineage, 1: right[1][-1].lineage}
    assert settlement.given_up == {stage: tuple(reversed(lost)) for stage, lost in enumerate(left)}


def test_of_equal_halves_the_lower_lineage_goes_on() -> None:
    halves = [grow(0, half, range(2)) for half in ("left", "right")]
    settlement = chosen(*(branch(str(number), links=half) for number, half in enumerate(halves)))
    assert tips(settlement) == {0: min(half[-1].lineage for half in halves)}


def test_closings_after_the_halves_have_met_say_nothing() -> None:
    """The left one's clock has closed rounds 2 to 9 for both, and the right one's stage 0 has made few commits of them.

    Oracle: whose name each tip has. By all closings, the right half's stage 1 would be of the left half.
    """
    found = {}
    for stage in (0, 1):
        for half, tokens in (("left", 20), ("right", 90)):
            apart = grow(stage, half, range(2), tokens=tokens)
            found[stage, half] = grow(stage, half, range(2, 10), after=apart, tokens=tokens, closed_by="left")
    found[0, "right"] = found[0, "right"][:3]
    settlement = chosen(*(branch(f"{half} 1", f"{half} 2", links=links) for (_, half), links in found.items()))
    assert tips(settlement) == {stage: found[stage, "right"][-1].lineage for stage in (0, 1)}


def test_a_half_that_cannot_train_all_stages_does_not_go_on() -> None:
    """Stage 2 has lost all of its replicas in the half that had done more."""
    found = {
        (stage, half): branch(half, half + "er", links=grow(stage, half, range(4), tokens=tokens))
        for stage in range(3)
        for half, tokens in (("rich", 90), ("poor", 30))
        if (stage, half) != (2, "rich")
    }
    assert tips(chosen(*found.values())) == {stage: found[stage, "poor"].tip for stage in (0, 1)}


def test_a_stage_that_is_torn_alone_is_settled_alone() -> None:
    """Its replicas could not reach each other, but those of the other stages could. All rounds have one closing."""
    first = branch("a", "b", links=grow(0, "whole", range(4)))
    left = branch("c", "d", links=grow(1, "left", range(4), closed_by="whole"))
    right = branch("e", "f", links=grow(1, "right", range(4), tokens=50, closed_by="whole"))
    settlement = chosen(first, left, right)
    assert tips(settlement) == {1: right.tip}
    assert set(settlement.given_up) == {1}


def test_a_half_that_was_torn_again_counts_what_its_parts_had_done_together() -> None:
    """Oracle: tokens by hand: left 2 * 60, right 4 * 30 and then 30 or 60."""
    left, trunk = grow(0, "left", range(2), tokens=60), grow(0, "right", range(4))
    upper, lower = (grow(0, half, range(4, 4 + n), after=trunk) for half, n in (("upper", 1), ("lower", 2)))
    settlement = chosen(*(branch(f"{n}a", f"{n}b", links=links) for n, links in enumerate((left, upper, lower))))
    assert tips(settlement) == {0: lower[-1].lineage}
    assert set(settlement.given_up[StageId(0)]) == {*left, upper[-1]}, "the trunk goes on"


def test_what_few_have_reported_counts_less_and_nothing_for_more_than_a_round() -> None:
    """Oracle: 10 rounds of 30, of which all have told: 300. Of 50, one of two: 250. A million, one of ten: 100."""
    honest = grow(0, "honest", range(10))
    half_told = grow(0, "half", range(10), tokens=50, takers=1)
    boasting = grow(0, "boasting", range(10), tokens=10**6, members=10, takers=1)
    settlement = chosen(*(branch(f"{n}a", f"{n}b", links=each) for n, each in enumerate((honest, half_told, boasting))))
    assert tips(settlement) == {0: honest[-1].lineage}


def test_a_single_peer_takes_no_stage_from_two() -> None:
    """It says that it has been torn away, and done much. Nobody else can say whether it has."""
    honest = branch("a", "b", links=grow(0, "honest", range(2)))
    made_up = branch("c", links=grow(0, "made up", range(50), tokens=100, members=1, takers=1))
    assert tips(chosen(honest, made_up)) == {0: honest.tip}
