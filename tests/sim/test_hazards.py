"""Every hazard that concerns rounds, as a seeded fault plan. The numbers are those of the hazard list.

The oracle is `tests/sim/checks.py`, which looks at every event (no fork among the living, equal lineages mean
equal states, versions only grow, promises only grow, weights are what was summed), plus what each test adds.
"""

from __future__ import annotations

from dataclasses import replace
from random import Random

import pytest

from protocol.ids import PeerId, RoundId, StageId
from protocol.rounds.events import Send, Trouble
from protocol.rounds.messages import CLOSING_CONTEXT, ClosingNotice, DoneReport, DoneTask
from protocol.rounds.records import draw_closing
from protocol.rounds.voter import Voter
from tests.sim.faults import (
    Ban,
    BreakLink,
    CoordinatorAway,
    CutStreams,
    DropKind,
    FailReduces,
    Kill,
    Leave,
    Partition,
    Pause,
    Plan,
    Restart,
    Slow,
    When,
    Worsen,
    torment,
)
from tests.sim.network import Cut, Link
from tests.sim.pipeline import PipelineRules
from tests.sim.trial import (
    PAIRS,
    SEEDS,
    TRIPLES,
    commit_of_round,
    commits_of,
    reports,
    settle,
    steward_of_next_round,
    suffer,
)
from tests.sim.world import FAST_TIMERS, RUN, Options, World

pytestmark = pytest.mark.slow  # a tenth to half a second each
seeds = pytest.mark.parametrize("seed", SEEDS)


# -- 1: closing a round ------------------------------------------------------------------------------


@seeds
def test_hazard_1a_an_answer_lost_after_the_last_stage_is_redone_and_the_round_still_closes(seed: int) -> None:
    """Streams of a last-stage replica break: work is done twice there, nothing is lost. Oracle: the books."""
    plan: Plan = [CutStreams("p02", at_s) for at_s in (0.25, 0.35, 0.45)]
    world = suffer(seed, plan, pipeline=PipelineRules(resume=False))
    assert world.num_resent > 0
    assert world.checks.total("double_counted") > 0
    assert world.checks.num_lost() == 0


@seeds
def test_hazard_1b_numbers_of_a_dead_feeder_are_fed_by_others(seed: int) -> None:
    """A feeder dies with tasks in flight; its numbers close the round all the same, well before the deadline."""
    world = suffer(seed, [Kill("p00", 0.7)], rounds=1, within_s=25.0)
    assert world.checks.num_lost() == 0
    assert commit_of_round(world, 0, 0).summary.tasks_done == 8


@seeds
def test_hazard_1c_work_that_died_with_its_holder_after_closing_is_counted_not_redone(seed: int) -> None:
    """A last-stage replica dies when the round closes. Oracle: dropped + averaged = all tokens of the round."""
    world = suffer(seed, [When("ClosingNotice", 1, Kill("p02", 0.0))], rounds=1, within_s=25.0)
    commit = commit_of_round(world, 1, 0)
    assert [each.peer for each in commit.contributors] == ["p03"]
    assert commit.tokens_dropped > 0
    assert commit.tokens_dropped + commit.total_tokens == commit.summary.target_tokens


def test_hazard_1d_a_liar_cannot_close_a_round() -> None:
    """Bits without proof, and a closing by somebody who hosts another stage, are refused and reported."""
    world = World(1, Options(spans=PAIRS))
    world.run(0.6)
    lies = tuple(
        DoneTask(number=number, evidence=b"trust me", loss_sum=0.0, target_tokens=10**9, credits=())
        for number in range(8)
    )
    for name in ("p00", "p01"):
        report = DoneReport(stage=StageId(0), round=RoundId(0), tasks=lies)
        world.processes[PeerId("p01" if name == "p00" else "p00")].send(PeerId(name), report)
    forged = draw_closing(RUN, RoundId(0), world.rules.size_of(RoundId(0)), {each.number: each for each in lies})
    signed = world.notary_of(PeerId("p03")).seal(CLOSING_CONTEXT, forged)
    for name in world.processes:
        world.processes[PeerId("p03")].send(name, ClosingNotice(stage=StageId(1), closing=signed))
    world.run(0.2)
    assert not world.checks.closings
    assert {each.peer for each in reports(world, Trouble.FAULT)} == {"p00", "p01"}
    assert reports(world, Trouble.STRANGE_CLOCK)
    world.run_rounds(1, within_s=20.0)
    assert commit_of_round(world, 0, 0).summary.target_tokens == 8 * 64 + 28


