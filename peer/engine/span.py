"""A span's compute: decode, run the hosted stages one after the other, encode.

Owns: the conversion between bodies (bytes on the wire) and tensors, and the last word on whether a
gradient still counts: `open` and `freeze` run in the same thread as `backward`, so nothing can be added
to a stage's sum after it was frozen. A task may enter at any hosted stage (spans of two peers may overlap) and
runs from there to the span's end. Must not know: asyncio, streams, who asks. Every method is called
from the compute thread only.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import structlog
import torch

from peer.codecs import Codec
from peer.engine.stage_engine import StageEngine, Ticket
from peer.tasks import RoundOver
from protocol.errors import LocalFault, WireError
from protocol.ids import RoundId, StageId

if TYPE_CHECKING:
    import numpy

    TokenArray = numpy.ndarray[tuple[int, int], numpy.dtype[numpy.int64]]
    Source = bytes | bytearray | TokenArray

log = structlog.get_logger()

MEMORY_HINT = "Close what else uses this device, or host fewer stages (--stage)."

# B: sequences of a microbatch, T: tokens of a sequence, D: hidden size


@dataclass(slots=True)
class SpanTicket:
    """What a forward pass left behind for its backward pass."""

    round: RoundId
    entry: StageId
    """The stage at which the task came in."""
    tickets: list[Ticket]
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class SpanLoss:
    """The last span's result. `gradient` is None for evaluation, and when the span is also the first."""

    loss_sum: float
    target_tokens: int
    gradient: bytes | None


