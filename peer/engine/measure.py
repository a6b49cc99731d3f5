"""Measure what this machine takes for the pieces of training, in seconds and not minutes.

Owns: the probes. Must not know: plans, budgets. What comes out is a `Profile` like a calculated one.

One layer, one block of the head and one shard of the optimizer are run on buffers of their own, with as many tokens as
half a second allows; the rest is in proportion. A number is the median of a few runs. Nothing is measured that costs
next to nothing (a look-up, a norm): such things are priced by the bytes that they pass over. How fast bytes come and
go, `measure_links.py` finds out.

The process itself is measured last: libraries take memory when they are first used, and what the probes held is gone.
"""

from __future__ import annotations

import gc
import math
import platform
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import psutil
import torch
from torch import Tensor

from peer.engine.graph import Graph
from peer.engine.measure_links import drive_link, host_link, memory_bytes_per_s
from peer.engine.optimizer import AdamW, OptimizerSpec
from peer.engine.stopwatch import run_s
from peer.memory.backend import Backend, backend_for, give_back_free_memory
from peer.memory.moments import MasterName, OptimizerName, moment_bytes
from peer.memory.planning.profile import (
    STEP_WORKSPACE_BYTES,
    BlockCost,
    Profile,
    forward_flop,
    graph_bytes,
    workspace_bytes,
)
from peer.memory.segments import segments_of
from peer.memory.units import ELEMENT_BYTES
from peer.model.loss import Scores, add_gradients, add_scores
from peer.model.stage import Stage, build_stage
from protocol.architecture import ModelConfig
from protocol.errors import LocalFault
from protocol.layout import BlockKind, ShardLayout

ENOUGH_S = 0.5  # of one run of a probe
BUSY_S = 0.2  # of work that is to be disturbed by copies of some 10 ms
FIRST_TOKENS = 64  # of the run that tells how many tokens ENOUGH_S allows
STEP_ELEMENTS = 1 << 21
SPARE_SHARE = 1 / 32  # of what graphs save
GAP_LAYERS, GAP_ROUNDS = 12, 2  # the second round finds the gaps of the first
OWN_MAPPING_BYTES = 32 << 20  # from here on glibc's malloc asks the kernel for each piece, which leaves no gaps


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
    with closing(backend_for(device)) as backend:
        profile = _measured(config, backend, sequences, sequence_length, optimizer=optimizer, master=master, nvme=nvme)
    gc.collect()  # a stage refers to itself
    give_back_free_memory()
    return replace(profile, process_bytes=psutil.Process().memory_info().rss)


