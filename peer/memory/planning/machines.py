"""Machines that nobody here has, for plans in advance and for tests: a card, its slot, and perhaps a drive. Pure.

Owns: their names and data sheets. Must not know: models, plans.

The numbers are of data sheets and of published measurements, and none of them was measured here. Weights are fp32, so
a card computes at its fp32 rate, of which training reaches about 60 %.
"""

from __future__ import annotations

from dataclasses import dataclass

from peer.memory.planning.profile import Machine
from protocol.errors import ConfigError

GIB = 1 << 30


@dataclass(frozen=True, slots=True)
class _Card:
    memory_bytes: int
    flop_per_s: float
    memory_bytes_per_s: float


CARDS = {
    "24gb": _Card(24 * GIB, 50e12, 1008e9),  # RTX 4090: 82.6 TFLOP/s
    "12gb": _Card(12 * GIB, 7.6e12, 360e9),  # RTX 3060: 12.7 TFLOP/s
    "8gb": _Card(8 * GIB, 9e12, 272e9),  # RTX 4060: 15.1 TFLOP/s
}

LINKS = {"pcie4x16": 22e9, "pcie3x16": 11e9, "pcie4x4": 5.5e9}
"""Bytes per second, each way, from pinned memory; x4 is an eGPU or a second slot."""

DRIVES = {"good": (5e9, 1.5e9), "poor": (2e9, 0.5e9), "none": None}
"""Read and write, once the fast cache is full: a TLC drive such as a 980 Pro, and a cheap one."""

HOST_BYTES = 16 * GIB
DRIVE_BYTES = 500 * 10**9
"""What is taken to be free in host memory, and on a drive if one is named."""

_RESERVED_BYTES = GIB  # context, kernels and what the allocator cannot use
_HINT = "Put a card, a slot and a drive together: " + ", ".join("/".join(names) for names in (CARDS, LINKS, DRIVES))


def machine(name: str) -> tuple[Machine, int]:
    """Return a machine named CARD-SLOT[-DRIVE], such as `12gb-pcie3x16-poor`, and its free device memory."""
    parts = name.lower().split("-")
    if len(parts) == 2:
        parts.append("none")
    if len(parts) != 3 or parts[0] not in CARDS or parts[1] not in LINKS or parts[2] not in DRIVES:
        raise ConfigError(f"there is no machine '{name[:40]}'.", hint=f"{_HINT}.")
    card, link, drive = CARDS[parts[0]], LINKS[parts[1]], DRIVES[parts[2]]
    found = Machine(
        name="-".join(parts),
        flop_per_s=card.flop_per_s,
        device_memory_bytes_per_s=card.memory_bytes_per_s,
        link_bytes_per_s=link,
        nvme_read_bytes_per_s=drive[0] if drive else None,
        nvme_write_bytes_per_s=drive[1] if drive else None,
    )
    return found, card.memory_bytes - _RESERVED_BYTES
