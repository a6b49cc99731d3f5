"""The rows of the trust benchmark, small: what is measured really comes through."""

from __future__ import annotations

import re

import pytest

from tests.benchmarks import trust, trust_floods
from tests.e2e.processes import stop_server


def test_large_cases_are_taken_whole() -> None:
    """What is refused early costs nothing. Oracle: the decoders; sizes near 64 KiB."""
    cases = trust._large_cases()
    assert len(cases) >= 10
    for name, (decode, case) in cases.items():
        assert 0.4 * trust.DECODE_BYTES <= len(case) <= 1.6 * trust.DECODE_BYTES, (name, len(case))
        decode(case)


@pytest.mark.long
@pytest.mark.timeout(480)
def test_a_flood_reaches_its_victim_and_is_felt() -> None:
    """Oracle: how many streams were opened; that the honest member was answered meanwhile."""
    try:
        rows = {row.row: row for row in trust_floods.flood_rows(seconds=1.5, floods=trust_floods.FLOODS)}
    finally:
        stop_server()
    assert tuple(rows) == trust_floods.ROWS
    p99, rss, body = rows["flood_p99"], rows["flood_rss"], rows["flood_body_rss"]
    assert " 0 MiB" not in body.note
    assert "database intact" in p99.note
    assert p99.ours.median > 0
    answers = [(int(lost), int(asked)) for lost, asked in re.findall(r"(\d+) unanswered of (\d+)", p99.note)]
    assert len(answers) == 1 + len(trust_floods.FLOODS)
    assert all(asked - lost >= 2 for lost, asked in answers), "a busy machine may leave one or two unanswered"
    assert rss.ours.median > 50
    done = re.findall(r"disk [-.\d]+ MiB/min, ([\d,]+) done", p99.note)
    assert len(done) == 1 + len(trust_floods.FLOODS)
    assert all(int(num.replace(",", "")) > 10 for num in done[1:]), done