class SpanEngine:
    """The stages that this peer hosts, as one function with memory."""

    def __init__(
        self,
        engines: Mapping[StageId, StageEngine],
        *,
        codec: Codec,
        hidden_size: int,
        num_stages: int,
        microbatch: tuple[int, int],
    ) -> None:
        """`microbatch` is the run's (B, T), which no body may exceed."""
        self.engines = dict(sorted(engines.items()))
        self.first = StageId(min(self.engines))
        self.last = StageId(max(self.engines))
        self.is_first = self.first == 0
        self.is_last = self.last == num_stages - 1
        self._codec = codec
        self._hidden_size = hidden_size
        self._microbatch = microbatch
        self._open: dict[StageId, RoundId] = {}
        self._waiting: dict[int, SpanTicket] = {}
        self.accumulated_tokens: dict[StageId, int] = dict.fromkeys(self.engines, 0)

    # -- rounds ---------------------------------------------------------------------------------------

    def open(self, stage: StageId, round_id: RoundId, *, fresh: bool = True) -> None:
        """Begin a round at one stage: gradients of `round_id` count. After a void round the old sum stays."""
        if fresh:
            self.engines[stage].zero_gradients()
            self.accumulated_tokens[stage] = 0
        self._open[stage] = round_id

    def freeze(self, stage: StageId) -> int:
        """End a stage's contribution to its round; return the target tokens in it: none if the sum overflowed."""
        frozen = self._open.pop(stage, None)
        for ticket in [t for t in self._waiting.values() if t.round == frozen and t.entry <= stage]:
            self.discard(ticket)  # their backward would be refused; who asked for it may be gone already
        if not self.engines[stage].has_finite_gradients():  # one overflow, and nobody could average the sum
            self._drop_sum(stage)
        return self.accumulated_tokens[stage]

    # -- tasks ----------------------------------------------------------------------------------------

    def stages_from(self, entry: StageId) -> tuple[StageId, ...]:
        """Return the stages that a task passes which enters at `entry`."""
        return tuple(stage for stage in self.engines if stage >= entry)

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
        self._check_open(entry, round_id)
        hidden_BTD = self._decode(source, shape)
        ticket = SpanTicket(round_id, entry, [], tuple(hidden_BTD.shape))
        with _device_memory(), self._discarding(entry, ticket.tickets):
            for engine in self._engines_from(entry):
                hidden_BTD, kept = engine.forward(hidden_BTD)
                ticket.tickets.append(kept)
        self._waiting[id(ticket)] = ticket
        return self._encode(hidden_BTD), tuple(hidden_BTD.shape), ticket

    def forward_only(self, source: Source, shape: tuple[int, ...], *, entry: StageId) -> tuple[bytes, tuple[int, ...]]:
        """Run an evaluation task from stage `entry` on; nothing is kept."""
        hidden_BTD = self._decode(source, shape)
        with _device_memory():
            for engine in self._engines_from(entry):
                hidden_BTD = engine.forward_only(hidden_BTD)
        return self._encode(hidden_BTD), tuple(hidden_BTD.shape)

    def backward(
        self, ticket: SpanTicket, gradient: bytes | bytearray, shape: tuple[int, ...], *, target_tokens: int
    ) -> bytes | None:
        """Add a task's gradients to the open sums and return the encoded gradient w.r.t. its input.

        Raises `RoundOver` or `PeerFault`, with nothing added anywhere, if a stage of the span has been frozen
        meanwhile or the gradient is none. A `LocalFault` (overflow, no memory) costs the sums that it spoilt.
        """
        self._check_open(ticket.entry, ticket.round)
        grad_BTD: torch.Tensor | None = self._decode(gradient, shape)
        self._waiting.pop(id(ticket))
        engines = self._engines_from(ticket.entry)
        with self._discarding(ticket.entry, ticket.tickets), self._adding(ticket.entry), _device_memory():
            for engine, kept in zip(reversed(engines), reversed(ticket.tickets), strict=True):
                assert grad_BTD is not None
                grad_BTD = engine.backward(kept, grad_BTD)
        self._count(ticket.entry, target_tokens)
        return None if grad_BTD is None else self._encode(grad_BTD)

    def loss_and_backward(
        self, source: Source, shape: tuple[int, ...], labels: TokenArray, *, entry: StageId, round_id: RoundId
    ) -> SpanLoss:
        """Finish a training task that enters at `entry`: forward, loss and backward in one go."""
        self._check_open(entry, round_id)
        hidden_BTD = self._decode(source, shape)
        *before, last = self._engines_from(entry)
        tickets: list[Ticket] = []
        with _device_memory(), self._discarding(entry, tickets):
            for engine in before:
                hidden_BTD, kept = engine.forward(hidden_BTD)
                tickets.append(kept)
            with self._adding(entry), _device_memory():
                result = last.loss_and_backward(hidden_BTD, torch.from_numpy(labels))
                grad_BTD = result.grad_inputs
                for engine, kept in zip(reversed(before), reversed(tickets), strict=True):
                    assert grad_BTD is not None
                    grad_BTD = engine.backward(kept, grad_BTD)
        self._count(entry, result.target_tokens)
        return SpanLoss(result.loss_sum, result.target_tokens, None if grad_BTD is None else self._encode(grad_BTD))

    def evaluate(self, source: Source, shape: tuple[int, ...], labels: TokenArray, *, entry: StageId) -> SpanLoss:
        """Measure the loss of an evaluation task that enters at `entry`."""
        hidden_BTD = self._decode(source, shape)
        *before, last = self._engines_from(entry)
        with _device_memory():
            for engine in before:
                hidden_BTD = engine.forward_only(hidden_BTD)
            result = last.evaluate(hidden_BTD, torch.from_numpy(labels))
        return SpanLoss(result.loss_sum, result.target_tokens, None)

    def discard(self, ticket: SpanTicket) -> None:
        """Free what a task kept that will never go backward. Does nothing for a task that has."""
        if self._waiting.pop(id(ticket), None) is None:
            return
        for engine, kept in zip(self._engines_from(ticket.entry), ticket.tickets, strict=True):
            engine.discard(kept)

    # -- state ----------------------------------------------------------------------------------------

    def state_parts(self, stage: StageId) -> dict[str, dict[str, torch.Tensor]]:
        """Return a copy of a stage's state in two parts, `weights` and `optimizer`, for a snapshot."""
        engine = self.engines[stage]
        weights = engine.weight_tensors()
        copies = {name: tensor.detach().cpu().clone() for name, tensor in engine.state_tensors().items()}
        return {
            "weights": {name: copies[name] for name in weights},
            "optimizer": {name: copy for name, copy in copies.items() if name not in weights},
        }

    # -- private --------------------------------------------------------------------------------------

    def _engines_from(self, entry: StageId) -> list[StageEngine]:
        return [self.engines[stage] for stage in self.stages_from(entry)]

    def _check_open(self, entry: StageId, round_id: RoundId) -> None:
        for stage in self.stages_from(entry):
            if self._open.get(stage) != round_id:
                raise RoundOver(f"round {round_id} is over at stage {stage}")

    @contextmanager
    def _discarding(self, entry: StageId, tickets: list[Ticket]) -> Iterator[None]:
        """If the block fails, free what its forward passes kept, however many of them there were."""
        try:
            yield
        except BaseException:
            for engine, kept in zip(self._engines_from(entry), tickets, strict=False):
                engine.discard(kept)
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
        log.warning("gradients.dropped", stage=stage, tokens=self.accumulated_tokens[stage])
        self.engines[stage].zero_gradients()
        self.accumulated_tokens[stage] = 0

    def _count(self, entry: StageId, target_tokens: int) -> None:
        for stage in self.stages_from(entry):
            self.accumulated_tokens[stage] += target_tokens

    def _decode(self, source: Source, shape: tuple[int, ...]) -> torch.Tensor:
        """Return token ids (B, T) for a token array, hidden values (B, T, D) for a body."""
        if not isinstance(source, (bytes, bytearray)):
            return torch.from_numpy(source)
        size = shape[0] * shape[1] * shape[2]
        return self._codec.decode(source, size).reshape(shape)

    def _encode(self, hidden_BTD: torch.Tensor) -> bytes:
        return self._codec.encode(hidden_BTD.reshape(-1).contiguous())


@contextmanager
def _device_memory() -> Iterator[None]:
    """Say in our own words that the device is full: the microbatch may do well elsewhere, or later."""
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError) as error:
        reason = " ".join(str(error).split())[:200]
        raise LocalFault(f"out of memory: {reason}", hint=MEMORY_HINT) from None
