"""Checkpoints come home: who agrees, how files travel, what happens when something is wrong.

Oracles: the bytes that fake peers serve, and SHA-256 over what lands on disk.
"""

from __future__ import annotations

import asyncio
import os
import random
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from coordinator.checkpoints import Collector, versions
from coordinator.fetching import RANGE_BYTES, WrongHashError, fetch_file
from coordinator.offers import Offers
from coordinator.rundir import RunDir
from coordinator.serving import Shelf
from coordinator.store import history
from protocol.control import Snapshot, StateFile
from protocol.errors import StorageError, UnreachableError
from protocol.ids import Lineage, PeerId, RoundId, StageId, Version, digest
from tests.coordinator.office import Office, Volunteer, open_office, snapshot, state
from tests.coordinator.runs import make_run
from tests.protocol.manifests import batch_spec, manifest

A, B, C, D = (Volunteer(name) for name in "abcd")
PARTS = ("weights", "optimizer")


class FakePeers:
    """Serves named blobs per peer, with faults on request."""

    def __init__(self) -> None:
        self.blobs: dict[tuple[PeerId, str], bytes] = {}
        self.dead: set[PeerId] = set()
        self.asked: list[tuple[PeerId, str, int, int]] = []
        self.kept: dict[tuple[PeerId, int], list[Snapshot]] = {}
        self.short = 0
        """Bring at most so many bytes at once; 0 for what was asked."""

    async def fetch_range(self, peer: PeerId, name: str, offset: int, length: int) -> tuple[bytes, int]:
        self.asked.append((peer, name, offset, length))
        await asyncio.sleep(0)
        if peer in self.dead or (peer, name) not in self.blobs:
            raise UnreachableError(f"{peer} is gone")
        blob = self.blobs[peer, name]
        return blob[offset : offset + min(length, self.short or length)], len(blob)

    async def ask_snapshots(self, peer: PeerId, stage: StageId) -> tuple[Snapshot, ...]:
        if peer in self.dead:
            raise UnreachableError(f"{peer} is gone")
        return tuple(self.kept[peer, stage][-2:])

    def offer(self, peer: PeerId, stage: int, round_id: int, *, seed: int = 0, version: int | None = None) -> Snapshot:
        """Give a peer a snapshot to serve, the same bytes for the same seed."""
        at = round_id if version is None else version
        files = []
        for part in PARTS:
            data = random.Random(f"{stage}/{at}/{part}/{seed}").randbytes(1000 + stage)
            self.blobs[peer, f"state/{stage}/{at}/{part}"] = data
            files.append(StateFile(part=part, num_bytes=len(data), digest=digest(data)))
        made = snapshot(stage, round_id, files=files, version=at)
        self.kept.setdefault((peer, stage), []).append(made)
        return made


# -- offers -------------------------------------------------------------------------------------------


def offers(*given: tuple[Volunteer, Snapshot]) -> Offers:
    known = Offers(num_stages=2)
    for volunteer, offered in given:
        known.learn(volunteer.peer, offered)
    return known


def test_a_round_is_complete_when_every_stage_is_offered() -> None:
    fake = FakePeers()
    known = offers((A, fake.offer(A.peer, 0, 5)), (A, fake.offer(A.peer, 0, 10)), (B, fake.offer(B.peer, 1, 5)))
    assert known.newest_complete(after=-1) == 5
    assert known.newest_complete(after=5) is None
    known.learn(B.peer, fake.offer(B.peer, 1, 10))
    assert known.newest_complete(after=-1) == 10


def test_an_older_offer_is_remembered_as_long_as_its_peer_keeps_it() -> None:
    fake = FakePeers()
    known = offers(*((A, fake.offer(A.peer, 0, number)) for number in (5, 10, 15)))
    known.learn(B.peer, fake.offer(B.peer, 1, 10))
    assert known.newest_complete(after=-1) == 10
    known.learn(B.peer, fake.offer(B.peer, 1, 5))
    known.keep_only([B.peer])
    assert known.newest_complete(after=-1) is None


def test_the_majority_of_a_stage_decides_and_the_others_are_named() -> None:
    fake = FakePeers()
    known = offers(
        (A, fake.offer(A.peer, 0, 5, seed=1)),
        (B, fake.offer(B.peer, 0, 5)),
        (C, fake.offer(C.peer, 0, 5)),
        (D, fake.offer(D.peer, 1, 5)),
    )
    agreement = known.agreements(RoundId(5))[StageId(0)]
    assert set(agreement.sources) == {B.peer, C.peer}
    assert agreement.dissenters == (A.peer,)


