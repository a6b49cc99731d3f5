"""How fast our all-reduce is beside hivemind's, and how much memory it takes: the rows `allreduce_*` of `averaging.py`.

Members are processes with a p2pd each, on loopback; both sides are alive all the time and take turns. A step's time is
that of its slowest member, from the group that is known to fp32 values at hand: ours has decoded its result, hivemind's
averager has applied its differences. Matchmaking is not timed. Members that share cores with all others compute with
one thread each.

`allreduce_memory` is the most that a process's anonymous memory grows while it reduces, in shards: inputs and the
place for the decoded result are there before, and what has gone into the file of the result is the kernel's to drop.

Owns: the members of a step, and what is said of them. `averaging_allreduce_child.py` is one member.
"""

from __future__ import annotations

import secrets
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from statistics import median
from typing import Any

from protocol.layout import SHARD_ELEMENTS
from tests.benchmarks.harness import Options, Row, compare, figure, measure_pairs
from tests.benchmarks.memory_processes import Child, ReportedClock

ELEMENTS = 25_000_000  # 100 MB of fp32
QUICK_ELEMENTS = 5_000_000
THREADS = 1
TIMED = {"allreduce_2": 2, "allreduce_4": 4}
TIME_BAR = "<= 1.00"
MEMORY_MEMBERS = 4
MEMORY_BAR = "<= 2.00"
SHARD_BYTES = 4 * SHARD_ELEMENTS


class Members:
    """The members of one side."""

    def __init__(self, children: list[Child], pool: ThreadPoolExecutor, clock: ReportedClock) -> None:
        self._children, self._pool, self._clock = children, pool, clock
        self.cpu_s: list[float] = []
        """Of all members together, in every step."""
        self.peers: list[str] = []
        self.begun: list[list[float]] = []
        """The first and the last of the values that each member has before."""
        addresses: list[str] = []
        for child in children:  # one after the other: everybody knows the first
            met = child.ask("meet", peers=addresses, members=len(children))
            addresses = addresses or met["addresses"]
            self.peers.append(met["peer"])
            self.begun.append(met["begun"])

    def __call__(self) -> float:
        """Reduce once; return the time of the slowest."""
        return float(max(answer["wall_s"] for answer in self.step()))

    def step(self, **how: Any) -> list[dict[str, Any]]:
        """Reduce once, all at the same time."""
        asked = dict(how, group=secrets.token_hex(8), members=self.peers)
        answers = list(self._pool.map(lambda child: child.ask("step", **asked), self._children))
        if min(answer["wall_s"] for answer in answers) <= 0:
            raise RuntimeError(f"a member did not reduce: {answers}")
        self.cpu_s.append(sum(answer["cpu_s"] for answer in answers))
        self._clock.add(self.cpu_s[-1])
        return answers


def allreduces(options: Options) -> Iterator[Row]:
    """Time both sides in pairs for each size of group, then look at our memory."""
    elements = QUICK_ELEMENTS if options.quick else ELEMENTS
    for row, num_members in TIMED.items():
        if options.wants(row):
            yield timed(row, num_members, elements, repeats=options.repeats_or(quick=2, full=7))
    if options.wants("allreduce_memory"):
        yield memory(elements)


def timed(row: str, num_members: int, elements: int, *, repeats: int) -> Row:
    """Reduce so many values with either side, in turn."""
    clock = ReportedClock()
    with ExitStack() as stack:
        ours, theirs = (
            stack.enter_context(members(side, num_members, elements, clock)) for side in ("ours", "hivemind")
        )
        pairs = measure_pairs(ours, theirs, repeats=repeats, clock=clock)
    cpu = [median(side.cpu_s[1:]) for side in (ours, theirs)]
    note = (
        f"{4 * elements / 1e6:g} MB fp32, {num_members} members, {THREADS} thread each; "
        f"CPU time of all with their p2pd {cpu[0]:.2f} s, hivemind's with its matchmaking {cpu[1]:.2f} s"
    )
    return compare(row, pairs, unit="s", bar=TIME_BAR, note=note)


def memory(elements: int) -> Row:
    """Measure how much members grow, also with half as many values, and with shards that are read from a disk."""
    whole, half = grown_bytes(elements), grown_bytes(elements // 2)
    disk, more = (grown_bytes(factor * elements, from_disk=True) for factor in (1, 2))
    megabytes = 4 * elements / 1e6
    note = (
        f"growth of RssAnon at most while reducing, of {MEMORY_MEMBERS} members the largest: "
        f"{megabytes:g} MB {_mib(whole)}, {megabytes / 2:g} MB {_mib(half)}; "
        f"with shards read from a disk {megabytes:g} MB {_mib(disk)}, {2 * megabytes:g} MB {_mib(more)}"
    )
    return figure(
        "allreduce_memory",
        max(whole, half) / SHARD_BYTES,
        unit=f"shards of {SHARD_BYTES >> 20} MiB",
        bar=MEMORY_BAR,
        note=note,
    )


def grown_bytes(elements: int, *, from_disk: bool = False) -> int:
    """Reduce once in fresh processes, and return by how much the one that grew most did."""
    with members("ours", MEMORY_MEMBERS, elements, ReportedClock()) as ours:
        return max(int(answer["grown_bytes"]) for answer in ours.step(measure=True, from_disk=from_disk))


@contextmanager
def members(side: str, number: int, elements: int, clock: ReportedClock) -> Iterator[Members]:
    """Start the members of a side, and end them."""
    command = (sys.executable, "-m", "tests.benchmarks.averaging_allreduce_child")
    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="handcar-bench-"))
        argv = (*command, side, str(elements), folder)
        pool = stack.enter_context(ThreadPoolExecutor(number))
        env = {"OMP_NUM_THREADS": str(THREADS), "TMPDIR": folder}  # hivemind's processes leave something behind
        children = [stack.enter_context(Child(argv, env=env)) for _ in range(number)]
        yield Members(children, pool, clock)
        for child in children:  # killed, they would leave sockets and shared memory behind
            child.ask("close")


def _mib(num_bytes: int) -> str:
    return f"{num_bytes / (1 << 20):.0f} MiB"
