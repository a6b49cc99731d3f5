"""The one live line of `peer join`: what this peer is doing, from accepted work only.

Owns: the words and where they go (redrawn in place on a terminal, a line every half minute elsewhere).
Must not know: how the figures come about. Progress is what others have signed, never a guess.
"""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TextIO

from protocol.console import LossyStream
from protocol.control import PeerState

TERMINAL_EVERY_S = 1.0
LOG_EVERY_S = 30.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """What the live line shows. Unknown is None, never zero."""

    name: str
    state: PeerState
    reason: str
    stages: tuple[int, ...]
    round: int | None
    num_rounds: int
    loss: float | None = None
    target_tokens: int = 0
    """Target tokens this peer has worked on and somebody has acknowledged."""
    tokens_per_s: float | None = None
    accepted_s: float | None = None
    """When work of ours was last acknowledged, on the monotonic clock."""
    replicas: int = 0
    drive_bytes: int | None = None
    """Written to the NVMe drive today; None if none is used."""
    recomputed: int | None = None
    """How much of others' work a watcher has looked at; None: it is none."""


def render(line: Line, *, now_s: float) -> str:
    """Return the line as text."""
    stages = ",".join(str(stage) for stage in line.stages) or "-"
    state = f"{line.state}({line.reason})" if line.reason else str(line.state)
    round_text = "-" if line.round is None else f"{line.round}/{line.num_rounds}"
    if line.recomputed is not None:
        return f"{line.name}  stage {stages}  {state}  round {round_text}  {line.recomputed:,} recomputed"
    loss = "-" if line.loss is None else f"{line.loss:.3f}"
    rate = "-" if line.tokens_per_s is None else f"{line.tokens_per_s:,.0f} tok/s"
    accepted = "nothing accepted yet" if line.accepted_s is None else f"accepted {now_s - line.accepted_s:.0f} s ago"
    drive = "" if line.drive_bytes is None else f"  {line.drive_bytes / 1e9:,.1f} GB to the drive today"
    return (
        f"{line.name}  stage {stages} ({line.replicas} replicas)  {state}  round {round_text}  loss {loss}  "
        f"{line.target_tokens:,} tokens  {rate}  {accepted}{drive}"
    )


async def show_live(source: Callable[[], Line], *, stream: TextIO | None = None) -> None:
    """Keep the line fresh, on `stream` (default: stderr), until cancelled. A stream that is gone or full loses it."""
    out = LossyStream(sys.stderr if stream is None else stream)
    on_terminal = out.isatty()
    try:
        while True:
            text = render(source(), now_s=time.monotonic())
            out.write(f"\r\x1b[K{text}" if on_terminal else f"{text}\n")
            out.flush()
            await asyncio.sleep(TERMINAL_EVERY_S if on_terminal else LOG_EVERY_S)
    finally:
        if on_terminal:
            out.write("\n")
