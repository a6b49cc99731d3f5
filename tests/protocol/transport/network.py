"""A small real network for tests: nodes on loopback, each hivemind's own DHTNode on its own p2pd process.

The fixture `start` (conftest.py) makes and stops them; what is here only describes and asks them.
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from protocol.ids import Lineage, PeerId, RunId, StageId, Version
from protocol.records import HostedStage, ReplicaRecord, admit
from protocol.signing import SigningKey
from protocol.transport.node import Node

RUN = RunId("0123456789abcdef" * 2)
COORDINATOR = SigningKey(bytes(32))
STRANGER = SigningKey(b"s" * 32)
LOOPBACK = ("/ip4/127.0.0.1/tcp/0",)
ROOT = Path(__file__).parents[3]

StartNode = Callable[..., Awaitable[Node]]


def record_of(node: Node, *stages: int, **changes: Any) -> ReplicaRecord:
    """What an admitted node says about itself; stage 0 unless told otherwise."""
    admission = admit(
        COORDINATOR, run=RUN, peer=node.peer_id, name="someone", issued_s=int(time.time()) - 5, valid_hours=1
    )
    hosted = tuple(
        HostedStage(stage=StageId(stage), version=Version(0), lineage=Lineage(bytes(32))) for stage in stages or (0,)
    )
    values: dict[str, Any] = {
        "run": RUN,
        "peer": node.peer_id,
        "name": "someone",
        "addresses": (),
        "hosted": hosted,
        "software": "handcar test",
        "protocol": 1,
        "admission": admission,
    }
    return ReplicaRecord(**(values | changes))


async def found_by(node: Node, stage: int = 0) -> set[PeerId]:
    """The peers that a node finds for a stage."""
    return {record.peer for record in await node.replicas(StageId(stage))}
