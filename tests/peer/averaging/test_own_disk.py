"""Which state of our own disk is still the stage's, by the coordinator's word and our own log.

Charters and commits are really signed and hashed; for the walk the engine, its updates and the files are real too, and
only the coordinator is played. Oracles: the rule as scenes, one broken link at a time; the lineage that a whole stage
went through; the digests of an engine that was never killed.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, cast

import pytest
import torch

from peer.averaging import history, spool
from peer.averaging.absorb import Update, absorb
from peer.averaging.history import History
from peer.averaging.own_disk import Books, OwnDisk, find_path
from peer.averaging.own_disk import Path as Way
from peer.averaging.sync import Place, StageSync
from peer.engine.local_checkpoint import Standing
from peer.engine.optimizer import OptimizerSpec
from peer.engine.schedule import LearningRate
from peer.engine.stage_engine import StageEngine
from peer.engine.statefiles import StateReader, UnfitState
from peer.pipeline.compute import ComputeThread
from protocol.architecture import preset
from protocol.errors import PeerFault, RefusedError, StorageError, SwarmError, UnreachableError, WireError
from protocol.history import StateAnswer, StateRequest
from protocol.ids import Digest, Lineage, PeerId, RoundId, StageId, Version, digest
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
from protocol.transport.calls import Calls
from protocol.wire import Message
from tests.peer.averaging.lineage_check import RUN, STAGE, check_of

COORDINATOR, ME, STRANGER = SigningKey.generate(), SigningKey.generate(), SigningKey.generate()
RATE = LearningRate(peak=1e-2, warmup=0, total=20)
MOST = 9
"""The newest version of a line."""
CHECK = check_of(ME.peer_id, ME, coordinator=COORDINATOR)


def sign_charter(generation: int, version: int, state_digest: Digest, *, stage: StageId = STAGE) -> Signed:
    seats = (Seat(peer=ME.peer_id, session=generation),)
    return seal(
        COORDINATOR,
        CHARTER_CONTEXT,
        Charter(
            run=RUN,
            stage=stage,
            generation=generation,
            round=RoundId(version + generation - 1),
            version=Version(version),
            state_digest=state_digest,
            seats=seats,
        ),
    )


def sign_commit(
    version: int, parent: Lineage, data: bytes, *, generation: int = 1, salt: int = 0, by: SigningKey = ME
) -> Signed:
    """Sign the commit of a version; another `salt` is another commit."""
    round_id = RoundId(version + generation - 2)  # every charter costs a round
    me = ME.peer_id
    summary = RoundSummary(
        round=round_id,
        clock=me,
        closing_digest=digest(b"closing"),
        tasks_done=1,
        tasks_lost=0,
        evals_done=0,
        loss_sum=1.0,
        target_tokens=10,
        eval_loss_sum=0.0,
        eval_tokens=0,
    )
    return seal(
        by,
        COMMIT_CONTEXT,
        Commit(
            run=RUN,
            stage=STAGE,
            generation=generation,
            first_round=round_id,
            round=round_id,
            version=Version(version),
            parent=parent,
            ballot=Ballot(number=1 + salt, steward=me),
            contributors=(Contribution(peer=me, tokens=10, weight=10),),
            codec="fp32",
            digest=digest(data),
            norm=1.0,
            clip_scale=1.0,
            seats=(Seat(peer=me, session=1),),
            speeds=(0.0,),
            joiners=(),
            summary=summary,
            tokens_dropped=0,
            double_counted=0,
        ),
    )


class Line:
    """What a stage with one replica went through: its charters, commits, updates, and the digest of every version."""

    def __init__(self, *charters_at: int, data: Iterable[bytes] | None = None, digests: Iterable[Digest] = ()) -> None:
        """`charters_at` are the versions at which a charter was issued; the first one is 0."""
        self.data = list(data or (bytes([version]) for version in range(MOST)))
        self.digests = list(digests) or [digest(b"state", bytes([version])) for version in range(MOST + 1)]
        self.charters = {
            version: sign_charter(number, version, self.digests[version])
            for number, version in enumerate(charters_at or (0,), start=1)
        }
        self.log: dict[int, Signed] = {}
        self.lineages: dict[int, Lineage] = {}
        """Of every version, as its commit or charter names it: a charter's version has the name before the charter."""
        lineage, generation = Lineage(bytes(32)), 0
        for version in range(MOST + 1):
            self.lineages[version] = lineage
            if version in self.charters:
                lineage, generation = root_lineage(self.charters[version]), generation + 1
            if version < MOST:
                self.log[version] = sign_commit(version + 1, lineage, self.data[version], generation=generation)
                lineage = next_lineage(lineage, self.log[version].payload)

    def standing(self, version: int) -> Standing:
        generation = sum(at < version for at in self.charters) or 1
        return Standing(Version(version), RoundId(version + generation - 1), self.lineages[version])

    def answer(self, version: int, *, charter_at: int | None = None) -> StateAnswer:
        """Return the coordinator's word when it has heard of the commits up to a version."""
        at = max(one for one in self.charters if one <= version) if charter_at is None else charter_at
        commit = self.log[version - 1] if version > at else None
        return StateAnswer(
            charter=self.charters[at], commit=commit, version=Version(0), lineage=Lineage(bytes(32)), snapshots=()
        )

    def books(self, version: int, *, charter_at: int | None = None) -> Books:
        answer = self.answer(version, charter_at=charter_at)
        books = Books.read(answer, stage=STAGE, coordinator=COORDINATOR.peer_id)
        assert books is not None
        return books

    @property
    def reports(self) -> list[Signed]:
        return [self.log[version] for version in range(MOST)]

    def forge(self, version: int) -> None:
        """Let somebody who is no member have signed the commit of a version, in our log as elsewhere."""
        before = version - 1
        self.log[before] = sign_commit(version, self.lineages[before], self.data[before], by=STRANGER)

    def kept(self, *versions: int) -> Callable[[Version], Signed | None]:
        """Return a log that has only the commits that followed these versions."""
        return lambda version: self.log.get(version) if version in versions else None


