"""Which graphs are kept. (What one costs: tests/peer/model/test_blocks.py.)"""

from __future__ import annotations

from peer.engine.retention import Retention


def test_measured_kinds_are_booked_against_the_budget() -> None:
    """Oracle: 250 bytes hold two graphs of 100; another kind is tried while anything is left."""
    retention = Retention(250)
    assert [retention.keep((1, 2), 100) for _ in range(3)] == [True, True, False]
    assert retention.kept_bytes == 200
    assert not retention.may_keep((1, 2))
    assert retention.may_keep((9, 9))
    retention.release(100)
    assert retention.may_keep((1, 2))
    assert not Retention(0).may_keep((1, 2))
