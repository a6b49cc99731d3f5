"""A commit's table comes back as it was or is refused; sizes add up.

Oracles: the table that was written; sums by hand.
"""

from __future__ import annotations

import pytest

from peer.memory.disk.slot_table import (
    TABLE_BYTES_PER_UNIT,
    Slot,
    SlotTable,
    UnitSpec,
    as_record,
    decode,
    encode,
    layout_digest,
    offsets,
    required_bytes,
)
from protocol.errors import StorageError

UNITS = (UnitSpec("a", 1), UnitSpec("b", 4097), UnitSpec("c", 4096, durable=False))
LAYOUT = layout_digest(UNITS)
TABLE = SlotTable(
    commit=7, slots=(Slot(0, 4_000_000_000), Slot(1, 0), None), meta={"step": 7, "seed": [1.5, None, "é"]}
)


def decoded(data: bytes) -> SlotTable:
    return decode(data, layout=LAYOUT, fingerprint="f", where="the table")


def test_a_table_comes_back() -> None:
    assert decoded(encode(TABLE, layout=LAYOUT, fingerprint="f")) == TABLE
    empty = SlotTable(commit=0, slots=(None, None, None), meta=None)
    assert decoded(encode(empty, layout=LAYOUT, fingerprint="f")) == empty


def test_no_damaged_table_is_believed() -> None:
    """Cut off anywhere, and with a bit flipped in every byte."""
    whole = encode(TABLE, layout=LAYOUT, fingerprint="f")
    damaged = [whole[:length] for length in range(len(whole))]
    damaged += [whole[:at] + bytes([whole[at] ^ 1 << at % 8]) + whole[at + 1 :] for at in range(len(whole))]
    damaged += [b"", b"\xff" * 100, whole + b" "]
    for data in damaged:
        with pytest.raises(StorageError, match=r"the table (is damaged|has format)"):
            decoded(data)


def test_every_property_of_a_durable_unit_is_part_of_the_layout() -> None:
    others = [UnitSpec("b", 1), UnitSpec("a", 2), UnitSpec("a", 1, durable=False)]
    assert len({layout_digest([unit]) for unit in [UNITS[0], *others]} | {LAYOUT}) == 5
    assert layout_digest([UNITS[2], *UNITS[:2], UnitSpec("d", 9, durable=False)]) == LAYOUT


def test_slots_lie_one_behind_the_other_in_whole_blocks() -> None:
    assert offsets(UNITS) == (0, 2 * 4096, 6 * 4096, 7 * 4096)
    assert offsets([UNITS[2], *UNITS[:2]]) == (6 * 4096, 0, 2 * 4096, 7 * 4096)  # scratch behind the state
    assert required_bytes(UNITS) == 7 * 4096 + 4096 + 2**20


def test_a_tables_size_is_not_underrated() -> None:
    slots = tuple(Slot(1, 2**32 - 1) for _ in range(1000))
    extra = len(encode(SlotTable(1, slots, None), layout="", fingerprint=""))
    assert extra - len(encode(SlotTable(1, (), None), layout="", fingerprint="")) <= 1000 * TABLE_BYTES_PER_UNIT


@pytest.mark.parametrize("meta", [{"x": float("nan")}, {"x": b"bytes"}])
def test_a_record_that_json_cannot_hold_is_a_bug(meta: dict[str, object]) -> None:
    with pytest.raises((TypeError, ValueError)):
        as_record(meta)  # type: ignore[arg-type]
