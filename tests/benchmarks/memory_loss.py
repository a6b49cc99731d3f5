"""What 8-bit moments cost: the held-out loss of `coordinator demo`'s run with either AdamW. A row of `memory.py`.

Owns: the demo's model, text, batches, schedule, clipping and steps, through the engine of a peer that hosts all stages.
Must not know: the network. A swarm adds to the sums what its codecs round, which is the same for both optimizers; of
the state of the optimizer nothing travels.
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from coordinator.init import init_run
from coordinator.rundir import TOKENS, RunDir
from peer.engine.build import build_span
from peer.engine.schedule import LearningRate, clip_threshold, learning_rate
from peer.engine.span import SpanEngine
from peer.settings import PeerSettings
from protocol.batches import TaskKind, plan_round
from protocol.ids import RoundId, StageId
from protocol.manifest import Manifest, OptimizerName
from protocol.rounds.records import clip_scale
from tests.benchmarks.harness import Options, Row, figure
from tests.e2e.plain_loop import batch, read_tokens

ROW = "optimizer_loss"
BAR = "<= 0.005"
SEEDS, QUICK_SEEDS = (0, 1, 2), (0,)
THREADS = 1  # nothing is timed here, and small operations gain little from more
PRESET = "demo"
FIRST = StageId(0)


def optimizer_loss(folder: Path, options: Options) -> Iterator[Row]:
    """Train the demo with 8-bit and with 32-bit moments, from every seed, and compare how the models end."""
    if not options.wants(ROW):
        return
    losses = [_losses(folder, seed) for seed in (QUICK_SEEDS if options.quick else SEEDS)]
    ratio = statistics.mean(eight_bit / exact for eight_bit, exact in losses)
    each = ", ".join(f"{eight_bit:.4f} against {exact:.4f}" for eight_bit, exact in losses)
    note = (
        f"the mean of {len(losses)} seed(s) is {100 * (ratio - 1):+.3f} %; nats of held-out text, 8 against 32 bit: "
        f"{each}; the demo's model, text, batches, schedule and steps in one process, without the network"
    )
    yield figure(ROW, abs(ratio - 1), unit="off", bar=BAR, note=note)


def _losses(folder: Path, seed: int) -> tuple[float, float]:
    """Return the final held-out losses with moments in 8 and in 32 bit; all else is the same."""
    with tempfile.TemporaryDirectory(dir=folder, prefix="demo-") as place:
        directory = Path(place) / "run"
        init_run(directory, preset=PRESET, seed=seed)
        run = RunDir.open(directory)
        return train(run, OptimizerName.ADAMW8BIT), train(run, OptimizerName.ADAMW32)


def train(run: RunDir, name: OptimizerName, *, threads: int = THREADS) -> float:
    """Train a run to its end with this optimizer instead of its own; return the held-out loss in nats per token."""
    optimizer = run.manifest.optimizer.model_copy(update={"name": name})
    manifest = run.manifest.model_copy(update={"optimizer": optimizer})
    stages = [StageId(stage) for stage in range(manifest.model.num_stages)]
    span = build_span(manifest, stages, PeerSettings(data_dir=run.path, device="cpu", threads=threads))
    try:
        texts = {
            TaskKind.TRAIN: _tokens(run, manifest.data.train),
            TaskKind.EVAL: _tokens(run, manifest.data.heldout),
        }
        schedule, last = learning_rate(manifest), RoundId(manifest.batch.num_rounds)
        for round_id in map(RoundId, range(last)):
            _train_round(span, manifest, schedule, _tasks(manifest, texts, round_id, TaskKind.TRAIN), round_id)
        results = [
            span.evaluate(inputs, inputs.shape, labels, entry=FIRST)
            for inputs, labels in _tasks(manifest, texts, last, TaskKind.EVAL)
        ]
        return sum(result.loss_sum for result in results) / sum(result.target_tokens for result in results)
    finally:
        span.close()


def _train_round(
    span: SpanEngine,
    manifest: Manifest,
    schedule: LearningRate,
    tasks: Iterator[tuple[Any, Any]],
    round_id: RoundId,
) -> None:
    for stage in span.engines:
        span.open(stage, round_id)
    for inputs, labels in tasks:
        span.loss_and_backward(inputs, inputs.shape, labels, entry=FIRST, round_id=round_id)
    for stage, engine in span.engines.items():
        num_tokens = span.freeze(stage)
        scale = clip_scale(engine.gradient_norm() / num_tokens, clip_threshold(manifest, stage))
        engine.step(schedule.at(engine.version), scale=scale / num_tokens)


def _tasks(
    manifest: Manifest, texts: dict[TaskKind, Any], round_id: RoundId, kind: TaskKind
) -> Iterator[tuple[Any, Any]]:
    """Return inputs and labels of a round's microbatches of one kind."""
    for task in plan_round(manifest.data, manifest.batch, round_id):
        if task.kind is kind:
            inputs, labels = batch(texts[kind], list(task.windows), manifest.batch.sequence_length)
            yield inputs.numpy(), labels.numpy()


def _tokens(run: RunDir, spec: Any) -> Any:
    return read_tokens(str(run.path / TOKENS / spec.name), spec.bytes_per_token)