def find(own: Standing, books: Books, log: Callable[[Version], Signed | None]) -> Way | None:
    return find_path(own, books, log, CHECK)


def unreported(way: Way) -> list[int]:
    return [step.commit.version for step in way.unreported]


def way_versions(way: Way | None) -> tuple[list[int], list[int]] | None:
    """Return the versions that are taken up to the charter, and those beyond."""
    return None if way is None else ([s.commit.version for s in way.to_charter], [s.commit.version for s in way.beyond])


# -- the rule, pure --------------------------------------------------------------------------------------------------

ALL = range(MOST)


@pytest.mark.parametrize("own", [1, 4, 9])
@pytest.mark.parametrize("known", [0, 3, 4, 7, 9])
def test_a_state_of_the_lineage_goes_on_to_the_end_of_our_own_log(own: int, known: int) -> None:
    """The coordinator knows an older, the same or a newer place. Oracle: the versions of the whole line."""
    line = Line()
    way = find(line.standing(own), line.books(known), line.kept(*ALL))
    assert way is not None
    assert way_versions(way) == ([], list(range(own + 1, MOST + 1)))
    assert way.end == line.standing(MOST)
    assert not way.passes_charter
    assert unreported(way) == list(range(known + 1, MOST + 1))


def test_a_state_that_is_just_what_was_accepted_needs_no_log() -> None:
    line = Line()
    way = find(line.standing(5), line.books(5), line.kept())
    assert way is not None
    assert (way.beyond, way.end, way.unreported) == ((), line.standing(5), ())


@pytest.mark.parametrize(
    ("own", "known", "kept"), [(3, 7, [3, 4, 6, 7, 8]), (3, 7, []), (7, 3, [4, 5, 6]), (7, 0, [6])]
)
def test_what_our_log_does_not_join_to_the_accepted_place_is_not_taken(own: int, known: int, kept: list[int]) -> None:
    """Older than what was accepted, and the rest is lost; or newer, and nothing says that it followed from there."""
    line = Line()
    assert find(line.standing(own), line.books(known), line.kept(*kept)) is None


