"""Following members that lie, fail or disagree: whatever one of them sends, the next one is asked.

The network is played; charters are really signed and checked, the stage is a real one at version 0, where the
initial state needs no snapshot. Oracle: who was asked, and the place that comes out.
"""

from __future__ import annotations

import asyncio
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from safetensors.torch import save

from peer.averaging import sync
from peer.averaging.absorb import Update
from peer.averaging.history import PARTS, History
from peer.averaging.sync import StageSync, to_its_end
from peer.engine.optimizer import OptimizerSpec
from peer.engine.schedule import LearningRate
from peer.engine.stage_engine import StageEngine
from peer.pipeline.compute import ComputeThread
from protocol.architecture import preset
from protocol.control import Snapshot, StateFile
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
from protocol.ids import Lineage, PeerId, RoundId, RunId, StageId, Version, digest
from protocol.rounds.messages import CHARTER_CONTEXT, Charter, Commit, Seat
from protocol.signing import Signed, SigningKey, seal
from protocol.transport.blobs import Blobs
from protocol.transport.calls import Calls
from protocol.wire import Message

STAGE = StageId(1)
ME, ANNE, BERT, CARL = PeerId("me"), PeerId("anne"), PeerId("bert"), PeerId("carl")
COORDINATOR, STRANGER = SigningKey.generate(), SigningKey.generate()


def charter(generation: int = 1, *, key: SigningKey = COORDINATOR, stage: StageId = STAGE) -> Signed:
    fields = Charter(
        run=RunId("ab" * 16),
        stage=stage,
        generation=generation,
        round=RoundId(0),
        version=Version(0),
        state_digest=digest(b"state"),
        seats=(Seat(peer=COORDINATOR.peer_id, session=1),),
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
            codec="fp32",
            schedule=LearningRate(peak=1e-2, warmup=0, total=10),
            check_history=self._check,
        )

    def _check(self, signed: Signed, commits: tuple[Signed, ...]) -> None:
        if signed in self.refused:
            raise PeerFault("its rounds do not follow")

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
    files = dict.fromkeys(PARTS, b"something")
    case.network.blobs = {f"state/{STAGE}/0/{part}": b"something" for part in PARTS}
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
    signed = charter()
    newer = answer(signed).model_copy(update={"version": Version(3), "lineage": Lineage(b"3" * 32)})
    case.network.states = {ANNE: answer(signed), BERT: newer, CARL: UnreachableError("gone")}
    await case.follow()
    assert [peer for peer, asked in case.network.asked if asked == "LogRequest"] == [BERT]


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
    huge = snapshot(dict.fromkeys(PARTS, b"x"), num_bytes=1 << 40)
    case.network.states = {ANNE: answer(charter(), huge), BERT: UnreachableError("gone")}
    with pytest.raises(UnreachableError):
        await case.follow()
    assert list(case.folder.iterdir()) == []


@pytest.mark.parametrize("last", ["gone", "wrong hash", "no tensors"])
async def test_what_was_fetched_in_vain_does_not_stay(case: Case, last: str) -> None:
    """Nor does a file whose hash fits and which holds no tensors end the peer."""
    files = dict.fromkeys(PARTS, b"these are no tensors")
    offered = snapshot(files)
    served = b"these are no tensorz" if last == "wrong hash" else b"these are no tensors"
    case.network.blobs = {f"state/{STAGE}/0/{part}": served for part in PARTS}
    if last == "gone":
        del case.network.blobs[f"state/{STAGE}/0/{PARTS[0]}"]
    case.network.states = {ANNE: answer(charter(), offered), BERT: UnreachableError("gone")}
    with pytest.raises(UnreachableError):
        await case.follow()
    assert [path for path in case.folder.iterdir() if PARTS[0] in path.name] == []


async def test_tensors_of_another_stage_are_that_members_fault_and_do_not_stay(case: Case) -> None:
    """Oracle: the next member is followed; what the first one promised is not served on as our own snapshot."""
    files = dict.fromkeys(PARTS, save({"nothing.of.ours": torch.zeros(3)}))
    case.network.blobs = {f"state/{STAGE}/0/{part}": data for part, data in files.items()}
    case.network.states = {ANNE: answer(charter(), snapshot(files)), BERT: answer(charter())}
    assert (await case.follow()).version == 0
    assert case.history.snapshots() == ()
    assert list(case.folder.iterdir()) == []


def commit(data: bytes) -> Commit:
    """What a fetch looks at of a commit."""
    return cast(Commit, SimpleNamespace(version=Version(1), digest=digest(data)))


async def test_a_source_that_takes_for_ever_does_not_keep_us_from_the_next(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: the second source's bytes; and an error, long before the slow ones would be done, if all are slow."""
    monkeypatch.setattr(sync, "FETCH_PATIENCE_S", 0.02)
    monkeypatch.setattr(sync, "MIN_BYTES_PER_S", 1e12)
    slow = [PeerId(f"slow-{number}") for number in range(9)]

    async def fetch(source: PeerId, name: str, *, max_bytes: int) -> bytes:
        if source in slow:
            await asyncio.sleep(60)
        return b"the sum"

    monkeypatch.setattr(case.network, "fetch", fetch, raising=False)
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
    zeros = b"".join(bytes(4 * shard.gradient.numel()) for shard in case.engine.shards)
    step = cast(Commit, SimpleNamespace(version=Version(1), total_tokens=1, clip_scale=1.0))
    taken = [case.sync.absorb(step, Update("fp32", zeros)) for _ in range(2)]
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
