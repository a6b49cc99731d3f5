"""When charters are issued and whom they name.

Oracles: the rules at the head of `coordinator/founding.py`, as scenes with a fixed clock; for random
swarms, the rule that must never break: no charter for a stage in which somebody may still be committing.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coordinator.founding import Decision, Participant, Replica, Standing, View, decide, may_act
from protocol.control import Leave
from protocol.history import StateRequest
from protocol.ids import Digest, Lineage, PeerId, RoundId, StageId, Version, digest
from protocol.rounds.messages import CHARTER_CONTEXT, Charter, Seat
from protocol.signing import Signed, unseal
from tests.coordinator.office import (
    INITIAL,
    Office,
    StoppedTime,
    Volunteer,
    closing,
    commit,
    commit_report,
    lineage_of,
    open_office,
    sign_closing,
    sign_commit,
    state,
)
from tests.protocol.manifests import KEY

A, B, C, D = (Volunteer(name) for name in "abcd")
LATER = digest(b"a later state")


# -- the rules, pure ----------------------------------------------------------------------------------


def replica(name: str, stage: int, **changes: object) -> Replica:
    fields: dict[str, object] = {
        "seat": Seat(peer=PeerId(name), session=1),
        "stage": StageId(stage),
        "round": RoundId(0),
        "version": Version(0),
        "ready": True,
        "acting": False,
        "is_lost": False,
        "state_digest": INITIAL,
    }
    return Replica(**(fields | changes))  # type: ignore[arg-type]


def participant(name: str, *stages: int, standing: Standing = Standing.HERE, **changes: object) -> Participant:
    return Participant(
        peer=PeerId(name),
        standing=standing,
        stages=tuple(StageId(stage) for stage in stages),
        replicas=tuple(replica(name, stage, **changes) for stage in stages),
    )


def view(*participants: Participant, generations: dict[int, int] | None = None, **changes: object) -> View:
    fields: dict[str, object] = {
        "num_stages": 2,
        "participants": participants,
        "generations": generations or {},
        "start_peers": 2,
        "floor": {},
        "reached": {},
        "next_round": RoundId(100),
        "vacant_s": {},
        "short_s": {},
        "awake_s": 100.0,
        "settle_s": 10.0,
        "move_after_s": 5.0,
    }
    return View(**(fields | changes))  # type: ignore[arg-type]


STARTED = {0: 1, 1: 1}


def named(decision: Decision) -> dict[int, list[str]]:
    return {founding.stage: [seat.peer for seat in founding.seats] for founding in decision.foundings}


def test_the_run_starts_when_every_stage_is_ready_and_enough_peers_are() -> None:
    assert decide(view(participant("a", 0))).waiting_for == "a replica of stage 1"
    assert decide(view(participant("a", 0), participant("b", 1), start_peers=3)).waiting_for == "1 more of 3 peers"
    assert decide(view(participant("a", 0), participant("b", 1, ready=False))).waiting_for == "a replica of stage 1"
    decision = decide(view(participant("a", 0), participant("b", 1), participant("c", 0)))
    assert named(decision) == {0: ["a", "c"], 1: ["b"]}
    assert {(f.generation, f.round, f.version, f.state_digest) for f in decision.foundings} == {(1, 0, 0, INITIAL)}


def test_nothing_happens_while_all_stages_have_members() -> None:
    acting = (participant("a", 0, acting=True), participant("b", 1, acting=True), participant("c", 1))
    assert decide(view(*acting, generations=STARTED)) == Decision()


def test_a_dead_stage_is_founded_again_at_the_round_of_the_living() -> None:
    living = participant("a", 0, acting=True, round=RoundId(7), version=Version(7))
    restored = participant("c", 1, round=RoundId(5), version=Version(5), state_digest=LATER)
    (founding,) = decide(view(living, restored, generations={0: 1, 1: 3})).foundings
    assert (founding.stage, founding.generation, founding.round, founding.version) == (1, 4, 7, 5)
    assert founding.seats == (Seat(peer=PeerId("c"), session=1),)
    assert founding.state_digest == LATER


def test_a_dead_stage_waits_for_somebody_to_restore_it() -> None:
    decision = decide(view(participant("a", 0, acting=True), participant("c", 1, ready=False), generations=STARTED))
    assert (decision.foundings, decision.moves) == ((), ())
    assert decision.waiting_for == "somebody to restore stage 1"


@pytest.mark.parametrize("standing", [Standing.MISSING, Standing.UNHEARD])
def test_no_charter_over_a_member_who_may_only_have_lost_the_way_to_us(standing: Standing) -> None:
    gone = participant("b", 1, acting=True, standing=standing)
    scene = view(participant("a", 0, acting=True), gone, participant("c", 1), generations=STARTED)
    assert decide(scene) == Decision()


def test_an_unheard_peer_blocks_its_stages_even_if_nothing_is_known_of_its_replicas() -> None:
    unheard = Participant(peer=PeerId("b"), standing=Standing.UNHEARD, stages=(StageId(1),))
    scene = view(participant("a", 0, acting=True), unheard, participant("c", 1), generations=STARTED)
    assert decide(scene) == Decision()


def test_nobody_is_replaced_before_everybody_had_time_to_report_after_an_interruption() -> None:
    restored = (participant("a", 0), participant("b", 1))
    assert decide(view(*restored, generations=STARTED, awake_s=9.0)).foundings == ()
    assert len(decide(view(*restored, generations=STARTED, awake_s=10.0)).foundings) == 2


def test_when_everything_died_all_stages_start_from_the_newest_round_they_share() -> None:
    both = participant("b", 1, round=RoundId(8), version=Version(8))
    scene = view(
        participant("a", 0, round=RoundId(8), version=Version(8)),
        participant("d", 0, round=RoundId(12), version=Version(12)),
        both,
        generations=STARTED,
        start_peers=50,
    )
    decision = decide(scene)
    assert named(decision) == {0: ["a"], 1: ["b"]}
    assert {(f.generation, f.round, f.version) for f in decision.foundings} == {(2, 8, 8)}


def at(name: str, stage: int, number: int) -> Participant:
    """A replica that has come back and stands at this round and version."""
    return participant(name, stage, round=RoundId(number), version=Version(number), state_digest=LATER)


def test_stages_without_a_common_round_go_on_from_their_newest() -> None:
    """Nobody would ever hold another state: it is as if the stage that is behind had died alone."""
    decision = decide(view(at("a", 0, 8), at("c", 0, 6), at("b", 1, 4), generations=STARTED))
    assert named(decision) == {0: ["a"], 1: ["b"]}
    assert [(f.round, f.version) for f in decision.foundings] == [(8, 8), (8, 4)]


def test_when_all_that_was_reached_is_there_again_nothing_is_given_up() -> None:
    """One stage had taken the last step and the other had not; two more have restored an old checkpoint meanwhile.

    Oracle: everybody's newest version; with a step missing, the round of the checkpoint.
    """
    back = (at("a", 0, 9), at("c", 0, 5), at("b", 1, 8), at("d", 1, 5))
    reached = {StageId(0): Version(9), StageId(1): Version(8)}
    decision = decide(view(*back, generations=STARTED, reached=reached))
    assert named(decision) == {0: ["a"], 1: ["b"]}
    assert [(f.generation, f.round, f.version) for f in decision.foundings] == [(2, 9, 9), (2, 9, 8)]
    for lost in (reached | {StageId(0): Version(10)}, {StageId(0): Version(9)}):
        decision = decide(view(*back, generations=STARTED, reached=lost))
        assert named(decision) == {0: ["c"], 1: ["d"]}


@pytest.mark.parametrize("lives", [True, False], ids=["another stage lives", "everything died"])
def test_who_is_ready_with_less_leaves_a_moment_to_who_may_have_more(lives: bool) -> None:
    """C has fetched a checkpoint; B still goes through its log. Oracle: nobody is named; then C, when B has had its
    time or is not there; B if it comes up in time; C if it has all that was reached."""
    a = participant("a", 0, acting=lives, round=RoundId(9), version=Version(9))
    b, c = participant("b", 1, ready=False), at("c", 1, 5)
    reached = {StageId(0): Version(9), StageId(1): Version(9)}
    scene = partial(view, generations=STARTED, reached=reached)
    for passed_s in ({}, {StageId(1): 9.9}):
        waiting = decide(scene(a, b, c, short_s=passed_s))
        assert waiting.foundings == ()
        assert "stage 1" in waiting.waiting_for
    late = decide(scene(a, b, c, short_s={StageId(1): 10.0}))
    assert [(f.version, f.round) for f in late.foundings if f.stage == 1] == [(5, 9)]
    assert named(decide(scene(a, participant("b", 1, ready=False, standing=Standing.MISSING), c)))[1] == ["c"]
    assert named(decide(scene(a, c)))[1] == ["c"]
    assert named(decide(scene(a, at("b", 1, 9), c)))[1] == ["b"]
    assert named(decide(scene(a, b, c, reached={StageId(0): Version(9), StageId(1): Version(5)})))[1] == ["c"]


def test_a_claim_beyond_what_was_reported_does_not_take_the_run_to_its_end() -> None:
    """B says that it is at the last round. Oracle: one step more than was reported, which may be true."""
    liar = participant("b", 1, round=RoundId(1000), version=Version(4), state_digest=LATER)
    decision = decide(view(at("a", 0, 8), liar, generations=STARTED, next_round=RoundId(8)))
    assert [founding.round for founding in decision.foundings] == [9, 9]
    honest = decide(view(at("a", 0, 8), at("b", 1, 9), generations=STARTED, next_round=RoundId(8)))
    assert [founding.round for founding in honest.foundings] == [9, 9]


def test_a_state_older_than_the_newest_checkpoint_is_never_founded_on() -> None:
    """A peer that could not fetch the checkpoint offers the initial weights: taking them would be a disaster."""
    scene = view(
        participant("a", 0, acting=True, round=RoundId(9), version=Version(9)),
        participant("c", 1),
        generations=STARTED,
        floor={StageId(1): Version(8)},
    )
    assert decide(scene).waiting_for == "somebody to restore stage 1"


def test_the_newest_version_wins_then_the_state_that_most_hold_then_the_lower_digest() -> None:
    old = participant("a", 1, version=Version(4))
    lone = participant("b", 1, version=Version(5), state_digest=Digest(bytes(32)))
    pair = [participant(name, 1, version=Version(5), state_digest=LATER) for name in ("c", "d")]
    living = participant("z", 0, acting=True, round=RoundId(6))
    (founding,) = decide(view(living, old, lone, *pair, generations=STARTED)).foundings
    assert ([seat.peer for seat in founding.seats], founding.state_digest) == (["c", "d"], LATER)
    (tied,) = decide(view(living, lone, pair[0], generations=STARTED)).foundings
    assert tied.state_digest == Digest(bytes(32))


def test_a_vacant_stage_gets_a_peer_from_elsewhere_after_a_while() -> None:
    pair = (participant("a", 0, acting=True), participant("b", 0, acting=True))
    assert decide(view(*pair, generations=STARTED, vacant_s={StageId(1): 4.9})).moves == ()
    (move,) = decide(view(*pair, generations=STARTED, vacant_s={StageId(1): 5.0})).moves
    assert (move.peer, move.stage) == ("b", 1)
    alone = decide(view(pair[0], generations=STARTED, vacant_s={StageId(1): 60.0}))
    assert alone.moves == ()


peers_of_a_swarm = st.lists(
    st.tuples(
        st.integers(0, 2), st.sampled_from(Standing), st.booleans(), st.booleans(), st.integers(0, 5), st.integers(0, 3)
    ),
    max_size=8,
)


def test_what_was_given_up_is_founded_only_if_there_is_nothing_else() -> None:
    """It may be further on. Oracle: who is named."""
    lost = participant("a", 0, is_lost=True, version=Version(9))
    others = (participant("b", 0, version=Version(7)), participant("c", 1))
    assert named(decide(view(lost, *others, generations=STARTED))) == {0: ["b"], 1: ["c"]}
    assert named(decide(view(lost, others[1], generations=STARTED))) == {0: ["a"], 1: ["c"]}


@given(peers_of_a_swarm, st.booleans(), st.floats(0, 30))
def test_no_charter_ever_for_a_stage_that_may_have_members(
    swarm: list[tuple[int, Standing, bool, bool, int, int]], started: bool, awake_s: float
) -> None:
    """Oracle: `may_act`, and that only peers which are here and ready are named."""
    participants = [
        participant(
            str(number),
            stage,
            standing=standing,
            ready=ready,
            acting=acting,
            round=RoundId(round_id),
            version=Version(version),
        )
        for number, (stage, standing, ready, acting, round_id, version) in enumerate(swarm)
    ]
    scene = view(
        *participants, num_stages=3, generations={0: 1, 1: 1, 2: 1} if started else {}, awake_s=awake_s, start_peers=1
    )
    here = {one.peer for one in participants if one.standing is Standing.HERE and one.replicas[0].ready}
    for founding in decide(scene).foundings:
        assert not may_act(scene, founding.stage)
        assert founding.seats
        assert {seat.peer for seat in founding.seats} <= here


# -- the office ---------------------------------------------------------------------------------------


async def start(office: Office, *volunteers: Volunteer) -> None:
    """Register and make ready; the stages are 0, 1, 0, 1, ..."""
    for number, volunteer in enumerate(volunteers):
        assert (await office.join(volunteer)).stages == (number % 2,)
        office.time.advance(0.01)
    for number, volunteer in enumerate(volunteers):
        await office.beat(volunteer, state(number % 2))
    await office.tick()


async def test_charters_are_signed_kept_and_handed_to_everybody(tmp_path: Path) -> None:
    async with open_office(tmp_path, start_peers=2) as office:
        await office.join(A)
        await office.beat(A, state(0))
        await office.tick()
        assert office.charters() == {}
        assert office.services.journal.notes == {"run": "waiting for a replica of stage 1"}
        await office.join(B)
        await office.beat(B, state(1))
        await office.tick()
        reply = await office.beat(A, state(0))
        charters = [unseal(signed, CHARTER_CONTEXT, Charter, signer=KEY.peer_id) for signed in reply.charters]
        assert [(c.stage, c.generation, c.seats) for c in charters] == [(0, 1, (A.seat,)), (1, 1, (B.seat,))]
        assert (await office.join(C)).charters == reply.charters
        assert office.services.journal.notes == {}


async def test_a_charter_is_issued_once_though_its_members_have_not_heard_of_it_yet(tmp_path: Path) -> None:
    async with open_office(tmp_path, start_peers=2) as office:
        await start(office, A, B)
        for _ in range(3):
            await office.tick(0.5)
            await office.beat(A, state(0))
            await office.beat(B, state(1))
        assert {charter.generation for charter in office.charters().values()} == {1}


async def test_a_restarted_coordinator_hands_out_the_same_charters(tmp_path: Path) -> None:
    time = StoppedTime()
    async with open_office(tmp_path, time=time, start_peers=2) as office:
        await start(office, A, B)
        before = office.services.charters.newest()
    async with open_office(tmp_path, time=time, start_peers=2) as office:
        assert office.services.charters.newest() == before
        for _ in range(20):  # A is heard soon, B only later: nobody takes its stage meanwhile
            await office.tick(1.0)
            await office.beat(A, state(0, lineage=office.charter_lineage(0), members=1))
        assert office.services.charters.newest() == before


async def test_a_dead_stage_comes_back_with_a_joiner(tmp_path: Path) -> None:
    """B, the only replica of stage 1, is killed; A misses it; C arrives and restores the checkpoint."""
    async with open_office(tmp_path, start_peers=2, lost_after_s=10.0) as office:
        await start(office, A, B)
        acting = state(0, lineage=office.charter_lineage(0), members=1, round=3, version=3)
        await office.tick(8.0)
        await office.beat(A, acting, suspects=(B.peer,))
        assert (await office.join(C)).stages == (1,)
        await office.beat(C, state(1, version=2, round=2, state_digest=LATER))
        await office.tick()
        assert office.charters()[StageId(1)].generation == 1, "B may still be there"
        await office.tick(2.1)
        await office.beat(A, acting, suspects=(B.peer,))
        await office.tick(0.5)
        again = office.charters()[StageId(1)]
        assert (again.generation, again.round, again.version, again.seats) == (2, 3, 2, (C.seat,))
        assert office.charters()[StageId(0)].generation == 1


async def test_without_a_witness_a_silent_member_keeps_its_place_longer(tmp_path: Path) -> None:
    async with open_office(tmp_path, start_peers=2, lost_after_s=10.0, bury_factor=3.0) as office:
        await start(office, A, B)
        await office.join(C)
        await office.join(D)
        acting = state(0, lineage=office.charter_lineage(0), members=1)
        generations = []
        for _ in range(10):
            await office.tick(4.0)
            await office.beat(A, acting)
            await office.beat(D, state(1))
            generations.append(office.charters()[StageId(1)].generation)
        assert generations == [1] * 7 + [2] * 3, "B was silent for 28 s, and then for 32 s"


async def test_a_peer_that_said_goodbye_is_replaced_at_once(tmp_path: Path) -> None:
    async with open_office(tmp_path, start_peers=2) as office:
        await start(office, A, B)
        await office.services.registry.leave(B.peer, Leave(reason="stopped"))
        assert (await office.join(C)).stages == (1,)
        await office.beat(A, state(0, lineage=office.charter_lineage(0), members=1))
        await office.beat(C, state(1))
        await office.tick(9.5)
        assert office.charters()[StageId(1)].generation == 1, "everybody else may still be about to report"
        await office.beat(A, state(0, lineage=office.charter_lineage(0), members=1))
        await office.beat(C, state(1))
        await office.tick(1.0)
        assert office.charters()[StageId(1)].seats == (C.seat,)


async def test_a_joiner_that_no_commit_has_seated_is_not_a_member(tmp_path: Path) -> None:
    """B dies; C followed B's lineage and says it has members, but it was never given a seat in it."""
    async with open_office(tmp_path, start_peers=2, lost_after_s=10.0) as office:
        await start(office, A, B)
        under = sign_closing(A, closing(office.manifest, 0))
        signed = sign_commit(B, commit(office.manifest, 1, under, members=[B], parent=office.charter_lineage(1)))
        await office.beat(B, state(1), reports=((1, commit_report(signed)),))
        await office.join(C)
        await office.join(D)
        for _ in range(12):
            await office.tick(1.0)
            await office.beat(A, state(0, lineage=office.charter_lineage(0), members=1, round=1), suspects=(B.peer,))
            await office.beat(D, state(1, lineage=lineage_of(signed), members=1, version=1, round=1))
        assert office.charters()[StageId(1)].seats == (D.seat,)


