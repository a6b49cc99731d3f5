"""The live line. Oracle: its text, by hand."""

from __future__ import annotations

import asyncio
import io
from dataclasses import replace

import pytest

from peer.ui import live
from peer.ui.live import Line, render, show_live
from protocol.control import PeerState

LINE = Line(
    name="oak",
    state=PeerState.TRAINING,
    reason="",
    stages=(1, 2),
    round=7,
    num_rounds=60,
    loss=5.25,
    target_tokens=12_288,
    tokens_per_s=1234.5,
    accepted_s=97.0,
    replicas=3,
)


class Gone(io.StringIO):
    """A terminal that was closed."""

    def write(self, text: str) -> int:
        raise BrokenPipeError("nobody reads this")


def test_the_line_shows_what_others_have_acknowledged() -> None:
    expected = (
        "oak  stage 1,2 (3 replicas)  training  round 7/60  loss 5.250  12,288 tokens  1,234 tok/s  accepted 3 s ago"
    )
    assert render(LINE, now_s=100.0) == expected


def test_a_drive_that_is_used_shows_what_it_has_taken() -> None:
    """It wears out by it. Oracle: the end of the line."""
    assert render(replace(LINE, drive_bytes=12_345_000_000), now_s=100.0).endswith("  12.3 GB to the drive today")


def test_what_is_not_known_is_not_shown_as_zero() -> None:
    line = replace(
        LINE,
        state=PeerState.WAITING,
        reason="charter",
        round=None,
        loss=None,
        tokens_per_s=None,
        accepted_s=None,
        target_tokens=0,
    )
    assert render(line, now_s=100.0) == (
        "oak  stage 1,2 (3 replicas)  waiting(charter)  round -  loss -  0 tokens  -  nothing accepted yet"
    )


@pytest.mark.parametrize("stream", [io.StringIO, Gone])
async def test_a_line_that_nobody_reads_ends_nothing(
    stream: type[io.StringIO], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(live, "LOG_EVERY_S", 0.001)
    out = stream()
    showing = asyncio.create_task(show_live(lambda: LINE, stream=out))
    await asyncio.sleep(0.02)
    assert not showing.done()
    showing.cancel()
    if stream is io.StringIO:
        assert out.getvalue().count("oak  stage 1,2") > 1
