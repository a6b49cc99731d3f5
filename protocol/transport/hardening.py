"""What hivemind 1.1.12 does with a stranger's bytes, made safe. Installed before any node is made.

Owns: bounded replacements for the places where hivemind decodes what the network sends. Must not know: our
records, our messages, our tensors. `node.py` calls `install()`; `peer/averaging/` may call it too (it is
idempotent). Every replacement keeps what honest nodes send working and refuses the rest with an exception,
which hivemind's handlers turn into an error answer.

| what a stranger could do to hivemind as shipped                                 | here                        |
|---------------------------------------------------------------------------------|-----------------------------|
| 200 nested msgpack extensions overflow the C stack: the process is gone          | depth and size limits       |
| any msgpack extension, any number of subkeys, a NaN or endless expiry            | refused                     |
| one bad subkey hides all the honest ones under the same key                      | only the bad one is dropped |
| claim that a key's newest value expires never: every search stops at the liar    | expiry taken from the items |
| re-send an old record: the newer one is forgotten when the old one expires       | an old record changes nothing |
| ask for one key a thousand times in one call                                     | limits on keys per call     |
| announce a protobuf message of 2^63 bytes on a stream and start sending          | limit before reading        |
| choose the codec of a tensor: a native kernel indexes by lengths that do not fit | only raw bytes, exact length |
"""

from __future__ import annotations

import asyncio
import inspect
import math
from collections.abc import Callable
from typing import Any

import hivemind
import hivemind.compression.serialization as hivemind_serialization
import msgpack
from hivemind.compression import CompressionBase, CompressionInfo, NoCompression
from hivemind.dht.node import _SearchState
from hivemind.dht.protocol import DHTProtocol
from hivemind.dht.storage import DictionaryDHTValue
from hivemind.dht.validation import DHTRecord
from hivemind.p2p import P2P, P2PContext
from hivemind.proto import dht_pb2, runtime_pb2
from hivemind.utils.serializer import MSGPackSerializer
from hivemind.utils.timed_storage import TimedStorage, ValueWithExpiration

from protocol.errors import LocalFault, WireError
from protocol.records import MAX_RECORD_BYTES, REPLICAS_PER_KEY
from protocol.wire import decode_msgpack

HIVEMIND_VERSION = "1.1.12"
MAX_DEPTH = 8  # a dictionary of tuples needs 4
MAX_SUBKEYS = 4 * REPLICAS_PER_KEY  # hashing spreads replicas unevenly; four times the mean never happens by chance
MAX_VALUE_BYTES = 64 * 1024  # one record is MAX_RECORD_BYTES at most
MAX_DICTIONARY_BYTES = MAX_SUBKEYS * (MAX_RECORD_BYTES + 128)  # subkey, expiry and msgpack headers take about 80
MAX_KEYS_PER_CALL = 256
MAX_STREAM_MESSAGE_BYTES = 4 * 1024 * 1024  # hivemind's own limit for unary calls; all-reduce parts take 0.5 MiB
MAX_TENSOR_AXES = 8
MAX_TENSOR_ITEMS = 2**31  # far above what a message holds; keeps torch's own size arithmetic from overflowing

_TUPLE_CODE = 0x40
_DICTIONARY_CODE = 0x50
_CONTAINERS = (list, tuple, dict)
_ITEM_BYTES: dict[str, tuple[int, ...]] = {
    "float64": (8,),
    "float32": (4,),
    "float16": (2,),
    "bfloat16": (2, 4),  # hivemind sends it as float32 unless told otherwise
    "int64": (8,),
    "int32": (4,),
    "int16": (2,),
    "int8": (1,),
    "uint8": (1,),
}

_installed = False