def _measured(
    config: ModelConfig,
    backend: Backend,
    sequences: int,
    sequence_length: int,
    *,
    optimizer: OptimizerName,
    master: MasterName,
    nvme: Path | None,
) -> Profile:
    """Run every probe. The process itself is measured once they are gone."""
    device = str(backend.device)
    one_layer = {**config, "num_hidden_layers": 1, "layer_types": None}  # costs what each of many costs
    stage = build_stage(one_layer, num_stages=1, stage=0, device=device)
    probe = _Probe(stage, backend, sequences, sequence_length)
    layer = probe.layer()
    busy = probe.busy_work()
    host = host_link(backend, busy)
    pass_over_hidden_s = ELEMENT_BYTES * sequences * sequence_length * stage.width / memory_bytes_per_s(backend)
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
        clear_s=ELEMENT_BYTES / memory_bytes_per_s(backend),
        host=host,
        nvme=None if nvme is None else drive_link(nvme, backend, busy),
        step_workspace_bytes=STEP_WORKSPACE_BYTES if backend.is_host_memory and optimizer == "adamw8bit" else 0,
        gap_share=probe.gap_share() if backend.is_host_memory else 0.0,
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
        first_s = run_s(self._forward(1, min(FIRST_TOKENS, self._sequence_length)), repeats=1)
        tokens_per_s = min(FIRST_TOKENS, self._sequence_length) / first_s
        sequences, length = self._affordable(int(tokens_per_s * ENOUGH_S))
        # attention's arithmetic grows faster than the tokens
        scale = forward_flop(layout, self._sequences, self._sequence_length) / forward_flop(layout, sequences, length)
        forward = self._forward(sequences, length)
        forward_s = run_s(forward)
        entered_BTD = self._hidden(sequences, length).requires_grad_()
        gradient_BTD = self._hidden(sequences, length)

        def forward_with_graph() -> Tensor:
            entered_BTD.grad = None
            with torch.enable_grad():
                return self._stage.pass_through(self._layer, entered_BTD)

        backward_s = run_s(
            lambda outputs_BTD: torch.autograd.backward([outputs_BTD], [gradient_BTD]), prepare=forward_with_graph
        )
        return BlockCost(
            forward_s=forward_s * scale,
            backward_s=backward_s * scale,
            num_matrix_elements=layout.num_matrix_elements,
            graph_bytes=self._graph_bytes(sequences, length),
            workspace_bytes=workspace_bytes(layout, self._num_tokens),
        )

    def _graph_bytes(self, sequences: int, length: int) -> tuple[int, ...]:
        """Return what each segment's graph saves, in proportion to the tokens that were tried, and a little more.

        Kernels may pad what they save for each sequence.
        """
        scale = (1 + SPARE_SHARE) * self._num_tokens / (sequences * length)
        return tuple(math.ceil(graph.num_bytes * scale) for graph in self._graphs(1, sequences, length))

    def gap_share(self) -> float:
        """Return what graphs take beyond what they save and work with: the gaps that the allocator leaves between them.

        glibc before 2.38 can hardly use the place of a tensor again, as torch wants them aligned (its bug 14581). Few
        tokens will do: the gaps come from the order in which tensors come and go, and grow with their sizes.
        """
        if self._num_tokens * self._stage.width * ELEMENT_BYTES >= OWN_MAPPING_BYTES:
            return 0.0
        process, length = psutil.Process(), min(FIRST_TOKENS, self._sequence_length)
        working_bytes, share = workspace_bytes(self._stage.layouts[self._layer], length), 0.0
        give_back_free_memory()
        before_bytes = process.memory_info().rss
        for _ in range(GAP_ROUNDS):
            graphs = self._graphs(GAP_LAYERS, 1, length)
            known_bytes = working_bytes + sum(graph.num_bytes for graph in graphs)
            share = (process.memory_info().rss - before_bytes) / known_bytes - 1
            gradient_BTD = self._hidden(1, length)
            while graphs:
                gradient_BTD = graphs.pop().backward(gradient_BTD)
        return min(1.0, max(0.0, share))  # where a model is tiny, the libraries' own memory shows

    def _graphs(self, num_layers: int, sequences: int, length: int) -> list[Graph]:
        """Pass hidden states through the layer again and again, keeping everything for a backward pass."""
        graphs, hidden_BTD = [], self._hidden(sequences, length)
        for segment in num_layers * segments_of(self._layer, self._stage.layouts[self._layer].kind):
            graphs.append(Graph(self._stage, *segment, hidden_BTD))
            hidden_BTD = graphs[-1].take_outputs()
        return graphs

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

        first_s = run_s(probe(FIRST_TOKENS)[1], repeats=1)
        num_tokens = max(FIRST_TOKENS, min(self._num_tokens, int(FIRST_TOKENS * ENOUGH_S / first_s)))
        score, loss = probe(num_tokens)
        scale = self._num_tokens / num_tokens
        return BlockCost(
            forward_s=run_s(score) * scale,
            backward_s=run_s(loss) * scale,
            num_matrix_elements=layout.num_matrix_elements,
            workspace_bytes=workspace_bytes(layout, self._num_tokens),
        )

    def busy_work(self) -> Callable[[Tensor], object]:
        """Return work that keeps the device busy for longer than a copy takes, to be disturbed by some."""
        forward = self._forward(1, min(FIRST_TOKENS, self._sequence_length))
        times = max(1, int(BUSY_S / run_s(forward)))

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


def _step_s(spec: OptimizerSpec, kind: BlockKind, backend: Backend) -> float:
    """Return the seconds of a step per element of a shard, scaling of the gradient included."""
    layout = ShardLayout("probe", kind, 0, STEP_ELEMENTS, STEP_ELEMENTS, ())
    optimizer = AdamW(spec, backend.device)
    weights, gradient = (torch.randn(STEP_ELEMENTS, device=backend.device) for _ in range(2))
    moments = torch.zeros(moment_bytes(layout, spec.name, spec.master), dtype=torch.uint8, device=backend.device)

    def step(_: Tensor) -> None:
        gradient.mul_(1.0)
        optimizer.step(layout, weights, gradient, moments, step=1, learning_rate=1e-4)

    return run_s(step) / STEP_ELEMENTS


def _unmeasured(seconds: float, *, graph: tuple[int, ...] = ()) -> BlockCost:
    """Return the cost of what only passes over hidden states: reading, writing, and twice that on the way back."""
    return BlockCost(forward_s=seconds, backward_s=2 * seconds, num_matrix_elements=1, graph_bytes=graph)
