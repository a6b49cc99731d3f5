"""A `peer` command with one thing wrong with it, so that a test can see what a real one would be told.

    python -m tests.e2e.odd_peer clock:30 join INVITE ...      its clock is half a minute ahead
    python -m tests.e2e.odd_peer protocol:99 join INVITE ...   it speaks another version of the protocol
    python -m tests.e2e.odd_peer slow:0.5 join INVITE ...      each microbatch takes half a second more, one way
    python -m tests.e2e.odd_peer flips:0.5 join INVITE ...     half of what it sends on or back has the opposite sign
    python -m tests.e2e.odd_peer wakes:6 join INVITE ...       from this version on all of it has
    python -m tests.e2e.odd_peer spoils:1.0 join INVITE ...   its sums for averages are turned, times this
    python -m tests.e2e.odd_peer hides:1.0 join INVITE ...    so are they, and it sketches what it should have given
    python -m tests.e2e.odd_peer bare: join INVITE ...        it keeps and says nothing that is only for audits
    python -m tests.e2e.odd_peer twists:1.0 join INVITE ...   what it adds up for others is turned, times this

Everything else is the real command.
"""

from __future__ import annotations

import functools
import random
import sys
import time
from typing import Any

import peer.app
from peer import cli
from peer.averaging.merge import OrderedMerger
from peer.averaging.reduce import Shards
from peer.contributions import Contributions
from peer.engine.span import SpanEngine
from peer.engine.stage_state import StageState
from peer.payloads import Payloads
from peer.receipts import ReceiptBook
from protocol import wire


def main() -> None:
    """Entry point: take the first argument off, go wrong in that way, be a peer."""
    oddity, _, value = sys.argv.pop(1).partition(":")
    assert peer.app, "everything that a peer uses must be loaded before it is changed"
    if oddity == "clock":
        _shift_clock(float(value))
    elif oddity == "protocol":
        _speak(int(value))
    elif oddity == "slow":
        _dawdle(float(value))
    elif oddity == "flips":
        _flip(float(value))
    elif oddity == "wakes":
        _flip(1.0, since=int(value))
    elif oddity == "spoils":
        _spoil(float(value))
    elif oddity == "hides":
        _hide(float(value))
    elif oddity == "bare":
        _bare()
    elif oddity == "twists":
        _twist(float(value))
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


def _dawdle(seconds: float) -> None:
    """Sleep before each pass, as long as a slower card would compute. What waits for it cannot tell."""
    for name in ("forward_wave", "backward_wave", "loss_wave"):
        setattr(SpanEngine, name, _delayed(getattr(SpanEngine, name), seconds))


def _flip(share: float, *, since: int = 0) -> None:
    """Cheat with activations and gradients, and sign for them as for honest ones."""
    honest, chance = SpanEngine._encode, random.Random(0)

    def encode(self: SpanEngine, hidden_BTD: Any, *, using: Any) -> bytes:
        is_awake = min(engine.version for engine in self.engines.values()) >= since
        return honest(self, -hidden_BTD if is_awake and chance.random() < share else hidden_BTD, using=using)

    SpanEngine._encode = encode  # type: ignore[method-assign]


def _spoil(size: float) -> None:
    """Compute honestly, and contribute something else."""
    honest = StageState.contribution_shard
    StageState.contribution_shard = (  # type: ignore[method-assign]
        lambda self, number: honest(self, number).mul(-size)
    )


def _hide(size: float) -> None:
    """Compute honestly, contribute something else, and say that it was what was computed."""
    honest = Shards._read_checked
    Shards._read_checked = (  # type: ignore[method-assign]
        lambda self, shard: honest(self, shard).mul(-size)
    )


def _twist(size: float) -> None:
    """Contribute honestly, and make something else of what all have contributed."""
    honest = OrderedMerger.accumulate_part

    async def accumulate_part(self: OrderedMerger, sender_index: int, part_index: int, values: Any) -> bytes:
        length = len(values)
        total = await honest(self, sender_index, part_index, values)
        return self._codec.encode(self._codec.decode(total, length).mul(-size))

    OrderedMerger.accumulate_part = accumulate_part  # type: ignore[method-assign]


def _bare() -> None:
    Payloads.keep = lambda self, digest, data: None  # type: ignore[method-assign]
    Contributions.before_step = lambda self, stage, commit, update: None  # type: ignore[method-assign]
    Contributions.before_replaced = lambda self, stage, commit, update: None  # type: ignore[method-assign]
    ReceiptBook.close = lambda self, round_id: ()  # type: ignore[method-assign, assignment, return-value]


def _delayed(method: Any, seconds: float) -> Any:
    @functools.wraps(method)
    def delayed(self: SpanEngine, wave: Any, **options: Any) -> Any:
        time.sleep(seconds * len(wave))
        return method(self, wave, **options)

    return delayed


if __name__ == "__main__":
    main()
