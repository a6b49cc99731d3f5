"""Our flat AdamW against the optimizers that it stands for."""

from __future__ import annotations

from typing import Any

import bitsandbytes.optim
import pytest
import torch

import peer.engine.optimizer as module
from peer.engine.optimizer import Optimizer, OptimizerSpec
from peer.model.shards import Shard, allocate_shard
from protocol.architecture import ShardLayout, preset, stage_shards
from protocol.errors import ConfigError, LocalFault, StorageError

# one layer with matrices of at least 4,096 elements (bitsandbytes keeps smaller ones in 32 bit), some of them
# no multiple of 256 elements, so that the padding has work to do
CONFIG = {**preset("tiny"), "hidden_size": 72, "num_attention_heads": 3, "num_key_value_heads": 3, "head_dim": 22}
CONFIG |= {"intermediate_size": 90, "num_hidden_layers": 1}
BNB_OPTIM: Any = bitsandbytes.optim  # untyped
RATES = (1e-3, 2e-3, 3e-3, 1e-3, 7e-4)


def shards_with_weights(layouts: tuple[ShardLayout, ...] = stage_shards(CONFIG, 1, 0)) -> list[Shard]:
    generator = torch.Generator().manual_seed(1)
    shards = [allocate_shard(layout, device=torch.device("cpu"), dtype=torch.float32) for layout in layouts]
    for shard in shards:
        for slot in shard.layout.slots:
            shard.weight_view(slot).normal_(0, 0.1, generator=generator)
    return shards


def draw_gradients(shards: list[Shard], step: int) -> None:
    generator = torch.Generator().manual_seed(100 + step)
    for shard in shards:
        for slot in shard.layout.slots:
            view = shard.gradient_view(slot)
            scales = 10 ** torch.randint(-6, 2, view.shape, generator=generator).float()
            view.copy_(torch.randn(view.shape, generator=generator) * scales)


def reference_parameters(shards: list[Shard]) -> dict[str, torch.nn.Parameter]:
    return {
        slot.name: torch.nn.Parameter(shard.weight_view(slot).clone())
        for shard in shards
        for slot in shard.layout.slots
    }


def set_gradients(parameters: dict[str, torch.nn.Parameter], shards: list[Shard]) -> None:
    for shard in shards:
        for slot in shard.layout.slots:
            if slot.name in parameters:
                parameters[slot.name].grad = shard.gradient_view(slot).clone()


