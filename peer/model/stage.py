"""One stage of a causal language model, built from transformers' own layers over flat shards.

Owns: which modules a stage has, how they are bound to shards, and the four pieces of arithmetic of which
training is composed: embed, layers, head loss, and the two gradients that are taken by hand. Must not know:
retention, optimizers, the network. `peer/engine/` decides when which piece runs.

The whole model exists only on the meta device, where it weighs nothing; the modules of this stage are taken
out of it and their parameters replaced by views into the shards. Parameters' `.grad` are views as well, so
autograd adds straight into the flat gradient.

Shapes: B sequences, T positions, D model width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from peer.model.initialise import initialise
from peer.model.loss import IGNORED, loss_sum, loss_sum_and_gradients
from peer.model.shards import Shard, allocate_shard
from protocol.architecture import ModelConfig, check_config, stage_layers, stage_shards
from protocol.errors import CorpusError, ModelError

EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head.weight"


class Stage:
    """The layers of one stage and their shards; made by `build_stage`."""

    def __init__(self, model: PreTrainedModel, shards: tuple[Shard, ...], layers: range, *, rotary: nn.Module) -> None:
        self.shards = shards
        self.parameters: dict[str, nn.Parameter] = {}
        """The stage's parameters by their Hugging Face names, in the order in which they are hashed."""
        self.vocabulary: int = model.config.vocab_size
        self.width: int = model.config.hidden_size
        self._padding_token: int | None = model.config.pad_token_id
        for shard in shards:
            self._bind(model, shard)
        self.layers = [model.model.layers[index].eval() for index in layers]
        self._rotary = rotary
        self._norm = model.model.norm if HEAD in self.parameters else None
        _check_complete([*self.layers, *([self._norm] if self._norm is not None else [])])

    @property
    def is_first(self) -> bool:
        return EMBEDDING in self.parameters

    @property
    def is_last(self) -> bool:
        return HEAD in self.parameters

    @property
    def device(self) -> torch.device:
        return self.shards[0].weights.device

    @property
    def dtype(self) -> torch.dtype:
        return self.shards[0].weights.dtype

    def named_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Yield the weights by Hugging Face name, without padding, sharing memory, in hash order."""
        for shard in self.shards:
            for slot in shard.layout.slots:
                yield slot.name, shard.weight_view(slot)

    @torch.no_grad()
    def embed(self, tokens_BT: Tensor) -> Tensor:
        """Look tokens up: int64 (B, T) -> (B, T, D). First stage only."""
        self.check_tokens(tokens_BT)
        return functional.embedding(tokens_BT, self.parameters[EMBEDDING])

    @torch.no_grad()
    def add_embedding_gradient(self, tokens_BT: Tensor, gradient_BTD: Tensor) -> None:
        """Add the gradient of `embed` to the embedding's, touching only the rows that were looked up."""
        tokens, gradient = tokens_BT.reshape(-1), gradient_BTD.reshape(-1, self.width)
        if self._padding_token is not None:
            is_real = tokens != self._padding_token
            tokens, gradient = tokens[is_real], gradient[is_real]
        total = self.parameters[EMBEDDING].grad
        assert total is not None
        if total.device.type == "cpu":
            total.index_add_(0, tokens, gradient)  # sequential on the CPU, hence the same bits every time
        else:
            total.index_put_((tokens,), gradient, accumulate=True)  # sorts first; index_add_ would race there

    def body(self, hidden_BTD: Tensor) -> Tensor:
        """Pass hidden states through the stage's layers (and the final norm on the last stage), under autograd."""
        positions = torch.arange(hidden_BTD.shape[1], device=hidden_BTD.device).unsqueeze(0)
        rotation = self._rotary(hidden_BTD, positions)
        for layer in self.layers:
            # no mask: with whole sequences, attention uses its causal path, as in transformers' own forward
            hidden_BTD = layer(
                hidden_BTD, attention_mask=None, position_ids=positions, position_embeddings=rotation, use_cache=False
            )
        return hidden_BTD if self._norm is None else self._norm(hidden_BTD)

    def head_loss(self, hidden_BTD: Tensor, labels_BT: Tensor) -> float:
        """Return the summed cross-entropy of normed hidden states. Last stage only."""
        self.check_tokens(labels_BT, allow_ignored=True)
        return loss_sum(hidden_BTD.reshape(-1, self.width), self.parameters[HEAD], labels_BT.reshape(-1))

    def head_loss_and_gradient(self, hidden_BTD: Tensor, labels_BT: Tensor) -> tuple[float, Tensor]:
        """Return the summed cross-entropy and its gradient by the hidden states; add that by the head.

        Last stage only.
        """
        self.check_tokens(labels_BT, allow_ignored=True)
        head = self.parameters[HEAD]
        assert head.grad is not None
        loss, gradient_ND = loss_sum_and_gradients(
            hidden_BTD.reshape(-1, self.width), head, labels_BT.reshape(-1), weight_gradient_VD=head.grad
        )
        return loss, gradient_ND.view_as(hidden_BTD)

    def check_tokens(self, tokens: Tensor, *, allow_ignored: bool = False) -> None:
        """Raise `CorpusError` for ids outside the vocabulary, which on a GPU would end the whole process."""
        outside = (tokens < 0) | (tokens >= self.vocabulary)
        if allow_ignored:
            outside &= tokens != IGNORED
        if bool(outside.any()):
            raise CorpusError(
                f"token {int(tokens[outside][0])} is outside the vocabulary of {self.vocabulary}.",
                hint="The token files were made for another model.",
            )

    def _bind(self, model: PreTrainedModel, shard: Shard) -> None:
        for slot in shard.layout.slots:
            module_name, _, leaf = slot.name.rpartition(".")
            module = model.get_submodule(module_name)
            expected = module.get_parameter(leaf).shape
            if tuple(expected) != slot.shape:
                raise ModelError(f"transformers makes {slot.name} {tuple(expected)}, this run says {slot.shape}.")
            parameter = nn.Parameter(shard.weight_view(slot))
            parameter.grad = shard.gradient_view(slot)
            module.register_parameter(leaf, parameter)
            self.parameters[slot.name] = parameter


