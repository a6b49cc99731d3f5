"""One process's place in the network: its identity, its p2pd, its DHT node and what it says about itself there.

Owns: the life of hivemind's in-process `DHTNode`, joining through initial peers, the clock check, publishing
and reading replica records. Must not know: tasks, rounds, tensors. Both apps own exactly one `Node`; streams
(`streams.py`) and the all-reduce register their handlers on `node.p2p`.

    node = await Node.start(key_path, run=run, coordinator=coordinator, initial_peers=(address,))
    tasks.create_task(node.wait_failed())   # raises TransientError when p2pd dies
    await node.publish(record)              # every REFRESH_EVERY_S
    replicas = await node.replicas(stage)
    await node.withdraw(); await node.stop()

Every call has a deadline. Errors of hivemind do not leave this file.
"""

from __future__ import annotations

import asyncio
import contextlib
import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from hivemind.dht.node import Blacklist, DHTNode
from hivemind.p2p import P2PDaemonError, P2PHandlerError, PeerID
from hivemind.proto import dht_pb2

from protocol.errors import (
    ClockError,
    ConfigError,
    DeadlineError,
    LocalFault,
    PeerFault,
    RefusedError,
    TransientError,
    UnreachableError,
)
from protocol.ids import PeerId, RunId, StageId
from protocol.records import (
    CLOCK_SLACK_S,
    MAX_ADDRESSES,
    Publication,
    ReplicaRecord,
    key_id,
    next_expiry,
    replica_key,
    seal_publication,
)
from protocol.signing import SigningKey
from protocol.transport import hardening, identity
from protocol.transport.addresses import by_reach, encodable, host_and_port, parse_address, require_peer, split_peer
from protocol.transport.daemon import STOP_TIMEOUT_S, Daemon, Reach
from protocol.transport.descriptors import raise_descriptor_limit
from protocol.transport.validator import RecordGate

DHT_TIMEOUT_S = 10.0  # three silent nodes in a row cost hivemind 3 s each
CALL_TIMEOUT_S = 5.0
CONNECT_TIMEOUT_S = 15.0  # libp2p gives up dialling by itself after about as long
BLACKLIST_S = 5.0
MAX_BLACKLIST_DOUBLINGS = 3
_HIVEMIND_ERRORS = (P2PDaemonError, P2PHandlerError, asyncio.IncompleteReadError, OSError)


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeStatistics:
    """What `Node.statistics()` shows."""

    known_nodes: int
    stored_keys: int
    refused: Mapping[str, int]
    """Records refused since the start, by error code."""


