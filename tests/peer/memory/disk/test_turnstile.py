"""Any number together, or one alone.

Oracle: who was inside with whom, as the threads themselves note it.
"""

from __future__ import annotations

from threading import Event, Thread

import pytest

from peer.memory.disk.turnstile import Turnstile

PATIENCE_S = 5.0


def test_alone_waits_for_those_inside_and_keeps_others_out() -> None:
    turnstile, notes = Turnstile(), list[str]()
    inside, may_leave = Event(), Event()

    def first() -> None:
        with turnstile.together():
            inside.set()
            assert may_leave.wait(PATIENCE_S)
            notes.append("first leaves")

    def alone() -> None:
        with turnstile.alone():
            notes.append("alone")

    def later() -> None:
        with turnstile.together():
            notes.append("later")

    threads = [Thread(target=first), Thread(target=alone), Thread(target=later)]
    threads[0].start()
    assert inside.wait(PATIENCE_S)
    threads[1].start()
    while not turnstile._is_taken:
        pass
    threads[2].start()
    may_leave.set()
    for thread in threads:
        thread.join(PATIENCE_S)
    assert notes == ["first leaves", "alone", "later"]


def test_one_alone_after_the_other_does_not_keep_others_out() -> None:
    """Without this, a thread that commits in a loop would starve one that writes."""
    turnstile = Turnstile()
    done = Event()

    def visitor() -> None:
        for _ in range(50):
            with turnstile.together():
                pass
        done.set()

    thread = Thread(target=visitor)
    thread.start()
    num_times = 0
    while not done.is_set():
        with turnstile.alone():
            num_times += 1
        assert num_times < 1_000_000
    thread.join(PATIENCE_S)


def test_an_error_inside_leaves_the_door_usable() -> None:
    turnstile = Turnstile()
    with pytest.raises(ZeroDivisionError), turnstile.together():
        raise ZeroDivisionError
    with pytest.raises(ZeroDivisionError), turnstile.alone():
        raise ZeroDivisionError
    with turnstile.alone():
        pass
    with turnstile.together():
        pass
