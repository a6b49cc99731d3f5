"""The runs behind `optimizer_loss` are the swarm's, and the row says what they came to.

Oracles: transformers' own model in plain PyTorch from the same initial weights, arithmetic by hand.
"""

from __future__ import annotations

import sysconfig
from pathlib import Path

import pytest

from coordinator.init import init_run
from coordinator.rundir import RunDir
from protocol.manifest import OptimizerName
from tests.benchmarks import memory_loss
from tests.benchmarks.harness import Options
from tests.e2e.reference import ask_plain_loop, training_spec


@pytest.mark.slow
def test_a_run_in_one_process_ends_like_plain_pytorch(tmp_path: Path) -> None:
    """Oracle: `plain_loop.py` with torch's AdamW. The run's own optimizer is the other one, so names do count."""
    corpus = [Path(sysconfig.get_path("stdlib")) / "json"]
    init_run(tmp_path / "run", preset="tiny", seed=5, corpus=corpus, overrides={"optimizer.name": "adamw8bit"})
    run = RunDir.open(tmp_path / "run")
    (plain,) = ask_plain_loop(tmp_path, training_spec(run, tmp_path / "model"))
    exact = memory_loss.train(run, OptimizerName.ADAMW32)
    eight_bit = memory_loss.train(run, OptimizerName.ADAMW8BIT)
    assert exact == pytest.approx(plain["heldout_loss"], rel=1e-5)
    assert eight_bit != exact
    assert eight_bit == pytest.approx(exact, rel=0.01)


def test_the_row_is_the_mean_of_the_ratios(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Oracle: ratios 1.01, 0.99 and 1.006 have the mean 1.002; the first alone misses the bar."""
    losses = {0: (5.05, 5.0), 1: (3.96, 4.0), 2: (2.012, 2.0)}
    monkeypatch.setattr(memory_loss, "_losses", lambda folder, seed: losses[seed])
    (row,) = memory_loss.optimizer_loss(tmp_path, Options())
    assert (row.row, row.holds) == ("optimizer_loss", True)
    assert row.ours.median == pytest.approx(0.002)
    assert "5.0500 against 5.0000, 3.9600 against 4.0000, 2.0120 against 2.0000" in row.note
    (quick,) = memory_loss.optimizer_loss(tmp_path, Options(quick=True))
    assert quick.ours.median == pytest.approx(0.01)
    assert (quick.holds, "1 seed" in quick.note) == (False, True)
    assert list(memory_loss.optimizer_loss(tmp_path, Options(only=frozenset({"host"})))) == []
