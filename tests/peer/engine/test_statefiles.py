"""State on disk: what safetensors makes of the files, and which files are refused.

Oracles: the safetensors library, the engine's own tensors; for what is refused, the digest from before.
"""

from __future__ import annotations

import errno
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from safetensors.torch import load, save
from torch import Tensor

from peer.engine.optimizer import OptimizerSpec
from peer.engine.stage_engine import StageEngine
from peer.engine.statefiles import OPTIMIZER, STEPS, WEIGHTS, StateReader, UnfitState
from protocol import architecture, layout
from protocol.architecture import preset, stage_tensors
from protocol.control import STATE_PARTS
from protocol.errors import StorageError
from protocol.ids import Version
from tests.peer.engine import poke

Files = dict[str, bytes]


def engine(seed: int = 2, name: Any = "adamw8bit", stage: int = 2) -> StageEngine:
    return StageEngine.build(preset("tiny"), num_stages=3, stage=stage, optimizer=OptimizerSpec(name=name), seed=seed)


def trained(name: Any = "adamw8bit") -> StageEngine:
    own = engine(name=name)
    for step in range(2):
        generator = torch.Generator().manual_seed(step)
        hidden, tokens = torch.randn(2, 8, 64, generator=generator), torch.randint(0, 512, (2, 8), generator=generator)
        own.loss_and_backward(hidden, tokens)
        own.step(1e-3, scale=1 / 16)
    return own


def written(own: StageEngine) -> Files:
    files = {part: io.BytesIO() for part in STATE_PARTS}
    own.write_state(files)
    return {part: file.getvalue() for part, file in files.items()}


def read(own: StageEngine, files: Files) -> None:
    own.read_state({part: io.BytesIO(data) for part, data in files.items()}, version=Version(7))


