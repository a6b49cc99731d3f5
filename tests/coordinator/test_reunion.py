"""Two halves that have met: settled once, kept for good, told to those whom it concerns.

Oracles: replies to beats, events and counters, by hand. A, B and C host both stages; after the start C is torn away.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from coordinator.store import history, tallies
from protocol.control import BeatReply, Leave, Report, StageState
from protocol.history import StateRequest
from protocol.ids import Lineage, PeerId, StageId, Version
from tests.coordinator.office import (
    Office,
    StoppedTime,
    Volunteer,
    closing,
    closing_report,
    commit,
    commit_report,
    lineage_of,
    open_office,
    sign_closing,
    sign_commit,
    state,
)

A, B, C, D = (Volunteer(name) for name in "abcd")
STAGES = (0, 1)
TOKENS_PER_ROUND = 256
LOST_AFTER_S = 10.0


@dataclass
class Half:
    """Some who train on by themselves, and report it."""

    office: Office
    members: Sequence[Volunteer]
    lineages: dict[int, Lineage]
    version: int
    rival: Lineage | None = None
    generation: int = 1
    """Of the charter that it follows."""
    sequences: dict[PeerId, int] = field(default_factory=dict)
    past: dict[tuple[int, int], Lineage] = field(default_factory=dict)
    """Where it stood, by version and stage."""

    async def train(self, rounds: int, *, tasks: int | None = None) -> None:
        """Commit some rounds of both stages, with so many of a round's microbatches (all by default)."""
        for _ in range(rounds):
            await self.report(await self.make_round(tasks=tasks))

    async def make_round(self, *, tasks: int | None = None) -> list[Report]:
        """Commit a round, and return what there is to report of it."""
        under = sign_closing(self.members[0], closing(self.office.manifest, self.version, tasks=tasks))
        reports: list[Report] = [closing_report(under)]
        for stage in STAGES:
            message = commit(self.office.manifest, stage, under, members=self.members, parent=self.lineages[stage])
            signed = sign_commit(self.members[0], message.model_copy(update={"generation": self.generation}))
            self.lineages[stage] = lineage_of(signed)
            reports.append(commit_report(signed))
        self.version += 1
        self.past |= {(self.version, stage): lineage for stage, lineage in self.lineages.items()}
        return reports

    async def report(self, reports: Sequence[Report]) -> None:
        """Let all members report the same."""
        for member in self.members:
            first = self.sequences.get(member.peer, 0) + 1
            self.sequences[member.peer] = first + len(reports)
            await self.office.beat(member, *self.states(), reports=list(enumerate(reports, start=first)))

    async def beat(self) -> BeatReply:
        """Say where it stands; return what the first of them hears."""
        replies = [await self.office.beat(member, *self.states()) for member in self.members]
        return replies[0]

    def states(self) -> list[StageState]:
        return [
            state(
                stage,
                lineage=self.lineages[stage],
                members=len(self.members),
                version=Version(self.version),
                rival=self.rival if stage == 0 else None,
            )
            for stage in STAGES
        ]


async def torn(office: Office, *, large: int, small: int) -> tuple[Half, Half]:
    """Found the run, and let two halves train so many rounds on; they have not met yet."""
    for volunteer in (A, B, C):
        await office.join(volunteer, wanted_stages=tuple(map(StageId, STAGES)))
    for volunteer in (A, B, C):
        await office.beat(volunteer, *(state(stage) for stage in STAGES))
    await office.tick()
    roots = {stage: office.charter_lineage(stage) for stage in STAGES}
    halves = Half(office, (A, B), dict(roots), 0), Half(office, (C,), dict(roots), 0)
    await halves[0].train(large)
    await halves[1].train(small)
    return halves


async def pass_time(office: Office, *halves: Half, seconds: float) -> None:
    """Let time pass, with a beat of everybody each second."""
    for _ in range(int(seconds)):
        for half in halves:
            await half.beat()
        await office.tick(1.0)


async def meet(office: Office, one: Half, other: Half, *, seconds: float = LOST_AFTER_S + 2.0) -> None:
    """Let them hear of each other, and time pass."""
    one.rival, other.rival = other.lineages[0], one.lineages[0]
    await pass_time(office, one, other, seconds=seconds)