def test_between_equals_the_newer_version_then_the_lower_digest_decides() -> None:
    fake = FakePeers()
    known = offers((A, fake.offer(A.peer, 0, 5, version=4)), (B, fake.offer(B.peer, 0, 5, version=5)))
    assert known.agreements(RoundId(5))[StageId(0)].sources == (B.peer,)
    pair = [(A, fake.offer(A.peer, 0, 5, seed=1)), (B, fake.offer(B.peer, 0, 5, seed=2))]
    assert offers(*pair).agreements(RoundId(5)) == offers(*reversed(pair)).agreements(RoundId(5))


def test_files_under_another_lineage_or_version_are_another_offer() -> None:
    """Whoever comes first, or says that its version is newer, would name the checkpoint after itself."""
    fake = FakePeers()
    offered = fake.offer(B.peer, 0, 5)
    for changes in ({"lineage": Lineage(b"x" * 32)}, {"version": Version(4)}):
        known = offers((A, offered.model_copy(update=changes)), (B, offered), (C, offered))
        known.learn(D.peer, fake.offer(D.peer, 1, 5))
        agreement = known.agreements(RoundId(5))[StageId(0)]
        assert (agreement.snapshot, agreement.sources) == (offered, tuple(sorted((B.peer, C.peer))))
        assert agreement.dissenters == (A.peer,)


@pytest.mark.parametrize(("round_id", "version"), [(5, 6), (5, 1 << 40), (9, 5)])
def test_what_cannot_be_a_snapshot_of_the_run_is_no_offer(round_id: int, version: int) -> None:
    """More updates than rounds, or a round that there is not."""
    fake, known = FakePeers(), Offers(num_stages=1, last_round=RoundId(8))
    known.learn(A.peer, fake.offer(A.peer, 0, round_id, version=version))
    assert known.newest_complete(after=-1) is None


def test_half_a_snapshot_is_no_offer() -> None:
    fake = FakePeers()
    whole = fake.offer(A.peer, 0, 5)
    known = offers((A, whole.model_copy(update={"files": whole.files[:1]})), (B, fake.offer(B.peer, 1, 5)))
    assert known.newest_complete(after=-1) is None


def test_offers_of_what_was_given_up_go_whenever_that_was_learnt() -> None:
    """A's half of a torn swarm was a round ahead."""
    fake = FakePeers()
    ahead = [(A, fake.offer(A.peer, stage, 6)) for stage in (0, 1)]
    known = offers(*ahead, *((B, fake.offer(B.peer, stage, 5)) for stage in (0, 1)))
    assert known.newest_complete(after=-1) == 6
    lost = {snapshot.lineage for _, snapshot in ahead}
    known.drop(lambda offered: offered.lineage in lost)
    assert known.newest_complete(after=-1) == 5


# -- one file -----------------------------------------------------------------------------------------

LARGE = random.Random(0).randbytes(3 * RANGE_BYTES + 17)


async def fetch(fake: FakePeers, target: Path, sources: Iterable[Volunteer]) -> None:
    await fetch_file(
        "file",
        target,
        num_bytes=len(LARGE),
        sha256=digest(LARGE),
        sources=[source.peer for source in sources],
        fetch_range=fake.fetch_range,
    )


async def test_a_file_comes_in_ranges_from_all_sources(tmp_path: Path) -> None:
    fake = FakePeers()
    fake.blobs = {(one.peer, "file"): LARGE for one in (A, B)}
    await fetch(fake, tmp_path / "new" / "file", [A, B])
    assert (tmp_path / "new" / "file").read_bytes() == LARGE
    assert {peer for peer, *_ in fake.asked} == {A.peer, B.peer}
    assert max(length for *_, length in fake.asked) <= RANGE_BYTES


async def test_a_source_that_dies_is_replaced_and_short_answers_are_continued(tmp_path: Path) -> None:
    fake = FakePeers()
    fake.blobs = {(one.peer, "file"): LARGE for one in (A, B)}
    fake.dead, fake.short = {A.peer}, RANGE_BYTES // 3
    await fetch(fake, tmp_path / "file", [A, B])
    assert (tmp_path / "file").read_bytes() == LARGE


async def test_without_a_source_there_is_one_clear_error(tmp_path: Path) -> None:
    fake = FakePeers()
    with pytest.raises(UnreachableError, match="all 2 sources of file failed"):
        await fetch(fake, tmp_path / "file", [A, B])


