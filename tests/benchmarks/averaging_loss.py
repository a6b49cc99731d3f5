"""What averaging rarely costs in loss: the rows `loss_*` of `averaging.py`.

A model of 0.8M parameters and four replicas of it in one process. Every replica is an engine with an anchor; what they
contribute is encoded, merged and taken apart again by the code that peers run (`merge.py` for dense codecs, the
exchange's reading for the sparse one, `absorb.py`), without the network in between. The yardstick takes one step from
the gradients of all four replicas at every inner step, from the same initial weights and the same data in the same
order.

Rows that end in `_later` are the same 400 steps, begun from weights that one step for all had trained before: there
a replica's own batch is no longer far too small, as it is in the first steps of any training.

Owns: model, data, schedules and learning rates. How the rates of both sides were found:
`python -m tests.benchmarks.averaging_loss --help`.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from functools import cached_property
from io import BytesIO
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from coordinator.init import init_run
from coordinator.rundir import TOKENS, RunDir
from peer.averaging.absorb import Update, absorb
from peer.averaging.merge import OrderedMerger
from peer.averaging.parts import spans_of
from peer.averaging.reduce import contribution, encode_shard
from peer.codecs import codec
from peer.engine.optimizer import OptimizerSpec
from peer.engine.outer import OuterSpec
from peer.engine.schedule import LearningRate
from peer.engine.stage_engine import StageEngine
from peer.engine.statefiles import OPTIMIZER, WEIGHTS
from protocol.architecture import preset
from protocol.batches import TaskKind, plan_round
from protocol.ids import RoundId, Version
from protocol.rounds.factors import shares_of
from protocol.rounds.records import clip_scale
from tests.benchmarks.harness import Options, Row, figure
from tests.e2e.plain_loop import batch, read_tokens
from tests.e2e.swarm import Swarm

REPLICAS = 4
STEPS = 400
WARMUP = 40
STEPS_BEFORE = 2000  # of the rows `_later`
INNER_STEPS = 25
SEQUENCES, LENGTH = 4, 128  # 512 tokens per replica and step
CLIP = 1.0
FINAL_FRACTION = 0.1
SWARM_STAGES = 2
SWARM_TIMEOUT_S = 900.0
SEEDS, QUICK_SEEDS = (0, 1, 2), (0,)
NESTEROV = OuterSpec(learning_rate=0.9, momentum=0.3)
NO_MOMENTUM = OuterSpec(learning_rate=1.0, momentum=0.0)
CONFIG = preset("demo") | {
    "hidden_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 32,
    "intermediate_size": 256,
    "max_position_embeddings": 512,
    "initializer_range": 0.04,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """One way to train the model. Without a codec: one step for all, at every inner step."""

    codec: str | None
    rate: float
    inner_steps: int = INNER_STEPS
    outer: OuterSpec = NESTEROV
    overlaps: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Phase:
    """A part of a training, and the recipes for it: the yardstick's, and that of every row with its bar."""

    suffix: str
    steps_before: int
    synchronous: Recipe
    recipes: Mapping[str, tuple[Recipe, str]]


BEGINNING = Phase(
    suffix="",
    steps_before=0,
    synchronous=Recipe(codec=None, rate=3e-3),
    recipes={
        "loss_int8": (Recipe(codec="int8", rate=2.5e-3), "<= 1.01"),
        "loss_int4": (Recipe(codec="int4", rate=2.5e-3), "<= 1.015"),
        "loss_sparse": (Recipe(codec="sparse", rate=3e-3, outer=NO_MOMENTUM), "<= 1.02"),
    },
)
LATER = Phase(
    suffix="_later",
    steps_before=STEPS_BEFORE,
    synchronous=Recipe(codec=None, rate=2e-3),
    recipes={
        "loss_int8_later": (Recipe(codec="int8", rate=1.5e-3, inner_steps=30), "<= 1.01"),
        "loss_int4_later": (Recipe(codec="int4", rate=1.5e-3, inner_steps=30), "<= 1.015"),
        "loss_sparse_later": (Recipe(codec="sparse", rate=2e-3, inner_steps=30, outer=NO_MOMENTUM), "<= 1.02"),
    },
)
OVERLAPPED, OVERLAP, SWARM = "loss_int8", "loss_overlap", "loss_swarm"
OVERLAP_BAR = "<= 1.005"
SWARM_BAR = "<= 1.02"  # its replicas take what comes, at a rate that changes once a round


