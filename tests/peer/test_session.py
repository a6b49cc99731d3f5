"""What a session says of a stage while its state is being brought up.

The parts around it are played, charters are really signed. Oracle: what the next beat would say, and the event that the
round machine is given.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from functools import partial
from types import SimpleNamespace
from typing import Any, cast

import pytest

from peer.averaging.sync import Place
from peer.session import Session
from peer.span_parts import SpanParts
from protocol.control import BeatReply, GivenUp
from protocol.errors import UnreachableError
from protocol.ids import Digest, Lineage, PeerId, RoundId, RunId, StageId, Version, digest
from protocol.rounds import events
from protocol.rounds.lineage import Link
from protocol.rounds.messages import CHARTER_CONTEXT, Charter, Seat
from protocol.signing import Signed, SigningKey, seal

STAGE, ME, OTHER = StageId(1), PeerId("me"), PeerId("other")
COORDINATOR = SigningKey.generate()


def charter(generation: int, version: int, *members: PeerId) -> Signed:
    message = Charter(
        run=RunId("ab" * 16),
        stage=STAGE,
        generation=generation,
        round=RoundId(version),
        version=Version(version),
        state_digest=digest(b"state"),
        seats=tuple(Seat(peer=peer, session=1) for peer in members),
    )
    return seal(COORDINATOR, CHARTER_CONTEXT, message)


def place(version: int, *, under: Signed | None = None) -> Place:
    lineage = Lineage(bytes([version]) * 32)
    return Place(charter=under, commits=(), round=RoundId(version), version=Version(version), lineage=lineage)


class Restorer:
    """Plays bringing a state: what each attempt does is given by the test."""

    def __init__(self) -> None:
        self.changes = 0
        self.members: list[Callable[[], Awaitable[Place]]] = []
        self.scratch: list[Place] = []
        self.checkpoint = Version(0)

    async def from_members(self, members: object) -> Place:
        if not self.members:
            raise UnreachableError("gone")
        return await self.members.pop(0)()

    async def from_scratch(self, *, allow_initial: bool) -> Place:
        if not self.scratch:
            raise UnreachableError("nothing yet")
        self.changes += 1
        return self.scratch.pop(0)

    async def is_outdated(self, version: Version) -> bool:
        return self.checkpoint > version

    async def state_digest(self) -> Digest:
        return digest(bytes([self.changes]))


class Driver:
    def __init__(self) -> None:
        self.state_digest: Digest | None = None
        self.snapshot = None
        self.standing: Link | None = None
        self.rival: Lineage | None = None
        self.posted: list[events.Event] = []

    def post(self, event: events.Event) -> None:
        self.posted.append(event)

    async def run(self) -> None:
        await asyncio.Event().wait()

    @property
    def synced(self) -> list[events.Synced]:
        return [event for event in self.posted if isinstance(event, events.Synced)]


class Case:
    def __init__(self) -> None:
        self.restorer, self.driver = Restorer(), Driver()
        view = SimpleNamespace(suspects=lambda *, now_s: (), membership=lambda stage: None, on_change=None)
        parts = SimpleNamespace(
            stages=(STAGE,),
            num_stages=2,
            drivers={STAGE: self.driver},
            restorer=lambda stage: self.restorer,
            view=view,
            tally=SimpleNamespace(begin=lambda: None),
            learn_charter=lambda charter, lineage: None,
            audit=lambda orders: None,
        )
        link = SimpleNamespace(peer_id=ME, coordinator=COORDINATOR.peer_id)
        self.session = Session(cast(Any, parts), link=cast(Any, link), session=1, charters=())

    def hear(self, signed: Signed) -> None:
        self.session._take_charters([signed])

    def said(self) -> list[tuple[int, Digest | None]]:
        """Return version and digest of the stage by the next beat; nothing if it says nothing of it."""
        return [(state.version, state.state_digest) for state in self.session.condition().stages]

    async def wait(self, condition: Callable[[], object]) -> None:
        for _ in range(10_000):
            if condition():
                return
            await asyncio.sleep(0.001)
        raise AssertionError("it does not come to that")


@pytest.fixture
def case() -> Case:
    return Case()


async def test_a_replica_says_where_its_own_state_stands_and_whom_it_has_met() -> None:
    """Its fellows of another stage may follow the other half of a torn swarm already. Oracle: the driver's word."""
    case = Case()
    case.restorer.scratch = [place(3)]
    task = asyncio.create_task(case.session._bring_up(STAGE))
    await case.wait(lambda: case.said())
    case.hear(charter(1, 3, ME))
    await case.wait(lambda: case.driver.synced)
    (state,) = case.session.condition().stages
    assert (state.ready, state.version, state.members) == (False, 3, 0), "it has not taken the state up yet"
    lineage, rival = Lineage(digest(b"ours")), Lineage(digest(b"theirs"))
    seats = (Seat(peer=ME, session=1), Seat(peer=OTHER, session=1))
    case.driver.standing, case.driver.rival = Link(lineage, Version(7), RoundId(9), seats, None), rival
    (state,) = case.session.condition().stages
    assert (state.ready, state.version, state.round, state.members) == (True, 7, 9, 2)
    assert (state.lineage, state.rival) == (lineage, rival)
    case.driver.standing = Link(lineage, Version(8), RoundId(10), seats[1:], None)
    assert case.session.condition().stages[0].members == 0, "it has lost its seat"
    await end(task)


