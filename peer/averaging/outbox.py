"""The round messages of one stage on their way out.

Owns: how many go out at a time, and what happens to a message while the one before it is still under way. Must not
know: what they say. The driver puts in whatever the round machine wants to be sent.

The machine repeats at every tick what has not been answered, to thousands of peers in a large run, and each message
takes a socket to p2pd. So there is a limit, and of each kind only one message waits for a peer: a newer one takes its
place. That is safe because nothing depends on a single message: what a newer one of its kind does not make worthless
(two acknowledgements, say) comes up again at the next tick, when the other has gone.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Iterable
from contextlib import suppress
from typing import Protocol

import structlog

from protocol.errors import DeadlineError, SwarmError, UnreachableError
from protocol.ids import PeerId
from protocol.rounds.messages import StageMessage
from protocol.transport.calls import Calls

log = structlog.get_logger()

GOODBYE_TIMEOUT_S = 1.0
GOODBYES_TIMEOUT_S = 5.0
MAX_SENDING = 256  # to a stage of a thousand in four turns; each takes a socket, of a thousand or more
MAX_SENDING_TO_SILENT = 64  # those who did not answer last time: each holds its place for seconds
MAX_SILENT = 10_000  # peers to remember as such; above it most are strangers, and all get another chance


class Start(Protocol):
    """Starts a task that ends with its owner."""

    def __call__(self, work: Coroutine[None, None, None], *, name: str) -> object:
        """Start `work`."""


class Outbox:
    """Delivers messages, and never waits for it."""

    def __init__(self, calls: Calls, *, send_timeout_s: float, start: Start, on_gone: Callable[[PeerId], None]) -> None:
        """`on_gone` hears of peers whose own machine says that their process is gone.

        `send_timeout_s` is well below the machine's patience: a stalled message holds back the next one of its kind.
        """
        self._send_timeout_s = send_timeout_s
        self._calls = calls
        self._start = start
        self._on_gone = on_gone
        self._waiting: dict[tuple[PeerId, type[StageMessage]], StageMessage | None] = {}
        self._silent: set[PeerId] = set()
        self._places = asyncio.Semaphore(MAX_SENDING)
        self._places_for_silent = asyncio.Semaphore(MAX_SENDING_TO_SILENT)

    def put(self, to: PeerId, message: StageMessage) -> None:
        """Send a message, after the one of its kind that is under way and instead of one that waits."""
        key = to, type(message)
        is_busy = key in self._waiting
        self._waiting[key] = message
        if not is_busy:
            self._start(self._empty(to, type(message)), name=f"send-{type(message).__name__}")

    async def say_last(self, messages: Iterable[tuple[PeerId, StageMessage]]) -> None:
        """Send what nobody will repeat, and wait a moment for it."""
        with suppress(TimeoutError):
            async with asyncio.timeout(GOODBYES_TIMEOUT_S):
                await asyncio.gather(*(self._say_last(to, message) for to, message in messages))

    async def _say_last(self, to: PeerId, message: StageMessage) -> None:
        async with self._place(to):
            await self._deliver(to, message, timeout_s=GOODBYE_TIMEOUT_S)

    async def _empty(self, to: PeerId, kind: type[StageMessage]) -> None:
        """Deliver what there is of a kind for a peer until nothing waits."""
        key = to, kind
        try:
            while self._waiting[key] is not None:
                async with self._place(to):
                    message, self._waiting[key] = self._waiting[key], None
                    assert message is not None
                    await self._deliver(to, message, timeout_s=self._send_timeout_s)
        finally:
            del self._waiting[key]

    def _place(self, to: PeerId) -> asyncio.Semaphore:
        """Keep those who do not answer from holding up the others: they have places of their own."""
        return self._places_for_silent if to in self._silent else self._places

    async def _deliver(self, to: PeerId, message: StageMessage, *, timeout_s: float) -> None:
        try:
            await self._calls.tell(to, message, timeout_s=timeout_s)
        except SwarmError as error:
            log.debug("round.undelivered", to=to, message=type(message).__name__, error=error.one_line())
            if isinstance(error, UnreachableError | DeadlineError):
                self._note_silent(to)
            if isinstance(error, UnreachableError) and error.is_certain:
                self._on_gone(to)
        else:
            self._silent.discard(to)

    def _note_silent(self, peer: PeerId) -> None:
        if len(self._silent) >= MAX_SILENT:
            self._silent.clear()
        self._silent.add(peer)
