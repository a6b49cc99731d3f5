"""A stage holds its own tensors and nothing else."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, AutoModelForCausalLM

from peer.model.stage import Stage, build_stage
from protocol import architecture
from protocol.architecture import num_parameters, preset, stage_tensors
from protocol.errors import CorpusError, ModelError

TINY = preset("tiny")
AUTO_MODEL: Any = AutoModelForCausalLM  # untyped


class Allocations(TorchDispatchMode):  # type: ignore[no-untyped-call, unused-ignore]
    """Adds up the bytes of every CPU storage that appears while it is active."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call, unused-ignore]
        self.storages: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in _tensors(result):
            if tensor.device.type == "cpu":
                storage = tensor.untyped_storage()
                self.storages[storage.data_ptr()] = max(storage.nbytes(), self.storages.get(storage.data_ptr(), 0))
        return result


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors(item)


@pytest.mark.parametrize(("num_stages", "stage"), [(1, 0), (2, 0), (2, 1), (3, 1)])
def test_stage_has_the_tensors_of_its_place(num_stages: int, stage: int) -> None:
    """Oracle: `protocol.architecture.stage_tensors`, order included."""
    built = build_stage(TINY, num_stages=num_stages, stage=stage)
    expected = stage_tensors(TINY, num_stages, stage)
    assert [(name, tuple(tensor.shape)) for name, tensor in built.named_tensors()] == list(expected.items())
    assert list(built.parameters) == list(expected)
    assert (built.is_first, built.is_last) == (stage == 0, stage == num_stages - 1)


def test_parameters_and_their_gradients_are_views_into_the_shards() -> None:
    """Oracle: storage addresses."""
    built = build_stage(TINY, num_stages=2, stage=1)
    weights = {shard.weights.untyped_storage().data_ptr() for shard in built.shards}
    gradients = {shard.gradient.untyped_storage().data_ptr() for shard in built.shards}
    in_layers = [parameter for layer in built.layers for parameter in layer.parameters()]
    assert len(in_layers) == 18
    for parameter in [*in_layers, *built.parameters.values()]:
        assert parameter.untyped_storage().data_ptr() in weights
        assert parameter.grad is not None
        assert parameter.grad.untyped_storage().data_ptr() in gradients


def test_other_stages_are_never_materialised() -> None:
    """Oracle: bytes that torch allocated, for a model whose embedding and head weigh 400 times the middle stage."""
    config = {**TINY, "vocab_size": 1_000_000}
    with Allocations() as allocations:
        built = build_stage(config, num_stages=3, stage=1, seed=0)
    own_bytes = sum(shard.weights.nbytes + shard.gradient.nbytes for shard in built.shards)
    assert own_bytes <= sum(allocations.storages.values()) < 2 * own_bytes
    assert 4 * num_parameters(config) > 400 * own_bytes


@pytest.mark.parametrize("num_stages", [2, 3, 4])
def test_initial_weights_do_not_depend_on_the_cut(num_stages: int) -> None:
    """Oracle: the uncut model with the same seed."""
    whole = dict(build_stage(TINY, num_stages=1, stage=0, seed=5).named_tensors())
    for stage in range(num_stages):
        for name, tensor in build_stage(TINY, num_stages=num_stages, stage=stage, seed=5).named_tensors():
            assert torch.equal(tensor, whole[name]), name


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_theta": 5000.0},
        {"rope_scaling": {"rope_type": "linear", "factor": 4.0}},
        preset("1b")["rope_scaling"],
    ],
)
def test_rotary_buffers_are_transformers_own(rope: dict[str, Any]) -> None:
    """Oracle: a model that was built on the CPU as a whole."""
    config = {**TINY, **(rope if "rope_type" not in rope else {"rope_scaling": rope})}
    whole = AUTO_MODEL.from_config(AutoConfig.for_model(**config)).model.rotary_emb
    hidden, positions = torch.zeros(1, 9, 64), torch.arange(9)[None]
    for own, expected in zip(
        build_stage(config, num_stages=4, stage=2)._rotary(hidden, positions), whole(hidden, positions), strict=True
    ):
        assert torch.equal(own, expected)


def test_padding_token_is_neither_initialised_nor_trained() -> None:
    """Oracle: transformers' embedding with `padding_idx`."""
    built = build_stage({**TINY, "pad_token_id": 3}, num_stages=2, stage=0, seed=0)
    tokens = torch.tensor([[3, 4, 3]])
    assert not built.embed(tokens)[0, 0].any()
    built.add_embedding_gradient(tokens, torch.ones(1, 3, 64))
    assert built.shards[0].gradient.nonzero().flatten().tolist() == list(range(4 * 64, 5 * 64))


@pytest.fixture(scope="module")
def last() -> Stage:
    return build_stage(TINY, num_stages=1, stage=0, seed=0)


@pytest.mark.parametrize("token", [-1, 512, -100])
def test_tokens_outside_the_vocabulary_are_refused(last: Stage, token: int) -> None:
    """Oracle: the vocabulary has 512 entries; -100 is a label but no input."""
    with pytest.raises(CorpusError, match=f"token {token} is outside the vocabulary of 512"):
        last.embed(torch.tensor([[1, token]]))
    if token != -100:
        with pytest.raises(CorpusError):
            last.head_loss(torch.zeros(1, 2, 64), torch.tensor([[1, token]]))


@pytest.mark.parametrize(
    "change",
    [{"rms_norm_eps": 1}, {"rope_scaling": {"rope_type": "spiral", "factor": 2.0}}, {"initializer_range": 7.0}],
)
@pytest.mark.filterwarnings("ignore")
def test_config_that_transformers_refuses_is_a_model_error(change: dict[str, Any]) -> None:
    """Oracle: an error of our tree, whatever transformers raised."""
    with pytest.raises(ModelError, match="transformers does not accept"):
        build_stage({**TINY, **change}, num_stages=1, stage=0)


def test_tensor_that_the_layout_does_not_know_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: a layout without the query norms, as if transformers had added them to a known architecture."""
    config = {**TINY, "model_type": "qwen3"}
    known = architecture._layer_tensors
    monkeypatch.setattr(
        architecture, "_layer_tensors", lambda *layer: [item for item in known(*layer) if "q_norm" not in item[0]]
    )
    with pytest.raises(ModelError, match="q_norm"):
        build_stage(config, num_stages=1, stage=0)
