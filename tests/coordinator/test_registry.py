"""Who is let in, where each is placed, and when silence means loss.

Oracles: the rules of placement counted by hand; a clock that only the test moves.
"""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coordinator.placement import Host, choose_mover, place
from coordinator.store import history, tallies
from protocol.architecture import preset
from protocol.control import Leave, PeerState, StageState
from protocol.errors import ClockError, IncompatibleError, RefusedError, WireError
from protocol.ids import PeerId, RunId, StageId
from protocol.manifest import Manifest, ModelSpec
from protocol.records import check_admission
from protocol.signing import Signed
from tests.coordinator.office import START_WALL_S, StoppedTime, Volunteer, open_office, state, work
from tests.protocol.manifests import KEY, manifest

A, B, C = Volunteer("a"), Volunteer("b"), Volunteer("c")


def with_stages(number: int) -> Manifest:
    config = {**preset("tiny"), "num_hidden_layers": max(4, number)}
    return manifest(model=ModelSpec(config_json=json.dumps(config), num_stages=number, init_seed=0))


# -- placement ----------------------------------------------------------------------------------------


def host(name: str, *stages: int, ready: bool = True, **changes: object) -> Host:
    own = tuple(StageId(stage) for stage in stages)
    return Host(peer=PeerId(name), stages=own, ready=frozenset(own if ready else ()), **changes)  # type: ignore[arg-type]


def test_an_empty_swarm_fills_from_the_first_stage_upwards() -> None:
    hosts: list[Host] = []
    for number in range(4):
        hosts.append(host(str(number), *place((), hosts, num_stages=4)))
    assert [placed.stages for placed in hosts] == [(0,), (1,), (2,), (3,)]


@given(st.integers(1, 8), st.integers(1, 40))
def test_coverage_never_differs_by_more_than_one(num_stages: int, num_peers: int) -> None:
    """Oracle: filling evenly is what the rule says, so the counts of any two stages stay within one."""
    hosts: list[Host] = []
    for number in range(num_peers):
        hosts.append(host(str(number), *place((), hosts, num_stages=num_stages)))
    counts = Counter(placed.stages[0] for placed in hosts)
    assert max(counts.values()) - min(counts[StageId(stage)] for stage in range(num_stages)) <= 1


def test_the_stage_that_lost_its_replicas_is_filled_first() -> None:
    assert place((), [host("a", 0), host("b", 2), host("c", 2)], num_stages=3) == (1,)


def test_a_joiner_gets_the_stage_that_it_has_kept_if_that_is_as_needed_as_another() -> None:
    hosts = [host("a", 0)]
    assert place((), hosts, num_stages=3, kept=[StageId(2)]) == (2,)
    assert place((), hosts, num_stages=3, kept=[StageId(0)]) == (1,)


def test_a_span_covers_the_emptiest_stages_in_a_row() -> None:
    hosts = [host("a", 0), host("b", 0), host("c", 3)]
    assert place((), hosts, num_stages=4, span=2) == (1, 2)
    assert place((), hosts, num_stages=4, span=9) == (0, 1, 2, 3)


def test_wishes_are_honoured_or_refused() -> None:
    hosts = [host("a", 1)]
    assert place((StageId(2), StageId(1)), hosts, num_stages=3) == (1, 2)
    with pytest.raises(RefusedError, match="stages 0 to 2"):
        place((StageId(3),), hosts, num_stages=3)
    with pytest.raises(RefusedError, match="consecutive"):
        place((StageId(0), StageId(2)), hosts, num_stages=3)


def test_who_moves_comes_from_the_best_covered_stage_and_leaves_a_ready_replica_behind() -> None:
    hosts = [
        host("a", 0),
        host("b", 0),
        host("c", 1),
        host("d", 1, joined_s=1.0),
        host("e", 1, joined_s=2.0, pinned=True),
    ]
    assert choose_mover(hosts, StageId(2), num_stages=3) == "d"
    assert choose_mover([host("a", 0), host("b", 0, ready=False)], StageId(1), num_stages=2) == "b"
    assert choose_mover([host("a", 0)], StageId(1), num_stages=2) is None
    assert choose_mover([host("a", 0, 1), host("b", 0, 1)], StageId(2), num_stages=3) is None


# -- registration -------------------------------------------------------------------------------------


async def test_a_welcome_holds_the_manifest_a_valid_pass_and_a_stage(tmp_path: Path) -> None:
    async with open_office(tmp_path) as office:
        welcome = await office.join(A)
        run = office.manifest
        assert welcome.manifest == office.services.run.signed
        assert (welcome.stages, welcome.charters, welcome.clock_s) == ((0,), (), START_WALL_S)
        admission = check_admission(
            welcome.admission, run=run.run_id, coordinator=KEY.peer_id, peer=A.peer, now_s=START_WALL_S + 3600
        )
        assert admission.name == "a"
        assert (await office.join(B)).stages == (1,)


