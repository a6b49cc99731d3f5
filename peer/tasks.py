"""The values that travel between a peer's modules, and the two ways in which a task ends early.

Owns: nothing but these types. A *body* is what crosses a hop: encoded activations one way, an encoded
gradient the other.
"""

from __future__ import annotations

from dataclasses import dataclass

from protocol.batches import TaskKind
from protocol.errors import TransientError
from protocol.ids import Digest, RoundId, StageId, digest
from protocol.signing import Signed


@dataclass(frozen=True, slots=True)
class TaskId:
    """One microbatch of one round. Which stage it is at is said separately."""

    kind: TaskKind
    round: RoundId
    number: int


@dataclass(frozen=True, slots=True)
class Body:
    """Encoded tensor bytes, their shape before encoding, and their SHA-256."""

    data: bytes | bytearray
    shape: tuple[int, ...]
    digest: Digest
    local_step: int = 0
    """0 if it was made with weights that all replicas of a version have."""

    @classmethod
    def of(cls, data: bytes | bytearray, shape: tuple[int, ...], *, local_step: int = 0) -> Body:
        return cls(data, shape, digest(memoryview(data)), local_step)


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a span (or the pipeline behind it) made of a task.

    `gradient` is w.r.t. the input body; None at the first stage and for evaluation. `loss_sum` is in nats,
    summed over `target_tokens`. `path` is signed, nearest peer first.
    """

    gradient: bytes | bytearray | None
    gradient_digest: Digest
    loss_sum: float
    target_tokens: int
    path: tuple[Signed, ...]


@dataclass(slots=True)
class Pulse:
    """How far a task has come, as seen from here. Callers upstream live by it.

    `work` only grows: with every sign of life from the furthest stage, and while the task is in our own
    hands with every job that our compute thread finishes. So a task that waits its turn in a busy queue
    is alive, and one behind a wedged thread is not.
    """

    furthest_stage: StageId
    work: int = 0
    waiting: bool = False
    is_local: bool = True
    _jobs_seen: int = 0

    def advance(self, stage: StageId) -> None:
        """Count a sign of life from `stage`. Upstream sees one step more, whatever number downstream had for it."""
        self.furthest_stage = max(self.furthest_stage, stage)
        self.work += 1

    def tick(self, jobs_done: int) -> None:
        """Count our own compute thread's progress while the task is here."""
        if self.is_local and jobs_done != self._jobs_seen:
            self._jobs_seen = jobs_done
            self.work += 1


class RoundOver(TransientError):
    """The task's round has ended at some stage: drop the task, it is nobody's fault."""


class DownstreamFailed(TransientError):
    """A later stage failed beyond repair from here; passed up as it is."""

    def __init__(self, message: str, *, stage: StageId) -> None:
        super().__init__(message)
        self.stage = stage
