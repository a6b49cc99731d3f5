"""Reports on their way to the ledger. Oracle: sizes and numbers, counted by hand."""

from __future__ import annotations

from pathlib import Path

import pytest
from structlog.testing import capture_logs

from peer import reports
from peer.report_spool import ReportSpool
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


def test_the_oldest_are_dropped_and_said_to_be_when_nobody_takes_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: one warning however many are lost, and another one after the coordinator was back."""
    monkeypatch.setattr(reports, "MAX_WAITING", 50)
    queue = ReportQueue()
    with capture_logs() as logs:
        for _ in range(reports.MAX_WAITING + 3):
            queue.add(closing(1))
        assert len(queue) == reports.MAX_WAITING
        queue.acknowledge(queue.oldest()[0].sequence)
        for _ in range(3):
            queue.add(closing(1))
    assert [entry["event"] for entry in logs] == ["reports.dropped", "reports.dropped"]


def test_what_nobody_took_is_there_after_a_restart_in_the_same_order_under_the_same_numbers(tmp_path: Path) -> None:
    """The coordinator was away for the whole of a peer's life: its receipts are handed in by the next one."""
    before = ReportQueue(ReportSpool(tmp_path / "reports"))
    for size in (1, 2, 3):
        before.add(closing(size))
    before.acknowledge(before.oldest()[0].sequence)
    after = ReportQueue(ReportSpool(tmp_path / "reports"))
    assert after.oldest() == before.oldest()
    after.add(closing(4))
    sequences = [report.sequence for report in after.oldest()]
    assert sequences == sorted(set(sequences))
    assert len(sequences) == 3


def test_what_is_acknowledged_leaves_no_file(tmp_path: Path) -> None:
    queue = ReportQueue(ReportSpool(tmp_path / "reports"))
    queue.add(closing(1))
    assert [path.suffix for path in (tmp_path / "reports").iterdir()] == [".report"]
    queue.acknowledge(queue.oldest()[-1].sequence)
    assert list((tmp_path / "reports").iterdir()) == []


def test_a_number_is_never_used_again_however_the_clock_is_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = ReportQueue(ReportSpool(tmp_path))
    before.add(closing(1))
    monkeypatch.setattr("time.time", lambda: 0.0)
    after = ReportQueue(ReportSpool(tmp_path))
    after.add(closing(2))
    first, second = after.oldest()
    assert second.sequence == first.sequence + 1


def test_a_damaged_report_is_passed_over_and_the_others_are_not(tmp_path: Path) -> None:
    queue = ReportQueue(ReportSpool(tmp_path))
    for size in (1, 2, 3):
        queue.add(closing(size))
    paths = sorted(tmp_path.iterdir())
    paths[1].write_bytes(paths[1].read_bytes()[:-1])
    with capture_logs() as logs:
        left = ReportQueue(ReportSpool(tmp_path))
    assert [report.sequence for report in left.oldest()] == [int(paths[0].stem), int(paths[2].stem)]
    assert [entry["event"] for entry in logs] == ["reports.damaged"]


def test_a_disk_that_refuses_costs_a_line_and_no_report(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with capture_logs() as logs:
        queue = ReportQueue(ReportSpool(tmp_path / "file"))  # a file where a folder is wanted
        for size in (1, 2):
            queue.add(closing(size))
        queue.acknowledge(queue.oldest()[0].sequence)
    assert len(queue) == 1
    assert [entry["event"] for entry in logs] == ["reports.unspooled"]


def test_what_is_spooled_is_bounded_in_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reports, "MAX_WAITING_BYTES", 3_000)
    queue = ReportQueue(ReportSpool(tmp_path))
    for _ in range(10):
        queue.add(closing(1_000))
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) <= 3_000
    assert len(queue) == len(list(tmp_path.iterdir())) == 2
