"""The parts of a block whose activations are kept, or made again, as one. Pure.

Owns: `Segment`, and how many of them a block has. Must not know: what a segment computes (`peer/model/stage.py` cuts
layers in the same way), where activations wait.
"""

from __future__ import annotations

from typing import NamedTuple

from protocol.layout import BlockKind

ATTENTION, FEED_FORWARD = range(2)
NAMES = ("attention", "feed-forward")
"""Of a layer's segments. A norm is one segment; a table has none, because its gradient is taken by hand."""


class Segment(NamedTuple):
    """One segment of a block. Blocks are counted as the context says: within a stage, or within a span."""

    block: int
    part: int


def segments_of(block: int, kind: BlockKind) -> tuple[Segment, ...]:
    """Return a block's segments in forward order."""
    count = {BlockKind.LAYER: len(NAMES), BlockKind.NORM: 1}.get(kind, 0)
    return tuple(Segment(block, part) for part in range(count))
