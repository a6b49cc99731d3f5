"""Which codec an average travels in. Oracle: seconds, counted by hand from bytes and rates."""

from __future__ import annotations

import pytest

from protocol.manifest import AUTO_CODECS, AveragingMode
from protocol.rounds.choice import SHARE_OF_HIDDEN_ROUND, SHARE_OF_ROUND, UNMEASURED, bytes_sent, choose_codec

CODECS = AUTO_CODECS[AveragingMode.DILOCO]
ELEMENTS = 4096 * 1000


def chosen(
    bytes_per_s: float | None,
    *,
    members: int = 4,
    round_s: float | None = 10.0,
    hidden: bool = True,
    codecs: tuple[str, ...] = CODECS,
) -> str:
    return choose_codec(
        codecs,
        num_elements=ELEMENTS,
        num_members=members,
        bytes_per_s=bytes_per_s,
        round_s=round_s,
        is_hidden=hidden,
    )


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("hidden", [False, True])
def test_the_most_exact_codec_that_is_in_time(codec: str, hidden: bool) -> None:
    """At a rate at which it is just in time it is taken, and just below that the next one."""
    budget_s = 10.0 * (SHARE_OF_HIDDEN_ROUND if hidden else SHARE_OF_ROUND)
    rate = bytes_sent(codec, ELEMENTS, num_members=4) / budget_s
    assert chosen(rate * 1.001, hidden=hidden) == codec
    smaller = CODECS[min(CODECS.index(codec) + 1, len(CODECS) - 1)]
    assert chosen(rate * 0.999, hidden=hidden) == smaller


def test_bytes_of_a_member() -> None:
    """Oracle: 8 members make an eighth each and exchange the rest, or everybody gets 104 bytes of 4,096 numbers."""
    fp32 = 4 * ELEMENTS
    assert bytes_sent("fp32", ELEMENTS, num_members=8) == pytest.approx(fp32 * 7 / 8 + 7 * fp32 / 8)
    assert bytes_sent("sparse", ELEMENTS, num_members=8) == 7 * 1000 * 104


def test_codecs_are_in_order_of_their_size() -> None:
    """Or "the most exact that is in time" would skip one."""
    for codecs in AUTO_CODECS.values():
        sizes = [bytes_sent(codec, ELEMENTS, num_members=2) for codec in codecs]
        assert sizes == sorted(sizes, reverse=True)


def test_what_nobody_has_measured() -> None:
    assert chosen(None) == chosen(1e9, round_s=None) == UNMEASURED
    assert chosen(None, codecs=("fp16", "sparse")) == "sparse"


def test_nothing_to_choose() -> None:
    """A run that says which; a stage of one, which sends nothing."""
    assert chosen(1.0, codecs=("fp16",)) == "fp16"
    assert chosen(1.0, members=1) == CODECS[0]
