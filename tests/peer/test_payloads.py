"""What is kept of our hops. Oracle: the bytes themselves, and the room that they take."""

from __future__ import annotations

from peer.payloads import Payloads
from protocol.audits import payload_name
from protocol.ids import digest
from protocol.receipts import shortened


def test_the_newest_stay_and_are_found_by_the_name_in_receipts() -> None:
    payloads = Payloads(max_bytes=300)
    bodies = [bytes([number]) * 100 for number in range(5)]
    for body in bodies:
        payloads.keep(digest(body), body)
    found = [payloads.find(shortened(digest(body))) for body in bodies]
    assert found == [None, None, *bodies[2:]]
    assert payloads.num_bytes == 300
    assert payloads.resolve(payload_name(shortened(digest(bodies[4])))) == bodies[4]


def test_what_is_said_twice_is_kept_once_and_what_is_too_large_not_at_all() -> None:
    payloads = Payloads(max_bytes=300)
    payloads.keep(digest(b"a" * 200), b"a" * 200)
    payloads.keep(digest(b"a" * 200), b"a" * 200)
    payloads.keep(digest(b"b" * 301), b"b" * 301)
    payloads.keep(digest(b""), None)
    assert payloads.num_bytes == 200


def test_names_of_something_else_find_nothing() -> None:
    payloads = Payloads(max_bytes=300)
    payloads.keep(digest(b"a"), b"a")
    for name in ("payload/", "payload/zz", "payload/" + "0" * 32, "payload/../etc", "tokens/x"):
        assert payloads.resolve(name) is None
