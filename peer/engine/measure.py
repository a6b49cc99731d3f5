"""Measure what this machine takes for the pieces of training, in seconds and not minutes.

Owns: the probes. Must not know: plans, budgets. What comes out is a `Profile` like a calculated one.

One layer, one block of the head and one shard of the optimizer are run on buffers of their own, with as many tokens as
half a second allows; the rest is in proportion. A number is the median of a few runs. Nothing is measured that costs
next to nothing (a look-up, a norm): such things are priced by the bytes that they pass over.

A drive is measured through the store that training will use, checksums included, for as long as a few hundred MB take.
That is within every drive's fast cache; once that is full, after some 100 GB, cheap drives write at a third.
"""

from __future__ import annotations

import platform
import shutil
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import psutil
import torch
from torch import Tensor

from peer.engine.optimizer import AdamW, OptimizerSpec
from peer.memory.backend import Backend, backend_for
from peer.memory.disk.store import NvmeStore, UnitSpec
from peer.memory.moments import MasterName, OptimizerName, moment_bytes
from peer.memory.planning.profile import (
    STEP_WORKSPACE_BYTES,
    BlockCost,
    Link,
    Profile,
    forward_flop,
    graph_bytes,
    workspace_bytes,
)
from peer.memory.units import ELEMENT_BYTES
from peer.model.loss import Scores, add_gradients, add_scores
from peer.model.stage import Stage, build_stage
from protocol.architecture import ModelConfig
from protocol.errors import LocalFault
from protocol.layout import BlockKind, ShardLayout

REPEATS = 3
ENOUGH_S = 0.5  # of one run of a probe
BUSY_S = 0.2  # of work that is to be disturbed by copies of some 10 ms
FIRST_TOKENS = 64  # of the run that tells how many tokens ENOUGH_S allows
COPY_BYTES = 64 << 20
DRIVE_UNIT_BYTES = 32 << 20
DRIVE_UNITS = 8
STEP_ELEMENTS = 1 << 21


def measure(
    config: ModelConfig,
    *,
    sequences: int,
    sequence_length: int,
    device: str = "cpu",
    optimizer: OptimizerName = "adamw8bit",
    master: MasterName = "fp32",
    nvme: Path | None = None,
    threads: int | None = None,
) -> Profile:
    """Return this machine's profile for microbatches of a model. Raises `ConfigError` if the drive is not fit."""
    if threads is not None:
        torch.set_num_threads(threads)
    backend = backend_for(device)
    one_layer = {**config, "num_hidden_layers": 1, "layer_types": None}  # costs what each of many costs
    stage = build_stage(one_layer, num_stages=1, stage=0, device=device)
    process_bytes = psutil.Process().memory_info().rss
    probe = _Probe(stage, backend, sequences, sequence_length)
    layer = probe.layer()
    busy = probe.busy_work()
    host = _host_link(backend, busy)
    pass_over_hidden_s = ELEMENT_BYTES * sequences * sequence_length * stage.width / _memory_bytes_per_s(backend)
    look_up = _unmeasured(3 * pass_over_hidden_s)
    norm = stage.layouts[stage.body[-1]]
    step_8bit_s = _step_s(OptimizerSpec(name=optimizer, master=master), BlockKind.LAYER, backend)
    return Profile(
        machine=f"{platform.node()} ({device})",
        sequences=sequences,
        sequence_length=sequence_length,
        width=stage.width,
        blocks={
            BlockKind.EMBEDDING: look_up,
            BlockKind.LAYER: layer,
            BlockKind.NORM: _unmeasured(3 * pass_over_hidden_s, graph=graph_bytes(norm, sequences, sequence_length)),
            BlockKind.HEAD: probe.head(),
        },
        step_8bit_s=step_8bit_s,
        step_32bit_s=_step_s(OptimizerSpec(name="adamw32", master=master), BlockKind.HEAD, backend),
        clear_s=ELEMENT_BYTES / _memory_bytes_per_s(backend),
        host=host,
        nvme=None if nvme is None else _drive_link(nvme, backend, busy),
        step_workspace_bytes=STEP_WORKSPACE_BYTES if backend.is_host_memory and optimizer == "adamw8bit" else 0,
        process_bytes=process_bytes,
        is_host_memory=backend.is_host_memory,
    )


def free_device_bytes(device: str) -> int | None:
    """Return a card's free memory, or None for the CPU. Raises `LocalFault` if there is no such card."""
    if not device.startswith("cuda"):
        return None
    try:
        return int(torch.cuda.mem_get_info(device)[0])
    except (RuntimeError, AssertionError) as error:
        reason = " ".join(str(error).split())[:200]
        raise LocalFault(f"cannot use '{device}': {reason}.") from None


