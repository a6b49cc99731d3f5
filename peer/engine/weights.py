"""Weights of versions that have passed, for recomputing what was done with them.

Owns: copies of a stage's shared weights in host memory, as many as there is room for. Must not know: audits, rounds.
Called from the compute thread only.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence

from torch import Tensor

from protocol.ids import StageId, Version

FLOAT_BYTES = 4
MAX_VERSIONS = 64  # of a stage: an audit may take half a minute, and small stages have rounds of half a second


class PastWeights:
    """Flat fp32 buffers, one for each block of a stage, by stage and version."""

    def __init__(self, *, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._kept: OrderedDict[tuple[StageId, Version], Sequence[Tensor]] = OrderedDict()
        self._num_bytes = 0

    def keep(
        self, stage: StageId, version: Version, *, num_elements: int, copy: Callable[[], Sequence[Tensor]]
    ) -> None:
        """Copy a stage's weights before they change, if there is room for them at all; the oldest make place."""
        size = num_elements * FLOAT_BYTES
        if (stage, version) in self._kept:
            self._drop((stage, version))  # of a lineage that did not go on
        if size > self._max_bytes:
            return
        of_stage = [key for key in self._kept if key[0] == stage]
        for key in of_stage[: max(0, len(of_stage) + 1 - MAX_VERSIONS)]:
            self._drop(key)
        while self._num_bytes + size > self._max_bytes:
            self._drop(next(iter(self._kept)))
        self._kept[stage, version] = copy()
        self._num_bytes += size

    def find(self, stage: StageId, version: Version) -> Sequence[Tensor] | None:
        """Return a version's weights, if they are still here."""
        return self._kept.get((stage, version))

    def forget(self, stage: StageId) -> None:
        """Drop all versions of a stage: they are of a lineage that did not go on, or may be wrong."""
        for key in [key for key in self._kept if key[0] == stage]:
            self._drop(key)

    def _drop(self, key: tuple[StageId, Version]) -> None:
        self._num_bytes -= sum(len(block) * FLOAT_BYTES for block in self._kept.pop(key))