def install() -> None:
    """Replace hivemind's unsafe decoding in this process. Raises `LocalFault` for any other hivemind than ours."""
    global _installed
    if _installed:
        return
    _check_fit()
    MSGPackSerializer.loads = staticmethod(bounded_loads)
    MSGPackSerializer._decode_ext_types = staticmethod(_refuse_direct_use)
    DictionaryDHTValue.unpackb = staticmethod(_unpack_dictionary)
    DictionaryDHTValue.store = _capped_store(DictionaryDHTValue.store)
    TimedStorage.store = _growing_store(TimedStorage.store)
    DHTProtocol._validate_dictionary = _keep_valid_subkeys
    DHTProtocol.rpc_find, DHTProtocol.rpc_store = _limited_rpcs(DHTProtocol.rpc_find, DHTProtocol.rpc_store)
    _SearchState.add_candidate = _honest_candidates(_SearchState.add_candidate)
    P2P.receive_raw_data = staticmethod(_receive_bounded)
    _restrict_codecs()
    _installed = True


def _check_fit() -> None:
    """Refuse a hivemind that these replacements were not written for, by version and by what is replaced."""
    expected: list[tuple[Callable[..., Any], tuple[str, ...]]] = [
        (MSGPackSerializer.loads, ("buf",)),
        (MSGPackSerializer._decode_ext_types, ("type_code", "data")),
        (DictionaryDHTValue.unpackb, ("raw",)),
        (DictionaryDHTValue.store, ("self", "key", "value", "expiration_time")),
        (TimedStorage.store, ("self", "key", "value", "expiration_time")),
        (DHTProtocol._validate_dictionary, ("self", "key_bytes", "dictionary")),
        (DHTProtocol.rpc_find, ("self", "request", "context")),
        (DHTProtocol.rpc_store, ("self", "request", "context")),
        (_SearchState.add_candidate, ("self", "candidate", "source_node_id")),
        (P2P.receive_raw_data, ("reader",)),
    ]
    fits = all(tuple(inspect.signature(function).parameters) == names for function, names in expected)
    if hivemind.__version__ != HIVEMIND_VERSION or not fits:
        raise LocalFault(
            f"hivemind {hivemind.__version__} is installed, but this version of Handcar needs {HIVEMIND_VERSION}.",
            hint=f"Run: pip install 'hivemind=={HIVEMIND_VERSION}'",
        )


# --- msgpack -----------------------------------------------------------------------------------------------------


def bounded_loads(buf: bytes) -> object:
    """Decode what `MSGPackSerializer.dumps` made, or raise `WireError`; bounded in bytes, depth and extensions."""
    limit = MAX_DICTIONARY_BYTES if _looks_like_dictionary(buf) else MAX_VALUE_BYTES
    if len(buf) > limit:
        raise WireError(f"DHT value of {len(buf)} bytes is over the limit of {limit}")
    value = _decode(buf, depth=0)
    _check_depth(value)
    return value


def _decode(data: bytes, *, depth: int) -> Any:
    """Decode one level of extension nesting; each deeper one is a call from inside msgpack, hence the limit."""
    if depth > MAX_DEPTH:
        raise WireError(f"DHT value nests deeper than {MAX_DEPTH} extensions")

    def extension(code: int, inner: bytes) -> object:
        if code == _TUPLE_CODE:
            items = _decode(inner, depth=depth + 1)
            if not isinstance(items, list):
                raise WireError("a tuple extension holds no list")
            return tuple(items)
        if code == _DICTIONARY_CODE:
            return _dictionary(_decode(inner, depth=depth + 1))
        raise WireError(f"msgpack extension type {code} is not expected in the DHT")

    try:
        return decode_msgpack(data, ext_hook=extension, raw=False)
    except (ValueError, TypeError, msgpack.UnpackException) as error:
        raise WireError(f"not a DHT value: {str(error) or type(error).__name__}") from None


def _unpack_dictionary(raw: bytes) -> Any:
    """Stand in for `DictionaryDHTValue.unpackb`."""
    if len(raw) > MAX_DICTIONARY_BYTES:
        raise WireError(f"DHT dictionary of {len(raw)} bytes is over the limit of {MAX_DICTIONARY_BYTES}")
    return _dictionary(_decode(raw, depth=1))


