"""The list behind `coordinator checkpoints`: every checkpoint on disk, and whether it could be used.

Owns: checking all of them, not only the newest. Must not know: the network, the database (a checkpoint is a
folder that stands for itself).
"""

from __future__ import annotations

from typing import Any

from coordinator.rundir import RunDir
from protocol.errors import StorageError


def list_checkpoints(run: RunDir) -> list[dict[str, Any]]:
    """Return one row per checkpoint, newest first; `problem` is None for a sound one. Hashes every file."""
    rows: list[dict[str, Any]] = []
    for round_id in run.checkpoints.rounds():
        try:
            checkpoint = run.checkpoints.open(round_id)
        except StorageError as error:
            rows.append({"round": round_id, "bytes": None, "versions": None, "problem": str(error)})
            continue
        stages = checkpoint.record.stages
        rows.append(
            {
                "round": round_id,
                "bytes": sum(file.num_bytes for stage in stages for file in stage.files),
                "versions": [stage.version for stage in stages],
                "problem": None,
            }
        )
    return rows