@seeds
def test_hazard_1e_the_clock_dies_and_feeders_tell_the_next_one_everything(seed: int) -> None:
    """Both clocks that may be asked first die in turn; with three feeders nothing is lost."""
    world = World(seed, Options(spans=TRIPLES, num_train=24))
    world.run(1.2)
    clock = steward_of_next_round(world, 0)
    torment(world, [Kill(clock, 0.01)])
    world.run_rounds(1, within_s=25.0)
    assert world.checks.num_lost() == 0


@seeds
def test_hazard_1f_two_clocks_with_half_the_bits_each_find_together(seed: int) -> None:
    """Feeders that cannot hear the first clock report to another, which hands everything on."""
    world = World(seed, Options(spans=TRIPLES))
    world.run(0.3)
    clock = steward_of_next_round(world, 0)
    deaf = next(name for name in ("p00", "p01", "p02") if name != clock)
    torment(world, [DropKind("DoneUnion", 0.01, 2.0, loss=0.7), Partition((deaf,), 0.5, 2.0, one_way=True)])
    world.run_rounds(2, within_s=40.0)
    assert world.checks.num_lost() == 0


def test_hazard_1g_at_the_deadline_the_missing_bits_are_on_record() -> None:
    """The last stage is away for longer than the deadline: the round ends with `tasks_lost`, and is void there."""
    world = World(1, Options(spans=PAIRS, timers=replace(FAST_TIMERS, round_deadline_s=8.0)))
    torment(world, [Kill("p02", 0.35), Kill("p03", 0.35), CoordinatorAway(0.3, 30.0)])
    world.run(28.0)
    assert any(closing.tasks_lost == 8 for closings in world.checks.closings.values() for closing in closings)
    assert not commits_of(world, 1)


def test_hazard_1h_a_clock_alone_cannot_end_the_run_by_closing_a_round_far_ahead() -> None:
    """A replica of stage 0 signs round 1000 and tells everybody, its own partners included, again and again."""
    world = World(1, Options(spans=TRIPLES))
    world.run(0.6)
    forged = draw_closing(RUN, RoundId(1000), world.rules.size_of(RoundId(1000)), {})
    signed = world.notary_of(PeerId("p01")).seal(CLOSING_CONTEXT, forged)
    for _ in range(10):
        for name in world.processes:
            world.processes[PeerId("p01")].send(name, ClosingNotice(stage=StageId(0), closing=signed))
        world.run(1.0)
    settle(world)
    assert reports(world, Trouble.STRANGE_CLOCK)
    assert all(0 < world.newest_round(stage) < 10 for stage in world.stages)


# -- 2: the same bytes -------------------------------------------------------------------------------


@seeds
def test_hazard_2_sums_that_differ_are_never_committed(seed: int) -> None:
    """One member ends its reduces with other bytes. Everybody applies the others' bytes, and it is named."""
    world = World(seed, Options(spans=TRIPLES))
    world.reduces.corrupt.add(PeerId("p04"))
    world.run_rounds(3, within_s=40.0)
    settle(world)
    assert reports(world, Trouble.DIVERGED)
    assert all(c.peer != "p04" for commit in commits_of(world, 1) for c in commit.contributors)


# -- 3: committing -----------------------------------------------------------------------------------

