"""The processes that `memory.py` compares: started, asked, timed and ended.

Owns: one child's life, the lines that go to and fro, deadlines, and the kernel's memory cap around a child. Must not
know: what the children compute.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from tests.benchmarks.commands import CommandError, end_session, tail
from tests.benchmarks.harness import Run

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
PLAIN = (sys.executable, "-I", HERE / "memory_plain.py")
OURS = (sys.executable, "-m", "tests.benchmarks.memory_child")

REQUEST_TIMEOUT_S = 600.0


class ReportedClock:
    """Time for the harness, with the CPU time that the children say they used: they live on, so nobody else knows."""

    def __init__(self) -> None:
        self._spent_s = 0.0

    def wall_s(self) -> float:
        return time.perf_counter()

    def cpu_s(self) -> float:
        return self._spent_s

    def add(self, cpu_s: float) -> None:
        self._spent_s += cpu_s


class Child:
    """A process that answers one line of JSON with one."""

    def __init__(
        self, argv: Sequence[str | Path], *, env: Mapping[str, str] | None = None, timeout_s: float = REQUEST_TIMEOUT_S
    ) -> None:
        """`env` is added to the environment of this process."""
        self._timeout_s = timeout_s
        self._stderr = tempfile.TemporaryFile()  # noqa: SIM115 - `close` does
        self._process = subprocess.Popen(
            [str(word) for word in argv],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._stderr,
            bufsize=0,
            cwd=ROOT,
            env={**os.environ, **(env or {})},
            start_new_session=True,
        )
        self._unread = b""
        self.built: dict[str, Any] = {}
        """What the child has said when it was told to build its side."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def ask(self, do: str, **fields: Any) -> dict[str, Any]:
        """Ask for something and wait for the answer; raises `CommandError` if there is none."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # why it has ended is said below
            self._process.stdin.write(json.dumps({"do": do, **fields}).encode() + b"\n")
        answer: dict[str, Any] = json.loads(self._line(do))
        return answer

    def build(self, **spec: Any) -> None:
        self.built = self.ask("build", **spec)

    def close(self) -> None:
        end_session(self._process)
        for stream in (self._process.stdin, self._process.stdout, self._stderr):
            if stream is not None:
                stream.close()

    def _line(self, do: str) -> bytes:
        assert self._process.stdout is not None
        deadline_s = time.monotonic() + self._timeout_s
        while b"\n" not in self._unread:
            ready, _, _ = select.select([self._process.stdout], [], [], max(0.0, deadline_s - time.monotonic()))
            if not ready:
                raise CommandError(f"no answer to '{do}' within {self._timeout_s:g} s: {tail(self._stderr)}")
            some = os.read(self._process.stdout.fileno(), 1 << 16)
            if not some:
                code = self._process.wait()
                raise CommandError(f"the child ended with {code} at '{do}': {tail(self._stderr)}")
            self._unread += some
        line, _, self._unread = self._unread.partition(b"\n")
        return line


@dataclass(slots=True)
class Steps:
    """Steps of one child, one after the other on fresh numbers, for `measure_pairs`."""

    child: Child
    clock: ReportedClock
    which: Mapping[str, int]
    """Of every step: microbatches, batch, length."""
    number: int = 0
    stalled_s: float = 0.0
    """Of the last step."""

    def __call__(self) -> float:
        self.number += 1
        answer = self.child.ask("step", number=self.number, **self.which)
        self.clock.add(answer["cpu_s"])
        self.stalled_s = answer["stalled_s"]
        wall_s: float = answer["wall_s"]
        return wall_s


def as_run(steps: Steps) -> Run:
    """Return steps as the harness wants them."""
    return steps


@dataclass(frozen=True, slots=True)
class MemoryCap:
    """A control group of the kernel that holds processes to some memory, without swap."""

    folder: Path

    @property
    def wrapper(self) -> tuple[str, ...]:
        """Return the words to put before a command that is to run under the cap."""
        return ("sh", "-c", f'echo $$ > "{self.folder}/cgroup.procs" && exec "$@"', "sh")

    def peak_bytes(self) -> int:
        """Return the most that the group has held, page cache included."""
        for name in ("memory.max_usage_in_bytes", "memory.peak"):
            path = self.folder / name
            if path.exists():
                return int(path.read_text(encoding="ascii"))
        return 0


@contextlib.contextmanager
def memory_cap(num_bytes: int) -> Iterator[MemoryCap]:
    """Make a control group below this process's own, of version 1 or 2; raises `OSError` where that cannot be."""
    parent = _memory_group()
    folder = parent / f"handcar-bench-{os.getpid()}"
    folder.mkdir()
    try:
        if (folder / "memory.limit_in_bytes").exists():
            _write(folder / "memory.limit_in_bytes", num_bytes)
            if (folder / "memory.memsw.limit_in_bytes").exists():  # memory and swap together
                _write(folder / "memory.memsw.limit_in_bytes", num_bytes)
            _write(folder / "memory.swappiness", 0)
        else:
            _write(folder / "memory.max", num_bytes)
            _write(folder / "memory.swap.max", 0)
        yield MemoryCap(folder)
    finally:
        _remove(folder)


def _memory_group() -> Path:
    """Return the folder of this process's own group in the memory controller."""
    points: dict[str, Path] = {}
    for line in Path("/proc/self/mounts").read_text(encoding="utf-8").splitlines():
        _, point, kind, options, *_ = line.split()
        if kind == "cgroup2" or (kind == "cgroup" and "memory" in options.split(",")):
            points[kind] = Path(point)
    for line in Path("/proc/self/cgroup").read_text(encoding="utf-8").splitlines():
        _, controllers, path = line.split(":", 2)
        if "memory" in controllers.split(",") and "cgroup" in points:
            return points["cgroup"] / path.lstrip("/")
    for line in Path("/proc/self/cgroup").read_text(encoding="utf-8").splitlines():
        number, controllers, path = line.split(":", 2)
        if number == "0" and not controllers and "cgroup2" in points:
            return points["cgroup2"] / path.lstrip("/")
    raise FileNotFoundError("the kernel's memory controller is not mounted")


def _write(path: Path, value: int) -> None:
    path.write_text(str(value), encoding="ascii")


def _remove(folder: Path) -> None:
    """Remove a group. The kernel needs a moment to see the last process go."""
    for _ in range(50):
        try:
            folder.rmdir()
            return
        except OSError:
            time.sleep(0.1)
    folder.rmdir()
