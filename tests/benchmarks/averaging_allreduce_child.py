"""One member of an all-reduce for `averaging_allreduce.py`: ours, or hivemind's averager as it ships.

Run as `python -m tests.benchmarks.averaging_allreduce_child SIDE ELEMENTS FOLDER`, one process per member.
Answers one line of JSON with one. Both sides have a p2pd of their own, shards of the same lengths, and time the same:
from the group that is known to the fp32 values that every member ends with.

Owns: what a member is, its clock, and how its memory is measured. Must not know: how many reduces, what is compared.
"""

from __future__ import annotations

import asyncio
import json
import multiprocessing
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import torch
from hivemind import DHT, DecentralizedAverager
from hivemind.compression import NoCompression
from hivemind.p2p import P2P
from torch import Tensor

from peer.averaging.group_reduce import GroupReduce
from peer.averaging.link import from_hivemind
from peer.averaging.reduce import ReduceGroup, Shards, decoded_parts, encoded_shard_bytes
from protocol.ids import PeerId
from protocol.layout import SHARD_ELEMENTS
from protocol.process import run_loop

NAME = "benchmark"
MATCHMAKING_S = 2.0  # not timed; a full group does not wait for its end
REQUEST_TIMEOUT_S = 1.5  # hivemind wants less than that
STEP_TIMEOUT_S = 120.0
SAMPLE_S = 0.002
TICKS_PER_S = os.sysconf("SC_CLK_TCK")


class Ours:
    """A member as peers have it: the result is put into a file while it comes in, and decoded from there."""

    def __init__(self, lengths: list[int], folder: Path) -> None:
        self._lengths, self._folder = lengths, folder
        self._inputs = _numbers(lengths)
        self._outputs = [torch.ones(length) for length in lengths]  # not zeros: those are no memory before a write

    async def meet(self, *, peers: list[str], members: int) -> dict[str, Any]:
        self._p2p = await P2P.create(initial_peers=peers)
        self._reduce = GroupReduce(self._p2p, namespace=NAME, folder=self._folder)
        await self._reduce.start()
        addresses = [str(address) for address in await self._p2p.get_visible_maddrs()]
        return {"peer": from_hivemind(self._p2p.peer_id), "addresses": addresses, "begun": _ends(self._inputs)}

    async def step(
        self, *, group: str, members: list[str], measure: bool = False, from_disk: bool = False
    ) -> dict[str, Any]:
        """Reduce, and decode. With `from_disk` neither inputs nor outputs are in memory."""
        wanted = ReduceGroup(group_id=bytes.fromhex(group), members=tuple(map(PeerId, members)), codec="fp32")
        shards = self._on_disk() if from_disk else Shards.of(self._inputs)
        outputs = [self._outputs[0]] * len(self._lengths) if from_disk else self._outputs
        with _peak_of_anonymous(is_wanted=measure) as peak:
            started_s = time.perf_counter()
            reduced = await self._reduce.reduce(wanted, shards)
            reduced_s = time.perf_counter()
            await asyncio.to_thread(_decode, reduced.data, self._lengths, outputs)
            ended_s = time.perf_counter()
        return {
            "wall_s": ended_s - started_s,
            "reduce_s": reduced_s - started_s,
            "ends": _ends(outputs),
            "grown_bytes": peak[0],
        }

    async def close(self) -> dict[str, Any]:
        await self._reduce.stop()
        await self._p2p.shutdown()
        return {}

    def _on_disk(self) -> Shards:
        """Write the inputs down and forget them, so that each shard is read when it is needed."""
        paths = []
        for number, values in enumerate(self._inputs):
            paths.append(self._folder / f"{os.getpid()}-{number}")
            values.numpy().tofile(paths[-1])
        self._inputs, self._outputs = [], [torch.ones(max(self._lengths))]
        return Shards(self._lengths, lambda number: torch.from_numpy(np.fromfile(paths[number], dtype=np.float32)))


