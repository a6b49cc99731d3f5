"""A store of three small units, one of them scratch, for tests of the store and its folder.

Owns: its units, and short words to open, fill and read it. Must not know: pytest.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

from peer.memory.disk.store import NvmeStore, UnitSpec
from tests.peer.memory.disk.stored_versions import LOCAL

UNITS = (UnitSpec("weights", 8192), UnitSpec("moments", 5000), UnitSpec("gradient", 300, durable=False))
WEIGHTS, MOMENTS, GRADIENT = range(3)


def open_store(folder: Path, **options: Any) -> NvmeStore:
    defaults: dict[str, Any] = {"units": UNITS, "fingerprint": "a", "volume": LOCAL}
    return NvmeStore.open(folder, **defaults | options)


def put(store: NvmeStore, unit: int, seed: int) -> None:
    store.write(unit, memoryview(data_of(unit, seed)))


def get(store: NvmeStore, unit: int) -> bytes:
    buffer = bytearray(UNITS[unit].num_bytes)
    store.read(unit, memoryview(buffer))
    return bytes(buffer)


def data_of(unit: int, seed: int) -> bytes:
    return random.Random(seed * 10 + unit).randbytes(UNITS[unit].num_bytes)


def refusing(code: int) -> Callable[..., int]:
    def refuse(*_: object) -> int:
        raise OSError(code, os.strerror(code))

    return refuse


def cut_off(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 4)
