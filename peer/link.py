"""This peer's connections for one run: the node, the three ways of talking over it, and who may come in.

Owns: starting and stopping them in the right order, and introducing peers to each other by address.
Must not know: rounds, tensors, stages.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import structlog

from peer.settings import IDENTITY_FILE, PeerSettings
from protocol.access import Door
from protocol.errors import TransientError
from protocol.ids import PeerId
from protocol.invite import Invite
from protocol.signing import SigningKey
from protocol.transport.blobs import Blobs
from protocol.transport.calls import Calls
from protocol.transport.node import Node
from protocol.transport.passes import Passes
from protocol.transport.streams import Streams
from protocol.transport.throttle import Line, Throttle

log = structlog.get_logger()


@dataclass(slots=True)
class Link:
    """A live connection to a swarm."""

    node: Node
    line: Line
    streams: Streams
    calls: Calls
    blobs: Blobs
    door: Door
    passes: Passes
    coordinator: PeerId
    coordinator_addresses: tuple[str, ...]
    process: int = field(default_factory=lambda: secrets.randbits(63))
    """Ours alone: by it the coordinator tells us from a copy that uses the same key."""
    _introduced: dict[PeerId, tuple[str, ...]] = field(default_factory=dict)

    @property
    def key(self) -> SigningKey:
        return self.node.key

    @property
    def peer_id(self) -> PeerId:
        return self.node.peer_id

    async def introduce(self, peer: PeerId, addresses: Iterable[str]) -> None:
        """Tell our daemon where a peer lives, so that it can be dialled by its id alone.

        One that is not there, or could not be dialled since (`lost`), is introduced again when somebody next names it.
        """
        known = tuple(addresses)
        if peer == self.peer_id or not known or self._introduced.get(peer) == known:
            return
        self._introduced[peer] = known  # at once: who names the peer meanwhile need not dial as well
        is_reached = False
        try:
            for address in known:
                try:
                    await self.node.connect(address)
                except TransientError as error:
                    log.debug("peer.unreachable", peer=peer, error=error.one_line())
                else:
                    is_reached = True
                    return
        finally:
            if not is_reached:
                self._introduced.pop(peer, None)

    def lost(self, peer: PeerId) -> None:
        """Note that a peer could not be dialled, or has gone silent: the daemon may have forgotten its addresses."""
        self._introduced.pop(peer, None)


@asynccontextmanager
async def connected(invite: Invite, settings: PeerSettings) -> AsyncIterator[Link]:
    """Join the swarm of an invite; leave it cleanly when the block ends."""
    node = await Node.start(
        settings.data_dir / IDENTITY_FILE,
        initial_peers=invite.addresses,
        host_maddrs=settings.listen,
        announce_maddrs=settings.announce,
        run=invite.run,
        coordinator=invite.coordinator,
    )
    line = Line(up=Throttle(mbps=settings.upload_mbps), down=Throttle(mbps=settings.download_mbps))
    door = Door(invite.run, invite.coordinator)
    door.on_banned.append(node.gate.ban)
    streams = Streams(node.p2p, line=line, door=door)
    calls = Calls(streams, run=invite.run, coordinator=invite.coordinator)
    passes = Passes(calls, streams, door, me=node.peer_id)
    passes.serve()
    try:
        yield Link(
            node=node,
            line=line,
            streams=streams,
            calls=calls,
            blobs=Blobs(streams, run=invite.run),
            door=door,
            passes=passes,
            coordinator=invite.coordinator,
            coordinator_addresses=invite.addresses,
        )
    finally:
        await streams.stop()
        await asyncio.shield(node.stop())
