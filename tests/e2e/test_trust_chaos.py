"""Receipts are settled exactly once though the coordinator is killed: some of the kills of `make chaos-trust`.

Oracle: the book after the same receipts and no kill.
"""

from __future__ import annotations

from pathlib import Path

from tests.e2e.trust_chaos import run


def test_credits_are_those_of_a_coordinator_that_nobody_killed(tmp_path: Path) -> None:
    report = run(tmp_path, kills=6, rounds=96, seed=1, say=lambda text: None)
    assert report.kills == 6
    kinds = {key[0] for key in report.book}
    assert kinds == {"work", "dispute"}
