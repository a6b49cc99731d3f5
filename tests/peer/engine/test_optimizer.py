"""Our flat AdamW against the optimizers that it stands for."""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import bitsandbytes.optim
import pytest
import torch
from torch import Tensor

import peer.engine.optimizer as module
from peer.engine.optimizer import AdamW, OptimizerSpec
from peer.engine.statefiles import StateFormat, StateReader, StateWriter
from peer.memory.moments import OptimizerName, moment_bytes
from peer.model.blocks import named_views
from protocol import layout as layouts
from protocol.architecture import preset, stage_blocks
from protocol.control import STATE_PARTS
from protocol.errors import ConfigError, LocalFault
from protocol.layout import BlockLayout, ShardLayout

# one layer with matrices of at least 4,096 elements (bitsandbytes keeps smaller ones in 32 bit), some of them
# no multiple of 256 elements, so that the padding has work to do
CONFIG = {**preset("tiny"), "hidden_size": 72, "num_attention_heads": 3, "num_key_value_heads": 3, "head_dim": 22}
CONFIG |= {"intermediate_size": 90, "num_hidden_layers": 1}
LAYER = 1  # its block's number
BNB_OPTIM: Any = bitsandbytes.optim  # untyped
RATES = (1e-3, 2e-3, 3e-3, 1e-3, 7e-4)
CPU = torch.device("cpu")


