"""Members of a reduce that a whole test module shares, and some to kill."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest_asyncio

from tests.peer.averaging.reduce_members import Member, start_members


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def swarm() -> AsyncIterator[list[Member]]:
    """Four members that live as long as the module; whoever wants to kill one starts its own."""
    members = await start_members(4)
    try:
        yield members
    finally:
        await asyncio.gather(*(member.p2p.shutdown() for member in members))


@pytest_asyncio.fixture(loop_scope="module")
async def mortals() -> AsyncIterator[list[Member]]:
    """Three members for one test."""
    members = await start_members(3)
    try:
        yield members
    finally:
        await asyncio.gather(*(member.p2p.shutdown() for member in members))


@pytest_asyncio.fixture(loop_scope="module")
async def no_task_left_behind(swarm: list[Member]) -> AsyncIterator[None]:
    """Oracle: the tasks that were there before. What has been cancelled gets a moment to end."""
    before = asyncio.all_tasks()
    yield
    for _ in range(100):
        left = asyncio.all_tasks() - before - {asyncio.current_task()}
        if not left:
            return
        await asyncio.sleep(0.02)
    raise AssertionError(f"left behind: {left}")
