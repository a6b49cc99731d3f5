"""A stage holds its own tensors and nothing else."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, AutoModelForCausalLM

from peer.engine.optimizer import OptimizerSpec
from peer.engine.stage_engine import StageEngine
from peer.memory import backend
from peer.model.loss import IGNORED, Scores
from peer.model.stage import Stage, build_stage
from protocol import architecture
from protocol.architecture import num_parameters, preset, stage_tensors
from protocol.errors import CorpusError, ModelError
from protocol.layout import BlockKind
from tests.peer.model.buffers import bind, tensors

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
    bind(built)
    expected = stage_tensors(TINY, num_stages, stage)
    named = [(name, tuple(each.shape)) for block in built.blocks for name, each in block.parameters.items()]
    assert named == list(expected.items())
    assert [slot.name for layout in built.layouts for slot in layout.slots] == list(expected)
    assert (built.is_first, built.is_last) == (stage == 0, stage == num_stages - 1)


def test_parameters_and_their_gradients_are_views_into_the_blocks() -> None:
    """Oracle: storage addresses."""
    built = build_stage(TINY, num_stages=2, stage=1)
    bound = bind(built)
    weights = {flat.untyped_storage().data_ptr() for flat in bound.weights}
    gradients = {flat.untyped_storage().data_ptr() for flat in bound.gradients}
    in_layers = [
        parameter
        for block in built.body
        if built.layouts[block].kind is BlockKind.LAYER
        for parameter in built._modules[block].parameters()
    ]
    assert len(in_layers) == 18
    in_modules = [parameter for module in built._modules.values() for parameter in module.parameters()]
    assert len(in_modules) == 19  # and the final norm
    for parameter in [*in_modules, *(each for block in built.blocks for each in block.parameters.values())]:
        assert parameter.untyped_storage().data_ptr() in weights
        assert parameter.grad is not None
        assert parameter.grad.untyped_storage().data_ptr() in gradients


def test_other_stages_are_never_materialised(monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: bytes that torch allocated and the memory engine mapped, for a model whose embedding and head weigh 400
    times the middle stage."""
    config = {**TINY, "vocab_size": 1_000_000}
    mapped: dict[int, int] = {}
    host_buffer = backend.host_buffer

    def counted(num_bytes: int) -> torch.Tensor:
        buffer = host_buffer(num_bytes)
        mapped[buffer.data_ptr()] = buffer.numel()
        return buffer

    monkeypatch.setattr(backend, "host_buffer", counted)
    with Allocations() as allocations:
        built = build_stage(config, num_stages=3, stage=1)
        own_bytes = 4 * sum(layout.num_elements for layout in built.layouts)
        assert sum(allocations.storages.values()) < 0.1 * own_bytes  # a stage alone has no buffers
        engine = StageEngine.build(config, num_stages=3, stage=1, optimizer=OptimizerSpec(name="adamw32"), seed=0)
    assert engine.state_bytes + own_bytes == 4 * own_bytes  # two moments, weights, and their gradient
    assert 4 * own_bytes <= sum(mapped.values()) < 1.01 * 4 * own_bytes
    assert sum(size for address, size in allocations.storages.items() if address not in mapped) < own_bytes
    assert 4 * num_parameters(config) > 400 * 2 * own_bytes


@pytest.mark.parametrize("num_stages", [2, 3, 4])
def test_initial_weights_do_not_depend_on_the_cut(num_stages: int) -> None:
    """Oracle: the uncut model with the same seed."""
    whole = initial(1, 0)
    for stage in range(num_stages):
        for name, tensor in initial(num_stages, stage).items():
            assert torch.equal(tensor, whole[name]), name


def initial(num_stages: int, stage: int) -> dict[str, torch.Tensor]:
    built = build_stage(TINY, num_stages=num_stages, stage=stage)
    return tensors(built, bind(built, seed=5).weights)


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
    built = build_stage({**TINY, "pad_token_id": 3}, num_stages=2, stage=0)
    bound = bind(built, seed=0)
    tokens = torch.tensor([[3, 4, 3]])
    assert not built.embed(0, tokens, None)[0, 0].any()
    built.add_embedding_gradient(0, tokens, torch.ones(1, 3, 64))
    assert bound.gradients[0].nonzero().flatten().tolist() == list(range(4 * 64, 5 * 64))


@pytest.fixture(scope="module")
def last() -> Stage:
    return build_stage(TINY, num_stages=1, stage=0)


