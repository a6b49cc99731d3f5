"""Hostile bytes against a hardened hivemind (`protocol/transport/hardening.py`).

Nesting that crashes hivemind as shipped is tried in child processes; what only ever raises is tried here.
"""

from __future__ import annotations

import asyncio
import math
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hivemind
import msgpack
import numpy
import pytest
import torch
from hivemind.compression import deserialize_torch_tensor, serialize_torch_tensor
from hivemind.dht.node import _SearchState
from hivemind.dht.protocol import DHTProtocol
from hivemind.dht.routing import DHTID
from hivemind.dht.storage import DHTLocalStorage, DictionaryDHTValue
from hivemind.p2p import P2P
from hivemind.proto import dht_pb2, runtime_pb2
from hivemind.utils.serializer import MSGPackSerializer
from hivemind.utils.timed_storage import ValueWithExpiration
from hypothesis import given
from hypothesis import strategies as st

from protocol.errors import LocalFault, WireError
from protocol.transport import hardening
from protocol.transport.hardening import MAX_DICTIONARY_BYTES, MAX_KEYS_PER_CALL, MAX_SUBKEYS, MAX_VALUE_BYTES

TUPLE, DICTIONARY, TENSOR_DESCRIPTOR = 0x40, 0x50, 0x51
LATER = time.time() + 3600
ROOT = Path(__file__).parents[3]


@pytest.fixture(autouse=True, scope="module")
def _hardened() -> None:
    hardening.install()


def loads(data: bytes) -> Any:
    return MSGPackSerializer.loads(data)


def nested(depth: int, code: int = TUPLE) -> bytes:
    """`depth` extensions inside each other, as tuples or as dictionaries (each the subkey of the one around it)."""
    data = bytes(msgpack.packb([]))
    for _ in range(depth):
        if code == TUPLE:
            inner = b"\x91" + data
        else:
            entry = b"\x93" + data + msgpack.packb(b"v") + msgpack.packb(1.0)
            inner = b"\x93" + msgpack.packb(None) + msgpack.packb(0.0) + b"\x91" + entry
        data = bytes(msgpack.packb(msgpack.ExtType(code, inner)))
    return data


# --- what honest nodes send ---------------------------------------------------------------------------------------

PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**63) | st.floats(allow_nan=False) | st.text() | st.binary(),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.lists(inner, max_size=4).map(tuple)
        | st.dictionaries(st.text(), inner, max_size=4)
    ),
    max_leaves=8,
)


def depth_of(value: Any) -> int:
    """How many containers the innermost value is in, counted by recursion."""
    if isinstance(value, dict):
        value = list(value.values())
    return 1 + max(map(depth_of, value), default=0) if isinstance(value, (list, tuple)) else 0


@given(PLAIN)
def test_what_hivemind_packs_comes_back_as_before(value: Any) -> None:
    """Oracle: the value itself, unless it nests deeper than any honest one."""
    packed = MSGPackSerializer.dumps(value)
    if depth_of(value) <= hardening.MAX_DEPTH:
        assert loads(packed) == value
    else:
        with pytest.raises(WireError):
            loads(packed)


@pytest.mark.parametrize("wrap", [lambda inner: [inner], lambda inner: (inner,), lambda inner: {"k": inner}])
def test_the_depth_limit_is_exact(wrap: Callable[[Any], Any]) -> None:
    """Oracle: MAX_DEPTH containers come back, one more is refused."""
    value: Any = 0
    for _ in range(hardening.MAX_DEPTH):
        value = wrap(value)
    assert loads(MSGPackSerializer.dumps(value)) == value
    with pytest.raises(WireError):
        loads(MSGPackSerializer.dumps(wrap(value)))


def test_dictionaries_with_many_kinds_of_subkeys_come_back() -> None:
    """Oracle: hivemind's own packb; entries that expired on the way are kept, as hivemind does."""
    sent = DictionaryDHTValue()
    entries = {"a": LATER, b"b": LATER + 1, 3: LATER + 2, ("t", (1, 2)): LATER + 3}
    for subkey, expiry in entries.items():
        sent.store(subkey, MSGPackSerializer.dumps(subkey), expiry)
    with sent.freeze():
        sent.store("old", b"x", 1.0)
        packed = MSGPackSerializer.dumps(sent)
    received = loads(packed)
    assert isinstance(received, DictionaryDHTValue)
    with received.freeze():
        assert {key: item.expiration_time for key, item in received.items()} == entries | {"old": 1.0}
    assert received.latest_expiration_time == LATER + 3
    assert received.maxsize == math.inf