async def test_a_liar_among_the_sources_is_found_and_the_file_comes_all_the_same(tmp_path: Path) -> None:
    fake = FakePeers()
    fake.blobs = {(B.peer, "file"): bytes(len(LARGE)), (A.peer, "file"): LARGE}
    liars = await fetch_file(
        "file",
        tmp_path / "file",
        num_bytes=len(LARGE),
        sha256=digest(LARGE),
        sources=[B.peer, A.peer],
        fetch_range=fake.fetch_range,
    )
    assert (tmp_path / "file").read_bytes() == LARGE
    assert liars == (B.peer,)


async def test_if_only_liars_are_there_they_are_named(tmp_path: Path) -> None:
    fake = FakePeers()
    fake.blobs = {(B.peer, "file"): LARGE[:-1] + b"?"}
    with pytest.raises(WrongHashError) as caught:
        await fetch(fake, tmp_path / "file", [A, B])
    assert caught.value.liars == (B.peer,)


async def test_a_source_that_brings_nothing_or_too_much_is_dropped(tmp_path: Path) -> None:
    class Odd(FakePeers):
        async def fetch_range(self, peer: PeerId, name: str, offset: int, length: int) -> tuple[bytes, int]:
            return (b"", 0) if peer == A.peer else (bytes(length + 1), 0)

    with pytest.raises(UnreachableError):
        await fetch(Odd(), tmp_path / "file", [A, B])


async def test_a_full_disk_is_a_storage_error(tmp_path: Path) -> None:
    """Oracle: /dev/full refuses every byte with ENOSPC."""
    if not os.path.exists("/dev/full"):
        pytest.skip("needs /dev/full")
    fake = FakePeers()
    fake.blobs = {(A.peer, "file"): LARGE}
    target = tmp_path / "file"
    target.symlink_to("/dev/full")
    with pytest.raises(StorageError, match="No space left"):
        await fetch(fake, target, [A])


# -- the collector ------------------------------------------------------------------------------------


@asynccontextmanager
async def collecting(folder: Path) -> AsyncIterator[tuple[Office, FakePeers, Collector]]:
    """Open an office with two stages and a collector that fetches from fake peers."""
    fake = FakePeers()
    run = manifest(batch=batch_spec(num_rounds=100))
    async with open_office(folder, run=run) as office:
        collector = make_collector(office, fake)
        await collector.load()
        yield office, fake, collector


def make_collector(office: Office, fake: FakePeers) -> Collector:
    services = office.services

    def on_checkpoint(checkpoint: object) -> None:
        assert collector.newest is not None
        services.charters.floor = versions(collector.newest)

    collector = Collector(
        services.run,
        registry=services.registry,
        ledger=services.ledger,
        database=services.database,
        journal=services.journal,
        clock=services.clock,
        fetch_range=fake.fetch_range,
        ask_snapshots=fake.ask_snapshots,
        on_checkpoint=on_checkpoint,
    )
    return collector


async def offering(
    office: Office, fake: FakePeers, volunteer: Volunteer, stage: int, *rounds: int, seed: int = 0
) -> None:
    for round_id in rounds:
        offered = fake.offer(volunteer.peer, stage, round_id, seed=seed)
        await office.beat(volunteer, state(stage, snapshot=offered))


async def kinds(office: Office) -> list[str]:
    events = await office.services.database.run(history.last_events, limit=50)
    return [event.kind for event in events]


async def test_a_complete_round_is_collected_verified_and_written_down(tmp_path: Path) -> None:
    async with collecting(tmp_path) as (office, fake, collector):
        await office.join(A)
        await office.join(B)
        await offering(office, fake, A, 0, 5)
        assert await collector.poll()
        assert fake.asked == []
        await offering(office, fake, B, 1, 5)
        assert await collector.poll()
        assert collector.newest is not None
        assert collector.newest.round == 5
        for part in PARTS:
            assert collector.newest.file(1, part).read_bytes() == fake.blobs[B.peer, f"state/1/5/{part}"]
        (row,) = await office.services.database.run(history.load_checkpoints)
        assert (row.round, row.num_bytes) == (5, 2 * 1000 + 2 * 1001)
        assert office.services.charters.floor == {0: 5, 1: 5}
        assert not (tmp_path / "incoming").exists()
        fake.asked.clear()
        assert await collector.poll()
        assert fake.asked == []


