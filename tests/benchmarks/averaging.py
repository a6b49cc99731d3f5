"""Averaging rarely and in few bytes, against gradients at every step: loss, and bytes on the wire.

`averaging_loss.py` has the loss rows, `averaging_allreduce.py` how fast the all-reduce itself is. Bytes are those that
a member's streams carry upwards in one reduce of four members on loopback, counted by the reduce itself; the yardstick
is the same reduce with another codec.
"""

from __future__ import annotations

import asyncio
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from peer.averaging.reduce import Reduced
from tests.benchmarks.averaging_allreduce import allreduces
from tests.benchmarks.averaging_links import links
from tests.benchmarks.averaging_loss import losses
from tests.benchmarks.averaging_plan import plans
from tests.benchmarks.averaging_straggler import straggler
from tests.benchmarks.harness import Options, Row, figure, run
from tests.peer.averaging.reduce_members import make_group, reduce_all, start_members

MEMBERS = 4
ELEMENTS = 1 << 22
SHARDS = (ELEMENTS // 2, ELEMENTS // 2)
CODECS = {"bytes_int8": ("int8", "<= 0.27"), "bytes_int4": ("int4", "<= 0.14"), "bytes_sparse": ("sparse", "<= 0.015")}
PER_TOKEN = {  # codec, inner steps between averagings, bar
    "bytes_token_int8": ("int8", 50, f"<= {1 / 95:.4g}"),
    "bytes_token_int4": ("int4", 50, f"<= {1 / 175:.4g}"),
    "bytes_token_sparse": ("sparse", 30, f"<= {1 / 100:.4g}"),
}


def measure(options: Options) -> Iterator[Row]:
    yield from bytes_on_the_wire(options)
    yield from allreduces(options)
    yield from links(options)
    yield from plans(options)
    yield from straggler(options)
    with tempfile.TemporaryDirectory() as folder:
        yield from losses(Path(folder), options)


def bytes_on_the_wire(options: Options) -> Iterator[Row]:
    """Count what a member sends in one reduce: per parameter against fp32, and per token against fp16 at every step."""
    wanted = [row for row in (*CODECS, *PER_TOKEN) if options.wants(row)]
    if not wanted:
        return
    names = {"fp32", "fp16"} | {CODECS[row][0] if row in CODECS else PER_TOKEN[row][0] for row in wanted}
    sent = asyncio.run(_sent_bytes(sorted(names)))
    for row in wanted:
        if row in CODECS:
            name, bar = CODECS[row]
            steps, yardstick, unit, note = 1, "fp32", "bytes per parameter", f"{MEMBERS} members, up"
        else:
            name, steps, bar = PER_TOKEN[row]
            yardstick, unit = "fp16", "bytes per parameter and step"
            note = f"an averaging every {steps} inner steps against fp16 gradients at each"
        yield figure(row, sent[name] / ELEMENTS / steps, sent[yardstick] / ELEMENTS, unit=unit, bar=bar, note=note)


async def _sent_bytes(names: Sequence[str]) -> dict[str, float]:
    """Return how many bytes a member sends with each codec, in the mean over members."""
    members = await start_members(MEMBERS)
    try:
        random = torch.Generator().manual_seed(0)
        inputs = [[torch.randn(length, generator=random) for length in SHARDS] for _ in members]
        sent = {}
        for name in names:
            results = await reduce_all(members, make_group(members, name), inputs)
            done = [result for result in results if isinstance(result, Reduced)]
            assert len(done) == MEMBERS, results
            sent[name] = sum(result.bytes_sent for result in done) / MEMBERS
        return sent
    finally:
        for member in members:
            await member.reduce.stop()
            await member.p2p.shutdown()


def main(argv: Sequence[str] | None = None) -> int:
    return run("averaging: rarely and in few bytes, against gradients at every step", measure, argv)


if __name__ == "__main__":
    sys.exit(main())
