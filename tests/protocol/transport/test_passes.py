"""Passes between real nodes: who reaches what, when a pass is shown (again), how a revocation list travels.

Oracles: what each side's handlers have seen, and the errors that callers get.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass

import pytest

from protocol.access import Door, revoke
from protocol.errors import BusyError, DeadlineError, PeerFault, StrangerError, TransientError, UnreachableError
from protocol.ids import PeerId
from protocol.records import admit
from protocol.signing import Signed
from protocol.transport.blobs import Blobs
from protocol.transport.calls import Calls, Done
from protocol.transport.node import Node
from protocol.transport.passes import HAND_ON_BURST, HandOn, Passes, ShowPass
from protocol.transport.streams import MAX_STREAMS_OF_STRANGERS, Stream, Streams
from protocol.wire import Message
from tests.protocol.transport.network import COORDINATOR, RUN, STRANGER, StartNode

pytestmark = pytest.mark.slow  # every test starts real nodes


class Question(Message):
    number: int


class OpenQuestion(Message):
    number: int


@dataclass
class Peer:
    """One node with all that is needed to call and to be called, and what it was asked."""

    node: Node
    door: Door
    streams: Streams
    calls: Calls
    blobs: Blobs
    passes: Passes
    asked: list[tuple[PeerId, int]]

    @property
    def peer(self) -> PeerId:
        return self.node.peer_id

    def admit(self, *, valid_hours: float = 1.0) -> Signed:
        """Get a pass from the coordinator."""
        now_s = int(time.time())
        self.passes.own = admit(
            COORDINATOR, run=RUN, peer=self.peer, name="somebody", issued_s=now_s, valid_hours=valid_hours
        )
        return self.passes.own

    async def ask(self, other: Peer) -> None:
        await self.calls.tell(other.peer, Question(number=1))


async def make(node: Node) -> Peer:
    door = Door(RUN, COORDINATOR.peer_id)
    streams = Streams(node.p2p, door=door)
    calls = Calls(streams, run=RUN, coordinator=COORDINATOR.peer_id)
    made = Peer(node, door, streams, calls, Blobs(streams, run=RUN), Passes(calls, streams, door, me=node.peer_id), [])

    async def on_question(caller: PeerId, question: Question | OpenQuestion) -> Done:
        made.asked.append((caller, question.number))
        return Done()

    made.passes.serve()
    calls.on(Question, on_question)
    calls.on(OpenQuestion, on_question, open_to_all=True)
    await calls.serve()
    await made.blobs.serve(lambda caller, name: b"something")
    return made


async def pair(start: StartNode) -> tuple[Peer, Peer]:
    second = await start("second")
    first = await start("first", peers=await second.addresses())
    return await make(first), await make(second)


async def until(condition: Callable[[], object]) -> None:
    for _ in range(1000):
        if condition():
            return
        await asyncio.sleep(0.01)
    raise AssertionError("that did not happen")


async def test_a_stranger_reaches_nothing_but_what_is_open_to_all(start: StartNode) -> None:
    first, second = await pair(start)
    with pytest.raises(StrangerError):
        await first.ask(second)
    with pytest.raises(StrangerError):
        await first.blobs.fetch(second.peer, "anything", max_bytes=100)
    await first.calls.tell(second.peer, OpenQuestion(number=7))
    assert second.asked == [(first.peer, 7)]


async def test_who_has_a_pass_shows_it_once_and_is_let_in(start: StartNode, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: how often the other door has looked at it."""
    first, second = await pair(start)
    first.admit()
    seen: list[PeerId] = []
    show = second.door.show

    def noting(caller: PeerId, shown: Signed) -> None:
        seen.append(caller)
        show(caller, shown)

    monkeypatch.setattr(second.door, "show", noting)
    await asyncio.gather(*(first.ask(second) for _ in range(20)))
    assert await first.blobs.fetch(second.peer, "anything", max_bytes=100) == b"something"
    assert seen == [first.peer]
    assert len(second.asked) == 20


async def test_a_peer_that_has_forgotten_us_is_shown_our_pass_again(start: StartNode) -> None:
    """It was restarted. Calls and fetches do so by themselves; any other stream fails once."""
    first, second = await pair(start)
    first.admit()
    await first.ask(second)
    second.door._guests.clear()
    await first.ask(second)
    assert len(second.asked) == 2
    second.door._guests.clear()
    assert await first.blobs.fetch(second.peer, "anything", max_bytes=100) == b"something"
    second.door._guests.clear()
    await second.streams.serve("own", lambda stream: stream.send(Done()))
    with pytest.raises(StrangerError):
        await say(first, second)
    await say(first, second)


async def say(first: Peer, second: Peer) -> None:
    async with first.streams.open(second.peer, "own") as stream:
        await stream.receive(Done, timeout_s=5.0)


async def test_a_pass_of_somebody_else_does_not_help(start: StartNode) -> None:
    first, second = await pair(start)
    first.passes.own = second.admit()
    with pytest.raises(TransientError):
        await first.ask(second)
    first.passes.own = admit(STRANGER, run=RUN, peer=first.peer, name="me", issued_s=int(time.time()), valid_hours=1)
    with pytest.raises(TransientError):
        await first.ask(second)
    assert second.asked == []