class Node:
    """A running node. Make one with `start`, end it with `stop`."""

    def __init__(self, key: SigningKey, p2p: Daemon, gate: RecordGate, *, run: RunId) -> None:
        self.key = key
        self.p2p = p2p
        self.gate = gate
        self.run = run
        self.shards = 1
        """Over how many keys a stage's replicas are spread, the same for the whole run (`records.shards_for`)."""
        self._dht: DHTNode | None = None
        self._published: Publication | None = None
        self._last_expiry_s: float | None = None
        self._publishing = asyncio.Lock()
        self._is_stopping = False

    @classmethod
    async def start(
        cls,
        key_path: Path,
        *,
        run: RunId,
        coordinator: PeerId,
        initial_peers: tuple[str, ...] = (),
        host_maddrs: tuple[str, ...] = ("/ip4/0.0.0.0/tcp/0",),
        announce_maddrs: tuple[str, ...] = (),
        reach: Reach | None = None,
    ) -> Node:
        """Start p2pd with the identity in `key_path`, join through any of `initial_peers`, open the DHT.

        Raises `ConfigError`, `StorageError`, `PortError`, `ClockError`, `UnreachableError` or `LocalFault`; whatever
        was started by then has been stopped.
        """
        hardening.install()
        raise_descriptor_limit()
        key = identity.load_or_create(key_path)
        ids = {parse_address(address): require_peer(address)[1] for address in initial_peers}
        ids = {address: peer for address, peer in ids.items() if peer != key.peer_id}  # libp2p cannot dial itself
        p2p = await Daemon.launch(
            key_path,
            host_maddrs=tuple(parse_address(address) for address in host_maddrs),
            announce_maddrs=tuple(_announced(address) for address in announce_maddrs),
            initial_peers=tuple(ids),
            reach=reach,
        )
        node = cls(key, p2p, RecordGate(run, coordinator, clock=time.time), run=run)
        try:
            if p2p.peer_id.to_base58() != key.peer_id:
                raise LocalFault(f"p2pd runs as {p2p.peer_id}, not as {key.peer_id}.")
            await node._check_clock(set(ids.values()))
            await node._open_dht(tuple(ids))
        except BaseException:
            await node.stop()
            raise
        return node

    @property
    def peer_id(self) -> PeerId:
        return self.key.peer_id

    def dht_time(self) -> float:
        """Return the clock by which records expire: Unix seconds."""
        return time.time()

    async def addresses(self) -> tuple[str, ...]:
        """Return the full addresses (with `/p2p/<id>`) at which others may reach this node now, the best ones first.

        No more than a message or a record holds: a machine with many virtual networks listens at dozens.
        """
        try:
            async with asyncio.timeout(CALL_TIMEOUT_S):
                found = await self.p2p.get_visible_maddrs(latest=True)
        except (*_HIVEMIND_ERRORS, ValueError, TimeoutError):
            return ()
        addresses = []
        for address in found:
            with contextlib.suppress(ConfigError):  # p2pd also lists transports that we do not use
                addresses.append(parse_address(str(address)))
        return tuple(sorted(addresses, key=by_reach)[:MAX_ADDRESSES])

    async def connect(self, address: str, *, timeout_s: float = CONNECT_TIMEOUT_S) -> PeerId:
        """Connect to the peer at a full address and return its id; libp2p proves that it holds the key.

        Raises `UnreachableError` or `DeadlineError` even for text that is no address: it came from a stranger.
        """
        try:
            way, peer_id = require_peer(address)
            async with asyncio.timeout(timeout_s):
                await self.p2p._client.connect(PeerID.from_base58(peer_id), [encodable(way)])
        except TimeoutError:
            raise DeadlineError(f"no connection to {address} within {timeout_s:g} s.") from None
        except (*_HIVEMIND_ERRORS, ConfigError) as error:
            raise UnreachableError(f"cannot connect to {address}: {_reason(error)}") from None
        return peer_id

    async def join(self, address: str, *, timeout_s: float = CONNECT_TIMEOUT_S) -> PeerId:
        """Connect to a node and enter each other in the DHT's routing tables.

        For a node that was not there when we started or has been away: the DHT forgets who does not answer, and
        a coordinator that comes back knows nobody until somebody joins it.
        """
        peer_id = await self.connect(address, timeout_s=timeout_s)
        try:
            async with asyncio.timeout(timeout_s):
                known = await self.dht.protocol.call_ping(PeerID.from_base58(peer_id))
        except TimeoutError:
            known = None
        if known is None:
            raise UnreachableError(f"{peer_id} is connected but does not answer.")
        return peer_id

    async def clock_offset(self, peer_id: PeerId, *, timeout_s: float = CALL_TIMEOUT_S) -> tuple[float, float]:
        """Return by how many seconds a peer's clock is ahead of ours, and how far that may be wrong."""
        try:
            async with asyncio.timeout(timeout_s):
                sent_s, started_s = self.dht_time(), time.monotonic()
                answer = await self.p2p.call_protobuf_handler(
                    PeerID.from_base58(peer_id), "DHTProtocol.rpc_ping", dht_pb2.PingRequest(), dht_pb2.PingResponse
                )
                half_s = (time.monotonic() - started_s) / 2
        except TimeoutError:
            raise DeadlineError(f"{peer_id} did not answer within {timeout_s:g} s.") from None
        except _HIVEMIND_ERRORS as error:
            raise UnreachableError(f"{peer_id} does not answer: {_reason(error)}") from None
        return answer.dht_time - (sent_s + half_s), half_s

    async def publish(self, record: ReplicaRecord, *, timeout_s: float = DHT_TIMEOUT_S) -> bool:
        """Tell the DHT about ourselves; call again every `REFRESH_EVERY_S`. Leaves the keys of an earlier span.

        Returns False when some node would not take it. Raises `RefusedError` if nobody would (say, because the
        admission has run out), `DeadlineError`, or `ConfigError` if the record has outgrown its limit.
        """
        async with self._publishing:
            before, now = self._published, self._next_publication(record)
            value = self._sealed(now, now.dht_keys())
            self._published = now
            taken = await self._put(value, now, now.dht_keys(), timeout_s)
            left = () if before is None else tuple(set(before.dht_keys()) - set(now.dht_keys()))
            if before is not None and left:
                goodbye = before.model_copy(update={"expires_s": now.expires_s, "gone": True})
                taken &= await self._put(self._sealed(goodbye, left), goodbye, left, timeout_s)
            return taken

    async def withdraw(self, *, timeout_s: float = DHT_TIMEOUT_S) -> bool:
        """Say goodbye: put tombstones over what we have published. Does nothing if that is nothing."""
        async with self._publishing:
            if self._published is None:
                return True
            expires_s = self._next_expiry()
            goodbye = self._published.model_copy(update={"expires_s": expires_s, "gone": True})
            self._published = None
            keys = goodbye.dht_keys()
            return await self._put(self._sealed(goodbye, keys), goodbye, keys, timeout_s)

    async def replicas(self, stage: StageId, *, timeout_s: float = DHT_TIMEOUT_S) -> tuple[ReplicaRecord, ...]:
        """Return what the replicas of a stage last said about themselves, ourselves included, by peer id.

        Raises `DeadlineError`; a stage of which nothing is known gives the empty tuple.
        """
        keys = [replica_key(self.run, stage, shard, self.shards) for shard in range(self.shards)]
        try:
            async with asyncio.timeout(timeout_s):
                # one search per key: an answer that holds several keys can outgrow hivemind's message limit
                answers = await asyncio.gather(*(self.dht.get(key, latest=True) for key in keys))
        except TimeoutError:
            raise DeadlineError(f"the DHT did not answer about stage {stage} within {timeout_s:g} s.") from None
        found: dict[PeerId, Publication] = {}
        for key, answer in zip(keys, answers, strict=True):
            for publication in self._believed(key, {} if answer is None else answer.value):
                found[publication.record.peer] = publication
        return tuple(found[peer].record for peer in sorted(found) if not found[peer].gone)

    async def wait_failed(self) -> None:
        """Raise `TransientError` when p2pd dies; return when the node is stopped. For a task next to the app's work."""
        reason = await self.p2p.wait_ended()
        if not self._is_stopping:
            raise TransientError(f"p2pd, the network process, ended unexpectedly ({reason}).", hint="Start again.")

    async def stop(self) -> None:
        """Leave the network and end p2pd; takes at most about twice `STOP_TIMEOUT_S`, whatever state things are in."""
        self._is_stopping = True
        dht, self._dht = self._dht, None
        if dht is not None and not self.p2p.has_ended:
            with contextlib.suppress(TimeoutError, *_HIVEMIND_ERRORS):
                async with asyncio.timeout(STOP_TIMEOUT_S):
                    await dht.shutdown()
        await self.p2p.stop(timeout_s=STOP_TIMEOUT_S)

    def statistics(self) -> NodeStatistics:
        """Return counts for status pages and metrics."""
        protocol = self.dht.protocol
        return NodeStatistics(
            known_nodes=len(protocol.routing_table.uid_to_peer_id),
            stored_keys=len(protocol.storage),
            refused=MappingProxyType(dict(self.gate.refused)),
        )

    @property
    def dht(self) -> DHTNode:
        """hivemind's node, for what has no method here."""
        if self._dht is None:
            raise LocalFault("the network node has been stopped.")
        return self._dht

    async def _check_clock(self, peers: set[PeerId]) -> None:
        """Raise `ClockError` if we disagree with most of the peers that answer, `UnreachableError` if none does."""
        if not peers:
            return
        answers = await asyncio.gather(*(self.clock_offset(peer) for peer in peers), return_exceptions=True)
        measured = [answer for answer in answers if not isinstance(answer, BaseException)]
        if not measured:
            raise UnreachableError(f"nobody answers: {answers[0]}")
        offset_s = statistics.median(offset for offset, _ in measured)
        slack_s = CLOCK_SLACK_S + max(error for _, error in measured)
        if abs(offset_s) > slack_s:
            side = "behind" if offset_s > 0 else "ahead of"
            raise ClockError(f"this clock is {abs(offset_s):.1f} s {side} the swarm's (allowed: {CLOCK_SLACK_S:g} s).")

    async def _open_dht(self, initial_peers: tuple[str, ...]) -> None:
        """Make hivemind's node on our p2pd. Its caches are off: a read that matters must be the latest."""
        try:
            self._dht = await DHTNode.create(
                p2p=self.p2p,
                initial_peers=list(initial_peers) or None,
                record_validator=self.gate,
                strict=False,  # a peer behind NAT cannot be dialled back yet; the clock has been checked
                cache_locally=False,
                cache_nearest=0,
                cache_on_store=False,
                cache_refresh_before_expiry=0,
                cache_size=1,
                reuse_get_requests=False,
            )
            self._dht.blacklist = _ShortBlacklist(base_time=BLACKLIST_S, backoff_rate=2)
        except (RuntimeError, *_HIVEMIND_ERRORS) as error:
            raise UnreachableError(f"cannot join the DHT: {_reason(error)}") from None

    def _next_publication(self, record: ReplicaRecord) -> Publication:
        return Publication(record=record, shards=self.shards, expires_s=self._next_expiry())

    def _next_expiry(self) -> float:
        self._last_expiry_s = next_expiry(self._last_expiry_s, self.dht_time())
        return self._last_expiry_s

    def _sealed(self, publication: Publication, keys: tuple[bytes, ...]) -> bytes:
        """Sign what we say, and hear it with the ears of the others before it goes out."""
        value = seal_publication(self.key, publication)
        try:
            for key in keys:
                self.gate.check_unpacked(key_id(key), self.peer_id, value, publication.expires_s)
        except PeerFault as fault:
            raise RefusedError(f"the swarm would refuse our own record: {fault}.") from None
        return value

    async def _put(self, value: bytes, publication: Publication, keys: tuple[bytes, ...], timeout_s: float) -> bool:
        try:
            async with asyncio.timeout(timeout_s):
                taken = await self.dht.store_many(
                    list(keys), [value] * len(keys), publication.expires_s, subkeys=[self.peer_id] * len(keys)
                )
        except TimeoutError:
            raise DeadlineError(f"the DHT did not take our record within {timeout_s:g} s.") from None
        return all(taken.values())

    def _believed(self, key: bytes, entries: object) -> list[Publication]:
        """Check what a search has brought once more; a search that mixes answers gives no guarantee of its own."""
        believed = []
        for subkey, (value, expires_s) in entries.items() if isinstance(entries, dict) else ():
            with contextlib.suppress(PeerFault):
                if expires_s >= self.dht_time():
                    believed.append(self.gate.check_unpacked(key_id(key), subkey, value, expires_s))
        return believed


class _ShortBlacklist(Blacklist):  # type: ignore[misc]
    """hivemind avoids a silent node twice as long each time; after an hour's absence nobody would ask it again."""

    def register_failure(self, peer: PeerID) -> None:
        super().register_failure(peer)
        self.ban_counter[peer] = min(self.ban_counter[peer], MAX_BLACKLIST_DOUBLINGS)


def _announced(address: str) -> str:
    """Return an address in the form that p2pd announces: it adds the peer id by itself."""
    way, _ = split_peer(address)
    if host_and_port(way)[1] == 0:
        raise ConfigError(f"{address} cannot be announced: it names no port.")
    return way


def _reason(error: BaseException) -> str:
    """Return hivemind's or libp2p's reason on one short line."""
    return (" ".join(str(error).split()) or type(error).__name__)[:200]