class Task:
    """Model and text of one seed, and the weights it starts from: drawn, or trained for so many steps before."""

    def __init__(self, folder: Path, seed: int, *, steps_before: int = 0) -> None:
        directory = folder / f"run-{seed}-{steps_before}"
        _make_run(directory, seed, stages=1, rounds=steps_before + STEPS, steps_per_round=1)
        self.seed, self._run, self._first = seed, RunDir.open(directory), steps_before

    def microbatches(self, step: int) -> list[tuple[Tensor, Tensor]]:
        """Return inputs and labels (B, T) of all replicas for one inner step; those before count down from -1."""
        return list(self._of_kind(RoundId(self._first + step), TaskKind.TRAIN))

    def engine(self, outer: OuterSpec | None) -> StageEngine:
        """Return a replica at the initial weights, with an optimizer that has seen nothing."""
        engine = _new_engine(self.seed, outer)
        if self._first:
            fresh = _files(engine)
            fresh[WEIGHTS] = BytesIO(self._weights_before)
            engine.read_state(fresh, version=Version(0))
        return engine

    @cached_property
    def start_loss(self) -> float:
        """The held-out loss of the initial weights."""
        with closing(self.engine(None)) as engine:
            return self.heldout_loss(engine)

    def heldout_loss(self, engine: StageEngine) -> float:
        """Return nats per token."""
        results = [engine.evaluate(*each) for each in self._heldout]
        return sum(result.loss_sum for result in results) / sum(result.target_tokens for result in results)

    @cached_property
    def _heldout(self) -> list[tuple[Tensor, Tensor]]:
        return list(self._of_kind(RoundId(self._first + STEPS), TaskKind.EVAL))

    @cached_property
    def _weights_before(self) -> bytes:
        """The weights after the steps before: at the yardstick's rate, which does not fall."""
        rate = BEGINNING.synchronous.rate
        schedule = LearningRate(peak=rate, warmup=WARMUP, total=self._first, final_fraction=1.0)
        with closing(_new_engine(self.seed, None)) as engine:
            for step in range(self._first):
                _step_for_all(engine, self.microbatches(step - self._first), schedule.at(step))
            return _files(engine)[WEIGHTS].getvalue()

    def _of_kind(self, round_id: RoundId, kind: TaskKind) -> Iterator[tuple[Tensor, Tensor]]:
        manifest = self._run.manifest
        for task in plan_round(manifest.data, manifest.batch, round_id):
            if task.kind is kind:
                yield batch(self._texts[kind], list(task.windows), LENGTH)

    @cached_property
    def _texts(self) -> dict[TaskKind, Any]:
        data = self._run.manifest.data
        files = {TaskKind.TRAIN: data.train, TaskKind.EVAL: data.heldout}
        return {
            kind: read_tokens(str(self._run.path / TOKENS / spec.name), spec.bytes_per_token)
            for kind, spec in files.items()
        }


def train(task: Task, recipe: Recipe) -> float:
    """Return the held-out loss in nats per token after all steps."""
    schedule = LearningRate(peak=recipe.rate, warmup=WARMUP, total=STEPS, final_fraction=FINAL_FRACTION)
    with ExitStack() as stack:
        if recipe.codec is None:
            engine = stack.enter_context(closing(task.engine(None)))
            for step in range(STEPS):
                _step_for_all(engine, task.microbatches(step), schedule.at(step))
        else:
            engines = [stack.enter_context(closing(task.engine(recipe.outer))) for _ in range(REPLICAS)]
            _train_apart(engines, task, schedule, recipe)
            engine = engines[0]
            assert len({each.state_digest() for each in engines}) == 1, "replicas do not agree"
        return task.heldout_loss(engine)


