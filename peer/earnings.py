"""What `peer receipts` shows: what this peer has vouched for and not handed in yet, and what it was credited with.

Owns: reading both, and the words. Must not know: the command line.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from peer.identity import load_identity
from peer.report_spool import ReportSpool
from protocol.control import ReceiptReport
from protocol.ids import PeerId, RoundId
from protocol.invite import Invite
from protocol.receipts import Window
from protocol.transport.asking import ask_status


@dataclass(frozen=True, slots=True, kw_only=True)
class WaitingRound:
    """Receipts of one round that the coordinator has not acknowledged."""

    round: RoundId
    hops_sent: int
    hops_served: int
    partners: int
    tokens: int
    """Target tokens of the hops that this peer answered."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Earnings:
    """What is known about one peer's work."""

    peer: PeerId
    waiting: tuple[WaitingRound, ...]
    credited: dict[str, Any] | None
    """The coordinator's row about this peer; None if it knows nothing of it."""

    def to_json(self) -> dict[str, Any]:
        return {"peer": self.peer, "waiting": [asdict(each) for each in self.waiting], "credited": self.credited}

    def lines(self) -> Iterator[str]:
        """Say it to a person."""
        yield f"peer       {self.peer}"
        for each in self.waiting:
            hops = f"{each.hops_sent} hops opened, {each.hops_served} answered"
            yield f"waiting    round {each.round}: {hops}, with {each.partners} others, {each.tokens:,} tokens"
        if not self.waiting:
            yield "waiting    nothing: the coordinator has all receipts"
        if self.credited is None:
            yield "credits    the coordinator does not list this peer"
            return
        credits = self.credited["credits"]
        for account in ("free", "held"):
            yield f"{account:<10} {credits[f'{account}_mflop']:,} MFLOP for {credits[f'{account}_tokens']:,} tokens"
        yield f"disputed   {self.credited['disputed_hops']} hops"


async def look(invite: Invite, *, data_dir: Path) -> Earnings:
    """Read the spool of the invite's run, and ask its coordinator.

    Raises `ConfigError` if the folder has no identity, `UnreachableError` kinds.
    """
    peer = load_identity(data_dir).peer_id
    waiting = tuple(waiting_rounds(data_dir / "runs" / invite.run / "reports"))
    status = await ask_status(invite)
    credited = next((row for row in status["peers"] if row["peer"] == peer), None)
    return Earnings(peer=peer, waiting=waiting, credited=credited)


def waiting_rounds(folder: Path) -> Iterator[WaitingRound]:
    """Add up the receipts of every round in a spool, oldest first."""
    windows: dict[RoundId, list[Window]] = {}
    for numbered, _ in ReportSpool(folder).load():
        if isinstance(numbered.report, ReceiptReport):
            window = Window.from_bytes(numbered.report.window.payload)
            windows.setdefault(window.round, []).append(window)
    for round_id, parts in sorted(windows.items()):
        served = [hop for window in parts for hop in window.served_hops()]
        yield WaitingRound(
            round=round_id,
            hops_sent=sum(1 for window in parts for _ in window.sent_hops()),
            hops_served=len(served),
            partners=len({partner for window in parts for partner in window.partners}),
            tokens=sum(hop.target_tokens for hop in served),
        )
