"""The tokens of numbered microbatches: inputs for the feeder, labels for the last stage.

Owns: going from a task to the windows it holds, and from there to arrays. Both ends of the pipeline read
their own verified token files, so labels never travel and nobody in between can change them. Must not
know: who else works on the task.
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING

from peer.data.tokens import TokenFile
from peer.tasks import TaskId
from protocol.batches import Microbatch, TaskKind, plan_round
from protocol.errors import PeerFault
from protocol.ids import RoundId
from protocol.manifest import BatchSpec, DataSpec

if TYPE_CHECKING:
    import numpy

    TokenArray = numpy.ndarray[tuple[int, int], numpy.dtype[numpy.int64]]


class BatchSource:
    """Token arrays of shape (B, T) for tasks."""

    def __init__(self, *, data: DataSpec, batch: BatchSpec, files: dict[TaskKind, TokenFile]) -> None:
        self._data = data
        self._batch = batch
        self._files = files
        self._plan = lru_cache(maxsize=4)(self._plan_round)

    def plan(self, round_id: RoundId) -> tuple[Microbatch, ...]:
        """List the microbatches of a round."""
        return self._plan(round_id)

    async def inputs(self, task: TaskId) -> TokenArray:
        """Return the tokens that enter stage 0."""
        return (await self._arrays(task))[0]

    async def labels(self, task: TaskId) -> TokenArray:
        """Return the target of every position: the token that follows it."""
        return (await self._arrays(task))[1]

    async def _arrays(self, task: TaskId) -> tuple[TokenArray, TokenArray]:
        plan = self._plan(task.round)
        if task.number >= len(plan) or plan[task.number].kind is not task.kind:
            raise PeerFault(f"round {task.round} has no {task.kind} microbatch {task.number}")
        windows = plan[task.number].windows
        file = self._files[task.kind]
        await file.ensure(windows)
        return file.windows(windows)

    def _plan_round(self, round_id: RoundId) -> tuple[Microbatch, ...]:
        return plan_round(self._data, self._batch, round_id)