def train_swarm(folder: Path, seed: int, recipe: Recipe) -> float:
    """Return the held-out loss of the same training by real processes: two stages of four replicas."""
    directory, rounds = folder / f"swarm-{seed}", STEPS // recipe.inner_steps
    settings = {
        "optimizer.learning_rate": recipe.rate,
        "optimizer.warmup_rounds": round(WARMUP / recipe.inner_steps),
        "optimizer.final_lr_fraction": FINAL_FRACTION,
        "averaging.mode": "diloco",
        "averaging.codec": recipe.codec,
        "averaging.overlap": recipe.overlaps,
        "averaging.outer_learning_rate": recipe.outer.learning_rate,
        "averaging.outer_momentum": recipe.outer.momentum,
    }
    steps = recipe.inner_steps
    _make_run(directory, seed, stages=SWARM_STAGES, rounds=rounds, steps_per_round=steps, settings=settings)
    with Swarm(folder / f"peers-{seed}", directory=directory) as swarm:
        peers = [f"p{number}" for number in range(SWARM_STAGES * REPLICAS)]
        swarm.start_coordinator("--start-peers", str(len(peers)), "--until-finished")
        swarm.start_peers(peers)
        swarm.wait_finished(timeout_s=SWARM_TIMEOUT_S)
        assert all(len(set(by_peer.values())) == 1 for by_peer in swarm.states().values()), "replicas do not agree"
        loss = swarm.rounds()[-1].heldout_loss
    assert loss is not None
    return loss


def _make_run(
    directory: Path,
    seed: int,
    *,
    stages: int,
    rounds: int,
    steps_per_round: int,
    settings: Mapping[str, Any] = MappingProxyType({}),
) -> None:
    """Make a run of the model; a round has the microbatches of so many inner steps of all replicas."""
    model = directory.with_name(f"{directory.name}-model")
    model.mkdir()
    (model / "config.json").write_text(json.dumps(CONFIG))
    batch = {
        "batch.sequence_length": LENGTH,
        "batch.sequences_per_microbatch": SEQUENCES,
        "batch.microbatches_per_round": REPLICAS * steps_per_round,
        "batch.eval_every": rounds,
    }
    init_run(
        directory,
        preset="demo",
        model=model,
        tokenizer="train:1024",
        stages=stages,
        rounds=rounds,
        seed=seed,
        overrides={**batch, **settings},
    )


def _new_engine(seed: int, outer: OuterSpec | None) -> StageEngine:
    spec = OptimizerSpec(name="adamw8bit")
    return StageEngine.build(
        CONFIG, num_stages=1, stage=0, optimizer=spec, seed=seed, outer=outer, keep_budget_bytes=1 << 30
    )


def _files(engine: StageEngine) -> dict[str, BytesIO]:
    files = {WEIGHTS: BytesIO(), OPTIMIZER: BytesIO()}
    engine.write_state(files)
    for file in files.values():
        file.seek(0)
    return files


def _step_for_all(engine: StageEngine, microbatches: Sequence[tuple[Tensor, Tensor]], rate: float) -> None:
    results = [engine.loss_and_backward(*each) for each in microbatches]
    _take_step(engine, sum(result.target_tokens for result in results), rate)


def _train_apart(engines: Sequence[StageEngine], task: Task, schedule: LearningRate, recipe: Recipe) -> None:
    assert recipe.codec is not None
    tokens = [0] * len(engines)
    underway: Update | None = None
    for step in range(STEPS):
        for number, (engine, each) in enumerate(zip(engines, task.microbatches(step), strict=True)):
            target_tokens = engine.loss_and_backward(*each).target_tokens
            _take_step(engine, target_tokens, schedule.at(step))
            tokens[number] += target_tokens
        if (step + 1) % recipe.inner_steps and step + 1 < STEPS:
            continue
        _turn(engines, underway, schedule)
        underway, tokens = _averaged(engines, recipe.codec, tokens), [0] * len(engines)
        if not recipe.overlaps:
            _turn(engines, underway, schedule)
            underway = None
    if underway is not None:
        _turn(engines, underway, schedule)


def _take_step(engine: StageEngine, target_tokens: int, rate: float) -> None:
    engine.step(rate, scale=clip_scale(engine.gradient_norm() / target_tokens, CLIP) / target_tokens)


def _turn(engines: Sequence[StageEngine], update: Update | None, schedule: LearningRate) -> None:
    for engine in engines:
        if update is None:
            engine.turn(None)
        else:
            absorb(engine, update, clip_scale=1.0, schedule=schedule, is_ours=True)


def _averaged(engines: Sequence[StageEngine], name: str, tokens: Sequence[int]) -> Update:
    """Do what a group does: a butterfly's sums part by part, or everybody's contributions."""
    shards = range(len(engines[0].shards))
    if not codec(name).is_dense:
        sent = [encode_shard(name, engine.contribution_shard(number)) for engine in engines for number in shards]
        return Update(name, b"".join(sent), tuple(tokens))
    made = [
        part
        for number in shards
        for part in asyncio.run(_merged([engine.contribution_shard(number) for engine in engines], name, tokens))
    ]
    return Update(name, b"".join(made), tuple(tokens))