@pytest.mark.parametrize(
    ("own", "known", "kept", "end"),
    [(3, 7, [0, 1, 2, 3, 4], 5), (3, 7, [0, 1, 2], 3), (0, 7, [], 0), (6, 7, [], 6), (5, 7, [5], 6)],
)
def test_a_state_behind_the_accepted_place_is_taken_if_it_is_surely_of_its_lineage(
    own: int, known: int, kept: list[int], end: int
) -> None:
    """The rest of the log is lost. It is joined to the charter, or to what the newest commit followed. Oracle: the last
    version that the log leads to; nothing of it is news."""
    line = Line()
    way = find(line.standing(own), line.books(known), line.kept(*kept))
    assert way is not None
    assert (way.end.version, way.unreported) == (end, ())
    if own:
        assert way.end == line.standing(end)


@pytest.mark.parametrize(
    ("own", "known", "end"), [(3, 5, 6), (6, 5, 6), (6, 6, 6), (5, 0, 6), (7, 5, None), (7, 6, None), (9, 0, None)]
)
def test_a_commit_that_no_member_has_signed_ends_our_log(own: int, known: int, end: int | None) -> None:
    """Somebody showed it to us before, and every hash fits. Oracle: the version before it; who stands behind it is
    not taken."""
    line = Line()
    line.forge(7)
    way = find(line.standing(own), line.books(known), line.kept(*ALL))
    assert (None if way is None else way.end.version) == end
    if way is not None:
        assert unreported(way) == list(range(known + 1, 7))


def test_a_commit_that_is_damaged_ends_our_log() -> None:
    line = Line()
    line.log[6] = Signed(payload=line.log[6].payload, signer=ME.peer_id, signature=bytes(64))
    way = find(line.standing(3), line.books(5), line.kept(*ALL))
    assert way is not None
    assert way.end.version == 6


@pytest.mark.parametrize("own", [2, 5, 8])
def test_a_state_of_another_branch_is_not_taken(own: int) -> None:
    """Both branches follow the same charter; ours has parted at version 4. Oracle: only what is older is common."""
    theirs, ours = Line(), Line()
    lineage = theirs.lineages[4]
    for version in range(4, MOST):
        ours.lineages[version] = lineage
        ours.log[version] = sign_commit(version + 1, lineage, ours.data[version], salt=1)
        lineage = next_lineage(lineage, ours.log[version].payload)
    assert find(ours.standing(own), theirs.books(7), ours.kept(*ALL)) is None
    way = find(ours.standing(own), theirs.books(4), ours.kept(*ALL))
    assert way is not None, "what the coordinator knows is common to both"


def test_the_own_log_ends_where_its_commits_do_not_follow() -> None:
    """A leftover of another branch lies behind. Oracle: the last version before it."""
    line = Line()
    line.log[6] = sign_commit(7, Lineage(b"x" * 32), line.data[6])
    way = find(line.standing(3), line.books(5), line.kept(*ALL))
    assert way is not None
    assert way.end.version == 6


@pytest.mark.parametrize("own", [5, 8])
def test_a_state_that_was_rolled_back_is_not_taken(own: int) -> None:
    """Our line went on from the first charter; another was issued at version 4 meanwhile. Oracle: the generation."""
    line, again = Line(0), Line(0, 4)
    for known in (4, 6):
        assert find(line.standing(own), again.books(known), line.kept(*ALL)) is None


@pytest.mark.parametrize("own", [2, 4])
@pytest.mark.parametrize("known", [4, 7])
def test_a_state_before_the_charter_has_to_become_the_charters(own: int, known: int) -> None:
    """Oracle: the steps on both sides of it; the digest is compared between them."""
    line = Line(0, 4)
    way = find(line.standing(own), line.books(known), line.kept(*ALL))
    assert way_versions(way) == (list(range(own + 1, 5)), [5, 6, 7, 8, 9])
    assert way is not None
    assert way.passes_charter
    assert way.end == line.standing(9)


def test_several_charters_may_lie_between() -> None:
    line = Line(0, 2, 4)
    assert way_versions(find(line.standing(1), line.books(4), line.kept(*ALL))) == ([2, 3, 4], [5, 6, 7, 8, 9])


