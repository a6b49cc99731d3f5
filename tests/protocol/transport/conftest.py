"""The fixture that starts real nodes (see network.py)."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from protocol.transport.node import Node
from tests.protocol.transport.network import COORDINATOR, LOOPBACK, RUN, StartNode


@pytest.fixture
async def start(tmp_path: Path) -> AsyncIterator[StartNode]:
    """Start nodes by name (the name is their identity file) and stop them all at the end."""
    nodes: list[Node] = []

    async def start_one(name: str, *, peers: tuple[str, ...] = (), **options: Any) -> Node:
        options = {"host_maddrs": LOOPBACK} | options
        path = tmp_path / f"{name}.key"
        node = await Node.start(path, run=RUN, coordinator=COORDINATOR.peer_id, initial_peers=peers, **options)
        nodes.append(node)
        return node

    yield start_one
    for node in nodes:
        await node.stop()
