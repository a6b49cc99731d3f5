"""What replicas say to each other about rounds, and the three records that they sign.

Owns: the wire form of charters, closings and commits (the records) and of the messages around them, with
the bounds that keep a stranger's message small. Must not know: when any of them is sent, or what follows.

The records are signed because they are passed on by third parties. All other messages speak for their
sender alone, whose identity the transport has authenticated. Every message names its stage, so that a peer
with several stages can hand it to the right replica.
"""

from __future__ import annotations

from collections import Counter
from typing import Annotated, Self

from pydantic import Field, model_validator

from protocol.ids import DIGEST_BYTES, Digest, Lineage, PeerId, RoundId, RunId, StageId, Version
from protocol.signing import MAX_PEER_ID_CHARS, Signed
from protocol.wire import Message

CHARTER_CONTEXT = "handcar charter"
CLOSING_CONTEXT = "handcar closing"
COMMIT_CONTEXT = "handcar commit"

MAX_SEATS = 1000  # one stage; a commit for as many still fits a message
MAX_CREDITS = 2048  # (stage, peer) pairs of one round, about 70 bytes each
MAX_NUMBERS = 1 << 17  # training and evaluation microbatches of one round
MAX_DONE_PER_MESSAGE = 64  # of a short pipeline: the clock minds the bytes as well
MAX_EVIDENCE_BYTES = 160 * 1024  # a path of 256 peers takes 141 KiB; a longer one is none (`hops.MAX_PATH_ENTRIES`)
MAX_COMMITS_PER_ANSWER = 16
MAX_COUNT = 1 << 56
MAX_BALLOT = (1 << 31) - 1
MAX_NORM = 1e30  # the bounds of numbers keep sums and quotients of them finite and packable

Peer = Annotated[PeerId, Field(min_length=1, max_length=MAX_PEER_ID_CHARS)]
Run = Annotated[RunId, Field(min_length=1, max_length=64)]
Stage = Annotated[StageId, Field(ge=0, le=65_535)]
Round = Annotated[RoundId, Field(ge=0)]
StageVersion = Annotated[Version, Field(ge=0)]
Hash = Annotated[Digest, Field(min_length=DIGEST_BYTES, max_length=DIGEST_BYTES)]
Parent = Annotated[Lineage, Field(min_length=DIGEST_BYTES, max_length=DIGEST_BYTES)]
Count = Annotated[int, Field(ge=0, le=MAX_COUNT)]
TaskTokens = Annotated[int, Field(ge=0, le=1 << 32)]
Norm = Annotated[float, Field(ge=0, le=MAX_NORM)]
LossSum = Annotated[float, Field(ge=-1e15, le=1e15)]
Text = Annotated[str, Field(max_length=200)]
CodecName = Annotated[str, Field(min_length=1, max_length=16)]
Rate = Annotated[float, Field(ge=0, le=1e15)]
Session = Annotated[int, Field(ge=0, lt=1 << 63)]
"""Names one life of a replica; later lives have larger ones (say, the Unix time of its start in microseconds).

A machine that was made anew has forgotten its promises, so it is somebody else.
"""


class Seat(Message):
    """A place among a stage's members. It belongs to one life of a peer and ends with it."""

    peer: Peer
    session: Session


Seats = Annotated[tuple[Seat, ...], Field(max_length=MAX_SEATS)]


class Ballot(Message):
    """One attempt to end a round. Ordered by number, then by steward, so no two are equal."""

    number: Annotated[int, Field(ge=1, le=MAX_BALLOT)]
    steward: Peer

    def outranks(self, other: Ballot | None) -> bool:
        """Tell whether this ballot is newer than `other`."""
        return other is None or (self.number, self.steward) > (other.number, other.steward)


class Contribution(Message):
    """What a peer brings to an average."""

    peer: Peer
    tokens: Count
    """The target tokens that its accumulated gradient stands for, by its own word."""
    weight: Count
    """For how many of them it counts: those that it is credited with (0017)."""
    norm: Norm = 0.0
    """Its length (L2), by the peer's own word, which whoever adds it up compares with what came (0021)."""


class Credit(Message):
    """Target tokens that a peer carried through one stage, by the signed paths of finished microbatches."""

    stage: Stage
    peer: Peer
    tokens: Count


# -- the records -----------------------------------------------------------------------------------


class Charter(Message):
    """The coordinator's word on where a stage's lineage starts. The higher generation wins, always."""

    run: Run
    stage: Stage
    generation: Annotated[int, Field(ge=1)]
    round: Round
    """The first round that its members open."""
    version: StageVersion
    state_digest: Hash
    seats: Seats


