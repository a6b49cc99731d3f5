"""The cut of a model, against transformers' own classes and against brute force."""

from __future__ import annotations

from itertools import combinations
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoConfig, AutoModelForCausalLM

from protocol import architecture
from protocol.architecture import (
    PRESETS,
    TABLE_ELEMENTS,
    check_config,
    num_parameters,
    preset,
    stage_blocks,
    stage_layers,
    stage_tensors,
    untie,
)
from protocol.errors import ModelError
from protocol.layout import ALIGNMENT_ELEMENTS, BlockKind

AUTO_MODEL: Any = AutoModelForCausalLM  # untyped

SMALL: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
}
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": {**SMALL, "model_type": "llama"},
    "llama with biases": {**SMALL, "model_type": "llama", "attention_bias": True, "mlp_bias": True},
    "llama, as many key heads": {**SMALL, "model_type": "llama", "num_key_value_heads": None},
    "mistral": {**SMALL, "model_type": "mistral", "head_dim": 16},
    "qwen2": {**SMALL, "model_type": "qwen2"},
    "qwen3": {**SMALL, "model_type": "qwen3", "head_dim": 16},
    "qwen3, default head_dim, biases": {**SMALL, "model_type": "qwen3", "attention_bias": True},
}


@pytest.mark.parametrize("num_stages", [1, 2, 3, 4])
@pytest.mark.parametrize("name", CONFIGS)
def test_stages_together_hold_exactly_the_models_tensors(name: str, num_stages: int) -> None:
    """Oracle: the state dict of transformers' model on the meta device."""
    config = CONFIGS[name]
    check_config(config)
    with torch.device("meta"):
        model = AUTO_MODEL.from_config(AutoConfig.for_model(**config))
    expected = {tensor_name: tuple(tensor.shape) for tensor_name, tensor in model.state_dict().items()}
    stages = [stage_tensors(config, num_stages, stage) for stage in range(num_stages)]
    assert {key: shape for stage in stages for key, shape in stage.items()} == expected
    assert sum(len(stage) for stage in stages) == len(expected)  # none is on two stages
    assert sum(num_parameters(config, num_stages, stage) for stage in range(num_stages)) == model.num_parameters()
    assert num_parameters(config) == model.num_parameters()


def test_order_of_tensors_is_fixed() -> None:
    """Oracle: written out; hashes of weights depend on this order, so it is part of the protocol."""
    names = list(stage_tensors(preset("tiny"), 4, 3))
    prefix = "model.layers.3."
    matrices = ["q_proj", "k_proj", "v_proj", "o_proj"]
    assert names == [
        *(f"{prefix}self_attn.{name}.weight" for name in matrices),
        *(f"{prefix}mlp.{name}_proj.weight" for name in ("gate", "up", "down")),
        f"{prefix}input_layernorm.weight",
        f"{prefix}post_attention_layernorm.weight",
        "model.norm.weight",
        "lm_head.weight",
    ]


@given(layers=st.integers(1, 9), data=st.data())
def test_cut_is_contiguous_and_no_other_cut_has_a_faster_slowest_stage(layers: int, data: st.DataObject) -> None:
    """Oracle: every cut there is. Cost of a stage: its matrix elements without the embedding."""
    num_stages = data.draw(st.integers(1, layers))
    config = {**CONFIGS["llama"], "num_hidden_layers": layers, "vocab_size": data.draw(st.integers(1, 4000))}
    ranges = stage_layers(config, num_stages)
    assert [index for part in ranges for index in part] == list(range(layers))
    assert all(len(part) >= 1 for part in ranges)

    shapes = stage_tensors(config, 1, 0)
    layer = sum(a * b for name, (a, *rest) in shapes.items() if "layers.0." in name for b in rest)
    head: int = config["vocab_size"] * config["hidden_size"]

    def slowest(borders: tuple[int, ...]) -> int:
        ends = (*borders, layers)
        counts = [end - start for start, end in zip((0, *borders), ends, strict=True)]
        return max([count * layer for count in counts[:-1]] + [counts[-1] * layer + head])

    best = min(slowest(borders) for borders in combinations(range(1, layers), num_stages - 1))
    assert slowest(tuple(part.start for part in ranges[1:])) == best


