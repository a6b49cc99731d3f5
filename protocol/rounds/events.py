"""What goes into a stage's round machine and what comes out of it.

Owns: the events (facts that a driver reports) and the actions (work that a driver must do). Must not know:
how the machine decides. The package docstring tells which action is answered by which event.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from protocol.ids import Digest, Lineage, PeerId, RoundId, StageId, Version
from protocol.rounds.messages import Closing, Commit, Contribution, DoneTask, StageMessage
from protocol.signing import Signed

# -- events ----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Received:
    """A message came from an authenticated peer."""

    sender: PeerId
    message: StageMessage


@dataclass(frozen=True, slots=True)
class Tick:
    """A beat has passed. Nothing happens without: all timers are looked at here."""


@dataclass(frozen=True, slots=True)
class RosterChanged:
    """Who hosts which stage, as far as the DHT says, and who is banned."""

    replicas: Mapping[StageId, tuple[PeerId, ...]]
    banned: frozenset[PeerId] = frozenset()


@dataclass(frozen=True, slots=True)
class PeerGone:
    """That peer's process is certainly dead: its own host refused the connection. A timeout is not enough."""

    peer: PeerId


@dataclass(frozen=True, slots=True)
class TaskDone:
    """Stage 0: a number that we fed came back, with the last stage's signed answer."""

    round: RoundId
    task: DoneTask


@dataclass(frozen=True, slots=True)
class Frozen:
    """Answers `Freeze`: nothing is added any more; the contribution stands for so many target tokens."""

    round: RoundId
    tokens: int
    tokens_per_s: float | None = None
    """How fast they came, while there was something to do; None if none did."""
    norm: float = 0.0
    """Of the contribution (L2); not known yet if it `replaces` one that is absorbed first (see `Applied`)."""


@dataclass(frozen=True, slots=True)
class ReduceDone:
    """Answers `StartReduce`: the summed bytes lie in staging. `norm` is that of the sum, undivided."""

    group_id: Digest
    digest: Digest
    norm: float
    bytes_per_s: float | None = None
    """How fast we could send; None if there was nobody to send to."""


@dataclass(frozen=True, slots=True)
class ReduceFailed:
    """Answers `StartReduce`: nothing has changed."""

    group_id: Digest
    reason: str
    suspect: PeerId | None = None


@dataclass(frozen=True, slots=True)
class Fetched:
    """Answers `Fetch`: the bytes with this digest lie in staging; `norm` as in `ReduceDone`."""

    digest: Digest
    norm: float


@dataclass(frozen=True, slots=True)
class FetchFailed:
    """Answers `Fetch`: no source has those bytes."""

    digest: Digest
    reason: str


@dataclass(frozen=True, slots=True)
class Applied:
    """Answers `Apply` and `Replay`: the state is that of `lineage`, its digest this (None: not computed)."""

    lineage: Lineage
    state_digest: Digest | None
    norm: float | None = None
    """Of the contribution that was frozen before, and is one only now; None if there is none."""


@dataclass(frozen=True, slots=True)
class ApplyFailed:
    """Answers `Apply` and `Replay`: could not get to `lineage`; the state is as before."""

    lineage: Lineage
    reason: str


@dataclass(frozen=True, slots=True)
class Synced:
    """Answers `Resync`, and starts a peer that already has state.

    `commits` are the newest ones that led to the state, oldest first, empty if it is the charter's own.
    """

    charter: Signed
    commits: tuple[Signed, ...]
    state_digest: Digest | None


@dataclass(frozen=True, slots=True)
class Drain:
    """The user wants to leave: finish this round, give the seat up with its commit, then say `Left`."""


@dataclass(frozen=True, slots=True)
class Quit:
    """The process ends right after this: say goodbye. Give it to every replica, wished for by `Drain` or not."""


@dataclass(frozen=True, slots=True)
class Rejoin:
    """The coordinator's word: our branch of a fork is given up. What we did since is dropped, and history fetched anew.

    That counts only if our chain has the lineage that is `lost`, and if we have met one of the `sources`, who have the
    other one: as long as they cannot be reached, nothing is gained by giving up what we have.
    """

    lost: Lineage
    sources: tuple[PeerId, ...]


Event = (
    Received
    | Tick
    | RosterChanged
    | PeerGone
    | TaskDone
    | Frozen
    | ReduceDone
    | ReduceFailed
    | Fetched
    | FetchFailed
    | Applied
    | ApplyFailed
    | Synced
    | Drain
    | Quit
    | Rejoin
)

