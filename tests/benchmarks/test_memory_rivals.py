"""The rivals of the memory engine train what the yardstick trains, and one that breaks down is reported as that.

Oracles: plain PyTorch with 32-bit AdamW from the same weights, a child whose end the test knows.
"""

from __future__ import annotations

import sys
import textwrap
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.benchmarks import memory_rivals
from tests.benchmarks.memory import QUICK, Bench
from tests.benchmarks.memory_processes import Child, ReportedClock, Steps
from tests.benchmarks.memory_rivals import RIVALS, Rival, RivalError

TINY = replace(QUICK, hidden=64, ffn=128, heads=4, kv_heads=2, layers=3, microbatches=2, batch=2, length=16)
SAME_TRAINING = [rival for rival in RIVALS if rival.name in ("fsdp2", "deepspeed")]

ONE_STEP = """
    import sys
    sys.stdin.readline()
    print('{"wall_s": 0.5, "cpu_s": 2.0, "stalled_s": 0.0}', flush=True)
    sys.stdin.readline()
    print("starting", file=sys.stderr)
    assert False, "not enough buffers"
"""


@pytest.fixture(autouse=True)
def one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """Threads that wait for each other are slow where tests run side by side."""
    monkeypatch.setattr(memory_rivals, "THREADS", 1)


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.parametrize("rival", SAME_TRAINING, ids=lambda rival: rival.name)
def test_a_rival_trains_like_the_yardstick(rival: Rival, tmp_path: Path) -> None:
    """Oracle: the yardstick with torch's AdamW. Outputs of the third step show two updates, in every layer."""
    if not rival.is_installed:
        pytest.skip(f"{rival.needs} is not installed")
    bench = Bench(TINY, tmp_path)
    with bench.plain(optimizer="adamw32") as plain:
        plain.ask("save", path=str(tmp_path / "weights"))
        train(plain, tmp_path / "plain")
    with memory_rivals._started(rival, bench, weights=str(tmp_path / "weights")) as child:
        train(child, tmp_path / "rival")
    for number in (1, 2, 3):
        ours, expected = load_file(tmp_path / f"rival.{number}"), load_file(tmp_path / f"plain.{number}")
        assert ours.keys() == expected.keys()
        for name, tensor in expected.items():
            torch.testing.assert_close(ours[name], tensor, rtol=1e-4, atol=1e-6)


def train(child: Child, to: Path) -> None:
    """Take three steps on the same microbatches, so that outputs differ by the updates alone."""
    for number in (1, 2, 3):
        child.ask("step", number=0, save=f"{to}.{number}", **TINY.wave)


def test_a_rival_that_fails_says_how_far_it_came() -> None:
    """Oracle: a child that takes one step and ends with an assertion."""
    rival = Rival("one", "One step", offloads=True)
    with Child([sys.executable, "-c", textwrap.dedent(ONE_STEP)]) as child:
        steps = memory_rivals._blaming(rival, Steps(child, ReportedClock(), TINY.wave))
        assert steps() == 0.5
        with pytest.raises(RivalError) as caught:
            steps()
    assert str(caught.value) == "One step: took 1 step(s), then: AssertionError: not enough buffers"
