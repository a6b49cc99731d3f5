"""One question, one answer: small control messages between peers.

Owns: the call protocol (request, then response or `Failure`, then the caller closes), the table of
handlers, and the rule that errors cross the network only as codes. Must not know: what is asked.
Used for rounds, history, registration and status; hops have streams of their own.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

import structlog

from protocol.errors import (
    BusyError,
    ClockError,
    IncompatibleError,
    RefusedError,
    StrangerError,
    SwarmError,
    TransientError,
    WireError,
)
from protocol.ids import PeerId
from protocol.transport.streams import Stream, Streams
from protocol.wire import PROTOCOL_VERSION, Message

log = structlog.get_logger()

CALL_TIMEOUT_S = 10.0
CLOSE_TIMEOUT_S = 5.0
STRANGER_TIMEOUT_S = 3.0  # who has shown no pass may not hold a place for longer without a word

Request = TypeVar("Request", bound=Message)
Response = TypeVar("Response", bound=Message)


class Done(Message):
    """An answer that says no more than that the message has arrived."""


class Failure(Message):
    """The callee's error, reduced to what the caller can act on."""

    code: str
    detail: str
    hint: str = ""
    retry_after_s: float = 0.0


class Calls:
    """Calls other peers, and answers theirs, within one run."""

    def __init__(self, streams: Streams, *, run: str, coordinator: PeerId | None = None) -> None:
        """`coordinator` is the one whose refusals concern us as a whole; everybody else can only fail a call."""
        self._streams = streams
        self._coordinator = coordinator
        self._name = call_protocol(run)
        self._handlers: dict[type[Message], Callable[[PeerId, Any], Awaitable[Message]]] = {}
        self._open_to_all: set[type[Message]] = set()

    def on(
        self,
        request: type[Request],
        handler: Callable[[PeerId, Request], Awaitable[Message]],
        *,
        open_to_all: bool = False,
    ) -> None:
        """Answer requests of one class. The handler gets the authenticated caller.

        Who has shown no pass is answered only if that is `open_to_all`.
        """
        self._handlers[request] = handler
        (self._open_to_all.add if open_to_all else self._open_to_all.discard)(request)

    def off(self, *requests: type[Message]) -> None:
        """Answer requests of these classes no more."""
        for request in requests:
            self._handlers.pop(request, None)

    async def serve(self) -> None:
        """Start answering."""
        await self._streams.serve(self._name, self._answer, open_to_all=True)

    async def call(
        self,
        peer: PeerId,
        request: Message,
        response: type[Response],
        *,
        timeout_s: float = CALL_TIMEOUT_S,
        introduced: bool = True,
    ) -> Response:
        """Ask `peer` and return its answer. It is shown our pass first, if we are to be `introduced`.

        Raises `TransientError` kinds if it cannot be reached or says no, `WireError` if one side cannot read the
        other. Only the coordinator can cause a `RefusedError` or a `ClockError`.
        """
        try:
            answer = await self._ask(peer, request, response, timeout_s=timeout_s, introduced=introduced)
        except StrangerError:  # it was restarted, or our pass has run out meanwhile: it is shown once more
            if not introduced:
                raise
            answer = await self._ask(peer, request, response, timeout_s=timeout_s, introduced=True)
        if isinstance(answer, response):
            return answer
        assert isinstance(answer, Failure), "receive returns one of the classes it was given"
        if peer == self._coordinator and answer.code in _FINAL:
            raise _FINAL[answer.code](answer.detail, hint=answer.hint or None)
        raise _error_of(peer, answer)

    async def _ask(
        self, peer: PeerId, request: Message, response: type[Response], *, timeout_s: float, introduced: bool
    ) -> Message:
        async with self._streams.open(peer, self._name, timeout_s=timeout_s, introduced=introduced) as stream:
            await stream.send(request)
            answer: Message = await stream.receive(response, Failure, timeout_s=timeout_s)
            return answer

    async def tell(
        self, peer: PeerId, message: Message, *, timeout_s: float = CALL_TIMEOUT_S, introduced: bool = True
    ) -> None:
        """Deliver a message that needs no answer but its receipt."""
        await self.call(peer, message, Done, timeout_s=timeout_s, introduced=introduced)

    async def _answer(self, stream: Stream) -> None:
        timeout_s = CALL_TIMEOUT_S if stream.is_admitted else STRANGER_TIMEOUT_S
        request = await stream.receive(*self._handlers, timeout_s=timeout_s)
        if not stream.is_admitted and type(request) not in self._open_to_all:
            await stream.refuse_stranger()
            await stream.wait_closed(timeout_s=timeout_s)
            return
        try:
            handler = self._handlers.get(type(request))
            if handler is None:  # it went off while the request was on its way
                raise RefusedError(f"no {type(request).__name__} is answered here any more")
            response = await handler(stream.remote, request)
        except SwarmError as error:
            retry_after_s = error.retry_after_s if isinstance(error, BusyError) else 0.0
            log.debug("call.failed", request=type(request).__name__, caller=stream.remote, error=error.one_line())
            response = Failure(code=error.code, detail=str(error)[:500], hint=error.hint, retry_after_s=retry_after_s)
        await stream.send(response)
        await stream.wait_closed(timeout_s=CLOSE_TIMEOUT_S)


def call_protocol(run: str) -> str:
    """Return the libp2p protocol name of a run's calls."""
    return f"/handcar/{PROTOCOL_VERSION}/{run}/call"


_FINAL: dict[str, type[SwarmError]] = {kind.code: kind for kind in (IncompatibleError, RefusedError, ClockError)}


def _error_of(peer: PeerId, failure: Failure) -> SwarmError:
    """Turn a remote failure into a local error that ends one call and nothing else."""
    if failure.code == BusyError.code:
        return BusyError(failure.detail, retry_after_s=max(0.0, failure.retry_after_s))
    if failure.code == WireError.code:
        return WireError(f"{peer} could not read our message: {failure.detail}")
    return TransientError(f"{peer} answered {failure.code}: {failure.detail}")
