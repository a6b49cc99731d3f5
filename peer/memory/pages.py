"""How bytes are laid out in buffers and on a disk: in whole pages, and in a page one thing behind the other. Pure."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import accumulate

PAGE_BYTES = 4096  # what direct I/O asks of offsets, lengths and addresses: no drive at home has larger blocks
ALIGNMENT_BYTES = 64  # of things that share a buffer: a cache line, and more than any type of number asks for


def padded(num_bytes: int) -> int:
    """Round up to whole pages."""
    return _rounded(num_bytes, PAGE_BYTES)


def packed(sizes: Iterable[int]) -> list[range]:
    """Return where things of these sizes lie in a buffer that they share, one behind the other."""
    listed = list(sizes)
    starts = accumulate((_rounded(size, ALIGNMENT_BYTES) for size in listed), initial=0)
    return [range(start, start + size) for start, size in zip(starts, listed, strict=False)]


def _rounded(num_bytes: int, unit_bytes: int) -> int:
    return -(-num_bytes // unit_bytes) * unit_bytes