def test_a_state_before_the_charter_that_our_log_does_not_lead_to_is_not_taken() -> None:
    line = Line(0, 4)
    assert find(line.standing(2), line.books(4), line.kept(2, 4, 5)) is None


def test_the_round_at_a_charter_is_the_charters() -> None:
    line = Line(0, 4)
    way = find(line.standing(4), line.books(4), line.kept(0, 1, 2, 3))
    assert way is not None
    assert (way.end.version, way.end.round) == (4, line.books(4).charter.round)


@pytest.mark.parametrize("wrong", ["commit", "stage", "signer"])
def test_a_word_that_contradicts_itself_is_refused(wrong: str) -> None:
    line = Line(0, 4)
    answer = line.answer(6)
    if wrong == "commit":
        answer = answer.model_copy(update={"commit": line.log[2]})
    elif wrong == "stage":
        other = sign_charter(2, 4, line.digests[4], stage=StageId(0))
        answer = answer.model_copy(update={"charter": other, "commit": None})
    with pytest.raises(PeerFault):
        Books.read(answer, stage=STAGE, coordinator=ME.peer_id if wrong == "signer" else COORDINATOR.peer_id)


# -- the walk --------------------------------------------------------------------------------------------------------


def build(seed: int = 1) -> StageEngine:
    spec = OptimizerSpec(name="adamw32")
    config = {**preset("tiny"), "num_hidden_layers": 3}
    return StageEngine.build(config, num_stages=3, stage=STAGE, optimizer=spec, seed=seed)


def train(engine: StageEngine, data: bytes) -> Digest:
    absorb(engine, Update("fp32", data, (10,)), clip_scale=1.0, schedule=RATE)
    return engine.state_digest()


class Case:
    """A peer that comes back with its state of one version, its log, and the coordinator's word."""

    def __init__(self, folder: Path, own: int, *charters_at: int) -> None:
        reference, random = build(), torch.Generator().manual_seed(1)
        num_elements = sum(shard.num_elements for shard in reference.shards)
        data = [torch.randn(num_elements, generator=random).numpy().tobytes() for _ in range(MOST)]
        digests = [reference.state_digest(), *(train(reference, one) for one in data)]
        self.line = Line(*charters_at, data=data, digests=digests)
        self.engine = build()
        for one in data[:own]:
            train(self.engine, one)
        self.history = History(folder, stage=STAGE, updates_kept_s=0.0)
        for version, signed in self.line.log.items():
            self.history.append(Version(version), data[version], signed)
        self.word: StateAnswer | SwarmError = self.line.answer(MOST)
        self.compute = ComputeThread()
        self.unreported: list[Signed] = []
        self.sync = StageSync(
            STAGE,
            engine=self.engine,
            history=self.history,
            compute=self.compute,
            calls=cast(Calls, self),
            blobs=cast(Any, None),
            me=ME.peer_id,
            coordinator=COORDINATOR.peer_id,
            schedule=RATE,
            check_history=CHECK,
            resumed=self.line.standing(own),
        )
        self.asked_about: list[Lineage | None] = []
        self.own_disk = OwnDisk(
            STAGE,
            sync=self.sync,
            history=self.history,
            calls=cast(Calls, self),
            coordinator=COORDINATOR.peer_id,
            on_unreported=self.unreported.append,
        )

    async def call(self, peer: PeerId, request: Message, response: type[Message]) -> Message:
        assert isinstance(request, StateRequest)
        assert (peer, request.stage) == (COORDINATOR.peer_id, STAGE)
        self.asked_about.append(request.standing)
        if isinstance(self.word, SwarmError):
            raise self.word
        return self.word

    async def go_on(self, *, least: int = 0) -> Place | None:
        try:
            return await self.own_disk.go_on(least=Version(least))
        finally:
            await self.compute.stop()

    def check(self, place: Place | None, version: int) -> None:
        """The engine is at a version of the line, bit by bit, and says so."""
        assert place is not None
        standing = self.line.standing(version)
        assert Standing(place.version, place.round, place.lineage) == standing
        assert (place.charter, place.commits) == (None, ())
        assert self.engine.state_digest() == self.line.digests[version]
        assert self.sync.own_standing() == standing


