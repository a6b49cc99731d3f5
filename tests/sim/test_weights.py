"""What members count for, where some claim too much: the closings decide, whatever is claimed and whoever conducts.

The oracle is `tests/sim/checks.py` (nothing counts beyond what a round's closings credit), plus what each test adds.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest

from protocol.ids import PeerId, RoundId, RunId
from protocol.rounds import RoundSize, Settings, clock, steward
from protocol.rounds.events import Trouble
from protocol.rounds.messages import Closing, Commit, DoneTask
from protocol.rounds.records import draw_closing, weigh
from protocol.rounds.slot import Slot
from tests.sim.trial import SEEDS, TRIPLES, commits_of, reports, settle, suffer
from tests.sim.world import World

pytestmark = pytest.mark.slow  # a tenth to half a second each
seeds = pytest.mark.parametrize("seed", SEEDS)
LIAR = PeerId("p04")  # one of three at stage 1


def _counted(world: World, commit: Commit) -> dict[PeerId, int]:
    """Return the tokens that members have really added up and that count."""
    return {peer: sum(entry[2] for entry in entries) for peer, entries in world.sums[commit.digest].parts}


@seeds
@pytest.mark.parametrize("overlap", [False, True])
def test_who_claims_a_thousand_times_its_tokens_changes_nothing(seed: int, overlap: bool) -> None:
    """Oracle: what everybody has really added up; the honest run of the same seed, as long as it is the same."""
    options: dict[str, Any] = {"rounds": 5, "spans": TRIPLES, "overlap": overlap}
    honest, world = suffer(seed, [], **options), suffer(seed, [], exaggerates={LIAR: 1000}, **options)
    settle(world)
    for stage in world.stages:
        for commit in commits_of(world, stage):
            assert {each.peer: each.weight for each in commit.contributors} == _counted(world, commit)
            assert commit.total_tokens == commit.summary.target_tokens
    assert any(each.tokens > each.weight for commit in commits_of(world, 1) for each in commit.contributors)
    first, same = commits_of(world, 1)[0], commits_of(honest, 1)[0]  # then stewards differ: the claim is in the record
    assert (first.digest, first.norm, first.clip_scale) == (same.digest, same.norm, same.clip_scale)
    assert [each.weight for each in first.contributors] == [each.tokens for each in same.contributors]


@seeds
def test_a_steward_that_favours_itself_is_refused(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: no commit counts it for more than it did, others conduct its rounds, and it is named."""

    def favour(settings: Settings, slot: Slot, claimed: Mapping[PeerId, tuple[int, float]], until: RoundId) -> object:
        fair = weigh(settings, slot, claimed, until)
        if settings.me.peer != LIAR:
            return fair
        return tuple(each.model_copy(update={"weight": each.tokens}) if each.peer == LIAR else each for each in fair)

    monkeypatch.setattr(steward, "weigh", favour)
    world = suffer(seed, [], rounds=6, spans=TRIPLES, exaggerates={LIAR: 1000})
    settle(world)
    for commit in commits_of(world, 1):
        counted = _counted(world, commit)
        assert all(each.weight <= counted[each.peer] for each in commit.contributors), "or less: work was done twice"
    refused = [report for report in reports(world, Trouble.FAULT) if "instead of" in report.detail]
    assert refused
    assert {report.peer for report in refused} == {LIAR}


@seeds
@pytest.mark.parametrize("overlap", [False, True])
def test_what_nobody_is_credited_with_waits_for_the_next_round(
    seed: int, overlap: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first closing credits nobody, so its round is void. Oracle: its microbatches, in sums that came later."""

    def draw(run: RunId, round_id: RoundId, size: RoundSize, tasks: Mapping[int, DoneTask]) -> Closing:
        closing = draw_closing(run, round_id, size, tasks)
        return closing.model_copy(update={"credits": ()}) if round_id == 0 else closing

    monkeypatch.setattr(clock, "draw_closing", draw)
    world = suffer(seed, [], rounds=4, overlap=overlap)
    settle(world)
    for stage in world.stages:
        first = commits_of(world, stage)[0]
        assert (first.first_round, first.round) == (0, 1)
        assert first.total_tokens == first.summary.target_tokens
        entries = [entry for _, entries in world.sums[first.digest].parts for entry in entries]
        assert sorted((round_id, number) for round_id, number, _ in entries) == [
            (r, n) for r in (0, 1) for n in range(8)
        ]
