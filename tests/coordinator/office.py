"""A coordinator's services on a clock that stands still, and volunteers who only talk.

Everything is real but the network and the time: SQLite, signatures, messages. `office` is the fixture.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from coordinator.app import Services, make_services
from coordinator.clock import Clock
from coordinator.rundir import RunDir
from coordinator.settings import CoordinatorSettings
from coordinator.store.database import DATABASE_FILE, Database
from protocol.control import (
    AveragingReport,
    Beat,
    BeatReply,
    Capability,
    ClosingReport,
    CommitReport,
    NumberedReport,
    PeerState,
    Register,
    Report,
    Snapshot,
    StageState,
    Welcome,
    WorkReport,
)
from protocol.ids import Digest, Lineage, PeerId, RoundId, StageId, Version, digest
from protocol.manifest import MANIFEST_CONTEXT, Manifest
from protocol.rounds.lineage import next_lineage
from protocol.rounds.messages import (
    CHARTER_CONTEXT,
    CLOSING_CONTEXT,
    COMMIT_CONTEXT,
    Ballot,
    Charter,
    Closing,
    Commit,
    Contribution,
    RoundSummary,
    Seat,
)
from protocol.signing import Signed, SigningKey, seal, unseal
from protocol.wire import PROTOCOL_VERSION
from tests.protocol.manifests import KEY, manifest

START_WALL_S = 1_700_000_000.0
NO_LINEAGE = Lineage(bytes(32))
INITIAL = digest(b"initial state")


@dataclass(slots=True)
class StoppedTime:
    """Time that passes when a test says so."""

    now_s: float = 0.0

    def advance(self, seconds: float) -> None:
        self.now_s += seconds

    @property
    def clock(self) -> Clock:
        return Clock(monotonic=lambda: 5_000.0 + self.now_s, wall=lambda: START_WALL_S + self.now_s)


@dataclass(slots=True)
class Office:
    """Services, their time, and shorthands for what volunteers say."""

    services: Services
    time: StoppedTime

    @property
    def manifest(self) -> Manifest:
        return self.services.run.manifest

    async def join(self, volunteer: Volunteer, **changes: Any) -> Welcome:
        """Register a volunteer."""
        request = volunteer.request(self.manifest, {"clock_s": START_WALL_S + self.time.now_s, **changes})
        return await self.services.registry.register(volunteer.peer, request)

    async def beat(self, volunteer: Volunteer, *states: StageState, **changes: Any) -> BeatReply:
        """Send one beat."""
        return await self.services.registry.beat(
            volunteer.peer, beat(*states, **{"process": volunteer.process, **changes})
        )

    async def tick(self, seconds: float = 0.0) -> None:
        """Let time pass, and then one tick."""
        self.time.advance(seconds)
        await self.services.tick(None)

    def charters(self) -> dict[StageId, Charter]:
        """Return the newest charters, verified."""
        found = [
            unseal(signed, CHARTER_CONTEXT, Charter, signer=KEY.peer_id) for signed in self.services.charters.newest()
        ]
        return {charter.stage: charter for charter in found}

    def charter_lineage(self, stage: int) -> Lineage:
        """Return where a stage's newest lineage begins."""
        (signed,) = (one for one in self.services.charters.newest() if Charter.from_bytes(one.payload).stage == stage)
        return Lineage(digest(CHARTER_CONTEXT.encode(), signed.payload))


@dataclass(slots=True)
class Volunteer:
    """A peer that only talks."""

    name: str
    session: int = 1
    process: int = 1
    key: SigningKey = field(init=False)

    def __post_init__(self) -> None:
        self.key = SigningKey(digest(self.name.encode()))

    @property
    def peer(self) -> PeerId:
        return self.key.peer_id

    @property
    def seat(self) -> Seat:
        return Seat(peer=self.peer, session=self.session)

    def request(self, of: Manifest, changes: Mapping[str, Any]) -> Register:
        """Return a registration with these changes."""
        fields: dict[str, Any] = {
            "protocol": PROTOCOL_VERSION,
            "run": of.run_id,
            "session": self.session,
            "process": self.process,
            "name": self.name,
            "token": None,
            "capability": Capability(device="cpu", threads=1, memory_bytes=1 << 30, software="test"),
            "clock_s": START_WALL_S,
            "addresses": (f"/ip4/192.0.2.1/tcp/4001/p2p/{self.peer}",),
        }
        return Register(**{**fields, **changes})


def beat(*states: StageState, reports: Sequence[tuple[int, Report]] = (), **changes: Any) -> Beat:
    """Return a beat; change what you like."""
    fields: dict[str, Any] = {
        "state": PeerState.TRAINING,
        "addresses": (),
        "stages": states,
        "reports": tuple(NumberedReport(sequence=sequence, report=report) for sequence, report in reports),
    }
    return Beat(**(fields | changes))


def state(stage: int, **changes: Any) -> StageState:
    """Return a replica that is ready at the initial state and a member of nothing; change what you like."""
    fields: dict[str, Any] = {
        "stage": StageId(stage),
        "round": RoundId(0),
        "version": Version(0),
        "lineage": NO_LINEAGE,
        "ready": True,
        "members": 0,
        "state_digest": INITIAL,
    }
    return StageState(**(fields | changes))