MOMENTS = ("Ping", "Pong", "Begin", "ReduceResult", "Propose", "Accept", "Committed", "ClosingNotice")


@seeds
@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("moment", MOMENTS)
def test_hazard_3a_whoever_dies_at_whatever_moment_of_a_ballot_the_round_ends_once(
    moment: str, count: int, seed: int
) -> None:
    """Kill the sender of the n-th message of each kind, so that every phase of a round is hit."""
    world = suffer(seed, [When(moment, count, Kill("@sender", 0.0))], rounds=2, within_s=30.0, spans=TRIPLES)
    assert world.checks.num_lost() == 0


@seeds
@pytest.mark.parametrize("moment", MOMENTS)
def test_hazard_3b_a_steward_cut_off_in_mid_ballot_comes_back_to_the_same_lineage(moment: str, seed: int) -> None:
    """Even longer than the patience: what it had made final is what the others made final too."""
    plan: Plan = [When(moment, 3, Partition(("@sender",), 0.0, 9.0))]
    world = World(seed, Options(spans=TRIPLES, allow_forks=True))
    torment(world, plan)
    world.run_rounds(2, within_s=60.0)
    world.run(12.0)
    settle(world)
    assert not world.checks.forks()


def test_hazard_3b_shows_the_fork_if_votes_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    """The counter-proof: without the rule the same plan parts the lineages, and the checks see it."""
    honest = Voter._pong

    def pong_without_vote(voter: Voter) -> Send:
        vote, voter._slot.vote = voter._slot.vote, None
        pong = honest(voter)
        voter._slot.vote = vote
        return pong

    monkeypatch.setattr(Voter, "_pong", pong_without_vote)
    world = World(1, Options(spans=TRIPLES, allow_forks=True))
    torment(world, [When("Committed", 3, Partition(("@sender",), 0.0, 9.0))])
    world.run(20.0)
    assert world.checks.forks()


@seeds
@pytest.mark.parametrize("stop_s", [2.0, 9.0])
@pytest.mark.parametrize("moment", MOMENTS)
def test_hazard_3c_a_stopped_steward_does_not_go_on_with_an_old_ballot(moment: str, stop_s: float, seed: int) -> None:
    """SIGSTOP for less and for more than the patience, in groups of three and of two."""
    for spans in (PAIRS, TRIPLES):
        plan = [When(moment, 2, Pause("@sender", 0.0, stop_s))]
        world = suffer(seed, plan, rounds=2, within_s=40.0, spans=spans)
        world.run(stop_s + 3.0)
        settle(world)


@seeds
def test_hazard_3d_a_commit_heard_by_one_who_dies_is_made_by_the_others_as_well(seed: int) -> None:
    """The steward dies right after its commit reached nobody, and a partner right after: the sum is the same."""
    plan: Plan = [DropKind("Committed", 0.0001, 3.0), When("Committed", 1, Kill("@sender", 0.0))]
    world = suffer(seed, plan, rounds=1, within_s=30.0, spans=TRIPLES)
    first = [c for (stage, _), c in world.checks.commits.items() if c.version == 1]
    assert len(first) == 2, "one commit per stage took every replica to version 1, the dead ones included"


@seeds
def test_hazard_3e_two_stewards_at_once_do_no_harm(seed: int) -> None:
    """Pings get lost and are late, so that several members conduct; the newest ballot wins."""
    plan: Plan = [Worsen(0.01, 12.0, loss=0.15, duplicates=0.3, jitter_s=1.2)]
    world = suffer(seed, plan, rounds=2, within_s=60.0, spans=TRIPLES)
    assert world.checks.num_lost() == 0


@seeds
def test_hazard_3f_a_member_that_dies_in_mid_reduce_leaves_nothing_half_applied(seed: int) -> None:
    """Some members may hold the sum, others not. Oracle: one state per lineage; survivors' work is kept."""
    for after_s in (0.05, 0.15, 0.25, 0.32):
        world = suffer(seed, [When("Begin", 2, Kill("@target", after_s))], rounds=2, within_s=30.0, spans=TRIPLES)
        assert world.checks.num_lost() == 0