async def _merged(contributions: Sequence[Tensor], name: str, tokens: Sequence[int]) -> list[bytes]:
    spans = list(spans_of(len(contributions[0])))
    merger = OrderedMerger(
        codec(name), [length for _, length in spans], num_senders=len(contributions), factors=shares_of(tokens)
    )
    merged = []
    for part, (start, length) in enumerate(spans):
        pieces = [each[start : start + length] for each in contributions]
        sums = await asyncio.gather(
            *(
                merger.accumulate_part(member, part, contribution(piece, using=codec(name)))
                for member, piece in enumerate(pieces)
            )
        )
        merged.append(sums[0])
    return merged


def losses(folder: Path, options: Options) -> Iterator[Row]:
    """Train every recipe from every seed, and compare mean held-out losses."""
    seeds = QUICK_SEEDS if options.quick else SEEDS
    with tempfile.TemporaryDirectory(dir=folder) as place:
        for phase in (BEGINNING, LATER):
            yield from _losses_of(phase, Path(place), seeds, options)


def _losses_of(phase: Phase, folder: Path, seeds: Sequence[int], options: Options) -> Iterator[Row]:
    overlap, overlapped = OVERLAP + phase.suffix, OVERLAPPED + phase.suffix
    wanted = [row for row in (*phase.recipes, overlap) if options.wants(row)]
    wants_swarm = phase is BEGINNING and options.wants(SWARM)
    if not wanted and not wants_swarm:
        return
    recipes = {row: phase.recipes[row][0] for row in wanted if row != overlap}
    if wants_swarm or overlap in wanted:
        recipes[overlapped] = phase.recipes[overlapped][0]
    if overlap in wanted:
        recipes[overlap] = replace(recipes[overlapped], overlaps=True)
    found: dict[str, list[float]] = {}
    starts = []
    for seed in seeds:
        task = Task(folder, seed, steps_before=phase.steps_before)
        starts.append(task.start_loss)
        for row, recipe in {"reference": phase.synchronous, **recipes}.items():
            found.setdefault(row, []).append(train(task, recipe))
    means = {row: sum(each) / len(each) for row, each in found.items()}
    for row in wanted:
        against = overlapped if row == overlap else "reference"
        note = (
            f"{len(seeds)} seed(s): {_listed(found[row])} against {_listed(found[against])}, from {_listed(starts)}; "
            f"{REPLICAS} replicas, H={recipes[row].inner_steps}"
        )
        bar = OVERLAP_BAR if row == overlap else phase.recipes[row][1]
        yield figure(row, means[row], means[against], unit="nats", bar=bar, note=note)
    if wants_swarm:
        swarm = train_swarm(folder, seeds[0], recipes[OVERLAPPED])
        note = f"{SWARM_STAGES} stages of {REPLICAS} replicas as processes, against {OVERLAPPED} in one process, seed 0"
        yield figure(SWARM, swarm, found[OVERLAPPED][0], unit="nats", bar=SWARM_BAR, note=note)


def _listed(losses: Sequence[float]) -> str:
    return ", ".join(f"{each:.4f}" for each in losses)


def tune() -> None:
    """Train one recipe at several rates: how the rates above were chosen."""
    parser = argparse.ArgumentParser(description="Train the model of the loss rows at several learning rates.")
    parser.add_argument("--codec", help="none: one step for all at every inner step")
    parser.add_argument("--rates", type=float, nargs="+", required=True)
    parser.add_argument("--outer-rate", type=float, default=0.7)
    parser.add_argument("--outer-momentum", type=float, default=0.9)
    parser.add_argument("--inner-steps", type=int, default=INNER_STEPS)
    parser.add_argument("--overlap", action="store_true")
    parser.add_argument("--after", type=int, default=0, help="Steps for all that were taken before.")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as place:
        task = Task(Path(place), options.seed, steps_before=options.after)
        print(f"held-out loss of the initial weights {task.start_loss:.4f}", flush=True)
        for rate in options.rates:
            recipe = Recipe(
                codec=options.codec,
                rate=rate,
                inner_steps=options.inner_steps,
                outer=OuterSpec(options.outer_rate, options.outer_momentum),
                overlaps=options.overlap,
            )
            print(f"{options.codec or 'synchronous'} rate {rate:g}: {train(task, recipe):.4f}", flush=True)


if __name__ == "__main__":
    tune()
