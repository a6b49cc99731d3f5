"""Every decoder of strangers' bytes, on changed honest ones: only the project's own errors come out.

`make fuzz` does the same for longer, with each decoder in a process of its own.
"""

from __future__ import annotations

import gc
import json
import pickle
import time
import tracemalloc
from pathlib import Path
from random import Random

import msgpack
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from protocol.wire import Message, frame_header, pack, unpack, unpack_tagged
from tests.fuzz.__main__ import fuzz
from tests.fuzz.hostile import hostile
from tests.fuzz.mutations import mutate
from tests.fuzz.plausible import plausible
from tests.fuzz.targets import Target, kinds_of_messages, targets
from tests.fuzz.worker import ALLOWED, BYTES_PER_BYTE, MORE_BYTES, run

EXAMPLES = 150


def try_it(target: Target, data: bytes) -> bool:
    """Tell whether a target takes some bytes; anything but its own errors goes through."""
    try:
        target.decode(data)
    except ALLOWED:
        return False
    return True


@pytest.mark.parametrize("name", sorted(targets()))
@given(chance=st.randoms(use_true_random=False))
@settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True)
def test_changed_bytes_are_taken_or_refused_and_nothing_else(name: str, chance: Random) -> None:
    target = targets()[name]
    try_it(target, mutate(chance.choice(target.seeds), target.seeds, chance))


@pytest.mark.parametrize("name", sorted(targets()))
def test_honest_bytes_are_taken(name: str) -> None:
    """Else what is made of them would get no further than the first check. Some messages are honest by luck only."""
    target = targets()[name]
    taken = sum(try_it(target, seed) for seed in target.seeds)
    assert taken >= (0.9 if name == "messages" else 1.0) * len(target.seeds)


def nested(depth: int, *, extension: bool) -> bytes:
    """Return a value within a value, so many times."""
    data = b"\x90"
    for _ in range(depth):
        data = msgpack.packb(msgpack.ExtType(0x40, b"\x91" + data)) if extension else b"\x91" + data
    return bytes(data)


_SIZES = json.dumps({"weight": {"dtype": "F32", "shape": [1 << 47] * 50, "data_offsets": [0, 4]}}).encode()
IMPOSSIBLE = len(_SIZES).to_bytes(8, "little") + _SIZES
OLD_CRASHES = {
    "200 tuples of the DHT": nested(200, extension=True),
    "20,000 lists": nested(20_000, extension=False),
    "a list of 2^32": b"\xdd\xff\xff\xff\xff",
    "a map of 2^32": b"\xdf\xff\xff\xff\xff",
    "bytes of 2^32": b"\xc6\xff\xff\xff\xff",
    "the lowest number": msgpack.packb(-(2**63)),
    "no text": b"\xa2\xff\xfe",
    "a pickle": pickle.dumps({"a": 1}),
    "nothing": b"",
    "a frame of 4 GiB": b"\x02\xff\xff\xff\xff",
    "a frame of no kind": b"\x09\x00\x00\x00\x00",
    "a frame": frame_header(1, 10),  # type: ignore[arg-type]
    "a header of 2^63": (2**63).to_bytes(8, "little"),
    "a header of impossible sizes": IMPOSSIBLE,
    "a header of a gigabyte": (1 << 30).to_bytes(8, "little") + b"{}",
}


@pytest.mark.parametrize("name", sorted(targets()))
@pytest.mark.parametrize("case", sorted(OLD_CRASHES))
def test_what_has_crashed_decoders_before_does_not(name: str, case: str) -> None:
    try_it(targets()[name], OLD_CRASHES[case])


def test_subkeys_of_different_types_that_expire_together_are_one_clear_error() -> None:
    """Found by `make fuzz`: they were compared with each other."""
    entries = [["a", b"x", 1.0], [1, b"y", 1.0], [b"b", b"z", 1.0]]
    assert not try_it(targets()["DHT dictionary"], msgpack.packb([None, 1.0, entries]))