async def test_strangers_are_refused_for_one_reason_each(tmp_path: Path) -> None:
    async with open_office(tmp_path, access="invite") as office:
        with pytest.raises(IncompatibleError, match="protocol 99"):
            await office.join(A, protocol=99)
        with pytest.raises(RefusedError, match="serves run"):
            await office.join(A, run=RunId("0" * 32))
        for token in (None, "", "seasame"):
            with pytest.raises(RefusedError, match="token"):
                await office.join(A, token=token)
        assert office.services.registry.live() == ()


@pytest.mark.parametrize(
    ("skew_s", "side"), [(3.5, "ahead of"), (-14.0, "behind"), (3600.0, "ahead of"), (-3600.0, "behind")]
)
async def test_a_clock_that_is_certainly_wrong_is_refused(tmp_path: Path, skew_s: float, side: str) -> None:
    async with open_office(tmp_path) as office:
        with pytest.raises(ClockError, match=side):
            await office.join(A, clock_s=START_WALL_S + skew_s)


@pytest.mark.parametrize("skew_s", [2.9, -2.9, -12.0])
async def test_a_clock_that_may_be_right_is_left_to_the_peers_own_check(tmp_path: Path, skew_s: float) -> None:
    """A request may lie on its way for up to a call's deadline, so that seconds behind prove nothing."""
    async with open_office(tmp_path) as office:
        await office.join(A, clock_s=START_WALL_S + skew_s)


async def test_peers_that_join_at_the_same_moment_get_different_stages(tmp_path: Path) -> None:
    async with open_office(tmp_path) as office:
        welcomes = await asyncio.gather(office.join(A), office.join(B))
        assert {welcome.stages for welcome in welcomes} == {(0,), (1,)}


async def test_whoever_is_probably_dead_holds_no_place_for_itself(tmp_path: Path) -> None:
    """A replacement arrives before its predecessor counts as lost, and must get the predecessor's stage."""
    async with open_office(tmp_path, lost_after_s=10.0) as office:
        await office.join(A)
        await office.join(B)
        office.time.advance(4.0)
        await office.beat(B, state(1), suspects=(A.peer,))
        assert (await office.join(C)).stages == (0,)


async def test_without_doubt_a_joiner_goes_to_the_least_covered_stage(tmp_path: Path) -> None:
    async with open_office(tmp_path) as office:
        await office.join(A)
        await office.join(B)
        assert (await office.join(C)).stages == (0,)
        assert (await office.join(Volunteer("d"))).stages == (1,)


# -- beats --------------------------------------------------------------------------------------------


async def test_a_new_pass_for_the_same_tenure_changes_nothing_else(tmp_path: Path) -> None:
    """Oracle: the roster before. Registering again is how a pass is renewed, so it must not unseat anybody."""
    async with open_office(tmp_path) as office:
        await office.join(A, session=7)
        await office.join(B)
        await office.beat(A, state(0), addresses=("/ip4/10.0.0.1/tcp/1",))
        before = office.services.registry.live()
        welcome = await office.join(A, session=7, hosting=(StageId(0),))
        assert welcome.stages == (0,)
        after = {peer.peer: peer for peer in office.services.registry.live()}
        assert (after[A.peer].replicas, after[A.peer].state) == ((state(0),), PeerState.TRAINING)
        assert {peer.peer for peer in before} == set(after)


async def test_who_was_moved_keeps_the_new_stages_in_its_new_tenure(tmp_path: Path) -> None:
    """Oracle: the coordinator's own last word, against what its disk and the counts would speak for."""
    async with open_office(tmp_path) as office:
        await office.join(A, session=7)
        await office.join(B)
        await office.services.registry.assign(A.peer, (StageId(1),))
        welcome = await office.join(A, session=8, hosting=(StageId(1),))
        assert welcome.stages == (1,)
        moved = next(peer for peer in office.services.registry.live() if peer.peer == A.peer)
        assert (moved.session, moved.replicas) == (8, ())


async def test_who_has_not_gone_cannot_join_once_more(tmp_path: Path) -> None:
    """Oracle: the events in their order. A move and a restarted process are no new peers; one that was gone is."""
    async with open_office(tmp_path, lost_after_s=10.0) as office:
        registry = office.services.registry
        await office.join(A, session=1)
        await office.join(A, session=1, hosting=(StageId(0),))  # a new pass
        await registry.assign(A.peer, (StageId(1),))
        await office.join(A, session=2, hosting=(StageId(1),))  # a tenure on the stage that it was moved to
        await office.join(A, session=3)  # its process was restarted before anybody missed it
        await office.tick(11.0)
        await office.join(A, session=3)
        await office.tick(11.0)
        await office.join(A, session=4)
        await registry.leave(A.peer, Leave())
        await office.join(A, session=4)
        events = await office.services.database.run(history.last_events, limit=50)
        assert [event.kind.removeprefix("peer.") for event in reversed(events)] == [
            *("joined", "moved", "rejoined", "rejoined", "lost", "returned", "lost", "joined", "left", "joined"),
        ]
        assert (await office.services.database.run(tallies.counters)).peers_joined == 3


async def test_a_coordinator_without_memory_leaves_a_peer_where_it_is(tmp_path: Path) -> None:
    async with open_office(tmp_path) as office:
        assert (await office.join(A, session=7, hosting=(StageId(1),))).stages == (1,)


