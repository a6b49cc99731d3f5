"""Which codec an average travels in, where the run leaves that to its members (`averaging.codec=auto`).

Owns: the choice, from what has been measured: how fast members could send, and how long a round takes. Pure. The
steward of a ballot makes it (`steward.py`), everybody else takes it as it comes in the steward's `Begin`, and the
commit keeps it, so whoever replays the log knows what its bytes are. Must not know: codecs beyond their sizes, clocks.

Exact is better as long as it costs nobody time: the choice is the most exact codec whose average is there when it is
needed. With overlap that is before the next round ends; without, everybody waits, and an average may take a tenth of
the round. Error feedback belongs to no codec, so a stage may change it from round to round.
"""

from __future__ import annotations

from collections.abc import Sequence

from protocol.encoding import encoded_bytes, is_dense

UNMEASURED = "int8"
"""Taken until the first average has been made: a quarter of fp32, and no loss to speak of."""
SHARE_OF_ROUND = 0.1
SHARE_OF_HIDDEN_ROUND = 0.8  # a round is not as long as the one before, and what comes late stops everybody


def choose_codec(
    codecs: Sequence[str],
    *,
    num_elements: int,
    num_members: int,
    bytes_per_s: float | None,
    round_s: float | None,
    is_hidden: bool,
) -> str:
    """Return one of `codecs`, which are in the order from the most exact to the smallest.

    `bytes_per_s` is what the slowest member could send in an average, `round_s` the length of a round; None if nobody
    knows yet. A group of one sends nothing.
    """
    if len(codecs) == 1 or num_members == 1:
        return codecs[0]
    if not bytes_per_s or round_s is None:
        return UNMEASURED if UNMEASURED in codecs else codecs[-1]
    budget_s = round_s * (SHARE_OF_HIDDEN_ROUND if is_hidden else SHARE_OF_ROUND)
    for codec in codecs:
        if bytes_sent(codec, num_elements, num_members=num_members) <= budget_s * bytes_per_s:
            return codec
    return codecs[-1]


def bytes_sent(codec: str, num_elements: int, *, num_members: int) -> float:
    """Return how much a member sends: its share of a butterfly, or its contribution to everybody."""
    copies = 2 * (num_members - 1) / num_members if is_dense(codec) else num_members - 1
    return copies * encoded_bytes(codec, num_elements)
