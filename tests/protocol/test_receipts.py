"""Windows of receipts. Oracle: the hops that were put in; sizes counted by hand."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from protocol.errors import WireError
from protocol.ids import RoundId, RunId, StageId
from protocol.receipts import (
    HOP_BYTES,
    MAX_HOPS,
    MAX_PARTNERS,
    RECEIPT_CONTEXT,
    SHORT_DIGEST_BYTES,
    Hop,
    Window,
    draw_windows,
)
from protocol.signing import SigningKey, unseal
from protocol.wire import MAX_MESSAGE_BYTES

RUN = RunId("r" * 32)
KEY = SigningKey(bytes(32))
OTHERS = [SigningKey(bytes([number]) * 32).peer_id for number in range(1, 4)]


def hop(number: int, *, partner: int = 0, sent: bool = True, returned: int = 7) -> Hop:
    mine, theirs = KEY.peer_id, OTHERS[partner]
    return Hop(
        number=number,
        caller=mine if sent else theirs,
        callee=theirs if sent else mine,
        first_stage=StageId(1),
        num_stages=2,
        target_tokens=64,
        given=bytes([number % 256]) * SHORT_DIGEST_BYTES,
        returned=bytes([returned]) * SHORT_DIGEST_BYTES,
    )


def windows(sent: list[Hop], served: list[Hop]) -> list[Window]:
    signed = draw_windows(KEY, run=RUN, session=3, round_id=RoundId(5), sent=sent, served=served)
    return [unseal(each, RECEIPT_CONTEXT, Window, signer=KEY.peer_id) for each in signed]


@given(st.lists(st.tuples(st.integers(0, 2**32 - 1), st.integers(0, 2), st.booleans()), max_size=30))
def test_what_was_said_comes_back(said: list[tuple[int, int, bool]]) -> None:
    hops = [hop(number, partner=partner, sent=sent) for number, partner, sent in said]
    sent = [each for each in hops if each.caller == KEY.peer_id]
    served = [each for each in hops if each.callee == KEY.peer_id]
    drawn = windows(sent, served)
    assert [each for window in drawn for each in window.sent_hops()] == sent
    assert [each for window in drawn for each in window.served_hops()] == served


def test_nothing_said_is_no_window() -> None:
    assert windows([], []) == []


def test_many_hops_travel_in_parts_that_each_fit_a_message() -> None:
    drawn = windows([hop(number) for number in range(MAX_HOPS)], [hop(0, sent=False)])
    assert [(window.part, window.parts) for window in drawn] == [(0, 2), (1, 2)]
    assert len(drawn[0].sent) == MAX_HOPS * HOP_BYTES
    assert len(drawn[0].to_bytes()) < MAX_MESSAGE_BYTES // 2


def test_one_window_has_room_for_as_many_partners_as_hops() -> None:
    assert MAX_PARTNERS >= MAX_HOPS


@pytest.mark.parametrize(
    "changes",
    [{"sent": bytes(HOP_BYTES - 1)}, {"part": 1}, {"partners": (KEY.peer_id,)}, {"round": -1}, {"session": 1 << 63}],
)
def test_windows_that_make_no_sense_are_none(changes: dict[str, object]) -> None:
    window = windows([hop(1)], [])[0]
    with pytest.raises(ValidationError):
        Window.model_validate({**window.model_dump(), **changes})


def test_a_hop_with_nobody_is_refused() -> None:
    window = windows([hop(1)], [])[0].model_copy(update={"partners": ()})
    with pytest.raises(WireError, match="partner 0 of 0"):
        list(window.sent_hops())