@pytest.fixture(params=[None, 8192], ids=["whole blocks", "small shards"])
def _cut(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """With small shards, tensors begin in one and end in another."""
    if request.param is not None:
        monkeypatch.setattr(layouts, "SHARD_ELEMENTS", request.param)


@dataclass(frozen=True, slots=True)
class Trained:
    """One block's buffers: flat fp32, and the bytes of each shard's moments."""

    layout: BlockLayout
    weights: Tensor
    gradient: Tensor
    moments: list[Tensor]

    def shards(self) -> Iterator[tuple[ShardLayout, Tensor, Tensor, Tensor]]:
        for layout, moments in zip(self.layout.shards(), self.moments, strict=True):
            part = slice(layout.start, layout.stop)
            yield layout, self.weights[part], self.gradient[part], moments


def blocks_with_weights(
    name: OptimizerName, blocks: tuple[BlockLayout, ...] = stage_blocks(CONFIG, 1, 0)
) -> list[Trained]:
    generator = torch.Generator().manual_seed(1)
    made = [
        Trained(
            block,
            torch.zeros(block.num_elements),
            torch.zeros(block.num_elements),
            [torch.zeros(moment_bytes(shard, name), dtype=torch.uint8) for shard in block.shards()],
        )
        for block in blocks
    ]
    for block in made:
        for view in named_views(block.layout, block.weights).values():
            view.normal_(0, 0.1, generator=generator)
    return made


def draw_gradients(blocks: list[Trained], step: int) -> None:
    generator = torch.Generator().manual_seed(100 + step)
    for block in blocks:
        for view in named_views(block.layout, block.gradient).values():
            scales = 10 ** torch.randint(-6, 2, view.shape, generator=generator).float()
            view.copy_(torch.randn(view.shape, generator=generator) * scales)


def take_step(optimizer: AdamW, blocks: list[Trained], step: int, rate: float) -> None:
    """Draw gradients and take step number `step`, counted from 0."""
    draw_gradients(blocks, step)
    for block in blocks:
        for layout, weights, gradient, moments in block.shards():
            optimizer.step(layout, weights, gradient, moments, step=step + 1, learning_rate=rate)


def reference_parameters(blocks: list[Trained]) -> dict[str, torch.nn.Parameter]:
    return {
        name: torch.nn.Parameter(view.clone())
        for block in blocks
        for name, view in named_views(block.layout, block.weights).items()
    }


def set_gradients(parameters: dict[str, torch.nn.Parameter], blocks: list[Trained]) -> None:
    for block in blocks:
        for name, view in named_views(block.layout, block.gradient).items():
            if name in parameters:
                parameters[name].grad = view.clone()


@pytest.mark.usefixtures("_cut")
def test_8_bit_matrices_are_bit_equal_to_bitsandbytes_per_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: `bnb.optim.AdamW8bit` on separate tensors, for every matrix of the layer; small pieces on our side."""
    monkeypatch.setattr(module, "STEP_ELEMENTS", 2048)
    blocks = blocks_with_weights("adamw8bit")[LAYER : LAYER + 1]
    matrices = {name: p for name, p in reference_parameters(blocks).items() if p.dim() > 1}
    assert len(matrices) == 7
    assert min(p.numel() for p in matrices.values()) >= 4096
    assert any(p.numel() % 256 for p in matrices.values())
    optimizer = AdamW(OptimizerSpec(weight_decay=0.05), CPU)
    theirs = BNB_OPTIM.AdamW8bit(matrices.values(), betas=(0.9, 0.95), eps=1e-8, weight_decay=0.05)
    for step, rate in enumerate(RATES):
        draw_gradients(blocks, step)
        set_gradients(matrices, blocks)
        theirs.param_groups[0]["lr"] = rate
        theirs.step()
        take_step(optimizer, blocks, step, rate)
    ours = named_views(blocks[0].layout, blocks[0].weights)
    for name, matrix in matrices.items():
        assert torch.equal(ours[name], matrix), name


@pytest.mark.usefixtures("_cut")
@pytest.mark.parametrize("name", ["adamw32", "adamw8bit"])
def test_32_bit_state_is_torchs_adamw(name: Any) -> None:
    """Oracle: `torch.optim.AdamW`, plain loops, with decay for matrices only. In an 8-bit run: all but the matrices of
    layers."""
    blocks = blocks_with_weights(name)
    parameters = reference_parameters(blocks)
    optimizer = AdamW(OptimizerSpec(name=name, weight_decay=0.1), CPU)
    groups = [
        {"params": [p for p in parameters.values() if p.dim() > 1], "weight_decay": 0.1},
        {"params": [p for p in parameters.values() if p.dim() == 1], "weight_decay": 0.0},
    ]
    theirs = torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=1e-8)
    for step, rate in enumerate(RATES):
        draw_gradients(blocks, step)
        set_gradients(parameters, blocks)
        for group in theirs.param_groups:
            group["lr"] = rate
        theirs.step()
        take_step(optimizer, blocks, step, rate)
    compared = 0
    for block in blocks:
        for tensor_name, ours in named_views(block.layout, block.weights).items():
            if name == "adamw32" or "layers" not in tensor_name or ours.dim() == 1:
                torch.testing.assert_close(ours, parameters[tensor_name].data, rtol=1e-6, atol=1e-7)
                compared += 1
    assert compared == {"adamw32": 12, "adamw8bit": 5}[name]


@pytest.mark.parametrize("name", ["adamw32", "adamw8bit"])
def test_the_cut_into_shards_does_not_change_a_bit(name: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: the same steps with a shard per block."""
    weights = []
    for limit in (1 << 23, 8192):
        monkeypatch.setattr(layouts, "SHARD_ELEMENTS", limit)
        blocks, optimizer = blocks_with_weights(name), AdamW(OptimizerSpec(name=name), CPU)
        for step, rate in enumerate(RATES):
            take_step(optimizer, blocks, step, rate)
        weights.append(blocks)
    assert [len(block.moments) for block in weights[0]] == [1, 1, 1, 1]
    assert min(len(weights[1][block].moments) for block in (0, LAYER, 3)) > 2
    assert all(torch.equal(a.weights, b.weights) for a, b in zip(*weights, strict=True))


@pytest.mark.usefixtures("_cut")
@pytest.mark.parametrize("name", ["adamw32", "adamw8bit"])
def test_padding_stays_zero(name: Any) -> None:
    """Oracle: zero, after steps with weight decay."""
    blocks = blocks_with_weights(name)
    optimizer = AdamW(OptimizerSpec(name=name), CPU)
    for step, rate in enumerate(RATES):
        take_step(optimizer, blocks, step, rate)
    gaps = [(block, gap) for block in blocks for gap in block.layout.padding()]
    assert len(gaps) >= 5
    assert not any(block.weights[start:end].any() for block, (start, end) in gaps)


@pytest.mark.usefixtures("_cut")
@pytest.mark.parametrize("name", ["adamw32", "adamw8bit"])
def test_saved_and_loaded_state_continues_bit_for_bit(name: Any) -> None:
    """Oracle: the same five steps without a break."""
    unbroken, first = blocks_with_weights(name), blocks_with_weights(name)
    optimizer = AdamW(OptimizerSpec(name=name), CPU)
    for step, rate in enumerate(RATES):
        take_step(optimizer, unbroken, step, rate)
    for step, rate in enumerate(RATES[:2]):
        take_step(optimizer, first, step, rate)

    form = StateFormat([block.layout for block in first], name)
    files = {part: io.BytesIO() for part in STATE_PARTS}
    writer = StateWriter(files, form, steps=2)
    for block in first:
        for layout, weights, _, moments in block.shards():
            writer.write(layout, weights, moments)
    for file in files.values():
        file.seek(0)
    second = blocks_with_weights(name)
    reader = StateReader(files, form)
    for block in second:
        block.weights.fill_(9.0)  # every element comes from the file, or is padding
        for layout, weights, _, moments in block.shards():
            reader.read(layout, weights, moments)
    assert reader.steps == 2
    assert not any(file.read() for file in files.values())
    after = AdamW(OptimizerSpec(name=name), CPU)
    for step, rate in list(enumerate(RATES))[2:]:
        take_step(after, second, step, rate)
    for ours, theirs in zip(second, unbroken, strict=True):
        assert torch.equal(ours.weights, theirs.weights)
        assert all(torch.equal(a, b) for a, b in zip(ours.moments, theirs.moments, strict=True))


@pytest.mark.parametrize("threads", [2, 3, 7])
@pytest.mark.parametrize("name", ["adamw32", "adamw8bit"])
def test_number_of_threads_does_not_change_a_bit(name: Any, threads: int) -> None:
    """Oracle: one thread. Replicas with other `--threads` have to end with the same hash."""

    def trained(count: int) -> list[Tensor]:
        before = torch.get_num_threads()
        torch.set_num_threads(count)
        try:
            blocks = blocks_with_weights(name, stage_blocks({**CONFIG, "intermediate_size": 700}, 1, 0))
            optimizer = AdamW(OptimizerSpec(name=name), CPU)
            for step, rate in enumerate(RATES[:2]):
                take_step(optimizer, blocks, step, rate)
        finally:
            torch.set_num_threads(before)
        return [block.weights for block in blocks]

    assert all(torch.equal(a, b) for a, b in zip(trained(1), trained(threads), strict=True))


def test_8_bit_state_of_layers_is_a_quarter_of_32_bit() -> None:
    """Oracle: bytes, for the layers of `demo`."""
    layers = stage_blocks(preset("demo"), 1, 0)[1:-2]
    assert len(layers) == 4

    def state_bytes(name: OptimizerName) -> int:
        return sum(moment_bytes(shard, name) for layer in layers for shard in layer.shards())

    assert state_bytes("adamw8bit") / state_bytes("adamw32") < 0.26


@pytest.mark.parametrize("which", ["weights", "gradient"])
@pytest.mark.parametrize("name", ["adamw32", "adamw8bit"])
def test_other_precisions_are_refused(name: Any, which: str) -> None:
    """Oracle: LocalFault, with nothing changed; bitsandbytes' CUDA kernel would not notice."""
    block = blocks_with_weights(name)[LAYER]
    ((layout, weights, gradient, moments),) = block.shards()
    before = weights.clone()
    given = {"weights": weights, "gradient": gradient}
    given[which] = given[which].to(torch.bfloat16)
    with pytest.raises(LocalFault, match="fp32"):
        AdamW(OptimizerSpec(name=name), CPU).step(layout, **given, moments=moments, step=1, learning_rate=1e-3)
    assert torch.equal(weights, before)
    assert not moments.any()


@pytest.mark.parametrize("wrong", [{"name": "sgd"}, {"betas": (0.9, 1.0)}, {"epsilon": 0.0}, {"weight_decay": -0.1}])
def test_senseless_settings_are_refused(wrong: dict[str, Any]) -> None:
    """Oracle: ConfigError."""
    with pytest.raises(ConfigError):
        OptimizerSpec(**wrong)
