"""Records in a real DHT: who is found, who is refused, what hostile calls do (`protocol/transport/node.py`)."""

from __future__ import annotations

import asyncio
import os
import time
from typing import Any

import msgpack
import pytest
from hivemind.dht.protocol import DHTProtocol
from hivemind.p2p import P2PDaemonError, P2PHandlerError, PeerID
from hivemind.proto import dht_pb2
from hivemind.utils.serializer import MSGPackSerializer

from protocol.errors import ConfigError, RefusedError, UnreachableError
from protocol.ids import StageId
from protocol.records import MAX_AHEAD_S, Publication, ReplicaRecord, admit, key_id, replica_key, seal_publication
from protocol.signing import SigningKey
from protocol.transport.daemon import Reach
from protocol.transport.node import Node
from tests.protocol.transport.network import COORDINATOR, RUN, STRANGER, StartNode, found_by, record_of
from tests.protocol.transport.test_hardening import DICTIONARY, TUPLE, nested

pytestmark = pytest.mark.slow

KEY = replica_key(RUN, StageId(0))


async def rpc_store(sender: Node, receiver: Node, request: dht_pb2.StoreRequest) -> dht_pb2.StoreResponse:
    """Send a store call as it is, without what an honest hivemind would check before sending."""
    async with asyncio.timeout(10):
        return await sender.p2p.call_protobuf_handler(
            PeerID.from_base58(receiver.peer_id), "DHTProtocol.rpc_store", request, dht_pb2.StoreResponse
        )


def store_request(value: bytes, subkey: str, expires_s: float, key: bytes = KEY) -> dht_pb2.StoreRequest:
    return dht_pb2.StoreRequest(
        keys=[key_id(key)],
        subkeys=[MSGPackSerializer.dumps(subkey)],
        values=[MSGPackSerializer.dumps(value)],
        expiration_time=[expires_s],
        in_cache=[False],
    )


# --- discovery ----------------------------------------------------------------------------------------------------


async def test_three_nodes_find_each_other_by_stage(start: StartNode) -> None:
    """Oracle: who published what, seen from every node; a move and a goodbye are seen by all at once."""
    first = await start("first")
    entry = await first.addresses()
    second, third = await start("second", peers=entry), await start("third", peers=entry)
    nodes = (first, second, third)
    for node in nodes:
        assert await node.publish(record_of(node))
    for node in nodes:
        assert await found_by(node) == {first.peer_id, second.peer_id, third.peer_id}
        assert await found_by(node, stage=9) == set()

    assert await second.publish(record_of(second, 1, 2))  # moves to another span
    assert await third.withdraw()
    for node in nodes:
        assert await found_by(node) == {first.peer_id}
        assert await found_by(node, stage=1) == await found_by(node, stage=2) == {second.peer_id}

    assert await third.publish(record_of(third))  # and comes back
    assert await found_by(first) == {first.peer_id, third.peer_id}
    assert first.statistics().known_nodes == 2
    assert not first.statistics().refused


async def test_records_are_spread_over_shards(start: StartNode) -> None:
    """Oracle: with two keys per stage a reader that knows it sees both halves."""
    first = await start("first")
    others = [await start(name, peers=await first.addresses()) for name in ("b", "c", "d")]
    for node in (first, *others):
        node.shards = 2
        assert await node.publish(record_of(node))
    assert await found_by(first) == {node.peer_id for node in (first, *others)}


async def test_a_node_that_comes_back_alone_is_found_again_by_a_join(start: StartNode) -> None:
    """Oracle: a restarted coordinator knows nobody until a peer joins it; then it reads what peers have published."""
    first = await start("coordinator")
    entry = await first.addresses()
    other = await start("peer", peers=entry)
    await other.publish(record_of(other))
    await first.stop()
    again = await start("coordinator", host_maddrs=(entry[0].split("/p2p/")[0],))
    assert again.peer_id == first.peer_id
    assert await found_by(again) == set()
    assert await other.join(entry[0]) == first.peer_id
    assert await found_by(again) == {other.peer_id}