async def torn_events(office: Office) -> list[str]:
    events = await office.services.database.run(lambda db: history.last_events(db, limit=50))
    return sorted(event.detail for event in events if event.kind == "stage.torn")


def lost(reply: BeatReply) -> set[tuple[int, Lineage, frozenset[PeerId]]]:
    return {(each.stage, each.lineage, frozenset(each.members)) for each in reply.given_up}


async def test_the_half_that_has_done_less_is_told_whom_to_follow(tmp_path: Path) -> None:
    """Not before they have met, nor before both had the time to report. What it costs is counted."""
    async with open_office(tmp_path, lost_after_s=LOST_AFTER_S) as office:
        ab, c = await torn(office, large=3, small=2)
        await pass_time(office, ab, c, seconds=20.0)
        assert await torn_events(office) == [], "they cannot reach each other"
        await meet(office, ab, c, seconds=LOST_AFTER_S - 2.0)
        assert await torn_events(office) == [], "something may be on its way"
        await meet(office, ab, c)
        assert lost(await ab.beat()) == set()
        assert lost(await c.beat()) == {(stage, c.lineages[stage], frozenset({A.peer, B.peer})) for stage in STAGES}
        assert await torn_events(office) == [
            f"stage {stage}: 2 committed rounds with {2 * TOKENS_PER_ROUND} tokens, up to version 2, are given up "
            "for version 3 of the other half"
            for stage in STAGES
        ]
        found = await office.services.database.run(tallies.counters)
        assert (found.rounds_rolled_back, found.tokens_dropped) == (4, 4 * TOKENS_PER_ROUND)


@pytest.mark.parametrize("restart", [False, True])
async def test_what_was_settled_stays_settled(tmp_path: Path, restart: bool) -> None:
    """The lost half has not heard of it, trains on and has done more by now. Oracle: replies, and one event each."""
    async with AsyncExitStack() as stack:
        time = StoppedTime()
        office = await stack.enter_async_context(open_office(tmp_path, time=time, lost_after_s=LOST_AFTER_S))
        ab, c = await torn(office, large=3, small=2)
        await meet(office, ab, c)
        if restart:
            await stack.aclose()
            office = await stack.enter_async_context(open_office(tmp_path, time=time, lost_after_s=LOST_AFTER_S))
            ab.office = c.office = office
        await c.train(6)
        await meet(office, ab, c)
        assert lost(await ab.beat()) == set()
        assert lost(await c.beat()) == {(stage, c.lineages[stage], frozenset({A.peer, B.peer})) for stage in STAGES}
        assert len(await torn_events(office)) == 2
        found = await office.services.database.run(tallies.counters)
        assert found.rounds_rolled_back == 2 * 8


async def test_the_newest_commit_is_one_that_goes_on(tmp_path: Path) -> None:
    """The lost half is two rounds ahead. Oracle: what a peer hears that has nobody else to ask."""
    async with open_office(tmp_path, lost_after_s=LOST_AFTER_S) as office:
        ab, c = await torn(office, large=3, small=5)  # C alone cannot win over two
        await meet(office, ab, c)
        for stage in STAGES:
            word = await office.services.charters.answer_state(C.peer, StateRequest(stage=StageId(stage)))
            assert (word.lineage, word.version) == (ab.lineages[stage], 3)


async def test_a_round_that_both_have_closed_stands_as_the_half_has_closed_it_that_goes_on(tmp_path: Path) -> None:
    """Round 3 was closed by the lost half only: it stands until it is trained again. Oracle: tokens of each closing."""
    async with open_office(tmp_path, lost_after_s=LOST_AFTER_S) as office:
        ab, c = await torn(office, large=0, small=4)  # with all of their tasks
        await ab.train(3, tasks=2)
        await meet(office, ab, c)
        rounds = await office.services.database.run(tallies.round_tallies)
        half = TOKENS_PER_ROUND // 2
        assert [(each.round, each.tokens) for each in rounds] == [(0, half), (1, half), (2, half), (3, 2 * half)]