@seeds
def test_hazard_3g_a_reduce_that_keeps_failing_ends_with_a_smaller_group(seed: int) -> None:
    """Two members cannot sum with each other for ever; the stage goes on, and both stay members."""
    world = suffer(seed, [BreakLink("p03", "p04")], rounds=3, within_s=60.0, spans=TRIPLES)
    settle(world)
    newest = commits_of(world, 1)[-1]
    assert {seat.peer for seat in newest.seats} == {"p03", "p04", "p05"}
    assert any(len(commit.contributors) < 3 for commit in commits_of(world, 1))
    assert reports(world, Trouble.LEFT_OUT)


@seeds
def test_hazard_3h_a_few_failed_reduces_cost_time_and_nothing_else(seed: int) -> None:
    """Nobody is to blame, so nobody is left out, and no token is dropped."""
    world = suffer(seed, [FailReduces(0.0, 2)], rounds=2, within_s=40.0)
    assert world.checks.total("tokens_dropped") == 0
    assert world.checks.num_lost() == 0


@seeds
def test_hazard_3i_a_swarm_torn_for_long_forks_visibly_and_a_charter_heals_it(seed: int) -> None:
    """Both halves can train. They part, refuse each other afterwards, report it, and follow the new charter."""
    spans = ((0, 1), (0, 1), (0, 1), (0, 1))
    world = World(seed, Options(spans=spans, allow_forks=True))
    torment(world, [CoordinatorAway(0.4, 40.0), Partition(("p00", "p01"), 0.5, 25.0)])
    world.run(40.0)
    assert world.checks.forks()
    assert {each.peer for each in reports(world, Trouble.FORKED)} == set(world.processes)
    world.coordinator.issues_charters_for_forks = True
    world.run_until(lambda: not world.checks.forks(), within_s=30.0)
    settle(world)
    world.run_rounds(2, within_s=30.0)
    assert not world.checks.forks()


@seeds
def test_hazard_3i_the_half_of_a_torn_swarm_that_did_less_follows_the_other(seed: int) -> None:
    """The other half goes on as it is, all stages of it. Oracles: `coordinator.forks`; which commits have followers."""
    spans = ((0, 1), (0, 1), (0, 1), (0, 1))
    world = World(seed, Options(spans=spans, allow_forks=True))
    torment(world, [CoordinatorAway(0.4, 40.0), Partition(("p00", "p01"), 0.5, 25.0)])
    world.run(40.0)
    assert world.checks.forks()
    before = {(name, stage): one for name, each in world.processes.items() for stage, one in each.replicas.items()}
    stood = {key: replica.held.lineage for key, replica in before.items() if replica.held is not None}
    world.coordinator.settles_forks = True
    world.run_until(lambda: not world.checks.forks(), within_s=30.0)
    settle(world)
    world.run_rounds(2, within_s=30.0)
    assert not world.checks.forks()
    lost = {key for key, lineage in stood.items() if lineage in world.coordinator.given_up}
    assert {name for name, _ in lost} in ({"p00", "p01"}, {"p02", "p03"})
    assert len(lost) == 4, "it is the same half for both stages"
    assert {commit.generation for commit in world.checks.commits.values()} == {1}


@seeds
def test_hazard_3i_halves_that_are_told_while_they_go_on_are_one_again(seed: int) -> None:
    """The coordinator is there all the time, and speaks as soon as somebody has met somebody."""
    spans = ((0, 1), (0, 1), (0, 1), (0, 1), (0, 1))
    world = World(seed, Options(spans=spans, allow_forks=True))
    world.coordinator.settles_forks = True
    torment(world, [Partition(("p00", "p01"), 0.5, 18.0), Partition(("p02",), 12.0, 30.0)])
    world.run(45.0)
    world.run_until(lambda: not world.checks.forks(), within_s=60.0)
    settle(world)
    world.run_rounds(2, within_s=30.0)
    assert not world.checks.forks()


