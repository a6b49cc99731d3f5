"""What hostile bytes cost, and what attacks come to: decoders, floods of a coordinator, and peers that cheat.

`python -m tests.benchmarks.trust`. `decode_ms`: CPU time for 64 KiB of honest bytes, the slowest decoder;
`decode_ms_hostile`: of bytes that are made to be expensive.
The rows of floods are in `trust_floods.py`; `attack_*` and `clean_*`: see `trust_attacks.py`; `--calibrate`:
`trust_calibrate.py`; what honest peers pay: `trust_price.py`.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from functools import partial
from statistics import median

import torch
from hivemind.dht.storage import DictionaryDHTValue

from peer.codecs import codec, codec_names
from protocol.access import Revocations
from protocol.control import BeatReply
from protocol.errors import WireError
from protocol.ids import PeerId, RunId, StageId
from protocol.tensors import format_header
from protocol.transport.hardening import MAX_SUBKEYS
from protocol.wire import pack_tagged
from tests.benchmarks import trust_attacks, trust_calibrate, trust_price
from tests.benchmarks.harness import Options, Row, figure, run
from tests.benchmarks.trust_floods import FLOODS, flood_rows
from tests.benchmarks.trust_floods import ROWS as FLOOD_ROWS
from tests.fuzz.hostile import hostile
from tests.fuzz.targets import targets

DECODE_BYTES = 64 * 1024


def measure(options: Options) -> Iterator[Row]:
    if options.wants("decode_ms", "decode_ms_hostile"):
        yield _slowest_decoder(repeats=options.repeats_or(quick=20, full=200))
        yield _slowest_on_hostile(repeats=options.repeats_or(quick=3, full=15))
    if options.wants(*FLOOD_ROWS):
        yield from flood_rows(seconds=4.0 if options.quick else 10.0, floods=FLOODS)
    if options.wants(*trust_price.ROWS):
        yield from trust_price.rows(options)
    yield from trust_attacks.rows(options)


# -- decoders -------------------------------------------------------------------------------------------


def _slowest_decoder(*, repeats: int) -> Row:
    took = {name: _decode_ms(*case, repeats=repeats) for name, case in _large_cases().items()}
    worst = max(took, key=lambda name: took[name])
    note = ", ".join(f"{name} {ms:.2f}" for name, ms in sorted(took.items(), key=lambda each: -each[1]))
    return figure("decode_ms", took[worst], unit="ms", bar="<= 50", note=f"{note}; median of honest 64 KiB, CPU time")


def _slowest_on_hostile(*, repeats: int) -> Row:
    """Measure the shapes that are made to be expensive: most are refused, and that is what takes the time."""
    known, took = targets(), dict[str, float]()
    for name in ("messages", "DHT value", "DHT dictionary"):
        for shape, case in hostile(DECODE_BYTES - 64).items():
            took[f"{name}, {shape}"] = _decode_ms(partial(_taken_or_refused, known[name].decode), case, repeats=repeats)
    slow = sorted(took, key=lambda each: -took[each])
    note = "; ".join(f"{each} {took[each]:.2f}" for each in slow[:4])
    return figure("decode_ms_hostile", took[slow[0]], unit="ms", bar="<= 50", note=f"{note}; of {len(took)}, CPU time")


def _taken_or_refused(decode: Callable[[bytes], object], case: bytes) -> None:
    with suppress(WireError):
        decode(case)


def _large_cases() -> dict[str, tuple[Callable[[bytes], object], bytes]]:
    """Return decoders with 64 KiB that they take: nothing is refused early."""
    known, peer = targets(), PeerId("1" * 52)
    revocations = Revocations(run=RunId("ab" * 16), number=1, issued_s=1.0, peers=(peer,) * 1200)
    members = tuple((StageId(number % 8), peer, ("/ip4/192.0.2.1/tcp/4001",)) for number in range(700))
    reply = BeatReply(acknowledged=1, stages=(StageId(0),), charters=(), members=members)
    dictionary = DictionaryDHTValue()
    for number in range(MAX_SUBKEYS):
        dictionary.store(f"{number:052}", bytes(DECODE_BYTES // MAX_SUBKEYS), 1e10)
    cases: dict[str, tuple[Callable[[bytes], object], bytes]] = {
        "revocations": (known["messages"].decode, pack_tagged(revocations)),
        "reply to a beat": (known["messages"].decode, pack_tagged(reply)),
        "DHT dictionary": (known["DHT dictionary"].decode, dictionary.packb()),
        "tensor header": (known["tensor header"].decode, _header()),
    }
    for name in codec_names():
        made, num = codec(name), 1024
        while made.encoded_bytes(2 * num) <= DECODE_BYTES:
            num *= 2
        cases[f"codec {name}"] = partial(made.decode, num_elements=num), made.encode(torch.randn(num))
    return cases


def _header() -> bytes:
    """Return a header of many tensors, the last of which leave the 90 bytes that the target's file has behind it."""
    tensors = {f"model.layers.{number}.weight": ("U8", (0,)) for number in range(900)}
    return format_header({**tensors, "last": ("U8", (90,))})


def _decode_ms(decode: Callable[[bytes], object], case: bytes, *, repeats: int) -> float:
    took = []
    for _ in range(repeats):
        started_s = time.thread_time()
        decode(case)
        took.append(time.thread_time() - started_s)
    return 1000 * median(took) * DECODE_BYTES / len(case)


def main(argv: Sequence[str] | None = None) -> int:
    if "--calibrate" in (sys.argv[1:] if argv is None else argv):
        print(trust_calibrate.table())
        return 0
    return run("trust: what hostile bytes and attacks cost", measure, argv)


if __name__ == "__main__":
    sys.exit(main())