async def test_what_is_given_up_while_it_is_collected_becomes_no_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The settlement comes between two files. Oracle: what is on disk."""
    async with collecting(tmp_path) as (office, fake, collector):
        for stage, volunteer in enumerate((A, B)):
            await office.join(volunteer, wanted_stages=(StageId(stage),))
            await offering(office, fake, volunteer, stage, 5)
        lost: set[Lineage] = set()
        monkeypatch.setattr(office.services.ledger, "is_given_up", lambda place: place.lineage in lost)
        fetch_range = fake.fetch_range

        async def settled_meanwhile(peer: PeerId, name: str, offset: int, length: int) -> tuple[bytes, int]:
            lost.add(snapshot(0, 5).lineage)
            return await fetch_range(peer, name, offset, length)

        monkeypatch.setattr(collector, "_fetch_range", settled_meanwhile)
        assert not await collector.poll()
        assert collector.newest is None
        assert not office.services.run.checkpoints.rounds()


async def test_only_the_last_ones_are_kept_on_disk_and_in_the_list(tmp_path: Path) -> None:
    async with collecting(tmp_path) as (office, fake, collector):
        await office.join(A)
        await office.join(B)
        for round_id in (5, 10, 15, 20):
            await offering(office, fake, A, 0, round_id)
            await offering(office, fake, B, 1, round_id)
            assert await collector.poll()
        rows = await office.services.database.run(history.load_checkpoints)
        assert [row.round for row in rows] == [10, 15, 20]
        assert sorted(office.services.run.checkpoints.rounds()) == [10, 15, 20]


async def test_a_disagreement_is_told_once_and_the_majority_collected(tmp_path: Path) -> None:
    async with collecting(tmp_path) as (office, fake, collector):
        for volunteer in (A, B, C, D):
            await office.join(volunteer)
        await offering(office, fake, A, 0, 5, seed=1)
        await offering(office, fake, C, 0, 5)
        await offering(office, fake, D, 0, 5)
        await offering(office, fake, B, 1, 5)
        fake.dead = {C.peer, D.peer}
        assert not await collector.poll()
        fake.dead = set()
        assert await collector.poll()
        assert collector.newest is not None
        assert collector.newest.file(0, "weights").read_bytes() == fake.blobs[C.peer, "state/0/5/weights"]
        assert (await kinds(office)).count("checkpoint.dissent") == 1


async def test_who_offers_one_hash_and_serves_another_is_found_out(tmp_path: Path) -> None:
    async with collecting(tmp_path) as (office, fake, collector):
        for volunteer in (A, B, C):
            await office.join(volunteer)
        for volunteer in (A, C):
            await offering(office, fake, volunteer, 0, 5)
        await offering(office, fake, B, 1, 5)
        fake.blobs[A.peer, "state/0/5/weights"] = bytes(1000)
        fake.dead = {C.peer}
        assert not await collector.poll()
        assert "checkpoint.wrong_file" in await kinds(office)
        fake.dead.clear()
        fake.asked.clear()
        assert await collector.poll()
        assert A.peer not in {peer for peer, *_ in fake.asked}
        assert collector.newest is not None
        assert collector.newest.file(0, "weights").read_bytes() == fake.blobs[C.peer, "state/0/5/weights"]


async def test_a_failure_is_an_event_and_a_note_until_the_next_success(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: a disk that is full for one checkpoint; training (the registry) goes on answering meanwhile."""
    async with collecting(tmp_path) as (office, fake, collector):
        await office.join(A)
        await office.join(B)
        await offering(office, fake, A, 0, 5)
        await offering(office, fake, B, 1, 5)
        full = StorageError("cannot write /somewhere: No space left on device.")

        def refuse(self: RunDir, *_: object) -> None:
            raise full

        with monkeypatch.context() as patch:
            patch.setattr(RunDir, "write_checkpoint", refuse)
            assert not await collector.poll()
        assert "No space left" in office.services.journal.notes["checkpoint"]
        assert "checkpoint.failed" in await kinds(office)
        assert (await office.beat(A, state(0))).stages == (0,)
        assert await collector.poll()
        assert "checkpoint" not in office.services.journal.notes
        told = await kinds(office)
        assert (told.count("checkpoint.written"), told.count("checkpoint.failed")) == (1, 1)


async def test_a_truncated_checkpoint_falls_back_to_the_one_before(tmp_path: Path) -> None:
    async with collecting(tmp_path) as (office, fake, collector):
        await office.join(A)
        await office.join(B)
        for round_id in (5, 10):
            await offering(office, fake, A, 0, round_id)
            await offering(office, fake, B, 1, round_id)
            assert await collector.poll()
        newest = collector.newest
        assert newest is not None
        os.truncate(newest.file(1, "optimizer"), 10)
        restarted = make_collector(office, fake)
        await restarted.load()
        assert restarted.newest is not None
        assert restarted.newest.round == 5
        assert "checkpoint.damaged" in await kinds(office)
        assert await restarted.poll(), "the peers still offer round 10: it replaces the damaged one"
        assert restarted.newest.round == 10