@seeds
def test_hazard_3j_a_minority_waits_for_the_majority_and_follows_it(seed: int) -> None:
    """A stage is torn 3 : 1 for less than the patience: the one has not committed alone, and catches up."""
    world = World(seed, Options(spans=((0,), (0,), (1,), (1,), (1,), (1,))))
    torment(world, [Partition(("p05",), 1.0, 4.0)])
    world.run(8.0)
    settle(world)
    world.run_rounds(2, within_s=30.0)


@seeds
def test_hazard_3k_a_death_does_not_let_a_silent_half_go_on_alone(seed: int) -> None:
    """Two of three commit without the first in order, and one of them dies before the first hears of it.

    The first learns of the death from the dead one's host, while its line to the survivor is still down. Oracle:
    the checks see no fork in less than the patience, and everybody meets again afterwards.
    """
    world = World(seed, Options(spans=TRIPLES, timers=replace(FAST_TIMERS, patience_s=15.0)))
    world.run(0.3)
    first = PeerId(steward_of_next_round(world, 1))
    dying, survivor = (name for name in world.hosts(StageId(1)) if name != first)
    broken = [_line(first, dying), _line(first, survivor)]
    world.network.cuts += [cut for line in broken for cut in line]
    world.run_until(lambda: commits_of(world, 1) != [] and len(world.states(StageId(1))) == 2, within_s=20.0)
    world.network.cuts = list(broken[1])
    torment(world, [Kill(dying, 0.0)])
    world.run(4.0)
    world.network.cuts.clear()
    world.run_rounds(2, within_s=40.0)
    settle(world)


@seeds
@pytest.mark.parametrize("moment", ["Propose", "Begin"])
def test_hazard_3l_who_stops_in_mid_ballot_costs_seconds_and_not_the_long_timeouts(moment: str, seed: int) -> None:
    """A laptop's lid closes when the sum is made, or just before. Its partners' long timeouts are for who says so."""
    timers = replace(FAST_TIMERS, accept_timeout_s=300.0, freeze_timeout_s=300.0)
    plan = [When(moment, 5, Pause("@target", 0.0, 200.0))]
    world = World(seed, Options(spans=TRIPLES, timers=timers))
    torment(world, plan)
    world.run_rounds(2, within_s=30.0)


def _line(one: PeerId, other: PeerId) -> tuple[Cut, Cut]:
    there, back = frozenset((one,)), frozenset((other,))
    return Cut(there, back), Cut(back, there)


# -- 6 to 9: what hops do to rounds ------------------------------------------------------------------


def test_hazard_6_spans_do_not_wait_for_each_other_in_a_circle() -> None:
    """A hosts 0-2, B hosts 1-3, few slots. With the rule the round closes; without it nothing ever finishes."""
    spans = ((0, 1, 2), (1, 2, 3))
    rules = PipelineRules(width=8, slots=4)
    suffer(1, [], rounds=2, within_s=40.0, spans=spans, num_train=16, pipeline=rules)
    stuck = World(1, Options(spans=spans, num_train=16, pipeline=replace(rules, run_through=False)))
    stuck.run(40.0)
    assert stuck.newest_round(StageId(0)) == 0, "the counter-example does not bite any more"


@seeds
def test_hazard_6b_stages_of_one_peer_average_independently(seed: int) -> None:
    """Two peers host the same two stages; slow reduces of both overlap, and none waits for the other."""
    world = suffer(seed, [], rounds=2, within_s=30.0, spans=((0, 1), (0, 1)), reduce_s=2.0)
    assert all(len(commit.contributors) == 2 for stage in (0, 1) for commit in commits_of(world, stage))


