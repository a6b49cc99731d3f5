"""Which models a run can have, and how one is cut into stages and shards. Pure: no torch, no transformers.

Owns: the list of supported architectures, the exact name, shape and order of every tensor of every stage,
the cut into stages and blocks (`layout.py` says how a block lies in memory), and the presets.
Must not know: tensors, devices, optimizers. Peers build from it, the coordinator plans and exports with it,
and two sides that disagree here could not average, so it is part of the protocol.

A model is a Hugging Face `config.json` as a plain mapping. Names and shapes are those of transformers'
own classes (tests/protocol/test_architecture.py compares them for every architecture).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from types import MappingProxyType
from typing import Any

from protocol.errors import ModelError
from protocol.layout import BlockKind, BlockLayout, Shape, block_layout

ModelConfig = Mapping[str, Any]
"""A parsed `config.json`."""

SUPPORTED = ("llama", "mistral", "qwen2", "qwen3")
SUPPORTED_HINT = "Supported are dense decoders of model_type " + ", ".join(SUPPORTED) + "."
EMBEDDING = "model.embed_tokens.weight"
FINAL_NORM = "model.norm.weight"
HEAD = "lm_head.weight"
ACTIVATIONS = ("silu", "gelu", "gelu_pytorch_tanh", "relu")

TABLE_ELEMENTS = 1 << 26
"""Embedding and head are cut into blocks of rows, each at most this large (256 MiB in fp32): they can be larger than
a small card.
"""

_EXPERT_KEYS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_intermediate_size")
# transformers' class defaults for keys that a config may leave out
_DEFAULT_KV_HEADS = {"mistral": 8, "qwen2": 32, "qwen3": 32}
_DEFAULT_HEAD_DIM = {"qwen3": 128}
_DEFAULT_POSITIONS = {"llama": 2048, "mistral": 131072, "qwen2": 32768, "qwen3": 32768}
_DEFAULT_WINDOW = 4096
_DEFAULT_WINDOW_START = 28


@dataclass(frozen=True, slots=True)
class _Dimensions:
    hidden: int
    ffn: int
    vocabulary: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    qkv_bias: bool
    output_bias: bool
    mlp_bias: bool
    qk_norm: bool


def check_config(config: ModelConfig) -> None:
    """Raise `ModelError` unless the model is one that can be trained here; a tied head is fine (see `untie`)."""
    model_type = config.get("model_type")
    if any(config.get(key) for key in _EXPERT_KEYS):
        raise ModelError(
            f"mixture-of-experts models (model_type {model_type!r}) are not supported.", hint=SUPPORTED_HINT
        )
    if model_type not in SUPPORTED:
        raise ModelError(f"model_type {model_type!r} is not supported.", hint=SUPPORTED_HINT)
    if config.get("quantization_config") is not None:
        raise ModelError(
            "the model is quantised; training needs plain weights.",
            hint="Remove 'quantization_config' from config.json.",
        )
    if config.get("auto_map") is not None:
        raise ModelError(
            "the model brings its own code, which peers do not run.", hint="Remove 'auto_map' from config.json."
        )
    if config.get("attention_dropout"):
        raise ModelError("dropout is not supported.", hint="Set 'attention_dropout' to 0.")
    if config.get("hidden_act", "silu") not in ACTIVATIONS:
        raise ModelError(
            f"hidden_act {config['hidden_act']!r} is not supported.",
            hint="Supported are " + ", ".join(ACTIVATIONS) + ".",
        )
    dims = _dimensions(config)
    _check_attention(config, dims)
    pad_token = config.get("pad_token_id")
    if pad_token is not None and not (isinstance(pad_token, int) and 0 <= pad_token < dims.vocabulary):
        raise ModelError(f"pad_token_id {pad_token!r} is outside the vocabulary.", hint="Set 'pad_token_id' to null.")


def untie(config: ModelConfig) -> tuple[dict[str, Any], bool]:
    """Return a copy whose head has its own weights, and whether it shared the embedding's before.

    Embedding and head live on different peers, so they cannot be one tensor.
    """
    was_tied = bool(config.get("tie_word_embeddings", False))
    return {**copy.deepcopy(dict(config)), "tie_word_embeddings": False}, was_tied


def stage_layers(config: ModelConfig, num_stages: int) -> tuple[range, ...]:
    """Cut the layers into `num_stages` contiguous ranges so that the slowest stage is as fast as can be.

    Cost is counted in matrix elements (compute is proportional to them); the head counts for the last stage,
    the embedding, a look-up, for none. Left-over layers go to late stages: the first already holds the embedding.
    """
    dims = _dimensions(config)
    if not 1 <= num_stages <= dims.layers:
        raise ModelError(
            f"a model of {dims.layers} layers cannot be cut into {num_stages} stages.",
            hint=f"Choose from 1 to {dims.layers} stages.",
        )
    ranges, start = [], 0
    for count in _layers_per_stage(dims, num_stages):
        ranges.append(range(start, start + count))
        start += count
    return tuple(ranges)


def stage_blocks(config: ModelConfig, num_stages: int, stage: int) -> tuple[BlockLayout, ...]:
    """Return the blocks of one stage in forward order: embedding, layers, final norm, head."""
    if config.get("tie_word_embeddings", False):
        raise ModelError("a tied head cannot be cut off its embedding.", hint="Untie the model first.")
    dims = _dimensions(config)
    ranges = stage_layers(config, num_stages)
    if not 0 <= stage < num_stages:
        raise ModelError(f"there is no stage {stage} in a cut of {num_stages}.")
    blocks = []
    if stage == 0:
        blocks += _table_blocks("embedding", BlockKind.EMBEDDING, EMBEDDING, dims)
    blocks += [block_layout(f"layer.{i}", BlockKind.LAYER, _layer_tensors(dims, i)) for i in ranges[stage]]
    if stage == num_stages - 1:
        blocks.append(block_layout("norm", BlockKind.NORM, [(FINAL_NORM, (dims.hidden,))]))
        blocks += _table_blocks("head", BlockKind.HEAD, HEAD, dims)
    return tuple(blocks)


def stage_tensors(config: ModelConfig, num_stages: int, stage: int) -> dict[str, Shape]:
    """Return the shapes of one stage's tensors by their Hugging Face names, in the order in which they are hashed."""
    shapes: dict[str, Shape] = {}
    for block in stage_blocks(config, num_stages, stage):
        for slot in block.slots:
            rows, *others = slot.shape
            shapes[slot.name] = (slot.first_row + rows, *others)  # the last rows of a table tell how many there are
    return shapes