async def test_a_restarted_member_is_somebody_else(tmp_path: Path) -> None:
    """Oracle: the seat in the charter names a session; the same peer with another one has no seat."""
    async with open_office(tmp_path, start_peers=2) as office:
        await start(office, A, B)
        reborn = Volunteer("b", session=2)
        await office.join(reborn)
        lineages = office.charter_lineage(0), office.charter_lineage(1)
        for _ in range(12):
            await office.tick(1.0)
            await office.beat(A, state(0, lineage=lineages[0], members=1))
            await office.beat(reborn, state(1, lineage=lineages[1], members=0))
        assert office.charters()[StageId(1)].seats == (reborn.seat,)


async def test_a_peer_that_comes_back_alone_hears_where_its_stage_stands(tmp_path: Path) -> None:
    """Oracle: the charter, then the newest of the commits that were reported under it; also after a restart."""
    time = StoppedTime()
    ask = StateRequest(stage=StageId(1))
    async with open_office(tmp_path, time=time, start_peers=2) as office:
        nothing = await office.services.charters.answer_state(B.peer, ask)
        assert (nothing.charter, nothing.commit, nothing.version) == (None, None, 0)
        await start(office, A, B)
        begun = await office.services.charters.answer_state(B.peer, ask)
        assert begun.charter == office.services.charters.newest()[1]
        assert (begun.commit, begun.version, begun.lineage) == (None, 0, office.charter_lineage(1))
        parent, reports = begun.lineage, []
        for round_id in range(3):
            under = sign_closing(A, closing(office.manifest, round_id))
            signed = sign_commit(B, commit(office.manifest, 1, under, members=[B], parent=parent))
            parent = lineage_of(signed)
            reports.append((round_id + 1, commit_report(signed)))
        await office.beat(B, state(1), reports=tuple(reports))
    async with open_office(tmp_path, time=time, start_peers=2) as office:
        word = await office.services.charters.answer_state(B.peer, ask)
        assert (word.charter, word.commit, word.version, word.lineage) == (begun.charter, signed, 3, parent)
        assert (await office.services.charters.answer_state(A.peer, StateRequest(stage=StageId(0)))).commit is None
        assert (await office.services.charters.answer_state(A.peer, StateRequest(stage=StageId(7)))).charter is None


