"""Reports that wait for the coordinator's acknowledgement.

Owns: their numbering and the bounded queue. Reports are made whether or not the coordinator is there; a
beat carries the oldest ones until they are acknowledged. Must not know: what is in them.
"""

from __future__ import annotations

import time
from collections import deque

from protocol.control import NumberedReport, Report

MAX_WAITING = 5_000  # a day of rounds without a coordinator; beyond it the oldest are dropped and counted
PER_BEAT = 32


class ReportQueue:
    """Reports in order, numbered so that a restarted peer never reuses a number."""

    def __init__(self) -> None:
        self._next = int(time.time() * 1000)
        self._waiting: deque[NumberedReport] = deque()
        self.dropped = 0

    def add(self, report: Report) -> None:
        """Queue a report."""
        if len(self._waiting) >= MAX_WAITING:
            self._waiting.popleft()
            self.dropped += 1
        self._waiting.append(NumberedReport(sequence=self._next, report=report))
        self._next += 1

    def oldest(self) -> tuple[NumberedReport, ...]:
        """Return what the next beat should carry."""
        return tuple(report for report, _ in zip(self._waiting, range(PER_BEAT), strict=False))

    def acknowledge(self, sequence: int) -> None:
        """Drop everything up to `sequence`: it is in the ledger."""
        while self._waiting and self._waiting[0].sequence <= sequence:
            self._waiting.popleft()

    def __len__(self) -> int:
        return len(self._waiting)
