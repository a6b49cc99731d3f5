"""Which half of a torn run goes on. Oracle: halves that are put together by hand, and tokens added up."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest

from coordinator.forks import MAX_LINKS, Forks
from coordinator.store import history
from protocol.control import Report, StageState
from protocol.ids import Lineage, PeerId, RoundId, StageId, Version, digest
from protocol.rounds.lineage import next_lineage, root_lineage
from protocol.rounds.messages import Commit, Contribution
from tests.coordinator.office import (
    Office,
    Volunteer,
    closing,
    closing_report,
    commit,
    commit_report,
    open_office,
    sign_closing,
    sign_commit,
    state,
)
from tests.protocol.rounds.builders import commit as plain_commit

ROOTS = (Lineage(digest(b"stage 0")), Lineage(digest(b"stage 1")))
GENERATIONS = {StageId(0): 1, StageId(1): 1}
A, B, C, D = (Volunteer(name) for name in "abcd")


def grow(forks: Forks, stage: int, parent: Lineage, half: str, *, rounds: range, tokens: int = 30) -> list[Lineage]:
    """Let one half commit some rounds of a stage."""
    lineages = []
    for number in rounds:
        like = Commit.from_bytes(plain_commit(parent).payload)
        under = {"round": RoundId(number), "closing_digest": digest(half.encode(), bytes([number]))}
        made = like.model_copy(
            update={
                "stage": StageId(stage),
                "first_round": RoundId(number),
                "round": RoundId(number),
                "version": Version(number + 1),
                "contributors": (Contribution(peer=PeerId("a"), tokens=tokens),),
                "summary": like.summary.model_copy(update=under),
            }
        )
        parent = next_lineage(parent, made.to_bytes())
        forks.note(made, parent)
        lineages.append(parent)
    return lineages


def test_a_run_that_is_whole_has_no_verdict() -> None:
    """The same commit twice is one; a stage that is ahead is none."""
    forks = Forks()
    for _ in range(2):
        grow(forks, 0, ROOTS[0], "left", rounds=range(3))
        grow(forks, 1, ROOTS[1], "left", rounds=range(2))
    assert forks.verdict(GENERATIONS) is None


@pytest.mark.parametrize("order", list(itertools.permutations(range(4))))
def test_the_half_that_has_done_more_goes_on_with_all_of_its_stages(order: tuple[int, ...]) -> None:
    """The right half has more tokens in all, though not at stage 1. It does not matter who is heard first."""
    forks = Forks()
    whole = [grow(forks, stage, ROOTS[stage], "whole", rounds=range(2))[-1] for stage in (0, 1)]
    grown: dict[int, list[Lineage]] = {}
    work = [
        (0, "left", range(2, 4), 30),
        (1, "left", range(2, 4), 60),
        (0, "right", range(2, 5), 90),
        (1, "right", range(2, 4), 30),
    ]
    for index in order:
        stage, half, rounds, tokens = work[index]
        grown[index] = grow(forks, stage, whole[stage], half, rounds=rounds, tokens=tokens)
    verdict = forks.verdict(GENERATIONS)
    assert verdict is not None
    assert {stage: branch.tip for stage, branch in verdict.winners.items()} == {0: grown[2][-1], 1: grown[3][-1]}
    assert {(b.stage, b.num_commits, b.tokens, b.version) for b in verdict.losers} == {(0, 2, 60, 4), (1, 2, 120, 4)}
    members = verdict.winners[StageId(0)].members
    assert len(members) == 3
    for lineage in grown[0]:
        assert verdict.rejoins(StageId(0), lineage) == members
    for stage, lineage in [(0, whole[0]), (0, grown[2][0]), (1, grown[3][-1]), (1, grown[0][0])]:
        assert verdict.rejoins(StageId(stage), lineage) == ()


def test_of_equal_halves_the_lower_lineage_goes_on() -> None:
    forks = Forks()
    left, right = (grow(forks, 0, ROOTS[0], half, rounds=range(2)) for half in ("left", "right"))
    verdict = forks.verdict(GENERATIONS)
    assert verdict is not None
    assert verdict.winners[StageId(0)].lineages == frozenset(min(left, right, key=min))


def test_a_charter_ends_it() -> None:
    """What parted under an older generation is history."""
    forks = Forks()
    for half in ("left", "right"):
        grow(forks, 0, ROOTS[0], half, rounds=range(2))
    assert forks.verdict({StageId(0): 2, StageId(1): 1}) is None


def test_only_so_much_is_remembered() -> None:
    forks = Forks()
    for half in ("left", "right"):
        grow(forks, 0, ROOTS[0], half, rounds=range(1))
    for start in range(0, MAX_LINKS, 200):
        grow(forks, 1, Lineage(digest(b"far", bytes([start // 200]))), "whole", rounds=range(200))
    assert forks.verdict(GENERATIONS) is None
    assert len(forks._links) == MAX_LINKS
    assert set(forks._children) == {link.parent for link in forks._links.values()}


async def test_who_stands_on_the_wrong_side_is_told_so_and_what_it_cost_is_said(tmp_path: Path) -> None:
    """A and B host both stages and are torn apart after the start. Oracle: the replies to their beats; the events."""
    async with open_office(tmp_path) as office:
        for volunteer in (A, B):
            await office.join(volunteer, wanted_stages=(StageId(0), StageId(1)))
        for volunteer in (A, B):
            await office.beat(volunteer, state(0), state(1))
        await office.tick()
        roots = dict(enumerate(map(root_lineage, office.services.charters.newest())))
        ours = await _alone(office, A, roots, rounds=2)
        theirs = await _alone(office, B, roots, rounds=1)
        await office.tick()
        reply = await office.beat(A, *_states(ours))
        assert reply.rejoins == ()
        reply = await office.beat(B, *_states(theirs))
        assert {(each.stage, each.lineage, each.members) for each in reply.rejoins} == {
            (stage, lineage, (A.peer,)) for stage, lineage in theirs.items()
        }
        await office.tick()
        events = await office.services.database.run(lambda db: history.last_events(db, limit=50))
        torn = [event.detail for event in events if event.kind == "stage.torn"]
        assert len(torn) == 2, "once for each stage"
        assert all("1 committed rounds with 256 tokens" in detail for detail in torn)


async def _alone(office: Office, by: Volunteer, roots: dict[int, Lineage], *, rounds: int) -> dict[int, Lineage]:
    """Let one peer go on alone, and report it."""
    lineages, sequence = dict(roots), 0
    for number in range(rounds):
        under = sign_closing(by, closing(office.manifest, number))
        reports: list[Report] = [closing_report(under)]
        for stage in (0, 1):
            message = commit(office.manifest, stage, under, members=(by,), parent=lineages[stage])
            signed = sign_commit(by, message)
            lineages[stage] = next_lineage(lineages[stage], signed.payload)
            reports.append(commit_report(signed))
        numbered = tuple((sequence + offset, one) for offset, one in enumerate(reports, start=1))
        sequence += len(reports)
        await office.beat(by, *_states(lineages), reports=numbered)
    return lineages


def _states(lineages: dict[int, Lineage]) -> list[StageState]:
    return [state(stage, lineage=lineage, members=1, version=Version(1)) for stage, lineage in lineages.items()]