@pytest.fixture(params=["whole", "cut"])
def _cut(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """With several shards to a block, and the head in several blocks."""
    if request.param == "cut":
        monkeypatch.setattr(layout, "SHARD_ELEMENTS", 8192)
        monkeypatch.setattr(architecture, "TABLE_ELEMENTS", 64 * 200)


@pytest.mark.usefixtures("_cut")
def test_weights_are_a_safetensors_file_of_hugging_face_names() -> None:
    own = trained()
    loaded = load(written(own)[WEIGHTS])
    expected = own.weight_tensors()
    assert {name: tuple(tensor.shape) for name, tensor in loaded.items()} == stage_tensors(preset("tiny"), 3, 2)
    assert loaded.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(loaded[name], tensor)


@pytest.mark.usefixtures("_cut")
def test_moments_are_a_safetensors_file_of_shards() -> None:
    own = trained()
    loaded = load(written(own)[OPTIMIZER])
    assert int(loaded.pop(STEPS)) == 2
    assert loaded.keys() == {f"optimizer.{shard.name}" for shard in own.shards}
    buffers = [
        poke.moments(own, block, shard)
        for block, shards in enumerate(own._memory.pool.inventory.shards)
        for shard in range(len(shards))
    ]
    for shard, buffer in zip(own.shards, buffers, strict=True):
        assert buffer.any()
        assert torch.equal(loaded[f"optimizer.{shard.name}"], buffer)


@pytest.mark.usefixtures("_cut")
@pytest.mark.parametrize("name", ["adamw8bit", "adamw32"])
def test_what_is_read_is_what_was_written(name: Any) -> None:
    """Oracle: digest and files of the engine that wrote."""
    own, other = trained(name), engine(seed=9, name=name)
    files = written(own)
    assert other.state_digest() != own.state_digest()
    read(other, files)
    assert other.version == 7
    assert other.state_digest() == own.state_digest()
    assert written(other) == files


def _without(part: str, tensor: str) -> Callable[[Files], Files]:
    def damaged(files: Files) -> Files:
        tensors = load(files[part])
        del tensors[tensor]
        return {**files, part: save(tensors, {"format": "pt"})}

    return damaged


def _with(part: str, tensor: str, change: Callable[[Tensor | None], Tensor]) -> Callable[[Files], Files]:
    def damaged(files: Files) -> Files:
        tensors = load(files[part])
        tensors[tensor] = change(tensors.get(tensor))
        return {**files, part: save(tensors, {"format": "pt"})}

    return damaged


def _cast(kind: torch.dtype) -> Callable[[Tensor | None], Tensor]:
    def change(tensor: Tensor | None) -> Tensor:
        assert tensor is not None
        return tensor.to(kind)

    return change


def _shorter(tensor: Tensor | None) -> Tensor:
    assert tensor is not None
    return tensor[:-1].clone()


DAMAGES: dict[str, Callable[[Files], Files]] = {
    "weight missing": _without(WEIGHTS, "model.norm.weight"),
    "weight unknown": _with(WEIGHTS, "model.layers.9.mlp.up_proj.weight", lambda _: torch.ones(4)),
    "weight shape": _with(WEIGHTS, "lm_head.weight", _shorter),
    "weight type": _with(WEIGHTS, "lm_head.weight", _cast(torch.float64)),
    "moments missing": _without(OPTIMIZER, "optimizer.head.0"),
    "moments unknown": _with(OPTIMIZER, "optimizer.layer.9.0", lambda _: torch.ones(256, dtype=torch.uint8)),
    "moments shape": _with(OPTIMIZER, "optimizer.head.0", _shorter),
    "moments type": _with(OPTIMIZER, "optimizer.head.0", _cast(torch.float32)),
    "steps missing": _without(OPTIMIZER, STEPS),
    "steps negative": _with(OPTIMIZER, STEPS, lambda _: torch.tensor(-1)),
    "steps a list": _with(OPTIMIZER, STEPS, lambda _: torch.tensor([2])),
    "another order": lambda files: {
        **files,
        WEIGHTS: save(load(files[WEIGHTS]), {"format": "pt"}),
    },  # the library sorts
    "a byte short": lambda files: {**files, WEIGHTS: files[WEIGHTS][:-1]},
    "a byte long": lambda files: {**files, OPTIMIZER: files[OPTIMIZER] + b"x"},
    "not a file of tensors": lambda files: {**files, WEIGHTS: b"nothing of the kind"},
    "empty": lambda files: {**files, OPTIMIZER: b""},
    "part missing": lambda files: {WEIGHTS: files[WEIGHTS]},
    "parts swapped": lambda files: {WEIGHTS: files[OPTIMIZER], OPTIMIZER: files[WEIGHTS]},
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_files_that_do_not_fit_are_refused_and_change_nothing(damage: str) -> None:
    own = engine()
    files = DAMAGES[damage](written(trained()))
    before = own.state_digest()
    with pytest.raises(UnfitState):
        read(own, files)
    assert (own.state_digest(), own.version) == (before, 0)


@pytest.mark.parametrize(("name", "stage"), [("adamw32", 2), ("adamw8bit", 1)])
def test_files_of_another_optimizer_or_stage_are_refused(name: Any, stage: int) -> None:
    own = engine(name=name, stage=stage)
    before = own.state_digest()
    with pytest.raises(StorageError, match="does not fit"):
        read(own, written(trained()))
    assert (own.state_digest(), own.version) == (before, 0)


class Broken(io.BytesIO):
    """A file on a drive that cannot be read any more."""

    def read(self, size: int | None = -1, /) -> bytes:
        raise OSError(errno.EIO, "Input/output error")


def test_a_drive_that_cannot_be_read_is_not_blamed_on_the_files() -> None:
    """Oracle: the kind of the error."""
    own = engine()
    files = {part: io.BytesIO(data) for part, data in written(own).items()}
    reader = StateReader(files, own._format())
    reader._files = dict.fromkeys(files, Broken())
    shard = own.shards[0]
    with pytest.raises(StorageError, match="Input/output error") as caught:
        reader.read(shard, torch.empty(shard.num_elements), torch.empty(0, dtype=torch.uint8))
    assert not isinstance(caught.value, UnfitState)
