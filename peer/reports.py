"""Reports that wait for the coordinator's acknowledgement.

Owns: their numbering and the bounded queue. Reports are made whether or not the coordinator is there; a
beat carries the oldest ones until they are acknowledged. With a spool they outlive the process. Must not know: what is
in them.
"""

from __future__ import annotations

import time
from collections import deque
from itertools import islice

import structlog

from peer.report_spool import ReportSpool
from protocol.control import NumberedReport, Report
from protocol.wire import MAX_MESSAGE_BYTES

log = structlog.get_logger()

MAX_WAITING = 20_000  # a day of rounds without a coordinator; beyond it the oldest are lost to the ledger
MAX_WAITING_BYTES = 200 << 20
PER_BEAT = 32
BYTES_PER_BEAT = MAX_MESSAGE_BYTES // 2  # the closings of a large swarm weigh several kilobytes each


class ReportQueue:
    """Reports in order, numbered so that a restarted peer never reuses a number."""

    def __init__(self, spool: ReportSpool | None = None) -> None:
        self._spool = spool
        self._waiting: deque[tuple[NumberedReport, int]] = deque(spool.load() if spool is not None else ())
        """With their sizes in bytes."""
        self._num_bytes = sum(size for _, size in self._waiting)
        newest = self._waiting[-1][0].sequence if self._waiting else 0
        self._next = max(newest + 1, int(time.time() * 1000))
        self._is_full = False

    def add(self, report: Report) -> None:
        """Queue a report."""
        numbered = NumberedReport(sequence=self._next, report=report)
        data = numbered.to_bytes()
        self._waiting.append((numbered, len(data)))
        self._num_bytes += len(data)
        self._next += 1
        if self._spool is not None:
            self._spool.put(numbered.sequence, data)
        while len(self._waiting) > MAX_WAITING or self._num_bytes > MAX_WAITING_BYTES:
            self._drop_oldest()
            if not self._is_full:
                log.warning("reports.dropped", kept=len(self._waiting))
            self._is_full = True

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
            self._drop_oldest()
            self._is_full = False

    def _drop_oldest(self) -> None:
        numbered, num_bytes = self._waiting.popleft()
        self._num_bytes -= num_bytes
        if self._spool is not None:
            self._spool.drop(numbered.sequence)

    def __len__(self) -> int:
        return len(self._waiting)