def test_the_largest_honest_dictionary_fits() -> None:
    """Oracle: MAX_SUBKEYS records of MAX_RECORD_BYTES each."""
    sent = DictionaryDHTValue()
    for number in range(MAX_SUBKEYS):
        sent.store(f"{number:052}", bytes(4096), LATER)
    assert len(loads(MSGPackSerializer.dumps(sent)).data) == MAX_SUBKEYS


# --- what hostile nodes send --------------------------------------------------------------------------------------

BOMBS = """
import sys
from tests.protocol.transport.test_hardening import nested, TUPLE, DICTIONARY
from hivemind.dht.storage import DictionaryDHTValue
from hivemind.utils.serializer import MSGPackSerializer
if "hardened" in sys.argv:
    from protocol.transport import hardening
    hardening.install()
refused = 0
for depth in (10, 50, 200, 1000, 5000, 20000):
    bombs = [nested(depth), nested(min(depth, 5000), DICTIONARY), b"\\x91" * depth + b"\\xc0"]
    bombs.append(b"\\x81\\xa1k" * depth + b"\\xc0")
    for bomb in bombs:
        for decode in (MSGPackSerializer.loads, DictionaryDHTValue.unpackb):
            try:
                decode(bomb)
            except Exception:
                refused += 1
print("refused", refused)
"""


def run_bombs(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", BOMBS, *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=90, check=False, cwd=ROOT)


@pytest.mark.slow
def test_deep_nesting_is_refused_in_every_decoder() -> None:
    """Oracle: 6 depths x 4 shapes x 2 decoders, each an exception, and the process ends by itself."""
    result = run_bombs("hardened")
    assert (result.returncode, result.stdout.strip()) == (0, "refused 48"), result.stderr[-2000:]


@pytest.mark.slow
def test_hivemind_as_shipped_dies_of_the_same_bytes() -> None:
    """Oracle: the control run; without it the test above could pass with harmless bytes."""
    assert run_bombs("as shipped").returncode == -signal.SIGSEGV


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xc1",
        b"\xdd\xff\xff\xff\xff",  # a list of 4 billion items
        b"\xc6\xff\xff\xff\xff",  # 4 GiB of bytes
        b"\xc9\xff\xff\xff\xff\x50",
        msgpack.packb(msgpack.ExtType(0x7F, b"x")),
        msgpack.packb(msgpack.ExtType(TENSOR_DESCRIPTOR, msgpack.packb({}))),
        msgpack.packb(msgpack.ExtType(TUPLE, msgpack.packb({"not": "a list"}))),
        msgpack.packb(msgpack.ExtType(DICTIONARY, msgpack.packb([]))),
        msgpack.packb(msgpack.ExtType(DICTIONARY, msgpack.packb([None, 0.0, [["k", b"v"]]]))),
        msgpack.packb(msgpack.ExtType(DICTIONARY, msgpack.packb([None, 0.0, [["k", b"v", math.nan]]]))),
        msgpack.packb(msgpack.ExtType(DICTIONARY, msgpack.packb([None, 0.0, [["k", b"v", math.inf]]]))),
        msgpack.packb(msgpack.ExtType(DICTIONARY, msgpack.packb([None, 0.0, [["k", "text", 1.0]]]))),
        msgpack.packb(msgpack.ExtType(DICTIONARY, msgpack.packb([None, 0.0, [[["list"], b"v", 1.0]]]))),
        msgpack.packb(msgpack.ExtType(DICTIONARY, msgpack.packb([None, 0.0, [["k", b"v", 1.0]] * (MAX_SUBKEYS + 1)]))),
        msgpack.packb(bytes(MAX_VALUE_BYTES)),
        msgpack.packb(msgpack.ExtType(DICTIONARY, bytes(MAX_DICTIONARY_BYTES))),
        msgpack.packb(msgpack.ExtType(TUPLE, bytes(MAX_VALUE_BYTES))),
    ],
)
def test_malformed_values_are_wire_errors(data: bytes) -> None:
    """Oracle: WireError and nothing else, before memory is taken for what a header announces."""
    with pytest.raises(WireError):
        loads(data)


@given(st.binary(max_size=200))
def test_no_bytes_crash_the_decoder(data: bytes) -> None:
    """Oracle: a value or a WireError, also behind the header of a dictionary or tuple."""
    for candidate in (
        data,
        msgpack.packb(msgpack.ExtType(TUPLE, data)),
        msgpack.packb(msgpack.ExtType(DICTIONARY, data)),
    ):
        try:
            loads(candidate)
        except WireError:
            continue


