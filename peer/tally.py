"""What this peer did, round by round: counted here, shown in the live line, reported to the coordinator.

Owns: the counters and turning them into one `WorkReport` per round. Must not know: where they are shown.
"""

from __future__ import annotations

import time

from peer.pipeline.caller import HopStatistics
from protocol.control import WorkReport
from protocol.ids import RoundId
from protocol.rounds.messages import Closing

SMOOTHING = 0.3


class Tally:
    """Counters of one session."""

    def __init__(self) -> None:
        self.loss: float | None = None
        self.target_tokens = 0
        self.tokens_per_s: float | None = None
        self.accepted_s: float | None = None
        self.round: RoundId | None = None
        self._reported = HopStatistics()
        self._reported_busy_s = 0.0
        self._reported_fed_again = 0
        self._round_started_s = time.monotonic()
        self._round_tokens = 0
        self._round_fed = 0

    def begin(self) -> None:
        """Start counting seconds: what came before was downloading, and no work."""
        if not self._round_tokens:
            self._round_started_s = time.monotonic()

    def accept(self, target_tokens: int, *, fed: bool) -> None:
        """Count a microbatch that somebody else (or the last stage's signature) has acknowledged."""
        self.target_tokens += target_tokens
        self._round_tokens += target_tokens
        self._round_fed += fed
        self.accepted_s = time.monotonic()

    def learn_closing(self, closing: Closing) -> None:
        """Take the swarm's loss over from a closing."""
        self.round = closing.round
        if closing.target_tokens:
            self.loss = closing.loss_sum / closing.target_tokens

    def end_round(self, round_id: RoundId, hops: HopStatistics, *, fed_again: int, busy_s: float) -> WorkReport:
        """Return the report of a round and begin the next one. `hops`, `fed_again` and `busy_s` are totals so far."""
        now_s = time.monotonic()
        seconds = max(1e-6, now_s - self._round_started_s)
        rate = self._round_tokens / seconds
        self.tokens_per_s = (
            rate if self.tokens_per_s is None else self.tokens_per_s + SMOOTHING * (rate - self.tokens_per_s)
        )
        before = self._reported
        report = WorkReport(
            round=round_id,
            tasks_fed=self._round_fed,
            tasks_resent=hops.resent - before.resent + fed_again - self._reported_fed_again,
            hops=hops.hops - before.hops,
            activation_bytes=hops.bytes_sent + hops.bytes_received - before.bytes_sent - before.bytes_received,
            target_tokens=self._round_tokens,
            seconds=seconds,
            compute_seconds=max(0.0, busy_s - self._reported_busy_s),
        )
        self._reported = HopStatistics(
            hops=hops.hops, resent=hops.resent, bytes_sent=hops.bytes_sent, bytes_received=hops.bytes_received
        )
        self._reported_busy_s, self._reported_fed_again = busy_s, fed_again
        self._round_started_s, self._round_tokens, self._round_fed = now_s, 0, 0
        return report
