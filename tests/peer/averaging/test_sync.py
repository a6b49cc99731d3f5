"""Following members that lie, fail or disagree: whatever one of them sends, the next one is asked.

The network is played; charters are really signed and checked, the stage is a real one at version 0, where the
initial state needs no snapshot. Oracle: who was asked, and the place that comes out.
"""

from __future__ import annotations

import asyncio
import io
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from safetensors.torch import save

from peer.averaging import sync
from peer.averaging.absorb import Update, absorb
from peer.averaging.history import History
from peer.averaging.spool import Spool
from peer.averaging.sync import Place, StageSync, to_its_end
from peer.engine.local_checkpoint import Standing
from peer.engine.optimizer import OptimizerSpec
from peer.engine.schedule import LearningRate
from peer.engine.stage_engine import StageEngine
from peer.engine.statefiles import StateReader, UnfitState
from peer.memory.disk.wear import WriteBudgetSpent
from peer.pipeline.compute import ComputeThread
from protocol.architecture import preset
from protocol.control import STATE_PARTS, Snapshot, StateFile
from protocol.errors import (
    DeadlineError,
    PeerFault,
    RefusedError,
    StorageError,
    SwarmError,
    TransientError,
    UnreachableError,
    WireError,
)
from protocol.history import LogAnswer, LogRequest, StateAnswer, StateRequest
from protocol.ids import Lineage, PeerId, RoundId, StageId, Version, digest
from protocol.rounds.lineage import next_lineage, root_lineage
from protocol.rounds.messages import (
    CHARTER_CONTEXT,
    COMMIT_CONTEXT,
    Ballot,
    Charter,
    Commit,
    Contribution,
    RoundSummary,
    Seat,
)
from protocol.signing import Signed, SigningKey, seal
from protocol.transport.blobs import Blobs
from protocol.transport.calls import Calls
from protocol.wire import Message
from tests.peer.averaging.lineage_check import RUN, STAGE, check_of

ME, ANNE, BERT, CARL = PeerId("me"), PeerId("anne"), PeerId("bert"), PeerId("carl")
COORDINATOR, MEMBER, STRANGER = SigningKey.generate(), SigningKey.generate(), SigningKey.generate()
CHECK = check_of(ME, MEMBER, coordinator=COORDINATOR)


def charter(generation: int = 1, *, key: SigningKey = COORDINATOR, stage: StageId = STAGE) -> Signed:
    fields = Charter(
        run=RUN,
        stage=stage,
        generation=generation,
        round=RoundId(0),
        version=Version(0),
        state_digest=digest(b"state"),
        seats=(Seat(peer=MEMBER.peer_id, session=1),),
    )
    return seal(key, CHARTER_CONTEXT, fields)


def answer(signed: Signed | None, *snapshots: Snapshot) -> StateAnswer:
    return StateAnswer(charter=signed, commit=None, version=Version(0), lineage=Lineage(bytes(32)), snapshots=snapshots)


class Network:
    """What each member answers to a call: a message, or the error that the call ends in."""

    def __init__(self) -> None:
        self.states: dict[PeerId, StateAnswer | SwarmError] = {}
        self.logs: dict[PeerId, LogAnswer | SwarmError] = {}
        self.asked: list[tuple[PeerId, str]] = []
        self.blobs: dict[str, bytes] = {}
        self.blob_error: SwarmError = UnreachableError("nobody")

    async def call(self, peer: PeerId, request: Message, response: type[Message]) -> Message:
        self.asked.append((peer, type(request).__name__))
        said: Message | SwarmError
        if isinstance(request, StateRequest):
            said = self.states[peer]
        else:
            assert isinstance(request, LogRequest)
            said = self.logs.get(peer, LogAnswer(commits=()))
        if isinstance(said, SwarmError):
            raise said
        return said

    async def fetch_range(self, peer: PeerId, name: str, *, offset: int, length: int) -> tuple[bytes, int]:
        if name not in self.blobs:
            raise self.blob_error
        data = self.blobs[name]
        return data[offset : offset + length], len(data)