def _dictionary(plain: object) -> Any:
    """Build hivemind's dictionary value from `[maxsize, latest expiry, [[subkey, value, expiry], ...]]`.

    The sender's size limit and latest expiry are not taken over: the first could make the receiver throw
    entries away, the second is only what the entries say anyway.
    """
    match plain:
        case [_, _, list(items)] if len(items) <= MAX_SUBKEYS:
            pass
        case _:
            raise WireError(f"not a DHT dictionary of at most {MAX_SUBKEYS} subkeys")
    dictionary = DictionaryDHTValue()
    with dictionary.freeze():  # the receiver's clock may run ahead: what is expired here is not yet an error
        for item in items:
            match item:
                case [str() | bytes() | int() | tuple() as subkey, bytes(value), float() | int() as expiry] if (
                    math.isfinite(expiry)
                ):
                    _check_depth(subkey)
                    try:  # entries that expire together are put in order by their subkeys, which may be of any types
                        dictionary.store(_hashable(subkey), value, float(expiry))
                    except TypeError:
                        raise WireError("subkeys of different types") from None
                case _:
                    raise WireError("not an entry of a DHT dictionary")
    return dictionary


def _hashable(subkey: Any) -> Any:
    try:
        hash(subkey)
    except TypeError:
        raise WireError("a subkey that cannot be one") from None
    return subkey


def _check_depth(value: object) -> None:
    """Walk containers level by level: recursion over a stranger's nesting is the crash this file is about."""
    level: list[Any] = [value] if isinstance(value, _CONTAINERS) else []
    for _ in range(MAX_DEPTH):
        if not level:
            return
        level = [child for item in level for child in _children(item) if isinstance(child, _CONTAINERS)]
    if level:
        raise WireError(f"DHT value nests deeper than {MAX_DEPTH} levels")


def _children(item: list[Any] | tuple[Any, ...] | dict[Any, Any]) -> Any:
    return item.values() if isinstance(item, dict) else item


def _looks_like_dictionary(data: bytes) -> bool:
    """Tell from the first bytes whether this is the one kind of value that may be large (an ext 8, 16 or 32)."""
    type_at = {0xC7: 2, 0xC8: 3, 0xC9: 5}.get(data[0]) if data else None
    return type_at is not None and data[type_at : type_at + 1] == bytes((_DICTIONARY_CODE,))


def _refuse_direct_use(type_code: int, data: bytes) -> object:
    raise WireError("extensions are only decoded inside bounded_loads")


# --- the DHT's storage and protocol ------------------------------------------------------------------------------


def _capped_store(shipped: Callable[..., bool]) -> Callable[..., bool]:
    def store(self: Any, key: Any, value: Any, expiration_time: float) -> bool:
        if len(self.data) >= MAX_SUBKEYS and key not in self.data:
            return False  # a dictionary that has outgrown the limit could not be read by anybody
        return shipped(self, key, value, expiration_time)

    return store


def _growing_store(shipped: Callable[..., bool]) -> Callable[..., bool]:
    """Let a store that would be rejected change nothing.

    hivemind notes the expiry of every attempt before it looks whether the attempt is newer; the entry then
    goes when the *older* expiry is reached, and each attempt leaves a heap entry behind.
    """

    def store(self: Any, key: Any, value: Any, expiration_time: float) -> bool:
        known = self.data.get(key)
        if known is not None and not expiration_time > known.expiration_time:
            return False
        return shipped(self, key, value, expiration_time)

    return store


def _keep_valid_subkeys(self: Any, key_bytes: bytes, dictionary: Any) -> bool:
    """Drop the subkeys that our validator refuses; an answer is refused only when nothing is left of it."""
    if self.record_validator is None:
        return True
    for subkey, (value, expiry) in list(dictionary.data.items()):
        record = DHTRecord(key_bytes, self.serializer.dumps(subkey), value, expiry)
        if not self.record_validator.validate(record):
            del dictionary[subkey]
    dictionary.latest_expiration_time = _latest_expiry(dictionary)
    return bool(dictionary.data)


def _honest_candidates(shipped: Callable[..., None]) -> Callable[..., None]:
    """Take the expiry of a found dictionary from its entries, never from what the answer claims."""

    def add_candidate(self: Any, candidate: Any, source_node_id: Any) -> None:
        if candidate is not None and isinstance(candidate.value, DictionaryDHTValue):
            if not candidate.value.data:
                return
            candidate = ValueWithExpiration(candidate.value, _latest_expiry(candidate.value))
        shipped(self, candidate, source_node_id)

    return add_candidate