def test_nesting_does_not_set_the_garbage_collector_on_everything_that_lives_here() -> None:
    """Found by `make fuzz`: 200 KB of lists in lists took half a second. Oracle: the collector's count of its runs."""
    many = b"\xdc\x01\xf4" + nested(400, extension=False) * 500
    for name in ("DHT dictionary", "DHT value", "unpack"):
        before = [generation["collections"] for generation in gc.get_stats()]
        try_it(targets()[name], many)
        runs = [generation["collections"] - was for generation, was in zip(gc.get_stats(), before, strict=True)]
        assert sum(runs) <= 10, (name, runs)
    assert gc.isenabled()


MSGPACK = (
    "unpack",
    "messages",
    "signed envelope",
    "receipts",
    "DHT value",
    "DHT dictionary",
    "DHT record",
    "DHT subkey",
)


@pytest.mark.parametrize("name", MSGPACK)
@pytest.mark.parametrize("num_bytes", [8000, 65_000, 260_000])
def test_hostile_shapes_take_no_more_memory_than_was_agreed(name: str, num_bytes: int) -> None:
    """Small containers would be up to eighty times their bytes. Oracle: Python's own account of what it allocates."""
    target = targets()[name]
    for shape, data in hostile(num_bytes).items():
        tracemalloc.start()
        try:
            try_it(target, data)
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        assert peak <= BYTES_PER_BYTE * len(data) + MORE_BYTES, shape


@pytest.mark.parametrize("name", MSGPACK)
def test_hostile_shapes_are_refused_in_time(name: str) -> None:
    """Oracle: CPU time of the best of three, with twice the bar of the benchmark for a machine that is busy."""
    target = targets()[name]
    for shape, data in hostile(65_000).items():
        took = []
        for _ in range(3):
            started_s = time.thread_time()
            try_it(target, data)
            took.append(time.thread_time() - started_s)
        assert min(took) <= 0.1, shape


@pytest.mark.parametrize("is_long", [True, False])
@given(chance=st.randoms(use_true_random=False))
@settings(max_examples=EXAMPLES, deadline=None, derandomize=True)
def test_looking_through_refuses_nothing_honest(is_long: bool, chance: Random) -> None:
    """Whatever values of ours follow each other, it ends where msgpack does. Oracle: what was packed."""
    values: list[object] = [
        *(number + is_long for power in range(1, 64) for number in (1 << power, -(1 << power - 1))),
        *("x" * length for length in (0, 1, 31, 32, 255, 256, 70_000 * is_long)),
        *(b"\xdc\xc1\xd4" * length for length in (0, 1, 85, 86, 25_000 * is_long)),
        *(tuple(range(length)) for length in (0, 15, 16, 300)),
        *({f"k{number}": None for number in range(length)} for length in (0, 15, 16, 200)),
        None, True, False, 0.5, "\u00fc" * 40, {"a": ({"b": b"c" * 300},)},
    ]  # fmt: skip
    chance.shuffle(values)
    assert unpack(pack(values)) == tuple(values)


@pytest.mark.parametrize("kind", kinds_of_messages(), ids=lambda kind: kind.__name__)
def test_every_message_has_honest_fields_to_begin_with(kind: type[Message]) -> None:
    """Oracle: the decoder."""
    chance, target = Random(1), Target("one", lambda data: unpack_tagged(data, [kind]), ())
    assert any(try_it(target, pack((kind.__name__, plausible(kind, chance)))) for _ in range(12))


@pytest.mark.slow
def test_a_death_of_the_process_is_a_finding_with_its_case(tmp_path: Path) -> None:
    """A name that is no target ends it before it has begun; a real one comes to its end."""
    (finding,) = fuzz("no such decoder", seed=0, seconds=1.0)["findings"]
    assert "ends with 1" in finding["problem"]
    report = run("frame header", seed=0, seconds=0.2, folder=tmp_path)
    assert report["findings"] == []
    assert list(tmp_path.iterdir()) == []
