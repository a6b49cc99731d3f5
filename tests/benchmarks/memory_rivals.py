"""The memory engine against what a user would pick instead: the same stage and microbatches, on the same machine.

Rivals: PyTorch with checkpointing and `bitsandbytes.optim.AdamW8bit` (the yardstick of `memory.py`, which offloads
nothing), FSDP2 with `CPUOffloadPolicy`, DeepSpeed ZeRO-3 with CPU offload and with NVMe offload on its CPU accelerator.
Ours is there three times: state on NVMe and in host memory with 8-bit moments, and in host memory with 32-bit moments,
which is what FSDP2 and DeepSpeed keep when they offload. Each side is a fresh process, all take their steps in turn.

The bars are those of issue 3: ours (on NVMe) is ahead of every rival in peak RSS, and (in host memory, with the same
moments) in time of every one that offloads. A rival that is not installed has a row that says so.

FSDP2 comes with torch. DeepSpeed wants an environment of its own, a C++ compiler and, for NVMe, libaio's headers:

    .venv/bin/python -m venv /tmp/deepspeed
    echo "$PWD/.venv/lib/python3.11/site-packages" > /tmp/deepspeed/lib/python3.11/site-packages/handcar.pth
    /tmp/deepspeed/bin/pip install setuptools wheel ninja packaging py-cpuinfo hjson msgpack pydantic tqdm einops
    DS_BUILD_OPS=0 /tmp/deepspeed/bin/pip install --no-build-isolation deepspeed==0.19.8
    apt-get install libaio-dev
    DS_ACCELERATOR=cpu /tmp/deepspeed/bin/python -c "from deepspeed.accelerator import get_accelerator
    for name in 'CPUAdamBuilder', 'AsyncIOBuilder': get_accelerator().create_op_builder(name).load()"
    HANDCAR_DEEPSPEED=/tmp/deepspeed/bin/python make bench-memory_rivals

The last but one compiles for minutes; with another `ninja` on the PATH everything is compiled again. A compilation that
is killed leaves a file `lock` below `~/.cache/torch_extensions` for which all later ones wait, silently: remove it.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.benchmarks.commands import CommandError
from tests.benchmarks.harness import Options, Row, compare, figure, measure_pairs, run
from tests.benchmarks.memory import FULL, MIB, QUICK, SLACK, STAGE, THREADS, Bench, Size
from tests.benchmarks.memory_processes import ROOT, Child, Steps

DEEPSPEED_PYTHON = os.environ.get("HANDCAR_DEEPSPEED", sys.executable)
REPEATS = 5
COMPILING_TIMEOUT_S = 1200.0


class RivalError(Exception):
    """A rival that does not get as far as a comparison."""


@dataclass(frozen=True, slots=True)
class Rival:
    """What is compared with; `name` is that of `memory_rival_child.py`."""

    name: str
    title: str
    offloads: bool
    python: str = sys.executable
    needs: str = "torch"

    @property
    def is_installed(self) -> bool:
        code = f"import importlib.util, sys; sys.exit(importlib.util.find_spec({self.needs!r}) is None)"
        return subprocess.run([self.python, "-c", code], capture_output=True, timeout=60).returncode == 0


RIVALS = (
    Rival("plain", "torch checkpointing and bitsandbytes AdamW8bit", offloads=False),
    Rival("fsdp2", "FSDP2 CPUOffloadPolicy, fused AdamW", offloads=True),
    Rival("deepspeed", "DeepSpeed ZeRO-3, CPU offload", offloads=True, python=DEEPSPEED_PYTHON, needs="deepspeed"),
    Rival("deepspeed_nvme", "DeepSpeed ZeRO-3, NVMe", offloads=True, python=DEEPSPEED_PYTHON, needs="deepspeed"),
)


@dataclass(frozen=True, slots=True)
class Own:
    """One way of ours to run the stage."""

    tier: str
    optimizer: str


OWN = {
    "nvme": Own("nvme", "adamw8bit"),
    "host": Own("host", "adamw8bit"),
    "host32": Own("host", "adamw32"),
}


def measure(options: Options) -> Iterator[Row]:
    """Set each rival against ours, one rival at a time: together they would not fit this machine."""
    size = QUICK if options.quick else FULL
    with tempfile.TemporaryDirectory(prefix="handcar-bench-") as name:
        bench = Bench(size, Path(name), repeats=options.repeats_or(quick=REPEATS, full=REPEATS))
        for rival in RIVALS:
            if options.wants(*(f"{rival.name}_{row}" for row in ("rss", *OWN))):
                yield from _against(bench, rival)


def _against(bench: Bench, rival: Rival) -> Iterator[Row]:
    if not rival.is_installed:
        yield figure(f"{rival.name}_rss", 0, unit="MiB", note="not run: not installed")
        return
    try:
        with _started(rival, bench) as child:
            theirs = _blaming(rival, Steps(child, bench.clock, bench.size.wave))
            for _ in range(2):  # compiles, allocates
                theirs()
            yield from _rows(bench, rival, child, theirs)
    except RivalError as error:
        yield figure(f"{rival.name}_rss", 0, unit="MiB", note=str(error))


def _blaming(rival: Rival, steps: Steps) -> Callable[[], float]:
    """Return the rival's steps; one that fails is its result, while one of ours would be an error."""

    def once() -> float:
        try:
            return steps()
        except CommandError as error:
            raise _failed(rival, f"took {steps.number - 1} step(s)", error) from error

    return once


