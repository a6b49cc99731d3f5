"""The arithmetic of closings and commits."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol.errors import PeerFault
from protocol.ids import PeerId, RoundId, StageId, digest
from protocol.rounds import RoundSize
from protocol.rounds.messages import MAX_CREDITS, Ballot, Closing, Contribution, Credit
from protocol.rounds.records import (
    Draft,
    check_proposal,
    check_weights,
    clip_scale,
    count_losses,
    draw_closing,
    draw_commit,
    group_id,
    weigh,
)
from protocol.rounds.slot import HeardClosing, Slot, StagedBytes
from tests.protocol.rounds.builders import (
    RULES,
    RUN,
    STAGE,
    A,
    B,
    C,
    chain,
    closing,
    commit,
    done,
    heard,
    seat,
    settings,
    slot,
)

BALLOT = Ballot(number=1, steward=A)


def _credit(peer: PeerId, tokens: int, stage: int = STAGE) -> Credit:
    return Credit(stage=StageId(stage), peer=peer, tokens=tokens)


@given(st.sets(st.integers(0, 6)))
def test_a_closing_counts_what_is_done_and_what_is_not(numbers: set[int]) -> None:
    """Five training and two evaluation numbers; oracle: counting them by hand."""
    record = draw_closing(RUN, RoundId(0), RoundSize(5, 2), {number: done(number) for number in numbers})
    train, evaluation = {n for n in numbers if n < 5}, {n for n in numbers if n >= 5}
    assert (record.tasks_done, record.tasks_lost) == (len(train), 5 - len(train))
    assert record.evals_done == len(evaluation)
    assert record.target_tokens == 100 * len(train)
    assert record.eval_loss_sum == 200.0 * len(evaluation)
    assert Closing.from_bytes(record.to_bytes()) == record


def test_the_order_of_arrival_does_not_change_a_closing() -> None:
    """Sums of floats depend on order, so it is fixed: two clocks with the same bits write the same bytes."""
    losses = {number: done(number).model_copy(update={"loss_sum": 0.1 * 3**number}) for number in range(6)}
    one = draw_closing(RUN, RoundId(0), RoundSize(6), losses)
    other = draw_closing(RUN, RoundId(0), RoundSize(6), dict(reversed(losses.items())))
    assert one.to_bytes() == other.to_bytes()


def test_evaluation_earns_no_gradient_credit() -> None:
    """Credits are what averaging weights are compared with."""
    tasks = {number: done(number, credits=(_credit(A, 100),)) for number in (0, 5)}
    record = draw_closing(RUN, RoundId(0), RoundSize(5, 2), tasks)
    assert record.credits == (_credit(A, 100),)


def test_a_bitmap_of_another_size_is_no_closing() -> None:
    """Neither too long, nor with bits beyond the last number."""
    record = draw_closing(RUN, RoundId(0), RoundSize(5), {})
    for bits in (b"", b"\0\0", b"\x20"):
        with pytest.raises(ValueError, match="bitmap"):
            Closing.model_validate({**record.model_dump(), "done": bits})


def test_tokens_dropped_are_those_credited_to_whom_the_average_lacks() -> None:
    """Over all closings that a commit covers, and of this stage only."""
    first = draw_closing(RUN, RoundId(0), RoundSize(4), {0: done(0, credits=(_credit(C, 60),))})
    second = draw_closing(
        RUN, RoundId(1), RoundSize(4), {0: done(0, credits=(_credit(A, 100), _credit(C, 99, stage=STAGE + 1)))}
    )
    assert count_losses(STAGE, [Contribution(peer=A, tokens=100, weight=100)], [first, second]) == (60, 0)


def test_tokens_counted_double_are_those_beyond_the_credits() -> None:
    """Also of whom no path of this stage has named."""
    record = draw_closing(RUN, RoundId(0), RoundSize(4), {0: done(0, credits=(_credit(A, 100), _credit(B, 100, 7)))})
    group = [Contribution(peer=A, tokens=130, weight=130), Contribution(peer=B, tokens=5, weight=5)]
    assert count_losses(STAGE, group, [record]) == (0, 35)


def test_who_had_to_begin_its_sum_anew_has_dropped_what_it_was_credited_with() -> None:
    """And takes nothing from what another one has counted double."""
    record = draw_closing(RUN, RoundId(0), RoundSize(4), {0: done(0, credits=(_credit(A, 100),))})
    for brought, expected in ((0, (100, 0)), (5, (95, 0)), (100, (0, 0)), (130, (0, 30))):
        group = [Contribution(peer=A, tokens=brought, weight=brought), Contribution(peer=B, tokens=7, weight=7)]
        assert count_losses(STAGE, group, [record]) == (expected[0], expected[1] + 7)


def test_the_clip_scale_brings_the_average_to_the_threshold() -> None:
    """And leaves alone what is below."""
    assert clip_scale(0.5, RULES.clip_threshold) == clip_scale(1.0, RULES.clip_threshold) == 1.0
    assert clip_scale(4.0, RULES.clip_threshold) == 0.25


def test_a_commit_divides_the_norm_of_the_sum_by_all_tokens() -> None:
    """30 tokens, sum of norm 120: the average has norm 4 and is scaled by a quarter."""
    lineages = chain()
    here = slot(lineages)
    group = tuple(Contribution(peer=peer, tokens=10, weight=10) for peer in (A, B, C))
    draft = Draft(
        ballot=BALLOT,
        heard=heard(closing()),
        contributors=group,
        staged=StagedBytes(digest(b"sum"), 120.0, "fp32", RoundId(0)),
        seats=(seat(A),),
        speeds=(12.5,),
        joiners=(),
    )
    record = draw_commit(settings(), lineages, here, draft)
    assert (record.norm, record.clip_scale, record.total_tokens) == (4.0, 0.25, 30)
    assert record.summary.tasks_done == 4


def test_another_ballot_or_another_list_is_another_group() -> None:
    """So that parts of two attempts can never be mixed."""
    here = slot(chain())
    group = (Contribution(peer=A, tokens=1, weight=1), Contribution(peer=B, tokens=2, weight=2))
    ids = {
        group_id(here, BALLOT, group, codec="fp32", round_id=RoundId(0)),
        group_id(here, Ballot(number=2, steward=A), group, codec="fp32", round_id=RoundId(0)),
        group_id(here, BALLOT, group[::-1], codec="fp32", round_id=RoundId(0)),
        group_id(here, BALLOT, (group[0], Contribution(peer=B, tokens=3, weight=3)), codec="fp32", round_id=RoundId(0)),
        group_id(
            here, BALLOT, (group[0], group[1].model_copy(update={"norm": 1.0})), codec="fp32", round_id=RoundId(0)
        ),
        group_id(here, BALLOT, group, codec="int8", round_id=RoundId(0)),
        group_id(here, BALLOT, group, codec="fp32", round_id=RoundId(1)),
    }
    assert len(ids) == 7


def _weights(here: Slot, claimed: int, until: int = 0) -> list[int]:
    rules, claims = replace(RULES, tokens_per_round=400), {A: (claimed, 1.0), B: (claimed, 2.0)}
    return [each.weight for each in weigh(settings(rules=rules), here, claims, RoundId(until))]


def test_members_count_for_what_they_are_credited_with_and_never_for_more_than_they_bring() -> None:
    """The closing credits a with 200 tokens and b with 100. Oracle: the smaller number."""
    for claimed, expected in ((0, [0, 0]), (70, [70, 70]), (130, [130, 100]), (1 << 40, [200, 100])):
        assert _weights(slot(chain()), claimed) == expected


def test_credits_of_void_rounds_add_up_and_unheard_rounds_may_hold_anything() -> None:
    """A round has 400 tokens. Oracle: by hand."""
    here = slot(chain())
    here.closings[RoundId(1)] = heard(closing(1))
    assert _weights(here, 5000, until=1) == [400, 200]
    here.closings[RoundId(3)] = heard(closing(3))
    assert _weights(here, 5000, until=3) == [600 + 400, 300 + 400]
    assert _weights(here, 5000, until=0) == [200, 100], "later rounds are for later commits"


def test_a_full_list_of_credits_says_nothing_about_who_is_not_on_it() -> None:
    """`draw_closing` cuts it off, and an honest member's work shall count."""
    crowd = tuple(Credit(stage=StageId(7), peer=PeerId(f"p{number}"), tokens=1) for number in range(MAX_CREDITS))
    here, (only, signed) = slot(chain()), (heard(closing()).closing, closing())
    here.closings[RoundId(0)] = HeardClosing(only.model_copy(update={"credits": crowd}), signed)
    assert _weights(here, 5000) == [400, 400]
    here.closings[RoundId(0)] = HeardClosing(only.model_copy(update={"credits": crowd[1:]}), signed)
    assert _weights(here, 5000) == [0, 0]


