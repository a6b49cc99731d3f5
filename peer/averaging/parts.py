"""How shards are cut into parts, and which member sums which part. Pure.

Owns: the cut. It depends on a shard's length alone, so whoever holds the bytes of a committed update and
the stage's layout can read them, without knowing how many members there were. Must not know: tensors, peers.

Parts are dealt out in turn, shard after shard: all members work on the same shard at the same time, each
has an equal share (a peer that claims a fat link buys no say with it), and no share differs from another by
more than one part.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

PART_ELEMENTS = 131_072
"""512 KiB of fp32, hivemind's part size. A multiple of every codec's block, so only a shard's last block is short."""


@dataclass(frozen=True, slots=True)
class Part:
    """`length` elements of one shard, from `start`. `index` counts parts over all shards."""

    index: int
    shard: int
    start: int
    length: int
    reducer: int
    """Position, among the members, of the one who sums this part."""


def cut(shard_elements: Sequence[int], *, num_members: int) -> tuple[Part, ...]:
    """Cut shards of these lengths into parts, in order, and deal them out to the members."""
    spans = ((shard, start, length) for shard, n in enumerate(shard_elements) for start, length in spans_of(n))
    return tuple(Part(index, *span, reducer=index % num_members) for index, span in enumerate(spans))


def cut_for_each(shard_elements: Sequence[int], *, num_members: int) -> tuple[Part, ...]:
    """Cut the same shards once for every member, one member behind the other: each sums, or sends, all of its own."""
    parts = cut(shard_elements, num_members=1)
    return tuple(
        replace(part, index=member * len(parts) + part.index, reducer=member)
        for member in range(num_members)
        for part in parts
    )


def spans_of(num_elements: int) -> Iterator[tuple[int, int]]:
    """Yield (start, length) of each part of one shard."""
    for start in range(0, num_elements, PART_ELEMENTS):
        yield start, min(PART_ELEMENTS, num_elements - start)
