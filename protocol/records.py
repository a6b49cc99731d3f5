"""DHT records: what a replica says about itself, and the rules by which everybody refuses the rest. Pure.

Owns: the admission (the coordinator's signed pass for one peer), the replica record and its publication, the
names of DHT keys, sizes, expiries, and `check_record`, the one place that knows all the rules. Must not know:
hivemind, clocks, sockets; times are passed in as Unix seconds. Used by `protocol/transport/node.py` (publish,
read), its validator (default deny) and the coordinator (who signs admissions).

The DHT is slow discovery: who, where, which stages. Progress, membership and load travel by direct calls.

What keeps a record honest:
* its subkey is its owner's peer id, and the owner signed it together with its expiry, so that nobody can
  replace it, prolong it, move it to another key or bring back an older one (the DHT keeps the latest expiry);
* it carries an admission signed by the coordinator, so that strangers cannot bloat a key;
* no rule but "not too far ahead" looks at the clock, so a record that was valid once stays valid until it
  expires, on every node, whatever its clock says.
"""

from __future__ import annotations

import hashlib
from functools import lru_cache
from typing import Annotated, Self

from pydantic import AfterValidator, Field, model_validator

from protocol.errors import ConfigError, PeerFault, SignatureError, WireError
from protocol.ids import DIGEST_BYTES, Lineage, PeerId, RunId, StageId, Version
from protocol.signing import MAX_PEER_ID_CHARS, Signed, SigningKey, seal, unseal
from protocol.wire import Message

MAX_RECORD_BYTES = 4096
MAX_AHEAD_S = 90.0  # a replica that vanished is forgotten after this long at the latest
RECORD_TTL_S = 75.0  # outlives two lost refreshes, and leaves room below MAX_AHEAD_S for a clock that is set back
REFRESH_EVERY_S = 25.0
CLOCK_SLACK_S = 3.0  # hivemind refuses to join nodes whose clocks differ by more
BEHIND_SLACK_S = 600.0  # a clock that has fallen behind since the start must not refuse everybody's renewed pass
EXPIRY_STEP_S = 0.01  # the DHT only takes an update whose expiry is strictly later
REPLICAS_PER_KEY = 64  # about 64 KiB in one read
MAX_SHARDS = 64
MAX_HOSTED = 32
MAX_ADDRESSES = 8
MAX_NAME_CHARS = 40
MAX_WAVE = 65535
ADMISSION_CONTEXT = "admission"
RECORD_CONTEXT = "replica record"
KNOWN_RECORDS = 1024  # verified publications kept, at most MAX_RECORD_BYTES each


def _printable(text: str) -> str:
    if not text.isprintable():
        raise ValueError("must be printable")
    return text


_Run = Annotated[RunId, Field(pattern=r"^[0-9a-f]{32}$")]
_Peer = Annotated[PeerId, Field(min_length=1, max_length=MAX_PEER_ID_CHARS)]
_Name = Annotated[str, Field(min_length=1, max_length=MAX_NAME_CHARS), AfterValidator(_printable)]
_Address = Annotated[str, Field(max_length=256, pattern=r"^/[!-~]+$")]
_Software = Annotated[str, Field(max_length=64), AfterValidator(_printable)]
_Seconds = Annotated[float, Field(ge=0, le=1e6)]


class Admission(Message):
    """The coordinator's pass: this peer takes part in this run, under this name, until then."""

    run: _Run
    peer: _Peer
    name: _Name
    issued_s: Annotated[int, Field(ge=0)]
    expires_s: Annotated[int, Field(ge=0)]


class HostedStage(Message):
    """One stage that a peer hosts, and the shared state it had when the record was made."""

    stage: Annotated[StageId, Field(ge=0, le=65535)]
    version: Annotated[Version, Field(ge=0)]
    lineage: Annotated[Lineage, Field(min_length=DIGEST_BYTES, max_length=DIGEST_BYTES)]


class ReplicaRecord(Message):
    """What a peer says about itself: who, where, which consecutive stages, with which software."""

    run: _Run
    peer: _Peer
    name: _Name
    addresses: Annotated[tuple[_Address, ...], Field(max_length=MAX_ADDRESSES)]
    hosted: Annotated[tuple[HostedStage, ...], Field(min_length=1, max_length=MAX_HOSTED)]
    software: _Software
    protocol: Annotated[int, Field(ge=0, le=65535)]
    admission: Signed
    load_s: _Seconds = 0.0
    """Seconds until a new task would start. A hint that is old by the time it is read."""
    wave: Annotated[int, Field(ge=1, le=MAX_WAVE)] = 1
    """How many microbatches pass the span together: whoever sends them should keep enough under way."""

    @property
    def stages(self) -> tuple[StageId, ...]:
        """The peer's span."""
        return tuple(hosted.stage for hosted in self.hosted)

    @model_validator(mode="after")
    def _stages_are_consecutive(self) -> Self:
        first = self.hosted[0].stage
        if self.stages != tuple(range(first, first + len(self.hosted))):
            raise ValueError("stages are not consecutive")
        return self


class Publication(Message):
    """What the owner signs and the DHT stores under each of the record's keys."""

    record: ReplicaRecord
    shards: Annotated[int, Field(ge=1, le=MAX_SHARDS)] = 1
    expires_s: Annotated[float, Field(ge=0)]
    gone: bool = False
    """A tombstone: the peer has left these keys, and its later expiry outlives what it said before."""

    @model_validator(mode="after")
    def _shards_are_a_power_of_two(self) -> Self:
        if self.shards & (self.shards - 1):
            raise ValueError("shards is not a power of two")
        return self

    def dht_keys(self) -> tuple[bytes, ...]:
        """Return the DHT keys that this publication belongs under, one per stage of the span."""
        shard = shard_of(self.record.peer, self.shards)
        return tuple(replica_key(self.record.run, stage, shard, self.shards) for stage in self.record.stages)


