"""How round messages leave: so many at a time, one of a kind for a peer, and the living before the silent.

The network is played. Oracle: what arrives, in order, and what is under way at a time.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Coroutine
from types import SimpleNamespace
from typing import Any, cast

import pytest

from peer.averaging import outbox
from peer.averaging.outbox import MAX_SENDING, MAX_SENDING_TO_SILENT, Outbox
from protocol.errors import BusyError, DeadlineError, SwarmError, UnreachableError
from protocol.ids import PeerId

ANNE, BERT = PeerId("anne"), PeerId("bert")


class Word(SimpleNamespace):
    """A message of one kind."""


class Question(SimpleNamespace):
    """A message of another kind."""


class Network:
    """Delivers what is let through; fails for those who have an error."""

    def __init__(self) -> None:
        self.open = asyncio.Event()
        self.errors: dict[PeerId, SwarmError] = {}
        self.arrived: list[tuple[PeerId, Any]] = []
        self.under_way = self.most = 0

    async def tell(self, to: PeerId, message: Any, *, timeout_s: float) -> None:
        self.under_way += 1
        self.most = max(self.most, self.under_way)
        try:
            await self.open.wait()
            if to in self.errors:
                raise self.errors[to]
            self.arrived.append((to, message.text))
        finally:
            self.under_way -= 1


class Case:
    def __init__(self) -> None:
        self.network = Network()
        self.tasks: set[asyncio.Task[None]] = set()
        self.gone: list[PeerId] = []
        self.outbox = Outbox(cast(Any, self.network), send_timeout_s=5.0, start=self.start, on_gone=self.gone.append)

    def start(self, work: Coroutine[None, None, None], *, name: str) -> None:
        self.tasks.add(asyncio.create_task(work, name=name))

    def put(self, to: PeerId, message: Any) -> None:
        self.outbox.put(to, message)

    async def let_through(self) -> None:
        self.network.open.set()
        await asyncio.gather(*self.tasks)
        self.network.open.clear()


@pytest.fixture
async def case() -> AsyncIterator[Case]:
    case = Case()
    yield case
    assert not case.outbox._waiting, "nothing is kept of what has gone"


async def turn() -> None:
    for _ in range(3):
        await asyncio.sleep(0)


async def test_of_each_kind_one_message_waits_for_a_peer_and_a_newer_one_takes_its_place(case: Case) -> None:
    """The first is under way; the second is what the third replaces."""
    for number in range(3):
        case.put(ANNE, Word(text=f"word {number}"))
        case.put(BERT, Word(text=f"word {number}"))
        case.put(ANNE, Question(text=f"question {number}"))
        await turn()
    assert len(case.tasks) == 3
    await case.let_through()
    for text, to in (("word", ANNE), ("word", BERT), ("question", ANNE)):
        assert [(to, f"{text} {number}") for number in (0, 2)] == [
            each for each in case.network.arrived if each[0] == to and each[1].startswith(text)
        ]


async def test_thousands_of_peers_are_not_dialled_at_once(case: Case) -> None:
    for number in range(3 * MAX_SENDING):
        case.put(PeerId(f"peer-{number}"), Word(text="hello"))
    await turn()
    assert case.network.under_way == MAX_SENDING
    await case.let_through()
    assert case.network.most == MAX_SENDING
    assert len(case.network.arrived) == 3 * MAX_SENDING


@pytest.mark.parametrize("error", [DeadlineError("late"), UnreachableError("gone")])
async def test_who_did_not_answer_holds_up_nobody_who_does(case: Case, error: SwarmError) -> None:
    """Oracle: with all the places of the silent taken there is room for everybody else, and they can come back."""
    silent = [PeerId(f"silent-{number}") for number in range(2 * MAX_SENDING_TO_SILENT)]
    case.network.errors = dict.fromkeys(silent, error)
    for peer in silent:
        case.put(peer, Word(text="hello"))
    await case.let_through()
    for peer in [*silent, ANNE]:
        case.put(peer, Word(text="hello again"))
    await turn()
    assert case.network.under_way == MAX_SENDING_TO_SILENT + 1
    case.network.errors = {}
    await case.let_through()
    for peer in silent:
        case.put(peer, Word(text="welcome"))
    await turn()
    assert case.network.under_way == 2 * MAX_SENDING_TO_SILENT
    await case.let_through()


async def test_only_who_is_certainly_gone_is_reported(case: Case) -> None:
    case.network.errors = {
        ANNE: UnreachableError("refused", is_certain=True),
        BERT: BusyError("later", retry_after_s=1.0),
        PeerId("carl"): UnreachableError("no route"),
    }
    for peer in case.network.errors:
        case.put(peer, Word(text="hello"))
    await case.let_through()
    assert case.gone == [ANNE]


async def test_a_goodbye_is_not_waited_for_for_ever(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outbox, "GOODBYES_TIMEOUT_S", 0.02)
    async with asyncio.timeout(1):
        await case.outbox.say_last([(PeerId(f"peer-{n}"), cast(Any, Word(text="bye"))) for n in range(1000)])
    assert case.network.under_way == 0
