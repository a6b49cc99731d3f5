"""Which half of a torn swarm goes on. Oracle: halves that are put together by hand, and tokens added up."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from random import Random

import pytest

from coordinator.forks import Settlement, settle
from coordinator.store.history import CommitLink
from protocol.ids import Lineage, PeerId, StageId, Version, digest

MOST = 100
ROOTS = {stage: Lineage(digest(b"root", bytes([stage]))) for stage in range(3)}
Standing = dict[StageId, dict[PeerId, Lineage]]


def grow(
    stage: int,
    parent: Lineage,
    half: str,
    rounds: range,
    *,
    tokens: int = 30,
    members: int = 2,
    takers: int = 2,
    closed_by: str = "",
) -> list[CommitLink]:
    """Let one half commit some rounds of a stage; oldest first."""
    links = []
    for number in rounds:
        lineage = Lineage(digest(parent, half.encode(), bytes([stage, number])))
        links.append(
            CommitLink(
                stage=StageId(stage),
                version=Version(number + 1),
                lineage=lineage,
                parent=parent,
                closing=(digest(b"round", bytes([number])), PeerId(closed_by or half)),
                tokens=tokens,
                members=members,
                takers=takers,
            )
        )
        parent = lineage
    return links


def stand(*where: tuple[str, Sequence[CommitLink]]) -> Standing:
    """Let peers stand where commits have led to."""
    standing: Standing = {}
    for peer, links in where:
        standing.setdefault(links[-1].stage, {})[PeerId(peer)] = links[-1].lineage
    return standing


def chosen(links: Sequence[CommitLink], standing: Mapping[StageId, Mapping[PeerId, Lineage]]) -> Settlement:
    found = settle(links, standing, most_tokens=MOST)
    assert found is not None
    return found


def tips(found: Settlement) -> dict[int, Lineage]:
    return {stage: branch.tip for stage, branch in found.kept.items()}


def test_a_swarm_that_is_whole_has_nothing_to_settle() -> None:
    """Nor has one in which a stage, or a replica, is behind."""
    first, second = (grow(stage, ROOTS[stage], "whole", range(3)) for stage in (0, 1))
    standing = stand(("a", first), ("b", first[:2]), ("c", second[:1]))
    assert settle([*first, *second], standing, most_tokens=MOST) is None
    assert settle([], {}, most_tokens=MOST) is None


def test_a_branch_that_nobody_stands_on_is_none() -> None:
    """Its replicas have died, or come back."""
    left, right = (grow(0, ROOTS[0], half, range(3)) for half in ("left", "right"))
    assert settle([*left, *right], stand(("a", left)), most_tokens=MOST) is None


@pytest.mark.parametrize("order", range(6))
def test_the_half_that_has_done_more_goes_on_with_all_of_its_stages(order: int) -> None:
    """The right half has more tokens in all, though not at stage 1. It does not matter who is heard first."""
    whole = [grow(stage, ROOTS[stage], "whole", range(2)) for stage in (0, 1)]
    left = [
        grow(0, whole[0][-1].lineage, "left", range(2, 4)),
        grow(1, whole[1][-1].lineage, "left", range(2, 4), tokens=60),
    ]
    right = [
        grow(0, whole[0][-1].lineage, "right", range(2, 5), tokens=90),
        grow(1, whole[1][-1].lineage, "right", range(2, 4)),
    ]
    links = list(itertools.chain(*whole, *left, *right))
    Random(order).shuffle(links)
    standing = stand(("a", left[0]), ("b", left[1]), ("c", right[0]), ("d", right[1]))
    found = chosen(links, standing)
    assert tips(found) == {0: right[0][-1].lineage, 1: right[1][-1].lineage}
    assert found.given_up == {stage: tuple(reversed(lost)) for stage, lost in enumerate(left)}


def test_of_equal_halves_the_lower_lineage_goes_on() -> None:
    halves = [grow(0, ROOTS[0], half, range(2)) for half in ("left", "right")]
    found = chosen([*halves[0], *halves[1]], stand(("a", halves[0]), ("b", halves[1])))
    assert tips(found) == {0: min(half[-1].lineage for half in halves)}


def test_closings_after_the_halves_have_met_say_nothing() -> None:
    """Both have ended rounds 3 to 9 by the closings of the left one's clock. Oracle: whose name each tip has."""
    branches = {}
    for stage in (0, 1):
        for half, tokens in (("left", 20), ("right", 40)):
            apart = grow(stage, ROOTS[stage], half, range(3), tokens=tokens)
            met = grow(stage, apart[-1].lineage, half, range(3, 10), tokens=tokens, closed_by="left")
            branches[stage, half] = [*apart, *met]
    standing = stand(*((f"{half}{stage}", links) for (stage, half), links in branches.items()))
    found = chosen([link for links in branches.values() for link in links], standing)
    assert tips(found) == {stage: branches[stage, "right"][-1].lineage for stage in (0, 1)}


