"""What `peer bench burn-in` prints.

Owns: the words and the shape of `peer.burn-in/1`. Must not know: how a device is tried out.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from protocol.console import LossyStream
from protocol.sizes import size_text

if TYPE_CHECKING:
    from peer.engine.burn_in import BurnIn

EVERY_S = 10.0


def told() -> Callable[[int, int], None]:
    """Return what tells on stderr, now and then, how far it is."""
    out, told_s = LossyStream(sys.stderr), time.monotonic()

    def tell(passes: int, wrong: int) -> None:
        nonlocal told_s
        if time.monotonic() - told_s >= EVERY_S:
            told_s = time.monotonic()
            out.write(f"{passes:,} passes, {wrong:,} wrong\n")
            out.flush()

    return tell


def describe(found: BurnIn) -> str:
    """Return the outcome in a few lines."""
    rate = found.passes / found.seconds
    lines = [
        f"{found.device}: {found.passes:,} passes in {found.seconds:.0f} s ({rate:.1f} a second), "
        f"{found.wrong_passes:,} of them wrong",
        f"memory: {size_text(found.memory_bytes)} written and read back, {found.wrong_words:,} words wrong",
        f"largest deviation from the first pass: {found.worst:.1e} of the usual value",
    ]
    if found.device != "cpu":
        lines.append(f"distance from what the CPU computes: {found.from_cpu:.1e}")
    lines.append("sound" if found.is_sound else "NOT SOUND")
    return "\n".join(lines)


def to_json(found: BurnIn) -> dict[str, Any]:
    """Return the outcome as `peer.burn-in/1`. What is not finite is null."""
    fields = {name: value if value != float("inf") else None for name, value in asdict(found).items()}
    return fields | {"sound": found.is_sound}
