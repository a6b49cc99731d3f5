"""Recomputing a stage's work with given weights.

Oracle: the engine that did the work, bit for bit: outputs, losses, gradients by inputs and weights. And where the
engine has changed since, one that has not.
"""

from __future__ import annotations

import pytest
import torch

from peer.engine.optimizer import OptimizerSpec
from peer.engine.replay import Replay
from peer.engine.stage_engine import StageEngine
from protocol.architecture import preset

TINY = preset("tiny")
NUM_STAGES = 3
SEQUENCES, LENGTH = 2, 16


def engine(stage: int) -> StageEngine:
    spec = OptimizerSpec(name="adamw8bit")
    return StageEngine.build(TINY, num_stages=NUM_STAGES, stage=stage, optimizer=spec, seed=2)


def tokens(seed: int) -> torch.Tensor:
    return torch.randint(0, 512, (SEQUENCES, LENGTH), generator=torch.Generator().manual_seed(seed))


def hidden(seed: int) -> torch.Tensor:
    return torch.randn(SEQUENCES, LENGTH, TINY["hidden_size"], generator=torch.Generator().manual_seed(seed))


def sums(own: StageEngine) -> torch.Tensor:
    return torch.cat(own.gradient_shards())


@pytest.mark.parametrize("stage", [0, 1])
def test_what_a_stage_computes_is_recomputed_to_the_bit(stage: int) -> None:
    own = engine(stage)
    replay = Replay(TINY, num_stages=NUM_STAGES, stage=stage)
    inputs = [tokens(1), tokens(2)] if stage == 0 else [hidden(1), hidden(2)]
    grads = [hidden(3), hidden(4)]
    passed = own.forward_wave(inputs)
    returned = own.backward_wave([(ticket, grad) for (_, ticket), grad in zip(passed, grads, strict=True)])
    climb = replay.up(own.shared_weights(), inputs)
    found: dict[int, torch.Tensor] = {}
    back = replay.down(climb, grads, found.__setitem__)
    for (expected, _), output in zip(passed, climb.outputs, strict=True):
        assert torch.equal(output, expected)
    if stage > 0:
        for mine, theirs in zip(back, returned, strict=True):
            assert theirs is not None
            assert torch.equal(mine, theirs)
    assert torch.equal(torch.cat([found[block] for block in sorted(found)]), sums(own))


@pytest.mark.parametrize("rows", [512, 128])
def test_the_last_stage_with_its_loss_is_recomputed_to_the_bit(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a head in one block, and with one that is cut into several."""
    monkeypatch.setattr("protocol.architecture.TABLE_ELEMENTS", rows * TINY["hidden_size"])
    own = engine(2)
    replay = Replay(TINY, num_stages=NUM_STAGES, stage=2)
    wave = [(hidden(1), tokens(5)), (hidden(2), tokens(6))]
    results = own.loss_wave(wave)
    found: dict[int, torch.Tensor] = {}
    climb = replay.up(own.shared_weights(), [each for each, _ in wave])
    losses = replay.losses(climb, [labels for _, labels in wave], found.__setitem__)
    back = replay.down(climb, [gradient for _, gradient in losses], found.__setitem__)
    assert [loss for loss, _ in losses] == [result.loss_sum for result in results]
    for mine, result in zip(back, results, strict=True):
        assert result.grad_inputs is not None
        assert torch.equal(mine, result.grad_inputs)
    assert torch.equal(torch.cat([found[block] for block in sorted(found)]), sums(own))


def test_weights_of_a_version_that_has_passed_bring_its_results_back() -> None:
    own, untouched = engine(1), engine(1)
    before = own.shared_weights()
    _, ticket = own.forward(hidden(1))
    own.backward(ticket, hidden(3))
    own.step(0.1, scale=1.0)
    climb = Replay(TINY, num_stages=NUM_STAGES, stage=1).up(before, [hidden(2)])
    assert torch.equal(climb.outputs[0], untouched.forward_only(hidden(2)))
    assert not torch.equal(climb.outputs[0], own.forward_only(hidden(2)))
