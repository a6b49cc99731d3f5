"""A span's compute: decode, run the hosted stages one after the other, encode.

Owns: the conversion between bodies (bytes on the wire) and tensors, and the last word on whether a
gradient still counts: `open` and `freeze` run in the same thread as `backward`, so nothing can be added
to a stage's sum after it was frozen. A task may enter at any hosted stage (spans of two peers may overlap) and
runs from there to the span's end. Must not know: asyncio, streams, who asks. Every method is called
from the compute thread only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import structlog
import torch
from torch import Tensor

from peer.codecs import Codec
from peer.engine.headroom import Headroom
from peer.engine.local_checkpoint import LocalCheckpoint, Standing
from peer.engine.local_steps import LocalRules, LocalSteps
from peer.engine.pace import Pace
from peer.engine.stage_engine import StageEngine, Ticket
from peer.engine.statefiles import Sink
from peer.engine.wave import run_wave, settled
from peer.memory.disk.wear import WriteBudgetSpent
from peer.memory.executor import Executor, Pause
from peer.tasks import RoundOver
from protocol.errors import LocalFault, SwarmError, WireError
from protocol.ids import RoundId, StageId, Version

if TYPE_CHECKING:
    import numpy

    TokenArray = numpy.ndarray[tuple[int, int], numpy.dtype[numpy.int64]]
    Source = bytes | bytearray | TokenArray

log = structlog.get_logger()

# B: sequences of a microbatch, T: tokens of a sequence, D: hidden size


@dataclass(slots=True)
class SpanTicket:
    """What a forward pass left behind for its backward pass."""

    round: RoundId
    entry: StageId
    """The stage at which the task came in."""
    tickets: list[Ticket]
    shape: tuple[int, ...]
    standing: tuple[Version, ...] | None = None
    """The versions of the stages whose weights it went forward with; None if one had steps of its own on top."""
    is_steady: bool = False
    """Whether it went back with the same weights, too."""


@dataclass(frozen=True, slots=True)
class SpanLoss:
    """The last span's result. `gradient` is None for evaluation, and when the span is also the first."""

    loss_sum: float
    target_tokens: int
    gradient: bytes | None
    standing: tuple[Version, ...] | None = None
    """The versions of the stages whose weights it was worked on with; None if one had steps of its own on top."""