def num_parameters(config: ModelConfig, num_stages: int = 1, stage: int | None = None) -> int:
    """Count the parameters of one stage, or of the whole (untied) model."""
    stages = range(num_stages) if stage is None else (stage,)
    return sum(block.num_parameters for index in stages for block in stage_blocks(config, num_stages, index))


def preset(name: str) -> dict[str, Any]:
    """Return a fresh copy of the preset called `name`."""
    if name not in PRESETS:
        raise ModelError(f"there is no preset {name!r}.", hint="Presets are " + ", ".join(PRESETS) + ".")
    return copy.deepcopy(dict(PRESETS[name]))


def _dimensions(config: ModelConfig) -> _Dimensions:
    model_type = config.get("model_type")
    hidden, heads = _positive(config, "hidden_size"), _positive(config, "num_attention_heads")
    # an absent key means the class's default, a null one means "as many as query heads"
    kv_heads = heads if "num_key_value_heads" in config else _DEFAULT_KV_HEADS.get(str(model_type), heads)
    bias = bool(config.get("attention_bias", False)) and model_type in ("llama", "qwen3")
    return _Dimensions(
        hidden=hidden,
        ffn=_positive(config, "intermediate_size"),
        vocabulary=_positive(config, "vocab_size"),
        layers=_positive(config, "num_hidden_layers"),
        heads=heads,
        kv_heads=_positive(config, "num_key_value_heads", kv_heads),
        head_dim=_positive(config, "head_dim", _DEFAULT_HEAD_DIM.get(str(model_type), hidden // heads)),
        qkv_bias=bias or model_type == "qwen2",
        output_bias=bias,
        mlp_bias=bool(config.get("mlp_bias", False)) and model_type == "llama",
        qk_norm=model_type == "qwen3",
    )


def _positive(config: ModelConfig, key: str, default: int | None = None) -> int:
    value = config.get(key)
    value = default if value is None else value
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ModelError(f"the model's config needs a positive whole number as '{key}', not {value!r}.")
    return value


def _check_attention(config: ModelConfig, dims: _Dimensions) -> None:
    if dims.hidden % dims.heads:
        raise ModelError(f"hidden_size {dims.hidden} is not a multiple of num_attention_heads {dims.heads}.")
    if dims.heads % dims.kv_heads:
        raise ModelError(f"num_attention_heads {dims.heads} is not a multiple of num_key_value_heads {dims.kv_heads}.")
    if dims.head_dim % 2:
        raise ModelError(f"head_dim {dims.head_dim} is odd; rotary embedding needs pairs.")
    layer_types = config.get("layer_types") or ()
    window = _attention_window(config, dims)
    positions = _positive(config, "max_position_embeddings", _DEFAULT_POSITIONS[config["model_type"]])
    if any(kind != "full_attention" for kind in layer_types) or (window is not None and window < positions):
        raise ModelError(
            "sliding-window attention and mixed layer types are not supported.",
            hint="Set 'sliding_window' to null (and every entry of 'layer_types' to 'full_attention').",
        )


def _attention_window(config: ModelConfig, dims: _Dimensions) -> int | None:
    """Return the window that transformers would use, by each class's own rule."""
    window: int | None = config.get("sliding_window", _DEFAULT_WINDOW)
    if config["model_type"] == "mistral":
        return window
    if config["model_type"] in ("qwen2", "qwen3") and config.get("use_sliding_window", False):
        return window if config.get("max_window_layers", _DEFAULT_WINDOW_START) < dims.layers else None
    return None


def _layers_per_stage(dims: _Dimensions, num_stages: int) -> list[int]:
    if num_stages == 1:
        return [dims.layers]
    layer_cost = sum(prod(shape) for _, shape in _layer_tensors(dims, 0))
    head_cost = dims.vocabulary * dims.hidden
    others = num_stages - 1

    def slowest(last: int) -> int:
        return max(-(-(dims.layers - last) // others) * layer_cost, last * layer_cost + head_cost)

    last = min(range(1, dims.layers - others + 1), key=lambda count: (slowest(count), -count))
    each, extra = divmod(dims.layers - last, others)
    return [each + (index >= others - extra) for index in range(others)] + [last]


def _table_blocks(name: str, kind: BlockKind, tensor: str, dims: _Dimensions) -> list[BlockLayout]:
    """Cut a table of the vocabulary into the fewest blocks of about equal numbers of rows."""
    count = -(-dims.vocabulary // max(1, TABLE_ELEMENTS // dims.hidden))
    rows = -(-dims.vocabulary // count)
    starts = range(0, dims.vocabulary, rows)
    return [
        block_layout(
            name if count == 1 else f"{name}.{index}",
            kind,
            [(tensor, (min(rows, dims.vocabulary - start), dims.hidden))],
            first_row=start,
        )
        for index, start in enumerate(starts)
    ]


def _layer_tensors(dims: _Dimensions, index: int) -> list[tuple[str, Shape]]:
    """Return a layer's tensors, matrices before vectors."""
    query, key = dims.heads * dims.head_dim, dims.kv_heads * dims.head_dim
    tensors: list[tuple[str, Shape]] = [
        ("self_attn.q_proj.weight", (query, dims.hidden)),
        ("self_attn.k_proj.weight", (key, dims.hidden)),
        ("self_attn.v_proj.weight", (key, dims.hidden)),
        ("self_attn.o_proj.weight", (dims.hidden, query)),
        ("mlp.gate_proj.weight", (dims.ffn, dims.hidden)),
        ("mlp.up_proj.weight", (dims.ffn, dims.hidden)),
        ("mlp.down_proj.weight", (dims.hidden, dims.ffn)),
        ("input_layernorm.weight", (dims.hidden,)),
        ("post_attention_layernorm.weight", (dims.hidden,)),
    ]
    if dims.qkv_bias:
        tensors += [(f"self_attn.{name}_proj.bias", (size,)) for name, size in (("q", query), ("k", key), ("v", key))]
    if dims.output_bias:
        tensors.append(("self_attn.o_proj.bias", (dims.hidden,)))
    if dims.mlp_bias:
        sizes = (("gate", dims.ffn), ("up", dims.ffn), ("down", dims.hidden))
        tensors += [(f"mlp.{name}_proj.bias", (size,)) for name, size in sizes]
    if dims.qk_norm:
        tensors += [(f"self_attn.{name}_norm.weight", (dims.head_dim,)) for name in ("q", "k")]
    return [(f"model.layers.{index}.{name}", shape) for name, shape in tensors]


def initializer_range(hidden: int) -> float:
    """Return the standard deviation of initial weights: that of a width, but never less than Llama's 0.02.

    With 0.02 a narrow model's embeddings drown in what its first layers add; at d=192, 0.83 / sqrt(d) = 0.06
    took the demo's held-out loss from 5.80 to 5.25 after the same 60 rounds (docs/decisions/0007).
    """
    return max(0.02, round(0.83 / math.sqrt(hidden), 3))


def _llama(
    *, hidden: int, layers: int, heads: int, ffn: int, vocabulary: int, positions: int, **others: Any
) -> Mapping[str, Any]:
    return MappingProxyType(
        {
            "model_type": "llama",
            "architectures": ["LlamaForCausalLM"],
            "hidden_size": hidden,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "num_key_value_heads": heads,
            "head_dim": hidden // heads,
            "intermediate_size": ffn,
            "vocab_size": vocabulary,
            "max_position_embeddings": positions,
            "hidden_act": "silu",
            "rms_norm_eps": 1e-5,
            "rope_theta": 10000.0,
            "initializer_range": initializer_range(hidden),
            "attention_bias": False,
            "attention_dropout": 0.0,
            "mlp_bias": False,
            "tie_word_embeddings": False,
            # the tokenizer decides these; Llama's own defaults (1 and 2) would be ordinary tokens here
            "bos_token_id": None,
            "eos_token_id": None,
            "pad_token_id": None,
            **others,
        }
    )


PRESETS: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "tiny": _llama(hidden=64, layers=4, heads=4, ffn=128, vocabulary=512, positions=128),
        "demo": _llama(hidden=192, layers=4, heads=3, ffn=512, vocabulary=1024, positions=256),
        "bench": _llama(hidden=512, layers=8, heads=8, ffn=1376, vocabulary=4096, positions=512),
        # the shape of Llama-3.2-1B, with a head of its own
        "1b": _llama(
            hidden=2048,
            layers=16,
            heads=32,
            ffn=8192,
            vocabulary=128256,
            positions=131072,
            num_key_value_heads=8,
            rope_theta=500000.0,
            rope_scaling={
                "rope_type": "llama3",
                "factor": 32.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 8192,
            },
        ),
    }
)
"""Configs by name: `tiny` for tests, `demo` for one machine, `bench` for benchmarks, `1b` for real cards."""