def test_a_sender_cannot_set_our_limits() -> None:
    """Oracle: maxsize 1 and a latest expiry in the far future are not taken over."""
    items = [["a", b"1", LATER], ["b", b"2", LATER + 1]]
    received = loads(msgpack.packb(msgpack.ExtType(DICTIONARY, msgpack.packb([1, 1e300, items]))))
    assert len(received.data) == 2
    assert received.latest_expiration_time == LATER + 1


# --- the DHT's storage and protocol -------------------------------------------------------------------------------


def test_an_older_store_does_not_shorten_the_life_of_a_newer_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: the record is still there between the two expiries, and refused stores leave nothing behind."""
    storage, key = DHTLocalStorage(), DHTID.generate(b"key")
    now = time.time()
    assert storage.store(key, b"new", now + 60, subkey="peer")
    for _ in range(100):
        assert not storage.store(key, b"old", now + 30, subkey="peer")
    entry = storage.get(key).value
    assert len(entry.expiration_heap) == 1
    monkeypatch.setattr("hivemind.utils.timed_storage.get_dht_time", lambda: now + 45)
    assert entry.get("peer").value == b"new"


def test_a_dictionary_stops_growing_at_what_can_be_read() -> None:
    """Oracle: MAX_SUBKEYS; present subkeys can still be renewed."""
    storage, key = DHTLocalStorage(), DHTID.generate(b"key")
    stored = [storage.store(key, b"v", LATER, subkey=str(number)) for number in range(MAX_SUBKEYS + 10)]
    assert stored.count(True) == MAX_SUBKEYS
    assert storage.store(key, b"w", LATER + 1, subkey="0")
    assert len(loads(MSGPackSerializer.dumps(storage.get(key).value)).data) == MAX_SUBKEYS


class _OnlyGood:
    """A record validator that believes values that are `good`."""

    def validate(self, record: Any) -> bool:
        return bool(record.value == b"good")


def _protocol() -> Any:
    protocol = DHTProtocol(_initialized_with_create=True)
    protocol.record_validator = _OnlyGood()
    return protocol


def test_one_bad_subkey_does_not_hide_the_good_ones() -> None:
    """Oracle: the good entry stays, the bad ones go, and so does what they said about expiry."""
    dictionary = DictionaryDHTValue()
    dictionary.store("honest", b"good", LATER)
    dictionary.store("liar", b"bad", LATER + 1000)
    assert _protocol()._validate_dictionary(b"key", dictionary)
    assert list(dictionary.data) == ["honest"]
    assert dictionary.latest_expiration_time == LATER


def test_nothing_but_bad_subkeys_is_a_refused_answer() -> None:
    """Oracle: an answer without a valid record counts as none."""
    dictionary = DictionaryDHTValue()
    dictionary.store("liar", b"bad", LATER)
    assert not _protocol()._validate_dictionary(b"key", dictionary)


async def test_a_search_does_not_stop_at_an_answer_that_claims_to_be_the_newest_for_ever() -> None:
    """Oracle: a reader that wants the latest (sufficient = infinity) goes on asking, and then sees the honest entry."""
    search = _SearchState(DHTID.generate(b"key"), math.inf, serializer=MSGPackSerializer)
    empty, liar, honest = DictionaryDHTValue(), DictionaryDHTValue(), DictionaryDHTValue()
    liar.store("liar", MSGPackSerializer.dumps("x"), LATER)
    honest.store("honest", MSGPackSerializer.dumps("y"), LATER - 1)
    for claimed in (empty, liar):
        search.add_candidate(ValueWithExpiration(claimed, math.inf), source_node_id=DHTID.generate(b"node"))
        assert not search.finished
    search.add_candidate(ValueWithExpiration(honest, LATER - 1), source_node_id=DHTID.generate(b"other"))
    search.finish_search()
    value, expiry = await search.future
    assert {subkey: item.value for subkey, item in value.items()} == {"liar": "x", "honest": "y"}
    assert expiry == LATER


@pytest.mark.parametrize(
    ("rpc", "request_class"), [("rpc_find", dht_pb2.FindRequest), ("rpc_store", dht_pb2.StoreRequest)]
)
async def test_a_call_with_too_many_keys_is_refused_before_any_work(
    rpc: str, request_class: Callable[..., Any]
) -> None:
    """Oracle: no attribute of the half-made protocol object is touched, or this would be an AttributeError."""
    keys = [number.to_bytes(20, "big") for number in range(MAX_KEYS_PER_CALL + 1)]
    with pytest.raises(WireError):
        await getattr(_protocol(), rpc)(request_class(keys=keys), None)
    if rpc == "rpc_find":
        with pytest.raises(WireError):
            await _protocol().rpc_find(dht_pb2.FindRequest(keys=[keys[0]] * 2), None)


@pytest.mark.parametrize("announced", [4 * 2**20 + 1, 2**40, 2**64 - 1])
async def test_a_stream_message_is_refused_by_its_header(announced: int) -> None:
    """Oracle: refused with only the 8 bytes of the header received; an honest message passes."""
    reader = asyncio.StreamReader()
    reader.feed_data(announced.to_bytes(8, "big"))
    with pytest.raises(WireError):
        await asyncio.wait_for(P2P.receive_raw_data(reader), 1)
    honest = asyncio.StreamReader()
    honest.feed_data((5).to_bytes(8, "big") + b"hello")
    assert await asyncio.wait_for(P2P.receive_raw_data(honest), 1) == b"hello"


# --- tensors ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.uint8, torch.int8]
)
@pytest.mark.parametrize("shape", [(), (0,), (3,), (2, 3, 4)])
def test_raw_tensors_come_back(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    """Oracle: the tensor itself."""
    tensor = torch.arange(math.prod(shape)).reshape(shape).to(dtype)
    assert torch.equal(deserialize_torch_tensor(serialize_torch_tensor(tensor)), tensor)


@pytest.mark.parametrize(
    "name", [name for name in sorted(runtime_pb2.CompressionType.DESCRIPTOR.values_by_name) if name != "NONE"]
)
def test_no_codec_is_chosen_by_a_stranger(name: str) -> None:
    """Oracle: default deny for every codec that hivemind knows, whatever the bytes."""
    message = runtime_pb2.Tensor(
        compression=runtime_pb2.CompressionType.Value(name), buffer=b"x" * 64, size=[1 << 20], dtype="float32"
    )
    with pytest.raises(WireError, match=name):
        deserialize_torch_tensor(message)


def test_sending_with_hiveminds_codecs_still_works() -> None:
    """Oracle: only decoding by the message's wish is closed."""
    message = serialize_torch_tensor(torch.ones(8), runtime_pb2.CompressionType.FLOAT16)
    assert numpy.frombuffer(message.buffer, dtype=numpy.float16).tolist() == [1.0] * 8