def test_a_half_that_cannot_train_all_stages_does_not_go_on() -> None:
    """Stage 2 has lost all of its replicas in the half that had done more."""
    links = {
        (stage, half): grow(stage, ROOTS[stage], half, range(4), tokens=tokens)
        for stage in range(3)
        for half, tokens in (("rich", 90), ("poor", 30))
    }
    standing = stand(
        *((f"{half}{stage}", found) for (stage, half), found in links.items() if (stage, half) != (2, "rich"))
    )
    found = chosen([link for each in links.values() for link in each], standing)
    assert tips(found) == {stage: links[stage, "poor"][-1].lineage for stage in (0, 1)}


def test_a_stage_that_is_torn_alone_is_settled_alone() -> None:
    """Its replicas could not reach each other, but those of the other stages could. All rounds have one closing."""
    first = grow(0, ROOTS[0], "whole", range(4))
    left, right = (
        grow(1, ROOTS[1], half, range(4), tokens=tokens, closed_by="whole") for half, tokens in (("l", 30), ("r", 50))
    )
    found = chosen([*first, *left, *right], stand(("a", first), ("b", left), ("c", right)))
    assert tips(found) == {1: right[-1].lineage}
    assert set(found.given_up) == {1}


def test_a_half_that_was_torn_again_counts_what_its_parts_had_done_together() -> None:
    """Oracle: tokens by hand: left 2 * 50, right 4 * 30 and then 30 or 60."""
    left = grow(0, ROOTS[0], "left", range(2), tokens=50)
    trunk = grow(0, ROOTS[0], "right", range(4))
    upper, lower = (grow(0, trunk[-1].lineage, half, range(4, 4 + n)) for half, n in (("upper", 1), ("lower", 2)))
    found = chosen([*left, *trunk, *upper, *lower], stand(("a", left), ("b", upper), ("c", lower)))
    assert tips(found) == {0: lower[-1].lineage}
    assert set(found.given_up[StageId(0)]) == {*left, *upper}, "the trunk goes on"


def test_what_few_have_reported_counts_less_and_nothing_for_more_than_a_round() -> None:
    """Oracle: 10 rounds of 30, of which all have told: 300. Of 50, one of two: 250. A million, one of ten: 100."""
    honest = grow(0, ROOTS[0], "honest", range(10))
    half_told = grow(0, ROOTS[0], "half", range(10), tokens=50, takers=1)
    boasting = grow(0, ROOTS[0], "boasting", range(10), tokens=10**6, members=10, takers=1)
    links = [*honest, *half_told, *boasting]
    standing = stand(("a", honest), ("b", half_told), ("c", boasting))
    assert tips(chosen(links, standing)) == {0: honest[-1].lineage}


def test_a_single_peer_takes_no_stage_from_two() -> None:
    """It says that it has been torn away, and done much. Nobody else can say whether it has."""
    honest = grow(0, ROOTS[0], "honest", range(2))
    made_up = grow(0, ROOTS[0], "made up", range(50), tokens=100, members=1, takers=1)
    standing = stand(("a", honest), ("b", honest), ("c", made_up))
    assert tips(chosen([*honest, *made_up], standing)) == {0: honest[-1].lineage}


def test_where_they_have_parted_may_be_too_long_ago() -> None:
    """Then what is known of both decides."""
    left, right = (
        grow(0, Lineage(digest(half.encode())), half, range(9, 9 + n)) for half, n in (("left", 3), ("right", 5))
    )
    found = chosen([*left, *right], stand(("a", left), ("b", right)))
    assert tips(found) == {0: right[-1].lineage}
    assert found.given_up == {0: tuple(reversed(left))}
