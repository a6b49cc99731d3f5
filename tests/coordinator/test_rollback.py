"""Going back to a checkpoint. Oracles: folders, rows, charters and replies to beats.

The office is real but for network and time; two peers host both stages.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from coordinator import checkpoints
from coordinator.checkpoints import Collector
from coordinator.rollback import WISH, Wish
from coordinator.rundir import RunDir
from coordinator.store import history, peers, tree
from protocol.control import StageState
from protocol.ids import Lineage, PeerId, RoundId, StageId, Version
from protocol.rounds.messages import Charter
from tests.coordinator.office import NO_LINEAGE, Office, Volunteer, open_office, state
from tests.coordinator.runs import random_weights, stage_files
from tests.coordinator.test_checkpoints import FakePeers, make_collector
from tests.coordinator.test_reunion import STAGES, Half

A, B = Volunteer("a"), Volunteer("b")


def add_checkpoint(run: RunDir, folder: Path, round_number: int, half: Half) -> None:
    files = stage_files(folder / str(round_number), random_weights(run.manifest), version=round_number)
    run.write_checkpoint(RoundId(round_number), files)
    assert half.version == round_number


async def trained(office: Office, folder: Path) -> Half:
    """Train six rounds, with checkpoints of rounds 2 and 4."""
    for volunteer in (A, B):
        await office.join(volunteer, wanted_stages=tuple(map(StageId, STAGES)))
        await office.beat(volunteer, *(state(stage) for stage in STAGES))
    await office.tick()
    half = Half(office, (A, B), {stage: office.charter_lineage(stage) for stage in STAGES}, 0)
    for number in (2, 4):
        await half.train(2)
        add_checkpoint(office.services.run, folder / "fetched", number, half)
    await half.train(2)
    return half


async def wish(office: Office, round_number: int) -> None:
    made = Wish(round=RoundId(round_number), reason="poisoned")
    await office.services.database.run(peers.put_setting, WISH, made.to_json())
    await office.tick()


async def events(office: Office, kind: str) -> list[str]:
    found = await office.services.database.run(lambda db: history.last_events(db, limit=100))
    return [each.detail for each in found if each.kind == kind]


@asynccontextmanager
async def gone_back(folder: Path) -> AsyncIterator[tuple[Office, FakePeers, Collector, Half]]:
    """Train six rounds, and go back to the checkpoint of round 2; with a collector that fetches from fake peers."""
    async with open_office(folder) as office:
        fake = FakePeers()
        collector = make_collector(office, fake)
        half = await trained(office, folder)
        await collector.load()
        office.services.rollback.on_checkpoint = collector.take
        await wish(office, 2)
        yield office, fake, collector, half


def offering(fake: FakePeers, who: Volunteer, version: int, lineages: Mapping[int, Lineage]) -> list[StageState]:
    """Return states of both stages that somebody has a snapshot of, which it serves."""
    told = []
    for stage in STAGES:
        offered = fake.offer(who.peer, stage, version).model_copy(update={"lineage": lineages[stage]})
        at = {"lineage": lineages[stage], "version": Version(version), "round": RoundId(version)}
        told.append(state(stage, **at, snapshot=offered))
    return told


async def founded_anew(office: Office, half: Half) -> Half:
    """Let everybody restore the checkpoint of round 2, until its stages are founded on that."""
    restored = [state(stage, version=Version(2), round=RoundId(2)) for stage in STAGES]
    for _ in range(32):  # a charter is not replaced before its members can have heard of it
        for volunteer in (A, B):
            await office.beat(volunteer, *restored)
        await office.tick(1.0)
    lineages = {stage: office.charter_lineage(stage) for stage in STAGES}
    return replace(half, lineages=lineages, version=2, generation=2)


def charters(office: Office) -> list[tuple[int, int, int, list[PeerId]]]:
    found = [Charter.from_bytes(each.payload) for each in office.services.charters.newest()]
    return [(each.generation, each.round, each.version, [seat.peer for seat in each.seats]) for each in found]


async def test_everybody_starts_over_from_the_checkpoint(tmp_path: Path) -> None:
    async with open_office(tmp_path) as office:
        half = await trained(office, tmp_path)
        newest: list[int] = []
        office.services.rollback.on_checkpoint = lambda checkpoint: newest.append(checkpoint.round)
        office.services.charters.floor = dict.fromkeys(map(StageId, STAGES), Version(2))
        office.services.charters.floor_round = RoundId(2)
        await wish(office, 2)
        assert newest == [2]
        (told,) = await events(office, "run.rolled_back")
        assert "round 2, versions 2, 2: 8 commits are given up. poisoned" in told
        assert office.services.run.checkpoints.rounds() == (2,)
        assert (office.services.run.path / "checkpoints" / "given-up-round-000004").is_dir()
        assert await office.services.database.run(peers.get_setting, WISH) is None
        # what nobody has told of yet, and what follows, is given up as well; and nobody is named to follow
        before = [each[0] for each in charters(office)]
        await half.train(1)
        reply = await half.beat()
        assert {(each.stage, each.lineage, each.members) for each in reply.given_up} == {
            (stage, half.lineages[stage], ()) for stage in STAGES
        }
        await office.tick(5.0)
        assert [each[0] for each in charters(office)] == before, "nobody goes on from what is gone"
        # who has restored the checkpoint is seated at its round
        for _ in range(32):  # a charter is not replaced before its members can have heard of it
            for volunteer in (A, B):
                restored = [state(stage, version=Version(2), round=RoundId(2)) for stage in STAGES]
                assert (await office.beat(volunteer, *restored)).given_up == ()
            await office.tick(1.0)
        assert charters(office) == [(2, 2, 2, sorted((A.peer, B.peer)))] * 2


async def test_what_is_gone_stays_gone_over_a_restart(tmp_path: Path) -> None:
    async with open_office(tmp_path) as office:
        half = await trained(office, tmp_path)
        await wish(office, 2)
    async with open_office(tmp_path) as office:
        half.office = office
        for volunteer in (A, B):
            await office.join(volunteer, wanted_stages=tuple(map(StageId, STAGES)))
        reply = await half.beat()
        assert [(each.stage, each.members) for each in reply.given_up] == [(stage, ()) for stage in STAGES]


async def test_what_was_not_reported_when_the_run_went_back_is_gone_as_well(tmp_path: Path) -> None:
    """The coordinator was away, and the wish is carried out before any peer has spoken. Oracle: replies to beats."""
    async with open_office(tmp_path) as office:
        half = await trained(office, tmp_path)
        await wish(office, 4)
        unreported = [await half.make_round() for _ in range(2)]
    async with open_office(tmp_path) as office:
        half.office = office
        for volunteer in (A, B):
            await office.join(volunteer, wanted_stages=tuple(map(StageId, STAGES)))
        for reports in unreported:
            await half.report(reports)
        reply = await half.beat()
        assert [(each.stage, each.members) for each in reply.given_up] == [(stage, ()) for stage in STAGES]
        gone = await office.services.database.run(tree.gone)
        assert len(gone) == 2 * (2 + 2)


async def test_who_is_further_than_was_reported_hears_of_it_all_the_same(tmp_path: Path) -> None:
    """With short rounds what led to where somebody stands is always still on its way. Oracle: replies to beats."""
    async with open_office(tmp_path) as office:
        half = await trained(office, tmp_path)
        await wish(office, 2)
        await half.make_round()
        reply = await half.beat()
        assert {(each.stage, each.lineage, each.members) for each in reply.given_up} == {
            (stage, half.lineages[stage], ()) for stage in STAGES
        }
        await office.tick(5.0)
        again = await founded_anew(office, half)
        await again.make_round()
        assert (await again.beat()).given_up == (), "what follows the new charter is another matter"


async def test_what_the_run_has_gone_back_from_becomes_no_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody has reported what led there, and it would be the newest: who restores it would be told to go back again.

    Oracle: what is on disk, before new charters and after them, when a laggard still offers it.
    """
    monkeypatch.setattr(checkpoints, "POLL_S", 0.0)
    async with gone_back(tmp_path) as (office, fake, collector, half):

        async def offer(version: int, lineages: Mapping[int, Lineage]) -> bool:
            await office.beat(B, *offering(fake, B, version, lineages))
            return await collector.poll()

        await half.make_round()
        assert await offer(6, half.lineages), "it is not even looked at"
        assert office.services.run.checkpoints.rounds() == (2,)
        again = await founded_anew(office, half)
        assert not await offer(7, half.lineages)
        assert office.services.run.checkpoints.rounds() == (2,)
        await again.train(1)
        assert await offer(8, again.lineages)
        assert office.services.run.checkpoints.rounds() == (8, 2)


