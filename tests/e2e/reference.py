"""Ask the yardstick: turn a run into the SPEC of `plain_loop.py`, run it, and read what it says.

Owns: the initial weights as a Hugging Face folder, the batches, learning rates and clip groups as plain numbers.
Uses the project's own initialiser and plan, so that only what happens *with* them is compared.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from coordinator.rundir import TOKENS, RunDir
from peer.engine.build import build_span
from peer.engine.schedule import clip_threshold, learning_rate
from peer.settings import PeerSettings
from protocol.architecture import stage_tensors
from protocol.batches import TaskKind, plan_round
from protocol.ids import RoundId, StageId
from protocol.manifest import Manifest

PLAIN_LOOP = Path(__file__).with_name("plain_loop.py")
TIMEOUT_S = 100.0


def training_spec(run: RunDir, folder: Path) -> dict[str, Any]:
    """Return the SPEC of the whole run, from its initial weights, which are written to `folder`."""
    manifest = run.manifest
    write_initial_model(manifest, folder)
    schedule = learning_rate(manifest)
    rounds = range(manifest.batch.num_rounds)
    return {
        **heldout_spec(run, folder),
        "microbatches": [_windows(manifest, RoundId(number)) for number in rounds],
        "learning_rates": [schedule.at(number) for number in rounds],
        "clip_groups": [_clip_group(manifest, StageId(stage)) for stage in range(manifest.model.num_stages)],
    }


def heldout_spec(run: RunDir, model_dir: Path) -> dict[str, Any]:
    """Return a SPEC that trains nothing and only takes the held-out loss of a model."""
    manifest, optimizer = run.manifest, run.manifest.optimizer
    return {
        "model_dir": str(model_dir),
        "tokens": str(run.path / TOKENS / manifest.data.train.name),
        "token_bytes": manifest.data.train.bytes_per_token,
        "sequence_length": manifest.batch.sequence_length,
        "microbatches": [],
        "learning_rates": [],
        "weight_decay": optimizer.weight_decay,
        "beta1": optimizer.beta1,
        "beta2": optimizer.beta2,
        "eps": optimizer.eps,
        "clip_groups": [],
        "threads": 1,
        "heldout": {
            "tokens": str(run.path / TOKENS / manifest.data.heldout.name),
            "windows": list(range(manifest.batch.heldout_sequences)),
        },
    }


def write_initial_model(manifest: Manifest, folder: Path) -> None:
    """Write the run's initial weights as a Hugging Face model."""
    stages = [StageId(stage) for stage in range(manifest.model.num_stages)]
    span = build_span(manifest, stages, PeerSettings(name="reference", data_dir=folder, threads=1))
    weights = {name: tensor for engine in span.engines.values() for name, tensor in engine.weight_tensors().items()}
    folder.mkdir()
    save_file(
        {name: tensor.contiguous() for name, tensor in weights.items()}, folder / "model.safetensors", {"format": "pt"}
    )
    config = {**manifest.model.config, "tie_word_embeddings": False, "torch_dtype": "float32"}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")


def ask_plain_loop(
    folder: Path, *specs: dict[str, Any], timeout_s: float = TIMEOUT_S, threads: int = 1
) -> list[dict[str, Any]]:
    """Run the yardstick, one process for all specs."""
    paths = [folder / f"spec-{number}.json" for number in range(len(specs))]
    for path, spec in zip(paths, specs, strict=True):
        path.write_text(json.dumps(spec), encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-I", str(PLAIN_LOOP), *map(str, paths)],
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": str(threads)},
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def _windows(manifest: Manifest, round_id: RoundId) -> list[list[int]]:
    plan = plan_round(manifest.data, manifest.batch, round_id)
    return [list(microbatch.windows) for microbatch in plan if microbatch.kind is TaskKind.TRAIN]


def _clip_group(manifest: Manifest, stage: StageId) -> dict[str, Any]:
    names = stage_tensors(manifest.model.config, manifest.model.num_stages, stage)
    return {"names": list(names), "threshold": clip_threshold(manifest, stage)}