@pytest.mark.parametrize(
    ("size", "dtype", "num_bytes"),
    [
        ([4], "float32", 15),
        ([4], "float32", 17),
        ([4], "float32", 0),
        ([1 << 30], "float32", 16),
        ([1 << 30] * 8, "float32", 0),
        ([0] + [2**32 - 1] * 7, "float32", 0),
        ([1] * 9, "float32", 4),
        ([2], "O", 16),
        ([2], "object", 16),
        ([2], "V8", 16),
        ([0], "nonsense", 0),
        ([2], "", 16),
        ([4], "bfloat16", 12),
        ([4], "bfloat16", 9),
    ],
)
def test_a_raw_tensor_must_fit_its_bytes_exactly(size: list[int], dtype: str, num_bytes: int) -> None:
    """Oracle: product of the shape times the item size, for a list of known types."""
    message = runtime_pb2.Tensor(buffer=bytes(num_bytes), size=size, dtype=dtype)
    with pytest.raises(WireError):
        deserialize_torch_tensor(message)


def test_integers_that_want_a_gradient_are_refused() -> None:
    """Oracle: torch raises an error of its own for them."""
    message = runtime_pb2.Tensor(buffer=bytes(16), size=[2], dtype="int64", requires_grad=True)
    with pytest.raises(WireError):
        deserialize_torch_tensor(message)


# --- the fit ------------------------------------------------------------------------------------------------------


def test_another_hivemind_is_refused_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: E-LOCAL with the command that repairs it; nothing has been replaced by then."""
    monkeypatch.setattr(hardening, "_installed", False)
    monkeypatch.setattr(hivemind, "__version__", "1.2.0")
    before = MSGPackSerializer.loads
    with pytest.raises(LocalFault) as caught:
        hardening.install()
    assert "hivemind==1.1.12" in caught.value.one_line()
    assert MSGPackSerializer.loads is before


def test_installing_twice_changes_nothing() -> None:
    """Oracle: the same function objects."""
    before = (MSGPackSerializer.loads, DHTProtocol.rpc_store, DictionaryDHTValue.store)
    hardening.install()
    assert before == (MSGPackSerializer.loads, DHTProtocol.rpc_store, DictionaryDHTValue.store)
