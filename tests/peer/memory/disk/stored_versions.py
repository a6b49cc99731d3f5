"""State whose every byte follows from a version's number, and a process that commits one version after the other.

Owns: the yardstick of the store's crash tests. A version rewrites some units only, so a store that mixes two versions,
or loses track of where an untouched unit lies, shows it. Started as
`python -m tests.peer.memory.disk.stored_versions DIR`.
"""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path

from peer.memory.disk.store import NvmeStore, UnitSpec
from peer.memory.disk.volume import Volume

LOCAL = Volume(file_system="ext4", source="/dev/nvme0n1", is_rotational=False)  # whatever the tests' folder lies on
FINGERPRINT = "run and model"
SIZES = (4096, 5000, 1, 12288)
UNITS = (*(UnitSpec(f"state {number}", size) for number, size in enumerate(SIZES)), UnitSpec("scratch", 100, False))
DURABLE = range(len(SIZES))
SCRATCH = len(SIZES)


def content(unit: int, version: int, *, factor: int = 1) -> bytes:
    """Return the bytes of a unit as of a version; `factor` makes units larger."""
    num_bytes = UNITS[unit].num_bytes * factor
    seed = hashlib.sha256(f"{unit} {written_in(unit, version)}".encode()).digest()
    return (seed * (num_bytes // len(seed) + 1))[:num_bytes]


def written_in(unit: int, version: int) -> int:
    """Return the latest version up to this one that writes a unit: each skips some, all begin with 1."""
    return max(number for number in range(1, version + 1) if number == 1 or (number + unit) % 3)


def versions_held(store: NvmeStore, *, factor: int = 1) -> int:
    """Return the committed version after checking all bytes of all units against it; 0 before the first."""
    if store.committed is None:
        return 0
    version = store.committed["version"]
    assert isinstance(version, int)
    for unit in DURABLE:
        buffer = bytearray(UNITS[unit].num_bytes * factor)
        store.read(unit, memoryview(buffer))
        assert buffer == content(unit, version, factor=factor), (unit, version)
    return version


def write_version(store: NvmeStore, version: int, *, factor: int = 1) -> None:
    """Write what a version changes, something else first: only the last write of a unit counts."""
    for unit in DURABLE:
        if written_in(unit, version) == version:
            store.write(unit, memoryview(bytes(UNITS[unit].num_bytes * factor)))
            store.write(unit, memoryview(content(unit, version, factor=factor)))


def open_store(folder: Path, *, factor: int = 1, may_be_direct: bool = True) -> NvmeStore:
    units = [UnitSpec(unit.name, unit.num_bytes * factor, unit.durable) for unit in UNITS]
    return NvmeStore.open(folder, units, fingerprint=FINGERPRINT, volume=LOCAL, may_be_direct=may_be_direct)


KILLED_FACTOR = 50  # about 1 MB per version: a kill meets transfers, syncs and renames alike


def main() -> None:
    with open_store(Path(sys.argv[1]), factor=KILLED_FACTOR) as store:
        version = versions_held(store, factor=KILLED_FACTOR)
        print(version, flush=True)
        while True:
            version += 1
            write_version(store, version, factor=KILLED_FACTOR)
            store.commit({"version": version})
            print(version, flush=True)


if __name__ == "__main__":
    main()