async def test_a_swarm_that_is_torn_twice_is_settled_twice(tmp_path: Path) -> None:
    """C has come back, and B is torn away. Oracle: two events for each stage, with figures of their own."""
    async with open_office(tmp_path, lost_after_s=LOST_AFTER_S) as office:
        ab, c = await torn(office, large=3, small=2)
        await meet(office, ab, c)
        sequences = ab.sequences | c.sequences
        both = Half(office, (A, C, B), dict(ab.lineages), ab.version, sequences=sequences)
        await both.train(1)
        ac = Half(office, (A, C), dict(both.lineages), both.version, sequences=sequences)
        b = Half(office, (B,), dict(both.lineages), both.version, sequences=sequences)
        await ac.train(4)
        await b.train(3)
        await meet(office, ac, b)
        assert lost(await ac.beat()) == set()
        assert lost(await b.beat()) == {(stage, b.lineages[stage], frozenset({A.peer, C.peer})) for stage in STAGES}
        assert [detail.split(" are given up")[0] for detail in await torn_events(office)] == [
            f"stage {stage}: {rounds} committed rounds with {TOKENS_PER_ROUND * rounds} tokens, up to version {end},"
            for stage in STAGES
            for rounds, end in ((2, 2), (3, 7))
        ]


async def test_a_half_that_joined_late_is_not_settled_on_half_of_what_it_has_done(tmp_path: Path) -> None:
    """C tells of its newest commits before others tell of those before: they may be anybody's until then.

    Oracle: no settlement as long as something is missing; then the right one, and nothing of the trunk is given up.
    """
    async with open_office(tmp_path, lost_after_s=LOST_AFTER_S) as office:
        everybody, _ = await torn(office, large=0, small=0)
        trunk = Half(office, (A, B, C), dict(everybody.lineages), 0)
        await trunk.train(3)
        ab = Half(office, (A, B), dict(trunk.lineages), trunk.version, sequences=trunk.sequences)
        c = Half(office, (C,), dict(trunk.lineages), trunk.version, sequences=trunk.sequences)
        await ab.train(1)
        first = await c.make_round()
        second = await c.make_round()
        await c.report(second)
        await meet(office, ab, c, seconds=2 * LOST_AFTER_S)
        assert await torn_events(office) == []
        await c.report(first)
        await c.report(second)
        await meet(office, ab, c)
        assert len(await torn_events(office)) == 2
        found = await office.services.database.run(tallies.counters)
        assert found.rounds_rolled_back == 2 * 2


async def test_a_liar_finds_no_second_witness_in_who_is_a_beat_behind(tmp_path: Path) -> None:
    """C makes rounds up from where B stood a beat ago. Oracle: nobody but C is told to follow others.

    As long as B has not said where it has gone on, one word stands against another, and nothing is settled.
    """
    async with open_office(tmp_path, lost_after_s=LOST_AFTER_S) as office:
        everybody, _ = await torn(office, large=0, small=0)
        trunk = Half(office, (A, B, C), dict(everybody.lineages), 0)
        await trunk.train(1)
        liar = Half(office, (C,), dict(trunk.lineages), trunk.version, sequences=trunk.sequences)
        await liar.train(6)
        behind = Half(office, (B,), dict(trunk.lineages), trunk.version, sequences=trunk.sequences)
        ahead = Half(office, (A, B), dict(trunk.lineages), trunk.version, sequences=trunk.sequences)
        await ahead.train(1)
        ahead.members = (A,)
        liar.rival, ahead.rival = ahead.lineages[0], liar.lineages[0]
        await pass_time(office, ahead, behind, liar, seconds=2 * LOST_AFTER_S)
        assert await torn_events(office) == []
        ahead.members = (A, B)
        await pass_time(office, ahead, liar, seconds=LOST_AFTER_S)
        assert lost(await ahead.beat()) == set()
        assert {each[2] for each in lost(await liar.beat())} == {frozenset({A.peer, B.peer})}


