"""Checkpoints on disk: one folder per round, whole or absent, checked before it is used.

Owns: the folder's layout, its record with the hash of every file, keeping the last K, and falling back to the
one before when a file is damaged. Must not know: where the files came from, what the tensors mean. Reached
through `RunDir`; the collecting is `coordinator/checkpoints.py`.

    checkpoints/round-000040/checkpoint.json
    checkpoints/round-000040/stage-0.weights.safetensors
    checkpoints/round-000040/stage-0.optimizer.safetensors
    ...

Round 40 means: the state that round 40 starts from, all stages alike.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import structlog
from pydantic import ConfigDict, Field, ValidationError

from coordinator.durable import ASIDE_PREFIX, PART_PREFIX, new_directory, storage_faults
from protocol.errors import StorageError
from protocol.ids import Lineage, RoundId, RunId, StageId, Version
from protocol.wire import Message

log = structlog.get_logger()

RECORD = "checkpoint.json"
WEIGHTS = "weights"
OPTIMIZER = "optimizer"
_FOLDER = re.compile(r"round-(\d{6,})$")

Hex256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class FileRecord(Message):
    """One file of a checkpoint."""

    model_config = ConfigDict(populate_by_name=True)  # `bytes` in JSON, where it cannot shadow the type

    name: Annotated[str, Field(pattern=r"^stage-\d+\.(weights|optimizer)\.safetensors$")]
    num_bytes: Annotated[int, Field(ge=0, alias="bytes")]
    sha256: Hex256


class StageRecord(Message):
    """One stage of a checkpoint: where its lineage stands, and its files."""

    stage: StageId
    version: Version
    lineage: Hex256
    files: Annotated[tuple[FileRecord, ...], Field(min_length=1, max_length=2)]


class CheckpointRecord(Message):
    """What `checkpoint.json` says."""

    run: RunId
    round: RoundId
    stages: tuple[StageRecord, ...]


@dataclass(frozen=True, slots=True)
class StageFiles:
    """One stage's finished downloads, by part (`weights`, `optimizer`).

    The files are linked where possible, not copied: whoever made them deletes them, and never writes to them again.
    """

    stage: StageId
    version: Version
    lineage: Lineage
    parts: Mapping[str, Path]


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A checkpoint whose files had the recorded hashes when it was opened."""

    path: Path
    record: CheckpointRecord

    @property
    def round(self) -> RoundId:
        return self.record.round

    def file(self, stage: int, part: str) -> Path:
        """Return the path of one part of a stage."""
        return self.path / file_name(stage, part)


