"""Handing an identity over: a key's signed word that another one goes on in its place. Pure.

Owns: the statement, and checking a chain of them. Must not know: files, what a peer leaves to its successor. Made by
`peer identity rotate`, shown with every registration, believed by the coordinator once per key.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

from pydantic import Field

from protocol.errors import SignatureError
from protocol.ids import PeerId
from protocol.signing import MAX_PEER_ID_CHARS, Signed, SigningKey, seal, unseal
from protocol.wire import Message

HANDOVER_CONTEXT = "handover"
MAX_HANDOVERS = 8  # that are shown: the newest


class Handover(Message):
    """The signer goes on as `successor`, in every run."""

    successor: Annotated[PeerId, Field(min_length=1, max_length=MAX_PEER_ID_CHARS)]
    issued_s: Annotated[float, Field(ge=0)]


def hand_over(key: SigningKey, successor: PeerId, *, issued_s: float) -> Signed:
    """Sign that `successor` goes on in our place."""
    return seal(key, HANDOVER_CONTEXT, Handover(successor=successor, issued_s=issued_s))


def check_handovers(chain: Sequence[Signed], *, last: PeerId) -> tuple[PeerId, ...]:
    """Return the signers of a chain, each of which names the next one and the final one `last`.

    Raises `SignatureError` (or `WireError`) if it is no such chain, or comes back to a key.
    """
    signers = tuple(signed.signer for signed in chain)
    if len({*signers, last}) != len(signers) + 1:
        raise SignatureError("a key is handed over twice in one chain")
    for signed, successor in zip(chain, (*signers, last)[1:], strict=True):
        if unseal(signed, HANDOVER_CONTEXT, Handover).successor != successor:
            raise SignatureError(f"{signed.signer} was not handed over to {successor}")
    return signers