@pytest.mark.parametrize("token", [-1, 512, -100])
def test_tokens_outside_the_vocabulary_are_refused(last: Stage, token: int) -> None:
    """Oracle: the vocabulary has 512 entries; -100 is a label but no input. (Who asks: test_stage_engine.py.)"""
    with pytest.raises(CorpusError, match=f"token {token} is outside the vocabulary of 512"):
        last.check_tokens(torch.tensor([[1, token]]))
    if token != -100:
        with pytest.raises(CorpusError):
            last.check_tokens(torch.tensor([[1, token]]), allow_ignored=True)
    last.check_tokens(torch.tensor([[0, 511]]))
    last.check_tokens(torch.tensor([[0, 511, -100]]), allow_ignored=True)


# -- tables in several blocks of rows -------------------------------------------------------------------------------


@pytest.fixture
def cut_tables(monkeypatch: pytest.MonkeyPatch) -> Stage:
    """A whole model whose embedding and head are three blocks each; the padding token is in the second one."""
    monkeypatch.setattr(architecture, "TABLE_ELEMENTS", 64 * 200)
    built = build_stage({**TINY, "pad_token_id": 300}, num_stages=1, stage=0)
    assert (len(built.embedding), len(built.head)) == (3, 3)
    assert [built.layouts[block].slots[0].first_row for block in built.embedding] == [0, 171, 342]
    assert [built.layouts[block].name for block in built.head] == ["head.0", "head.1", "head.2"]
    return built


def test_an_embedding_in_blocks_is_torchs_embedding(cut_tables: Stage) -> None:
    """Oracle: `torch.nn.functional.embedding` over the joined rows and its gradient, bit for bit: rows are looked up
    and added in the same order."""
    bound = bind(cut_tables, seed=1)
    table = tensors(cut_tables, bound.weights)["model.embed_tokens.weight"]
    assert not table[300].any()
    assert int((table == 0).all(dim=1).sum()) == 1
    tokens = torch.randint(0, 512, (3, 50), generator=torch.Generator().manual_seed(0))
    tokens[0, :9] = torch.tensor([0, 170, 171, 172, 341, 342, 511, 300, 300])  # the borders, and the padding token
    gradient = torch.randn(3, 50, 64, generator=torch.Generator().manual_seed(1))
    table.requires_grad_()
    expected = functional.embedding(tokens, table, padding_idx=300)
    torch.autograd.backward([expected], [gradient])

    hidden: torch.Tensor | None = None
    for block in cut_tables.embedding:
        hidden = cut_tables.embed(block, tokens, hidden)
    assert hidden is not None
    assert torch.equal(hidden, expected)
    for block in reversed(cut_tables.embedding):
        cut_tables.add_embedding_gradient(block, tokens, gradient)
    ours = tensors(cut_tables, bound.gradients)["model.embed_tokens.weight"]
    assert table.grad is not None
    assert torch.equal(ours, table.grad)
    assert not ours[300].any()


@pytest.mark.parametrize("order", [1, -1])
def test_a_head_in_blocks_is_torchs_cross_entropy(cut_tables: Stage, order: int) -> None:
    """Oracle: `torch.nn.functional.cross_entropy` over the joined rows in double precision; ours is fp32 and sums in
    another order. In whatever order the blocks come."""
    bound = bind(cut_tables, seed=1)
    head = tensors(cut_tables, bound.weights)["lm_head.weight"].double().requires_grad_()
    generator = torch.Generator().manual_seed(2)
    hidden = torch.randn(3, 50, 64, generator=generator)
    labels = torch.randint(0, 512, (3, 50), generator=generator)
    labels[0, :7] = torch.tensor([0, 170, 171, 341, 342, 511, 300])
    labels[1, 10:20] = labels[2, -1] = IGNORED
    hidden_64 = hidden.double().requires_grad_()
    logits = hidden_64 @ head.T
    expected = functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum", ignore_index=IGNORED)
    torch.autograd.backward([expected])

    scores = Scores.before(hidden.view(-1, 64))
    for block in cut_tables.head[::order]:
        cut_tables.add_head_scores(block, hidden, labels, scores)
    by_hidden = torch.zeros_like(hidden)
    for block in cut_tables.head[::-order]:
        cut_tables.add_head_gradients(block, hidden, labels, scores, by_hidden)
    assert scores.loss_sum(labels.reshape(-1)) == pytest.approx(expected.item(), rel=1e-6)
    assert hidden_64.grad is not None
    assert head.grad is not None
    torch.testing.assert_close(by_hidden, hidden_64.grad.float(), rtol=1e-5, atol=1e-6)
    ours = tensors(cut_tables, bound.gradients)["lm_head.weight"]
    torch.testing.assert_close(ours, head.grad.float(), rtol=1e-5, atol=1e-5)
    assert not by_hidden[labels == IGNORED].any()


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
