"""A span's compute: decode, run the hosted stages one after the other, encode.

Owns: the conversion between bodies (bytes on the wire) and tensors, and the last word on whether a
gradient still counts: `open` and `freeze` run in the same thread as `backward`, so nothing can be added
to a stage's sum after it was frozen. Must not know: asyncio, streams, who asks. Every method is called
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

# B: sequences of a microbatch, T: tokens of a sequence, D: hidden size


@dataclass(slots=True)
class SpanTicket:
    """What a forward pass left behind for its backward pass."""

    round: RoundId
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
        for ticket in [ticket for ticket in self._waiting.values() if ticket.round == frozen]:
            self.discard(ticket)  # their backward would be refused; who asked for it may be gone already
        self._drop_spoilt_sum(stage)
        return self.accumulated_tokens[stage]

    # -- tasks ----------------------------------------------------------------------------------------

    def body_bytes(self, shape: tuple[int, ...]) -> int:
        """Return the exact size of an encoded (B, T, D) body, or raise `WireError` if it cannot be one."""
        most = (*self._microbatch, self._hidden_size)
        if len(shape) != 3 or shape[0] > most[0] or shape[1:] != most[1:]:
            raise WireError(f"a body of shape {shape} cannot enter this stage; {most} can")
        return self._codec.encoded_bytes(shape[0] * shape[1] * shape[2])

    def forward(
        self, source: Source, shape: tuple[int, ...], *, round_id: RoundId
    ) -> tuple[bytes, tuple[int, ...], SpanTicket]:
        """Run a training task through the span; return the encoded output, its shape and what backward needs."""
        self._check_open(round_id)
        hidden_BTD = self._decode(source, shape)
        ticket = SpanTicket(round_id, [], tuple(hidden_BTD.shape))
        with self._discarding(ticket.tickets):
            for engine in self.engines.values():
                hidden_BTD, kept = engine.forward(hidden_BTD)
                ticket.tickets.append(kept)
        self._waiting[id(ticket)] = ticket
        return self._encode(hidden_BTD), tuple(hidden_BTD.shape), ticket

    def forward_only(self, source: Source, shape: tuple[int, ...]) -> tuple[bytes, tuple[int, ...]]:
        """Run an evaluation task through the span; nothing is kept."""
        hidden_BTD = self._decode(source, shape)
        for engine in self.engines.values():
            hidden_BTD = engine.forward_only(hidden_BTD)
        return self._encode(hidden_BTD), tuple(hidden_BTD.shape)

    def backward(
        self, ticket: SpanTicket, gradient: bytes | bytearray, shape: tuple[int, ...], *, target_tokens: int
    ) -> bytes | None:
        """Add a task's gradients to the open sums and return the encoded gradient w.r.t. its input.

        Raises `RoundOver` or `PeerFault`, with nothing added anywhere, if a stage of the span has been frozen
        meanwhile or the gradient is none. A `LocalFault` (overflow) costs the sums that it spoilt.
        """
        self._check_open(ticket.round)
        grad_BTD: torch.Tensor | None = self._decode(gradient, shape)
        self._waiting.pop(id(ticket))
        with self._discarding(ticket.tickets), self._adding():
            for engine, kept in zip(reversed(self.engines.values()), reversed(ticket.tickets), strict=True):
                assert grad_BTD is not None
                grad_BTD = engine.backward(kept, grad_BTD)
        self._count(target_tokens)
        return None if grad_BTD is None else self._encode(grad_BTD)

    def loss_and_backward(
        self, source: Source, shape: tuple[int, ...], labels: TokenArray, *, round_id: RoundId
    ) -> SpanLoss:
        """Finish a training task at the last stage: loss and backward in one go."""
        self._check_open(round_id)
        hidden_BTD = self._decode(source, shape)
        *before, last = self.engines.values()
        tickets: list[Ticket] = []
        with self._discarding(tickets):
            for engine in before:
                hidden_BTD, kept = engine.forward(hidden_BTD)
                tickets.append(kept)
            with self._adding():
                result = last.loss_and_backward(hidden_BTD, torch.from_numpy(labels))
                grad_BTD = result.grad_inputs
                for engine, kept in zip(reversed(before), reversed(tickets), strict=True):
                    assert grad_BTD is not None
                    grad_BTD = engine.backward(kept, grad_BTD)
        self._count(result.target_tokens)
        return SpanLoss(result.loss_sum, result.target_tokens, None if grad_BTD is None else self._encode(grad_BTD))

    def evaluate(self, source: Source, shape: tuple[int, ...], labels: TokenArray) -> SpanLoss:
        """Measure the loss of an evaluation task at the last stage."""
        hidden_BTD = self._decode(source, shape)
        *before, last = self.engines.values()
        for engine in before:
            hidden_BTD = engine.forward_only(hidden_BTD)
        result = last.evaluate(hidden_BTD, torch.from_numpy(labels))
        return SpanLoss(result.loss_sum, result.target_tokens, None)

    def discard(self, ticket: SpanTicket) -> None:
        """Free what a task kept that will never go backward. Does nothing for a task that has."""
        if self._waiting.pop(id(ticket), None) is None:
            return
        for engine, kept in zip(self.engines.values(), ticket.tickets, strict=True):
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

    def _check_open(self, round_id: RoundId) -> None:
        for stage in self.engines:
            if self._open.get(stage) != round_id:
                raise RoundOver(f"round {round_id} is over at stage {stage}")

    @contextmanager
    def _discarding(self, tickets: list[Ticket]) -> Iterator[None]:
        """If the block fails, free what its forward passes kept, however many of them there were."""
        try:
            yield
        except BaseException:
            for engine, kept in zip(self.engines.values(), tickets, strict=False):
                engine.discard(kept)
            raise

    @contextmanager
    def _adding(self) -> Iterator[None]:
        """If the block overflows, drop the sums that it has spoilt; the others go on."""
        try:
            yield
        except LocalFault:
            for stage in self.engines:
                self._drop_spoilt_sum(stage)
            raise

    def _drop_spoilt_sum(self, stage: StageId) -> None:
        """One overflow, and nobody could average a sum any more: it is begun anew, without the tokens in it."""
        if not self.engines[stage].has_finite_gradients():
            log.warning("gradients.dropped", stage=stage, tokens=self.accumulated_tokens[stage])
            self.engines[stage].zero_gradients()
            self.accumulated_tokens[stage] = 0

    def _count(self, target_tokens: int) -> None:
        for stage in self.engines:
            self.accumulated_tokens[stage] += target_tokens

    def _decode(self, source: Source, shape: tuple[int, ...]) -> torch.Tensor:
        """Return token ids (B, T) for a token array, hidden values (B, T, D) for a body."""
        if not isinstance(source, (bytes, bytearray)):
            return torch.from_numpy(source)
        size = shape[0] * shape[1] * shape[2]
        return self._codec.decode(source, size).reshape(shape)

    def _encode(self, hidden_BTD: torch.Tensor) -> bytes:
        return self._codec.encode(hidden_BTD.reshape(-1).contiguous())
