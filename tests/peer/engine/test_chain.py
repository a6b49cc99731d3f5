"""A chain of engines is the whole model: forward, gradients, and training, against transformers and plain PyTorch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import functional
from transformers import AutoConfig, AutoModelForCausalLM

from peer.engine.optimizer import OptimizerSpec
from peer.engine.stage_engine import LossResult, StageEngine
from peer.model.blocks import named_views
from protocol import architecture, layout
from protocol.architecture import preset, stage_blocks
from tests.peer.engine.poke import named_gradients, weights

TINY = preset("tiny")
AUTO_MODEL: Any = AutoModelForCausalLM  # untyped
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": TINY,
    "llama, grouped heads, scaled rope": {
        **TINY,
        "num_key_value_heads": 2,
        "rope_scaling": {**preset("1b")["rope_scaling"], "original_max_position_embeddings": 16},
    },
    "mistral": {**TINY, "model_type": "mistral", "num_key_value_heads": 2, "head_dim": 24},
    "qwen2": {**TINY, "model_type": "qwen2", "num_key_value_heads": 2},
    "qwen3": {**TINY, "model_type": "qwen3", "num_key_value_heads": 2, "head_dim": 32},
}
SPEC = OptimizerSpec(name="adamw32")


def chain(config: dict[str, Any], num_stages: int) -> list[StageEngine]:
    engines = [
        StageEngine.build(config, num_stages=num_stages, stage=stage, optimizer=SPEC, seed=11)
        for stage in range(num_stages)
    ]
    for engine in engines:  # norms and biases away from one and zero, where they would hide mistakes
        for block, own in enumerate(engine._stage.layouts):
            for name, tensor in named_views(own, weights(engine, block)).items():
                if tensor.dim() == 1:
                    tensor.add_(0.1 * torch.randn(tensor.shape, generator=torch.Generator().manual_seed(len(name))))
    return engines


def whole_model(config: dict[str, Any], engines: list[StageEngine]) -> Any:
    model = AUTO_MODEL.from_config(AutoConfig.for_model(**config), dtype=torch.float32)
    model.load_state_dict({name: t for engine in engines for name, t in engine.weight_tensors().items()}, strict=True)
    return model


def batch(seed: int, sequences: int = 3, length: int = 24) -> tuple[torch.Tensor, torch.Tensor]:
    text = torch.randint(0, 512, (sequences, length + 1), generator=torch.Generator().manual_seed(seed))
    labels = text[:, 1:].clone()
    labels[0, 5] = labels[-1, -1] = -100
    return text[:, :-1].contiguous(), labels


def train(engines: list[StageEngine], tokens: torch.Tensor, labels: torch.Tensor) -> LossResult:
    """Pass one microbatch forward and back through the chain."""
    hidden, tickets = tokens, []
    for engine in engines[:-1]:
        hidden, ticket = engine.forward(hidden)
        tickets.append(ticket)
    result = engines[-1].loss_and_backward(hidden, labels)
    gradient = result.grad_inputs
    for engine, ticket in zip(reversed(engines[:-1]), reversed(tickets), strict=True):
        assert gradient is not None
        gradient = engine.backward(ticket, gradient)
    assert gradient is None
    return result


def cross_entropy_sum(model: Any, tokens: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    logits = model(input_ids=tokens, use_cache=False).logits
    return functional.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), reduction="sum")


@pytest.mark.parametrize("num_stages", [1, 2, 3, 4])
@pytest.mark.parametrize("name", CONFIGS)
def test_chain_is_the_whole_model(name: str, num_stages: int) -> None:
    """Oracle: transformers' model in one piece. Hidden states bit-equal, loss to 1e-6, gradients to 1e-5."""
    engines = chain(CONFIGS[name], num_stages)
    model = whole_model(CONFIGS[name], engines)
    tokens, labels = batch(0)
    with torch.no_grad():
        expected_hidden = model.model(input_ids=tokens, use_cache=False).last_hidden_state
    hidden = tokens
    for engine in engines:
        hidden = engine.forward_only(hidden)
    assert torch.equal(hidden, expected_hidden)

    expected = cross_entropy_sum(model, tokens, labels)
    torch.autograd.backward([expected])
    result = train(engines, tokens, labels)
    assert result.target_tokens == 3 * 24 - 2
    assert result.loss_sum == pytest.approx(expected.item(), rel=1e-6)
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    for engine in engines:
        for tensor_name, ours in named_gradients(engine).items():
            assert relative(ours, gradients.pop(tensor_name)) < 1e-5, tensor_name
    assert not gradients