def _failed(rival: Rival, how_far: str, error: CommandError) -> RivalError:
    return RivalError(f"{rival.title}: {how_far}, then: {_last_line(str(error))}")


def _rows(bench: Bench, rival: Rival, child: Child, theirs: Callable[[], float]) -> Iterator[Row]:
    moved: dict[str, tuple[float, float]] = {}
    rss: dict[str, float] = {}
    for name, own in OWN.items():
        with bench.ours(own.tier, optimizer=own.optimizer) as ours:
            steps = bench.steps(ours)
            steps()
            before = ours.ask("io")
            pairs = measure_pairs(steps, theirs, repeats=bench.repeats, warmup=1, clock=bench.clock)
            moved[name] = _moved(before, ours.ask("io"), bench.repeats + 1, bench.size)
            rss[name] = ours.ask("memory")["peak_rss"] / MIB
        # whoever offloads keeps 32-bit moments, whose step is 20 times as fast on a processor
        judged = rival.offloads and name == "host32"
        note = f"{rival.title}, against ours: state in {own.tier}, {own.optimizer}; peak RSS {rss[name]:.0f} MiB"
        row = f"{rival.name}_{name}"
        yield compare(row, pairs, unit="s", bar="< 1" if judged else None, slack=SLACK if judged else None, note=note)
    before = child.ask("io")
    theirs()
    read, written = _moved(before, child.ask("io"), 1, bench.size)
    their_rss = child.ask("memory")["peak_rss"] / MIB
    own_read, own_written = moved["nvme"]
    note = (
        f"peak of a fresh process, ours with its state on NVMe; ours reads {own_read:.2f} and writes {own_written:.2f} "
        f"bytes per parameter and step, the rival {read:.2f} and {written:.2f}"
    )
    yield figure(f"{rival.name}_rss", rss["nvme"], their_rss, unit="MiB", bar="< 1", note=note)


@contextlib.contextmanager
def _started(rival: Rival, bench: Bench, **options: Any) -> Iterator[Child]:
    argv = (rival.python, "-m", "tests.benchmarks.memory_rival_child", rival.name)
    environment = {"OMP_NUM_THREADS": str(THREADS), "PYTHONPATH": str(ROOT)}
    with (
        tempfile.TemporaryDirectory(dir=bench.folder) as temporary,
        Child(argv, env={**environment, "TMPDIR": temporary}, timeout_s=COMPILING_TIMEOUT_S) as child,
    ):
        size = bench.size
        try:
            child.build(
                config=size.config,
                first_layer=size.layers * STAGE,
                num_layers=size.layers,
                threads=THREADS,
                **options,
            )
        except CommandError as error:
            raise _failed(rival, "not built", error) from error
        yield child


def _moved(before: dict[str, int], after: dict[str, int], steps: int, size: Size) -> tuple[float, float]:
    """Return bytes read and written per parameter and step."""
    read, written = (
        (after[direction] - before[direction]) / steps / size.parameters for direction in ("read", "written")
    )
    return read, written


def _last_line(text: str) -> str:
    return text.strip().splitlines()[-1]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark."""
    return run("memory: ours against other ways to offload", measure, argv)


if __name__ == "__main__":
    sys.exit(main())
