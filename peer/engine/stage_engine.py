"""Pass microbatches through one stage: forward, loss, backward, one or a wave of them at a time.

Owns: what is let in, what is kept between a microbatch's forward and backward, and the order of passes. Must not know:
the network, rounds, who asks; what the sums are for (`stage_state.py`), where anything lives (`peer/memory/` does).
Synchronous; every call comes from the one compute thread. `peer/pipeline/` brings microbatches here.

Shapes: B sequences, T positions, D model width.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Self

import torch
from torch import Tensor

from peer.engine.optimizer import OptimizerSpec
from peer.engine.outer import OuterSpec
from peer.engine.passes import Parking, WavePass
from peer.engine.retention import Retention
from peer.engine.stage_state import StageState, Step
from peer.engine.state import check_computed, largest
from peer.engine.tape import Tape
from peer.memory.arena import Arena
from peer.memory.backend import CpuBackend
from peer.memory.executor import Executor, open_memory
from peer.memory.placement import Placement, Tier, all_on_device
from peer.memory.schedule import Kind, Visit, backward_visits, forward_visits
from peer.memory.segments import Segment
from peer.memory.units import OUTER, Inventory, Section
from peer.model.loss import count_targets
from peer.model.stage import Stage, build_stage
from protocol.architecture import ModelConfig
from protocol.errors import PeerFault
from protocol.ids import Version

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


class StageEngine(StageState):
    """One stage in training."""

    def __init__(
        self,
        stage: Stage,
        spec: OptimizerSpec,
        memory: Executor,
        *,
        first_block: int = 0,
        keep_budget_bytes: int = 0,
        kept: Collection[Segment] | None = None,
        parking: Parking | None = None,
        outer: OuterSpec | None = None,
    ) -> None:
        """`memory` holds the stage's blocks from `first_block` on; what is in it counts as the state of version 0.

        Graphs of up to `keep_budget_bytes` stay on the device between forward and backward pass (those of the segments
        in `kept`, or of any); others are recomputed from their inputs, which stay there too. `parking` may send inputs
        and graphs elsewhere. Blocks are counted within the stage.
        """
        super().__init__(stage, spec, memory, first_block=first_block, outer=outer)
        self._retention, self._kept_segments = Retention(keep_budget_bytes), kept
        self._parking = parking
        self._leaving = set() if parking is None else {first_block + block for block in parking.blocks}
        self._pending: dict[int, Tape] = {}
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
        keep_budget_bytes: int = 0,
        placement: Callable[[Inventory], Placement] = all_on_device,
        nvme: Path | None = None,
        kept: Collection[Segment] | None = None,
        inputs: Mapping[int, Tier] = MappingProxyType({}),
        graphs: Mapping[Segment, Tier] = MappingProxyType({}),
        places: Mapping[Tier, Sequence[int]] = MappingProxyType({}),
        outer: OuterSpec | None = None,
        holds: bool = False,
    ) -> Self:
        """Build one stage in memory of its own, on the CPU, with initial weights from `seed` (None: as they are).

        `nvme` is the folder for what `placement` puts there. What of `inputs` and `graphs` waits elsewhere (`Parking`)
        gets `places` of these sizes in bytes. With `holds` gradient sums can be set aside (`hold_gradients`).
        """
        built = build_stage(config, num_stages=num_stages, stage=stage)
        apart = (*(() if outer is None else OUTER), *((Section.HELD,) if holds else ()))
        inventory = Inventory(built.layouts, optimizer.name, optimizer.master, apart=apart)
        memory = open_memory(
            inventory,
            placement(inventory),
            CpuBackend(),
            nvme=nvme,
            activations=places.get(Tier.NVME, ()),
        )
        parking = None
        if places:
            parking = Parking(Arena(memory, places), inputs, graphs)
        engine = cls(
            built, optimizer, memory, keep_budget_bytes=keep_budget_bytes, kept=kept, parking=parking, outer=outer
        )
        if seed is not None:
            engine.initialise(seed)
        return engine

    def close(self) -> None:
        """Give back what the memory holds open."""
        self._memory.close()

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
        return self.forward_wave([inputs])[0]

    def forward_wave(self, wave: Sequence[Tensor]) -> list[tuple[Tensor, Ticket]]:
        """Run the stage on several microbatches, layer by layer: one load of a layer serves them all."""
        tapes = [Tape(self._accept_inputs(inputs)) for inputs in wave]
        with self._forgetting(tapes):
            self._run_up(tapes, self._retention)
        return [self._kept(tape) for tape in tapes]

    def backward(self, ticket: Ticket, grad_outputs: Tensor) -> Tensor | None:
        """Add the microbatch's gradient to the shards; return that of the inputs, or None on the first stage.

        If weights changed since the forward pass, the inside is recomputed at the present ones. After a `LocalFault`
        from here the gradient sums are spoilt: only `zero_gradients` makes them good again.
        """
        return self.backward_wave([(ticket, grad_outputs)])[0]

    def backward_wave(self, wave: Sequence[tuple[Ticket, Tensor]], *, step: Step | None = None) -> list[Tensor | None]:
        """Take several microbatches back, layer by layer; `step`, if given, updates each layer right after it.

        Nothing has changed anywhere if one of the gradients is refused.
        """
        tapes = [self._pending[ticket.number] for ticket, _ in wave]
        for ticket, grad in wave:
            self.check_gradient(ticket, grad)
        for ticket, _ in wave:
            del self._pending[ticket.number]
        with self._forgetting(tapes):
            up = [tape for tape in tapes if tape.is_forgotten]  # because the weights have changed
            if up:
                self._run_up(up, self._retention)
            self._recomputed += sum(bool(tape.entries) or tape in up for tape in tapes)
            for tape, (_, grad) in zip(tapes, wave, strict=True):
                tape.hidden_BTD = grad.to(device=self._stage.device, dtype=torch.float32)
            self._run_down(tapes, self._stage.body, step)
        return [None if self.is_first else tape.hidden_BTD for tape in tapes]

    def loss_and_backward(self, inputs: Tensor, labels: Tensor) -> LossResult:
        """Run the last stage both ways at once. Labels (B, T) stand at their target's position; -100 is no target."""
        return self.loss_wave([(inputs, labels)])[0]

    def loss_wave(self, wave: Sequence[tuple[Tensor, Tensor]], *, step: Step | None = None) -> list[LossResult]:
        """Run the last stage both ways on several microbatches, layer by layer."""
        tapes = [Tape(self._accept_inputs(inputs), self._accept_labels(inputs, labels)) for inputs, labels in wave]
        with self._forgetting(tapes):
            down = range(self._stage.body.start, len(self._stage.blocks))
            self._run_up(tapes, self._retention, score=len(self._stage.head) > 1, then=[*reversed(down)])
            self._run_down(tapes, down, step)
            self._forwards += len(tapes)
            for tape in tapes:
                _check_loss(tape.loss_sum)
        return [
            LossResult(tape.loss_sum, _num_targets(tape), None if self.is_first else tape.hidden_BTD) for tape in tapes
        ]

    def evaluate(self, inputs: Tensor, labels: Tensor) -> LossResult:
        """Return the loss of the last stage; nothing is kept or added up."""
        return self.evaluate_wave([(inputs, labels)])[0]

    def evaluate_wave(self, wave: Sequence[tuple[Tensor, Tensor]]) -> list[LossResult]:
        """Return the losses of several microbatches, which go through the last stage layer by layer."""
        tapes = [Tape(self._accept_inputs(inputs), self._accept_labels(inputs, labels)) for inputs, labels in wave]
        self._run_up(tapes, None, score=True)
        return [LossResult(_scored_loss(tape), _num_targets(tape), None) for tape in tapes]

    def forward_only(self, inputs: Tensor) -> Tensor:
        """Return the stage's hidden states (after the final norm on the last stage); nothing is kept."""
        return self.forward_only_wave([inputs])[0]

    def forward_only_wave(self, wave: Sequence[Tensor]) -> list[Tensor]:
        """Return the hidden states of several microbatches, which go through the stage layer by layer."""
        tapes = [Tape(self._accept_inputs(inputs)) for inputs in wave]
        self._run_up(tapes, None)
        return [tape.present_BTD for tape in tapes]

    def discard(self, ticket: Ticket) -> None:
        """Forget a forward pass whose backward will not come. Does nothing for one that is forgotten already."""
        tape = self._pending.pop(ticket.number, None)
        if tape is not None:
            self._forget(tape)

    def check_inputs(self, inputs: Tensor) -> None:
        """Raise `PeerFault` or `CorpusError` for what no stage before this one makes."""
        if self.is_first:
            if inputs.dtype != torch.int64 or inputs.dim() != 2:
                raise PeerFault(f"the first stage wants int64 tokens (B, T), not {inputs.dtype} {tuple(inputs.shape)}.")
            self._stage.check_tokens(inputs)
            return
        if not inputs.is_floating_point() or inputs.dim() != 3 or inputs.shape[2] != self._stage.width:
            raise PeerFault(f"this stage wants hidden states (B, T, {self._stage.width}), not {tuple(inputs.shape)}.")
        if not largest(inputs) <= MAX_MAGNITUDE:
            raise PeerFault("the hidden states from the stage before have numbers that no model makes.")

    def check_labels(self, shape: tuple[int, ...], labels: Tensor) -> None:
        """Raise `PeerFault` or `CorpusError` unless these can be the labels of a microbatch of `shape` (B, T)."""
        if labels.dtype != torch.int64 or labels.shape != shape:
            raise PeerFault(f"labels must be int64 {tuple(shape)}, not {labels.dtype} {tuple(labels.shape)}.")
        self._stage.check_tokens(labels, allow_ignored=True)

    def check_gradient(self, ticket: Ticket, grad_outputs: Tensor) -> None:
        """Raise `PeerFault` for what cannot be the gradient of a forward pass that is waiting for it."""
        expected = (*self._pending[ticket.number].inputs.shape[:2], self._stage.width)
        if grad_outputs.shape != expected or not largest(grad_outputs) <= MAX_MAGNITUDE:
            raise PeerFault("the gradient from the next stage has the wrong shape, or numbers that no model makes.")

    # --- inside: passes ------------------------------------------------------------------------------

    def _run_up(
        self, tapes: Sequence[Tape], retention: Retention | None, *, score: bool = False, then: Sequence[int] = ()
    ) -> None:
        """Take tapes from their inputs to the end of the body, and through the head's scores if asked to.

        `then` names the blocks of the stage that will come next.
        """
        for tape in tapes:
            tape.hidden_BTD = None if self.is_first else tape.inputs
        blocks = [self._first + block for block in (*self._stage.embedding, *self._stage.body)]
        visits = forward_visits(blocks, len(tapes), leaving=self._leaving if retention is not None else ())
        if score:
            head = [self._first + block for block in self._stage.head]
            visits += forward_visits(head, len(tapes), kind=Kind.SCORE)
        # what is measured is what replicas agree on
        weights_of = None if retention is not None or self.anchored is None else self.anchored.block_weights
        worker = WavePass(
            self._stage,
            self._first,
            tapes,
            retention=retention,
            kept=self._kept_segments,
            parking=self._parking,
            weights_of=weights_of,
        )
        self._memory.run(visits, worker, then=[self._first + block for block in then])
        for tape in tapes:
            check_computed(tape.present_BTD, "hidden states")

    def _run_down(self, tapes: Sequence[Tape], blocks: range, step: Step | None) -> None:
        """Take tapes back through `blocks` (the body, or the body and the head) and the embedding."""
        if step is not None:
            self._before_change()
        visits: list[Visit] = []
        for block in (*reversed(blocks), *reversed(self._stage.embedding)):
            kind = Kind.LOSS if block in self._stage.head else Kind.BACKWARD
            visits += backward_visits(
                [self._first + block],
                len(tapes),
                kind=kind,
                is_fresh=lambda block: block in self._fresh,
                step=step is not None,
                leaving=self._leaving,
            )
        worker = WavePass(
            self._stage,
            self._first,
            tapes,
            retention=self._retention,
            step=None if step is None else self._step_pass(step),
            parking=self._parking,
            before_adding=self._note_addition,
        )
        self._memory.run(visits, worker, then=self._blocks)
        self._backwards += len(tapes)
        if not self.is_first:
            for tape in tapes:
                check_computed(tape.present_BTD, "gradient")
        self._fresh.clear()
        if step is not None:
            self._finish_step()

    def _note_addition(self) -> None:
        self.additions += 1

    # --- inside: the rest ----------------------------------------------------------------------------

    def _kept(self, tape: Tape) -> tuple[Tensor, Ticket]:
        ticket = Ticket(self._next_ticket, self.version)
        self._next_ticket += 1
        self._forwards += 1
        self._pending[ticket.number] = tape
        outputs, tape.hidden_BTD = tape.present_BTD, None
        return outputs, ticket

    def _accept_inputs(self, inputs: Tensor) -> Tensor:
        self.check_inputs(inputs)
        dtype = torch.int64 if self.is_first else torch.float32
        return inputs.detach().to(device=self._stage.device, dtype=dtype)

    def _accept_labels(self, inputs: Tensor, labels: Tensor) -> Tensor:
        self.check_labels(inputs.shape[:2], labels)
        return labels.to(self._stage.device)

    @contextmanager
    def _forgetting(self, tapes: Sequence[Tape]) -> Iterator[None]:
        """If the block fails, free what the tapes hold."""
        try:
            yield
        except BaseException:
            for tape in tapes:
                self._forget(tape)
            raise

    def _forget(self, tape: Tape) -> None:
        self._retention.release(tape.booked_bytes)
        for parked in tape.parked():
            assert self._parking is not None
            self._parking.arena.drop(parked)
        tape.forget()

    def _before_change(self) -> None:
        """Make every open microbatch recompute."""
        super()._before_change()
        for tape in self._pending.values():
            self._forget(tape)


def _num_targets(tape: Tape) -> int:
    assert tape.labels_BT is not None
    return count_targets(tape.labels_BT)


def _scored_loss(tape: Tape) -> float:
    assert tape.scores is not None
    assert tape.labels_BT is not None
    loss = tape.scores.loss_sum(tape.labels_BT.reshape(-1))
    _check_loss(loss)
    return loss


def _check_loss(loss_sum: float) -> None:
    check_computed(torch.tensor(loss_sum), "loss")
