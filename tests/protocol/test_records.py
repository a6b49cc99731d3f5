"""DHT records and their rules (`protocol/records.py`)."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from protocol.errors import ConfigError, PeerFault, SignatureError, SwarmError, WireError
from protocol.ids import Lineage, PeerId, RunId, StageId, Version
from protocol.records import (
    CLOCK_SLACK_S,
    MAX_AHEAD_S,
    MAX_HOSTED,
    MAX_RECORD_BYTES,
    MAX_SHARDS,
    RECORD_CONTEXT,
    RECORD_TTL_S,
    REPLICAS_PER_KEY,
    Admission,
    HostedStage,
    Publication,
    ReplicaRecord,
    admit,
    check_admission,
    check_record,
    key_id,
    next_expiry,
    replica_key,
    seal_publication,
    shard_of,
    shards_for,
)
from protocol.signing import Signed, SigningKey, seal

RUN = RunId("0123456789abcdef" * 2)
OTHER_RUN = RunId("f" * 32)
COORDINATOR = SigningKey(bytes(32))
ALICE = SigningKey(b"a" * 32)
BOB = SigningKey(b"b" * 32)
NOW = 1_800_000_000.0


def pass_for(key: SigningKey = ALICE, signer: SigningKey = COORDINATOR, **changes: Any) -> Signed:
    values: dict[str, Any] = {"run": RUN, "peer": key.peer_id, "name": "alice", "issued_s": int(NOW) - 60}
    return admit(signer, **(values | {"valid_hours": 6} | changes))


def hosted(*stages: int) -> tuple[HostedStage, ...]:
    return tuple(HostedStage(stage=StageId(s), version=Version(3), lineage=Lineage(bytes(32))) for s in stages)


def record(**changes: Any) -> ReplicaRecord:
    values: dict[str, Any] = {
        "run": RUN,
        "peer": ALICE.peer_id,
        "name": "alice",
        "addresses": ("/ip4/203.0.113.5/tcp/4001",),
        "hosted": hosted(1, 2),
        "software": "handcar 0.1.0",
        "protocol": 1,
        "admission": pass_for(),
    }
    return ReplicaRecord(**(values | changes))


def publication(expires_s: float = NOW + RECORD_TTL_S, **changes: Any) -> Publication:
    values: dict[str, Any] = {"record": record(), "expires_s": expires_s}
    return Publication(**(values | changes))


def check(value: bytes, **changes: Any) -> Publication:
    values: dict[str, Any] = {
        "key": key_id(replica_key(RUN, StageId(1))),
        "subkey": ALICE.peer_id,
        "expires_s": NOW + RECORD_TTL_S,
        "run": RUN,
        "coordinator": COORDINATOR.peer_id,
        "now_s": NOW,
    }
    return check_record(value, **(values | changes))


@pytest.mark.parametrize("stage", [1, 2])
def test_an_honest_record_passes_under_each_stage_of_its_span(stage: int) -> None:
    """Oracle: what went in comes out."""
    made = publication()
    assert check(seal_publication(ALICE, made), key=key_id(replica_key(RUN, StageId(stage)))) == made
    assert made.record.stages == (1, 2)


def test_a_tombstone_passes_by_the_same_rules() -> None:
    """Oracle: only the owner can say that it has gone."""
    assert check(seal_publication(ALICE, publication(gone=True))).gone
    with pytest.raises(SignatureError):
        check(seal_publication(BOB, publication(gone=True)))


BROKEN: dict[str, tuple[Any, dict[str, Any], type[SwarmError]]] = {
    "another peer's subkey": (publication(), {"subkey": BOB.peer_id}, SignatureError),
    "a stage that is not in the span": (publication(), {"key": key_id(replica_key(RUN, StageId(3)))}, PeerFault),
    "another shard": (publication(), {"key": key_id(replica_key(RUN, StageId(1), 0, 2))}, PeerFault),
    "another run here": (publication(), {"run": OTHER_RUN}, PeerFault),
    "another coordinator": (publication(), {"coordinator": BOB.peer_id}, SignatureError),
    "an expiry nobody signed": (publication(), {"expires_s": NOW + 80}, PeerFault),
    "an expiry that is no number": (publication(), {"expires_s": math.nan}, PeerFault),
    "an expiry too far ahead": (
        publication(NOW + MAX_AHEAD_S + CLOCK_SLACK_S + 1),
        {"expires_s": NOW + MAX_AHEAD_S + CLOCK_SLACK_S + 1},
        PeerFault,
    ),
    "another peer inside": (publication(record=record(peer=BOB.peer_id)), {}, PeerFault),
    "another run inside": (publication(record=record(run=OTHER_RUN)), {}, PeerFault),
    "somebody else's admission": (publication(record=record(admission=pass_for(BOB))), {}, SignatureError),
    "an admission for another run": (publication(record=record(admission=pass_for(run=OTHER_RUN))), {}, SignatureError),
    "a self-made admission": (publication(record=record(admission=pass_for(signer=ALICE))), {}, SignatureError),
    "a name it was not given": (publication(record=record(name="coordinator")), {}, PeerFault),
    "an expired admission": (
        publication(record=record(admission=pass_for(issued_s=int(NOW) - 7200, valid_hours=1))),
        {},
        PeerFault,
    ),
    "an admission from the future": (
        publication(record=record(admission=pass_for(issued_s=int(NOW) + 600))),
        {},
        PeerFault,
    ),
    "an admission that ends before it begins": (
        publication(record=record(admission=pass_for(valid_hours=-0.001))),
        {},
        PeerFault,
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_record_that_breaks_a_rule_is_refused(name: str) -> None:
    """Oracle: the list of rules in the module's docstring, broken one at a time."""
    made, changes, error = BROKEN[name]
    with pytest.raises(error):
        check(seal_publication(ALICE, made), **changes)