def test_what_the_coordinator_has_given_up_is_passed_on(case: Case) -> None:
    """Oracle: the driver's events, by way of the real `SpanParts.give_up`."""
    lost = GivenUp(stage=STAGE, lineage=Lineage(digest(b"lost")), members=(OTHER,))
    elsewhere = lost.model_copy(update={"stage": StageId(0)})
    case.session._parts.give_up = partial(SpanParts.give_up, case.session._parts)  # type: ignore[method-assign]
    case.session.on_reply(BeatReply(acknowledged=0, stages=(STAGE,), charters=(), given_up=(lost, elsewhere)))
    assert case.driver.posted == [events.Rejoin(lost.lineage, (OTHER,))]


async def bring_up(case: Case) -> asyncio.Task[None]:
    """Restore version 3 from scratch, with nobody there, and wait for a charter."""
    case.restorer.scratch = [place(3), place(5)]
    task = asyncio.create_task(case.session._bring_up(STAGE))
    await case.wait(lambda: case.said() == [(3, digest(b"\x01"))])
    return task


async def end(task: asyncio.Task[None]) -> None:
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


async def test_a_state_that_a_failed_follow_has_replaced_is_offered_no_more(case: Case) -> None:
    """It is none of any version. Oracle: silence about it, then what was restored instead; a charter for the old state
    that comes meanwhile seats nobody."""
    task = await bring_up(case)
    loading, go = asyncio.Event(), asyncio.Event()

    async def load_and_fail() -> Place:
        case.restorer.changes += 1
        loading.set()
        await go.wait()
        raise UnreachableError("its line broke")

    case.restorer.members = [load_and_fail]
    case.hear(charter(1, 0, OTHER))
    await loading.wait()
    assert case.said() == []
    case.hear(charter(2, 3, ME))
    go.set()
    await case.wait(lambda: case.said() == [(5, digest(b"\x03"))])
    assert case.driver.synced == []
    case.hear(seated := charter(3, 5, ME))
    await case.wait(lambda: case.driver.synced)
    assert case.driver.synced == [events.Synced(seated, (), digest(b"\x03"))]
    await end(task)


async def test_a_state_that_nothing_has_touched_is_still_offered(case: Case) -> None:
    """Nobody answered, so nothing was loaded. Oracle: the same state, also while they are asked; its charter."""
    task = await bring_up(case)
    asking, go = asyncio.Event(), asyncio.Event()

    async def fail() -> Place:
        asking.set()
        await go.wait()
        raise UnreachableError("gone")

    case.restorer.members = [fail]
    case.hear(charter(1, 0, OTHER))
    await asking.wait()
    assert case.said() == [(3, digest(b"\x01"))]
    go.set()
    case.hear(seated := charter(2, 3, ME))
    await case.wait(lambda: case.driver.synced)
    assert case.driver.synced == [events.Synced(seated, (), digest(b"\x01"))]
    await end(task)


async def test_a_state_that_a_checkpoint_has_overtaken_is_restored_again(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The coordinator founds no stage on less than its checkpoint. Oracle: the checkpoint's version is offered instead;
    a state that is as new as the checkpoint stays."""
    monkeypatch.setattr("peer.session.ASK_AGAIN_S", 0.0)
    monkeypatch.setattr("peer.session.RETRY_S", 0.001)
    task = await bring_up(case)
    case.restorer.checkpoint = Version(3)
    await asyncio.sleep(0.05)
    assert case.said() == [(3, digest(b"\x01"))]
    case.restorer.checkpoint = Version(5)
    await case.wait(lambda: case.said() == [(5, digest(b"\x02"))])
    await end(task)


async def test_members_that_appear_are_followed(case: Case) -> None:
    """Oracle: their place and the digest of what was loaded."""
    task = await bring_up(case)
    theirs = charter(1, 0, OTHER)

    async def load() -> Place:
        case.restorer.changes += 1
        return place(7, under=theirs)

    case.restorer.members = [load]
    case.hear(theirs)
    await case.wait(lambda: case.driver.synced)
    assert case.driver.synced == [events.Synced(theirs, (), digest(b"\x02"))]
    assert case.said() == [(7, digest(b"\x02"))]
    await end(task)
