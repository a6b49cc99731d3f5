"""The gate of the DHT: hivemind asks it about every record that arrives and every record that is read.

Owns: turning hivemind's view of a record (hashed key, packed subkey, packed value) into the arguments of
`protocol.records.check_record`, and counting refusals. Must not know any rule itself. Default deny: what is
not a replica record of this run is refused, plain values without a subkey included.

Every node of a run has the same gate from its first moment on (it is handed to `DHTNode.create`), so a refused
record finds no honest node to lie on.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import TypeVar

import msgpack
from hivemind.dht.protocol import DHTProtocol
from hivemind.dht.validation import DHTRecord, RecordValidatorBase

from protocol.errors import PeerFault, WireError
from protocol.ids import PeerId, RunId
from protocol.records import MAX_RECORD_BYTES, Publication, check_record
from protocol.signing import MAX_PEER_ID_CHARS
from protocol.wire import decode_msgpack

T = TypeVar("T", str, bytes)

_PACKED_OVERHEAD = 5  # msgpack's longest header of a bin or str


class RecordGate(RecordValidatorBase):  # type: ignore[misc]
    """Decides which records this node stores, passes on and believes."""

    def __init__(self, run: RunId, coordinator: PeerId, *, clock: Callable[[], float]) -> None:
        self._run = run
        self._coordinator = coordinator
        self._clock = clock
        self.banned: frozenset[PeerId] = frozenset()
        """Peers whose records are refused although their admission has not run out yet."""
        self.refused: Counter[str] = Counter()
        """Refusals by error code since the start."""

    def ban(self, peers: frozenset[PeerId]) -> None:
        """Refuse the records of these peers from now on, and of nobody else for that reason."""
        self.banned = peers

    def validate(self, record: DHTRecord) -> bool:
        """Answer hivemind; the reason for a no is only counted, since whoever sent it knows it anyway."""
        try:
            self.check(record.key, record.subkey, record.value, record.expiration_time)
        except PeerFault as fault:
            self.refused[fault.code] += 1
            return False
        return True

    def check(self, key_id: bytes, packed_subkey: bytes, packed_value: bytes, expires_s: float) -> Publication:
        """Return what a record in hivemind's packing says, or raise the `PeerFault` for which it is refused."""
        if packed_subkey in DHTProtocol.RESERVED_SUBKEYS:
            raise WireError("a value without a subkey")
        subkey = _unpack(packed_subkey, str, MAX_PEER_ID_CHARS)
        return self.check_unpacked(key_id, subkey, _unpack(packed_value, bytes, MAX_RECORD_BYTES), expires_s)

    def check_unpacked(self, key_id: bytes, subkey: str, value: bytes, expires_s: float) -> Publication:
        """The same for a record as hivemind's `get` returns it and `store` takes it."""
        if subkey in self.banned:
            raise PeerFault(f"record of {subkey}, which is banned")
        return check_record(
            value,
            key=key_id,
            subkey=subkey,
            expires_s=expires_s,
            run=self._run,
            coordinator=self._coordinator,
            now_s=self._clock(),
        )

    def merge_with(self, other: RecordValidatorBase) -> bool:
        """Stay on our own: merging is how hivemind lets one validator stand in for another."""
        return False


def _unpack(packed: bytes, expected: type[T], max_bytes: int) -> T:
    if len(packed) > max_bytes + _PACKED_OVERHEAD:
        raise WireError(f"a packed {expected.__name__} of {len(packed)} bytes is over the limit of {max_bytes}")
    try:
        value = decode_msgpack(packed, raw=False, ext_hook=_refuse_extension)
    except (ValueError, TypeError, msgpack.UnpackException) as error:
        raise WireError(f"not a packed {expected.__name__}: {error}") from None
    if not isinstance(value, expected):
        raise WireError(f"a {type(value).__name__} where a {expected.__name__} belongs")
    return value


def _refuse_extension(code: int, data: bytes) -> object:
    raise WireError(f"msgpack extension type {code} in a record")
