"""Which microbatches of a round have been here, and so whether any may still come in over a hop.

Owns: the numbers of the present round that have not come in yet, by the stage at which they would. Must not know: who
sends them, what becomes of them. A peer that is not alone at its stage never sees all of them, and then cannot tell.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from peer.pipeline.gate import Gate, Opening
from peer.tasks import TaskId
from protocol.batches import Microbatch, TaskKind
from protocol.ids import StageId


@dataclass(slots=True)
class _Missing:
    opening: Opening
    numbers: set[int]


class Attendance:
    """The numbers that are missing, of the opening that a stage is in."""

    def __init__(self, gate: Gate) -> None:
        self._gate = gate
        self._missing: dict[tuple[StageId, TaskKind], _Missing] = {}

    def note(self, task: TaskId, entry: StageId, plan: Iterable[Microbatch]) -> None:
        """Take note of a task that has come in; `plan` is that of its round. One of another round comes too late."""
        opening, known = self._gate.opening(entry), self._missing.get((entry, task.kind))
        if opening is None or opening.round != task.round:
            return
        if known is None or known.opening is not opening:
            known = _Missing(opening, {microbatch.number for microbatch in plan if microbatch.kind is task.kind})
            self._missing[entry, task.kind] = known
        known.numbers.discard(task.number)

    def is_missing_any(self, entry: StageId, kind: TaskKind) -> bool:
        """Tell whether a number of the round may come that has not been here."""
        known = self._missing.get((entry, kind))
        return known is None or bool(known.numbers)
