"""Statements by which one key hands over to another (`protocol/handover.py`). Oracle: who signed what for whom."""

from __future__ import annotations

import pytest

from protocol.errors import SignatureError, WireError
from protocol.handover import check_handovers, hand_over
from protocol.records import ADMISSION_CONTEXT
from protocol.signing import Signed, SigningKey, seal

A, B, C, D = (SigningKey(bytes([number]) * 32) for number in range(4))


def to(key: SigningKey, successor: SigningKey) -> Signed:
    return hand_over(key, successor.peer_id, issued_s=1.0)


def test_a_chain_names_all_keys_that_came_before() -> None:
    assert check_handovers((), last=A.peer_id) == ()
    assert check_handovers((to(A, B), to(B, C)), last=C.peer_id) == (A.peer_id, B.peer_id)


@pytest.mark.parametrize(
    "chain",
    [(to(A, B),), (to(A, B), to(A, D)), (to(B, D), to(A, B)), (to(D, A), to(A, D)), (to(A, D), to(D, A), to(A, D))],
    ids=["for another", "a gap", "backwards", "a circle", "a key twice"],
)
def test_what_does_not_lead_to_the_caller_is_refused(chain: tuple[Signed, ...]) -> None:
    with pytest.raises(SignatureError):
        check_handovers(chain, last=D.peer_id)


def test_what_the_old_key_did_not_sign_is_refused() -> None:
    forged = to(A, B).model_copy(update={"signer": C.peer_id})
    other = seal(A, ADMISSION_CONTEXT, B_STATEMENT)
    for statement, error in ((forged, SignatureError), (other, SignatureError)):
        with pytest.raises(error):
            check_handovers((statement,), last=B.peer_id)
    junk = to(A, B).model_copy(update={"payload": b"junk", "signature": A.sign("handover", b"junk")})
    with pytest.raises(WireError):
        check_handovers((junk,), last=B.peer_id)


B_STATEMENT = hand_over(A, B.peer_id, issued_s=1.0)