async def test_a_tip_that_is_not_reported_yet_changes_no_choice(tmp_path: Path) -> None:
    """At the moment of the choice AB's newest commit of stage 1 is still on its way. Oracle: C gives way."""
    async with open_office(tmp_path, lost_after_s=LOST_AFTER_S) as office:
        ab, c = await torn(office, large=4, small=2)
        await meet(office, ab, c, seconds=LOST_AFTER_S - 2.0)
        late = await ab.make_round()
        await meet(office, ab, c)
        assert len(await torn_events(office)) == 2
        await ab.report(late)
        assert lost(await ab.beat()) == set()
        assert {each[0] for each in lost(await c.beat())} == set(STAGES)


async def test_a_stranger_is_nobody_to_follow(tmp_path: Path) -> None:
    """D says that it is a member of a lineage that nobody has heard of."""
    async with open_office(tmp_path, lost_after_s=LOST_AFTER_S) as office:
        ab, c = await torn(office, large=3, small=2)
        await office.join(D, wanted_stages=tuple(map(StageId, STAGES)))
        await office.beat(D, *(state(stage, lineage=Lineage(bytes([7]) * 32), members=3) for stage in STAGES))
        await meet(office, ab, c)
        assert {each[2] for each in lost(await c.beat())} == {frozenset({A.peer, B.peer})}


async def test_what_was_given_up_goes_on_if_nothing_else_is_left(tmp_path: Path) -> None:
    """A and B leave before C has followed them. Oracle: the next charters; A's and B's rounds count as lost."""
    async with open_office(tmp_path, lost_after_s=LOST_AFTER_S) as office:
        ab, c = await torn(office, large=4, small=2)
        await meet(office, ab, c)
        for volunteer in (A, B):
            await office.services.registry.leave(volunteer.peer, Leave())
        await pass_time(office, c, seconds=3 * LOST_AFTER_S)
        assert {stage: (each.generation, each.version) for stage, each in office.charters().items()} == dict.fromkeys(
            STAGES, (2, 2)
        )
        rollbacks = await office.services.database.run(tallies.rollbacks)
        assert {(each.stage, each.torn, each.rounds) for each in rollbacks} == {(stage, False, 2) for stage in STAGES}


async def test_a_copy_of_what_was_given_up_is_said_to_be_none(tmp_path: Path) -> None:
    """C comes back with it on its drive."""
    async with open_office(tmp_path, lost_after_s=LOST_AFTER_S) as office:
        ab, c = await torn(office, large=3, small=2)
        await meet(office, ab, c)
        for half, is_lost in ((ab, False), (c, True)):
            request = StateRequest(stage=StageId(0), standing=half.lineages[0])
            assert (await office.services.charters.answer_state(C.peer, request)).is_lost is is_lost


async def test_a_word_about_a_rival_costs_nothing_as_long_as_all_are_one(tmp_path: Path) -> None:
    """It can be said in every beat. Oracle: what the database is asked for while time stands still."""
    async with open_office(tmp_path, lost_after_s=LOST_AFTER_S) as office:
        ab, c = await torn(office, large=3, small=0)
        c.lineages, c.version = dict(ab.lineages), ab.version
        c.rival = Lineage(bytes(32))
        await pass_time(office, ab, c, seconds=3.0)
        asked: list[str] = []
        run = office.services.database.run

        async def counted(function: Any, *arguments: Any, **more: Any) -> Any:
            asked.append(function.__name__)
            return await run(function, *arguments, **more)

        office.services.database.run = counted  # type: ignore[method-assign]
        for _ in range(10):
            await office.services.reunion.tick()
        assert asked.count("paths") <= len(STAGES)


async def test_who_only_says_that_it_has_met_somebody_changes_nothing(tmp_path: Path) -> None:
    async with open_office(tmp_path, lost_after_s=LOST_AFTER_S) as office:
        ab, c = await torn(office, large=3, small=0)
        c.lineages, c.version = dict(ab.lineages), ab.version
        c.rival = ab.rival = Lineage(bytes(32))
        await pass_time(office, ab, c, seconds=15.0)
        assert await torn_events(office) == []
        assert lost(await c.beat()) == set()