async def test_a_state_of_the_half_that_was_given_up_is_not_taken(tmp_path: Path) -> None:
    """It may well be joined to the charter, and be behind the newest commit. Oracle: the coordinator's word on it."""
    case = Case(tmp_path, 5)
    case.word = case.line.answer(7).model_copy(update={"is_lost": True})
    assert await case.go_on() is None
    assert case.asked_about[0] == case.line.standing(5).lineage


@pytest.mark.parametrize("own", [1, 5, 9])
async def test_a_lone_replica_goes_on_at_the_version_that_it_had_reached(own: int, tmp_path: Path) -> None:
    """Its drive was committed a while ago, and the coordinator lacks the last two commits. Oracle: the digest of the
    engine that was never killed; what had not been reported."""
    case = Case(tmp_path, own)
    case.word = case.line.answer(7)
    case.check(await case.go_on(), MOST)
    assert case.unreported == [case.line.log[7], case.line.log[8]]


async def test_a_state_that_a_charter_has_named_since_is_known_by_its_digest(tmp_path: Path) -> None:
    case = Case(tmp_path, 2, 0, 4)
    case.check(await case.go_on(), MOST)


async def test_a_state_that_is_not_the_charters_is_not_taken_further(tmp_path: Path) -> None:
    """The log says that it leads there; the bytes say otherwise. Oracle: None, nothing reported, no step beyond."""
    case = Case(tmp_path, 2, 0, 4)
    case.line = Line(0, 4, data=case.line.data, digests=[*case.line.digests[:4], digest(b"x"), *case.line.digests[5:]])
    for version, signed in case.line.log.items():
        case.history.append(Version(version), case.line.data[version], signed)
    case.word = case.line.answer(4)
    assert await case.go_on() is None
    assert (case.engine.version, case.unreported) == (4, [])


async def test_a_checkpoint_that_is_newer_wins(tmp_path: Path) -> None:
    """Oracle: the engine was not touched."""
    case = Case(tmp_path, 5)
    before = case.engine.changes
    assert await case.go_on(least=MOST + 1) is None
    assert case.engine.changes == before


@pytest.mark.parametrize("known", [6, 9])
@pytest.mark.parametrize("damage", ["flipped", "short", "gone"])
async def test_a_damaged_log_is_followed_as_far_as_it_is_sound(damage: str, known: int, tmp_path: Path) -> None:
    """Oracle: the last good step, whether the coordinator has heard of it or of more; of what was not reported, what is
    still here."""
    case = Case(tmp_path, 5)
    case.word = case.line.answer(known)
    path = tmp_path / "u00000007.bin"
    data = bytearray(path.read_bytes())
    data[100] ^= 1
    path.write_bytes(data if damage == "flipped" else data[:-4])
    if damage == "gone":
        path.unlink()
    case.check(await case.go_on(), 7)
    assert case.unreported == case.line.reports[known:7]


async def test_a_damaged_log_does_not_beat_a_newer_checkpoint(tmp_path: Path) -> None:
    """Oracle: None; the standing is of the last good step, so that members could still take it from there."""
    case = Case(tmp_path, 5)
    (tmp_path / "u00000007.bin").unlink()
    assert await case.go_on(least=8) is None
    assert case.sync.own_standing() == case.line.standing(7)
    assert (case.engine.state_digest(), case.unreported) == (case.line.digests[7], [])


async def test_a_commit_of_a_stranger_in_our_log_is_neither_taken_nor_reported(tmp_path: Path) -> None:
    """Its update is here and fits. Oracle: the version before it."""
    case = Case(tmp_path, 5)
    case.line.forge(8)
    case.history.append(Version(7), case.line.data[7], case.line.log[7])
    case.word = case.line.answer(6)
    case.check(await case.go_on(), 7)
    assert case.unreported == case.line.reports[6:7]