@pytest.mark.parametrize("num_stages", [-1, 0, 5])
def test_impossible_number_of_stages_is_refused(num_stages: int) -> None:
    """Oracle: the model has four layers, and the hint says so."""
    with pytest.raises(ModelError, match="4 layers") as caught:
        stage_layers(preset("tiny"), num_stages)
    assert "1 to 4" in caught.value.hint


@pytest.mark.parametrize("stage", [-1, 2])
def test_stage_outside_the_cut_is_refused(stage: int) -> None:
    """Oracle: a cut of 2 has stages 0 and 1."""
    with pytest.raises(ModelError, match="no stage"):
        stage_tensors(preset("tiny"), 2, stage)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"model_type": "gpt2"}, "'gpt2' is not supported"),
        ({"model_type": None}, "None is not supported"),
        ({"model_type": "mixtral", "num_local_experts": 8}, "mixture-of-experts"),
        ({"model_type": "qwen3", "num_experts": 4}, "mixture-of-experts"),
        ({"quantization_config": {"load_in_4bit": True}}, "quantised"),
        ({"auto_map": {"AutoModel": "evil.Model"}}, "own code"),
        ({"attention_dropout": 0.1}, "dropout"),
        ({"hidden_act": "swish7"}, "swish7"),
        ({"pad_token_id": 96}, "pad_token_id 96"),
        ({"pad_token_id": -1}, "pad_token_id -1"),
        ({"num_hidden_layers": 0}, "num_hidden_layers"),
        ({"vocab_size": "96"}, "vocab_size"),
        ({"hidden_size": 50}, "not a multiple"),
        ({"num_key_value_heads": 3}, "not a multiple"),
        ({"head_dim": 15}, "odd"),
        ({"layer_types": ["sliding_attention"] + ["full_attention"] * 3}, "sliding-window"),
        ({"model_type": "mistral", "sliding_window": 63}, "sliding-window"),
        ({"model_type": "mistral", "max_position_embeddings": 4097}, "sliding-window"),
        (
            {"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 8, "max_window_layers": 2},
            "sliding-window",
        ),
    ],
)
def test_unsupported_config_is_refused_with_the_reason(change: dict[str, Any], said: str) -> None:
    """Oracle: each reason named once; the unchanged config passes (next test)."""
    with pytest.raises(ModelError, match=said):
        check_config({**CONFIGS["llama"], **change})


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"rope_scaling": {"rope_type": "linear", "factor": 2.0}},
        {"tie_word_embeddings": True},
        {"layer_types": ["full_attention"] * 4},
        {"model_type": "mistral", "sliding_window": None, "max_position_embeddings": 8192},
        {"model_type": "mistral", "sliding_window": 64},  # as long as the context: it never bites
        {"model_type": "qwen2", "use_sliding_window": False, "sliding_window": 8},
        {"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 8, "max_window_layers": 4},
    ],
)
def test_supported_config_passes(change: dict[str, Any]) -> None:
    """Oracle: no exception."""
    check_config({**CONFIGS["llama"], **change})


def test_refusal_names_what_is_supported() -> None:
    """Oracle: the four architectures are in the hint."""
    with pytest.raises(ModelError) as caught:
        check_config({"model_type": "bert"})
    assert all(name in caught.value.hint for name in ("llama", "mistral", "qwen2", "qwen3"))


def test_missing_size_is_refused() -> None:
    """Oracle: the message names the key."""
    config = dict(CONFIGS["llama"])
    del config["intermediate_size"]
    with pytest.raises(ModelError, match="intermediate_size"):
        check_config(config)


def test_untying_reports_what_was_and_leaves_the_original_alone() -> None:
    """Oracle: the flag of copy and original."""
    tied = {**CONFIGS["llama"], "tie_word_embeddings": True}
    config, was_tied = untie(tied)
    assert (config["tie_word_embeddings"], was_tied, tied["tie_word_embeddings"]) == (False, True, True)
    assert untie(config) == (config, False)
    with pytest.raises(ModelError, match="tied"):
        stage_tensors(tied, 2, 0)