def snapshot(stage: int, round_id: int, *, files: Any = (), version: int | None = None) -> Snapshot:
    """Return an offer of a stage's state."""
    return Snapshot(
        stage=StageId(stage),
        round=RoundId(round_id),
        version=Version(round_id if version is None else version),
        lineage=Lineage(bytes([stage, round_id]) * 16),
        files=tuple(files),
    )


def closing(of: Manifest, round_id: int, /, *, tasks: int | None = None, **changes: Any) -> Closing:
    """Return the closing of a training round with `tasks` of its microbatches (all by default), without evaluation."""
    batch = of.batch
    finished = batch.microbatches_per_round if tasks is None else tasks
    tokens = finished * batch.sequences_per_microbatch * batch.sequence_length
    fields: dict[str, Any] = {
        "run": of.run_id,
        "round": RoundId(round_id),
        "num_train": batch.microbatches_per_round,
        "num_eval": 0,
        "done": ((1 << finished) - 1).to_bytes(-(-batch.microbatches_per_round // 8), "little"),
        "loss_sum": 5.0 * tokens,
        "target_tokens": tokens,
        "eval_loss_sum": 0.0,
        "eval_tokens": 0,
        "credits": (),
    }
    return Closing(**(fields | changes))


def commit(
    of: Manifest,
    stage: int,
    under: Signed,
    /,
    *,
    members: Sequence[Volunteer],
    parent: Lineage,
    joiners: Sequence[Volunteer] = (),
    **changes: Any,
) -> Commit:
    """Return the commit that members make under a signed closing; change what you like."""
    closed = Closing.from_bytes(under.payload)
    share = closed.target_tokens // len(members)
    fields: dict[str, Any] = {
        "run": of.run_id,
        "stage": StageId(stage),
        "generation": 1,
        "first_round": closed.round,
        "round": closed.round,
        "version": Version(closed.round + 1),
        "parent": parent,
        "ballot": Ballot(number=1, steward=members[0].peer),
        "contributors": tuple(Contribution(peer=member.peer, tokens=share, weight=share) for member in members),
        "codec": "fp32",
        "digest": digest(b"update", bytes([stage])),
        "norm": 1.0,
        "clip_scale": 1.0,
        "seats": tuple(member.seat for member in (*members, *joiners)),
        "speeds": (0.0,) * (len(members) + len(joiners)),
        "joiners": tuple(joiner.peer for joiner in joiners),
        "summary": RoundSummary(
            round=closed.round,
            clock=under.signer,
            closing_digest=digest(under.payload),
            tasks_done=closed.tasks_done,
            tasks_lost=closed.tasks_lost,
            evals_done=closed.evals_done,
            loss_sum=closed.loss_sum,
            target_tokens=closed.target_tokens,
            eval_loss_sum=closed.eval_loss_sum,
            eval_tokens=closed.eval_tokens,
        ),
        "tokens_dropped": 0,
        "double_counted": 0,
    }
    return Commit(**(fields | changes))


def sign_closing(by: Volunteer, message: Closing) -> Signed:
    """Sign as a clock does."""
    return seal(by.key, CLOSING_CONTEXT, message)


def sign_commit(by: Volunteer, message: Commit) -> Signed:
    """Sign as a steward does."""
    return seal(by.key, COMMIT_CONTEXT, message)


def lineage_of(signed: Signed) -> Lineage:
    """Return the lineage that a signed commit leads to."""
    return next_lineage(Commit.from_bytes(signed.payload).parent, signed.payload)


def closing_report(signed: Signed) -> ClosingReport:
    """Wrap a closing."""
    return ClosingReport(closing=signed)


def commit_report(signed: Signed) -> CommitReport:
    """Wrap a commit."""
    return CommitReport(commit=signed)


def averaging(stage: int, round_id: int, **changes: Any) -> AveragingReport:
    """Return a report of an attempt that went well between two of two; change what you like."""
    fields: dict[str, Any] = {
        "stage": StageId(stage),
        "round": RoundId(round_id),
        "ballot": 1,
        "group": Digest(bytes([round_id]) * 32),
        "members": 2,
        "asked": 2,
        "ok": True,
        "bytes_sent": 1000,
        "bytes_received": 1000,
        "seconds": 0.5,
    }
    return AveragingReport(**(fields | changes))


def work(round_id: int, **changes: Any) -> WorkReport:
    """Return a report of a round's work; change what you like."""
    fields: dict[str, Any] = {
        "round": RoundId(round_id),
        "tasks_fed": 4,
        "tasks_resent": 0,
        "hops": 4,
        "activation_bytes": 4096,
        "target_tokens": 256,
        "seconds": 2.0,
        "compute_seconds": 1.0,
    }
    return WorkReport(**(fields | changes))


def state_file_digest(data: bytes) -> Digest:
    """Return the digest that a snapshot would name."""
    return digest(data)


@asynccontextmanager
async def open_office(
    folder: Path, *, time: StoppedTime | None = None, run: Manifest | None = None, **settings: Any
) -> AsyncIterator[Office]:
    """Open the services of a run in `folder`; opening the same folder again is a restart."""
    run = run or manifest()
    time = time or StoppedTime()
    directory = RunDir(folder, KEY, seal(KEY, MANIFEST_CONTEXT, run), run)
    database = await Database.open(folder / DATABASE_FILE)
    try:
        services = make_services(directory, CoordinatorSettings(**settings), database=database, clock=time.clock)
        await services.load()
        yield Office(services, time)
    finally:
        await database.close()