# -- actions ---------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Send:
    """Deliver if you can; never wait for it, never repeat it.

    Only a `ClosingNotice` is ever addressed to ourselves: it is for the other stages that we host.
    """

    to: PeerId
    message: StageMessage


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenRound:
    """Take tasks of this round at this version, from now on.

    With `fresh` the accumulator starts at zero. Otherwise what was frozen is kept: the last round was void, or its
    averaging is hidden behind this one.
    """

    round: RoundId
    first_round: RoundId
    """The state is what all rounds before this one have led to; that of `round` but for an averaging under way."""
    version: Version
    lineage: Lineage
    members: tuple[PeerId, ...]
    fresh: bool


@dataclass(frozen=True, slots=True)
class Freeze:
    """Refuse new tasks, end those that are running, then report `Frozen`.

    What was added up becomes the contribution: instead of the one before, if a commit of that is about to be applied
    (`replaces`), else on top of it.
    """

    closing: Closing
    signed: Signed
    replaces: bool = False
    following: Commit | None = None
    """The commit that is about to be applied, if its bytes are staged."""


@dataclass(frozen=True, slots=True)
class Shut:
    """That round is over: let nothing more in. What it has added up stays as it is until it is frozen."""

    round: RoundId


@dataclass(frozen=True, slots=True, kw_only=True)
class StartReduce:
    """Sum the frozen contributions of `group` in its order into staging."""

    group_id: Digest
    round: RoundId
    version: Version
    """Of the state before."""
    ballot: int
    codec: str
    group: tuple[Contribution, ...]
    num_asked: int
    """Members of the stage: k of n is `len(group)` of this."""


@dataclass(frozen=True, slots=True)
class AbortReduce:
    """Give that reduce up; no answer wanted."""

    group_id: Digest


@dataclass(frozen=True, slots=True)
class Fetch:
    """Get the update bytes of a proposed commit into staging, without applying them."""

    commit: Commit
    sources: tuple[PeerId, ...]


@dataclass(frozen=True, slots=True)
class Apply:
    """Apply the staged bytes (scaled by `clip_scale / total_tokens`), and log them."""

    commit: Commit
    signed: Signed
    lineage: Lineage


@dataclass(frozen=True, slots=True)
class CommitStep:
    """One commit of a replay, with the lineage that it leads to."""

    commit: Commit
    signed: Signed
    lineage: Lineage


@dataclass(frozen=True, slots=True)
class Replay:
    """Fetch and apply the bytes of these commits, oldest first; answer for the last."""

    steps: tuple[CommitStep, ...]
    sources: tuple[PeerId, ...]


@dataclass(frozen=True, slots=True)
class Resync:
    """Get the stage's state from history (snapshot and log) under this charter or a newer one.

    Without a charter: under the newest that you can find. Everything else in flight is void.
    """

    charter: Signed | None
    sources: tuple[PeerId, ...]
    is_choice: bool = False
    """Nobody but the sources will do: others may stand in what we have given up."""


@dataclass(frozen=True, slots=True)
class NewLineage:
    """A newer charter has confirmed the very state that we have: nothing to fetch, but it is called this now."""

    charter: Signed
    lineage: Lineage
    round: RoundId


@dataclass(frozen=True, slots=True)
class BitsChanged:
    """Stage 0: what is done by anybody, so that a feeder can take what is not.

    Bits may also vanish: a clock and a feeder died together, and the proofs with them.
    """

    round: RoundId
    done: int


@dataclass(frozen=True, slots=True)
class Left:
    """Our work at this stage is safe: the process may end, once all its stages have said so.

    Until it does, this replica goes on if the stage still has it for a member. Repeated after every commit.
    """


class Trouble(StrEnum):
    """What a `Report` is about."""

    FAULT = "fault"
    """A message broke the rules."""
    FORKED = "forked"
    """The peer's lineage and ours have parted; only a newer charter joins them again."""
    DIVERGED = "diverged"
    """Same lineage, other state or other bytes."""
    LEFT_OUT = "left_out"
    """We answered the steward, and our work is not in its commit."""
    STRANGE_CLOCK = "strange_clock"
    """A closing signed by somebody of whom we do not know that it hosts stage 0 (look stage 0 up); or of a round
    so far ahead that one peer's word does not do."""
    BALLOT_FAILED = "ballot_failed"
    """One attempt to average came to nothing (we were its steward)."""


@dataclass(frozen=True, slots=True)
class Report:
    """Something that people or the trust layer should know."""

    trouble: Trouble
    peer: PeerId | None = None
    detail: str = ""


Action = (
    Send
    | OpenRound
    | Freeze
    | Shut
    | StartReduce
    | AbortReduce
    | Fetch
    | Apply
    | Replay
    | Resync
    | NewLineage
    | BitsChanged
    | Left
    | Report
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Announce:
    """Internal: send to all of them at every tick until each has acknowledged."""

    to: frozenset[PeerId]
    message: StageMessage
    key: Digest = field(repr=False)


Step = Action | Announce
"""What the parts of a machine return to each other."""
