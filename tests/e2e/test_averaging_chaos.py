"""A stage survives members that are killed at any moment of an averaging: two of the kills of `make chaos-averaging`.

Oracle: each other's hashes of anchor and velocity, at every version.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.e2e.averaging_chaos import run

pytestmark = pytest.mark.timeout(240)


def test_no_replica_is_ever_averaged_in_part(tmp_path: Path) -> None:
    report = run(tmp_path / "swarm", kills=2, seed=3, say=lambda text: None)
    assert report.kills == 2
    assert report.versions > 2
