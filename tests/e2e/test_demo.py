"""The demo as people run it: interrupted, gone on with, a peer killed under it, and summed up."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from coordinator.monitor.local import status_of_directory
from coordinator.rundir import RunDir
from protocol.errors import ConfigError, StorageError
from tests.e2e.processes import Command, wait_for
from tests.e2e.reference import ask_plain_loop, heldout_spec

pytestmark = pytest.mark.timeout(240)

ROUNDS = 50  # at five a second, time for the replacement of the killed peer to join
PATIENCE_S = 90.0


class Sittings:
    """One demo, started again and again with the same flags."""

    def __init__(self, folder: Path, corpus: Path) -> None:
        self.directory = folder / "demo"
        self._folder = folder
        self._flags = ["demo", "--preset", "tiny", "--corpus", str(corpus), "--rounds", str(ROUNDS)]
        self._flags += ["--peers", "3", "--stages", "2", "--dir", str(self.directory), "--json"]
        self._flags += ["--set", "batch.eval_every=25", "--set", "keeping.checkpoint_every=5"]

    def start(self) -> Command:
        return Command("coordinator", self._flags, name="demo", folder=self._folder)

    def closed_rounds(self) -> int:
        try:
            closed: int = status_of_directory(self.directory)["rounds_closed"]
        except (ConfigError, StorageError):  # the coordinator has not made it yet, or is just making it
            return 0
        return closed


@pytest.mark.long
def test_a_demo_is_interrupted_and_goes_on_to_its_summary(tmp_path: Path, corpus: Path) -> None:
    """Oracles: exit codes, the process table, and transformers on the exported model."""
    sittings = Sittings(tmp_path, corpus)
    demo = sittings.start()
    try:
        _wait(demo, lambda: sittings.closed_rounds() >= 3)
        children = psutil.Process(demo.pid).children(recursive=True)
        demo.send(signal.SIGINT)
        assert demo.wait_end(timeout_s=30.0) == 130, demo.story()
        assert "to go on: coordinator demo --dir" in demo.err.read_text(encoding="utf-8")
        assert not psutil.wait_procs(children, timeout=5.0)[1]
        closed = sittings.closed_rounds()
        assert 3 <= closed < ROUNDS

        demo = sittings.start()
        _wait(demo, lambda: sittings.closed_rounds() >= closed + 1)
        victim = _peers_of(demo)[-1]
        os.kill(victim.pid, signal.SIGKILL)
        assert demo.wait_end(timeout_s=PATIENCE_S) == 0, demo.story()
        _check_summary(json.loads(demo.stdout().split("\n")[-1]), sittings.directory, tmp_path)

        demo = sittings.start()
        assert demo.wait_end(timeout_s=30.0) == 3, demo.story()
    finally:
        demo.end()


def _check_summary(answer: dict[str, Any], directory: Path, folder: Path) -> None:
    assert (answer["schema"], answer["ok"]) == ("coordinator.demo/1", True)
    data, run = answer["data"], RunDir.open(directory)
    assert data["rounds"] == ROUNDS
    assert data["tokens"] == ROUNDS * run.manifest.batch.tokens_per_round
    assert (data["tasks_lost"], data["peers_killed"]) == (0, 1)
    assert data["loss_last"] < data["loss_first"]
    assert data["hops"] >= data["tasks_done"] // 2, "few of the tasks have crossed processes"
    assert len(data["stages"]) == 2
    (plain,) = ask_plain_loop(folder, heldout_spec(run, Path(data["export_dir"])))
    assert data["heldout_loss"] == pytest.approx(plain["heldout_loss"], abs=1e-3)


def _peers_of(demo: Command) -> list[psutil.Process]:
    """Return the demo's peer processes, in the order in which they were started."""
    found = [child for child in psutil.Process(demo.pid).children() if "peer.cli" in child.cmdline()]
    return sorted(found, key=lambda child: child.create_time())


def _wait(demo: Command, condition: Callable[[], bool]) -> None:
    wait_for(condition, demo, timeout_s=PATIENCE_S)
