"""Who has found whose work right. Oracle: by hand."""

from __future__ import annotations

import pytest

from coordinator.audit import vouchers
from coordinator.audit.vouchers import Vouchers
from coordinator.carries import Carry
from protocol.ids import PeerId
from tests.coordinator.audit.people import carry

A, B = PeerId("a"), PeerId("b")


def work(number: int, peer: PeerId = A) -> Carry:
    return carry(peer, PeerId("up"), PeerId("down"), number)


def test_everybody_who_found_a_microbatch_right_is_remembered() -> None:
    known = Vouchers()
    known.note(work(1), A)
    known.note(work(1), B)
    known.note(work(2), B)
    assert (known.of(work(1)), known.of(work(2)), known.of(work(3))) == ({A, B}, {B}, set())


def test_of_every_auditor_something_is_looked_at_again_before_the_rest() -> None:
    known = Vouchers()
    for number in range(5):
        known.note(work(number), B if number else A)
    known.note(work(9, B), A)
    assert [each.number for each in known.newest(A, 3)] == [4, 0, 3]
    assert [each.number for each in known.newest(B, 3)] == [9]


def test_the_oldest_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vouchers, "MAX_WORKS", 2)
    known = Vouchers()
    for number in range(3):
        known.note(work(number), A)
    assert [bool(known.of(work(number))) for number in range(3)] == [False, True, True]
