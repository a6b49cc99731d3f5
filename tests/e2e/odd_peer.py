"""A `peer` command with one thing wrong with it, so that a test can see what a real one would be told.

    python -m tests.e2e.odd_peer clock:30 join INVITE ...      its clock is half a minute ahead
    python -m tests.e2e.odd_peer protocol:99 join INVITE ...   it speaks another version of the protocol

Everything else is the real command.
"""

from __future__ import annotations

import sys
import time

import peer.app
from peer import cli
from protocol import wire


def main() -> None:
    """Entry point: take the first argument off, go wrong in that way, be a peer."""
    oddity, _, value = sys.argv.pop(1).partition(":")
    assert peer.app, "everything that a peer uses must be loaded before it is changed"
    if oddity == "clock":
        _shift_clock(float(value))
    elif oddity == "protocol":
        _speak(int(value))
    else:
        raise ValueError(f"no oddity is called '{oddity}'")
    cli.main()


def _shift_clock(ahead_s: float) -> None:
    real, real_ns = time.time, time.time_ns
    time.time = lambda: real() + ahead_s
    time.time_ns = lambda: real_ns() + int(ahead_s * 1e9)


def _speak(version: int) -> None:
    ours = wire.PROTOCOL_VERSION
    for name, module in list(sys.modules.items()):
        if name.split(".")[0] in ("peer", "protocol") and getattr(module, "PROTOCOL_VERSION", None) == ours:
            module.PROTOCOL_VERSION = version  # type: ignore[attr-defined]


if __name__ == "__main__":
    main()
