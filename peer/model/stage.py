"""One stage of a causal language model, built from transformers' own layers over flat blocks.

Owns: which blocks a stage has, and the pieces of arithmetic of which training is composed: embed, layer, norm, head
loss, and the two gradients that are taken by hand. Must not know: where a block's buffers are, retention, optimizers,
the network. `peer/engine/` decides when which piece runs.

The whole model exists only on the meta device, where it weighs nothing; the modules of this stage are taken out of it
and their parameters replaced by those of the blocks (`blocks.py`).

Shapes: B sequences, T positions, D model width, V vocabulary. Blocks are counted from 0 within the stage.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from peer.model.blocks import Block, Saved, view_of
from peer.model.initialise import initialise
from peer.model.loss import IGNORED, Scores, add_gradients, add_scores, loss_sum_and_gradients
from protocol.architecture import EMBEDDING, HEAD, ModelConfig, check_config, stage_blocks
from protocol.errors import CorpusError, ModelError
from protocol.layout import BlockKind, BlockLayout

_SEGMENTS = (("input_layernorm", "self_attn"), ("post_attention_layernorm", "mlp"))
"""The modules of a layer, by segment."""


class Stage:
    """The blocks of one stage; made by `build_stage`. A block has to be bound before it can compute."""

    def __init__(
        self, model: PreTrainedModel, layouts: Iterable[BlockLayout], *, rotary: nn.Module, device: torch.device
    ) -> None:
        self.device = device
        self.blocks = tuple(Block(layout, device) for layout in layouts)
        self.vocabulary: int = model.config.vocab_size
        self.width: int = model.config.hidden_size
        self.embedding = self._range(BlockKind.EMBEDDING)
        """The blocks of the embedding's rows; none but on the first stage."""
        self.body = range(self.embedding.stop, self.embedding.stop + len(self._range(BlockKind.LAYER, BlockKind.NORM)))
        """Layers, and the final norm on the last stage."""
        self.head = range(self.body.stop, len(self.blocks))
        """The blocks of the head's rows; none but on the last stage."""
        self._padding_token: int | None = model.config.pad_token_id
        self._deviation: float = model.config.initializer_range
        self._rotary = rotary
        self._rotations: dict[int, tuple[Tensor, Any]] = {}
        self._modules = {index: self._adopt(model, self.blocks[index]) for index in self.body}
        for table in (*self.embedding, *self.head):
            _check_shapes(model, self.blocks[table].layout)

    @property
    def is_first(self) -> bool:
        return len(self.embedding) > 0

    @property
    def is_last(self) -> bool:
        return len(self.head) > 0

    @property
    def layouts(self) -> tuple[BlockLayout, ...]:
        return tuple(block.layout for block in self.blocks)

    # -- embedding ------------------------------------------------------------------------------------

    @torch.no_grad()
    def embed(self, block: int, tokens_BT: Tensor, hidden_BTD: Tensor | None) -> Tensor:
        """Look tokens up: int64 (B, T) -> (B, T, D). A later block of rows fills in what the earlier ones began."""
        table = self.blocks[block].parameters[EMBEDDING]
        if len(self.embedding) == 1:
            return functional.embedding(tokens_BT, table)
        if hidden_BTD is None:
            hidden_BTD = table.new_zeros((*tokens_BT.shape, self.width))
        rows, is_here = self._rows(block, tokens_BT)
        hidden_BTD[is_here] = functional.embedding(rows[is_here], table)
        return hidden_BTD

    @torch.no_grad()
    def add_embedding_gradient(self, block: int, tokens_BT: Tensor, gradient_BTD: Tensor) -> None:
        """Add the gradient of `embed` to the embedding's, touching only the rows that were looked up."""
        tokens, gradient = tokens_BT.reshape(-1), gradient_BTD.reshape(-1, self.width)
        if self._padding_token is not None:
            is_real = tokens != self._padding_token
            tokens, gradient = tokens[is_real], gradient[is_real]
        if len(self.embedding) > 1:
            tokens, is_here = self._rows(block, tokens)
            tokens, gradient = tokens[is_here], gradient[is_here]
        total = _gradient_of(self.blocks[block].parameters[EMBEDDING])
        if total.device.type == "cpu":
            total.index_add_(0, tokens, gradient)  # sequential on the CPU, hence the same bits every time
        else:
            total.index_put_((tokens,), gradient, accumulate=True)  # sorts first; index_add_ would race there

    # -- body -----------------------------------------------------------------------------------------

    def pass_through(self, block: int, hidden_BTD: Tensor) -> Tensor:
        """Pass hidden states through one layer or the final norm, under autograd if that is on."""
        is_layer = self.blocks[block].layout.kind is BlockKind.LAYER
        for segment in range(len(_SEGMENTS) if is_layer else 1):
            hidden_BTD = self.pass_segment(block, segment, hidden_BTD)
        return hidden_BTD

    def pass_segment(self, block: int, segment: int, hidden_BTD: Tensor) -> Tensor:
        """Pass hidden states through one segment of a block: attention (0) or feed-forward (1), or a norm (0).

        A layer's two are the forward pass of transformers' layers, cut where hidden states are all that goes on.
        """
        module: Any = self._modules[block]
        if self.blocks[block].layout.kind is BlockKind.NORM:
            return module(hidden_BTD)  # type: ignore[no-any-return]
        if segment == 1:
            return hidden_BTD + module.mlp(module.post_attention_layernorm(hidden_BTD))  # type: ignore[no-any-return]
        positions, rotation = self._rotation(hidden_BTD)
        # no mask: with whole sequences, attention uses its causal path, as in transformers' own forward
        attended, _ = module.self_attn(
            module.input_layernorm(hidden_BTD),
            attention_mask=None,
            position_ids=positions,
            position_embeddings=rotation,
            use_cache=False,
        )
        return hidden_BTD + attended  # type: ignore[no-any-return]

    def saving(self, block: int, hidden_BTD: Tensor, *, may_leave: bool = False) -> AbstractContextManager[Saved]:
        """Build a graph from hidden states that can go backward from another buffer; see `Block.saving`."""
        _, rotation = self._rotation(hidden_BTD)  # all layers and microbatches have it in common
        return self.blocks[block].saving(shared=rotation, may_leave=may_leave)

    # -- head -----------------------------------------------------------------------------------------

    def head_loss_and_gradient(self, block: int, hidden_BTD: Tensor, labels_BT: Tensor) -> tuple[float, Tensor]:
        """Return the summed cross-entropy and its gradient by the hidden states; add that by the head.

        Only where the head is one block.
        """
        head = self.blocks[block].parameters[HEAD]
        loss, gradient_ND = loss_sum_and_gradients(
            hidden_BTD.reshape(-1, self.width), head, labels_BT.reshape(-1), weight_gradient_VD=_gradient_of(head)
        )
        return loss, gradient_ND.view_as(hidden_BTD)

    def add_head_scores(self, block: int, hidden_BTD: Tensor, labels_BT: Tensor, scores: Scores) -> None:
        """Add what one block of the head's rows has to say to each position's normaliser and target."""
        head, first_row = self.blocks[block].parameters[HEAD], self._first_row(block)
        add_scores(hidden_BTD.reshape(-1, self.width), head, labels_BT.reshape(-1), scores, first_row=first_row)

    def add_head_gradients(
        self, block: int, hidden_BTD: Tensor, labels_BT: Tensor, scores: Scores, gradient_BTD: Tensor
    ) -> None:
        """Add one block's part of the gradient by the hidden states to `gradient_BTD`, and that by the head."""
        head = self.blocks[block].parameters[HEAD]
        add_gradients(
            hidden_BTD.reshape(-1, self.width),
            head,
            labels_BT.reshape(-1),
            scores,
            first_row=self._first_row(block),
            gradient_ND=gradient_BTD.view(-1, self.width),
            weight_gradient_RD=_gradient_of(head),
        )

    # -- all ------------------------------------------------------------------------------------------

    def initialise(self, block: int, weights: Tensor, *, seed: int) -> None:
        """Write a block's initial weights, which the seed defines, into its flat buffer (zeros)."""
        for slot in self.blocks[block].layout.slots:
            initialise(
                view_of(slot, weights),
                slot.name,
                seed=seed,
                deviation=self._deviation,
                pad_token=self._padding_token,
                first_row=slot.first_row,
            )

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

    # -- private --------------------------------------------------------------------------------------

    def _range(self, *kinds: BlockKind) -> range:
        indices = [index for index, block in enumerate(self.blocks) if block.layout.kind in kinds]
        return range(indices[0], indices[-1] + 1) if indices else range(0)

    def _adopt(self, model: PreTrainedModel, block: Block) -> nn.Module:
        """Give transformers' module the block's parameters, and return it."""
        _check_shapes(model, block.layout)
        for name, parameter in block.parameters.items():
            module_name, _, leaf = name.rpartition(".")
            model.get_submodule(module_name).register_parameter(leaf, parameter)
        first = block.layout.slots[0].name
        is_norm = block.layout.kind is BlockKind.NORM
        module = model.get_submodule(first.rpartition(".")[0] if is_norm else ".".join(first.split(".")[:3]))
        _check_complete(module)
        if not is_norm and {name for name, _ in module.named_children()} != {*_SEGMENTS[0], *_SEGMENTS[1]}:
            raise ModelError(f"transformers' {type(module).__name__} has other parts than this version knows.")
        return module.eval()

    def _rotation(self, hidden_BTD: Tensor) -> tuple[Tensor, Any]:
        """Return positions and rotary embedding, which depend on the length alone."""
        length = hidden_BTD.shape[1]
        if length not in self._rotations:
            positions = torch.arange(length, device=hidden_BTD.device).unsqueeze(0)
            with torch.no_grad():
                self._rotations = {length: (positions, self._rotary(hidden_BTD, positions))}
        return self._rotations[length]

    def _first_row(self, block: int) -> int:
        return self.blocks[block].layout.slots[0].first_row

    def _rows(self, block: int, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Return tokens as rows of one block of the table, and which of them are there."""
        slot = self.blocks[block].layout.slots[0]
        rows = tokens - slot.first_row
        return rows, (rows >= 0) & (rows < slot.shape[0])


def build_stage(config: ModelConfig, *, num_stages: int, stage: int, device: torch.device | str = "cpu") -> Stage:
    """Build one stage without weights."""
    check_config(config)
    layouts = stage_blocks(config, num_stages, stage)
    model = _meta_model(config)
    # the rotary frequencies are buffers, not weights: computed here, always on the CPU and in fp32
    rotary = type(model.model.rotary_emb)(config=model.config).to(device)
    return Stage(model, layouts, rotary=rotary, device=torch.device(device))


def _meta_model(config: ModelConfig) -> PreTrainedModel:
    fields: dict[str, Any] = {key: value for key, value in config.items() if key not in ("dtype", "torch_dtype")}
    factory: Any = AutoModelForCausalLM  # transformers leaves it untyped
    try:
        parsed = AutoConfig.for_model(**{**fields, "use_cache": False})
        with torch.device("meta"):
            model: PreTrainedModel = factory.from_config(parsed, attn_implementation="sdpa", dtype=torch.float32)
    except (StrictDataclassError, ValueError, TypeError, KeyError, AttributeError) as error:
        # transformers checks a config with whatever exception is at hand; none of it reaches the network
        raise ModelError(f"transformers does not accept the model's config: {error}") from error
    return model


def _gradient_of(parameter: nn.Parameter) -> Tensor:
    assert parameter.grad is not None, "the block was entered without a gradient"
    return parameter.grad


def _check_shapes(model: PreTrainedModel, layout: BlockLayout) -> None:
    for slot in layout.slots:
        expected = tuple(model.get_parameter(slot.name).shape)
        is_whole = layout.kind in (BlockKind.LAYER, BlockKind.NORM)
        if expected != slot.shape if is_whole else expected[1:] != slot.shape[1:]:
            raise ModelError(f"transformers makes {slot.name} {expected}, this run says {slot.shape}.")


def _check_complete(module: nn.Module) -> None:
    """Raise `ModelError` if transformers' layer holds tensors that the layout does not know: they would be lost."""
    for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
        if tensor.is_meta:
            raise ModelError(
                f"transformers' {type(module).__name__} has a tensor {name} that this version does not know."
            )