async def test_a_full_disk_is_no_gap_in_our_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: the end of the log, with a system that gives no file any room."""

    def refuse(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    case = Case(tmp_path, 5)
    monkeypatch.setattr(spool, "MIN_FILE_BYTES", 1)
    monkeypatch.setattr(os, "posix_fallocate", refuse)
    case.check(await case.go_on(), MOST)


async def test_a_drive_that_fails_is_not_taken_for_a_gap_in_our_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The state may be as good as ever, once the drive is back. Oracle: the error, which ends the peer with advice."""

    def refuse(path: Path) -> Digest:
        raise OSError(errno.EIO, "Input/output error")

    case = Case(tmp_path, 5)
    monkeypatch.setattr(history, "file_digest", refuse)
    with pytest.raises(StorageError, match="Input/output error"):
        await case.go_on()


async def test_a_snapshot_that_cannot_be_loaded_is_not_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its bytes are what was written, and no state of this stage. Oracle: it is gone."""
    case = Case(tmp_path, 6)
    case.history.save_snapshot(
        case.engine.write_state, round_id=RoundId(6), version=Version(6), lineage=case.line.lineages[6]
    )
    case.sync.hold(case.line.standing(2))  # and so the engine's own state is none
    case.word = case.line.answer(6)

    def fail(self: StateReader, *shard: Any) -> None:
        raise UnfitState("the saved state ends too soon.")

    monkeypatch.setattr(StateReader, "read", fail)
    assert await case.go_on() is None
    assert case.history.snapshots() == ()
    assert case.sync.own_standing() is None


async def test_an_own_snapshot_helps_where_the_state_is_too_old(tmp_path: Path) -> None:
    """The log of large states is pruned before they are committed to the drive again. Oracle: the digest."""
    case = Case(tmp_path, 6)
    case.history.save_snapshot(
        case.engine.write_state, round_id=RoundId(6), version=Version(6), lineage=case.line.lineages[6]
    )
    for version, signed in case.line.log.items():  # the snapshot was taken while the log grew
        if version >= 6:
            case.history.append(Version(version), case.line.data[version], signed)
    assert case.history.commit_of(Version(3)) is None
    case.engine.initialise(7)
    case.engine.resume(version=Version(2), steps=2)
    case.sync.hold(case.line.standing(2))
    case.check(await case.go_on(), MOST)


async def test_without_the_coordinator_no_own_state_is_taken(tmp_path: Path) -> None:
    """It may have been rolled back. Oracle: the error, which the session waits after; the engine is untouched."""
    case = Case(tmp_path, 5)
    case.word = UnreachableError("down")
    before = case.engine.changes
    with pytest.raises(UnreachableError):
        await case.go_on()
    assert case.engine.changes == before


async def test_a_stage_that_has_not_begun_vouches_for_nothing(tmp_path: Path) -> None:
    case = Case(tmp_path, 5)
    case.word = StateAnswer(charter=None, commit=None, version=Version(0), lineage=Lineage(bytes(32)), snapshots=())
    assert await case.go_on() is None


@pytest.mark.parametrize(
    ("word", "kind"),
    [
        (RefusedError("never heard of that"), UnreachableError),
        (WireError("not a message"), PeerFault),
        ("contradiction", PeerFault),
    ],
    ids=repr,
)
async def test_an_answer_that_cannot_be_read_is_waited_for(
    word: SwarmError | str, kind: type[SwarmError], tmp_path: Path
) -> None:
    """Going on without it would cost the state. Oracle: an error that the session waits after; nothing is touched."""
    case = Case(tmp_path, 5, 0, 4)
    odd = case.line.answer(6).model_copy(update={"commit": case.line.log[2]})
    case.word = word if isinstance(word, SwarmError) else odd
    before = case.engine.changes
    with pytest.raises(kind):
        await case.go_on()
    assert case.engine.changes == before


async def test_an_engine_that_has_moved_on_has_no_own_state(tmp_path: Path) -> None:
    """A load over it has failed. Oracle: None, though the version is the same."""
    case = Case(tmp_path, 5)
    case.engine.initialise(3)
    case.engine.resume(version=Version(5), steps=5)
    assert await case.go_on() is None
