"""Train one stage: forward, backward, loss, optimizer step, and the state to save or hash.

Owns: a `Stage`, its optimizer, the version, and what is kept between a microbatch's forward and backward.
Must not know: the network, rounds, who asks. Synchronous; every call comes from the one compute thread.
`peer/pipeline/` brings microbatches here, `peer/averaging/` reads and replaces the shards' gradients.

Losses and gradients are sums over target tokens. They add up in the shards until `step` multiplies them by
the scale it is given (one over the round's target tokens, times the clip factor) and updates the weights.

Shapes: B sequences, T positions, D model width.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from peer.engine.optimizer import Optimizer, OptimizerSpec
from peer.engine.retention import Retention, measure_saved
from peer.engine.state import check_same_tensors, is_finite, largest, tensors_digest
from peer.model.loss import count_targets
from peer.model.shards import Shard
from peer.model.stage import Stage, build_stage
from protocol.architecture import ModelConfig
from protocol.errors import LocalFault, PeerFault
from protocol.ids import Digest, Version

NORM_ELEMENTS = 1 << 20  # piece of a gradient that is widened to fp64 at a time
MAX_MAGNITUDE = 1e8  # of what others send: 1e4 is a lot in a trained model, and from here nothing overflows in fp32


@dataclass(frozen=True, slots=True)
class Ticket:
    """Claim on the backward pass of one forward pass."""

    number: int
    version: Version
    """The version at which the forward pass ran."""


@dataclass(frozen=True, slots=True)
class LossResult:
    """What the last stage knows about a microbatch."""

    loss_sum: float  # nats
    target_tokens: int
    grad_inputs: Tensor | None  # (B, T, D); None in evaluation and when the stage is also the first


@dataclass(frozen=True, slots=True)
class EngineStatistics:
    """Counts since the start, and what is held now."""

    pending: int
    kept_bytes: int
    forwards: int
    backwards: int
    recomputed: int


@dataclass(slots=True)
class _Pending:
    inputs: Tensor
    entered: Tensor | None = None  # set together with `outputs`: both ends of a kept graph
    outputs: Tensor | None = None
    kept_bytes: int = 0


class StageEngine:
    """One stage in training."""

    def __init__(self, stage: Stage, spec: OptimizerSpec, *, keep_budget_bytes: int = 0) -> None:
        self.version = Version(0)
        self._stage = stage
        self._optimizer = Optimizer(spec, stage.shards)
        self._retention = Retention(keep_budget_bytes)
        self._pending: dict[int, _Pending] = {}
        self._next_ticket = 0
        self._forwards = self._backwards = self._recomputed = 0
        self.additions = 0
        """How often something has begun to be added to the gradient sums."""

    @classmethod
    def build(
        cls,
        config: ModelConfig,
        *,
        num_stages: int,
        stage: int,
        optimizer: OptimizerSpec,
        seed: int | None = None,
        device: torch.device | str = "cpu",
        keep_budget_bytes: int = 0,
    ) -> Self:
        """Build stage `stage` of `num_stages` with initial weights from `seed` (None: zeros, to be loaded over)."""
        built = build_stage(config, num_stages=num_stages, stage=stage, seed=seed, device=device)
        return cls(built, optimizer, keep_budget_bytes=keep_budget_bytes)

    @property
    def shards(self) -> tuple[Shard, ...]:
        return self._stage.shards

    @property
    def is_first(self) -> bool:
        return self._stage.is_first

    @property
    def is_last(self) -> bool:
        return self._stage.is_last

    @property
    def num_parameters(self) -> int:
        return sum(shard.layout.num_parameters for shard in self.shards)

    def statistics(self) -> EngineStatistics:
        return EngineStatistics(
            pending=len(self._pending),
            kept_bytes=self._retention.kept_bytes,
            forwards=self._forwards,
            backwards=self._backwards,
            recomputed=self._recomputed,
        )

    # --- microbatches ------------------------------------------------------------------------------

    def forward(self, inputs: Tensor) -> tuple[Tensor, Ticket]:
        """Run the stage on token ids (B, T) or hidden states (B, T, D); return hidden states and the claim on backward.

        `inputs` is kept by reference until `backward` or `discard`: the caller must not write to it.
        """
        pending = _Pending(inputs)
        if self._retention.may_keep(tuple(inputs.shape)):
            outputs = self._forward_keeping(pending)
        else:
            outputs = self.forward_only(inputs)
        ticket = Ticket(self._next_ticket, self.version)
        self._next_ticket += 1
        self._forwards += 1
        self._pending[ticket.number] = pending
        return outputs, ticket

    def backward(self, ticket: Ticket, grad_outputs: Tensor) -> Tensor | None:
        """Add the microbatch's gradient to the shards; return that of the inputs, or None on the first stage.

        If weights changed since the forward pass, the inside is recomputed at the present ones. After a `LocalFault`
        from here the gradient sums are spoilt: only `zero_gradients` makes them good again.
        """
        pending = self._pending[ticket.number]
        inputs = pending.inputs
        if grad_outputs.shape != (*inputs.shape[:2], self._stage.width) or not largest(grad_outputs) <= MAX_MAGNITUDE:
            raise PeerFault("the gradient from the next stage has the wrong shape, or numbers that no model makes.")
        self.discard(ticket)
        entered, outputs = pending.entered, pending.outputs
        if entered is None or outputs is None:
            self._recomputed += 1
            entered = self._enter(inputs)
            with torch.enable_grad():
                outputs = self._stage.body(entered)
        return self._backward(inputs, entered, outputs, grad_outputs.to(outputs))

    def loss_and_backward(self, inputs: Tensor, labels: Tensor) -> LossResult:
        """Run the last stage both ways at once. Labels (B, T) stand at their target's position; -100 is no target."""
        labels = self._accept_labels(inputs, labels)
        entered = self._enter(inputs)
        with torch.enable_grad():
            outputs = self._stage.body(entered)
        _check_computed(outputs, "hidden states")  # before anything is added to the head's gradient
        self.additions += 1
        loss, grad_outputs = self._stage.head_loss_and_gradient(outputs.detach(), labels)
        self._forwards += 1
        _check_loss(loss)
        return LossResult(loss, count_targets(labels), self._backward(inputs, entered, outputs, grad_outputs))

    def evaluate(self, inputs: Tensor, labels: Tensor) -> LossResult:
        """Return the loss of the last stage; nothing is kept or added up."""
        labels = self._accept_labels(inputs, labels)
        loss = self._stage.head_loss(self.forward_only(inputs), labels)
        _check_loss(loss)
        return LossResult(loss, count_targets(labels), None)

    def forward_only(self, inputs: Tensor) -> Tensor:
        """Return the stage's hidden states (after the final norm on the last stage); nothing is kept."""
        with torch.no_grad():
            outputs = self._stage.body(self._enter(inputs))
        _check_computed(outputs, "hidden states")
        return outputs

    def discard(self, ticket: Ticket) -> None:
        """Forget a forward pass whose backward will not come. Does nothing for one that is forgotten already."""
        pending = self._pending.pop(ticket.number, None)
        if pending is not None:
            self._retention.release(pending.kept_bytes)

    # --- gradients and weights -----------------------------------------------------------------------

    def zero_gradients(self) -> None:
        for shard in self.shards:
            shard.gradient.zero_()

    def has_finite_gradients(self) -> bool:
        """Tell whether the gradient sums can be averaged: one overflow anywhere, and they cannot."""
        return all(is_finite(shard.gradient) for shard in self.shards)

    def load_gradient(self, shard_index: int, gradient: Tensor) -> None:
        """Replace one shard's summed gradient, flat and with padding as in `shards[shard_index].gradient`."""
        self.shards[shard_index].set_gradient(gradient)

    def gradient_norm(self) -> float:
        """Return the Euclidean norm of the summed gradient of the stage, added up in fp64."""
        pieces = (piece for shard in self.shards for piece in torch.split(shard.gradient, NORM_ELEMENTS))
        return math.sqrt(sum(float(torch.linalg.vector_norm(piece.double())) ** 2 for piece in pieces))

    def step(self, learning_rate: float, *, scale: float) -> None:
        """Update the weights from `gradient * scale`, clear the gradients, and go to the next version.

        Raises `LocalFault`, with no weight changed, if a gradient is not finite.
        """
        for shard in self.shards:
            _check_computed(shard.gradient, f"gradient of shard {shard.name}")
        self._drop_graphs()
        for shard in self.shards:
            shard.gradient.mul_(scale)  # in place: the sums are not needed afterwards
        self._optimizer.step(learning_rate)
        self.zero_gradients()
        self.version = Version(self.version + 1)

    # --- state ---------------------------------------------------------------------------------------

    def weight_tensors(self) -> dict[str, Tensor]:
        """Return the weights by Hugging Face name, sharing memory: consume them before the next step."""
        return dict(self._stage.named_tensors())

    @property
    def state_bytes(self) -> int:
        """Return how many bytes weights and optimizer state take."""
        return sum(tensor.nbytes for tensor in self.state_tensors().values())

    def state_tensors(self) -> dict[str, Tensor]:
        """Return weights and optimizer state (names with the prefix "optimizer."), sharing memory."""
        return self.weight_tensors() | self._optimizer.state_tensors()

    def load_state_tensors(self, tensors: dict[str, Tensor], *, version: Version) -> None:
        """Become the saved state of `version`; raises `StorageError`, with nothing changed, if it does not fit."""
        check_same_tensors(self.state_tensors(), tensors)
        self._drop_graphs()
        for name, tensor in self._stage.named_tensors():
            tensor.copy_(tensors[name])
        self._optimizer.load_state_tensors({name: tensors[name] for name in self._optimizer.state_tensors()})
        self.zero_gradients()
        self.version = version

    def weights_digest(self) -> Digest:
        """Hash the weights, without padding, in layout order."""
        return tensors_digest(self.weight_tensors().values())

    def state_digest(self) -> Digest:
        """Hash weights and optimizer state."""
        return tensors_digest(self.state_tensors().values())

    # --- inside --------------------------------------------------------------------------------------

    def _forward_keeping(self, pending: _Pending) -> Tensor:
        entered = self._enter(pending.inputs)
        shape = tuple(pending.inputs.shape)
        with torch.enable_grad(), measure_saved(besides=(shard.weights for shard in self.shards)) as saved:
            outputs = self._stage.body(entered)
        _check_computed(outputs, "hidden states")
        kept_bytes = self._retention.keep(shape, saved.total)
        if kept_bytes is not None:
            pending.entered, pending.outputs, pending.kept_bytes = entered, outputs, kept_bytes
        return outputs.detach()

    def _backward(self, inputs: Tensor, entered: Tensor, outputs: Tensor, grad_outputs: Tensor) -> Tensor | None:
        self.additions += 1
        torch.autograd.backward([outputs], [grad_outputs])
        grad_inputs = entered.grad
        assert grad_inputs is not None
        _check_computed(grad_inputs, "gradient")
        self._backwards += 1
        if not self.is_first:
            return grad_inputs
        self._stage.add_embedding_gradient(inputs.to(entered.device), grad_inputs)
        return None

    def _enter(self, inputs: Tensor) -> Tensor:
        """Return the hidden states at which the stage's graph starts, as a leaf that collects their gradient."""
        if self.is_first:
            if inputs.dtype != torch.int64 or inputs.dim() != 2:
                raise PeerFault(f"the first stage wants int64 tokens (B, T), not {inputs.dtype} {tuple(inputs.shape)}.")
            return self._stage.embed(inputs.to(self._stage.device)).requires_grad_()
        if not inputs.is_floating_point() or inputs.dim() != 3 or inputs.shape[2] != self._stage.width:
            raise PeerFault(f"this stage wants hidden states (B, T, {self._stage.width}), not {tuple(inputs.shape)}.")
        if not largest(inputs) <= MAX_MAGNITUDE:
            raise PeerFault("the hidden states from the stage before have numbers that no model makes.")
        return inputs.detach().to(device=self._stage.device, dtype=self._stage.dtype).requires_grad_()

    def _accept_labels(self, inputs: Tensor, labels: Tensor) -> Tensor:
        if labels.dtype != torch.int64 or labels.shape != inputs.shape[:2]:
            raise PeerFault(
                f"labels must be int64 {tuple(inputs.shape[:2])}, not {labels.dtype} {tuple(labels.shape)}."
            )
        return labels.to(self._stage.device)

    def _drop_graphs(self) -> None:
        """Make every open microbatch recompute: its graph refers to weights that are about to change in place."""
        for pending in self._pending.values():
            self._retention.release(pending.kept_bytes)
            pending.entered, pending.outputs, pending.kept_bytes = None, None, 0


def _check_computed(tensor: Tensor, what: str) -> None:
    if not is_finite(tensor):
        raise LocalFault(f"the {what} that this machine computed is not finite.")


def _check_loss(loss_sum: float) -> None:
    if not math.isfinite(loss_sum):
        raise LocalFault("the loss that this machine computed is not finite.")
