"""Contributions side by side. Oracle: tensors that are added up by hand."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from coordinator.audit.sums import (
    GATHER_S,
    GIVE_UP_S,
    MAX_AHEAD,
    MAX_COMMITS,
    MAX_REMEMBERED,
    Given,
    Record,
    Sums,
    goes_against,
)
from protocol.audits import ContributionReport, contribution_seed
from protocol.ids import Lineage, PeerId, StageId, digest
from protocol.rounds.messages import Commit, Contribution
from protocol.sketch import MAX_SKETCH_BYTES, Values, distance, sketch_shards
from tests.coordinator.audit.people import tensor
from tests.coordinator.office import NO_LINEAGE, Volunteer, closing, commit, sign_closing
from tests.protocol.manifests import manifest

A, B, C = Volunteer("a"), Volunteer("b"), Volunteer("c")
MEMBERS = (A, B, C)
WEIGHTS = {"c": 16}
"""It has claimed four times of what it is credited with."""
RUN = manifest()


def lineage() -> Lineage:
    """Return one whose contributions are on record."""
    return next(
        found for number in range(100) if contribution_seed(found := Lineage(digest(bytes([number])))) is not None
    )


LINEAGE = lineage()
SEED = contribution_seed(LINEAGE) or b""


def committed() -> Commit:
    made = commit(RUN, 1, sign_closing(A, closing(RUN, 0)), members=MEMBERS, parent=NO_LINEAGE)
    contributors = tuple(Contribution(peer=who.peer, tokens=64, weight=WEIGHTS.get(who.name, 64)) for who in MEMBERS)
    return made.model_copy(update={"contributors": contributors})


def shards(*values: Any) -> bytes:
    return sketch_shards(values, SEED)


def given(who: Volunteer) -> Values:
    return tensor(who.name)


TOTAL = given(A) + given(B) + given(C) / 4


def say(sums: Sums, who: Volunteer, own: bytes, total: bytes | None = None) -> None:
    report = ContributionReport(
        stage=StageId(1),
        round=committed().round,
        lineage=LINEAGE,
        own=own,
        total=shards(TOTAL) if total is None else total,
    )
    sums.hear(who.peer, report, now_s=0.0)


def drifting(*, is_mean: bool = True, members: int = 3, turned: str = "") -> dict[PeerId, tuple[int, int]]:
    """Let members speak of a commit to which they gave much of the same; return who goes against the others."""
    sums, common = Sums(is_mean=is_mean), tensor("common")
    made = committed()
    sums.hear_commit(made.model_copy(update={"contributors": made.contributors[:members]}), LINEAGE, now_s=0.0)
    for who in MEMBERS[:members]:
        say(sums, who, shards((common + given(who)) * (-3 if who.name == turned else 1)))
    sums.due(now_s=GATHER_S)
    return sums.against()


def test_whose_drift_goes_against_all_others_is_noticed() -> None:
    """Not of two, of which nobody knows which is right, and not of sums of gradients, which are mostly noise."""
    assert drifting() == {who.peer: (1, 0) for who in MEMBERS}
    assert drifting(turned="b") == {A.peer: (1, 0), B.peer: (1, 1), C.peer: (1, 0)}
    assert drifting(turned="b", members=2) == drifting(turned="b", is_mean=False) == {}


@pytest.mark.parametrize("weight", [64, 62, 40])
def test_who_claims_more_than_it_is_credited_with_is_noted(weight: int) -> None:
    """Oracle: a retry may count twice now and then; half as much again is no retry. C counts for a quarter."""
    sums, made = Sums(), committed()
    less = made.contributors[0].model_copy(update={"weight": weight})
    sums.hear_commit(made.model_copy(update={"contributors": (less, *made.contributors[1:])}), LINEAGE, now_s=0.0)
    for who in MEMBERS:
        say(sums, who, shards(given(who)))
    sums.due(now_s=GATHER_S)
    assert sums.claiming() == {A.peer: (1, int(weight == 40)), B.peer: (1, 0), C.peer: (1, 1)}
    sums.forget(A.peer)
    assert A.peer not in sums.claiming()


def gathered(*, silent: PeerId | None = None, **lies: bytes) -> list[Record]:
    sums = Sums()
    sums.hear_commit(committed(), LINEAGE, now_s=0.0)
    for who in MEMBERS:
        if who.peer != silent:
            say(sums, who, lies.get(who.name, shards(given(who))), lies.get(f"{who.name}_total"))
    return sums.due(now_s=GATHER_S if silent is None else GIVE_UP_S)


def test_honest_contributions_add_up() -> None:
    (record,) = gathered()
    assert record.adds_up
    assert record.apart < 1e-5
    assert {peer: each.tokens for peer, each in record.contributions.items()} == {who.peer: 64 for who in MEMBERS}


def test_who_sketches_something_else_than_it_gave_is_noticed() -> None:
    (record,) = gathered(a=shards(-given(A)))
    assert not record.adds_up


def test_one_who_lies_about_the_sum_is_alone_with_it() -> None:
    (record,) = gathered(a_total=shards(-TOTAL))
    assert record.adds_up


def test_what_a_silent_member_gave_is_not_held_against_it() -> None:
    """It has not said it, and whoever lies about the sum would choose what is missing. Oracle: no record; it is
    counted who was silent."""
    sums = Sums()
    sums.hear_commit(committed(), LINEAGE, now_s=0.0)
    for who in (A, C):
        say(sums, who, shards(given(who)))
    assert sums.due(now_s=GIVE_UP_S) == []
    assert sums.silence() == {A.peer: (1, 0), B.peer: (1, 1), C.peer: (1, 0)}


def test_what_only_one_speaks_of_makes_nobody_else_silent() -> None:
    """A member can sign a commit that nobody else has seen, and name whom it likes."""
    sums = Sums()
    sums.hear_commit(committed(), LINEAGE, now_s=0.0)
    say(sums, A, shards(given(A)))
    assert sums.due(now_s=GIVE_UP_S) == []
    assert sums.silence() == {}


def test_lineages_that_are_made_up_take_no_place_from_real_ones() -> None:
    sums = Sums()
    for number in range(2 * MAX_COMMITS):
        made_up = Lineage(digest(b"made up", bytes([number % 256, number // 256])))
        report = ContributionReport(
            stage=StageId(1), round=committed().round, lineage=made_up, own=shards(given(A)), total=shards(TOTAL)
        )
        sums.hear(B.peer, report, now_s=0.0)
    sums.hear_commit(committed(), LINEAGE, now_s=0.0)
    for who in MEMBERS:
        say(sums, who, shards(given(who)))
    (record,) = sums.due(now_s=GATHER_S)
    assert record.adds_up
    assert len(sums._gathering) <= MAX_AHEAD


def test_nothing_is_said_of_a_commit_before_all_have_spoken_or_nobody_will() -> None:
    sums = Sums()
    say(sums, A, shards(given(A)))
    sums.hear_commit(committed(), LINEAGE, now_s=0.0)
    assert sums.due(now_s=GATHER_S) == []
    assert sums.due(now_s=GIVE_UP_S) == []  # two are silent: who gave what is not known
    say(sums, B, shards(given(B)))
    assert sums.due(now_s=2 * GIVE_UP_S) == []  # and it stays so


def test_numbers_that_are_made_up_do_not_add_up() -> None:
    (record,) = gathered(a=b"x" * MAX_SKETCH_BYTES)
    assert not record.adds_up


@pytest.mark.parametrize("nonsense", [b"x", b"x" * 1024, np.full(2048, np.nan, "<f4").tobytes()])
def test_nonsense_harms_nobody_else(nonsense: bytes) -> None:
    """It says nothing, also where directions are looked at. Oracle: no record, and whom its silence is held against."""
    for is_mean in (False, True):
        sums = Sums(is_mean=is_mean)
        sums.hear_commit(committed(), LINEAGE, now_s=0.0)
        for who in MEMBERS:
            say(sums, who, nonsense if who is A else shards(given(who)))
        assert sums.due(now_s=GIVE_UP_S) == []
        assert sums.silence() == {A.peer: (1, 1), B.peer: (1, 0), C.peer: (1, 0)}


def test_shards_are_seen_wherever_the_difference_is() -> None:
    """Also in the last, short segment of a long shard, and with opposite signs in two places of one pattern."""
    long = np.ones(200_000, np.float32)
    for place in (0, 65_536, 199_999):
        other = long.copy()
        other[place] += 1000
        assert distance(shards(long, long), shards(long, other)) > 0.5
    other = long.copy()
    other[5] += 1000
    other[65_536 + 5] -= 1000
    assert distance(shards(long), shards(other)) > 0.5


def record(stage: int, **signs: int) -> Record:
    """Return drifts that have a direction in common, and each one of its own, times these signs."""
    drifts = {PeerId(name): shards((tensor("common") + tensor(name)) * sign) for name, sign in signs.items()}
    return Record(
        stage=StageId(stage),
        round=committed().round,
        lineage=LINEAGE,
        seed=SEED,
        members=tuple(drifts),
        factors=(0.25,) * len(drifts),
        contributions={peer: Given(64, 64, sketch) for peer, sketch in drifts.items()},
        apart=0.0,
    )


def test_half_of_a_stage_cannot_put_out_the_other_half() -> None:
    """Two that go the same other way, beside two honest ones. Oracle: of such a split nobody knows who is right."""
    alike = record(0, p=1, q=1, r=-1, s=-1)
    drifts = dict(alike.contributions)
    drifts[PeerId("s")] = drifts[PeerId("r")]
    alike = replace(alike, contributions=drifts)
    assert not any(goes_against(alike).values())
    assert goes_against(record(0, p=1, q=1, r=-1)) == {"p": False, "q": False, "r": True}
    assert goes_against(record(0, p=1, q=1, r=1, s=1)) == dict.fromkeys("pqrs", False)


def test_every_stage_is_remembered_for_itself() -> None:
    """However many stages there are. Oracle: what was told of one of them."""
    sums = Sums(is_mean=True)
    for stage in range(20):
        for number in range(2 * MAX_REMEMBERED):
            lineage = Lineage(digest(f"{stage} {number}".encode()))
            if contribution_seed(lineage) is None:
                continue
            made = committed().model_copy(update={"stage": StageId(stage)})
            sums.hear_commit(made, lineage, now_s=0.0)
            for who in (A, B):
                report = ContributionReport(
                    stage=StageId(stage), round=made.round, lineage=lineage, own=shards(given(who)), total=shards(TOTAL)
                )
                sums.hear(who.peer, report, now_s=0.0)
            sums.due(now_s=GIVE_UP_S)
    count, silent = sums.silence()[C.peer]
    assert count == silent > 10 * MAX_REMEMBERED
    sums.forget(C.peer)
    assert C.peer not in sums.silence()