def replica_key(run: RunId, stage: StageId, shard: int = 0, shards: int = 1) -> bytes:
    """Return the DHT key under which one shard of a stage's replicas is found."""
    return f"handcar-1/{run}/stage-{stage}/{shard}-of-{shards}".encode("ascii")


def key_id(key: bytes) -> bytes:
    """Return the 20 bytes that stand for a key inside hivemind's DHT, which is all that a validator gets to see."""
    return hashlib.sha1(key, usedforsecurity=False).digest()


def shards_for(num_replicas: int) -> int:
    """Return over how many keys a stage's replicas are spread: a power of two, so that sizes change rarely."""
    shards = 1
    while shards * REPLICAS_PER_KEY < num_replicas and shards < MAX_SHARDS:
        shards *= 2
    return shards


def shard_of(peer: PeerId, shards: int) -> int:
    """Return which of the `shards` keys of a stage a peer's record is under."""
    return int.from_bytes(hashlib.sha256(peer.encode("ascii")).digest()[:8], "big") % shards


def next_expiry(previous_s: float | None, now_s: float) -> float:
    """Return the expiry of a new publication: strictly later than the last one, even if the clock was set back."""
    wanted = now_s + RECORD_TTL_S
    return wanted if previous_s is None else max(wanted, previous_s + EXPIRY_STEP_S)


def seal_publication(key: SigningKey, publication: Publication) -> bytes:
    """Return the bytes to store, or raise `ConfigError` when a record has outgrown its limit."""
    value = seal(key, RECORD_CONTEXT, publication).to_bytes()
    if len(value) > MAX_RECORD_BYTES:
        raise ConfigError(
            f"our DHT record has {len(value)} bytes, over the limit of {MAX_RECORD_BYTES}.",
            hint="Announce fewer addresses or host fewer stages.",
        )
    return value


def check_record(
    value: bytes, *, key: bytes, subkey: str, expires_s: float, run: RunId, coordinator: PeerId, now_s: float
) -> Publication:
    """Return what `value` says if it may stand under DHT key id `key` and `subkey` until `expires_s`.

    Raises `PeerFault` (or `WireError`, `SignatureError`) naming the rule that is broken. Cheap rules come first:
    whoever floods us with forgeries gets no signature check unless the rest fits.
    """
    if len(value) > MAX_RECORD_BYTES:
        raise WireError(f"record of {len(value)} bytes is over the limit of {MAX_RECORD_BYTES}")
    if not expires_s <= now_s + MAX_AHEAD_S + CLOCK_SLACK_S:  # not: a NaN must fail too
        raise PeerFault(f"record of {subkey} expires too far ahead")
    publication = _open(value, run, coordinator, PeerId(subkey))
    if publication.expires_s != expires_s:
        raise PeerFault(f"record of {subkey} is stored with an expiry that its owner did not sign")
    if key not in (key_id(own) for own in publication.dht_keys()):
        raise PeerFault(f"record of {subkey} is stored under a key that it does not belong to")
    return publication


def admit(key: SigningKey, *, run: RunId, peer: PeerId, name: str, issued_s: int, valid_hours: float) -> Signed:
    """Sign a pass for `peer` with the coordinator's key."""
    expires_s = issued_s + round(valid_hours * 3600)
    admission = Admission(run=run, peer=peer, name=name, issued_s=issued_s, expires_s=expires_s)
    return seal(key, ADMISSION_CONTEXT, admission)


def check_admission(signed: Signed, *, run: RunId, coordinator: PeerId, peer: PeerId, now_s: float) -> Admission:
    """Return the admission if it lets `peer` into `run` now, else raise `PeerFault` or `SignatureError`."""
    admission = _open_admission(signed, run, coordinator, peer)
    if not admission.issued_s - BEHIND_SLACK_S <= now_s <= admission.expires_s + CLOCK_SLACK_S:
        raise PeerFault(f"the admission of {peer} is not valid at this time")
    return admission


@lru_cache(maxsize=KNOWN_RECORDS)
def _open(value: bytes, run: RunId, coordinator: PeerId, owner: PeerId) -> Publication:
    """Check everything that depends on the bytes alone; failures are not remembered, so they cost no memory."""
    signed = Signed.from_bytes(value, max_bytes=MAX_RECORD_BYTES)
    if signed.signer != owner:
        raise SignatureError(f"record under {owner} is signed by {signed.signer}")
    publication = unseal(signed, RECORD_CONTEXT, Publication, signer=owner)
    record = publication.record
    if record.peer != owner or record.run != run:
        raise PeerFault(f"record of {owner} speaks of another peer or run")
    admission = _open_admission(record.admission, run, coordinator, owner)
    if record.name != admission.name:
        raise PeerFault(f"record of {owner} uses a name that it was not admitted under")
    if not admission.issued_s <= publication.expires_s <= admission.expires_s + MAX_AHEAD_S:
        raise PeerFault(f"record of {owner} was made outside the time of its admission")
    return publication


@lru_cache(maxsize=KNOWN_RECORDS)
def _open_admission(signed: Signed, run: RunId, coordinator: PeerId, peer: PeerId) -> Admission:
    admission = unseal(signed, ADMISSION_CONTEXT, Admission, signer=coordinator)
    if admission.run != run or admission.peer != peer:
        raise SignatureError(f"the admission shown by {peer} is for another peer or run")
    if admission.expires_s <= admission.issued_s:
        raise PeerFault(f"the admission of {peer} ends before it begins")
    return admission