@seeds
def test_hazard_7_a_round_ends_although_its_waves_never_fill(seed: int) -> None:
    """Waves of 8, but only 4 + 4 tasks: they start late instead of never, which is the counter-example."""
    rules = PipelineRules(wave=8, wave_wait_s=0.3)
    suffer(seed, [], rounds=2, within_s=40.0, pipeline=rules)
    stuck = World(seed, Options(spans=PAIRS, pipeline=PipelineRules(wave=8, wave_wait_s=float("inf"))))
    stuck.run(40.0)
    assert stuck.newest_round(StageId(0)) == 0, "the counter-example does not bite any more"


@seeds
def test_hazard_8_a_stage_without_replicas_is_waited_for_without_an_avalanche(seed: int) -> None:
    """All replicas of the middle stage die and one comes back later: every number is re-sent a few times at most."""
    plan: Plan = [Kill("p02", 0.6), Kill("p03", 0.6), Restart("p02", 8.0)]
    spans = ((0,), (0,), (1,), (1,), (2,), (2,))
    world = suffer(seed, plan, rounds=2, within_s=40.0, spans=spans)
    assert world.checks.num_lost() == 0
    assert world.num_resent <= 3 * 8


@seeds
def test_hazard_9_broken_streams_cost_nothing_if_tasks_outlive_them(seed: int) -> None:
    """The plan of hazard 1a with resumption: no number is done twice."""
    plan: Plan = [CutStreams(peer, at_s) for peer in ("p02", "p03") for at_s in (0.25, 0.35, 0.45)]
    world = suffer(seed, plan, pipeline=PipelineRules(resume=True))
    assert world.num_resent == 0
    assert world.checks.total("double_counted") == 0


# -- 10: joining and coming back ---------------------------------------------------------------------


@seeds
def test_hazard_10a_a_joiner_catches_up_while_rounds_go_on(seed: int) -> None:
    """Fetching takes longer than a round; listening first and being seated by a commit still converges."""
    world = World(seed, Options(spans=TRIPLES, num_founders=2, resync_s=4.0, fetch_s=0.8))
    world.run_until(lambda: len(commits_of(world, 1)) > 1, within_s=30.0)
    world.run_until(lambda: len(commits_of(world, 1)[-1].contributors) == 3, within_s=40.0)
    world.run_until(lambda: len(commits_of(world, 0)[-1].contributors) == 3, within_s=40.0)
    settle(world)


@seeds
def test_hazard_10b_who_was_away_for_many_rounds_comes_back_by_history(seed: int) -> None:
    """More commits were made meanwhile than anybody keeps: the chain is of no use, the snapshot is."""
    world = World(seed, Options(spans=PAIRS, commits_kept=2, num_train=2, task_s=0.05))
    torment(world, [Pause("p03", 1.0, 20.0)])
    world.run(22.0)
    world.run_until(lambda: "p03" in [s.peer for s in commits_of(world, 1)[-1].seats], within_s=30.0)
    settle(world)


@seeds
def test_hazard_10c_a_restarted_peer_is_a_joiner_and_never_an_old_member(seed: int) -> None:
    """It is back within a beat, under the same identity, in mid-ballot, with all its promises forgotten."""
    plan: Plan = [
        When("Pong", 2, Kill("@sender", 0.0)),
        *(Restart(peer, 3.0) for peer in ("p00", "p01", "p02", "p03")),
    ]
    world = suffer(seed, plan, rounds=4, within_s=60.0)
    settle(world)


@seeds
def test_hazard_10d_a_leaver_is_not_waited_for_and_loses_nothing(seed: int) -> None:
    """Ctrl-C: its last round counts, the next list is without it, and no reduce had to fail for it."""
    world = suffer(seed, [Leave("p03", 0.8)], rounds=3, within_s=30.0)
    assert not world.processes[PeerId("p03")].alive
    assert world.checks.total("tokens_dropped") == 0
    assert [seat.peer for seat in commits_of(world, 1)[-1].seats] == ["p02"]
    assert not reports(world, Trouble.BALLOT_FAILED)