@pytest.mark.parametrize("num_stages", [1, 3])
def test_chain_with_tables_in_several_blocks_is_the_whole_model(
    num_stages: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: as above; the head's sums are taken in another order, so the loss is equal to 1e-6 here too."""
    monkeypatch.setattr(architecture, "TABLE_ELEMENTS", 64 * 200)
    monkeypatch.setattr(layout, "SHARD_ELEMENTS", 8192)
    assert len(stage_blocks(TINY, 1, 0)) == 3 + 4 + 1 + 3
    test_chain_is_the_whole_model("llama", num_stages)


@pytest.mark.parametrize("table_elements", [architecture.TABLE_ELEMENTS, 64 * 200])
@pytest.mark.parametrize("num_stages", [1, 3])
def test_evaluation_is_the_loss_and_leaves_no_trace(
    num_stages: int, table_elements: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: the loss of the training pass, and zero gradients."""
    monkeypatch.setattr(architecture, "TABLE_ELEMENTS", table_elements)
    engines = chain(TINY, num_stages)
    hidden, labels = batch(1)
    for engine in engines[:-1]:
        hidden = engine.forward_only(hidden)
    evaluated = engines[-1].evaluate(hidden, labels)
    assert evaluated.grad_inputs is None
    assert not any(shard.any() for engine in engines for shard in engine.gradient_shards())
    trained = train(engines, *batch(1))
    assert (evaluated.loss_sum, evaluated.target_tokens) == (trained.loss_sum, trained.target_tokens)


def test_gradients_of_microbatches_add_up() -> None:
    """Oracle: the whole model's gradient over both microbatches at once."""
    engines = chain(TINY, 2)
    model = whole_model(TINY, engines)
    for seed in (2, 3):
        train(engines, *batch(seed))
        torch.autograd.backward([cross_entropy_sum(model, *batch(seed))])
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    for engine in engines:
        for name, ours in named_gradients(engine).items():
            assert relative(ours, gradients[name]) < 1e-5, name
    squares = sum(float(gradient.double().square().sum()) for gradient in gradients.values())
    assert sum(engine.gradient_norm() ** 2 for engine in engines) == pytest.approx(squares, rel=1e-5)


@pytest.mark.slow
def test_twenty_steps_follow_a_plain_pytorch_loop() -> None:
    """Oracle: transformers' model, summed losses over two microbatches, one division, `torch.optim.AdamW`."""
    engines = chain(TINY, 2)
    model = whole_model(TINY, engines)
    groups = [
        {"params": [p for p in model.parameters() if p.dim() > 1], "weight_decay": 0.1},
        {"params": [p for p in model.parameters() if p.dim() == 1], "weight_decay": 0.0},
    ]
    adamw = torch.optim.AdamW(groups, lr=3e-3, betas=(0.9, 0.95), eps=1e-8)
    losses = []
    for step in range(20):
        microbatches = [batch(seed) for seed in (step % 3, 7)]
        num_targets = sum(int((labels != -100).sum()) for _, labels in microbatches)
        adamw.zero_grad()
        expected = (
            torch.stack([cross_entropy_sum(model, *microbatch) for microbatch in microbatches]).sum() / num_targets
        )
        torch.autograd.backward([expected])
        adamw.step()
        loss = sum(train(engines, *microbatch).loss_sum for microbatch in microbatches) / num_targets
        assert loss == pytest.approx(expected.item(), rel=1e-5), step
        losses.append(loss)
        for engine in engines:
            engine.step(3e-3, scale=1 / num_targets)
    assert losses[-1] < losses[0] - 1  # it learns its few batches by heart
    state = model.state_dict()
    for engine in engines:
        assert engine.version == 20
        for name, tensor in engine.weight_tensors().items():
            # AdamW divides by the root of the second moment, so where a gradient is next to nothing its rounding error
            # becomes a whole step, and kernels of two kinds of processor round differently: seen are 4e-6 to 1.7e-5
            assert relative(tensor, state[name]) < 1e-4, name


def relative(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return float((ours - theirs).norm() / theirs.norm())