class Case:
    def __init__(self, folder: Path) -> None:
        self.network = Network()
        self.folder = folder
        self.refused: set[Signed] = set()
        self.history = History(folder, stage=STAGE)
        self.compute = ComputeThread()
        self.engine = StageEngine.build(
            preset("tiny"), num_stages=2, stage=STAGE, optimizer=OptimizerSpec(name="adamw32"), seed=1
        )
        self.sync = StageSync(
            STAGE,
            engine=self.engine,
            history=self.history,
            compute=self.compute,
            calls=cast(Calls, self.network),
            blobs=cast(Blobs, self.network),
            me=ME,
            coordinator=COORDINATOR.peer_id,
            schedule=LearningRate(peak=1e-2, warmup=0, total=10),
            check_history=self._check,
        )

    def _check(self, signed: Signed, commits: tuple[Signed, ...]) -> None:
        if signed in self.refused:
            raise PeerFault("its rounds do not follow")
        CHECK(signed, commits)

    async def follow(self, **options: Any) -> Any:
        try:
            return await self.sync.from_members(self.network.states, **options)
        finally:
            await self.compute.stop()


@pytest.fixture
async def case(tmp_path: Path) -> Case:
    return Case(tmp_path)


@pytest.mark.parametrize(
    "wrong",
    [
        charter(generation=9, key=STRANGER),
        charter(generation=9, stage=StageId(0)),
        Signed(payload=b"junk", signer=COORDINATOR.peer_id, signature=bytes(64)),
        None,
    ],
    ids=["forged", "another stage", "junk", "none"],
)
async def test_a_member_with_a_wrong_charter_is_passed_over(case: Case, wrong: Signed | None) -> None:
    honest = charter()
    case.network.states = {ANNE: answer(wrong), BERT: answer(honest)}
    assert (await case.follow()).charter == honest
    assert (ANNE, "LogRequest") not in case.network.asked


@pytest.mark.parametrize("kind", [TransientError, WireError, PeerFault, RefusedError])
async def test_whatever_a_member_fails_with_the_next_one_is_followed(case: Case, kind: type[SwarmError]) -> None:
    """One that was moved to another stage meanwhile refuses; that is no reason to leave the swarm."""
    honest = charter()
    case.network.states = {ANNE: answer(honest), BERT: answer(honest)}
    case.network.logs[ANNE] = kind("not any more")
    assert (await case.follow()).charter == honest
    assert case.network.asked[-1] == (BERT, "LogRequest")


