"""Small real runs for the coordinator's tests: text, a run directory, and checkpoints of a real tiny model."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save_file

from coordinator.checkpointfiles import StageFiles
from coordinator.init import init_run
from coordinator.rundir import RunDir
from protocol.architecture import stage_tensors
from protocol.ids import Lineage, StageId, Version
from protocol.manifest import Manifest

Weights = Mapping[str, NDArray[Any]]


def write_prose(path: Path, *, chars: int, seed: int = 0) -> Path:
    """Write lines of made-up words with some structure, non-ASCII ones among them."""
    chance = random.Random(seed)
    words = ["".join(chance.choices("aeiounrstlmkdé", k=chance.randint(2, 8))) for _ in range(300)]
    lines, size = [], 0
    while size < chars:
        lines.append(" ".join(chance.choices(words, k=chance.randint(4, 12))) + ".\n")
        size += len(lines[-1])
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(lines)[:chars], encoding="utf-8")
    return path


def make_run(folder: Path, *, chars: int = 60_000, **choices: Any) -> RunDir:
    """Make and open a `tiny` run on made-up prose below `folder`."""
    text = write_prose(folder / "text.txt", chars=chars)
    settings: dict[str, Any] = {"preset": "tiny", "now_s": 1.0}
    init_run(folder / "run", corpus=[text], **(settings | choices))
    return RunDir.open(folder / "run")


def random_weights(manifest: Manifest, *, seed: int = 0) -> list[Weights]:
    """Return random tensors of the right names and shapes for every stage."""
    chance = np.random.default_rng(seed)
    config, num_stages = manifest.model.config, manifest.model.num_stages
    return [
        {
            name: chance.normal(0, 0.05, shape).astype(np.float32)
            for name, shape in stage_tensors(config, num_stages, stage).items()
        }
        for stage in range(num_stages)
    ]


def stage_files(folder: Path, weights: Sequence[Weights], *, version: int, metadata: str = "pt") -> list[StageFiles]:
    """Write every stage's files as the collector would have fetched them."""
    folder.mkdir(parents=True, exist_ok=True)
    stages = []
    for stage, tensors in enumerate(weights):
        parts = {part: folder / f"{stage}.{version}.{part}" for part in ("weights", "optimizer")}
        save_file(dict(tensors), parts["weights"], metadata={"format": metadata})
        save_file({"step": np.array([version], dtype=np.int64)}, parts["optimizer"])
        lineage = Lineage(bytes([stage, version % 256]) * 16)
        stages.append(StageFiles(stage=StageId(stage), version=Version(version), lineage=lineage, parts=parts))
    return stages