class CheckpointFolder:
    """All checkpoints of one run. Blocking: large files are hashed; call it from a thread."""

    def __init__(self, path: Path, *, run: RunId, num_stages: int, keep: int) -> None:
        self.path = path
        self._run = run
        self._num_stages = num_stages
        self._keep = keep

    def rounds(self) -> tuple[RoundId, ...]:
        """List the rounds that have a checkpoint, newest first, damaged or not."""
        names = [entry.name for entry in self.path.iterdir()] if self.path.is_dir() else []
        matches = (_FOLDER.match(name) for name in names)
        return tuple(sorted((RoundId(int(match[1])) for match in matches if match), reverse=True))

    def write(self, round_id: RoundId, stages: Sequence[StageFiles]) -> Checkpoint:
        """Add a checkpoint and delete those beyond the last K. On `StorageError` the old ones are untouched."""
        assert [entry.stage for entry in stages] == list(range(self._num_stages)), "a checkpoint holds every stage"
        final = self._folder(round_id)
        aside = self.path / f"{PART_PREFIX}{final.name}"
        with storage_faults(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            self._clear_parts()
            if final.exists():  # training has come past this round again, from an older checkpoint
                final.rename(aside)
        try:
            record = self._write_folder(final, round_id, stages)
        except BaseException:
            if aside.exists():
                aside.rename(final)
            raise
        self._prune()
        log.info("checkpoint.written", round=round_id)
        return Checkpoint(final, record)

    def newest(self) -> Checkpoint | None:
        """Return the newest sound checkpoint, or None; warn about every damaged one that is passed over."""
        for round_id in self.rounds():
            try:
                return self.open(round_id)
            except StorageError as error:
                log.warning("checkpoint.damaged", round=round_id, problem=str(error))
        return None

    def open(self, round_id: RoundId) -> Checkpoint:
        """Read a checkpoint and hash its files, or raise `StorageError` naming what is wrong with it."""
        folder = self._folder(round_id)
        record = _read_record(folder / RECORD)
        if record.run != self._run or record.round != round_id:
            raise StorageError(f"{folder / RECORD} belongs to round {record.round} of run {record.run}.")
        if [entry.stage for entry in record.stages] != list(range(self._num_stages)):
            raise StorageError(f"{folder} does not hold all {self._num_stages} stages.")
        for stage in record.stages:
            for file in stage.files:
                _check_file(folder / file.name, file)
        return Checkpoint(folder, record)

    def set_aside_after(self, round_id: RoundId) -> tuple[RoundId, ...]:
        """Take all checkpoints after a round out of the list, and return their rounds. They stay on disk.

        Raises `StorageError`.
        """
        later = tuple(number for number in self.rounds() if number > round_id)
        with storage_faults(self.path):
            for number in later:
                aside = self.path / f"{ASIDE_PREFIX}{self._folder(number).name}"
                if aside.exists():
                    shutil.rmtree(aside)
                self._folder(number).rename(aside)
        return later

    def _write_folder(self, final: Path, round_id: RoundId, stages: Sequence[StageFiles]) -> CheckpointRecord:
        with new_directory(final, last=RECORD) as staging, storage_faults(final):
            records = tuple(_place_stage(entry, staging) for entry in stages)
            record = CheckpointRecord(run=self._run, round=round_id, stages=records)
            (staging / RECORD).write_text(record.model_dump_json(indent=2, by_alias=True) + "\n", encoding="utf-8")
        return record

    def _folder(self, round_id: RoundId) -> Path:
        return self.path / f"round-{round_id:06d}"

    def _prune(self) -> None:
        """Delete what is no longer kept. Failing to delete loses nothing, so it only warns."""
        try:
            for round_id in self.rounds()[self._keep :]:
                shutil.rmtree(self._folder(round_id))
            self._clear_parts()
        except OSError as error:
            log.warning("checkpoint.not_deleted", problem=str(error))

    def _clear_parts(self) -> None:
        for entry in self.path.glob(f"{PART_PREFIX}*"):
            shutil.rmtree(entry)


def file_name(stage: int, part: str) -> str:
    """Return the name of one part of a stage inside a checkpoint."""
    return f"stage-{stage}.{part}.safetensors"


def _place_stage(entry: StageFiles, folder: Path) -> StageRecord:
    files = []
    for part, source in sorted(entry.parts.items(), reverse=True):
        target = folder / file_name(entry.stage, part)
        try:
            os.link(source, target)
        except OSError:  # another file system, or one without links
            shutil.copyfile(source, target)
        num_bytes, sha256 = _hash(target)
        files.append(FileRecord(name=target.name, num_bytes=num_bytes, sha256=sha256))
    return StageRecord(stage=entry.stage, version=entry.version, lineage=entry.lineage.hex(), files=tuple(files))


def _read_record(path: Path) -> CheckpointRecord:
    try:
        return CheckpointRecord.model_validate_json(path.read_bytes())
    except OSError as error:
        raise StorageError(f"cannot read {path}: {error.strerror}.") from error
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        raise StorageError(f"{path} is damaged: {first['msg']}.") from None


def _check_file(path: Path, record: FileRecord) -> None:
    try:
        num_bytes, sha256 = _hash(path)
    except OSError as error:
        raise StorageError(f"cannot read {path}: {error.strerror}.") from error
    if num_bytes != record.num_bytes:
        raise StorageError(f"{path} has {num_bytes} bytes instead of {record.num_bytes}.")
    if sha256 != record.sha256:
        raise StorageError(f"{path} is damaged: its SHA-256 is not the recorded one.")


def _hash(path: Path) -> tuple[int, str]:
    with path.open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        return file.tell(), sha256