async def test_a_full_disk_of_ours_is_not_blamed_on_the_members(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """Asking the next one would go on for ever, and nobody would learn why."""
    files = dict.fromkeys(STATE_PARTS, b"something")
    case.network.blobs = {f"state/{STAGE}/0/{part}": b"something" for part in STATE_PARTS}
    case.network.states = {peer: answer(charter(), snapshot(files)) for peer in (ANNE, BERT)}

    def no_room(*_: object) -> Path:
        return Path("/dev/full")

    monkeypatch.setattr(case.history, "incoming_path", no_room)
    monkeypatch.setattr(Path, "unlink", lambda *_, **__: None)
    with pytest.raises(StorageError, match="No space left"):
        await case.follow()


async def test_a_version_that_only_one_member_claims_is_not_followed_first(case: Case) -> None:
    """Oracle: who is asked for the log. Two that agree go before one that is ahead of them, and not before an equal."""
    signed = charter()
    alone = answer(signed).model_copy(update={"version": Version(90), "lineage": Lineage(b"9" * 32)})
    case.network.states = {ANNE: alone, BERT: answer(signed), CARL: answer(signed)}
    assert (await case.follow()).charter == signed
    assert [peer for peer, asked in case.network.asked if asked == "LogRequest"] == [BERT]


async def test_among_as_many_the_newest_version_is_followed_first(case: Case) -> None:
    """But not if it sends nothing of what led there: it may have dropped that. Oracle: who is asked, in order."""
    signed = charter()
    newer = answer(signed).model_copy(update={"version": Version(3), "lineage": Lineage(b"3" * 32)})
    case.network.states = {ANNE: answer(signed), BERT: newer, CARL: UnreachableError("gone")}
    place = await case.follow()
    assert [peer for peer, asked in case.network.asked if asked == "LogRequest"] == [BERT, ANNE]
    assert place.version == answer(signed).version


async def test_a_history_that_breaks_the_rules_is_no_history(case: Case) -> None:
    """The round machine would refuse it later, and stand nowhere."""
    old, new = charter(1), charter(2)
    case.network.states = {ANNE: answer(new), BERT: answer(old)}
    case.refused = {new}
    with pytest.raises(UnreachableError, match="nobody could bring us"):
        await case.follow()


async def test_members_that_have_not_heard_of_the_charter_yet_are_not_followed(case: Case) -> None:
    case.network.states = {ANNE: answer(charter(1)), BERT: UnreachableError("gone")}
    with pytest.raises(UnreachableError, match="no member"):
        await case.follow(least_generation=2)


async def test_nobody_there_is_said_so(case: Case) -> None:
    case.network.states = {ANNE: UnreachableError("gone"), BERT: RefusedError("no")}
    with pytest.raises(UnreachableError, match="no member"):
        await case.follow()


def snapshot(files: dict[str, bytes], *, num_bytes: int | None = None) -> Snapshot:
    state_files = tuple(
        StateFile(part=part, num_bytes=num_bytes or len(data), digest=digest(data)) for part, data in files.items()
    )
    return Snapshot(stage=STAGE, round=RoundId(0), version=Version(0), lineage=Lineage(bytes(32)), files=state_files)


async def test_a_file_that_the_stage_cannot_have_is_not_fetched(case: Case) -> None:
    """A terabyte would be written to the volunteer's disk until that is full."""
    huge = snapshot(dict.fromkeys(STATE_PARTS, b"x"), num_bytes=1 << 40)
    case.network.states = {ANNE: answer(charter(), huge), BERT: UnreachableError("gone")}
    with pytest.raises(UnreachableError):
        await case.follow()
    assert list(case.folder.iterdir()) == []


@pytest.mark.parametrize("last", ["gone", "wrong hash", "no tensors"])
async def test_what_was_fetched_in_vain_does_not_stay(case: Case, last: str) -> None:
    """Nor does a file whose hash fits and which holds no tensors end the peer."""
    files = dict.fromkeys(STATE_PARTS, b"these are no tensors")
    offered = snapshot(files)
    served = b"these are no tensorz" if last == "wrong hash" else b"these are no tensors"
    case.network.blobs = {f"state/{STAGE}/0/{part}": served for part in STATE_PARTS}
    if last == "gone":
        del case.network.blobs[f"state/{STAGE}/0/{STATE_PARTS[0]}"]
    case.network.states = {ANNE: answer(charter(), offered), BERT: UnreachableError("gone")}
    with pytest.raises(UnreachableError):
        await case.follow()
    assert [path for path in case.folder.iterdir() if STATE_PARTS[0] in path.name] == []


async def test_tensors_of_another_stage_are_that_members_fault_and_do_not_stay(case: Case) -> None:
    """Oracle: the next member is followed; what the first one promised is not served on as our own snapshot."""
    files = dict.fromkeys(STATE_PARTS, save({"nothing.of.ours": torch.zeros(3)}))
    case.network.blobs = {f"state/{STAGE}/0/{part}": data for part, data in files.items()}
    case.network.states = {ANNE: answer(charter(), snapshot(files)), BERT: answer(charter())}
    assert (await case.follow()).version == 0
    assert case.history.snapshots() == ()
    assert list(case.folder.iterdir()) == []


def commit(data: bytes) -> Commit:
    """What a fetch looks at of a commit."""
    return cast(
        Commit, SimpleNamespace(codec="fp32", round=0, version=Version(1), digest=digest(data), contributors=())
    )


async def test_a_source_that_takes_for_ever_does_not_keep_us_from_the_next(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: the second source's bytes; and an error, long before the slow ones would be done, if all are slow."""
    monkeypatch.setattr(sync, "FETCH_PATIENCE_S", 0.02)
    monkeypatch.setattr(sync, "MIN_BYTES_PER_S", 1e12)
    slow = [PeerId(f"slow-{number}") for number in range(9)]

    async def fetch(source: PeerId, name: str, make_room: object, *, max_bytes: int) -> bytes:
        if source in slow:
            await asyncio.sleep(60)
        return b"the sum"

    monkeypatch.setattr(case.network, "fetch_into", fetch, raising=False)
    assert (await case.sync.fetch_update(commit(b"the sum"), [slow[0], ANNE])).data == b"the sum"
    with pytest.raises(DeadlineError):
        await case.sync.fetch_update(commit(b"the sum"), slow)
    await case.compute.stop()


async def test_what_changes_the_engine_runs_to_its_end_before_its_caller_is_stopped() -> None:
    """Oracle: what the work did, however often its caller was cancelled; then the cancellation."""
    done: list[str] = []

    async def change() -> None:
        await asyncio.sleep(0.02)
        done.append("changed")

    caller = asyncio.create_task(to_its_end(change()))
    for _ in range(3):
        await asyncio.sleep(0.001)
        caller.cancel()
    with pytest.raises(asyncio.CancelledError):
        await caller
    assert done == ["changed"]


async def test_a_step_is_checked_where_it_is_taken(case: Case) -> None:
    """Two steps to the same version, the second queued while the first runs. Oracle: one step, one error."""
    zeros = b"".join(bytes(4 * shard.num_elements) for shard in case.engine.shards)
    step = cast(Commit, SimpleNamespace(codec="fp32", round=0, version=Version(1), contributors=(), clip_scale=1.0))
    taken = [case.sync.absorb(step, Update("fp32", zeros, (1,))) for _ in range(2)]
    outcomes = await asyncio.gather(*taken, return_exceptions=True)
    await case.compute.stop()
    assert outcomes[0] is None
    assert isinstance(outcomes[1], PeerFault)
    assert case.engine.version == 1


async def test_a_cancelled_change_does_not_go_on_when_its_last_step_fails() -> None:
    """Its caller would take the failure for an answer and try the next source. Oracle: the task is cancelled."""
    go = asyncio.Event()

    async def step() -> None:
        await go.wait()
        raise PeerFault("nonsense")

    changing = asyncio.create_task(to_its_end(step()))
    await asyncio.sleep(0)
    changing.cancel()
    await asyncio.sleep(0)
    go.set()
    with pytest.raises(asyncio.CancelledError):
        await changing
    assert changing.cancelled()


# -- a state that was on our own disk ---------------------------------------------------------------------------------

NUM_COMMITS = 4


class Swarm(Network):
    """Members that serve a real lineage: a charter, commits, their updates and a snapshot at version 3."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        self.signed = charter()
        self.lineages = [root_lineage(self.signed)]
        self.commits: list[Signed] = []
        self.digests = [case.engine.state_digest()]
        self.fetched: list[str] = []
        self.since: list[int] = []
        self.lost: set[int] = set()
        """Versions whose commits the members do not keep any more."""
        random = torch.Generator().manual_seed(1)
        reference = _engine()
        for version in range(1, NUM_COMMITS + 1):
            values = torch.randn(sum(shard.num_elements for shard in reference.shards), generator=random)
            data = values.numpy().tobytes()
            signed = _commit(version, self.lineages[-1], data)
            self.commits.append(signed)
            self.lineages.append(next_lineage(self.lineages[-1], signed.payload))
            self.blobs[f"update/{STAGE}/{version - 1}"] = data
            absorb(
                reference,
                Update("fp32", data, (10,)),
                clip_scale=1.0,
                schedule=LearningRate(peak=1e-2, warmup=0, total=10),
            )
            self.digests.append(reference.state_digest())
            if version == 3:
                self._serve(reference)

    def _serve(self, engine: StageEngine) -> None:
        files = {part: io.BytesIO() for part in STATE_PARTS}
        engine.write_state(files)
        saved = {part: file.getvalue() for part, file in files.items()}
        self.blobs |= {f"state/{STAGE}/3/{part}": data for part, data in saved.items()}
        offered = snapshot(saved).model_copy(
            update={"version": Version(3), "round": RoundId(3), "lineage": self.lineages[3]}
        )
        self.states[ANNE] = StateAnswer(
            charter=self.signed,
            commit=self.commits[-1],
            version=Version(NUM_COMMITS),
            lineage=self.lineages[-1],
            snapshots=(offered,),
        )
        self.states[BERT] = UnreachableError("gone")

    async def call(self, peer: PeerId, request: Message, response: type[Message]) -> Message:
        if isinstance(request, LogRequest):
            self.since.append(request.since)
            later = self.commits[request.since :]
            return LogAnswer(commits=() if request.since + 1 in self.lost else tuple(later))
        return await super().call(peer, request, response)

    async def fetch_range(self, peer: PeerId, name: str, *, offset: int, length: int) -> tuple[bytes, int]:
        self.fetched.append(name)
        return await super().fetch_range(peer, name, offset=offset, length=length)

    async def fetch_into(
        self, peer: PeerId, name: str, make_room: Callable[[int], memoryview], *, max_bytes: int
    ) -> memoryview:
        if name not in self.blobs:
            raise self.blob_error
        data = self.blobs[name]
        assert len(data) <= max_bytes
        self.fetched.append(name)
        room = make_room(len(data))
        room[:] = data
        return room


def _engine(seed: int = 1) -> StageEngine:
    return StageEngine.build(
        preset("tiny"), num_stages=2, stage=STAGE, optimizer=OptimizerSpec(name="adamw32"), seed=seed
    )


def _commit(version: int, parent: Lineage, data: bytes, *, by: SigningKey = MEMBER) -> Signed:
    me = MEMBER.peer_id
    fields = Commit(
        run=RUN,
        stage=STAGE,
        generation=1,
        first_round=RoundId(version - 1),
        round=RoundId(version - 1),
        version=Version(version),
        parent=parent,
        ballot=Ballot(number=1, steward=me),
        contributors=(Contribution(peer=me, tokens=10, weight=10),),
        codec="fp32",
        digest=digest(data),
        norm=1.0,
        clip_scale=1.0,
        seats=(Seat(peer=me, session=1),),
        speeds=(0.0,),
        joiners=(),
        summary=RoundSummary(
            round=RoundId(version - 1),
            clock=me,
            closing_digest=digest(b"closing"),
            tasks_done=1,
            tasks_lost=0,
            evals_done=0,
            loss_sum=1.0,
            target_tokens=10,
            eval_loss_sum=0.0,
            eval_tokens=0,
        ),
        tokens_dropped=0,
        double_counted=0,
    )
    return seal(by, COMMIT_CONTEXT, fields)


def resume(case: Case, version: int, lineage: Lineage) -> Swarm:
    """Let the case's engine stand at a version of the members' lineage, as it would after a restart, and call it
    `lineage`."""
    swarm = Swarm(case)
    for number in range(version):
        data = swarm.blobs[f"update/{STAGE}/{number}"]
        absorb(case.engine, Update("fp32", data, (10,)), clip_scale=1.0, schedule=case.sync._schedule)
    _use(case, swarm, Standing(Version(version), RoundId(version), lineage))
    return swarm


def _use(case: Case, swarm: Swarm, standing: Standing) -> None:
    case.network = swarm
    case.sync = StageSync(
        STAGE,
        engine=case.engine,
        history=case.history,
        compute=case.compute,
        calls=cast(Calls, swarm),
        blobs=cast(Blobs, swarm),
        me=ME,
        coordinator=COORDINATOR.peer_id,
        schedule=LearningRate(peak=1e-2, warmup=0, total=10),
        check_history=case._check,
        init_seed=1,
        resumed=standing,
    )


async def follow(case: Case, swarm: Swarm) -> Place:
    place: Place = await case.follow()
    assert (place.version, place.round, place.lineage) == (NUM_COMMITS, NUM_COMMITS, swarm.lineages[-1])
    assert case.engine.state_digest() == swarm.digests[-1]
    return place


@pytest.mark.parametrize("version", [1, 2, 3, 4])
async def test_our_own_state_is_taken_if_the_members_have_passed_through_it(case: Case, version: int) -> None:
    """Oracle: what was fetched: only the updates after it; the members' own digest; the commits, from the one that led
    to it on."""
    swarm = resume(case, version, Lineage(b""))
    _use(case, swarm, Standing(Version(version), RoundId(version), swarm.lineages[version]))
    place = await follow(case, swarm)
    assert swarm.fetched == [f"update/{STAGE}/{number}" for number in range(version, NUM_COMMITS)]
    assert list(place.commits) == swarm.commits[version - 1 :]
    assert case.history.commit_of(Version(version - 1)) == swarm.commits[version - 1]


async def test_a_commit_that_no_member_has_signed_changes_nothing(case: Case) -> None:
    """Somebody who was let in shows the genuine history, and one more commit of its own. Oracle: the engine is where
    the members are, and so is our log; whoever is asked next is followed from there."""
    swarm = resume(case, 3, Lineage(b""))
    _use(case, swarm, Standing(Version(3), RoundId(3), swarm.lineages[3]))
    data = swarm.blobs[f"update/{STAGE}/3"]
    genuine = _commit(NUM_COMMITS + 1, swarm.lineages[-1], data)
    forged = _commit(NUM_COMMITS + 1, swarm.lineages[-1], data[:-1] + b"x", by=STRANGER)
    case.history.append(Version(NUM_COMMITS), data, genuine)
    swarm.blobs[f"update/{STAGE}/{NUM_COMMITS}"] = data[:-1] + b"x"
    swarm.states[ANNE] = swarm.states[ANNE].model_copy(update={"snapshots": ()})  # type: ignore[union-attr]
    swarm.commits.append(forged)
    with pytest.raises(UnreachableError):
        await case.sync.from_members(swarm.states)
    assert case.engine.state_digest() == swarm.digests[NUM_COMMITS]
    assert case.history.commit_of(Version(NUM_COMMITS)) == genuine
    swarm.commits.pop()
    await follow(case, swarm)


async def test_a_commit_under_a_strangers_signature_does_not_replace_ours(case: Case) -> None:
    """The hashes leave signatures out. Oracle: our log has the member's."""
    swarm = resume(case, 2, Lineage(b""))
    _use(case, swarm, Standing(Version(2), RoundId(2), swarm.lineages[2]))
    data = swarm.blobs[f"update/{STAGE}/1"]
    genuine, swarm.commits[1] = swarm.commits[1], _commit(2, swarm.lineages[1], data, by=STRANGER)
    case.history.append(Version(1), data, genuine)
    await follow(case, swarm)
    assert case.history.commit_of(Version(1)) == genuine


async def test_our_own_state_at_the_charter_is_where_its_lineage_begins(case: Case) -> None:
    """Then there is no commit that led to it. Oracle: as above."""
    swarm = Swarm(case)
    _use(case, swarm, Standing(Version(0), RoundId(0), swarm.lineages[0]))
    place = await follow(case, swarm)
    assert swarm.fetched == [f"update/{STAGE}/{number}" for number in range(NUM_COMMITS)]
    assert list(place.commits) == swarm.commits


@pytest.mark.parametrize("version", [0, 2, 4])
async def test_our_own_state_of_another_lineage_is_given_up(case: Case, version: int) -> None:
    """As when the members went on without what we had. Oracle: the snapshot's files and the update after it."""
    swarm = resume(case, version, Lineage(b"x" * 32))
    await follow(case, swarm)
    assert swarm.fetched == [*(f"state/{STAGE}/3/{part}" for part in STATE_PARTS), f"update/{STAGE}/3"]


async def test_what_our_disk_has_of_a_branch_that_is_given_up_goes(case: Case) -> None:
    """It holds the members' very snapshot as well. Whoever follows us would be led astray. Oracle: our log."""
    swarm = resume(case, 3, Lineage(bytes(32)))
    await case.sync.from_members(swarm.states)
    branch = _commit(NUM_COMMITS + 2, Lineage(bytes(32)), b"branch")
    case.history.append(Version(NUM_COMMITS + 1), b"branch", branch)
    swarm.fetched.clear()
    try:
        await case.sync.from_members(swarm.states, forgets=True)
    finally:
        await case.compute.stop()
    assert swarm.fetched == [f"update/{STAGE}/3"], "the snapshot is there"
    assert case.engine.state_digest() == swarm.digests[NUM_COMMITS]
    assert case.history.commit_of(Version(NUM_COMMITS + 1)) is None


async def test_our_own_state_ahead_of_the_members_is_given_up(case: Case) -> None:
    """It was committed to our disk and to nobody else's. Oracle: as above."""
    swarm = resume(case, 4, Lineage(b""))
    case.engine.resume(version=Version(9), steps=9)
    _use(case, swarm, Standing(Version(9), RoundId(9), Lineage(b"9" * 32)))
    await follow(case, swarm)
    assert f"state/{STAGE}/3/{STATE_PARTS[0]}" in swarm.fetched


async def test_our_own_state_that_nobody_can_vouch_for_is_given_up(case: Case) -> None:
    """The commit that led to it is not kept any more. Oracle: as above."""
    swarm = resume(case, 2, Lineage(b""))
    swarm.lost = {2}
    _use(case, swarm, Standing(Version(2), RoundId(2), swarm.lineages[2]))
    await follow(case, swarm)
    assert f"state/{STAGE}/3/{STATE_PARTS[0]}" in swarm.fetched


async def test_an_engine_that_has_moved_on_is_not_taken_for_what_was_on_the_disk(case: Case) -> None:
    """Oracle: the engine's own version, whatever the standing says."""
    swarm = resume(case, 2, Lineage(b""))
    _use(case, swarm, Standing(Version(1), RoundId(1), swarm.lineages[1]))
    await follow(case, swarm)
    assert f"state/{STAGE}/3/{STATE_PARTS[0]}" in swarm.fetched


async def test_what_was_on_the_disk_counts_once(case: Case) -> None:
    """Who comes back to the members later, after a step that nobody knows of, is in another state. Oracle: the snapshot
    is asked for, or used from our own disk, the second time."""
    swarm = resume(case, 3, Lineage(b""))
    _use(case, swarm, Standing(Version(3), RoundId(3), swarm.lineages[3]))
    await case.sync.from_members(swarm.states)
    assert swarm.fetched == [f"update/{STAGE}/3"]
    case.engine.resume(version=Version(3), steps=3)  # claims the version, with another state
    swarm.fetched.clear()
    await follow(case, swarm)
    assert swarm.fetched[0] == f"state/{STAGE}/3/{STATE_PARTS[0]}"


async def test_what_has_followed_from_our_disk_so_far_is_gone_on_from(case: Case) -> None:
    """The last update cannot be had, nor the snapshot. Oracle: where the engine stands by the members' lineage; the
    next attempt fetches nothing but that update."""
    swarm = resume(case, 1, Lineage(b""))
    _use(case, swarm, Standing(Version(1), RoundId(1), swarm.lineages[1]))
    lost, swarm.blobs = swarm.blobs, {name: swarm.blobs[name] for name in swarm.blobs if name.startswith("update/")}
    del swarm.blobs[f"update/{STAGE}/3"]
    with pytest.raises(UnreachableError):
        await case.sync.from_members(swarm.states)
    assert case.sync.own_standing() == Standing(Version(3), RoundId(3), swarm.lineages[3])
    assert case.engine.state_digest() == swarm.digests[3]
    swarm.blobs = lost
    swarm.fetched.clear()
    await follow(case, swarm)
    assert swarm.fetched == [f"update/{STAGE}/3"]


async def test_a_run_at_its_beginning_starts_over_whatever_was_on_the_disk(case: Case) -> None:
    """No snapshot and version 0: the run was begun anew. Oracle: the initial weights, which the run's seed defines."""
    swarm = resume(case, 3, Lineage(b"x" * 32))
    assert case.engine.state_digest() == swarm.digests[3]
    swarm.commits.clear()
    swarm.states = {ANNE: answer(swarm.signed)}
    place = await case.follow()
    assert (place.version, place.lineage, place.commits) == (0, swarm.lineages[0], ())
    assert (case.engine.version, case.engine.steps) == (0, 0)
    assert case.engine.state_digest() == swarm.digests[0] == _engine().state_digest()
    assert swarm.fetched == []


async def test_an_engine_at_its_beginning_is_not_drawn_again(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """It takes minutes for a large stage. Oracle: the engine is not asked to."""

    def refuse(seed: int) -> None:
        raise AssertionError("drawn again")

    monkeypatch.setattr(case.engine, "initialise", refuse)
    await case.sync.start_over()
    await case.compute.stop()


@pytest.mark.parametrize(
    "fault",
    [StorageError("the drive fails"), WriteBudgetSpent("spent", resumes_in_s=1.0), MemoryError("full")],
    ids=repr,
)
@pytest.mark.parametrize("is_loaded", [True, False], ids=["from our disk", "just fetched"])
async def test_a_load_that_our_own_machine_fails_at_does_not_cost_a_sound_snapshot(
    case: Case, monkeypatch: pytest.MonkeyPatch, is_loaded: bool, fault: Exception
) -> None:
    """Oracle: the very error; the snapshot is on our disk as before, and the next attempt fetches nothing of it."""
    swarm = resume(case, 0, Lineage(b""))
    if is_loaded:
        await case.sync.from_members(swarm.states)
    kept = case.history.snapshots()
    assert len(kept) == is_loaded

    def fail(files: object, *, version: Version) -> None:
        raise fault

    with monkeypatch.context() as patched:
        patched.setattr(case.engine, "read_state", fail)
        with pytest.raises(type(fault)) as caught:
            await case.sync.from_members(swarm.states)
    assert caught.value is fault
    assert case.history.snapshots() == kept
    swarm.fetched.clear()
    await follow(case, swarm)
    assert [name for name in swarm.fetched if name.startswith("state/")] == []


async def test_what_was_on_the_disk_is_not_vouched_for_once_a_checkpoint_has_replaced_it(case: Case) -> None:
    """It is of the same version. Oracle: the members' digest, and that their snapshot was fetched."""
    swarm = resume(case, 3, Lineage(b""))
    _use(case, swarm, Standing(Version(3), RoundId(3), swarm.lineages[3]))
    files = {part: io.BytesIO() for part in STATE_PARTS}
    _engine().write_state(files)
    saved = {part: file.getvalue() for part, file in files.items()}
    swarm.blobs |= {f"newest/stage-{STAGE}.{part}.safetensors": data for part, data in saved.items()}
    checkpoint = snapshot(saved).model_copy(update={"version": Version(3)})
    await case.sync.from_checkpoint(checkpoint, source=ANNE, folder="newest")
    swarm.fetched.clear()
    await follow(case, swarm)
    assert f"state/{STAGE}/3/{STATE_PARTS[0]}" in swarm.fetched


async def test_a_load_that_fails_half_way_at_version_0_is_not_taken_for_the_beginning(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: the digest of the initial weights."""
    files = {part: io.BytesIO() for part in STATE_PARTS}
    _engine(seed=9).write_state(files)
    saved = {part: file.getvalue() for part, file in files.items()}
    case.network.blobs = {f"state/{STAGE}/0/{part}": data for part, data in saved.items()}
    case.network.states = {ANNE: answer(charter(), snapshot(saved)), BERT: answer(charter())}
    read, num_read = StateReader.read, 0

    def fail(self: StateReader, *shard: Any) -> None:
        nonlocal num_read
        read(self, *shard)
        num_read += 1
        if num_read == 2:
            raise UnfitState("the saved state ends too soon.")

    monkeypatch.setattr(StateReader, "read", fail)
    case.sync._init_seed = 1
    assert (await case.follow()).version == 0
    assert num_read == 2
    assert case.engine.state_digest() == _engine().state_digest()


async def test_room_for_an_update_is_made_beside_the_event_loop(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some file systems write all of it. Oracle: the thread; the bytes that come out."""
    threads: list[threading.Thread] = []

    def room(num_bytes: int, folder: Path) -> Spool:
        threads.append(threading.current_thread())
        return Spool(num_bytes, folder)

    monkeypatch.setattr(sync, "Spool", room)
    swarm = Swarm(case)
    _use(case, swarm, Standing(Version(0), RoundId(0), swarm.lineages[0]))
    await follow(case, swarm)
    assert len(threads) == NUM_COMMITS
    assert threading.current_thread() not in threads


async def test_one_member_that_does_not_answer_costs_us_nothing_of_our_own(case: Case) -> None:
    """There is another one that would vouch for our state. Oracle: no snapshot is fetched."""
    swarm = resume(case, 3, Lineage(b""))
    _use(case, swarm, Standing(Version(3), RoundId(3), swarm.lineages[3]))
    good = swarm.states[ANNE]
    swarm.states = {ANNE: good, BERT: good}
    call = swarm.call

    async def flaky(peer: PeerId, request: Message, response: type[Message]) -> Message:
        if peer == ANNE and isinstance(request, LogRequest):
            raise TransientError("gone")
        return await call(peer, request, response)

    swarm.call = flaky  # type: ignore[method-assign]
    await follow(case, swarm)
    assert swarm.fetched == [f"update/{STAGE}/3"]