def test_weights_are_checked_by_whom_knows_the_same_closings() -> None:
    """Who holds another closing, or lacks one, cannot tell. Oracle: one thing changed."""
    lineages = chain()
    wrong = (Contribution(peer=B, tokens=10, weight=9),)
    record = lineages.follows_head(commit(lineages.head.lineage, contributors=wrong))
    with pytest.raises(PeerFault, match="counts b for 9 tokens"):
        check_weights(settings(), slot(lineages), record)
    check_weights(settings(), slot(lineages, closings={}), record)
    check_weights(settings(), slot(lineages, closings={RoundId(0): heard(closing(clock=A, numbers=(0, 1)))}), record)
    later = record.model_copy(
        update={
            "round": RoundId(1),
            "summary": record.summary.model_copy(update={"closing_digest": digest(closing(1).payload)}),
        }
    )
    check_weights(settings(), slot(lineages, closings={RoundId(1): heard(closing(1))}), later)


def test_whoever_disagrees_with_most_stewards_gives_in_if_several_rounds_are_covered() -> None:
    """Two clocks may have closed the first of them differently. Oracle: two of three stewards."""
    lineages = chain()
    summary = lineages.follows_head(commit(lineages.head.lineage)).summary
    record = lineages.follows_head(
        commit(
            lineages.head.lineage,
            round=RoundId(1),
            contributors=(Contribution(peer=B, tokens=10, weight=9),),
            summary=summary.model_copy(update={"closing_digest": digest(closing(1).payload)}),
        )
    )
    here = slot(lineages)
    here.closings[RoundId(1)] = heard(closing(1))
    for objected in ((), (B,)):
        here.objected = set(objected)
        with pytest.raises(PeerFault, match="counts b for 9 tokens"):
            check_weights(settings(), here, record)
    here.objected = {B, C}
    check_weights(settings(), here, record)


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"contributors": (Contribution(peer=A, tokens=11, weight=11),)}, "weighs us"),
        ({"clip_scale": 0.51}, "clip scale"),
        ({"seats": (seat(A), seat(PeerId("x")))}, "neither a member nor a joiner"),
        ({"seats": (seat(A), seat(B, session=9))}, "neither a member nor a joiner"),
        ({"seats": (seat(A), seat(C))}, "banned"),
    ],
)
def test_a_member_objects_to_what_it_can_check(changes: dict[str, Any], complaint: str) -> None:
    """Its own weight, the scale of bytes that it has, and who gets a seat."""
    lineages = chain()
    here = slot(lineages)
    record = lineages.follows_head(commit(lineages.head.lineage, **changes))
    staged = StagedBytes(record.digest, 2.0 * record.total_tokens, "fp32", RoundId(0))
    with pytest.raises(PeerFault, match=complaint):
        check_proposal(settings(), here, record, staged=staged, banned=frozenset({C} if complaint == "banned" else ()))


def test_a_norm_that_differs_in_the_last_bits_is_no_objection() -> None:
    """Devices sum in different orders."""
    lineages = chain()
    record = lineages.follows_head(commit(lineages.head.lineage))
    staged = StagedBytes(record.digest, 2.0 * record.total_tokens * (1 + 1e-5), "fp32", RoundId(0))
    check_proposal(settings(), slot(lineages), record, staged=staged, banned=frozenset())
    strict = settings(rules=replace(RULES, scale_tolerance=1e-7))
    with pytest.raises(PeerFault, match="clip scale"):
        check_proposal(strict, slot(lineages), record, staged=staged, banned=frozenset())
