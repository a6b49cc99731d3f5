"""Tell whether a device computes what it should, and goes on to do so while it gets hot.

Owns: the passes that are repeated, what counts as wrong, and the patterns that memory must keep. Must not know: audits,
runs. A volunteer whose results were found wrong asks this before anything else (`peer bench burn-in`).

One layer goes forward and backward on the same inputs, again and again. Every pass must bring what the first one did,
and the first one what the CPU does. Then a part of the memory is written with patterns and read back, before and after:
a bit that does not stay is a fault even if no pass has met it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from peer.engine.measure import free_device_bytes
from peer.engine.optimizer import OptimizerSpec
from peer.engine.replay import Replay
from peer.engine.stage_engine import StageEngine
from peer.memory.planning.budgets import free_host_bytes
from protocol.architecture import preset
from protocol.errors import LocalFault

SAME = 1e-4
"""Of the values' root mean square: a machine does the same again, but for the order in which some kernels add up."""
LIKE_CPU = 1e-2
"""Of the norm: another machine's kernels differ in the last bits, and with them all that follows."""
CHUNK_BYTES = 64 << 20
PATTERNS = (0x55555555, -0x55555556, None)
"""Every bit once 0 and once 1; None: each word its own place, so that a wrong address shows."""
CPU_MEMORY_BYTES = 2 << 30


@dataclass(frozen=True, slots=True, kw_only=True)
class BurnIn:
    """What came of it."""

    device: str
    seconds: float
    passes: int
    wrong_passes: int
    worst: float
    """Largest deviation of a value from the first pass, in units of the values' root mean square."""
    from_cpu: float
    """Relative distance of the first pass from the CPU's; 0 on the CPU itself."""
    memory_bytes: int
    wrong_words: int
    """32-bit words that were not read back as they were written."""

    @property
    def is_sound(self) -> bool:
        return self.wrong_passes == 0 and self.wrong_words == 0 and self.from_cpu <= LIKE_CPU


def burn_in(
    device: str,
    *,
    seconds: float,
    memory_bytes: int | None = None,
    on_progress: Callable[[int, int], None] = lambda passes, wrong: None,
) -> BurnIn:
    """Keep a device busy for so long, with at least two passes; None of memory: half of what is free.

    Raises `LocalFault` if the device is not there.
    """
    try:
        return _burn_in(torch.device(device), seconds, memory_bytes, on_progress)
    except (RuntimeError, AssertionError) as error:  # torch's ways of saying "no such device" and "out of memory"
        raise LocalFault(f"cannot compute on '{device}': {' '.join(str(error).split())[:200]}.") from None


def _burn_in(
    device: torch.device, seconds: float, memory_bytes: int | None, on_progress: Callable[[int, int], None]
) -> BurnIn:
    started_s = time.monotonic()
    is_cpu = device.type == "cpu"
    layer = _Layer(is_cpu=is_cpu)
    replay = layer.on(device)
    if memory_bytes is None:
        free_bytes = free_device_bytes(str(device))
        memory_bytes = min(free_host_bytes() // 4, CPU_MEMORY_BYTES) if free_bytes is None else free_bytes // 2
    wrong_words = wrong_in_memory(device, memory_bytes)
    first = layer.run(replay)
    from_cpu = 0.0 if is_cpu else _distance(first, layer.run(layer.on(torch.device("cpu"))))
    passes, wrong, worst = 1, 0, 0.0
    while passes < 2 or time.monotonic() - started_s < seconds:
        apart = _largest_deviation(layer.run(replay), first)
        passes, wrong, worst = passes + 1, wrong + (not apart <= SAME), max(worst, apart)
        on_progress(passes, wrong)
    return BurnIn(
        device=str(device),
        seconds=time.monotonic() - started_s,
        passes=passes,
        wrong_passes=wrong,
        worst=worst,
        from_cpu=from_cpu,
        memory_bytes=memory_bytes,
        wrong_words=wrong_words + wrong_in_memory(device, memory_bytes),
    )


def wrong_in_memory(device: torch.device, num_bytes: int) -> int:
    """Write patterns into so much memory and read them back; return how many 32-bit words differ.

    All of it is taken at the same time, as it would be the same piece otherwise.
    """
    chunks = [torch.empty(size // 4, dtype=torch.int32, device=device) for size in _chunks(num_bytes)]
    wrong = 0
    for pattern in PATTERNS:
        for number, chunk in enumerate(chunks):
            _fill(chunk, number, pattern)
        for number, chunk in enumerate(chunks):
            expected = torch.empty_like(chunk)
            _fill(expected, number, pattern)
            wrong += int((chunk != expected).sum())
    return wrong


class _Layer:
    """One layer with inputs and an outgoing gradient, drawn once."""

    def __init__(self, *, is_cpu: bool) -> None:
        self._config, self._num_stages, shape = (
            (preset("bench"), 8, (2, 128)) if is_cpu else (preset("1b"), 16, (1, 2048))
        )
        spec = OptimizerSpec(name="adamw8bit")
        engine = StageEngine.build(self._config, num_stages=self._num_stages, stage=1, optimizer=spec, seed=0)
        self._weights = engine.shared_weights()
        engine.close()
        drawn = torch.Generator().manual_seed(0)
        self._inputs, self._gradient = (
            torch.randn(*shape, self._config["hidden_size"], generator=drawn) for _ in range(2)
        )

    def on(self, device: torch.device) -> Replay:
        """Build the layer on a device."""
        return Replay(self._config, num_stages=self._num_stages, stage=1, device=device)

    def run(self, replay: Replay) -> list[Tensor]:
        """Return outputs, and gradients by the inputs and by the weights, in host memory, fp32."""
        by_weights: list[Tensor] = []
        climb = replay.up(self._weights, [self._inputs])
        (returned,) = replay.down(climb, [self._gradient], lambda block, gradient: by_weights.append(gradient.cpu()))
        return [climb.outputs[0].cpu(), returned.cpu(), *by_weights]


def _chunks(num_bytes: int) -> Iterator[int]:
    for start in range(0, num_bytes, CHUNK_BYTES):
        yield min(CHUNK_BYTES, num_bytes - start)


def _fill(chunk: Tensor, number: int, pattern: int | None) -> None:
    if pattern is None:
        start = number * (CHUNK_BYTES // 4) % (1 << 30)  # within 4 GiB every word is another
        torch.arange(start, start + len(chunk), dtype=torch.int32, device=chunk.device, out=chunk)
    else:
        chunk.fill_(pattern)


def _largest_deviation(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    deviations = [
        float((one - other).abs().max() / other.square().mean().sqrt())
        for one, other in zip(found, expected, strict=True)
    ]
    return float("inf") if any(each != each for each in deviations) else max(deviations)  # NaN is none of them


def _distance(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    apart = [
        float(torch.linalg.vector_norm(one - other) / torch.linalg.vector_norm(other))
        for one, other in zip(found, expected, strict=True)
    ]
    return float("inf") if any(each != each for each in apart) else max(apart)