def test_a_message_signed_for_another_purpose_is_not_a_record() -> None:
    """Oracle: domain separation."""
    with pytest.raises(SignatureError):
        check(seal(ALICE, "receipt", publication()).to_bytes())
    assert check(seal(ALICE, RECORD_CONTEXT, publication()).to_bytes())


@given(st.integers(min_value=0), st.integers(min_value=1, max_value=255))
def test_no_flipped_byte_gets_through(position: int, flip: int) -> None:
    """Oracle: every byte of the value is covered by the signature or is the signature."""
    value = bytearray(seal_publication(ALICE, publication()))
    value[position % len(value)] ^= flip
    with pytest.raises(PeerFault):
        check(bytes(value))


@given(st.binary(max_size=300))
def test_garbage_is_a_peer_fault(garbage: bytes) -> None:
    """Oracle: whatever arrives, nothing but the error tree comes out."""
    with pytest.raises(PeerFault):
        check(garbage)


def test_oversized_values_are_refused_before_they_are_read() -> None:
    """Oracle: 4 KiB."""
    with pytest.raises(WireError):
        check(bytes(MAX_RECORD_BYTES + 1))


def test_a_record_once_valid_stays_valid_whatever_the_clock_says() -> None:
    """Oracle: a node that returns an honest record must never be thought a liar by a reader whose clock runs ahead."""
    value = seal_publication(ALICE, publication())
    for later in (0, 10, 89, 3600, 10**6):
        assert check(value, now_s=NOW + later)


def test_a_record_may_outlive_its_admission_by_one_lifetime_at_most() -> None:
    """Oracle: made while admitted, so it expires at most MAX_AHEAD_S after the admission does."""
    ending = record(admission=pass_for(issued_s=int(NOW) - 3600, valid_hours=1))
    made = publication(NOW + MAX_AHEAD_S, record=ending)
    assert check(seal_publication(ALICE, made), expires_s=made.expires_s)
    late = publication(NOW + MAX_AHEAD_S + 1, record=ending)
    with pytest.raises(PeerFault):
        check(seal_publication(ALICE, late), expires_s=late.expires_s)