@pytest.mark.parametrize("name", CONFIGS)
def test_blocks_are_aligned_with_matrices_first(name: str) -> None:
    """Oracle: the rules of the layout, and padding that fills exactly what the tensors leave."""
    for block in stage_blocks(CONFIGS[name], 1, 0):
        matrices = [len(slot.shape) > 1 for slot in block.slots]
        assert matrices == sorted(matrices, reverse=True)
        assert all(slot.offset % ALIGNMENT_ELEMENTS == 0 for slot in block.slots)
        assert block.num_elements % ALIGNMENT_ELEMENTS == block.num_matrix_elements % ALIGNMENT_ELEMENTS == 0
        assert max([slot.end for slot in block.slots if len(slot.shape) > 1], default=0) <= block.num_matrix_elements
        assert all(slot.offset >= block.num_matrix_elements for slot in block.slots if len(slot.shape) == 1)
        covered = [0] * block.num_elements
        for start, end in [(slot.offset, slot.end) for slot in block.slots] + list(block.padding()):
            covered[start:end] = [count + 1 for count in covered[start:end]]
        assert set(covered) == {1}


@pytest.mark.parametrize("table_elements", [TABLE_ELEMENTS, 1000])
@pytest.mark.parametrize("num_stages", [1, 2, 4])
def test_blocks_do_not_depend_on_the_cut(monkeypatch: pytest.MonkeyPatch, num_stages: int, table_elements: int) -> None:
    """Oracle: the blocks of the uncut model, so that saved state survives another cut."""
    monkeypatch.setattr(architecture, "TABLE_ELEMENTS", table_elements)
    config = CONFIGS["qwen3"]
    blocks = [block for stage in range(num_stages) for block in stage_blocks(config, num_stages, stage)]
    assert tuple(blocks) == stage_blocks(config, 1, 0)
    tables = 1 if table_elements == TABLE_ELEMENTS else 5
    assert [block.kind for block in blocks] == [
        *[BlockKind.EMBEDDING] * tables,
        *[BlockKind.LAYER] * 4,
        BlockKind.NORM,
        *[BlockKind.HEAD] * tables,
    ]
    assert len({block.name for block in blocks}) == len(blocks)


@given(vocabulary=st.integers(1, 500), hidden=st.integers(1, 64), limit=st.integers(1, 4000))
def test_blocks_of_rows_cover_a_table_once_and_none_is_too_large(vocabulary: int, hidden: int, limit: int) -> None:
    """Oracle: the rows counted one by one; a block over the limit is a single row, and fewer blocks would not do."""
    config = {**SMALL, "model_type": "llama", "vocab_size": vocabulary, "hidden_size": hidden}
    config |= {"num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": 2}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(architecture, "TABLE_ELEMENTS", limit)
        blocks = stage_blocks(config, 1, 0)
        tensors = stage_tensors(config, 1, 0)
    for kind, name in ((BlockKind.EMBEDDING, "model.embed_tokens.weight"), (BlockKind.HEAD, "lm_head.weight")):
        slots = [slot for block in blocks if block.kind is kind for slot in block.slots]
        assert {slot.name for slot in slots} == {name}
        rows = [row for slot in slots for row in range(slot.first_row, slot.first_row + slot.shape[0])]
        assert rows == list(range(vocabulary))
        assert all(slot.shape[1] == hidden for slot in slots)
        assert all(slot.num_elements <= limit or slot.shape[0] == 1 for slot in slots)
        assert len(slots) == 1 or (len(slots) - 1) * (limit // hidden) < vocabulary
        assert tensors[name] == (vocabulary, hidden)


@pytest.mark.parametrize(
    ("name", "parameters"), [("tiny", 229_952), ("demo", 2_164_416), ("bench", 29_499_904), ("1b", 1_498_482_688)]
)
def test_presets_are_valid_and_of_the_promised_size(name: str, parameters: int) -> None:
    """Oracle: sizes as documented (1b: Llama-3.2-1B's 1,235,814,400 and 262,668,288 of an untied head)."""
    check_config(preset(name))
    assert num_parameters(preset(name)) == parameters


def test_preset_is_a_copy_and_an_unknown_one_is_refused() -> None:
    """Oracle: changing the copy leaves the preset; the hint lists the presets."""
    preset("1b")["rope_scaling"]["factor"] = 0
    assert PRESETS["1b"]["rope_scaling"]["factor"] == 32.0
    with pytest.raises(ModelError) as caught:
        preset("70b")
    assert "demo" in caught.value.hint