async def test_a_stranger_cannot_beat(tmp_path: Path) -> None:
    async with open_office(tmp_path) as office:
        with pytest.raises(RefusedError, match="does not know you"):
            await office.beat(A)


@pytest.mark.parametrize(
    "states",
    [(state(2),), (state(0, round=99),), (state(0, version=1 << 60),), (state(0), state(0)), (state(0, round=-1),)],
)
async def test_a_beat_about_what_cannot_be_is_refused(tmp_path: Path, states: tuple[StageState, ...]) -> None:
    async with open_office(tmp_path) as office:
        await office.join(A)
        with pytest.raises(WireError):
            await office.beat(A, *states)


async def test_a_beat_names_the_other_members_with_their_addresses(tmp_path: Path) -> None:
    async with open_office(tmp_path) as office:
        await office.join(A)
        await office.join(B)
        await office.beat(B, addresses=("/ip4/192.0.2.7/tcp/1",))
        reply = await office.beat(A)
        assert reply.members == ((1, B.peer, ("/ip4/192.0.2.7/tcp/1",)),)
        assert reply.stages == (0,)
        assert not reply.finished


async def test_a_large_swarm_is_hinted_at_in_part_and_differently_to_everybody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("coordinator.registry.MAX_HINTS", 4)
    async with open_office(tmp_path, run=with_stages(1)) as office:
        crowd = [Volunteer(f"v{number}") for number in range(10)]
        for volunteer in crowd:
            await office.join(volunteer)
        hints = [frozenset(peer for _, peer, _ in (await office.beat(one)).members) for one in crowd[:4]]
        assert [len(hint) for hint in hints] == [4] * 4
        assert len(set(hints)) > 1


async def test_silence_makes_a_peer_lost_and_a_beat_brings_it_back(tmp_path: Path) -> None:
    async with open_office(tmp_path, lost_after_s=10.0) as office:
        registry = office.services.registry
        await office.join(A)
        await office.tick(9.9)
        assert [peer.peer for peer in registry.live()] == [A.peer]
        await office.tick(0.2)
        assert registry.live() == ()
        assert registry.everybody()[0].state is PeerState.STALLED
        await office.beat(A, state(0))
        assert [peer.peer for peer in registry.live()] == [A.peer]


async def test_a_goodbye_is_immediate_and_final(tmp_path: Path) -> None:
    async with open_office(tmp_path) as office:
        await office.join(A)
        await office.services.registry.leave(A.peer, Leave(reason="stopped"))
        assert office.services.registry.live() == ()
        with pytest.raises(RefusedError):
            await office.beat(A)
        await office.join(A)
        await office.services.registry.leave(B.peer, Leave())  # a stranger's goodbye is no event


async def test_a_restart_remembers_who_was_let_in_and_what_they_reported(tmp_path: Path) -> None:
    time = StoppedTime()
    async with open_office(tmp_path, time=time) as office:
        await office.join(A)
        reply = await office.beat(A, reports=((7, work(0)),))
        assert reply.acknowledged == 7
    async with open_office(tmp_path, time=time) as office:
        (kept,) = office.services.registry.everybody()
        assert (kept.peer, kept.stages, kept.session, kept.acknowledged, kept.heard) == (A.peer, (0,), 1, 7, False)
        assert (await office.beat(A)).acknowledged == 7
        assert kept.heard


async def test_a_full_disk_costs_an_acknowledgement_not_a_beat(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: SQLite's page limit stands in for the disk; the report is taken once there is room again."""
    monkeypatch.setattr(history, "MAX_WORK_PER_ROUND", 1000)
    async with open_office(tmp_path) as office:
        database = office.services.database
        await office.join(A)
        pages = await database.run(lambda db: db.execute("PRAGMA page_count").fetchone()[0])
        await database.run(lambda db: db.execute(f"PRAGMA max_page_count = {pages}"))
        reports = tuple((number, work(0)) for number in range(1, 500))
        reply = await office.beat(A, state(0), reports=reports[:64])
        while reply.acknowledged:  # the file's free pages may take the first ones
            first = reply.acknowledged
            reply = await office.beat(A, state(0), reports=reports[first : first + 64])
            if reply.acknowledged == first:
                break
        refused = reply.acknowledged
        assert refused < 499
        assert "full" in office.services.journal.notes["disk"]
        await database.run(lambda db: db.execute("PRAGMA max_page_count = 1000000"))
        reply = await office.beat(A, state(0), reports=reports[refused : refused + 64])
        assert reply.acknowledged > refused


async def test_the_pass_of_a_forger_is_worth_nothing(tmp_path: Path) -> None:
    async with open_office(tmp_path) as office:
        welcome = await office.join(A)
        forged = Signed(payload=welcome.admission.payload, signer=A.peer, signature=welcome.admission.signature)
        with pytest.raises(Exception, match="signed by"):
            check_admission(
                forged, run=office.manifest.run_id, coordinator=KEY.peer_id, peer=A.peer, now_s=START_WALL_S
            )