async def test_connecting_names_the_peer_or_says_why_not(start: StartNode) -> None:
    """Oracle: libp2p refuses a peer that does not hold the key of the id in the address."""
    first, second = await start("first"), await start("second")
    address = (await first.addresses())[0]
    way = address.split("/p2p/")[0]
    with pytest.raises(UnreachableError):
        await second.connect(f"{way}/p2p/{STRANGER.peer_id}")
    for nonsense in ("", "nonsense", way, f"/ip4/127.0.0.1/tcp/9/p2p/{STRANGER.peer_id}"):
        with pytest.raises(UnreachableError):
            await second.connect(nonsense)
    assert await second.connect(address) == first.peer_id
    offset_s, error_s = await second.clock_offset(first.peer_id)
    assert abs(offset_s) < 1
    assert error_s < 1


async def test_reach_and_announced_addresses_get_to_p2pd(start: StartNode) -> None:
    """Oracle: what the node then says about itself; p2pd refuses options that it does not know."""
    relay = await start(
        "relay", reach=Reach(force_reachability="public"), announce_maddrs=("/ip4/203.0.113.5/tcp/4001",)
    )
    assert await relay.addresses() == (f"/ip4/203.0.113.5/tcp/4001/p2p/{relay.peer_id}",)
    entry = await start("entry")
    (address,) = await entry.addresses()
    home_reach = Reach(force_reachability="private", use_auto_relay=True, trusted_relays=(address,), nat_port_map=False)
    home = await start("home", peers=(address,), reach=home_reach)
    assert await home.publish(record_of(home))
    assert await found_by(entry) == {home.peer_id}


# --- what is refused ----------------------------------------------------------------------------------------------


async def test_forged_and_overlong_records_are_refused_by_a_real_node(start: StartNode) -> None:
    """Oracle: the receiver answers False to each, and what the owner published stands."""
    victim = await start("victim")
    attacker = await start("attacker", peers=await victim.addresses())
    await victim.publish(record_of(victim))
    honest, mine, now_s = record_of(victim), record_of(attacker), time.time()

    def sealed(key: SigningKey, record: ReplicaRecord, expires_s: float, **more: Any) -> bytes:
        return seal_publication(key, Publication(record=record, expires_s=expires_s, **more))

    soon, far = now_s + 85, now_s + MAX_AHEAD_S + 60
    stranger = honest.model_copy(update={"peer": STRANGER.peer_id})
    attempts = {
        "tombstone for the victim, signed by another": store_request(
            sealed(attacker.key, honest, soon, gone=True), victim.peer_id, soon
        ),
        "own record under the victim's subkey": store_request(sealed(attacker.key, mine, soon), victim.peer_id, soon),
        "own record that never ends": store_request(sealed(attacker.key, mine, far), attacker.peer_id, far),
        "own record under another expiry": store_request(sealed(attacker.key, mine, soon), attacker.peer_id, soon + 1),
        "own record under a stage it does not host": store_request(
            sealed(attacker.key, mine, soon), attacker.peer_id, soon, key=replica_key(RUN, StageId(5))
        ),
        "a stranger with a borrowed admission": store_request(sealed(STRANGER, stranger, soon), STRANGER.peer_id, soon),
        "free text": store_request(b"hello", attacker.peer_id, soon),
    }
    for name, request in attempts.items():
        assert list((await rpc_store(attacker, victim, request)).store_ok) == [False], name
    plain = store_request(sealed(attacker.key, mine, soon), attacker.peer_id, soon)
    plain.subkeys[0] = DHTProtocol.IS_REGULAR_VALUE
    assert list((await rpc_store(attacker, victim, plain)).store_ok) == [False]

    assert await found_by(victim) == {victim.peer_id}
    assert victim.gate.refused.total() == len(attempts) + 1
    assert list(
        (
            await rpc_store(attacker, victim, store_request(sealed(attacker.key, mine, soon), attacker.peer_id, soon))
        ).store_ok
    ) == [True]
    assert await found_by(victim) == {victim.peer_id, attacker.peer_id}