async def test_what_nobody_reports_keeps_no_other_checkpoint_waiting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that invents a lineage, in a run that has gone back once. Oracle: what is fetched, and what is on disk."""
    monkeypatch.setattr(checkpoints, "POLL_S", 0.0)
    async with gone_back(tmp_path) as (office, fake, collector, half):
        again = await founded_anew(office, half)
        await again.train(1)
        told = (
            (A, offering(fake, A, 8, dict.fromkeys(STAGES, Lineage(b"x" * 32)))),
            (B, offering(fake, B, 7, again.lineages)),
        )
        for who, states in told:
            await office.beat(who, *states)
        assert not await collector.poll()
        fetched = len(fake.asked)
        for _ in range(3):
            for who, states in told:
                await office.beat(who, *states)
            await collector.poll()
        assert office.services.run.checkpoints.rounds() == (7, 2)
        assert not any(peer == A.peer for peer, *_ in fake.asked[fetched:]), "it is fetched once"


async def test_a_checkpoint_waits_for_the_report_of_what_led_to_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a run that has gone back once. Oracle: what is on disk before the report, and after it."""
    monkeypatch.setattr(checkpoints, "POLL_S", 0.05)
    async with gone_back(tmp_path) as (office, fake, collector, half):
        again = await founded_anew(office, half)
        reports = await again.make_round()
        await office.beat(B, *offering(fake, B, 7, again.lineages))
        polling = asyncio.create_task(collector.poll())
        await asyncio.sleep(0.3)
        assert office.services.run.checkpoints.rounds() == (2,)
        await again.report(reports)
        assert await polling
        assert office.services.run.checkpoints.rounds() == (7, 2)