def _latest_expiry(dictionary: Any) -> float:
    return max((item.expiration_time for item in dictionary.data.values()), default=-math.inf)


def _limited_rpcs(find: Callable[..., Any], store: Callable[..., Any]) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Bound the work that one call can ask for. The annotations are what hivemind builds its handlers from."""

    async def rpc_find(self: DHTProtocol, request: dht_pb2.FindRequest, context: P2PContext) -> dht_pb2.FindResponse:
        if len(request.keys) > MAX_KEYS_PER_CALL or len(set(request.keys)) < len(request.keys):
            raise WireError(f"a search names at most {MAX_KEYS_PER_CALL} different keys")
        return await find(self, request, context)

    async def rpc_store(self: DHTProtocol, request: dht_pb2.StoreRequest, context: P2PContext) -> dht_pb2.StoreResponse:
        if len(request.keys) > MAX_KEYS_PER_CALL:
            raise WireError(f"a store names at most {MAX_KEYS_PER_CALL} keys")
        return await store(self, request, context)

    return rpc_find, rpc_store


async def _receive_bounded(reader: asyncio.StreamReader) -> bytes:
    """Stand in for `P2P.receive_raw_data`: asyncio would buffer as much as the header announces."""
    length = int.from_bytes(await reader.readexactly(P2P.HEADER_LEN), P2P.BYTEORDER)
    if length > MAX_STREAM_MESSAGE_BYTES:
        raise WireError(f"stream message of {length} bytes is over the limit of {MAX_STREAM_MESSAGE_BYTES}")
    return await reader.readexactly(length)


# --- tensors -----------------------------------------------------------------------------------------------------


def _restrict_codecs() -> None:
    """Default deny: hivemind takes the codec from the message. Whoever knows what to expect decodes by itself."""
    table = hivemind_serialization._BASE_COMPRESSION_TYPES
    for name, codec in list(table.items()):
        table[name] = _ExactBytes() if name == "NONE" else _SendOnly(codec)


class _SendOnly(CompressionBase):  # type: ignore[misc]
    """A codec that this process may use to send but never to decode what a stranger calls by its name."""

    def __init__(self, codec: CompressionBase) -> None:
        self._codec = codec
        self.compression_type = codec.compression_type

    def compress(self, tensor: Any, info: CompressionInfo, allow_inplace: bool = False) -> runtime_pb2.Tensor:
        return self._codec.compress(tensor, info, allow_inplace)

    def extract(self, serialized_tensor: runtime_pb2.Tensor) -> Any:
        name = runtime_pb2.CompressionType.Name(self.compression_type)
        raise WireError(f"a tensor with hivemind's codec {name} is not accepted")

    def estimate_compression_ratio(self, info: CompressionInfo) -> float:
        return float(self._codec.estimate_compression_ratio(info))


class _ExactBytes(NoCompression):  # type: ignore[misc]
    """Raw tensors, accepted only when shape, type and number of bytes agree."""

    def extract(self, serialized_tensor: runtime_pb2.Tensor) -> Any:
        shape = tuple(serialized_tensor.size)
        if len(shape) > MAX_TENSOR_AXES or math.prod(max(size, 1) for size in shape) > MAX_TENSOR_ITEMS:
            raise WireError(f"a tensor of shape {shape[:MAX_TENSOR_AXES]} is not accepted")
        if serialized_tensor.requires_grad and "float" not in serialized_tensor.dtype:
            raise WireError("a tensor of integers that wants a gradient")
        num_bytes, num_items = len(serialized_tensor.buffer), math.prod(shape)
        item_bytes = _ITEM_BYTES.get(serialized_tensor.dtype, ())
        if not any(num_bytes == num_items * size for size in item_bytes):
            raise WireError(f"a {serialized_tensor.dtype[:20]!r} tensor of {num_items} items in {num_bytes} bytes")
        return super().extract(serialized_tensor)
