"""Which part of a stage is averaged when: the stage's blocks, dealt out to fragments that take turns.

Owns: the cut into fragments, and whose turn it is. Pure, and the same for everybody who knows the stage's layout. Must
not know: what an average is made of, how it travels.

With F fragments a round averages an F-th of what has been learnt, so a link that would be busy for a while after every
F-th round is busy a little in each of them (Streaming DiLoCo, arXiv 2501.18512: strided fragments). What a fragment
contributes is its drift of F rounds. Turns go by the version of the stage, which all replicas agree on, and not by the
round: a round that came to nothing takes no turn.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate

from protocol.ids import RoundId, Version
from protocol.layout import BlockLayout


class Fragments:
    """The fragments of one stage."""

    def __init__(self, blocks: Sequence[BlockLayout], num_fragments: int, *, last_round: RoundId | None) -> None:
        """Deal `blocks` out, the largest first, each to the fragment that has least: layers alike go in turn.

        What comes after `last_round`, the last one that trains, is evaluated and exported: its average has all shards.
        None: there is no such round.
        """
        self._last_round = last_round
        lengths = [len(block.shards()) for block in blocks]
        starts = accumulate(lengths, initial=0)
        shards = [range(start, start + length) for start, length in zip(starts, lengths, strict=False)]
        weights = [block.num_elements for block in blocks]
        parts: list[list[int]] = [[] for _ in range(max(1, min(num_fragments, len(blocks))))]
        loads = [0] * len(parts)
        for number in sorted(range(len(blocks)), key=lambda number: -weights[number]):
            lightest = loads.index(min(loads))
            loads[lightest] += weights[number]
            parts[lightest] += shards[number]
        self._parts = tuple(tuple(sorted(part)) for part in parts)
        self._all = tuple(range(sum(lengths)))

    def __len__(self) -> int:
        return len(self._parts)

    def __iter__(self) -> Iterator[tuple[int, ...]]:
        return iter(self._parts)

    def due(self, version: Version, round_id: RoundId) -> tuple[int, ...]:
        """Return the shards that are averaged after a round, by the commit that makes `version`, in ascending order."""
        if self._last_round is not None and round_id >= self._last_round:
            return self._all
        return self._parts[version % len(self._parts)]
