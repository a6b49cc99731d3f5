"""What peers and the coordinator say to each other. All of it can wait: training goes on without.

Owns: registration (who am I, what can I do, what do I still hold), the beat (how am I, what happened),
and the reports from which the coordinator keeps its ledger. A report is repeated until it is
acknowledged and identified by (peer, sequence), so an outage loses none and counts none twice.

Blob names that a coordinator serves: `tokens/NAME/index`, `tokens/NAME/CHUNK`, `checkpoint/ROUND/FILE`.
Blob names that a peer serves: the same token names for chunks it holds, `state/STAGE/VERSION/PART`,
`update/STAGE/VERSION`.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

from pydantic import Field

from protocol.audits import (
    MAX_ORDERS,
    AuditOrder,
    AuditReport,
    ContributionReport,
    NonsenseReport,
    ShareOrder,
    ShareReport,
    SketchOrder,
    SketchReport,
    SumOrder,
)
from protocol.handover import MAX_HANDOVERS
from protocol.ids import Digest, Lineage, PeerId, RoundId, RunId, StageId, Version
from protocol.signing import Signed
from protocol.wire import Message

NAME_PATTERN = r"^[A-Za-z0-9._-]{1,32}$"
Name = Annotated[str, Field(pattern=NAME_PATTERN)]
Text = Annotated[str, Field(max_length=200)]
Count = Annotated[int, Field(ge=0)]
Seconds = Annotated[float, Field(ge=0)]
Process = Annotated[int, Field(ge=0, lt=1 << 63)]
"""Drawn by a process when it starts, and told nobody else: two of them under one key are a cloned identity."""


class PeerState(StrEnum):
    """What a peer is doing; shown everywhere by the same word, with a reason."""

    STARTING = "starting"
    DOWNLOADING = "downloading"
    TRAINING = "training"
    EXCHANGING = "exchanging"
    WAITING = "waiting"
    PAUSED = "paused"
    WATCHING = "watching"
    DRAINING = "draining"
    STALLED = "stalled"
    REFUSED = "refused"
    STOPPED = "stopped"


class Capability(Message):
    """What a machine brings. Measured by the peer; placement uses it, nobody is paid by it."""

    device: Text
    threads: Annotated[int, Field(ge=1, le=4096)]
    memory_bytes: Count
    software: Text


STATE_PARTS = ("weights", "optimizer")
"""The files in which a stage's state is kept and travels."""


class StateFile(Message):
    """One part (`weights` or `optimizer`) of a stage's shared state, as a safetensors file."""

    part: Annotated[str, Field(pattern=r"^(weights|optimizer)$")]
    num_bytes: Count
    digest: Digest


class Snapshot(Message):
    """An immutable copy of a stage's shared state that a peer holds and serves."""

    stage: StageId
    round: RoundId
    """The first round that starts from this state."""
    version: Version
    lineage: Lineage
    files: Annotated[tuple[StateFile, ...], Field(max_length=2)]


class Register(Message):
    """Ask to take part."""

    protocol: int
    run: RunId
    session: Annotated[int, Field(ge=0, lt=1 << 63)]
    """Of this tenure, larger than that of every earlier one: a seat in a charter belongs to one life of a peer."""
    name: Name
    token: Text | None
    capability: Capability
    clock_s: float
    addresses: Annotated[tuple[Text, ...], Field(max_length=16)]
    wanted_stages: Annotated[tuple[StageId, ...], Field(max_length=256)] = ()
    """Stages that the volunteer asked for; empty leaves the choice to the coordinator."""
    hosting: Annotated[tuple[StageId, ...], Field(max_length=256)] = ()
    """Stages that this process was given before: it was moved there, or asks for a new pass, and keeps them."""
    kept: Annotated[tuple[Snapshot, ...], Field(max_length=256)] = ()
    """What this peer still has on disk from before."""
    process: Process = 0
    watches: bool = False
    """Host nothing, and recompute what others did: for who has the organiser's word (`coordinator run --watcher`)."""
    handovers: Annotated[tuple[Signed, ...], Field(max_length=MAX_HANDOVERS)] = ()
    """From keys that this peer went by before, the oldest first (`protocol/handover.py`)."""


class Welcome(Message):
    """You are in: the run, your pass, your stages, and where each stage's lineage begins."""

    manifest: Signed
    admission: Signed
    stages: Annotated[tuple[StageId, ...], Field(min_length=1, max_length=256)]
    charters: Annotated[tuple[Signed, ...], Field(max_length=4096)]
    clock_s: float


class StageState(Message):
    """One replica, as its host sees it."""

    stage: StageId
    round: RoundId
    version: Version
    lineage: Lineage
    ready: bool
    """Holds the state of `version` and can work, chartered or not."""
    members: Count
    """How many replicas its last commit names, itself included."""
    state_digest: Digest | None = None
    """Over weights and optimizer state at `version`; a charter names it."""
    rival: Lineage | None = None
    """Where others of this stage stand that we have met, and who went on without us when the swarm was torn."""
    snapshot: Snapshot | None = None


