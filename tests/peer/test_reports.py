"""Reports on their way to the ledger. Oracle: sizes and numbers, counted by hand."""

from __future__ import annotations

from structlog.testing import capture_logs

from peer import reports
from peer.reports import BYTES_PER_BEAT, PER_BEAT, ReportQueue
from protocol.control import ClosingReport
from protocol.signing import Signed, SigningKey

SIGNER = SigningKey.generate().peer_id


def closing(num_bytes: int) -> ClosingReport:
    return ClosingReport(closing=Signed(payload=bytes(num_bytes), signer=SIGNER, signature=bytes(64)))


def test_a_beat_carries_the_oldest_until_they_are_acknowledged() -> None:
    queue = ReportQueue()
    for _ in range(PER_BEAT + 5):
        queue.add(closing(100))
    first = queue.oldest()
    assert len(first) == PER_BEAT
    assert queue.oldest() == first
    queue.acknowledge(first[-1].sequence)
    assert len(queue) == 5
    assert queue.oldest()[0].sequence == first[-1].sequence + 1


def test_heavy_reports_travel_in_several_beats() -> None:
    """Thirty-two closings of a large swarm would be more than a message may hold, and refused at every beat."""
    queue = ReportQueue()
    for _ in range(10):
        queue.add(closing(BYTES_PER_BEAT // 3))
    beats = 0
    while len(queue):
        batch = queue.oldest()
        assert sum(len(report.to_bytes()) for report in batch) <= BYTES_PER_BEAT
        queue.acknowledge(batch[-1].sequence)
        beats += 1
    assert beats == 5


def test_the_heaviest_one_still_goes() -> None:
    queue = ReportQueue()
    queue.add(closing(BYTES_PER_BEAT + 1))
    queue.add(closing(1))
    assert len(queue.oldest()) == 1


def test_the_oldest_are_dropped_and_said_to_be_when_nobody_takes_them() -> None:
    """Oracle: one warning however many are lost, and another one after the coordinator was back."""
    queue = ReportQueue()
    with capture_logs() as logs:
        for _ in range(reports.MAX_WAITING + 3):
            queue.add(closing(1))
        assert len(queue) == reports.MAX_WAITING
        queue.acknowledge(queue.oldest()[0].sequence)
        for _ in range(3):
            queue.add(closing(1))
    assert [entry["event"] for entry in logs] == ["reports.dropped", "reports.dropped"]
