"""How numbers of bytes are read from people and written for them. Pure.

Owns: units and their spelling, the same in every command. Must not know: what a size is for.
"""

from __future__ import annotations

import re

from protocol.errors import ConfigError

_UNITS = {"": 1 << 10, "i": 1 << 10, "b": 1000, "ib": 1 << 10}
_EXAMPLE = "Write it like 6GiB, 8GB or 512MiB."
_LIMIT_BYTES = 1 << 60  # more than any machine has


def parse_size(text: str, *, what: str = "a size") -> int:
    """Read a number of bytes with its unit: KB, MB, GB, TB are decimal; KiB, MiB, GiB, TiB and K, M, G, T binary.

    Raises `ConfigError` for anything else, naming `what` it was for; a bare number is taken only for 0.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(?:([kmgt])(i?b?)|(b))?", text.strip().lower(), re.ASCII)
    if match is None:
        raise ConfigError(f"{what}: '{text[:40]}' is no size.", hint=_EXAMPLE)
    number, prefix, rest, is_bytes = float(match[1]), match[2], match[3], match[4]
    if prefix is None and not is_bytes and number:
        raise ConfigError(f"{what}: '{text[:40]}' has no unit.", hint=_EXAMPLE)
    num_bytes = number if prefix is None else number * _UNITS[rest] ** ("kmgt".index(prefix) + 1)
    if num_bytes >= _LIMIT_BYTES:
        raise ConfigError(f"{what}: '{text[:40]}' is more than any machine has.", hint=_EXAMPLE)
    return int(num_bytes)


def size_text(num_bytes: float) -> str:
    """Write a number of bytes for people, in the units of memory."""
    for unit in ("B", "KiB", "MiB"):
        if abs(num_bytes) < 1 << 10:
            return f"{num_bytes:.0f} {unit}" if unit == "B" else f"{num_bytes:.1f} {unit}"
        num_bytes /= 1 << 10
    return f"{num_bytes:,.1f} GiB"
