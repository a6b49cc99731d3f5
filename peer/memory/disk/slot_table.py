"""What one commit of the NVMe store says: where every unit's bytes lie, their checksums, and the caller's own record.

Owns: units and their places in the data file, and the table's bytes. Pure. Must not know: files, when a commit is made
(`store.py`).

The table is one line `handcar-units FORMAT SHA256` and, behind it, JSON that this hash covers. A table is believed
only if its hash fits and it is of the same durable units and the same fingerprint. Scratch lies behind these in the
data file, so that another plan may have other scratch and still find the state where it is.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from peer.memory.pages import PAGE_BYTES, padded
from protocol.errors import ConfigError, StorageError

FORMAT = 1
MAGIC = "handcar-units"
TABLE_BYTES_PER_UNIT = 25  # `[1,18446744073709551615],`
SMALL_FILES_BYTES = 1 << 20  # the caller's record, the count of writes, the lock

Json = str | int | float | bool | None | list["Json"] | dict[str, "Json"]

_FETCH_AGAIN = "Let it be replaced: the state has to be fetched again."


@dataclass(frozen=True, slots=True)
class UnitSpec:
    """One piece of training state that is read and written as a whole. A scratch unit (not durable) is in no commit."""

    name: str
    num_bytes: int
    durable: bool = True

    @property
    def num_slots(self) -> int:
        return 2 if self.durable else 1


@dataclass(frozen=True, slots=True)
class Slot:
    """Which of a unit's slots holds its bytes, and their checksum."""

    number: int
    checksum: int


@dataclass(frozen=True, slots=True)
class SlotTable:
    """One consistent version of all durable units, in their order. None: that unit was never written."""

    commit: int
    slots: tuple[Slot | None, ...]
    meta: dict[str, Json] | None


def offsets(units: Sequence[UnitSpec]) -> tuple[int, ...]:
    """Return where each unit's first slot begins in the data file; a second one follows it. The last is the end."""
    assert all(unit.num_bytes > 0 for unit in units)
    starts, end = [0] * len(units), 0
    for is_durable in (True, False):
        for index, unit in enumerate(units):
            if unit.durable is is_durable:
                starts[index] = end
                end += unit.num_slots * padded(unit.num_bytes)
    return (*starts, end)


def durable_bytes(units: Sequence[UnitSpec]) -> int:
    """Return how much of the data file's beginning is state."""
    return offsets([unit for unit in units if unit.durable])[-1]


def required_bytes(units: Sequence[UnitSpec]) -> int:
    """Return the disk space that a store of these units takes. Pure, for the planner."""
    tables_bytes = 2 * len(units) * TABLE_BYTES_PER_UNIT  # the next one is written before the last one goes
    return offsets(units)[-1] + padded(tables_bytes) + SMALL_FILES_BYTES


def layout_digest(units: Sequence[UnitSpec]) -> str:
    """Return a hash over everything that decides where the durable units lie."""
    described = [PAGE_BYTES, [[unit.name, unit.num_bytes] for unit in units if unit.durable]]
    return hashlib.sha256(json.dumps(described).encode()).hexdigest()


def encode(table: SlotTable, *, layout: str, fingerprint: str) -> bytes:
    """Write a table. A record that is no JSON (NaN included) is the caller's bug: `TypeError` or `ValueError`."""
    body = json.dumps(
        {
            "layout": layout,
            "fingerprint": fingerprint,
            "commit": table.commit,
            "slots": [slot and [slot.number, slot.checksum] for slot in table.slots],
            "meta": table.meta,
        },
        separators=(",", ":"),
        allow_nan=False,
    ).encode()
    return f"{MAGIC} {FORMAT} {hashlib.sha256(body).hexdigest()}\n".encode() + body


def decode(data: bytes, *, layout: str, fingerprint: str, where: str) -> SlotTable:
    """Read a table of these units. Raises `StorageError` if it is damaged or newer, `ConfigError` if of another store.

    `where` names the file in messages.
    """
    heading, _, body = data.partition(b"\n")
    match heading.decode("ascii", errors="replace").split(" "):
        case [name, number, digest] if name == MAGIC and number.isdecimal():
            pass
        case _:
            raise StorageError(f"{where} is damaged: it does not begin as it should.", hint=_FETCH_AGAIN)
    if int(number) != FORMAT:
        raise StorageError(
            f"{where} has format {number}, this version of Handcar reads {FORMAT}.",
            hint="Use the newer version, or let it be replaced.",
        )
    if hashlib.sha256(body).hexdigest() != digest:
        raise StorageError(f"{where} is damaged: its SHA-256 does not fit.", hint=_FETCH_AGAIN)
    fields = json.loads(body)
    if fields["fingerprint"] != fingerprint:
        raise _other_store(where, "of another run or model")
    if fields["layout"] != layout:
        raise _other_store(where, "cut into other units")
    slots = tuple(None if slot is None else Slot(*slot) for slot in fields["slots"])
    return SlotTable(fields["commit"], slots, fields["meta"])


def as_record(meta: Mapping[str, Json]) -> dict[str, Json]:
    """Return a record as it will be read back, so that it is the same before and after a restart."""
    record: dict[str, Json] = json.loads(json.dumps(meta, allow_nan=False))
    return record


def _other_store(where: str, difference: str) -> ConfigError:
    return ConfigError(
        f"{where} belongs to training state {difference}.",
        hint="Give this one a folder of its own, or let the old state be replaced.",
    )