class Closing(Message):
    """The clock's word that a round is over, with what was done in it. Bit i of `done` is number i, low bit first.

    Numbers below `num_train` carry gradient; the `num_eval` after them only measure.
    """

    run: Run
    round: Round
    num_train: Annotated[int, Field(ge=0, le=MAX_NUMBERS)]
    num_eval: Annotated[int, Field(ge=0, le=MAX_NUMBERS)]
    done: Annotated[bytes, Field(max_length=MAX_NUMBERS // 4)]
    loss_sum: float
    target_tokens: Count
    eval_loss_sum: float
    eval_tokens: Count
    credits: Annotated[tuple[Credit, ...], Field(max_length=MAX_CREDITS)]

    @model_validator(mode="after")
    def _bitmap_fits(self) -> Self:
        numbers = self.num_train + self.num_eval
        if len(self.done) != -(-numbers // 8) or int.from_bytes(self.done, "little") >> numbers:
            raise ValueError("the bitmap does not fit the numbers of the round")
        return self

    @property
    def carried(self) -> Counter[StageId]:
        """How many target tokens it credits at each stage, all peers together."""
        found = Counter[StageId]()
        for credit in self.credits:
            found[credit.stage] += credit.tokens
        return found

    @property
    def bits(self) -> int:
        """The bitmap as an integer."""
        return int.from_bytes(self.done, "little")

    @property
    def tasks_done(self) -> int:
        return (self.bits & ((1 << self.num_train) - 1)).bit_count()

    @property
    def tasks_lost(self) -> int:
        return self.num_train - self.tasks_done

    @property
    def evals_done(self) -> int:
        return (self.bits >> self.num_train).bit_count()


class RoundSummary(Message):
    """What a commit keeps of the closing that it was made under."""

    round: Round
    clock: Peer
    closing_digest: Hash
    tasks_done: Count
    tasks_lost: Count
    evals_done: Count
    loss_sum: float
    target_tokens: Count
    eval_loss_sum: float
    eval_tokens: Count


class Commit(Message):
    """The record that takes a stage from `parent` to the next version.

    `first_round < round` means that the rounds from `first_round` on were void for this stage: nothing had
    been accumulated by those who answered, or their closing was never heard.
    """

    run: Run
    stage: Stage
    generation: Annotated[int, Field(ge=1)]
    first_round: Round
    round: Round
    version: StageVersion
    """The version after this commit."""
    parent: Parent
    ballot: Ballot
    contributors: Annotated[tuple[Contribution, ...], Field(min_length=1, max_length=MAX_SEATS)]
    """In the order in which they were summed."""
    codec: CodecName
    """What the summed bytes are in."""
    digest: Hash
    """Of the summed bytes."""
    norm: Norm
    """Of the sum divided by the total tokens, as the steward computed it."""
    clip_scale: Annotated[float, Field(gt=0, le=1)]
    seats: Seats
    """The members of the next round."""
    speeds: Annotated[tuple[Rate, ...], Field(max_length=MAX_SEATS)]
    """How many tokens per second each of them has carried, by its own word; 0 where nobody knows yet."""
    joiners: Annotated[tuple[Peer, ...], Field(max_length=MAX_SEATS)]
    """Those among `seats` who listened so far and have to fetch the bytes."""
    summary: RoundSummary
    tokens_dropped: Count
    """Credited to peers of this stage whose sums are not in the average: their work died with them."""
    double_counted: Count
    """Accumulated beyond what was credited: done twice."""

    @model_validator(mode="after")
    def _every_seat_has_a_speed(self) -> Self:
        if len(self.speeds) != len(self.seats):
            raise ValueError("a commit has a speed for every seat")
        return self

    @property
    def total_tokens(self) -> int:
        """The tokens that count: the sum of all weights, by which sums are divided."""
        return sum(contribution.weight for contribution in self.contributors)


# -- feeders and clock (stage 0) -------------------------------------------------------------------


class StageMessage(Message):
    """Base of the messages about one stage."""

    stage: Stage


class DoneTask(Message):
    """A finished number and its proof: the signed path (`protocol.hops.Evidence`), opaque here."""

    number: Annotated[int, Field(ge=0, lt=2 * MAX_NUMBERS)]
    evidence: Annotated[bytes, Field(max_length=MAX_EVIDENCE_BYTES)]
    loss_sum: LossSum
    target_tokens: TaskTokens
    credits: Annotated[tuple[Credit, ...], Field(max_length=256)]


class DoneReport(StageMessage):
    """Feeder to clock, every beat: what I know to be done and you do not."""

    round: Round
    tasks: Annotated[tuple[DoneTask, ...], Field(max_length=MAX_DONE_PER_MESSAGE)]


class DoneUnion(StageMessage):
    """Clock to feeder: everything that I know to be done, as a bitmap."""

    round: Round
    done: Annotated[bytes, Field(max_length=MAX_NUMBERS // 4)]


class ClosingNotice(StageMessage):
    """A round is over, for all stages: the receiving peer passes it to each of its replicas.

    `stage` is the sender's; that is where the acknowledgement goes. Repeated until then.
    """

    closing: Signed


class AskClosing(StageMessage):
    """To a replica of any stage: I hold no closing newer than `newest` (-1: none at all)."""

    newest: Annotated[int, Field(ge=-1)]


class Ack(StageMessage):
    """I have the record with this digest."""

    of: Hash


# -- ballots ---------------------------------------------------------------------------------------


class BallotMessage(StageMessage):
    """Base of the messages of one ballot over the successor of `parent`."""

    parent: Parent
    ballot: Ballot


class Ping(BallotMessage):
    """Who is there? Answering promises to ignore every older ballot."""

    generation: Annotated[int, Field(ge=1)]
    closing: Signed


class Vote(Message):
    """The commit that a member has accepted, and in which ballot."""

    ballot: Ballot
    commit: Signed


class Pong(BallotMessage):
    """I am here. `tokens` is missing while the last tasks of the round are still being finished."""

    tokens: Count | None
    vote: Vote | None
    leaving: bool
    norm: Norm = 0.0
    """Of what we bring (L2)."""
    bytes_per_s: Rate | None = None
    """What I could send while the last average was made here."""
    tokens_per_s: Rate | None = None
    """How fast I was when I last had something to do."""


class Outbid(StageMessage):
    """I have promised `promised`, which is newer than yours."""

    parent: Parent
    promised: Ballot


class Begin(BallotMessage):
    """Sum these, in this order, for the commit after `round`."""

    round: Round
    codec: CodecName
    group_id: Hash
    group: Annotated[tuple[Contribution, ...], Field(min_length=1, max_length=MAX_SEATS)]


class ReduceResult(BallotMessage):
    """How the reduce ended here: the digest of the summed bytes, or why there is none."""

    group_id: Hash
    digest: Hash | None
    norm: Norm = 0.0
    reason: Text = ""
    suspect: Peer | None = None


class Propose(BallotMessage):
    """Accept this commit? `sources` hold its bytes."""

    commit: Signed
    sources: Annotated[tuple[Peer, ...], Field(max_length=MAX_SEATS)]


class Accept(BallotMessage):
    """I hold the bytes, have checked the commit, and will name it to every later steward."""


class Decline(BallotMessage):
    """I cannot accept that: its bytes are out of reach, or (`objection`) I hold it for wrong."""

    reason: Text
    objection: bool


class StillHere(BallotMessage):
    """The steward is alive and waiting for others; or a voter, asked again, is still fetching the bytes."""


class VoidRound(StageMessage):
    """Nothing had been accumulated in `round` and before: go on with the next, nothing has changed."""

    parent: Parent
    ballot: Ballot
    round: Round


class Committed(StageMessage):
    """Every voter has accepted this commit: it is final. Repeated until acknowledged."""

    commit: Signed


# -- keeping up ------------------------------------------------------------------------------------


class Hello(StageMessage):
    """Where I stand. Sent to somebody else every few seconds, so that nothing lost stays lost."""

    session: Session
    generation: Annotated[int, Field(ge=1)]
    lineage: Parent
    version: StageVersion
    applied: bool
    """The state of `lineage` is in place, not only known."""
    state_digest: Hash | None
    closed: Annotated[int, Field(ge=-1)]
    """The newest round whose closing I hold; -1: none."""


class Ready(StageMessage):
    """A joiner to the members: I hold the state of `lineage`, give me a seat."""

    session: Session
    generation: Annotated[int, Field(ge=1)]
    lineage: Parent
    version: StageVersion
    state_digest: Hash | None


class Goodbye(StageMessage):
    """This process ends now."""

    session: Session


class AskChain(StageMessage):
    """What came after `lineage`?"""

    generation: Annotated[int, Field(ge=1)]
    lineage: Parent
    version: StageVersion


class ChainAnswer(StageMessage):
    """The commits after the asked lineage, oldest first, if `known`; and where the answerer stands."""

    known: bool
    charter: Signed
    commits: Annotated[tuple[Signed, ...], Field(max_length=MAX_COMMITS_PER_ANSWER)]
    lineage: Parent
    version: StageVersion
    oldest_version: StageVersion
    """Lineages of versions before this one are not kept any more."""


class CharterNotice(StageMessage):
    """The coordinator's (or anybody's copy of the coordinator's) newest charter for this stage."""

    charter: Signed


ROUND_MESSAGES: tuple[type[StageMessage], ...] = (
    DoneReport,
    DoneUnion,
    ClosingNotice,
    AskClosing,
    Ack,
    Ping,
    Pong,
    Outbid,
    Begin,
    ReduceResult,
    Propose,
    Accept,
    Decline,
    StillHere,
    VoidRound,
    Committed,
    Hello,
    Ready,
    Goodbye,
    AskChain,
    ChainAnswer,
    CharterNotice,
)
"""All that a driver has to accept from the network and pass on as `Received`."""
