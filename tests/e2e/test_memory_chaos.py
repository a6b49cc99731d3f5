"""Training with its state on disk survives kill -9: three of the hundred kills of `make chaos-memory`.

Oracle: the state digests of an undisturbed run in memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.e2e.memory_chaos import Undisturbed, run


@pytest.fixture
def _one_thread() -> Iterator[None]:
    """Let the undisturbed run add up in the order of the killed ones."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("_one_thread")
def test_every_kill_leaves_one_whole_version(tmp_path: Path) -> None:
    said: list[str] = []
    report = run(tmp_path, kills=3, seed=7, undisturbed=Undisturbed(), say=said.append)
    assert (report.kills, len(said)) == (3, 3)
    assert report.versions > 0, "nothing was committed: the lives are too short"