class _Probe:
    """One layer and one block of the head, with random contents."""

    def __init__(self, stage: Stage, backend: Backend, sequences: int, sequence_length: int) -> None:
        self._stage, self._device = stage, backend.device
        self._sequences, self._sequence_length = sequences, sequence_length
        self._num_tokens = sequences * sequence_length
        self._layer = stage.body[0]
        self._bind(self._layer)

    def layer(self) -> BlockCost:
        layout = self._stage.layouts[self._layer]
        first_s = _run_s(self._forward(1, min(FIRST_TOKENS, self._sequence_length)), repeats=1)
        tokens_per_s = min(FIRST_TOKENS, self._sequence_length) / first_s
        sequences, length = self._affordable(int(tokens_per_s * ENOUGH_S))
        # attention's arithmetic grows faster than the tokens
        scale = forward_flop(layout, self._sequences, self._sequence_length) / forward_flop(layout, sequences, length)
        forward = self._forward(sequences, length)
        forward_s = _run_s(forward)
        entered_BTD = self._hidden(sequences, length).requires_grad_()
        gradient_BTD = self._hidden(sequences, length)
        saved_bytes = 0

        def forward_with_graph() -> Tensor:
            nonlocal saved_bytes
            entered_BTD.grad = None
            with torch.enable_grad(), self._stage.blocks[self._layer].saving() as saved:
                outputs_BTD = self._stage.pass_through(self._layer, entered_BTD)
            saved_bytes = saved.num_bytes
            return outputs_BTD

        backward_s = _run_s(
            lambda outputs_BTD: torch.autograd.backward([outputs_BTD], [gradient_BTD]), prepare=forward_with_graph
        )
        return BlockCost(
            forward_s=forward_s * scale,
            backward_s=backward_s * scale,
            num_matrix_elements=layout.num_matrix_elements,
            graph_bytes=saved_bytes * self._num_tokens // (sequences * length),
            workspace_bytes=workspace_bytes(layout, self._num_tokens),
        )

    def head(self) -> BlockCost:
        block = self._stage.head[0]
        self._bind(block)
        layout = self._stage.layouts[block]
        weights_RD = next(iter(self._stage.blocks[block].parameters.values()))
        gradient_RD = weights_RD.grad
        assert gradient_RD is not None

        def probe(num_tokens: int) -> tuple[Callable[[Tensor], object], Callable[[Tensor], object]]:
            hidden_ND = self._hidden(1, num_tokens)[0]
            labels_N = torch.zeros(num_tokens, dtype=torch.int64, device=self._device)
            scores, gradient_ND = Scores.before(hidden_ND), torch.zeros_like(hidden_ND)
            return (
                lambda _: add_scores(hidden_ND, weights_RD.data, labels_N, scores, first_row=0),
                lambda _: add_gradients(
                    hidden_ND,
                    weights_RD.data,
                    labels_N,
                    scores,
                    first_row=0,
                    gradient_ND=gradient_ND,
                    weight_gradient_RD=gradient_RD,
                ),
            )

        first_s = _run_s(probe(FIRST_TOKENS)[1], repeats=1)
        num_tokens = max(FIRST_TOKENS, min(self._num_tokens, int(FIRST_TOKENS * ENOUGH_S / first_s)))
        score, loss = probe(num_tokens)
        scale = self._num_tokens / num_tokens
        return BlockCost(
            forward_s=_run_s(score) * scale,
            backward_s=_run_s(loss) * scale,
            num_matrix_elements=layout.num_matrix_elements,
            workspace_bytes=workspace_bytes(layout, self._num_tokens),
        )

    def busy_work(self) -> Callable[[Tensor], object]:
        """Return work that keeps the device busy for longer than a copy takes, to be disturbed by some."""
        forward = self._forward(1, min(FIRST_TOKENS, self._sequence_length))
        times = max(1, int(BUSY_S / _run_s(forward)))

        def busy(nothing: Tensor) -> None:
            for _ in range(times):
                forward(nothing)

        return busy

    def _forward(self, sequences: int, length: int) -> Callable[[Tensor], object]:
        hidden_BTD = self._hidden(sequences, length)

        def forward(_: Tensor) -> Tensor:
            with torch.no_grad():
                return self._stage.pass_through(self._layer, hidden_BTD)

        return forward

    def _affordable(self, num_tokens: int) -> tuple[int, int]:
        """Return how many whole sequences may be run, or how much of one."""
        if num_tokens < self._sequence_length:
            return 1, max(min(FIRST_TOKENS, self._sequence_length), num_tokens)
        return min(self._sequences, num_tokens // self._sequence_length), self._sequence_length

    def _hidden(self, sequences: int, length: int) -> Tensor:
        return torch.randn(sequences, length, self._stage.width, device=self._device)

    def _bind(self, block: int) -> None:
        num_elements = self._stage.layouts[block].num_elements
        weights = torch.randn(num_elements, device=self._device).mul_(0.02)
        self._stage.blocks[block].bind(weights, torch.zeros(num_elements, device=self._device))


def _host_link(backend: Backend, busy: Callable[[Tensor], object]) -> Link:
    on_device, on_host = backend.allocate(COPY_BYTES), backend.allocate_host(COPY_BYTES)

    def come(_: Tensor) -> None:
        backend.to_device(on_device, on_host, backend.record())

    def go(_: Tensor) -> None:
        backend.to_host(on_host, on_device, backend.record())

    in_s, out_s = _run_s(come, repeats=5), _run_s(go, repeats=5)
    share = _compute_share(lambda: come(on_device), busy) if backend.is_host_memory else 0.0
    return Link(in_bytes_per_s=COPY_BYTES / in_s, out_bytes_per_s=COPY_BYTES / out_s, compute_share=share)


def _drive_link(folder: Path, backend: Backend, busy: Callable[[Tensor], object]) -> Link:
    """Measure a drive through a store of its own, which is removed afterwards."""
    folder.mkdir(parents=True, exist_ok=True)
    place = Path(tempfile.mkdtemp(prefix="handcar-probe-", dir=folder))
    units = [UnitSpec(f"probe.{number}", DRIVE_UNIT_BYTES, durable=False) for number in range(DRIVE_UNITS)]
    try:
        with NvmeStore.open(place, units, fingerprint="probe") as store:
            buffer, on_device = backend.allocate_host(DRIVE_UNIT_BYTES), backend.allocate(DRIVE_UNIT_BYTES)
            bytes_of = buffer.numpy().data
            is_staged = not backend.is_host_memory

            def write(number: int) -> None:
                if is_staged:
                    backend.to_host(buffer, on_device, backend.record())
                store.write(number, bytes_of)

            def read(number: int) -> None:
                store.read(number, bytes_of)
                if is_staged:
                    backend.to_device(on_device, buffer, backend.record())

            write_s = [_once_s(lambda number=number: write(number)) for number in range(DRIVE_UNITS)]  # type: ignore[misc]
            write_s = [_once_s(lambda number=number: write(number)) for number in range(DRIVE_UNITS)]  # type: ignore[misc]
            read_s = [_once_s(lambda number=number: read(number)) for number in range(DRIVE_UNITS)]  # type: ignore[misc]
            share = _compute_share(lambda: read(0), busy) if backend.is_host_memory else 0.0
    finally:
        shutil.rmtree(place, ignore_errors=True)
    return Link(
        in_bytes_per_s=DRIVE_UNIT_BYTES / statistics.median(read_s),
        out_bytes_per_s=DRIVE_UNIT_BYTES / statistics.median(write_s),
        compute_share=share,
    )


def _compute_share(copy: Callable[[], object], busy: Callable[[Tensor], object]) -> float:
    """Return which share of computing is lost while copies run beside it."""
    alone_s = _run_s(busy)
    with _repeating(copy):
        beside_s = _run_s(busy)
    return min(0.9, max(0.0, 1 - alone_s / beside_s))


@contextmanager
def _repeating(copy: Callable[[], object]) -> Iterator[None]:
    """Copy in a thread again and again."""
    is_over = threading.Event()

    def loop() -> None:
        while not is_over.is_set():
            copy()

    thread = threading.Thread(target=loop, name="handcar-probe", daemon=True)
    thread.start()
    try:
        yield
    finally:
        is_over.set()
        thread.join()


def _step_s(spec: OptimizerSpec, kind: BlockKind, backend: Backend) -> float:
    """Return the seconds of a step per element of a shard, scaling of the gradient included."""
    layout = ShardLayout("probe", kind, 0, STEP_ELEMENTS, STEP_ELEMENTS, ())
    optimizer = AdamW(spec, backend.device)
    weights, gradient = (torch.randn(STEP_ELEMENTS, device=backend.device) for _ in range(2))
    moments = torch.zeros(moment_bytes(layout, spec.name, spec.master), dtype=torch.uint8, device=backend.device)

    def step(_: Tensor) -> None:
        gradient.mul_(1.0)
        optimizer.step(layout, weights, gradient, moments, step=1, learning_rate=1e-4)

    return _run_s(step) / STEP_ELEMENTS


def _memory_bytes_per_s(backend: Backend) -> float:
    buffer = torch.empty(COPY_BYTES // ELEMENT_BYTES, device=backend.device)
    return COPY_BYTES / _run_s(lambda _: buffer.zero_(), repeats=5)


def _unmeasured(seconds: float, *, graph: int = 0) -> BlockCost:
    """Return the cost of what only passes over hidden states: reading, writing, and twice that on the way back."""
    return BlockCost(forward_s=seconds, backward_s=2 * seconds, num_matrix_elements=1, graph_bytes=graph)


def _run_s(
    work: Callable[[Tensor], object], *, repeats: int = REPEATS, prepare: Callable[[], Tensor] | None = None
) -> float:
    """Return the median seconds of a piece of work after a first, unmeasured run. `prepare` makes what it gets."""
    times_s: Sequence[float] = [
        _once_s(lambda given=given: work(given))  # type: ignore[misc]
        for given in (torch.empty(0) if prepare is None else prepare() for _ in range(repeats + 1))
    ]
    return statistics.median(times_s[1:])


def _once_s(work: Callable[[], object]) -> float:
    _finish()
    started_s = time.perf_counter()
    work()
    _finish()
    return time.perf_counter() - started_s


def _finish() -> None:
    """Wait for the device, which computes on after a call has returned."""
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call, unused-ignore]
        torch.cuda.synchronize()