def build_stage(
    config: ModelConfig,
    *,
    num_stages: int,
    stage: int,
    seed: int | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Stage:
    """Build one stage with initial weights drawn from `seed`, or zeros to be loaded over when it is None."""
    check_config(config)
    layouts = stage_shards(config, num_stages, stage)
    model = _meta_model(config, dtype)
    # the rotary frequencies are buffers, not weights: computed here, always on the CPU and in fp32
    rotary = type(model.model.rotary_emb)(config=model.config).to(device)
    shards = tuple(allocate_shard(layout, device=torch.device(device), dtype=dtype) for layout in layouts)
    built = Stage(model, shards, stage_layers(config, num_stages)[stage], rotary=rotary)
    if seed is not None:
        for name, tensor in built.named_tensors():
            initialise(
                tensor,
                name,
                seed=seed,
                deviation=model.config.initializer_range,
                pad_token=model.config.pad_token_id,
            )
    return built


def _meta_model(config: ModelConfig, dtype: torch.dtype) -> PreTrainedModel:
    fields: dict[str, Any] = {key: value for key, value in config.items() if key not in ("dtype", "torch_dtype")}
    factory: Any = AutoModelForCausalLM  # transformers leaves it untyped
    try:
        parsed = AutoConfig.for_model(**{**fields, "use_cache": False})
        with torch.device("meta"):
            model: PreTrainedModel = factory.from_config(parsed, attn_implementation="sdpa", dtype=dtype)
    except (StrictDataclassError, ValueError, TypeError, KeyError, AttributeError) as error:
        # transformers checks a config with whatever exception is at hand; none of it reaches the network
        raise ModelError(f"transformers does not accept the model's config: {error}") from error
    return model


def _check_complete(modules: Iterable[nn.Module]) -> None:
    """Raise `ModelError` if transformers' layers hold tensors that the layout does not know: they would be lost."""
    for module in modules:
        for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
            if tensor.is_meta:
                raise ModelError(
                    f"transformers' {type(module).__name__} has a tensor {name} that this version does not know."
                )
