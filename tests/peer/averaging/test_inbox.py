"""Messages of a served stream. Oracle: what a stream of the test's own was asked for."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest

from peer.averaging.link import Inbox
from protocol.errors import WireError


class Source:
    """Numbers, then an end or an error."""

    def __init__(self, number: int, error: Exception | None = None) -> None:
        self.asked, self._number, self._error = 0, number, error

    def __aiter__(self) -> AsyncIterator[int]:
        return self

    async def __anext__(self) -> int:
        self.asked += 1
        if self.asked > self._number:
            raise self._error or StopAsyncIteration
        return self.asked


async def test_one_message_is_read_ahead_and_no_more() -> None:
    source, never = Source(5), asyncio.get_running_loop().create_future()
    inbox = Inbox(source)
    assert source.asked == 0
    for number in (1, 2, 3):
        assert await inbox.next_unless(never) == number
        await asyncio.sleep(0)
        assert source.asked == number + 1
    await inbox.close()


async def test_an_end_that_was_read_ahead_is_told_once_asked_for() -> None:
    never = asyncio.get_running_loop().create_future()
    inbox = Inbox(Source(1))
    assert await inbox.next_unless(never) == 1
    assert await inbox.next_unless(never) is None
    await inbox.close()


async def test_an_error_that_was_read_ahead_comes_after_the_message_before_it() -> None:
    never = asyncio.get_running_loop().create_future()
    inbox = Inbox(Source(1, WireError("garbled")))
    assert await inbox.next_unless(never) == 1
    with pytest.raises(WireError, match="garbled"):
        await inbox.next_unless(never)
    await inbox.close()


async def test_an_error_that_nobody_asked_for_is_nobodys_news() -> None:
    """Oracle: asyncio complains of exceptions that nobody has looked at, and such complaints fail a test."""
    never = asyncio.get_running_loop().create_future()
    inbox = Inbox(Source(1, WireError("garbled")))
    assert await inbox.next_unless(never) == 1
    await asyncio.sleep(0)
    await inbox.close()


async def test_what_is_read_is_kept_when_the_outcome_comes_first() -> None:
    outcome = asyncio.get_running_loop().create_future()
    outcome.set_result(None)
    go = asyncio.Event()

    async def late() -> AsyncIterator[int]:
        await go.wait()
        yield 7

    inbox = Inbox(late())
    assert await inbox.next_unless(outcome) is None
    go.set()
    assert await inbox.next_unless(asyncio.get_running_loop().create_future()) == 7
    await inbox.close()
