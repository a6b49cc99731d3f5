"""The gate of the DHT without a network (`protocol/transport/validator.py`); the rules are tested with the records."""

from __future__ import annotations

from typing import Any

import msgpack
import pytest
from hivemind.dht.protocol import DHTProtocol
from hivemind.dht.validation import CompositeValidator, DHTRecord

from protocol.records import MAX_RECORD_BYTES, key_id, replica_key, seal_publication
from protocol.transport.validator import RecordGate
from tests.protocol.test_records import ALICE, COORDINATOR, NOW, RUN, publication

VALUE = seal_publication(ALICE, publication())
SUBKEY = msgpack.packb(ALICE.peer_id)


def gate() -> RecordGate:
    return RecordGate(RUN, COORDINATOR.peer_id, clock=lambda: NOW)


def dht_record(**changes: Any) -> DHTRecord:
    values: dict[str, Any] = {
        "key": key_id(replica_key(RUN, 1)),  # type: ignore[arg-type]
        "subkey": SUBKEY,
        "value": msgpack.packb(VALUE),
        "expiration_time": publication().expires_s,
    }
    return DHTRecord(**(values | changes))


def test_an_honest_record_passes_in_hiveminds_packing() -> None:
    """Oracle: the same record that check_record accepts, packed as hivemind packs subkeys and values."""
    assert gate().validate(dht_record())


@pytest.mark.parametrize(
    "changes",
    [
        {"subkey": DHTProtocol.IS_REGULAR_VALUE},
        {"subkey": DHTProtocol.IS_DICTIONARY},
        {"subkey": b"\xc1"},
        {"subkey": msgpack.packb(7)},
        {"subkey": msgpack.packb(ALICE.peer_id.encode())},
        {"subkey": msgpack.packb([ALICE.peer_id])},
        {"subkey": msgpack.packb("é")},
        {"subkey": SUBKEY + b"\x00"},
        {"subkey": msgpack.packb("x" * 1000)},
        {"value": VALUE},
        {"value": b""},
        {"value": msgpack.packb("text")},
        {"value": msgpack.packb(None)},
        {"value": msgpack.packb(msgpack.ExtType(0x40, msgpack.packb([VALUE])))},
        {"value": b"\xd6\xff" + bytes(4)},  # a msgpack timestamp
        {"value": msgpack.packb(VALUE) + b"\x00"},
        {"value": msgpack.packb(bytes(MAX_RECORD_BYTES + 1))},
        {"value": b"\x91" * 5000},
        {"key": b""},
        {"key": bytes(20)},
        {"expiration_time": float("nan")},
        {"expiration_time": float("inf")},
    ],
)
def test_everything_else_is_refused_and_counted(changes: dict[str, Any]) -> None:
    """Oracle: default deny; a no is an answer, never an exception."""
    tested = gate()
    assert not tested.validate(dht_record(**changes))
    assert tested.refused.total() == 1


def test_a_banned_peers_record_is_refused() -> None:
    """Oracle: the same record before and after the ban."""
    tested = gate()
    tested.ban(frozenset({ALICE.peer_id}))
    assert not tested.validate(dht_record())
    tested.ban(frozenset())
    assert tested.validate(dht_record())


def test_no_other_validator_can_stand_in_for_ours() -> None:
    """Oracle: hivemind's composite asks every validator that was not merged away."""
    strict, other = gate(), RecordGate(RUN, ALICE.peer_id, clock=lambda: NOW)
    assert not CompositeValidator([strict, other]).validate(dht_record())
    assert CompositeValidator([strict]).validate(dht_record())
