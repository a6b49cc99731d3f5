"""How far apart honest machines are: `python -m tests.benchmarks.trust --calibrate`.

Trains a small pipeline for a while, has every machine of `trust_model.py` work on microbatches and all others audit it,
and prints the largest distances for each codec: the table of `coordinator/audit/tolerance.py`. The same audits, with
other seeds and the tolerance as it is, are counted by `clean_false_audits`. Ten minutes.

Owns: pairs of honest machines. Must not know: what a distance leads to.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

from torch import Tensor

from coordinator.audit.tolerance import tolerance_of
from peer.codecs import codec
from peer.engine.optimizer import OptimizerSpec
from peer.engine.recompute import Recomputer
from peer.engine.replay import Climb, Replay
from peer.engine.stage_engine import StageEngine
from peer.engine.weights import PastWeights
from protocol.ids import StageId, digest
from protocol.sketch import distance
from tests.benchmarks.trust_model import CONFIG, LAST, LENGTH, MACHINES, SEQUENCES, SHAPE, STAGES, Machine, windows

CODECS = ("fp32", "fp16", "bf16", "int8", "int4", "int4-turned")
CALIBRATION_SEEDS = tuple(range(1000, 1012))
BATCHES = 12
STEPS, BATCHES_PER_STEP, RATE = 30, 2, 4e-3


@dataclass(frozen=True, slots=True)
class Audit:
    """An honest pair, and how far apart it is. None where nothing goes on, or back."""

    stage: StageId
    worker: Machine
    auditor: Machine
    outputs: float | None
    returned: float | None


@dataclass(slots=True)
class Bulk:
    """Many audits of honest machines."""

    audits: int = 0
    false: int = 0


def largest(
    codec_name: str, *, seeds: tuple[int, ...] = CALIBRATION_SEEDS, batches: int = BATCHES
) -> tuple[float, float]:
    """Return the largest distance of activations, and that of gradients, when both travel in a codec."""
    found = [audit for seed in seeds for audit in audits(codec_name, seed=seed, batches=batches)]
    return max(each.outputs or 0.0 for each in found), max(each.returned or 0.0 for each in found)


def bulk_audits(count: int, *, seed: int) -> Bulk:
    """Audit honest machines so often, in the codecs that presets use, and count who is found wrong."""
    bulk = Bulk()
    for number, name in itertools.cycle(enumerate(("fp16", "int8", "fp32"))):
        tolerance = tolerance_of(name, name)
        for audit in audits(name, seed=seed + number, batches=10, first_batch=bulk.audits):
            bulk.audits += 1
            bulk.false += (audit.outputs or 0.0) > tolerance.outputs or (audit.returned or 0.0) > tolerance.returned
            if bulk.audits >= count:
                return bulk
    return bulk


def audits(codec_name: str, *, seed: int, batches: int, first_batch: int = 0) -> Iterator[Audit]:
    """Yield the audits of all pairs of machines, for so many microbatches."""
    engines = trained(seed)
    made = codec(codec_name)
    recomputer = Recomputer(
        CONFIG,
        num_stages=STAGES,
        engines=engines,
        past=PastWeights(max_bytes=1 << 30),
        codec=made,
        gradient_codec=made,
        microbatch=(SEQUENCES, LENGTH),
    )
    for stage_id in engines:
        recomputer.keep(stage_id)
    replays = [Replay(CONFIG, num_stages=STAGES, stage=stage) for stage in range(STAGES)]
    weights = [engines[StageId(stage)].shared_weights() for stage in range(STAGES)]
    for number in range(first_batch, first_batch + batches):
        inputs, labels = windows(f"calibration/{seed}/{number}", is_heldout=False)
        salt = digest(f"{seed}/{number}".encode())
        for worker in MACHINES:
            there, back = _carry(replays, weights, inputs, labels, codec_name, worker)
            for stage, auditor in itertools.product(range(STAGES), MACHINES):
                if auditor is worker:
                    continue
                place = [(StageId(stage), engines[StageId(stage)].version)]
                source = inputs.numpy() if stage == 0 else there[stage - 1]
                target = labels.numpy() if stage == LAST else back[stage + 1]
                with auditor.computing():
                    found = recomputer.recompute(place, source, target, salt)
                assert found is not None
                on = recomputer.sketch_bytes(there[stage], salt, is_gradient=False) if stage < LAST else None
                by = recomputer.sketch_bytes(back[stage], salt, is_gradient=True) if stage else None
                yield Audit(
                    StageId(stage),
                    worker,
                    auditor,
                    None if on is None else distance(found.outputs, on),
                    None if by is None else distance(found.returned, by),
                )


def table() -> str:
    """Measure every codec and lay out the lines of `coordinator/audit/tolerance.py`."""
    lines = []
    for name in CODECS:
        outputs, returned = largest(name)
        lines.append(f'    "{name}": ({outputs:.4f}, {returned:.4f}),')
        print(lines[-1], flush=True)
    return "\n".join(["_LARGEST = {", *lines, "}"])


@cache
def trained(seed: int) -> dict[StageId, StageEngine]:
    """Return stages that have been trained for a few steps, on one machine."""
    spec = OptimizerSpec(name="adamw8bit")
    engines = [
        StageEngine.build(CONFIG, num_stages=STAGES, stage=stage, optimizer=spec, seed=seed, keep_budget_bytes=1 << 30)
        for stage in range(STAGES)
    ]
    for step in range(STEPS):
        tokens = 0
        for number in range(BATCHES_PER_STEP):
            inputs, labels = windows(f"warm-up/{seed}/{step}/{number}", is_heldout=False)
            hidden, tickets = inputs, []
            for engine in engines[:-1]:
                hidden, ticket = engine.forward(hidden)
                tickets.append(ticket)
            result = engines[-1].loss_and_backward(hidden, labels)
            gradient, tokens = result.grad_inputs, tokens + result.target_tokens
            for engine, ticket in zip(reversed(engines[:-1]), reversed(tickets), strict=True):
                assert gradient is not None
                gradient = engine.backward(ticket, gradient)
        for engine in engines:
            engine.step(RATE, scale=min(1.0, tokens / max(engine.gradient_norm(), 1e-9)) / tokens)
    return {StageId(stage): engine for stage, engine in enumerate(engines)}


def _carry(
    replays: list[Replay],
    weights: list[list[Tensor]],
    inputs: Tensor,
    labels: Tensor,
    codec_name: str,
    worker: Machine,
) -> tuple[list[bytes], dict[int, bytes]]:
    """Take a microbatch up and down; return the bodies that each stage sends on, and those that it sends back."""
    made = codec(codec_name)

    def sent(values: Tensor) -> tuple[bytes, Tensor]:
        body = bytes(made.encode(values.detach().float().reshape(-1).contiguous()))
        return body, made.decode(body, values.numel()).view(SHAPE)

    there: list[bytes] = []
    climbs: list[Climb] = []
    hidden = inputs
    with worker.computing():
        for stage, replay in enumerate(replays):
            climbs.append(replay.up(weights[stage], [hidden]))
            body, hidden = sent(climbs[-1].outputs[0])
            there.append(body)
        ((_, gradient),) = replays[LAST].losses(climbs[LAST], [labels])
        back: dict[int, bytes] = {}
        for stage in reversed(range(STAGES)):
            (by_inputs,) = replays[stage].down(climbs[stage], [gradient])
            back[stage], gradient = sent(by_inputs)
    return there, back