class TimedAverager(DecentralizedAverager):  # type: ignore[misc]
    """hivemind's averager that times its all-reduce: what comes after matchmaking."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.took_s = multiprocessing.Value("d", 0.0)  # the averager is a fork of this process
        super().__init__(*args, **kwargs)

    async def _aggregate_with_group(self, *args: Any, **kwargs: Any) -> Any:
        started_s = time.perf_counter()
        gathered = await super()._aggregate_with_group(*args, **kwargs)
        self.took_s.value = time.perf_counter() - started_s
        return gathered


class Hivemind:
    """hivemind's `DecentralizedAverager` without compression: applies differences to its own tensors, in place."""

    def __init__(self, lengths: list[int]) -> None:
        self._tensors = _numbers(lengths)

    def meet(self, *, peers: list[str], members: int) -> dict[str, Any]:
        self._dht = DHT(initial_peers=peers, start=True)
        self._averager = TimedAverager(
            self._tensors,
            self._dht,
            start=True,
            prefix=NAME,
            target_group_size=members,
            min_group_size=members,
            min_matchmaking_time=MATCHMAKING_S,
            request_timeout=REQUEST_TIMEOUT_S,
            compression=NoCompression(),
        )
        addresses = [str(address) for address in self._dht.get_visible_maddrs()]
        return {"peer": str(self._dht.peer_id), "addresses": addresses, "begun": _ends(self._tensors)}

    def step(self, **_: Any) -> dict[str, Any]:
        # retries are of matchmaking: an all-reduce that fails leaves the time of the one before, or none
        self._averager.took_s.value = 0.0
        gathered = self._averager.step(timeout=STEP_TIMEOUT_S)
        with self._averager.get_tensors() as tensors:
            ends = _ends(tensors)
        return {"wall_s": self._averager.took_s.value, "members": len(gathered), "ends": ends}

    def close(self) -> dict[str, Any]:
        self._averager.shutdown()
        self._dht.shutdown()
        return {}


def shard_lengths(elements: int) -> list[int]:
    """Cut so many values into shards of 32 MiB, the last one shorter."""
    return [min(SHARD_ELEMENTS, elements - start) for start in range(0, elements, SHARD_ELEMENTS)]


def _numbers(lengths: list[int]) -> list[Tensor]:
    random = torch.Generator().manual_seed(os.getpid())
    return [torch.randn(length, generator=random) for length in lengths]


def _ends(tensors: Sequence[Tensor]) -> list[float]:
    """Return the first and the last value of all, to see that the right thing was done."""
    return [float(tensors[0][0]), float(tensors[-1][-1])]


def _decode(data: memoryview, lengths: list[int], outputs: list[Tensor]) -> None:
    offset = 0
    for length, out in zip(lengths, outputs, strict=True):
        size = encoded_shard_bytes("fp32", length)
        for part, values in decoded_parts("fp32", [data[offset : offset + size]], length):
            out[part].copy_(values)
        offset += size


@contextmanager
def _peak_of_anonymous(*, is_wanted: bool) -> Iterator[list[int]]:
    """Sample this process's anonymous memory; when the block is over, say in the list by how much it has grown at most.

    Pages of a file are none: the kernel drops them when it wants to.
    """
    grown = [0]
    if not is_wanted:
        yield grown
        return
    begin, over = _anonymous_bytes(), threading.Event()

    def sample() -> None:
        while not over.wait(SAMPLE_S):
            grown[0] = max(grown[0], _anonymous_bytes() - begin)

    sampler = threading.Thread(target=sample)
    sampler.start()
    try:
        yield grown
    finally:
        over.set()
        sampler.join()


def _anonymous_bytes() -> int:
    with open("/proc/self/status", "rb") as status:
        for line in status:
            if line.startswith(b"RssAnon:"):
                return int(line.split()[1]) * 1024
    raise LookupError("/proc/self/status has no RssAnon")


def _session_cpu_s() -> float:
    """Return the CPU time of all that lives in this process's session: p2pd and what was forked are in it."""
    session, ticks = os.getsid(0), 0
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
        except OSError:  # it has just ended
            continue
        if int(fields[3]) == session:
            ticks += int(fields[11]) + int(fields[12])
    return ticks / TICKS_PER_S


async def serve_ours(ours: Ours, answers: TextIO) -> None:
    """Answer requests until there are no more; meanwhile the others' streams are served."""
    while line := await asyncio.to_thread(sys.stdin.readline):
        request = json.loads(line)
        actions: dict[str, Callable[..., Any]] = {"meet": ours.meet, "step": ours.step, "close": ours.close}
        action = actions[request.pop("do")]
        cpu_s = _session_cpu_s()
        answer = await action(**request)
        print(json.dumps(answer | {"cpu_s": _session_cpu_s() - cpu_s}), file=answers, flush=True)


def serve_hivemind(hivemind: Hivemind, answers: TextIO) -> None:
    """Answer requests until there are no more. No loop here: hivemind's are in its forks."""
    for line in sys.stdin:
        request = json.loads(line)
        actions: dict[str, Callable[..., Any]] = {
            "meet": hivemind.meet,
            "step": hivemind.step,
            "close": hivemind.close,
        }
        action = actions[request.pop("do")]
        cpu_s = _session_cpu_s()
        answer = action(**request)
        print(json.dumps(answer | {"cpu_s": _session_cpu_s() - cpu_s}), file=answers, flush=True)


def main(side: str, elements: int, folder: Path) -> None:
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # hivemind logs there
    lengths = shard_lengths(elements)
    if side == "hivemind":
        serve_hivemind(Hivemind(lengths), answers)
        return
    run_loop(serve_ours(Ours(lengths, folder), answers))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), Path(sys.argv[3]))