async def test_a_banned_peer_disappears_at_once(start: StartNode) -> None:
    """Oracle: its admission still holds, its record is still there, but it is not believed any more."""
    first = await start("first")
    second = await start("second", peers=await first.addresses())
    await second.publish(record_of(second))
    assert await found_by(first) == {second.peer_id}
    first.gate.ban(frozenset({second.peer_id}))
    assert await found_by(first) == set()


async def test_our_own_bad_record_is_refused_before_it_is_sent(start: StartNode) -> None:
    """Oracle: E-REF for an admission that has run out, E-CFG for a record that is too large."""
    node = await start("node")
    old = admit(
        COORDINATOR, run=RUN, peer=node.peer_id, name="someone", issued_s=int(time.time()) - 9000, valid_hours=1
    )
    with pytest.raises(RefusedError):
        await node.publish(record_of(node, admission=old))
    with pytest.raises(ConfigError):
        await node.publish(record_of(node, *range(32), addresses=("/" + "x" * 250,) * 8))
    assert await found_by(node) == set()


async def test_bombs_and_garbage_in_real_calls_leave_an_honest_network(start: StartNode) -> None:
    """Oracle: every hostile call gets an answer (False or an error), and honest store and get still work."""
    victim = await start("victim")
    attacker = await start("attacker", peers=await victim.addresses())
    soon = time.time() + 60
    packed_peer = MSGPackSerializer.dumps(attacker.peer_id)
    hostile = [nested(depth, kind) for depth in (50, 200, 2000) for kind in (TUPLE, DICTIONARY)]
    hostile += [
        b"",
        b"\xc1",
        b"\x91" * 5000,
        os.urandom(1000),
        msgpack.packb(msgpack.ExtType(0x51, b"x")),
        bytes(2**21),
    ]
    for data in hostile:
        for subkey, value in ((data, b"v"), (b"", data), (packed_peer, data)):
            request = dht_pb2.StoreRequest(
                keys=[key_id(KEY)], subkeys=[subkey], values=[value], expiration_time=[soon], in_cache=[False]
            )
            try:
                stored = list((await rpc_store(attacker, victim, request)).store_ok)
            except (P2PHandlerError, P2PDaemonError):  # it said no in its own way; a TimeoutError would not be caught
                continue
            assert stored == [False]
    assert await victim.publish(record_of(victim))
    assert await attacker.publish(record_of(attacker))
    assert await found_by(attacker) == await found_by(victim) == {victim.peer_id, attacker.peer_id}


async def test_a_lying_node_cannot_hide_the_others(start: StartNode, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: a node whose answer comes first and claims to be the newest for ever is believed only about itself."""
    first = await start("first")
    entry = await first.addresses()
    liar, reader = await start("liar", peers=entry), await start("reader", peers=entry)
    await first.publish(record_of(first))
    expires_s = time.time() + 60
    own = seal_publication(liar.key, Publication(record=record_of(liar), expires_s=expires_s))
    item = [liar.peer_id, MSGPackSerializer.dumps(own), expires_s]
    lie = msgpack.packb(msgpack.ExtType(DICTIONARY, msgpack.packb([None, 9e15, [item]])))

    async def lie_at_once(request: bytes, remote: object) -> bytes:
        keys = dht_pb2.FindRequest.FromString(request).keys
        result = dht_pb2.FindResult(type=dht_pb2.FOUND_DICTIONARY, value=lie, expiration_time=float("inf"))
        answer = dht_pb2.FindResponse(results=[result] * len(keys), peer=liar.dht.protocol.node_info)
        return bytes(answer.SerializeToString())

    honest = first.p2p._client.control.unary_handlers["DHTProtocol.rpc_find"]

    async def answer_late(request: bytes, remote: object) -> bytes:
        await asyncio.sleep(0.1)
        return bytes(await honest(request, remote))

    monkeypatch.setitem(liar.p2p._client.control.unary_handlers, "DHTProtocol.rpc_find", lie_at_once)
    monkeypatch.setitem(first.p2p._client.control.unary_handlers, "DHTProtocol.rpc_find", answer_late)
    await reader.join((await liar.addresses())[0])
    reader.dht.protocol.storage.clear()  # in a network of three everybody stores everything
    assert await found_by(reader) == {first.peer_id, liar.peer_id}
