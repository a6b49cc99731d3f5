"""Steps that a replica takes by itself within a round. Oracles: an engine that is stepped by hand, and its counters."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from peer.codecs import codec
from peer.engine.local_steps import LocalRules
from peer.engine.optimizer import OptimizerSpec
from peer.engine.outer import OuterSpec
from peer.engine.schedule import LearningRate
from peer.engine.span import SpanEngine
from peer.engine.stage_engine import StageEngine
from protocol.architecture import preset
from protocol.errors import SwarmError
from protocol.ids import RoundId, StageId
from tests.peer.engine import poke

TINY = preset("tiny")
WIDTH = int(TINY["hidden_size"])
MICROBATCH = (2, 8)
SHAPE = (*MICROBATCH, WIDTH)
TOKENS = MICROBATCH[0] * MICROBATCH[1]
STAGE = StageId(1)
ROUND = RoundId(3)
FP32 = codec("fp32")
RATE = LearningRate(peak=1e-2, warmup=0, total=10)
NO_CLIP = 1e9


def engine(outer: OuterSpec | None) -> StageEngine:
    optimizer = OptimizerSpec(name="adamw32")
    return StageEngine.build(TINY, num_stages=4, stage=STAGE, optimizer=optimizer, seed=5, outer=outer)


def span(*, every: int, clip: float = NO_CLIP) -> SpanEngine:
    rules = LocalRules(every=every, clip={STAGE: clip}, schedule=RATE)
    made = SpanEngine(
        {STAGE: engine(OuterSpec())}, codec=FP32, hidden_size=WIDTH, num_stages=4, microbatch=MICROBATCH, local=rules
    )
    made.open(STAGE, ROUND)
    return made


def body(seed: int) -> Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed))


def feed(target: SpanEngine, seed: int) -> None:
    """One microbatch forth and back; what fails is discarded, as the runner does it."""
    _, shape, ticket = target.forward(FP32.encode(body(seed).view(-1)), SHAPE, entry=STAGE, round_id=ROUND)
    try:
        target.backward(ticket, FP32.encode(body(100 + seed).view(-1)), shape, target_tokens=TOKENS)
    except SwarmError:
        target.discard(ticket)
        raise


def by_hand(groups: list[list[int]], *, clip: float = NO_CLIP) -> StageEngine:
    """Take one step per group of microbatches."""
    made = engine(outer=None)
    for group in groups:
        for seed in group:
            _, ticket = made.forward(body(seed))
            made.backward(ticket, body(100 + seed))
        tokens = len(group) * TOKENS
        norm = made.gradient_norm() / tokens
        made.step(RATE.at(0), scale=min(1.0, clip / norm) / tokens)
    return made


def weights(one: StageEngine) -> Tensor:
    return torch.cat([tensor.reshape(-1) for tensor in one.weight_tensors().values()])


def flat(one: StageEngine) -> Tensor:
    """Return the weights as they lie in memory, padding included."""
    return torch.cat([poke.weights(one, block) for block in range(len(one._blocks))])


@pytest.mark.parametrize("clip", [NO_CLIP, 1e-3])
def test_a_step_follows_every_so_many_microbatches_and_the_end_of_the_round(clip: float) -> None:
    """Five microbatches, two per step: two steps within the round, the third when it is over."""
    ours = span(every=2, clip=clip)
    one = ours.engines[STAGE]
    for seed in range(5):
        feed(ours, seed)
    assert (one.steps, one.version) == (2, 0)
    assert ours.freeze(STAGE) == 5 * TOKENS
    assert (one.steps, one.version) == (3, 0)
    assert torch.equal(weights(one), weights(by_hand([[0, 1], [2, 3], [4]], clip=clip)))


def test_what_is_contributed_is_how_far_the_steps_have_come() -> None:
    """Oracle: initial weights minus those of an engine that is stepped by hand."""
    ours = span(every=2)
    one = ours.engines[STAGE]
    before = flat(one)
    for seed in range(2):
        feed(ours, seed)
    ours.freeze(STAGE)
    contribution = torch.cat([one.contribution_shard(number) for number in range(len(one.shards))])
    assert torch.equal(contribution, before - flat(one))
    assert bool(contribution.any())


def test_a_microbatch_that_is_on_its_way_goes_back_at_the_new_weights() -> None:
    """Its inside is recomputed after the step that came between. Oracle: two steps by hand, one after the other."""
    ours = span(every=1)
    _, shape, ticket = ours.forward(FP32.encode(body(1).view(-1)), SHAPE, entry=STAGE, round_id=ROUND)
    feed(ours, 0)
    ours.backward(ticket, FP32.encode(body(101).view(-1)), shape, target_tokens=TOKENS)
    assert torch.equal(weights(ours.engines[STAGE]), weights(by_hand([[0], [1]])))


def test_an_overflow_costs_what_was_added_since_the_last_step_only() -> None:
    """Oracle: tokens and weights of the step before it."""
    ours = span(every=2)
    for seed in range(3):
        feed(ours, seed)
    poke.gradient(ours.engines[STAGE])[0] = math.inf
    feed(ours, 3)
    assert ours.accumulated_tokens[STAGE] == 2 * TOKENS
    assert torch.equal(weights(ours.engines[STAGE]), weights(by_hand([[0, 1]])))
    feed(ours, 4)
    assert ours.freeze(STAGE) == 3 * TOKENS
    assert torch.equal(weights(ours.engines[STAGE]), weights(by_hand([[0, 1], [4]])))


@pytest.mark.parametrize(("every", "steps"), [(1, [[0, 1, 2]]), (2, [[0, 1, 2]]), (4, [[0, 1, 2, 3]])])
def test_a_wave_is_stepped_from_as_a_whole(every: int, steps: list[list[int]]) -> None:
    """Whatever its size: sums and tokens belong together. Oracle: one step by hand from all that was added up."""
    ours = span(every=every)
    bodies = [(FP32.encode(body(seed).view(-1)), SHAPE) for seed in range(3)]
    passed = ours.forward_wave(bodies, entry=STAGE, round_id=ROUND)
    back = [FP32.encode(body(100 + seed).view(-1)) for seed in range(3)]
    wave = []
    for each, gradient in zip(passed, back, strict=True):
        assert not isinstance(each, SwarmError)
        wave.append((each[2], gradient, each[1], TOKENS))
    ours.backward_wave(wave)
    if every == 4:
        feed(ours, 3)
    assert ours.engines[STAGE].steps == 1
    torch.testing.assert_close(weights(ours.engines[STAGE]), weights(by_hand(steps)), rtol=1e-6, atol=1e-8)
    assert ours.freeze(STAGE) == sum(map(len, steps)) * TOKENS


def test_a_round_that_is_begun_anew_forgets_its_steps() -> None:
    """Its microbatches will come again. Oracle: the anchor, which no turn has moved."""
    ours = span(every=2)
    one = ours.engines[STAGE]
    before = flat(one).clone()
    for seed in range(3):
        feed(ours, seed)
    assert not torch.equal(flat(one), before)
    ours.open(STAGE, ROUND)
    assert torch.equal(flat(one), before)
    assert ours.freeze(STAGE) == 0
    assert not any(bool(one.contribution_shard(number).any()) for number in range(len(one.shards)))


def test_a_frozen_stage_stays_as_it_is() -> None:
    """Oracle: the contribution before; a second end of the same round would begin the next one's."""
    ours = span(every=2)
    one = ours.engines[STAGE]
    feed(ours, 0)
    assert ours.freeze(STAGE) == TOKENS
    before = [one.contribution_shard(number).clone() for number in range(len(one.shards))]
    assert ours.freeze(STAGE) == TOKENS
    assert all(torch.equal(one.contribution_shard(number), shard) for number, shard in enumerate(before))
    assert one.steps == 1


def test_a_round_of_nothing_takes_no_step() -> None:
    ours = span(every=2)
    assert ours.freeze(STAGE) == 0
    assert ours.engines[STAGE].steps == 0