@pytest.mark.parametrize("parent", ["unknown", "the genuine one", "its own"])
async def test_a_commit_that_no_member_has_signed_does_not_say_where_a_stage_stands(
    tmp_path: Path, parent: str
) -> None:
    """C was let in and has no seat in stage 1. Oracle: B's commit is the word, before and after a restart, and B's next
    one after that; every report is acknowledged."""
    time, ask = StoppedTime(), StateRequest(stage=StageId(1))
    async with open_office(tmp_path, time=time, start_peers=2) as office:
        await start(office, A, B)
        await office.join(C)
        first, second = (sign_closing(A, closing(office.manifest, number)) for number in range(2))
        genuine = sign_commit(B, commit(office.manifest, 1, first, members=[B], parent=office.charter_lineage(1)))
        await office.beat(B, state(1), reports=((1, commit_report(genuine)),))
        last = sign_closing(C, closing(office.manifest, office.manifest.batch.num_rounds - 1))
        claimed: dict[str, Any] = {"members": [C], "version": Version(10**6)}
        alone = sign_commit(C, commit(office.manifest, 1, last, parent=Lineage(b"x" * 32), **claimed))
        under = {"unknown": Lineage(b"y" * 32), "the genuine one": lineage_of(genuine), "its own": lineage_of(alone)}
        forged = sign_commit(C, commit(office.manifest, 1, last, parent=under[parent], **claimed))
        reply = await office.beat(C, state(0), reports=((1, commit_report(alone)), (2, commit_report(forged))))
        assert reply.acknowledged == 2
        assert (await office.services.charters.answer_state(B.peer, ask)).commit == genuine
    async with open_office(tmp_path, time=time, start_peers=2) as office:
        assert (await office.services.charters.answer_state(B.peer, ask)).commit == genuine
        await office.beat(C, state(0), reports=((3, commit_report(forged)),))
        later = sign_commit(B, commit(office.manifest, 1, second, members=[B], parent=lineage_of(genuine)))
        await office.beat(B, state(1), reports=((2, commit_report(later)),))
        assert (await office.services.charters.answer_state(B.peer, ask)).commit == later


