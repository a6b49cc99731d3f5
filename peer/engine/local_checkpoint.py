"""The state on NVMe as this peer's own checkpoint: what its last commit holds, and when the next one is due.

Owns: the record that goes with a commit, the choice of the moment, taking the state back into memory when nothing is
kept on NVMe any more. Must not know: how a commit is made safe (`peer/memory/disk/store.py`), whom the state agrees
with (`peer/averaging/sync.py` asks). Called from the compute thread only, between passes, so that a commit is of one
version of every stage.

What streams from NVMe is there anyway and costs nothing to commit; what lives in memory has to be written beside it.
A drive at home must not wear out by that, so the more there is of it, the rarer the commits.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import structlog

from peer.engine.stage_engine import StageEngine
from peer.memory.disk.slot_table import Json
from peer.memory.disk.store import NvmeStore
from peer.memory.executor import Executor
from peer.memory.pool import lasting_specs
from protocol.errors import ConfigError, StorageError
from protocol.ids import Lineage, RoundId, StageId, Version

log = structlog.get_logger()

MIN_INTERVAL_S = 60.0
WEAR_BYTES_PER_S = 50e9 / 86_400  # 50 GB a day at most for commits: a sixth of what a 1 TB drive is warranted for


@dataclass(frozen=True, slots=True)
class Standing:
    """Where a stage's state stands in the run's history. `round` is the first that starts from it."""

    version: Version
    round: RoundId
    lineage: Lineage


class LocalCheckpoint:
    """The local checkpoint of one span. Does nothing where nothing lives on NVMe."""

    def __init__(
        self,
        memory: Executor,
        engines: Mapping[StageId, StageEngine],
        *,
        now_s: Callable[[], float] = time.monotonic,
    ) -> None:
        self._memory, self._engines, self._now_s = memory, engines, now_s
        self._standings: dict[StageId, Standing] = {}
        self._changes: dict[StageId, int] = {}  # of each engine when it stood there
        self._committed: dict[StageId, tuple[Standing, int]] | None = None  # standings and changes
        self._interval_s = max(MIN_INTERVAL_S, memory.pool.beside_bytes / WEAR_BYTES_PER_S)
        self._committed_s = -math.inf  # the first state that is reached is kept at once

    def recover(self) -> dict[StageId, Standing]:
        """Bring the engines to the last commit and return where they stand; empty if there is none."""
        store = self._memory.pool.store
        record = store.committed if store is not None and self._memory.pool.keeps_state else None
        if record is None:
            return {}
        standings = _read_all(record, self._engines)
        if standings is None:
            return {}
        try:
            self._memory.recover()
        except StorageError as error:
            log.warning("checkpoint.damaged", error=error.one_line())
            return {}
        for stage, (standing, steps) in standings.items():
            self._engines[stage].resume(version=standing.version, steps=steps)
            self._keep(stage, standing)
        self._committed = self._present()
        return dict(self._standings)

    def note(self, stage: StageId, standing: Standing) -> None:
        """Take note of a state that was reached, and commit if that is due."""
        self._keep(stage, standing)
        if self._now_s() - self._committed_s >= self._interval_s:
            self.commit()

    def commit(self) -> None:
        """Make the present state the one that this peer continues from.

        Not if a stage has been replaced since it was last heard of, or a step has failed half-way; nor if that state is
        there already: what lives in memory would be written once more.
        A disk that does not take a commit costs the checkpoint, not the training.
        """
        is_known = all(
            stage in self._standings
            and self._standings[stage].version == engine.version
            and self._changes[stage] == engine.changes
            for stage, engine in self._engines.items()
        )
        present = self._present()
        if not self._memory.pool.keeps_state or not is_known or present == self._committed:
            return
        self._committed_s = self._now_s()
        try:
            self._memory.commit({str(stage): self._record(stage) for stage in self._engines})
        except StorageError as error:
            log.error("checkpoint.failed", error=error.one_line())
        else:
            self._committed = present

    def _present(self) -> dict[StageId, tuple[Standing, int]]:
        return {stage: (standing, self._changes[stage]) for stage, standing in self._standings.items()}

    def _keep(self, stage: StageId, standing: Standing) -> None:
        self._standings[stage] = standing
        self._changes[stage] = self._engines[stage].changes

    def _record(self, stage: StageId) -> dict[str, Json]:
        standing = self._standings[stage]
        return {
            "version": standing.version,
            "round": standing.round,
            "lineage": standing.lineage.hex(),
            "steps": self._engines[stage].steps,
        }


def move_in(
    memory: Executor, engines: Mapping[StageId, StageEngine], *, folder: Path, fingerprint: str
) -> dict[StageId, Standing]:
    """Take up the state that an earlier plan has left on NVMe, into a memory that keeps all of it elsewhere.

    Returns where the engines stand then; empty if the folder holds no whole state of theirs. The state stays there:
    until the run has moved on it is still the newest on this machine's disks, and a later plan may use it again.
    """
    try:
        with NvmeStore.open(folder, lasting_specs(memory.pool.inventory), fingerprint=fingerprint) as store:
            record = store.committed
            standings = None if record is None else _read_all(record, engines)
            if standings is None:
                return {}
            memory.pool.move_in(store)
    except (StorageError, ConfigError) as error:
        log.warning("checkpoint.left_behind", folder=str(folder), error=error.one_line())
        return {}
    for stage, (standing, steps) in standings.items():
        engines[stage].resume(version=standing.version, steps=steps)
    log.info("checkpoint.moved_in", folder=str(folder), stages=sorted(standings))
    return {stage: standing for stage, (standing, _) in standings.items()}


def _read_all(record: Mapping[str, Json], stages: Iterable[StageId]) -> dict[StageId, tuple[Standing, int]] | None:
    """Read a store's record: standings and steps. None if it is no record of these stages."""
    try:
        return {stage: _read(record, stage) for stage in stages}
    except (KeyError, TypeError, ValueError) as error:  # whole by its checksum, so an older version wrote it
        log.warning("checkpoint.unreadable", error=repr(error))
        return None


def _read(record: Mapping[str, Json], stage: StageId) -> tuple[Standing, int]:
    entry = record[str(stage)]
    if not isinstance(entry, dict):
        raise TypeError(f"{entry!r} is no record of a stage")
    numbers = [entry[name] for name in ("version", "round", "steps")]
    lineage = entry["lineage"]
    if not all(isinstance(number, int) for number in numbers) or not isinstance(lineage, str):
        raise TypeError(f"{entry!r} is no record of a stage")
    version, round_id, steps = (int(str(number)) for number in numbers)
    return Standing(Version(version), RoundId(round_id), Lineage(bytes.fromhex(lineage))), steps