async def test_the_oldest_checkpoint_does_not_make_room_while_the_run_goes_back_to_it(tmp_path: Path) -> None:
    """A new one is written at the same moment. Oracle: what is on disk."""
    async with open_office(tmp_path) as office:
        half = await trained(office, tmp_path)
        folder = office.services.run.checkpoints
        await half.train(2)
        async with office.services.run.checkpoints_turn:  # the collector writes
            made = Wish(round=RoundId(2), reason="")
            await office.services.database.run(peers.put_setting, WISH, made.to_json())
            going_back = asyncio.create_task(office.services.rollback.tick())
            await asyncio.sleep(0.2)
            assert folder.rounds() == (4, 2)
        await going_back
        assert folder.rounds() == (2,)


async def test_what_was_given_up_first_stays_so_when_the_run_goes_back_again(tmp_path: Path) -> None:
    """To a newer checkpoint, of the second attempt. Oracle: what is told of work of the first one, reported then."""
    async with open_office(tmp_path) as office:
        half = await trained(office, tmp_path)
        await wish(office, 2)
        unreported = [await half.make_round() for _ in range(2)]
        again = await founded_anew(office, half)
        await again.train(2)
        add_checkpoint(office.services.run, tmp_path / "again", 4, again)
        await again.train(2)
        await wish(office, 4)
        again = replace(again, version=4)
        late = replace(half, sequences=again.sequences)
        for reports in unreported:
            await late.report(reports)
        assert all(office.services.ledger.has_given_up(lineage) for lineage in half.lineages.values())


async def test_all_stages_are_founded_anew_also_one_that_was_no_further_than_the_checkpoint(tmp_path: Path) -> None:
    """Its next update would be given up, and it would start over then, with all stages of its peers."""
    async with open_office(tmp_path) as office:
        half = await trained(office, tmp_path)
        await wish(office, 4)
        for _ in range(32):
            for who in (A, B):
                await office.beat(
                    who,
                    *(
                        state(
                            stage,
                            version=Version(4),
                            round=RoundId(4),
                            members=0 if stage else 2,
                            lineage=NO_LINEAGE if stage else half.past[4, stage],
                        )
                        for stage in STAGES
                    ),
                )
            await office.tick(1.0)
        assert [generation for generation, *_ in charters(office)] == [2, 2]


async def test_a_checkpoint_that_is_damaged_meanwhile_changes_nothing(tmp_path: Path) -> None:
    async with open_office(tmp_path) as office:
        half = await trained(office, tmp_path)
        file = next((office.services.run.path / "checkpoints" / "round-000002").glob("stage-1.*"))
        file.write_bytes(file.read_bytes()[:-1])
        await wish(office, 2)
        assert await events(office, "run.rolled_back") == []
        assert len(await events(office, "run.not_rolled_back")) == 1
        assert office.services.run.checkpoints.rounds() == (4, 2)
        assert (await half.beat()).given_up == ()
        await office.tick()
        assert len(await events(office, "run.not_rolled_back")) == 1, "it is said once"


async def test_nothing_is_audited_for_a_while(tmp_path: Path) -> None:
    """The same rounds and versions come again, with other weights. Oracle: what the office was told."""
    async with open_office(tmp_path) as office:
        await trained(office, tmp_path)
        told: list[str] = []
        office.services.rollback.on_rollback = lambda: told.append("forget")
        await wish(office, 4)
        assert told == ["forget"]