class SpanEngine:
    """The stages that this peer hosts, as one function with memory."""

    def __init__(
        self,
        engines: Mapping[StageId, StageEngine],
        *,
        codec: Codec,
        gradient_codec: Codec | None = None,
        hidden_size: int,
        num_stages: int,
        microbatch: tuple[int, int],
        wave: int = 1,
        wave_patience_s: float = 0.0,
        in_flight: int | None = None,
        memory: Executor | None = None,
        local: LocalRules | None = None,
        overlap: bool = False,
    ) -> None:
        """Bodies of hidden states are in `codec`, those of gradients in `gradient_codec` (None: the same).

        `microbatch` is the run's (B, T), which no body may exceed; `wave` how many should pass the span together,
        and `wave_patience_s` how long the first of them should wait for the others. `in_flight` is how many
        may be between their forward and backward pass (None: as many as like). `memory` is what the engines share;
        without it, nothing of theirs is kept on NVMe. With `local`, stages take optimizer steps of their own within a
        round, and contribute how far they have come by them. With `overlap`, a round may be open while what the one
        before has contributed is averaged.
        """
        self.engines = dict(sorted(engines.items()))
        self._local = None if local is None else LocalSteps(local)
        self._overlap = overlap
        self.first = StageId(min(self.engines))
        self.last = StageId(max(self.engines))
        self.is_first = self.first == 0
        self.is_last = self.last == num_stages - 1
        self.wave_patience_s, self.in_flight = wave_patience_s, in_flight
        self.headroom = Headroom(wave=wave, memory=memory)
        self._codec, self._gradient_codec = codec, gradient_codec or codec
        self._hidden_size = hidden_size
        self._microbatch = microbatch
        self._memory = memory
        for warning in () if memory is None or memory.pool.store is None else memory.pool.store.warnings:
            log.warning("nvme.slow", warning=warning)
        self._checkpoint = None if memory is None else LocalCheckpoint(memory, self.engines)
        self.resumed = {} if self._checkpoint is None else self._checkpoint.recover()
        """Stages whose state was on this peer's own NVMe, and where they stand. The others have no state yet."""
        self._open: dict[StageId, RoundId] = {}
        self._waiting: dict[int, SpanTicket] = {}
        self.accumulated_tokens: dict[StageId, int] = dict.fromkeys(self.engines, 0)
        """The target tokens of what was added up since the last freeze."""
        self._contributed_tokens: dict[StageId, int] = dict.fromkeys(self.engines, 0)
        """Those of what was frozen, and is in no average yet as far as we know."""
        self._paces = {stage: Pace() for stage in self.engines}

    # -- rounds ---------------------------------------------------------------------------------------

    def open(self, stage: StageId, round_id: RoundId, *, fresh: bool = True) -> None:
        """Begin a round at one stage: gradients of `round_id` count.

        With `fresh` all that was added up before does not, and neither do local steps that nothing has merged since.
        Otherwise what was frozen stays: its average is under way, or the round was void and the sum goes on.
        """
        engine = self.engines[stage]
        if fresh:
            engine.zero_gradients()
            if self._local is not None:
                self._local.drop(stage)
                engine.forget_drift()
            self.accumulated_tokens[stage] = self._contributed_tokens[stage] = 0
        elif not self._overlap:
            self.accumulated_tokens[stage] += self._contributed_tokens[stage]
            self._contributed_tokens[stage] = 0
        self._open[stage] = round_id
        self._paces[stage].begin()

    def tokens_per_s(self, stage: StageId) -> float | None:
        """Tell how fast target tokens came in the last round in which any did. May be called from any thread."""
        return self._paces[stage].tokens_per_s

    def is_open(self, stage: StageId) -> bool:
        """Tell whether a round is under way at a stage."""
        return stage in self._open

    def freeze(self, stage: StageId, *, contributes: bool = True, replaces: bool = False) -> int:
        """End a stage's work on its round; return the target tokens of its contribution: none if the sum overflowed.

        With local steps, what was added up since the last one becomes one more; unless the stage does not contribute,
        because its state is about to be replaced. `replaces` says that the mean of what was contributed before is
        absorbed next: this is a new contribution. Else it is added. A stage that is frozen already stays as it is.
        """
        frozen = self._open.pop(stage, None)
        for ticket in [t for t in self._waiting.values() if t.round == frozen and t.entry <= stage]:
            self.discard(ticket)  # their backward would be refused; who asked for it may be gone already
        if not self.engines[stage].has_finite_gradients():  # one overflow, and nobody could average the sum
            self._drop_sum(stage)
        if self._local is not None and frozen is not None and contributes:
            self._step_locally(stage, self._local)
            if self._local.has_rest(stage):
                self._drop_sum(stage)
            if not replaces:  # or else the turn with the mean takes the contribution
                engine = self.engines[stage]
                engine.turn(None, sync=engine.due(Version(engine.version + 1), frozen))
        if self.engines[stage].holds:
            self.engines[stage].hold_gradients(on_top=not replaces and self._contributed_tokens[stage] > 0)
        before = 0 if replaces else self._contributed_tokens[stage]
        self._contributed_tokens[stage] = before + self.accumulated_tokens[stage]
        self.accumulated_tokens[stage] = 0
        return self._contributed_tokens[stage]

    # -- tasks ----------------------------------------------------------------------------------------

    @property
    def wave(self) -> int:
        """How many microbatches should pass the span together at the moment. May be called from any thread."""
        return self.headroom.wave

    def stages_from(self, entry: StageId) -> tuple[StageId, ...]:
        """Return the stages that a task passes which enters at `entry`."""
        return tuple(stage for stage in self.engines if stage >= entry)

    def standing(self, entry: StageId) -> tuple[Version, ...] | None:
        """Return the versions of the stages from `entry` on; None if one has weights that are not its version's."""
        engines = self._engines_from(entry)
        return tuple(engine.version for engine in engines) if all(engine.is_shared for engine in engines) else None

    def body_bytes(self, shape: tuple[int, ...]) -> int:
        """Return the exact size of an encoded (B, T, D) body, or raise `WireError` if it cannot be one."""
        most = (*self._microbatch, self._hidden_size)
        if len(shape) != 3 or shape[0] > most[0] or shape[1:] != most[1:]:
            raise WireError(f"a body of shape {shape} cannot enter this stage; {most} can")
        return self._codec.encoded_bytes(shape[0] * shape[1] * shape[2])

    def forward(
        self, source: Source, shape: tuple[int, ...], *, entry: StageId, round_id: RoundId
    ) -> tuple[bytes, tuple[int, ...], SpanTicket]:
        """Run a training task from stage `entry` on; return the encoded output, its shape and what backward needs."""
        return settled(self.forward_wave([(source, shape)], entry=entry, round_id=round_id))

    def forward_wave(
        self, wave: Sequence[tuple[Source, tuple[int, ...]]], *, entry: StageId, round_id: RoundId
    ) -> list[tuple[bytes, tuple[int, ...], SpanTicket] | SwarmError]:
        """Run several training tasks layer by layer. What is wrong with one of them is its own result."""
        self._check_open(entry, round_id)
        tasks = [SpanTicket(round_id, entry, [], shape) for _, shape in wave]

        def start(number: int) -> Tensor:
            hidden_BTD = self._entering(*wave[number], entry=entry)
            tasks[number].shape = tuple(hidden_BTD.shape)
            return hidden_BTD

        def run(numbers: list[int], inputs: list[Tensor]) -> list[tuple[bytes, tuple[int, ...], SpanTicket]]:
            tickets = [tasks[number].tickets for number in numbers]
            standing = self.standing(entry)
            for number in numbers:
                tasks[number].standing = standing
            with self.headroom.guarding(len(numbers)), self._discarding(entry, tickets):
                for engine in self._engines_from(entry):
                    passed = engine.forward_wave(inputs)
                    inputs = [hidden_BTD for hidden_BTD, _ in passed]
                    for kept, (_, ticket) in zip(tickets, passed, strict=True):
                        kept.append(ticket)
                encoded = [self._encode(hidden_BTD, using=self._codec) for hidden_BTD in inputs]
            self._waiting |= {id(tasks[number]): tasks[number] for number in numbers}
            return [
                (body, tuple(hidden_BTD.shape), tasks[number])
                for number, body, hidden_BTD in zip(numbers, encoded, inputs, strict=True)
            ]

        return run_wave(len(wave), start, run, one_by_one=True)

    def forward_only(self, source: Source, shape: tuple[int, ...], *, entry: StageId) -> tuple[bytes, tuple[int, ...]]:
        """Run an evaluation task from stage `entry` on; nothing is kept."""
        return settled(self.forward_only_wave([(source, shape)], entry=entry))

    def forward_only_wave(
        self, wave: Sequence[tuple[Source, tuple[int, ...]]], *, entry: StageId
    ) -> list[tuple[bytes, tuple[int, ...]] | SwarmError]:
        """Run several evaluation tasks layer by layer."""

        def run(numbers: list[int], inputs: list[Tensor]) -> list[tuple[bytes, tuple[int, ...]]]:
            with self.headroom.guarding(len(numbers)):
                for engine in self._engines_from(entry):
                    inputs = engine.forward_only_wave(inputs)
                return [(self._encode(hidden_BTD, using=self._codec), tuple(hidden_BTD.shape)) for hidden_BTD in inputs]

        return run_wave(len(wave), lambda number: self._entering(*wave[number], entry=entry), run, one_by_one=True)

    def backward(
        self, ticket: SpanTicket, gradient: bytes | bytearray, shape: tuple[int, ...], *, target_tokens: int
    ) -> bytes | None:
        """Add a task's gradients to the open sums and return the encoded gradient w.r.t. its input.

        Raises `RoundOver` or `PeerFault`, with nothing added anywhere, if a stage of the span has been frozen
        meanwhile or the gradient is none. A `LocalFault` (overflow, no memory) costs the sums that it spoilt.
        """
        return settled(self.backward_wave([(ticket, gradient, shape, target_tokens)]))

    def backward_wave(
        self, wave: Sequence[tuple[SpanTicket, bytes | bytearray, tuple[int, ...], int]]
    ) -> list[bytes | SwarmError | None]:
        """Take several tasks back, layer by layer; all of them have entered at the same stage, in the same round."""
        first = wave[0][0]
        self._check_open(first.entry, first.round)
        engines = self._engines_from(first.entry)

        def start(number: int) -> Tensor:
            ticket, gradient, shape, _ = wave[number]
            grad_BTD = self._decode(gradient, shape, using=self._gradient_codec)
            engines[-1].check_gradient(ticket.tickets[-1], grad_BTD)
            return grad_BTD

        def run(numbers: list[int], gradients: list[Tensor]) -> list[bytes | None]:
            tickets = [wave[number][0] for number in numbers]
            standing = self.standing(first.entry)
            for ticket in tickets:
                self._waiting.pop(id(ticket))
                ticket.is_steady = standing is not None and ticket.standing == standing
            kept = [ticket.tickets for ticket in tickets]
            with self._discarding(first.entry, kept), self._adding(first.entry), self.headroom.guarding(len(numbers)):
                results = self._run_down(engines, kept, gradients)
            self._count(first.entry, [wave[number][3] for number in numbers])
            return [self._encode_gradient(each) for each in results]

        return run_wave(len(wave), start, run)

    def loss_and_backward(
        self, source: Source, shape: tuple[int, ...], labels: TokenArray, *, entry: StageId, round_id: RoundId
    ) -> SpanLoss:
        """Finish a training task that enters at `entry`: forward, loss and backward in one go."""
        return settled(self.loss_wave([(source, shape, labels)], entry=entry, round_id=round_id))

    def loss_wave(
        self,
        wave: Sequence[tuple[Source, tuple[int, ...], TokenArray]],
        *,
        entry: StageId,
        round_id: RoundId,
    ) -> list[SpanLoss | SwarmError]:
        """Finish several training tasks, layer by layer."""
        self._check_open(entry, round_id)
        *before, last = self._engines_from(entry)

        def run(numbers: list[int], started: list[tuple[Tensor, Tensor]]) -> list[SpanLoss]:
            inputs = [hidden_BTD for hidden_BTD, _ in started]
            tickets: list[list[Ticket]] = [[] for _ in numbers]
            standing = self.standing(entry)
            with self.headroom.guarding(len(numbers)), self._discarding(entry, tickets):
                for engine in before:
                    passed = engine.forward_wave(inputs)
                    inputs = [hidden_BTD for hidden_BTD, _ in passed]
                    for kept, (_, ticket) in zip(tickets, passed, strict=True):
                        kept.append(ticket)
                with self._adding(entry), self.headroom.guarding(len(numbers)):
                    losses = last.loss_wave([(each, labels) for each, (_, labels) in zip(inputs, started, strict=True)])
                    results = self._run_down(before, tickets, [loss.grad_inputs for loss in losses])
            self._count(entry, [loss.target_tokens for loss in losses])
            return [
                SpanLoss(
                    loss.loss_sum,
                    loss.target_tokens,
                    self._encode_gradient(each),
                    standing,
                )
                for loss, each in zip(losses, results, strict=True)
            ]

        return run_wave(len(wave), lambda number: self._labelled(*wave[number], entry=entry), run)

    def evaluate(self, source: Source, shape: tuple[int, ...], labels: TokenArray, *, entry: StageId) -> SpanLoss:
        """Measure the loss of an evaluation task that enters at `entry`."""
        return settled(self.evaluate_wave([(source, shape, labels)], entry=entry))

    def evaluate_wave(
        self, wave: Sequence[tuple[Source, tuple[int, ...], TokenArray]], *, entry: StageId
    ) -> list[SpanLoss | SwarmError]:
        """Measure the losses of several evaluation tasks, layer by layer."""
        *before, last = self._engines_from(entry)

        def run(numbers: list[int], started: list[tuple[Tensor, Tensor]]) -> list[SpanLoss]:
            inputs = [hidden_BTD for hidden_BTD, _ in started]
            with self.headroom.guarding(len(numbers)):
                for engine in before:
                    inputs = engine.forward_only_wave(inputs)
                losses = last.evaluate_wave([(each, labels) for each, (_, labels) in zip(inputs, started, strict=True)])
            return [SpanLoss(loss.loss_sum, loss.target_tokens, None) for loss in losses]

        return run_wave(len(wave), lambda number: self._labelled(*wave[number], entry=entry), run, one_by_one=True)

    def discard(self, ticket: SpanTicket) -> None:
        """Free what a task kept that will never go backward. Does nothing for a task that has."""
        if self._waiting.pop(id(ticket), None) is None:
            return
        for engine, kept in zip(self._engines_from(ticket.entry), ticket.tickets, strict=True):
            engine.discard(kept)

    # -- state ----------------------------------------------------------------------------------------

    def note_standing(self, stage: StageId, standing: Standing) -> None:
        """Take note of where a stage stands after a step; now and then that becomes the local checkpoint."""
        if self._memory is not None and stage == self.first:
            self._memory.mark_round()
        if self._checkpoint is not None:
            self._checkpoint.note(stage, standing)

    def drive_bytes(self) -> int | None:
        """Return how much was written to the NVMe drive today, if one is used. May be called from any thread."""
        store = None if self._memory is None else self._memory.pool.store
        return None if store is None else store.statistics().written_today_bytes

    def on_progress(self, tell: Callable[[], None]) -> None:
        """Call `tell` with every piece of a pass, in the compute thread."""
        if self._memory is not None:
            self._memory.on_progress = tell

    def note_fault(self, error: Exception) -> bool:
        """Take note of an error outside of a microbatch; tell whether this machine needs a pause because of it."""
        return self.headroom.note_fault(error)

    def pause(self) -> Pause | None:
        """Return why this peer should stop for a while, if it should. May be called from any thread."""
        return self.headroom.pause()

    def close(self) -> None:
        """Keep the present state where something of it is kept, and let go of the memory."""
        if self._checkpoint is None or self._memory is None:
            return
        try:
            self._checkpoint.commit()
        finally:
            self._memory.close()

    def write_state(self, stage: StageId, files: Mapping[str, Sink]) -> None:
        """Write a stage's state into open files, one for `weights` and one for `optimizer`."""
        self.engines[stage].write_state(files)

    # -- private --------------------------------------------------------------------------------------

    def _engines_from(self, entry: StageId) -> list[StageEngine]:
        return [self.engines[stage] for stage in self.stages_from(entry)]

    def _check_open(self, entry: StageId, round_id: RoundId) -> None:
        for stage in self.stages_from(entry):
            if self._open.get(stage) != round_id:
                raise RoundOver(f"round {round_id} is over at stage {stage}")

    def _run_down(
        self, engines: Sequence[StageEngine], tickets: Sequence[list[Ticket]], gradients: Sequence[Tensor | None]
    ) -> Sequence[Tensor | None]:
        """Take the gradients of a wave back through engines in reverse order."""
        for position in reversed(range(len(engines))):
            wave = []
            for kept, grad_BTD in zip(tickets, gradients, strict=True):
                assert grad_BTD is not None, "only the first stage has no gradient by its inputs"
                wave.append((kept[position], grad_BTD))
            gradients = engines[position].backward_wave(wave)
        return gradients

    @contextmanager
    def _discarding(self, entry: StageId, wave: Sequence[list[Ticket]]) -> Iterator[None]:
        """If the block fails, free what the wave's forward passes kept, however many of them there were."""
        try:
            yield
        except BaseException:
            for tickets in wave:
                for engine, kept in zip(self._engines_from(entry), tickets, strict=False):
                    engine.discard(kept)
                tickets.clear()  # or another try would go on behind them
            raise

    @contextmanager
    def _adding(self, entry: StageId) -> Iterator[None]:
        """If the block fails half way, drop the sums that it has begun to add to.

        What it added cannot be taken back, and its microbatch is worked on again: left in, it would count twice.
        """
        before = {stage: self.engines[stage].additions for stage in self.stages_from(entry)}
        try:
            yield
        except LocalFault:
            for stage, additions in before.items():
                if self.engines[stage].additions != additions:
                    self._drop_sum(stage)
            raise

    def _drop_sum(self, stage: StageId) -> None:
        """Begin a stage's sum anew, without the tokens in it; the round's commit shows them as dropped."""
        dropped = self.accumulated_tokens[stage] if self._local is None else self._local.drop(stage)
        log.warning("gradients.dropped", stage=stage, tokens=dropped)
        self.engines[stage].zero_gradients()
        self.accumulated_tokens[stage] -= dropped

    def _count(self, entry: StageId, target_tokens: Sequence[int]) -> None:
        """Book a wave that was added to the sums of all stages from `entry` on."""
        for stage in self.stages_from(entry):
            self.accumulated_tokens[stage] += sum(target_tokens)
            self._paces[stage].note(sum(target_tokens))
            if self._local is not None:
                self._local.note(stage, target_tokens=sum(target_tokens), microbatches=len(target_tokens))
        for stage in self.stages_from(entry):
            if self._local is not None and self._local.is_due(stage):
                self._step_locally(stage, self._local)

    def _step_locally(self, stage: StageId, local: LocalSteps) -> None:
        """Take a local step. If it fails, that costs what it was to be taken from: the wave itself is done."""
        try:
            with self.headroom.guarding(1):
                local.finish(stage, self.engines[stage])
        except WriteBudgetSpent as error:
            self.headroom.note_fault(error)  # nothing has happened yet, and the sum may still be of use
        except LocalFault as error:
            log.warning("local_step.failed", stage=stage, error=error.one_line())
            self._drop_sum(stage)

    def _entering(self, source: Source, shape: tuple[int, ...], *, entry: StageId) -> Tensor:
        """Return what enters stage `entry`, once it is known to be something that can."""
        hidden_BTD = self._decode(source, shape, using=self._codec)
        self.engines[entry].check_inputs(hidden_BTD)
        return hidden_BTD

    def _labelled(
        self, source: Source, shape: tuple[int, ...], labels: TokenArray, *, entry: StageId
    ) -> tuple[Tensor, Tensor]:
        """Return what enters stage `entry`, and its labels for the last stage."""
        hidden_BTD, labels_BT = self._entering(source, shape, entry=entry), torch.from_numpy(labels)
        self.engines[self.last].check_labels(hidden_BTD.shape[:2], labels_BT)
        return hidden_BTD, labels_BT

    def _decode(self, source: Source, shape: tuple[int, ...], *, using: Codec) -> Tensor:
        """Return token ids (B, T) for a token array, hidden values (B, T, D) for a body."""
        if not isinstance(source, (bytes, bytearray)):
            return torch.from_numpy(source)
        size = shape[0] * shape[1] * shape[2]
        return using.decode(source, size).reshape(shape)

    def _encode_gradient(self, gradient_BTD: Tensor | None) -> bytes | None:
        return None if gradient_BTD is None else self._encode(gradient_BTD, using=self._gradient_codec)

    def _encode(self, hidden_BTD: Tensor, *, using: Codec) -> bytes:
        return using.encode(hidden_BTD.reshape(-1).contiguous())
