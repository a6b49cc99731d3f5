"""Neighbours, replicas and their microbatches, for tests of audits: every tensor is drawn from its name."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from coordinator.carries import Carry
from protocol.audits import AuditOutcome, AuditReport, Order, ShareOrder, SketchOrder, SketchReport, SumOrder
from protocol.control import BeatReply
from protocol.ids import PeerId, RoundId, StageId, digest
from protocol.receipts import SHORT_DIGEST_BYTES
from protocol.sketch import sketch


def named(name: str) -> bytes:
    """Return a shortened digest of a tensor's name."""
    return digest(name.encode())[:SHORT_DIGEST_BYTES]


def tensor(name: str) -> np.ndarray:
    """Return the tensor of a name."""
    seed = int.from_bytes(digest(name.encode())[:8], "big")
    return np.random.default_rng(seed).standard_normal(8 * 512).astype(np.float32)


def carry(peer: PeerId, upstream: PeerId, downstream: PeerId, number: int = 0) -> Carry:
    """Return a microbatch at stage 1 of 3. What goes out and back is `y` and `dx`."""
    return Carry(
        peer=peer,
        round=RoundId(3),
        number=number,
        first_stage=StageId(1),
        num_stages=1,
        version=None,
        upstream=upstream,
        given=named("x"),
        returned=named("dx"),
        downstream=downstream,
        outputs=named("y"),
        gradient=named("g"),
    )


@dataclass
class Person:
    """Answers orders. `sent` says what the audited really sent, by what it should have been."""

    peer: PeerId
    sent: dict[str, str] = field(default_factory=dict)
    lies: bool = False
    """As an auditor or a neighbour it tells of other tensors."""
    covers: bool = False
    """As an auditor it finds right whatever was sent."""
    outcome: AuditOutcome = AuditOutcome.DONE
    tensors: dict[str, np.ndarray] = field(default_factory=dict)
    """What was sent if it has no name of its own."""

    def answers(self, reply: BeatReply) -> list[AuditReport | SketchReport]:
        """Answer all that a beat has brought."""
        return [*map(self.answer, reply.audits), *map(self.answer, reply.sketches), *map(self.answer, reply.sums)]

    def answer(self, order: Order) -> AuditReport | SketchReport:
        assert not isinstance(order, ShareOrder), "nobody is asked for shares here"
        if isinstance(order, SumOrder):
            return AuditReport(order=order.order, outcome=self.outcome, outputs=self._sketch("sum", order.seed))
        if isinstance(order, SketchOrder):
            what = "dx" if order.is_gradient else "y"
            return SketchReport(order=order.order, sketch=self._seen(what, order.seed))
        if self.outcome is not AuditOutcome.DONE:
            return AuditReport(order=order.order, outcome=self.outcome)
        seen = {
            what: b"" if part is None else sketch(self._tensor(what), order.seed)
            for what, part in (("y", order.outputs), ("dx", order.returned))
        }
        return AuditReport(
            order=order.order,
            outcome=AuditOutcome.DONE,
            outputs=b"" if order.gradient is None else self._sketch(self._found("y"), order.seed),
            returned=b"" if order.inputs is None or order.prefix else self._sketch(self._found("dx"), order.seed),
            seen_outputs=seen["y"],
            seen_returned=seen["dx"],
        )

    def _tensor(self, what: str) -> np.ndarray:
        """Return what was sent."""
        return self.tensors[what] if what in self.tensors else tensor(self.sent.get(what, what))

    def _seen(self, what: str, seed: bytes) -> bytes:
        """Sketch what was sent, as a neighbour."""
        return self._sketch(self.sent.get(what, what), seed) if self.lies else sketch(self._tensor(what), seed)

    def _found(self, name: str) -> str:
        return self.sent.get(name, name) if self.covers else name

    def _sketch(self, name: str, seed: bytes) -> bytes:
        return sketch(tensor(f"{name} of {self.peer}" if self.lies else name), seed)
