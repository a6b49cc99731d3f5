"""Sketches of what members give into an average, by who adds it up.

Owns: going through shards part by part. Must not know: what the sketches are for (`peer/contributions.py`). Runs in the
compute thread.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor

from peer.averaging.parts import spans_of
from peer.averaging.reduce import contribution
from peer.averaging.taken import Taken
from peer.codecs import Codec
from protocol.sketch import ShardSketch


def sketch_by_maker(
    shards: Iterable[Tensor], seed: bytes, *, num_members: int, using: Codec | None = None
) -> tuple[bytes, ...]:
    """Sketch shards by who adds up which parts of them, as they are or as they come out of a codec.

    Together that is the sketch of all (`protocol.sketch.summed`).
    """
    makers = [ShardSketch(seed) for _ in range(num_members)]
    index = 0
    for number, values in enumerate(shards):
        for start, length in spans_of(len(values)):
            part = values[start : start + length]
            part = part if using is None else contribution(part, using=using)
            makers[index % num_members].add(number, part.numpy(), start=start)
            index += 1
    return tuple(each.packed() for each in makers)


def sketch_taken(taken: Taken, seed: bytes) -> tuple[bytes, ...]:
    """Sketch what each member has given into the share of one."""
    found = []
    for member in range(taken.num_members):
        each = ShardSketch(seed)
        for part, values in taken.of(member):
            each.add(part.shard, values.numpy(), start=part.start)
        found.append(each.packed())
    return tuple(found)
