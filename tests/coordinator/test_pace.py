"""How fast the coordinator's disk may be filled. Oracles: the rates, and a clock that only the test moves."""

from __future__ import annotations

from pathlib import Path

import pytest

from coordinator import pace, registry
from coordinator.pace import (
    MAX_KNOWN,
    NEWCOMER_BURST,
    REPORT_BURST,
    REPORT_RATE,
    RETRY_AFTER_S,
    START_BURST,
    START_RATE,
    Pace,
)
from coordinator.store import history, peers
from protocol.errors import BusyError
from protocol.ids import PeerId
from tests.coordinator.office import StoppedTime, Volunteer, open_office, work

A = PeerId("a")


def test_a_peer_may_begin_some_lives_at_once_and_then_one_now_and_then() -> None:
    time = StoppedTime()
    own = Pace(time.clock.monotonic)
    for _ in range(int(START_BURST)):
        own.start(A, is_new=False)
    with pytest.raises(BusyError) as refused:
        own.start(A, is_new=False)
    assert refused.value.retry_after_s == RETRY_AFTER_S
    own.start(PeerId("b"), is_new=False)
    time.advance(1 / START_RATE)
    own.start(A, is_new=False)


def test_newcomers_share_what_there_is_and_take_nothing_from_who_is_known() -> None:
    own = Pace(StoppedTime().clock.monotonic)
    for number in range(int(NEWCOMER_BURST)):
        own.start(PeerId(f"new {number}"), is_new=True)
    with pytest.raises(BusyError):
        own.start(PeerId("one more"), is_new=True)
    own.start(A, is_new=False)


def test_reports_are_taken_as_far_as_the_pace_goes() -> None:
    time = StoppedTime()
    own = Pace(time.clock.monotonic)
    assert sum(own.reports(A, 64) for _ in range(1000)) == REPORT_BURST
    time.advance(0.5)
    assert own.reports(A, 64) == min(64, int(REPORT_RATE / 2))
    assert own.reports(PeerId("b"), 64) == 64


def test_paces_are_forgotten_in_time() -> None:
    own = Pace(StoppedTime().clock.monotonic)
    for number in range(2 * MAX_KNOWN):
        own.reports(PeerId(str(number)), 1)
    assert len(own._peers) == MAX_KNOWN


async def test_who_begins_too_often_is_busy_and_a_new_pass_is_no_beginning(tmp_path: Path) -> None:
    async with open_office(tmp_path) as office:
        for session in range(1, int(START_BURST) + 1):
            await office.join(Volunteer("a", session=session))
        with pytest.raises(BusyError):
            await office.join(Volunteer("a", session=100))
        last = Volunteer("a", session=int(START_BURST))
        for _ in range(50):
            await office.join(last)


async def test_reports_beyond_the_pace_are_not_acknowledged_and_come_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pace, "REPORT_BURST", 3.0)
    async with open_office(tmp_path) as office:
        own = Volunteer("a")
        await office.join(own)
        reports = [(number, work(number)) for number in range(1, 6)]
        assert (await office.beat(own, reports=reports)).acknowledged == 3
        assert (await office.beat(own, reports=reports[3:])).acknowledged == 3
        office.time.advance(1.0)
        assert (await office.beat(own, reports=reports[3:])).acknowledged == 5


async def test_who_did_nothing_and_has_gone_is_forgotten_when_there_are_too_many(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who reported something stays, and so does who has gone a moment ago."""
    monkeypatch.setattr(registry, "KEPT_PEERS", 2)
    async with open_office(tmp_path) as office:
        crowd = [Volunteer(name) for name in "abcd"]
        for volunteer in crowd:
            await office.join(volunteer)
        await office.beat(crowd[0], reports=[(1, work(1))])
        await office.tick(600.0)
        assert len(office.services.registry.everybody()) == 4
        await office.beat(crowd[3])
        await office.tick(registry.FORGET_AFTER_S)
        kept = {peer.name for peer in office.services.registry.everybody()}
        assert kept == {"a", "d"}
        rows = await office.services.database.run(peers.load_peers)
        assert {row.name for row in rows} == kept
        await office.join(crowd[1])
        assert len(office.services.registry.everybody()) == 3


async def test_the_oldest_events_make_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(history, "KEPT_EVENTS", 3)
    async with open_office(tmp_path) as office:
        for number in range(10):
            await office.services.journal.event(f"number.{number}")
        last = await office.services.database.run(history.last_events, limit=100)
        assert [event.kind for event in last] == ["number.9", "number.8", "number.7"]
