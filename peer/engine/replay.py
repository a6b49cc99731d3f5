"""Recompute microbatches of a stage with weights that are given, and keep nothing.

Owns: the passes of one stage, block by block, in the same pieces of arithmetic as in training. Must not know: where
weights come from, what the results are for. Runs in the compute thread.

One block's weights and gradient are in use at a time; what each block was entered with is kept for the way down.

Shapes: B sequences, T positions, D model width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from peer.engine.graph import Graph
from peer.engine.state import check_computed
from peer.memory.segments import segments_of
from peer.model.loss import Scores
from peer.model.stage import Stage, build_stage
from protocol.architecture import ModelConfig

OnGradient = Callable[[int, Tensor], None]
"""Takes a block of the stage and its gradient sum, flat fp32, which is gone afterwards."""


@dataclass(slots=True)
class Climb:
    """A wave on its way through a stage."""

    weights: Sequence[Tensor]
    inputs: Sequence[Tensor]
    """Tokens (B, T) on the first stage, hidden states (B, T, D) on the others."""
    entered: list[list[Tensor]] = field(default_factory=list)
    """For each block of the body, what every microbatch entered it with."""
    outputs: list[Tensor] = field(default_factory=list)


class Replay:
    """One stage without a state."""

    def __init__(self, config: ModelConfig, *, num_stages: int, stage: int, device: torch.device | str = "cpu") -> None:
        self._stage: Stage = build_stage(config, num_stages=num_stages, stage=stage, device=device)

    @torch.no_grad()
    def up(self, weights: Sequence[Tensor], inputs: Sequence[Tensor]) -> Climb:
        """Take microbatches from their inputs to the end of the body. `weights` are flat fp32, block after block."""
        stage = self._stage
        climb = Climb(weights, [each.to(stage.device) for each in inputs])
        hidden: list[Tensor | None] = [None if stage.is_first else each for each in climb.inputs]
        for block in stage.embedding:
            self._bind(block, climb)
            hidden = [stage.embed(block, each, before) for each, before in zip(climb.inputs, hidden, strict=True)]
        present = [each for each in hidden if each is not None]
        for block in stage.body:
            self._bind(block, climb)
            climb.entered.append(present)
            present = [stage.pass_through(block, each) for each in present]
        for each in present:
            check_computed(each, "hidden states")
        climb.outputs = present
        return climb

    def down(
        self, climb: Climb, gradients: Sequence[Tensor], on_gradient: OnGradient = lambda block, gradient: None
    ) -> list[Tensor]:
        """Take gradients by the outputs back; return those by the inputs (on the first stage: by the embedding)."""
        stage = self._stage
        present = [each.to(device=stage.device, dtype=torch.float32) for each in gradients]
        for position in reversed(range(len(stage.body))):
            block = stage.body[position]
            gradient = self._bind(block, climb, with_gradient=True)
            present = [
                self._pass_down(block, entered, each)
                for entered, each in zip(climb.entered[position], present, strict=True)
            ]
            on_gradient(block, gradient)
        for block in reversed(stage.embedding):
            gradient = self._bind(block, climb, with_gradient=True)
            for tokens, each in zip(climb.inputs, present, strict=True):
                stage.add_embedding_gradient(block, tokens, each)
            on_gradient(block, gradient)
        return present

    def losses(
        self, climb: Climb, labels: Sequence[Tensor], on_gradient: OnGradient = lambda block, gradient: None
    ) -> list[tuple[float, Tensor]]:
        """Return every microbatch's summed loss in nats, and its gradient by the outputs of the last stage's body."""
        stage = self._stage
        on_device = [each.to(stage.device) for each in labels]
        if len(stage.head) == 1:
            (block,) = stage.head
            gradient = self._bind(block, climb, with_gradient=True)
            found = [
                stage.head_loss_and_gradient(block, hidden, each)
                for hidden, each in zip(climb.outputs, on_device, strict=True)
            ]
            on_gradient(block, gradient)
            return found
        scores = [Scores.before(hidden.view(-1, stage.width)) for hidden in climb.outputs]
        for block in stage.head:
            self._bind(block, climb)
            for hidden, each, score in zip(climb.outputs, on_device, scores, strict=True):
                stage.add_head_scores(block, hidden, each, score)
        gradients = [torch.zeros_like(hidden) for hidden in climb.outputs]
        for block in reversed(stage.head):
            total = self._bind(block, climb, with_gradient=True)
            for hidden, each, score, gradient in zip(climb.outputs, on_device, scores, gradients, strict=True):
                stage.add_head_gradients(block, hidden, each, score, gradient)
            on_gradient(block, total)
        return [
            (score.loss_sum(each.reshape(-1)), gradient)
            for score, each, gradient in zip(scores, on_device, gradients, strict=True)
        ]

    def _pass_down(self, block: int, entered: Tensor, gradient: Tensor) -> Tensor:
        graphs = []
        hidden = entered
        for segment in segments_of(block, self._stage.layouts[block].kind):
            graphs.append(Graph(self._stage, *segment, hidden, waits=False))
            hidden = graphs[-1].take_outputs()
        for graph in reversed(graphs):
            gradient = graph.backward(gradient)
        return gradient

    def _bind(self, block: int, climb: Climb, *, with_gradient: bool = False) -> Tensor:
        """Compute with a block's weights from now on; return the gradient to which passes add."""
        weights = climb.weights[block].to(self._stage.device)
        gradient = torch.zeros_like(weights) if with_gradient else weights.new_empty(0)
        self._stage.blocks[block].bind(weights, gradient if with_gradient else None)
        return gradient
