"""The wire form: round trips, and the largest records still fit a message."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol.errors import WireError
from protocol.ids import Lineage, PeerId, RoundId, StageId, Version, digest
from protocol.rounds.gossip import MAX_ANSWER_BYTES
from protocol.rounds.messages import (
    MAX_CREDITS,
    MAX_SEATS,
    ROUND_MESSAGES,
    Ack,
    Ballot,
    ChainAnswer,
    Charter,
    Closing,
    Commit,
    Contribution,
    Credit,
    Hello,
    Ping,
    Pong,
    Propose,
    Seat,
    StageMessage,
    Vote,
)
from protocol.signing import Signed
from protocol.wire import MAX_MESSAGE_BYTES
from tests.protocol.rounds.builders import RUN, closing, commit

LINEAGE = Lineage(digest(b"lineage"))
NAMES = tuple(PeerId(f"12D3KooW{index:044d}") for index in range(MAX_SEATS))  # 52 characters, like real ones
SEATS = tuple(Seat(peer=name, session=1 << 52) for name in NAMES)


def large_commit() -> Commit:
    """Return a commit of as many members as there may be, half of them new."""
    small = Commit.from_bytes(commit(LINEAGE).payload)
    group = tuple(Contribution(peer=name, tokens=1 << 40, weight=1 << 40) for name in NAMES)
    changes = {"contributors": group, "seats": SEATS, "speeds": (0.1,) * MAX_SEATS, "joiners": NAMES[: MAX_SEATS // 2]}
    return small.model_copy(update=changes)


def sealed(payload: bytes) -> Signed:
    return Signed(payload=payload, signer=NAMES[0], signature=bytes(64))


def test_the_largest_commit_fits_every_message_that_carries_it() -> None:
    """A thousand members; with the charter in front, and with the list of sources behind."""
    record = large_commit()
    assert Commit.from_bytes(record.to_bytes()) == record
    signed = sealed(record.to_bytes())
    ballot = Ballot(number=1, steward=NAMES[0])
    charter = Charter(
        run=RUN,
        stage=StageId(0),
        generation=1,
        round=RoundId(0),
        version=Version(0),
        state_digest=digest(b""),
        seats=SEATS[: MAX_SEATS // 2],
    )
    carriers: list[StageMessage] = [
        Propose(stage=StageId(0), parent=LINEAGE, ballot=ballot, commit=signed, sources=NAMES[: MAX_SEATS // 2]),
        Pong(
            stage=StageId(0),
            parent=LINEAGE,
            ballot=ballot,
            tokens=1,
            vote=Vote(ballot=ballot, commit=signed),
            leaving=False,
        ),
        ChainAnswer(
            stage=StageId(0),
            known=True,
            charter=sealed(charter.to_bytes()),
            commits=(signed,),
            lineage=LINEAGE,
            version=Version(1),
            oldest_version=Version(0),
        ),
    ]
    assert len(signed.payload) > MAX_ANSWER_BYTES, "so the answer carries one commit only"
    for carrier in carriers:
        assert len(carrier.to_bytes()) <= MAX_MESSAGE_BYTES
        assert type(carrier).from_bytes(carrier.to_bytes()) == carrier


def test_the_largest_closing_fits_a_ping() -> None:
    """As many credits as there may be, and a bit for every number."""
    small = Closing.from_bytes(closing().payload)
    credits = tuple(
        Credit(stage=StageId(60_000 + index // MAX_SEATS), peer=NAMES[index % MAX_SEATS], tokens=1 << 40)
        for index in range(MAX_CREDITS)
    )
    large = small.model_copy(update={"num_train": 1 << 16, "done": b"\xff" * (1 << 13), "credits": credits})
    ping = Ping(
        stage=StageId(0),
        parent=LINEAGE,
        ballot=Ballot(number=1, steward=NAMES[0]),
        generation=1,
        closing=sealed(large.to_bytes()),
    )
    assert len(ping.to_bytes()) <= MAX_MESSAGE_BYTES
    assert Ping.from_bytes(ping.to_bytes()) == ping


@given(
    st.integers(0, 2**63 - 1), st.integers(-1, 2**40), st.booleans(), st.none() | st.binary(min_size=32, max_size=32)
)
def test_a_hello_survives_the_wire(session: int, closed: int, applied: bool, state: bytes | None) -> None:
    """Oracle: equality."""
    hello = Hello.model_validate(
        {
            "stage": 3,
            "session": session,
            "generation": 1,
            "lineage": LINEAGE,
            "version": 0,
            "applied": applied,
            "state_digest": state,
            "closed": closed,
        }
    )
    assert Hello.from_bytes(hello.to_bytes()) == hello


@given(st.sampled_from(ROUND_MESSAGES), st.binary(max_size=200))
def test_no_bytes_break_a_decoder(message: type[StageMessage], data: bytes) -> None:
    """Only the project's own error comes out."""
    try:
        message.from_bytes(data)
    except WireError:
        return


def test_every_message_is_listed_for_the_driver() -> None:
    """A class that is forgotten would be refused by every peer. Oracle: the subclasses there are."""
    found: set[type[StageMessage]] = set()
    queue = [StageMessage]
    while queue:
        for each in queue.pop().__subclasses__():
            queue.append(each)
            if not each.__subclasses__():
                found.add(each)
    assert set(ROUND_MESSAGES) == found
    assert len({each.__name__ for each in found}) == len(found)


@pytest.mark.parametrize("length", [0, 31, 33])
def test_a_hash_has_thirty_two_bytes(length: int) -> None:
    """No more, no less."""
    with pytest.raises(WireError):
        Ack.from_plain({"stage": 0, "of": bytes(length)})


@given(st.integers(1, 9), st.integers(1, 9), st.sampled_from("abc"), st.sampled_from("abc"))
def test_ballots_are_totally_ordered(one: int, other: int, first: str, second: str) -> None:
    """Oracle: tuples."""
    ballot, rival = Ballot(number=one, steward=PeerId(first)), Ballot(number=other, steward=PeerId(second))
    assert ballot.outranks(rival) is ((one, first) > (other, second))
    assert ballot.outranks(None)
