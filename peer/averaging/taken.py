"""What a maker of sums was sent, kept until the sum is committed: whether it added that up can be asked afterwards.

Owns: the encoded parts of everybody, in a file without a name. Must not know: who asks, what for
(`peer/contributions.py`). It is as long as the sum itself: of an n-th of it, n members' parts.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path

from torch import Tensor

from peer.averaging.parts import Part
from peer.averaging.spool import Spool
from peer.codecs import Buffer, Codec


class Taken:
    """Everybody's values of the parts that one member adds up."""

    def __init__(self, parts: Sequence[Part], *, num_members: int, using: Codec, folder: Path | None) -> None:
        """`parts` are those of one maker. Raises `StorageError` if there is no room for them."""
        self.parts, self.num_members, self._codec = tuple(parts), num_members, using
        sizes = (using.encoded_bytes(part.length) for part in self.parts)
        self._offsets = [0, *itertools.accumulate(sizes)]
        self._spool = Spool(num_members * self._offsets[-1], folder)

    def put(self, member: int, slot: int, data: Buffer) -> None:
        """Keep what a member has sent of a part."""
        self._spool.put(member * self._offsets[-1] + self._offsets[slot], data)

    def of(self, member: int) -> Iterator[tuple[Part, Tensor]]:
        """Yield a member's values, part by part, flat fp32."""
        base = member * self._offsets[-1]
        for part, (start, end) in zip(self.parts, itertools.pairwise(self._offsets), strict=True):
            yield part, self._codec.decode(self._spool.view[base + start : base + end], part.length)