def test_8_bit_matrices_are_bit_equal_to_bitsandbytes_per_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: `bnb.optim.AdamW8bit` on separate tensors, for every matrix of the layer; small pieces on our side."""
    monkeypatch.setattr(module, "STEP_ELEMENTS", 2048)
    shards = shards_with_weights()[1:2]
    matrices = {name: p for name, p in reference_parameters(shards).items() if p.dim() > 1}
    assert len(matrices) == 7
    assert min(p.numel() for p in matrices.values()) >= 4096
    assert any(p.numel() % 256 for p in matrices.values())
    optimizer = Optimizer(OptimizerSpec(weight_decay=0.05), shards)
    theirs = BNB_OPTIM.AdamW8bit(matrices.values(), betas=(0.9, 0.95), eps=1e-8, weight_decay=0.05)
    for step, rate in enumerate(RATES):
        draw_gradients(shards, step)
        set_gradients(matrices, shards)
        theirs.param_groups[0]["lr"] = rate
        theirs.step()
        optimizer.step(rate)
    for slot in shards[0].layout.slots:
        if slot.name in matrices:
            assert torch.equal(shards[0].weight_view(slot), matrices[slot.name]), slot.name


@pytest.mark.parametrize("name", ["adamw32", "adamw8bit"])
def test_32_bit_state_is_torchs_adamw(name: Any) -> None:
    """Oracle: `torch.optim.AdamW`, plain loops, with decay for matrices only. In an 8-bit run: all but the matrices of
    layers."""
    shards = shards_with_weights()
    parameters = reference_parameters(shards)
    optimizer = Optimizer(OptimizerSpec(name=name, weight_decay=0.1), shards)
    groups = [
        {"params": [p for p in parameters.values() if p.dim() > 1], "weight_decay": 0.1},
        {"params": [p for p in parameters.values() if p.dim() == 1], "weight_decay": 0.0},
    ]
    theirs = torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=1e-8)
    for step, rate in enumerate(RATES):
        draw_gradients(shards, step)
        set_gradients(parameters, shards)
        for group in theirs.param_groups:
            group["lr"] = rate
        theirs.step()
        optimizer.step(rate)
    compared = 0
    for shard in shards:
        for slot in shard.layout.slots:
            if name == "adamw32" or "layers" not in slot.name or len(slot.shape) == 1:
                torch.testing.assert_close(shard.weight_view(slot), parameters[slot.name].data, rtol=1e-6, atol=1e-7)
                compared += 1
    assert compared == {"adamw32": 12, "adamw8bit": 5}[name]


@pytest.mark.parametrize("name", ["adamw32", "adamw8bit"])
def test_padding_stays_zero(name: Any) -> None:
    """Oracle: zero, after steps with weight decay."""
    shards = shards_with_weights()
    optimizer = Optimizer(OptimizerSpec(name=name), shards)
    for step, rate in enumerate(RATES):
        draw_gradients(shards, step)
        optimizer.step(rate)
    gaps = [(shard, gap) for shard in shards for gap in shard.layout.padding()]
    assert len(gaps) >= 5
    assert not any(shard.weights[start:end].any() for shard, (start, end) in gaps)


@pytest.mark.parametrize("name", ["adamw32", "adamw8bit"])
def test_saved_and_loaded_state_continues_bit_for_bit(name: Any) -> None:
    """Oracle: the same five steps without a break."""
    unbroken, first = shards_with_weights(), shards_with_weights()
    spec = OptimizerSpec(name=name)
    optimizer, before = Optimizer(spec, unbroken), Optimizer(spec, first)
    for step, rate in enumerate(RATES):
        draw_gradients(unbroken, step)
        optimizer.step(rate)
    for step, rate in enumerate(RATES[:2]):
        draw_gradients(first, step)
        before.step(rate)

    saved = {name: tensor.clone() for name, tensor in before.state_tensors().items()}
    second = shards_with_weights()
    for ours, theirs in zip(second, first, strict=True):
        ours.weights.copy_(theirs.weights)
    after = Optimizer(spec, second)
    after.load_state_tensors(saved)
    for step, rate in list(enumerate(RATES))[2:]:
        draw_gradients(second, step)
        after.step(rate)
    for ours, theirs in zip(second, unbroken, strict=True):
        assert torch.equal(ours.weights, theirs.weights)
    assert all(
        torch.equal(a, b) for a, b in zip(*(o.state_tensors().values() for o in (after, optimizer)), strict=True)
    )


@pytest.mark.parametrize("threads", [2, 3, 7])
@pytest.mark.parametrize("name", ["adamw32", "adamw8bit"])
def test_number_of_threads_does_not_change_a_bit(name: Any, threads: int) -> None:
    """Oracle: one thread. Replicas with other `--threads` have to end with the same hash."""

    def trained(count: int) -> list[torch.Tensor]:
        before = torch.get_num_threads()
        torch.set_num_threads(count)
        try:
            shards = shards_with_weights(stage_shards({**CONFIG, "intermediate_size": 700}, 1, 0))
            optimizer = Optimizer(OptimizerSpec(name=name), shards)
            for step, rate in enumerate(RATES[:2]):
                draw_gradients(shards, step)
                optimizer.step(rate)
        finally:
            torch.set_num_threads(before)
        return [shard.weights for shard in shards]

    assert all(torch.equal(a, b) for a, b in zip(trained(1), trained(threads), strict=True))


def test_8_bit_state_of_layers_is_a_quarter_of_32_bit() -> None:
    """Oracle: bytes, for the layers of `demo`."""
    shards = shards_with_weights(stage_shards(preset("demo"), 1, 0)[1:-1])
    small, large = (Optimizer(OptimizerSpec(name=name), shards).state_bytes for name in ("adamw8bit", "adamw32"))
    assert small / large < 0.26


@pytest.mark.parametrize("damage", ["missing", "unknown", "shape", "type"])
def test_state_that_does_not_fit_is_refused_and_changes_nothing(damage: str) -> None:
    """Oracle: StorageError, and the state from before."""
    optimizer = Optimizer(OptimizerSpec(name="adamw32"), shards_with_weights())
    tensors = {name: torch.ones_like(tensor) for name, tensor in optimizer.state_tensors().items()}
    last = list(tensors)[-1]
    if damage == "missing":
        del tensors[last]
    elif damage == "unknown":
        tensors["optimizer.layer.9.matrices.moment1"] = torch.ones(256)
    elif damage == "shape":
        tensors[last] = tensors[last][:-1]
    else:
        tensors[last] = tensors[last].to(torch.uint8)
    with pytest.raises(StorageError, match="does not fit"):
        optimizer.load_state_tensors(tensors)
    assert optimizer.steps == 0
    assert not any(tensor.any() for tensor in optimizer.state_tensors().values())


def test_other_precisions_are_refused() -> None:
    """Oracle: LocalFault; bitsandbytes' CUDA kernel would not notice."""
    layout = stage_shards(CONFIG, 1, 0)[1]
    with pytest.raises(LocalFault, match="fp32"):
        Optimizer(OptimizerSpec(), [allocate_shard(layout, device=torch.device("cpu"), dtype=torch.bfloat16)])


@pytest.mark.parametrize("wrong", [{"name": "sgd"}, {"betas": (0.9, 1.0)}, {"epsilon": 0.0}, {"weight_decay": -0.1}])
def test_senseless_settings_are_refused(wrong: dict[str, Any]) -> None:
    """Oracle: ConfigError."""
    with pytest.raises(ConfigError):
        OptimizerSpec(**wrong)