async def test_a_ban_ends_what_is_under_way_and_keeps_the_banned_out(start: StartNode) -> None:
    first, second = await pair(start)
    first.admit()
    held = asyncio.Event()

    async def hold(stream: Stream) -> None:
        held.set()
        await asyncio.sleep(60)

    await second.streams.serve("hold", hold)
    async with first.streams.open(second.peer, "hold") as stream:
        await held.wait()
        second.passes.learn(revoke(COORDINATOR, run=RUN, number=1, issued_s=1.0, peers=(first.peer,)))
        with pytest.raises(UnreachableError):
            await stream.receive(Done, timeout_s=5.0)
    with pytest.raises(TransientError):
        await first.ask(second)
    second.passes.learn(revoke(COORDINATOR, run=RUN, number=2, issued_s=2.0, peers=()))
    await first.ask(second)
    assert len(second.asked) == 1


async def test_the_newer_revocation_list_goes_to_whoever_has_the_older_one(start: StartNode) -> None:
    """Whichever side calls, and from there to others. Oracle: the numbers at all doors."""
    first, second = await pair(start)
    third = await make(await start("third", peers=await second.node.addresses()))
    for each in (first, second, third):
        each.admit()
    await second.ask(third)
    second.passes.learn(revoke(COORDINATOR, run=RUN, number=3, issued_s=1.0, peers=()))
    await until(lambda: third.door.number == 3)
    await first.ask(second)
    assert first.door.number == 3
    first.door.learn(revoke(COORDINATOR, run=RUN, number=4, issued_s=1.0, peers=()))
    first.passes.forget(second.peer)
    await first.ask(second)
    await until(lambda: second.door.number == 4)
    await until(lambda: third.door.number == 4)


async def test_strangers_take_no_room_from_who_has_a_pass(start: StartNode, monkeypatch: pytest.MonkeyPatch) -> None:
    """All of a stranger's room is taken. Oracle: the guest is answered, another stranger is not."""
    first, second = await pair(start)
    third = await make(await start("third", peers=await second.node.addresses()))
    own = first.admit()
    monkeypatch.setattr(second.streams, "_num_strangers", MAX_STREAMS_OF_STRANGERS)
    second.door.show(first.peer, own)
    first.passes._shown[second.peer] = own
    await first.ask(second)
    with pytest.raises(TransientError):
        await third.calls.tell(second.peer, OpenQuestion(number=1), timeout_s=2.0)
    assert [number for _, number in second.asked] == [1]


async def test_who_waits_for_the_same_peer_fails_with_it_and_in_its_own_time(
    start: StartNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that does not look at passes. Oracle: how often it was shown one; the clock, generously."""
    first, second = await pair(start)
    first.admit()
    shown: list[PeerId] = []

    async def never(caller: PeerId, message: ShowPass) -> Message:
        shown.append(caller)
        await asyncio.sleep(60)
        raise AssertionError

    second.calls.on(ShowPass, never, open_to_all=True)
    started_s = time.monotonic()
    asked = [first.calls.tell(second.peer, Question(number=1), timeout_s=0.5) for _ in range(8)]
    results = await asyncio.gather(*asked, return_exceptions=True)
    assert all(isinstance(each, DeadlineError) for each in results), results
    assert time.monotonic() - started_s < 5.0
    assert shown == [first.peer]


async def test_nobody_is_handed_the_same_list_twice(start: StartNode) -> None:
    """It says again and again that it has none, and takes none."""
    first, second = await pair(start)
    first.admit()
    first.door.learn(revoke(COORDINATOR, run=RUN, number=9, issued_s=1.0, peers=()))
    handed: list[PeerId] = []

    async def refuse(caller: PeerId, message: HandOn) -> Message:
        handed.append(caller)
        raise PeerFault("no")

    second.calls.on(HandOn, refuse)
    for _ in range(5):
        first.passes.forget(second.peer)
        await first.ask(second)
    await until(lambda: handed)
    await asyncio.sleep(0.2)
    assert len(handed) == 1


async def test_who_hands_on_one_list_after_another_is_not_listened_to(start: StartNode) -> None:
    """Each would cost a signature. Oracle: what the other door has looked at; the same list again costs nothing."""
    first, second = await pair(start)
    first.admit()
    lists = [revoke(COORDINATOR, run=RUN, number=number, issued_s=1.0, peers=()) for number in range(1, 30)]
    refused = 0
    for revoked in [*lists[:2], *[lists[1]] * 20, *lists[2:]]:
        try:
            await first.calls.tell(second.peer, HandOn(revoked=revoked))
        except BusyError:
            refused += 1
    assert refused >= 10
    assert HAND_ON_BURST <= second.door.number < len(lists)


async def test_what_was_shown_is_not_remembered_without_end(start: StartNode, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who was forgotten is shown it again, and lets us in."""
    monkeypatch.setattr("protocol.transport.passes.MAX_KNOWN", 1)
    first, second = await pair(start)
    third = await make(await start("third", peers=await second.node.addresses()))
    await first.node.connect((await third.node.addresses())[0])
    first.admit()
    for other in (second, third, second):
        await first.ask(other)
        assert list(first.passes._shown) == [other.peer]
    assert [number for _, number in second.asked] == [1, 1]


async def test_a_pass_is_shown_before_anything_is_asked(start: StartNode) -> None:
    """Else a large body would be on its way to a peer that does not take it."""
    first, second = await pair(start)
    first.admit()
    order: list[str] = []
    second.calls.on(ShowPass, _noting(order, second), open_to_all=True)
    await first.ask(second)
    assert order == ["shown"]
    assert second.asked != []


def _noting(order: list[str], peer: Peer):  # type: ignore[no-untyped-def]
    async def on_show(caller: PeerId, shown: ShowPass) -> Message:
        order.append("shown")
        assert peer.asked == []
        return await peer.passes._on_show(caller, shown)

    return on_show
