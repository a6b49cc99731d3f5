"""Kill -9 a process that trains with its state on disk, again and again, and look at what each kill has left.

    python -m tests.e2e.memory_chaos [--kills 100] [--seed 0]        (make chaos-memory)

Every life continues from what the one before it left and trains on, committing every version. After each kill the
store is opened again: it has to hold one version, whole, and bit-equal to that version of an undisturbed run in memory.
The moments of the kills are drawn uniformly over a life, so that they hit reading, computing, stepping, writing and
committing in proportion to the time these take; the report counts what was under way.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch

from peer.engine.local_checkpoint import LocalCheckpoint, Standing
from peer.engine.optimizer import OptimizerSpec
from peer.engine.stage_engine import StageEngine
from peer.memory.backend import CpuBackend
from peer.memory.executor import Executor, open_memory
from peer.memory.placement import Placement, Slots, Tier, all_on_device
from peer.memory.units import Inventory, Section
from peer.model.stage import build_stage
from protocol.architecture import preset
from protocol.ids import Digest, Lineage, RoundId, StageId, Version
from tests.e2e.processes import PRELOADED, stop_server

CONFIG = {**preset("tiny"), "hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 9}
NUM_STAGES, STAGE = 3, StageId(1)  # three layers of 210,000 parameters
MICROBATCHES = 2
LIFE_S = (0.05, 0.6)  # from the first version of a life on
START_TIMEOUT_S = 60.0
LINEAGE = Lineage(bytes(32))


@dataclass(slots=True)
class Report:
    """What the kills have hit."""

    kills: int = 0
    versions: int = 0
    under_way: Counter[str] = field(default_factory=Counter)


def placement(inventory: Inventory) -> Placement:
    """Everything on disk but one layer's weights on the device and one layer's moments in host memory."""
    homes = {unit: Tier.NVME for section in Section for unit in inventory.units(section)}
    homes |= dict.fromkeys(inventory.block_units(0, Section.WEIGHTS), Tier.DEVICE)
    homes |= dict.fromkeys(inventory.block_units(1, Section.MOMENTS), Tier.HOST)
    return Placement(homes=homes, slots=Slots(weights=1, gradient=1, moments=1))


class Trainer:
    """One stage in training; the batches of a version depend on its number alone."""

    def __init__(self, nvme: Path | None) -> None:
        stage = build_stage(CONFIG, num_stages=NUM_STAGES, stage=STAGE)
        spec = OptimizerSpec()
        inventory = Inventory(stage.layouts, spec.name)
        self.memory: Executor = open_memory(
            inventory,
            placement(inventory) if nvme else all_on_device(inventory),
            CpuBackend(),
            nvme=nvme,
            fingerprint="chaos",
        )
        self.engine = StageEngine(stage, spec, self.memory)
        self.checkpoint = LocalCheckpoint(self.memory, {STAGE: self.engine})
        self.resumed = self.checkpoint.recover()
        if not self.resumed:
            self.engine.initialise(seed=1)

    def train(self, doing: Callable[[int, str], object] = lambda version, what: None) -> None:
        """Take the present version to the next one and commit it."""
        version = self.engine.version
        doing(version, "forward")
        passed = self.engine.forward_wave([_draw(version, number) for number in range(MICROBATCHES)])
        doing(version, "backward")
        self.engine.backward_wave([(ticket, _draw(version, 10 + i)) for i, (_, ticket) in enumerate(passed)])
        doing(version, "step")
        self.engine.step(1e-3, scale=1 / 64)
        doing(version, "commit")
        self.checkpoint.note(STAGE, Standing(self.engine.version, RoundId(self.engine.version), LINEAGE))
        self.checkpoint.commit()


class Undisturbed:
    """The digests of an undisturbed run, as far as somebody has asked."""

    def __init__(self) -> None:
        self._trainer = Trainer(None)
        self._digests = [self._trainer.engine.state_digest()]

    def digest(self, version: Version) -> Digest:
        while len(self._digests) <= version:
            self._trainer.train()
            self._digests.append(self._trainer.engine.state_digest())
        return self._digests[version]


def live(folder: str, diary: str) -> None:
    """Train until killed; note in the diary what is under way. Runs in a process of its own."""
    torch.set_num_threads(1)
    with open(diary, "ab", buffering=0) as file:
        trainer = Trainer(Path(folder))
        while True:
            trainer.train(lambda version, what: file.write(f"{version} {what}\n".encode()))


def run(folder: Path, *, kills: int, seed: int, undisturbed: Undisturbed, say: Callable[[str], None]) -> Report:
    """Do it `kills` times; raises `AssertionError` at the first state that is not what it should be."""
    dice, report = random.Random(seed), Report()
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    store, reached = folder / "store", 0
    for kill in range(kills):
        diary = folder / "diary"
        diary.unlink(missing_ok=True)
        child = context.Process(target=live, args=(str(store), str(diary)))
        child.start()
        try:
            _wait_begun(diary, child)
            time.sleep(dice.uniform(*LIFE_S))
        finally:
            assert child.pid is not None
            os.kill(child.pid, signal.SIGKILL)
            child.join()
        assert child.exitcode == -signal.SIGKILL, f"the process ended by itself ({child.exitcode})"
        last = diary.read_text().split("\n")[-2].split()
        found = _look(store, undisturbed)
        assert reached <= found, f"version {reached} had been committed, and now it is {found}"
        assert found in (int(last[0]), int(last[0]) + 1), f"killed in version {last[0]}, found {found}"
        reached = found
        report.kills += 1
        report.under_way[last[1]] += 1
        report.versions = reached
        say(f"kill {kill + 1}: during {last[1]} of version {last[0]}; version {found} is there, whole")
    return report


def _look(store: Path, undisturbed: Undisturbed) -> int:
    trainer = Trainer(store)
    try:
        if not trainer.resumed:
            return 0
        version = trainer.engine.version
        assert trainer.engine.state_digest() == undisturbed.digest(version), f"version {version} is not what it was"
        return version
    finally:
        trainer.memory.close()


def _wait_begun(diary: Path, child: multiprocessing.process.BaseProcess) -> None:
    deadline_s = time.monotonic() + START_TIMEOUT_S
    while not (diary.exists() and b"\n" in diary.read_bytes()):
        assert child.is_alive(), f"the process ended by itself ({child.exitcode})"
        assert time.monotonic() < deadline_s, "the process does not begin to train"
        time.sleep(0.01)


def _draw(version: int, number: int) -> torch.Tensor:
    return torch.randn(2, 16, 128, generator=torch.Generator().manual_seed(100 * version + number))


def main() -> int:
    """Run it from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="handcar-chaos-") as name:
        report = run(Path(name), kills=options.kills, seed=options.seed, undisturbed=Undisturbed(), say=print)
    stop_server()
    print(f"{report.kills} kills, version {report.versions} reached, all states whole; during {dict(report.under_way)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
