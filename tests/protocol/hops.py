"""Hops and windows for tests of what receipts lead to."""

from __future__ import annotations

from typing import Any

from protocol.ids import PeerId, RoundId, RunId, StageId
from protocol.receipts import RECEIPT_CONTEXT, SHORT_DIGEST_BYTES, Hop, Window, draw_windows
from protocol.signing import Signed, SigningKey, unseal

TOKENS = 64


def short(number: int) -> bytes:
    """Return a shortened digest of our own making."""
    return bytes([number % 256]) * SHORT_DIGEST_BYTES


def hop(
    number: int, caller: PeerId, callee: PeerId, stage: int = 1, *, returned: int | bytes = 1, **changes: Any
) -> Hop:
    """Return a hop of one stage, of bytes that its number stands for; change what you like."""
    fields: dict[str, Any] = {
        "number": number,
        "caller": caller,
        "callee": callee,
        "first_stage": StageId(stage),
        "num_stages": 1,
        "target_tokens": TOKENS,
        "given": short(number),
        "returned": returned if isinstance(returned, bytes) else short(returned),
    }
    return Hop(**(fields | changes))


def signed_window(key: SigningKey, *hops: Hop, run: RunId, round_id: int = 0, session: int = 1) -> Signed:
    """Sign what a peer says of hops of which it is one end or the other."""
    (signed,) = draw_windows(
        key,
        run=run,
        session=session,
        round_id=RoundId(round_id),
        sent=[each for each in hops if each.caller == key.peer_id],
        served=[each for each in hops if each.callee == key.peer_id],
    )
    return signed


def window(key: SigningKey, *hops: Hop, session: int = 1, round_id: int = 0) -> Window:
    """Return what `signed_window` signs."""
    signed = signed_window(key, *hops, run=RunId("r" * 32), session=session, round_id=round_id)
    return unseal(signed, RECEIPT_CONTEXT, Window)