async def test_a_report_that_was_lost_does_not_end_what_is_known_of_a_stage(tmp_path: Path) -> None:
    """Of three commits the second never comes; in the third, C signs by the seat that the one before gave it, in the
    same beat. Oracle: what is named after every one."""
    ask = StateRequest(stage=StageId(1))
    async with open_office(tmp_path, start_peers=2) as office:
        await start(office, A, B)
        await office.join(C)
        parent = office.charter_lineage(1)
        commits: list[Signed] = []
        for number, (by, joiners) in enumerate([(B, []), (B, []), (B, [C]), (C, [])]):
            under = sign_closing(A, closing(office.manifest, number))
            message = commit(office.manifest, 1, under, members=[by], joiners=joiners, parent=parent)
            commits.append(sign_commit(by, message))
            parent = lineage_of(commits[-1])
        await office.beat(B, state(1), reports=((1, commit_report(commits[0])),))
        assert (await office.services.charters.answer_state(B.peer, ask)).commit == commits[0]
        both = tuple((2 + number, commit_report(signed)) for number, signed in enumerate(commits[2:]))
        await office.beat(B, state(1), reports=both)
        assert (await office.services.charters.answer_state(B.peer, ask)).commit == commits[3]


async def test_questions_about_a_stage_never_wait_for_the_database(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Anybody may ask, and reports wait for that thread. Oracle: the answer, with a database that runs nothing."""
    async with open_office(tmp_path, start_peers=2) as office:
        await start(office, A, B)
        under = sign_closing(A, closing(office.manifest, 0))
        signed = sign_commit(B, commit(office.manifest, 1, under, members=[B], parent=office.charter_lineage(1)))
        await office.beat(B, state(1), reports=((1, commit_report(signed)),))

        async def refuse(*_: object, **__: object) -> None:
            raise AssertionError("the database was asked")

        monkeypatch.setattr(office.services.database, "run", refuse)
        word = await office.services.charters.answer_state(B.peer, StateRequest(stage=StageId(1)))
        await office.services.charters.tick()
        assert (word.commit, word.version) == (signed, 1)


async def test_commits_that_a_newer_charter_has_rolled_back_are_no_word(tmp_path: Path) -> None:
    """B came to version 1, and C has founded the stage on version 0 since. Oracle: C's charter, and no commit."""
    async with open_office(tmp_path, start_peers=2) as office:
        await start(office, A, B)
        under = sign_closing(A, closing(office.manifest, 0))
        signed = sign_commit(B, commit(office.manifest, 1, under, members=[B], parent=office.charter_lineage(1)))
        await office.beat(B, state(1), reports=((1, commit_report(signed)),))
        await office.services.registry.leave(B.peer, Leave())
        await office.join(C)
        await office.tick(9.5)
        await office.beat(A, state(0, lineage=office.charter_lineage(0), members=1))
        await office.beat(C, state(1))
        await office.tick(1.0)
        word = await office.services.charters.answer_state(B.peer, StateRequest(stage=StageId(1)))
        assert office.charters()[StageId(1)].generation == 2
        assert (word.charter, word.commit, word.lineage) == (
            office.services.charters.newest()[1],
            None,
            office.charter_lineage(1),
        )


async def test_everything_that_died_a_step_apart_goes_on_where_it_was(tmp_path: Path) -> None:
    """Stage 0 had committed round 0, stage 1 had not; both come back with what they had. Oracle: the charters."""
    async with open_office(tmp_path, start_peers=2) as office:
        await start(office, A, B)
        under = sign_closing(A, closing(office.manifest, 0))
        signed = sign_commit(A, commit(office.manifest, 0, under, members=[A], parent=office.charter_lineage(0)))
        await office.beat(A, state(0), reports=((1, commit_report(signed)),))
        again = [Volunteer(name, session=2) for name in "ab"]
        for volunteer in again:
            await office.join(volunteer)
        await office.tick(9.5)
        await office.beat(again[0], state(0, round=1, version=1, state_digest=LATER))
        await office.beat(again[1], state(1))
        await office.tick(1.0)
        charters = office.charters()
        assert [(charters[stage].round, charters[stage].version) for stage in map(StageId, (0, 1))] == [(1, 1), (1, 0)]
        assert {charter.generation for charter in charters.values()} == {2}


@pytest.mark.parametrize("comes", [True, False], ids=["in time", "never"])
async def test_a_replica_that_is_back_with_everything_is_not_outrun_by_a_checkpoint(
    tmp_path: Path, comes: bool
) -> None:
    """Everything died at version 1. D has restored version 0 after 12 s, B has what it had after 18 s. Oracle: B's
    charter; and D's, 10 s after D was ready, if B does not come up with anything."""
    async with open_office(tmp_path, start_peers=2, lost_after_s=10.0) as office:
        await start(office, A, B)
        under = sign_closing(A, closing(office.manifest, 0))
        for stage, member in enumerate((A, B)):
            parent = office.charter_lineage(stage)
            signed = sign_commit(member, commit(office.manifest, stage, under, members=[member], parent=parent))
            await office.beat(member, state(stage), reports=((1, commit_report(signed)),))
        again, back = (Volunteer(name, session=2) for name in "ab")
        for number, volunteer in enumerate((again, back, C, D)):
            assert (await office.join(volunteer)).stages == (number % 2,)
        founded_s = None
        for second in range(25):
            await office.beat(again, state(0, round=1, version=1, state_digest=LATER))
            has_come = comes and second >= 18
            await office.beat(back, *[state(1, round=1, version=1, state_digest=LATER)] * has_come)
            await office.beat(C)
            await office.beat(D, *[state(1)] * (second >= 12))
            await office.tick(1.0)
            if founded_s is None and office.charters()[StageId(1)].generation == 2:
                founded_s = second
        charter = office.charters()[StageId(1)]
        assert (founded_s, charter.seats, charter.version) == ((18, (back.seat,), 1) if comes else (22, (D.seat,), 0))


async def test_an_empty_stage_takes_a_peer_from_a_full_one(tmp_path: Path) -> None:
    async with open_office(tmp_path, start_peers=2, move_after_s=5.0) as office:
        await start(office, A, B, C)
        lineage = office.charter_lineage(0)
        await office.services.registry.leave(B.peer, Leave())
        for _ in range(18):
            await office.tick(1.0)
            await office.beat(A, state(0, lineage=lineage, members=2))
            reply = await office.beat(C, state(0, lineage=lineage, members=2))
        assert reply.stages == (1,)
        await office.beat(C, state(1))
        await office.tick(1.0)
        assert office.charters()[StageId(1)].seats == (C.seat,)