def test_the_largest_honest_span_fits_and_a_record_that_does_not_says_so() -> None:
    """Oracle: the 4 KiB cap against the other limits."""
    largest = record(hosted=hosted(*range(MAX_HOSTED)), addresses=("/ip4/203.0.113.5/tcp/4001",) * 8)
    assert len(seal_publication(ALICE, publication(record=largest))) <= MAX_RECORD_BYTES
    with pytest.raises(ConfigError):
        seal_publication(
            ALICE, publication(record=record(hosted=hosted(*range(MAX_HOSTED)), addresses=("/" + "x" * 250,) * 8))
        )


@pytest.mark.parametrize(
    "changes",
    [
        {"hosted": ()},
        {"hosted": hosted(1, 3)},
        {"hosted": hosted(2, 1)},
        {"hosted": hosted(1, 1)},
        {"hosted": hosted(*range(MAX_HOSTED + 1))},
        {"name": ""},
        {"name": "red\x1b[31m"},
        {"name": "x" * 41},
        {"addresses": ("not an address",)},
        {"addresses": ("/ip4/203.0.113.5/tcp/4001",) * 9},
        {"load_s": math.inf},
        {"wave": 0},
        {"wave": 65536},
        {"run": "short"},
    ],
)
def test_records_that_make_no_sense_cannot_be_built_or_read(changes: dict[str, Any]) -> None:
    """Oracle: the field limits; control characters would reach people's terminals."""
    with pytest.raises(ValidationError):
        record(**changes)


@given(
    st.lists(st.floats(min_value=-200, max_value=200), min_size=1, max_size=30),
)
def test_expiries_strictly_grow_even_if_the_clock_steps_back(steps: list[float]) -> None:
    """Oracle: the DHT refuses an update whose expiry is not later."""
    now_s, previous = NOW, None
    for step in steps:
        now_s += step
        expiry = next_expiry(previous, now_s)
        assert previous is None or expiry > previous
        assert expiry >= now_s + RECORD_TTL_S
        previous = expiry


def test_a_small_step_back_stays_within_what_others_accept() -> None:
    """Oracle: RECORD_TTL_S leaves room below MAX_AHEAD_S."""
    assert next_expiry(next_expiry(None, NOW), NOW - 15) <= NOW - 15 + MAX_AHEAD_S + CLOCK_SLACK_S


@pytest.mark.parametrize(
    ("replicas", "shards"), [(0, 1), (1, 1), (64, 1), (65, 2), (128, 2), (129, 4), (300, 8), (10**6, 64)]
)
def test_a_stage_is_spread_over_several_keys_above_64_replicas(replicas: int, shards: int) -> None:
    """Oracle: worked out by hand."""
    assert shards_for(replicas) == shards
    assert shards <= MAX_SHARDS


def test_shards_fill_evenly() -> None:
    """Oracle: binomial spread; 512 peers over 8 keys stay near REPLICAS_PER_KEY each."""
    peers = [SigningKey(i.to_bytes(32, "big")).peer_id for i in range(512)]
    counts = [sum(shard_of(peer, 8) == shard for peer in peers) for shard in range(8)]
    assert sum(counts) == 512
    assert max(counts) < 1.5 * REPLICAS_PER_KEY


def test_keys_differ_by_run_stage_and_shard() -> None:
    """Oracle: no two of them hash alike."""
    keys = {
        key_id(replica_key(run, StageId(stage), shard, 4))
        for run in (RUN, OTHER_RUN)
        for stage in range(20)
        for shard in range(4)
    }
    assert len(keys) == 160


def test_an_admission_is_checked_against_the_clock_when_a_peer_calls() -> None:
    """Oracle: issue time and expiry, with slack: ten minutes for a clock that is behind, three seconds after."""
    signed = pass_for(issued_s=int(NOW), valid_hours=1)

    def at(now_s: float, peer: PeerId = ALICE.peer_id) -> Admission:
        return check_admission(signed, run=RUN, coordinator=COORDINATOR.peer_id, peer=peer, now_s=now_s)

    assert at(NOW).name == "alice"
    assert at(NOW - 2)
    assert at(NOW + 3602)
    assert at(NOW - 590)
    for bad in (NOW - 610, NOW + 3610):
        with pytest.raises(PeerFault):
            at(bad)
    with pytest.raises(SignatureError):
        at(NOW, BOB.peer_id)
