"""The messages of a hop: activations in, gradient out.

Owns: what the two ends of a hop say to each other, in order:

    caller                          callee
    OpenTask  ------------------->            header only: nothing heavy moves before a slot is promised
              <-------------------  Accepted | Busy | Refused
    body chunks, BodyEnd -------->            activations, then their SHA-256
              <-------------------  Progress  (any number of times)
              <-------------------  Answer    status, sizes; then body chunks: the gradient
    Received  ------------------->            only now may the callee forget the answer

    ResumeTask ------------------>            on a new stream, after the old one broke
              <-------------------  Progress / Answer as above, or Refused(UNKNOWN_TASK)

A task is known by (authenticated caller, round, number, kind, stage, body digest): a guessed id with
other content is another task. Pure; the transport is `protocol/transport/streams.py`, the two ends are
`peer/pipeline/caller.py` and `peer/pipeline/callee.py`.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

from pydantic import Field

from protocol.batches import TaskKind
from protocol.ids import Digest, Lineage, PeerId, RoundId, RunId, StageId, Version, digest
from protocol.signing import Signed
from protocol.wire import Message

ENTRY_CONTEXT = "handcar path entry"
MAX_DIMENSION = 1 << 24
MAX_BODY_BYTES = 1 << 32
MAX_TIME_LEFT_S = 1e6  # no round takes eleven days

Count = Annotated[int, Field(ge=0)]
Kind = Annotated[TaskKind, Field(strict=False)]


class TensorSpec(Message):
    """One tensor of a body. Bytes follow in the order of the specs."""

    name: Annotated[str, Field(max_length=32)]
    shape: Annotated[tuple[Annotated[int, Field(ge=1, le=MAX_DIMENSION)], ...], Field(min_length=1, max_length=4)]

    @property
    def num_elements(self) -> int:
        count = 1
        for size in self.shape:
            count *= size
        return count


class OpenTask(Message):
    """Ask for a slot. `lineage` and `version` are the *callee's* stage as the caller knows it."""

    protocol: int
    run: RunId
    kind: Kind
    round: RoundId
    number: Count
    attempt: Count
    """How often this microbatch was sent to this stage before; not part of its identity."""
    stage: StageId
    lineage: Lineage
    version: Version
    local_step: Count
    """0 if the caller's weights were those of its versions, and not its own: then its work can be recomputed."""
    time_left_s: Annotated[float, Field(ge=0, le=MAX_TIME_LEFT_S)]
    retries_left: Count
    tensors: Annotated[tuple[TensorSpec, ...], Field(min_length=1, max_length=8)]
    codec: Annotated[str, Field(max_length=16)]
    body_bytes: Annotated[int, Field(ge=1, le=MAX_BODY_BYTES)]


class Accepted(Message):
    """A slot is yours if the body begins within `ttl_s`."""

    ttl_s: float


class Busy(Message):
    """No slot now. Backpressure, never a fault."""

    retry_after_s: float


class RefusalCode(StrEnum):
    """Why a hop was refused; each tells the caller what to do next."""

    VERSION = "version"
    """Protocol versions differ: give this peer up."""
    WRONG_RUN = "wrong_run"
    WRONG_STAGE = "wrong_stage"
    """This peer does not host that stage (any more): look it up again."""
    LINEAGE = "lineage"
    """Same version, other history: one of us is on a fork."""
    BEHIND = "behind"
    """The callee is at a later round than the caller: catch up."""
    AHEAD = "ahead"
    """The callee has not reached that round yet: try again soon."""
    FROZEN = "frozen"
    """The round's contribution is already on its way into the average."""
    UNKNOWN_TASK = "unknown_task"
    BAD_HEADER = "bad_header"
    NOT_ADMITTED = "not_admitted"
    LEAVING = "leaving"


class Refused(Message):
    """Not here, or not like this."""

    code: Annotated[RefusalCode, Field(strict=False)]
    detail: Annotated[str, Field(max_length=500)] = ""


class BodyEnd(Message):
    """Trailer of a body."""

    digest: Digest


class Progress(Message):
    """Sign of life. Only a larger (furthest stage, work) resets the caller's timer; `waiting` pauses it.

    `waiting` means that some stage has no replica at the moment: that is nobody's fault.
    """

    furthest_stage: StageId
    work: Count
    waiting: bool = False


class AnswerStatus(StrEnum):
    """How a task ended at the callee."""

    DONE = "done"
    DOWNSTREAM_FAILED = "downstream_failed"
    """A later stage failed; passed up unchanged, never retried on a sibling of this callee."""
    FAILED = "failed"
    """This callee failed; another replica may do better."""
    ROUND_OVER = "round_over"
    """The round ended before the task did: drop it."""


class PathEntry(Message):
    """One peer's signed word on one microbatch: its receipt. The whole path is the proof that the number is done.

    Written on the way back, last stage first; `behind` is the digest of the entries behind this one, so
    no link can be replaced afterwards. `loss_sum` (nats) and `target_tokens` are the last stage's.
    """

    run: RunId
    kind: Kind
    round: RoundId
    number: Count
    stages: Annotated[tuple[StageId, ...], Field(min_length=1, max_length=256)]
    peer: PeerId
    caller: PeerId
    """Who brought the input, as the transport has authenticated it; at stage 0 the peer itself."""
    version: Version
    local_step: Count
    input_digest: Digest
    output_digest: Digest
    behind: Digest
    loss_sum: float
    target_tokens: Count


MAX_PATH_ENTRIES = 256

Path = Annotated[tuple[Signed, ...], Field(max_length=MAX_PATH_ENTRIES)]


class Evidence(Message):
    """What a feeder shows for a finished number: the path, from its own entry to the last stage's."""

    path: Path


class Answer(Message):
    """The end of a task. The body (gradient w.r.t. the input) follows if `body_bytes` > 0; its digest is `digest`."""

    status: Annotated[AnswerStatus, Field(strict=False)]
    detail: Annotated[str, Field(max_length=500)] = ""
    failed_stage: StageId | None = None
    loss_sum: float = 0.0
    target_tokens: Count = 0
    path: Path = ()
    body_bytes: Annotated[int, Field(ge=0, le=MAX_BODY_BYTES)] = 0
    digest: Digest | None = None
    load_s: Annotated[float, Field(ge=0)] = 0.0
    """Seconds of work queued at the callee: what the router's estimate feeds on."""


class Received(Message):
    """The caller holds the whole answer; the callee may forget it."""


class ResumeTask(Message):
    """Ask the same peer for a task whose stream broke."""

    run: RunId
    kind: Kind
    round: RoundId
    number: Count
    stage: StageId
    body_digest: Digest


def path_digest(path: tuple[Signed, ...]) -> Digest:
    """Hash a path (nearest entry first), for `PathEntry.behind`."""
    return digest(*(entry.to_bytes() for entry in path))