@seeds
def test_hazard_10e_a_stage_that_has_died_out_is_restored_by_a_charter(seed: int) -> None:
    """All replicas of a stage die and come back empty: the newest kept state becomes a new generation."""
    plan: Plan = [Kill("p02", 4.0), Kill("p03", 4.1), Restart("p02", 6.0), Restart("p03", 6.5)]
    world = suffer(seed, plan, rounds=3, within_s=60.0)
    settle(world)
    assert commits_of(world, 1)[-1].generation == 2


# -- 11: clipping ------------------------------------------------------------------------------------


@seeds
def test_hazard_11_all_members_scale_by_the_stewards_number(seed: int) -> None:
    """Members compute norms that differ in the last bits; equal states are the oracle, and a scale below 1."""
    world = World(seed, Options(spans=TRIPLES, norm_noise=1e-6))
    world.run_rounds(3, within_s=30.0)
    settle(world)
    assert all(commit.clip_scale < 1.0 for commit in commits_of(world, 1))
    assert not reports(world, Trouble.FAULT)


@seeds
def test_hazard_11b_a_scale_that_does_not_fit_the_bytes_is_declined(seed: int) -> None:
    """The first steward's norms are far off: it is reported, outvoted and left behind; its number is never applied."""
    world = World(seed, Options(spans=TRIPLES))
    liar = steward_of_next_round(world, 1)
    world.reduces.wrong_norm[PeerId(liar)] = 3.0
    world.run_rounds(4, within_s=60.0)
    assert {seat.peer for seat in commits_of(world, 1)[-1].seats} == {"p03", "p04", "p05"} - {liar}
    assert liar in {each.peer for each in reports(world, Trouble.FAULT)}
    for commit in commits_of(world, 1):
        assert commit.clip_scale == pytest.approx(1e-3 / commit.norm)
        assert commit.norm == pytest.approx(world.sums[commit.digest].norm / commit.total_tokens)


# -- 12: one authority over data ---------------------------------------------------------------------


@seeds
def test_hazard_12_each_number_is_fed_once_with_and_without_the_coordinator(seed: int) -> None:
    """No number is sent twice, with the coordinator there or away: nothing about data depends on it."""
    there = suffer(seed, [], rounds=4)
    away = suffer(seed, [CoordinatorAway(0.5, 0.0)], rounds=4)
    for world in (there, away):
        assert world.num_resent == 0
        assert world.checks.total("double_counted") == 0
        assert all(commit.summary.tasks_done == 8 for commit in commits_of(world, 0))


@seeds
def test_hazard_12b_a_slow_owner_does_not_hold_the_round_up_for_ever(seed: int) -> None:
    """A feeder at a fiftieth of the speed: others take its numbers after a while; all are done before the deadline."""
    world = suffer(seed, [Slow("p00", 50.0)], rounds=2, within_s=50.0, spans=TRIPLES)
    assert world.checks.num_lost() == 0


# -- S2: 14, 15, 18, 20, 21, 23, 25 ------------------------------------------------------------------


def test_hazard_14_messages_per_member_do_not_grow_with_the_stage() -> None:
    """One round of 4 and of 16 replicas: the messages per replica may grow by less than a half."""
    cost = {}
    for replicas in (4, 16):
        spans = tuple((0,) for _ in range(replicas))
        world = World(1, Options(spans=spans, num_train=2 * replicas, link=Link(jitter_s=0.0)))
        world.run_rounds(1, within_s=30.0)
        before, sent = world.now_s, world.network.num_sent
        world.run_rounds(4, within_s=60.0)
        assert world.now_s > before
        cost[replicas] = (world.network.num_sent - sent) / 4 / replicas
    assert cost[16] < 1.5 * cost[4]


