"""Introducing peers to our daemon. The node is played; oracle: who is dialled, and how often."""

from __future__ import annotations

import asyncio
from typing import Any, cast

from peer.link import Link
from protocol.errors import UnreachableError
from protocol.ids import PeerId

ANNE = PeerId("anne")
HOME, WORK = "/ip4/127.0.0.1/tcp/1", "/ip4/127.0.0.1/tcp/2"


class Node:
    def __init__(self) -> None:
        self.dialled: list[str] = []
        self.dead: set[str] = set()
        self.hangs = False
        self.peer_id = PeerId("me")

    async def connect(self, address: str) -> None:
        self.dialled.append(address)
        if self.hangs:
            await asyncio.Event().wait()
        if address in self.dead:
            raise UnreachableError("nobody")


def link(node: Node) -> Link:
    nothing = cast(Any, None)
    return Link(
        node=cast(Any, node),
        line=nothing,
        streams=nothing,
        calls=nothing,
        blobs=nothing,
        door=nothing,
        passes=nothing,
        coordinator=ANNE,
        coordinator_addresses=(),
    )


async def test_a_peer_is_dialled_until_one_address_answers_and_then_left_alone() -> None:
    node = Node()
    node.dead = {HOME}
    known = link(node)
    for _ in range(3):
        await known.introduce(ANNE, (HOME, WORK))
    assert node.dialled == [HOME, WORK]
    await known.introduce(ANNE, (WORK,))  # it has moved
    assert node.dialled == [HOME, WORK, WORK]


async def test_a_peer_that_was_not_there_is_introduced_again() -> None:
    """Its addresses may never change, and its machine be back a minute later."""
    node = Node()
    node.dead = {HOME}
    known = link(node)
    await known.introduce(ANNE, (HOME,))
    node.dead.clear()
    await known.introduce(ANNE, (HOME,))
    await known.introduce(ANNE, (HOME,))
    assert node.dialled == [HOME, HOME]


async def test_an_introduction_that_is_given_up_counts_for_nothing() -> None:
    node = Node()
    node.hangs = True
    known = link(node)
    introducing = asyncio.create_task(known.introduce(ANNE, (HOME,)))
    await asyncio.sleep(0)
    introducing.cancel()
    await asyncio.gather(introducing, return_exceptions=True)
    node.hangs = False
    await known.introduce(ANNE, (HOME,))
    assert node.dialled == [HOME, HOME]


async def test_nobody_dials_themselves() -> None:
    node = Node()
    await link(node).introduce(node.peer_id, (HOME,))
    assert node.dialled == []