async def test_peers_whose_beats_never_match_are_asked_at_the_same_moment(tmp_path: Path) -> None:
    """Rounds shorter than a beat: A's beat told of round 8, B's of round 6, though both have had both."""
    async with collecting(tmp_path) as (office, fake, collector):
        await office.join(A)
        await office.join(B)
        await offering(office, fake, A, 0, 6, 8)
        fake.offer(B.peer, 1, 4)
        await offering(office, fake, B, 1, 6)
        await collector.poll()
        await office.beat(A, state(0, snapshot=fake.offer(A.peer, 0, 12)))
        await office.beat(B, state(1, snapshot=fake.offer(B.peer, 1, 10)))
        fake.offer(B.peer, 1, 12)
        assert await collector.poll()
        assert collector.newest is not None
        assert collector.newest.round == 12


async def test_an_unreachable_peer_costs_a_try(tmp_path: Path) -> None:
    async with collecting(tmp_path) as (office, fake, collector):
        await office.join(A)
        await office.join(B)
        await offering(office, fake, A, 0, 5)
        await offering(office, fake, B, 1, 5)
        fake.dead = {B.peer}
        assert not await collector.poll()
        fake.dead = set()
        assert await collector.poll()


# -- what is handed out -------------------------------------------------------------------------------


async def test_the_shelf_serves_tokens_and_checkpoints_and_nothing_else(tmp_path: Path) -> None:
    """Oracle: the files of a real run directory, and a list of names that must lead nowhere."""
    run = make_run(tmp_path)
    shelf = Shelf(run, newest=lambda: None, on_damage=pytest.fail)
    spec = run.manifest.data.train
    whole = (run.path / "tokens" / spec.name).read_bytes()
    chunks = [shelf.resolve(A.peer, f"tokens/{spec.name}/{number}") for number in range(spec.num_chunks)]
    assert b"".join(chunk() or b"" for chunk in chunks if callable(chunk)) == whole
    index = shelf.resolve(A.peer, f"tokens/{spec.name}/index")
    assert callable(index)
    assert digest(index() or b"") == spec.index_digest
    for name in (
        "",
        "tokens",
        f"tokens/{spec.name}/{spec.num_chunks}",
        f"tokens/{spec.name}/-1",
        f"tokens/{spec.name}/¹",
        "tokens/../coordinator.key",
        "tokens/coordinator.key/index",
        "checkpoint/newest/checkpoint.json",
        "checkpoint/5/checkpoint.json",
        "coordinator.key",
    ):
        assert shelf.resolve(A.peer, name) is None, name


async def test_a_damaged_chunk_is_not_handed_out(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    path = run.path / "tokens" / run.manifest.data.train.name
    data = bytearray(path.read_bytes())
    data[100] ^= 1
    path.write_bytes(data)
    damages: list[str] = []
    shelf = Shelf(run, newest=lambda: None, on_damage=damages.append)
    chunk = shelf.resolve(A.peer, f"tokens/{path.name}/0")
    assert callable(chunk)
    assert chunk() is None
    assert [path.name in text and "chunk 0" in text for text in damages] == [True]


async def test_the_newest_checkpoint_and_those_before_can_be_fetched(tmp_path: Path) -> None:
    async with collecting(tmp_path) as (office, fake, collector):
        await office.join(A)
        await office.join(B)
        for round_id in (5, 10):
            await offering(office, fake, A, 0, round_id)
            await offering(office, fake, B, 1, round_id)
            assert await collector.poll()
        shelf = Shelf(office.services.run, newest=lambda: collector.newest, on_damage=pytest.fail)
        name = "stage-0.weights.safetensors"
        newest, same, older = (shelf.resolve(A.peer, f"checkpoint/{at}/{name}") for at in ("newest", "10", "5"))
        assert newest == same
        assert isinstance(newest, Path)
        assert newest.read_bytes() == fake.blobs[A.peer, "state/0/10/weights"]
        assert isinstance(older, Path)
        assert older.read_bytes() == fake.blobs[A.peer, "state/0/5/weights"]
        record = shelf.resolve(A.peer, "checkpoint/newest/checkpoint.json")
        assert isinstance(record, Path)
        for wrong in ("checkpoint/10/../../coordinator.key", "checkpoint/15/" + name, "checkpoint/10/other"):
            assert shelf.resolve(A.peer, wrong) is None