@seeds
def test_hazard_18_a_void_round_changes_nothing_and_loses_nothing(seed: int) -> None:
    """Rounds without training numbers: no version, no lineage, no commit; then training goes on."""
    world = World(seed, Options(spans=PAIRS, num_train=0, num_eval=2, eval_every=1))
    world.run(12.0)
    facts = [replica.machine.statistics() for p in world.processes.values() for replica in p.replicas.values()]
    assert not world.checks.commits
    assert all(each.version == 0 and each.num_voids >= 2 for each in facts)
    assert all(each.round is not None and each.round >= 3 for each in facts)


@seeds
def test_hazard_18b_work_that_was_out_of_reach_in_a_void_round_counts_in_the_next(seed: int) -> None:
    """The whole last stage but an idle newcomer is unreachable when the round closes; its sums are not lost."""
    world = World(seed, Options(spans=TRIPLES))
    plan: Plan = [When("ClosingNotice", 1, Pause(peer, 0.0, 4.0)) for peer in ("p03", "p04")]
    torment(world, plan)
    world.run_rounds(2, within_s=40.0)
    settle(world)


def test_hazard_20_weights_are_target_tokens() -> None:
    """Numbers of different length: the weights of a commit are the sums of tokens, by the checks' own books."""
    world = suffer(1, [], rounds=3)
    for commit in commits_of(world, 0):
        assert commit.total_tokens == commit.summary.target_tokens == 8 * 64 + 28


@seeds
def test_hazard_21_rounds_go_on_for_as_long_as_the_coordinator_is_away(seed: int) -> None:
    """Sixty seconds without it, with a death and a return meanwhile."""
    plan: Plan = [CoordinatorAway(0.5, 60.0), Kill("p03", 5.0), Restart("p03", 9.0)]
    world = suffer(seed, plan, rounds=1)
    assert len(commits_of(world, 1)) > 15
    assert any(len(commit.joiners) for commit in commits_of(world, 1))


def test_hazard_23_a_stage_with_one_replica_does_not_wait() -> None:
    """Between closing and opening lies nothing but freezing, summing and applying."""
    world = World(1, Options(spans=((0,), (1,)), link=Link(jitter_s=0.0), drain_s=0.0))
    began: dict[int, float] = {}
    gaps: list[float] = []
    opened = world.processes[PeerId("p01")].replicas[StageId(1)]
    while len(gaps) < 3:
        world.run(0.01)
        round_id = opened.opened.round if opened.opened is not None else -1
        if opened.is_frozen and opened.opened is not None:
            began.setdefault(round_id, world.now_s)
        if round_id - 1 in began:
            gaps.append(world.now_s - began.pop(round_id - 1))
        assert world.now_s < 30.0
    work_s = world.options.reduce_s * 1.2 + world.options.apply_s
    assert max(gaps) <= work_s + 0.03


@seeds
def test_hazard_25_each_loss_has_its_own_number(seed: int) -> None:
    """`tasks_lost`, `tokens_dropped` and `double_counted` all stay zero in an undisturbed run."""
    world = suffer(seed, [], rounds=5)
    assert world.checks.num_lost() == 0
    assert world.checks.total("tokens_dropped") == 0
    assert world.checks.total("double_counted") == 0


@pytest.mark.parametrize("first", range(0, 160, 40))
def test_who_is_banned_while_a_ballot_goes_on_holds_nobody_up(first: int) -> None:
    """Some have accepted a commit that seats it before they heard of that, and only it may know that it is final.

    Oracle: four more rounds, without it.
    """
    for seed in range(first, first + 40):
        ban = Ban("p05", Random(seed).uniform(1.0, 3.0))
        world = suffer(seed, [ban], rounds=4, spans=TRIPLES, overlap=seed % 2 == 1, within_s=30.0)
        assert "p05" not in {seat.peer for seat in commits_of(world, 1)[-1].seats}, seed
