"""How often layers are loaded while a round passes a pipeline, and that nobody waits for microbatches that cannot come.

Oracles: arithmetic (so many microbatches in waves of so many), and a patience that is longer than the round.
"""

from __future__ import annotations

from math import ceil
from random import Random

import pytest

from peer.pipeline.feeder import FIRST_STAGE
from tests.peer.pipeline.virtual import PATIENCE_S, Pipeline, full_waves

PASSES = ("forward", "backward", "finish")
EVALUATIONS = ("forward only", "score")


def enough(waves: list[int]) -> int:
    """Return how many have to be in flight so that one wave fills whatever all the others lack: each only one."""
    *before, last = waves
    return 1 + sum(2 * (wave - 1) for wave in before) + last - 1


def check_full(pipeline: Pipeline) -> None:
    """Check that every stage has worked in full waves, but for one with the rest, and has waited for nobody.

    What is fed last before anything comes back need not be a full wave.
    """
    assert pipeline.round_s < PATIENCE_S
    for stage, wave in enumerate(pipeline.waves):
        for what in (*PASSES, *EVALUATIONS):
            loads = pipeline.loads(stage, what)
            count = pipeline.num_train if what in PASSES else pipeline.num_eval
            if (stage, what) == (FIRST_STAGE, "forward"):
                assert (sum(loads), max(loads)) == (count, min(count, wave))
                assert sum(size < wave for size in loads) <= 2
            else:
                assert loads in ([], full_waves(count, wave)), (stage, what)


def test_a_round_is_as_few_waves_as_can_be_and_ends_without_waiting() -> None:
    """Also in evaluation. Oracle: loads, counted by hand."""
    pipeline = Pipeline(waves=(4, 4), num_train=10, num_eval=6, in_flight=8).run()
    assert pipeline.loads(0, "forward") == pipeline.loads(0, "backward") == pipeline.loads(1, "finish") == [4, 4, 2]
    assert pipeline.loads(0, "forward only") == pipeline.loads(1, "score") == [4, 2]
    assert pipeline.round_s < PATIENCE_S


@pytest.mark.parametrize("seed", range(12))
def test_in_whatever_order_microbatches_come_waves_are_full(seed: int) -> None:
    """No race makes a wave smaller. Oracle: the arithmetic."""
    random = Random(seed)
    waves = [random.choice((1, 2, 3, 4, 8)) for _ in range(random.randint(2, 4))]
    in_flight = enough(waves) + random.choice((0, 1, 5))
    check_full(Pipeline(waves=waves, num_train=random.randint(1, 40), in_flight=in_flight, seed=seed).run())


@pytest.mark.parametrize("waves", [(8, 8), (1, 8, 8), (8, 1, 8), (8, 8, 1), (4, 10, 8), (8, 10, 4), (1, 8, 10, 4)])
def test_what_a_feeder_grants_is_enough_for_every_wave_to_fill(waves: tuple[int, ...]) -> None:
    """Also where waves do not divide each other, so that something always stays behind. Oracle: the arithmetic."""
    check_full(Pipeline(waves=waves, num_train=100, in_flight=None, seed=0).run())


def test_who_cannot_grant_more_has_all_of_it_under_way() -> None:
    """Stage 1 gathers as many as there are lanes, and stage 0 two thirds of them. Oracle: nobody waits."""
    pipeline = Pipeline(waves=(8, 12), num_train=36, in_flight=12).run()
    assert pipeline.round_s < PATIENCE_S
    assert pipeline.loads(1, "finish") == [12, 12, 12]


@pytest.mark.parametrize("seed", range(4))
def test_an_evaluation_after_the_training_disturbs_nothing(seed: int) -> None:
    """Two kinds of waves gather at the same time. Oracle: the arithmetic."""
    random = Random(seed)
    waves = [random.choice((2, 4)) for _ in range(3)]
    num_train, num_eval = random.randint(1, 20), random.randint(1, 12)
    in_flight = 2 * enough(waves)
    check_full(Pipeline(waves=waves, num_train=num_train, num_eval=num_eval, in_flight=in_flight, seed=seed).run())


@pytest.mark.parametrize("seed", range(3))
def test_feeders_that_share_a_round_do_not_wait_for_each_others_numbers(seed: int) -> None:
    """Oracle: each has full waves, but for one; the stage that gets them all has as few as can be."""
    pipeline = Pipeline(waves=(4, 4), num_train=30, in_flight=8, replicas={0: 2}, seed=seed).run()
    assert pipeline.round_s < PATIENCE_S
    for peer in pipeline.peers[FIRST_STAGE]:
        fed = sum(peer.engine.waves["forward"])
        assert peer.engine.waves["forward"] == peer.engine.waves["backward"] == full_waves(fed, 4)
    assert pipeline.loads(1, "finish") == full_waves(30, 4)


@pytest.mark.parametrize("seed", range(3))
def test_a_gradient_that_does_not_come_is_not_waited_for(seed: int) -> None:
    """Oracle: patience is never waited out, though three of the first four come back alone."""
    pipeline = Pipeline(waves=(4, 1), num_train=4, in_flight=4, failing=(2,), seed=seed).run()
    assert pipeline.round_s < PATIENCE_S
    assert sorted(pipeline.loads(0, "backward")) == [1, 3]


def test_a_peer_that_shares_its_stage_cannot_know_and_waits_as_long_as_it_was_told() -> None:
    """Ten numbers, every other one to each of two replicas in waves of four. Oracle: one patience, for both at once."""
    pipeline = Pipeline(waves=(1, 4), num_train=10, in_flight=16, replicas={1: 2}, patience_s=1000.0).run()
    assert sorted(pipeline.loads(1, "finish")) == [1, 1, 4, 4]
    assert 1000.0 < pipeline.round_s < 2000.0


@pytest.mark.parametrize(("in_flight", "loads"), [(3, ceil(24 / 3)), (16, ceil(24 / 8))])
def test_what_a_later_stage_gathers_has_to_be_under_way(in_flight: int, loads: int) -> None:
    """Why a peer announces its wave. Oracle: loads, and patience that is waited out with every wave or never."""
    pipeline = Pipeline(waves=(1, 8), num_train=24, in_flight=in_flight, patience_s=1000.0).run()
    assert len(pipeline.loads(1, "finish")) == loads
    assert int(pipeline.round_s / 1000.0) == (loads - 1 if in_flight < 8 else 0), "nobody waits for the last one"
