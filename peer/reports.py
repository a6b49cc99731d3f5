"""Reports that wait for the coordinator's acknowledgement.

Owns: their numbering and the bounded queue. Reports are made whether or not the coordinator is there; a
beat carries the oldest ones until they are acknowledged. Must not know: what is in them.
"""

from __future__ import annotations

import time
from collections import deque
from itertools import islice

import structlog

from protocol.control import NumberedReport, Report
from protocol.wire import MAX_MESSAGE_BYTES

log = structlog.get_logger()

MAX_WAITING = 5_000  # a day of rounds without a coordinator; beyond it the oldest are lost to the ledger
PER_BEAT = 32
BYTES_PER_BEAT = MAX_MESSAGE_BYTES // 2  # the closings of a large swarm weigh several kilobytes each


class ReportQueue:
    """Reports in order, numbered so that a restarted peer never reuses a number."""

    def __init__(self) -> None:
        self._next = int(time.time() * 1000)
        self._waiting: deque[tuple[NumberedReport, int]] = deque()
        """With their sizes in bytes."""
        self._is_full = False

    def add(self, report: Report) -> None:
        """Queue a report."""
        if len(self._waiting) >= MAX_WAITING:
            self._waiting.popleft()
            if not self._is_full:
                log.warning("reports.dropped", kept=MAX_WAITING)
            self._is_full = True
        numbered = NumberedReport(sequence=self._next, report=report)
        self._waiting.append((numbered, len(numbered.to_bytes())))
        self._next += 1

    def oldest(self) -> tuple[NumberedReport, ...]:
        """Return what the next beat should carry: as many as fit, and at least one."""
        chosen: list[NumberedReport] = []
        left = BYTES_PER_BEAT
        for report, size in islice(self._waiting, PER_BEAT):
            left -= size
            if left < 0 and chosen:
                break
            chosen.append(report)
        return tuple(chosen)

    def acknowledge(self, sequence: int) -> None:
        """Drop everything up to `sequence`: it is in the ledger."""
        while self._waiting and self._waiting[0][0].sequence <= sequence:
            self._waiting.popleft()
            self._is_full = False

    def __len__(self) -> int:
        return len(self._waiting)
