"""A few real p2p daemons in one process, with hop servers whose work is scripted.

Not a fake of the transport: streams cross real p2pd processes on loopback. Only the compute is scripted,
so that a test can hold a task, let it fail, or count how often it ran.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

from hivemind.p2p import P2P

from peer.pipeline.callee import HopServer, HostedTask
from peer.pipeline.caller import HopCaller
from peer.pipeline.gate import Gate
from peer.pipeline.router import Router
from peer.pipeline.view import Membership, View
from peer.tasks import Body, Outcome, TaskId
from protocol.batches import TaskKind
from protocol.errors import WireError
from protocol.hops import ENTRY_CONTEXT, PathEntry, path_digest
from protocol.ids import Lineage, PeerId, RoundId, RunId, StageId, Version, digest
from protocol.signing import SigningKey, seal
from protocol.transport.identity import load_or_create
from protocol.transport.streams import Streams

RUN = RunId("ab" * 16)
LINEAGE = Lineage(b"\x01" * 32)
STAGE = StageId(1)
SHAPE = (1, 2, 4)
BODY = Body.of(bytes(range(32)), SHAPE)
Script = Callable[["Host", HostedTask], Awaitable[Outcome]]


@dataclass
class Host:
    """One peer: a daemon, its key, its gate and its hop server."""

    key: SigningKey
    p2p: P2P
    streams: Streams
    gate: Gate
    view: View
    caller: HopCaller
    worked: list[TaskId] = field(default_factory=list)
    server: HopServer | None = None

    @property
    def peer_id(self) -> PeerId:
        return self.key.peer_id

    async def serve(self, script: Script, *, num_slots: int = 4) -> None:
        async def work(hosted: HostedTask) -> Outcome:
            self.worked.append(hosted.key.task)
            return await script(self, hosted)

        self.gate.open(STAGE, round_id=RoundId(0), version=Version(0), lineage=LINEAGE)
        self.server = HopServer(
            run=RUN,
            codec="fp32",
            streams=self.streams,
            gate=self.gate,
            work=work,
            on_answered=lambda key, outcome: None,
            on_received=lambda task, target_tokens: None,
            body_bytes=body_bytes,
            load_s=lambda: 0.0,
            jobs_done=lambda: 0,
            num_slots=lambda: num_slots,
            num_numbers=lambda round_id: NUM_NUMBERS,
            round_deadline_s=60.0,
        )
        await self.server.serve()

    def knows(self, *hosts: Host, round_id: int = 0) -> None:
        self.view.learn(
            Membership(
                stage=STAGE,
                generation=1,
                round=RoundId(round_id),
                version=Version(0),
                lineage=LINEAGE,
                members={host.peer_id: 1.0 for host in hosts},
            )
        )


NUM_NUMBERS = 8


def body_bytes(shape: tuple[int, ...]) -> int:
    if shape != SHAPE:
        raise WireError(f"shape {shape}")
    return len(BODY.data)


def task(number: int = 0, round_id: int = 0) -> TaskId:
    return TaskId(TaskKind.TRAIN, RoundId(round_id), number)


async def echo(host: Host, hosted: HostedTask) -> Outcome:
    """Answer with the body reversed, honestly signed."""
    gradient = bytes(hosted.body.data)[::-1]
    entry = PathEntry(
        run=RUN,
        kind=hosted.key.task.kind,
        round=hosted.key.task.round,
        number=hosted.key.task.number,
        stages=(hosted.key.stage,),
        peer=host.peer_id,
        caller=hosted.key.caller,
        version=Version(0),
        local_step=0,
        input_digest=hosted.body.digest,
        output_digest=digest(gradient),
        behind=path_digest(()),
        loss_sum=1.5,
        target_tokens=2,
    )
    return Outcome(gradient, digest(gradient), 1.5, 2, (seal(host.key, ENTRY_CONTEXT, entry),))


@asynccontextmanager
async def hosts(folder: Path, count: int, *, hop_silence_s: float = 5.0) -> AsyncIterator[list[Host]]:
    """Start `count` peers that know the first one's address; stop them all at the end."""
    async with AsyncExitStack() as stack:
        started: list[Host] = []
        for index in range(count):
            key_path = folder / f"{index}.key"
            key = load_or_create(key_path)
            first = [str(address) for address in await started[0].p2p.get_visible_maddrs()] if started else []
            p2p = await P2P.create(
                initial_peers=first, identity_path=str(key_path), check_if_identity_free=False, startup_timeout=60
            )
            stack.push_async_callback(p2p.shutdown)
            streams = Streams(p2p)
            stack.push_async_callback(streams.stop)
            view = View()
            caller = HopCaller(
                run=RUN,
                me=key.peer_id,
                codec="fp32",
                gradient_codec="fp32",
                num_stages=2,
                streams=streams,
                view=view,
                router=Router(run=RUN),
                hop_silence_s=hop_silence_s,
            )
            started.append(Host(key, p2p, streams, Gate(run=RUN), view, caller))
        yield started
        await asyncio.gather(*(host.server.stop() for host in started if host.server is not None))