class ClosingReport(Message):
    """A round ended: the clock's signed closing."""

    closing: Signed


class CommitReport(Message):
    """A stage absorbed a round: the steward's signed commit."""

    commit: Signed


class AveragingReport(Message):
    """One attempt to average, as one member saw it."""

    stage: StageId
    round: RoundId
    ballot: Count
    group: Digest
    """Names the ballot and who takes part with what: equal for all who averaged together."""
    members: Count
    asked: Count
    ok: bool
    reason: Text = ""
    bytes_sent: Count
    bytes_received: Count
    seconds: Seconds
    hidden_seconds: Seconds = 0.0
    """How many of them the stage took tasks in."""


class WorkReport(Message):
    """What a peer did in one round. `hops` counts hops that it opened."""

    round: RoundId
    tasks_fed: Count
    tasks_resent: Count
    hops: Count
    activation_bytes: Count
    target_tokens: Count
    seconds: Seconds
    compute_seconds: Seconds


class ReceiptReport(Message):
    """What its sender says of its hops in one round; see `protocol/receipts.py`."""

    window: Signed


Report = (ClosingReport | CommitReport | AveragingReport | WorkReport | ReceiptReport) | (
    AuditReport | SketchReport | ContributionReport | ShareReport | NonsenseReport
)


class NumberedReport(Message):
    """A report with the sequence number under which it is acknowledged."""

    sequence: Annotated[int, Field(ge=1)]
    report: Report


class Beat(Message):
    """I am alive, this is my state, and these reports are not acknowledged yet (oldest first)."""

    state: Annotated[PeerState, Field(strict=False)]
    reason: Text = ""
    addresses: Annotated[tuple[Text, ...], Field(max_length=16)]
    stages: Annotated[tuple[StageState, ...], Field(max_length=256)]
    suspects: Annotated[tuple[PeerId, ...], Field(max_length=64)] = ()
    """Peers that this one failed to reach lately."""
    reports: Annotated[tuple[NumberedReport, ...], Field(max_length=64)] = ()
    revocations: Count = 0
    """Number of the newest revocation list that this peer has."""
    process: Process = 0


class GivenUp(Message):
    """A lineage that does not go on, though a replica stands there.

    Its swarm was torn, and the other half goes on; or the run goes back to a checkpoint, and all start over from that.
    """

    stage: StageId
    lineage: Lineage
    members: Annotated[tuple[PeerId, ...], Field(max_length=64)]
    """Some who stand where it does go on; nobody, if the run goes back."""


class BeatReply(Message):
    """What the coordinator wants this peer to know."""

    acknowledged: Count
    """Every report up to this sequence number is safely in the ledger."""
    stages: Annotated[tuple[StageId, ...], Field(max_length=256)]
    """The stages this peer should host; a change means: drain these, then load those."""
    charters: Annotated[tuple[Signed, ...], Field(max_length=4096)]
    """Newest charter of each stage."""
    members: Annotated[tuple[tuple[StageId, PeerId, tuple[Text, ...]], ...], Field(max_length=4096)] = ()
    """Who hosts what, with addresses: a hint that spares a DHT lookup."""
    given_up: Annotated[tuple[GivenUp, ...], Field(max_length=256)] = ()
    """Where this peer should not stand any more."""
    revoked: Signed | None = None
    """The newest revocation list, if the peer has an older one."""
    audits: Annotated[tuple[AuditOrder, ...], Field(max_length=MAX_ORDERS)] = ()
    """Work of others that this peer should recompute; repeated until it has answered."""
    sketches: Annotated[tuple[SketchOrder, ...], Field(max_length=4 * MAX_ORDERS)] = ()
    """What this peer should sketch of what it holds; likewise."""
    sums: Annotated[tuple[SumOrder, ...], Field(max_length=1)] = ()
    """Whole contributions that it should recompute; likewise, one at a time."""
    shares: Annotated[tuple[ShareOrder, ...], Field(max_length=MAX_ORDERS)] = ()
    """Averages of which this peer should say who gave what; likewise."""
    finished: bool = False
    """The run has its last checkpoint; there is nothing left to do."""


class Leave(Message):
    """Goodbye: this peer has finished its microbatches and goes."""

    reason: Text = ""


class StatusRequest(Message):
    """Ask the coordinator for the swarm's status (`swarm status`)."""


STATUS_SCHEMA = "swarm.status/1"


class StatusAnswer(Message):
    """The status document as JSON, of `STATUS_SCHEMA`."""

    document: Annotated[str, Field(max_length=250_000)]
