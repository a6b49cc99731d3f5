"""The size of a page: every buffer and every place on a disk starts at a multiple of it and is padded to one. Pure."""

from __future__ import annotations

PAGE_BYTES = 4096  # what direct I/O asks of offsets, lengths and addresses: no drive at home has larger blocks


def padded(num_bytes: int) -> int:
    """Round up to whole pages."""
    return -(-num_bytes // PAGE_BYTES) * PAGE_BYTES
