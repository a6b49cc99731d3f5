"""Who may come in. Oracle: passes and lists that are signed by hand, on a clock that stands still."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from protocol.access import (
    ALL_STRANGERS_BURST,
    ALL_STRANGERS_RATE,
    GUEST_BURST,
    GUEST_RATE,
    MAX_REVOKED,
    MAX_STRANGERS,
    STRANGER_BURST,
    STRANGER_RATE,
    Door,
    revoke,
)
from protocol.errors import PeerFault, RefusedError, WireError
from protocol.ids import PeerId, RunId
from protocol.records import admit
from protocol.signing import Signed, SigningKey
from protocol.wire import MAX_MESSAGE_BYTES

RUN = RunId("ab" * 16)
COORDINATOR, STRANGER = SigningKey.generate(), SigningKey.generate()
ANNE, BERT = (SigningKey.generate().peer_id for _ in range(2))
NOW_S = 1_700_000_000


@dataclass
class Time:
    passed_s: float = 0.0

    def unix(self) -> float:
        return NOW_S + self.passed_s

    def monotonic(self) -> float:
        return self.passed_s


@pytest.fixture
def time() -> Time:
    return Time()


@pytest.fixture
def door(time: Time) -> Door:
    return Door(RUN, COORDINATOR.peer_id, clock=time.unix, monotonic=time.monotonic)


def pass_of(peer: PeerId, *, key: SigningKey = COORDINATOR, run: RunId = RUN, issued_s: int = NOW_S) -> Signed:
    return admit(key, run=run, peer=peer, name="somebody", issued_s=issued_s, valid_hours=1.0)


def banning(number: int, *peers: PeerId, key: SigningKey = COORDINATOR, run: RunId = RUN) -> Signed:
    return revoke(key, run=run, number=number, issued_s=float(NOW_S), peers=peers)


def test_a_pass_lets_its_owner_in_until_it_runs_out(door: Door, time: Time) -> None:
    assert not door.is_admitted(ANNE)
    door.show(ANNE, pass_of(ANNE))
    assert door.is_admitted(ANNE)
    assert not door.is_admitted(BERT)
    time.passed_s = 3600.0 + 60.0
    assert not door.is_admitted(ANNE)
    door.show(ANNE, pass_of(ANNE, issued_s=NOW_S + 3600))
    assert door.is_admitted(ANNE)


@pytest.mark.parametrize(
    "shown",
    [
        pass_of(BERT),
        pass_of(ANNE, key=STRANGER),
        pass_of(ANNE, run=RunId("cd" * 16)),
        pass_of(ANNE, issued_s=NOW_S - 7200),
        pass_of(ANNE, issued_s=NOW_S + 7200),
        Signed(payload=b"junk", signer=COORDINATOR.peer_id, signature=bytes(64)),
    ],
    ids=["another's", "forged", "another run", "run out", "not yet", "junk"],
)
def test_any_other_pass_lets_nobody_in(door: Door, shown: Signed) -> None:
    with pytest.raises(PeerFault):
        door.show(ANNE, shown)
    assert not door.is_admitted(ANNE)


def test_the_coordinator_needs_none(door: Door) -> None:
    assert door.is_admitted(COORDINATOR.peer_id)
    assert all(door.knock(COORDINATOR.peer_id) for _ in range(10 * int(GUEST_BURST)))


def test_an_older_pass_takes_nothing_from_a_newer_one(door: Door, time: Time) -> None:
    """Two calls of the same peer have crossed."""
    door.show(ANNE, pass_of(ANNE, issued_s=NOW_S))
    door.show(ANNE, pass_of(ANNE, issued_s=NOW_S - 1800))
    time.passed_s = 3000.0
    assert door.is_admitted(ANNE)


def test_a_clock_that_has_fallen_behind_refuses_no_renewed_pass(door: Door, time: Time) -> None:
    """Nobody checks clocks after the start. Oracle: a pass that is issued a minute and a half from now."""
    door.show(ANNE, pass_of(ANNE, issued_s=NOW_S - 1800))
    door.show(ANNE, pass_of(ANNE, issued_s=NOW_S + 90))
    time.passed_s = 3600.0
    assert door.is_admitted(ANNE)


def test_strangers_are_slow_each_and_together(door: Door, time: Time) -> None:
    """Oracle: what is let in at once, and then in ten seconds, by the rates."""
    assert sum(door.knock(ANNE) for _ in range(100)) == STRANGER_BURST
    time.passed_s = 10.0
    assert sum(door.knock(ANNE) for _ in range(1000)) == min(STRANGER_BURST, 10 * STRANGER_RATE)
    time.passed_s = 1000.0
    crowd = [PeerId(f"stranger {number}") for number in range(10 * MAX_STRANGERS)]
    assert sum(door.knock(peer) for peer in crowd) == ALL_STRANGERS_BURST
    time.passed_s += 1.0
    assert sum(door.knock(peer) for peer in crowd) == ALL_STRANGERS_RATE
    assert len(door._strangers) <= MAX_STRANGERS


def test_who_has_a_pass_is_let_in_however_many_strangers_knock(door: Door, time: Time) -> None:
    door.show(ANNE, pass_of(ANNE))
    for number in range(5000):
        door.knock(PeerId(f"stranger {number}"))
    assert sum(door.knock(ANNE) for _ in range(5000)) == GUEST_BURST
    time.passed_s = 1.0
    door.show(ANNE, pass_of(ANNE))  # again: that fills no bucket
    assert sum(door.knock(ANNE) for _ in range(5000)) == GUEST_RATE


def test_who_is_banned_is_out_at_once_and_may_come_back(door: Door) -> None:
    heard: list[frozenset[PeerId]] = []
    door.on_banned.append(heard.append)
    door.show(ANNE, pass_of(ANNE))
    assert door.learn(banning(1, ANNE))
    assert not door.is_admitted(ANNE)
    assert not door.knock(ANNE)
    with pytest.raises(RefusedError):
        door.show(ANNE, pass_of(ANNE))
    assert door.learn(banning(2))
    assert door.is_admitted(ANNE)
    assert heard == [frozenset({ANNE}), frozenset()]


def test_an_older_list_changes_nothing_and_a_forged_one_is_refused(door: Door) -> None:
    assert door.learn(banning(5, ANNE))
    for older in (banning(5), banning(4, BERT)):
        assert not door.learn(older)
    for forged in (banning(9, BERT, key=STRANGER), banning(9, BERT, run=RunId("cd" * 16))):
        with pytest.raises(PeerFault):
            door.learn(forged)
    assert (door.number, door.banned) == (5, frozenset({ANNE}))


def test_the_coordinator_tells_the_banned_why(time: Time) -> None:
    """They reach what is open to all, as any stranger does."""
    why = {ANNE: RefusedError("two processes use your key")}
    door = Door(RUN, COORDINATOR.peer_id, clock=time.unix, monotonic=time.monotonic, refusal=why.get)
    door.show(ANNE, pass_of(ANNE))
    door.learn(banning(1, ANNE, BERT))
    assert not door.is_admitted(ANNE)
    with pytest.raises(RefusedError, match="two processes"):
        door.show(ANNE, pass_of(ANNE))
    with pytest.raises(RefusedError, match="is banned"):  # the list is newer than what we know of it
        door.show(BERT, pass_of(BERT))
    assert sum(door.knock(ANNE) for _ in range(100)) == STRANGER_BURST


def test_a_full_list_fits_a_message() -> None:
    full = banning(1, *(PeerId("1" * 52) for _ in range(MAX_REVOKED)))
    assert len(full.to_bytes()) < MAX_MESSAGE_BYTES
    with pytest.raises((WireError, ValueError)):
        banning(1, *(PeerId("1" * 52) for _ in range(MAX_REVOKED + 1)))
