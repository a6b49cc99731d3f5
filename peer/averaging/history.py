"""A stage's recent past on disk: snapshots of its shared state, and the updates since.

Owns: the files of one hosted stage, their atomic writing, verifying and pruning. A joiner, a peer that
comes back and the coordinator's checkpointer all use the same files: fetch a snapshot, replay the
updates after it, compare the hash. Must not know: how updates are agreed on (rounds) or fetched (sync).

    v00000040.json                      the Snapshot, written last: its presence makes the snapshot real
    v00000040.weights.safetensors       shared weights under their Hugging Face names
    v00000040.optimizer.safetensors     moments (part of the shared state in `gradient` mode)
    u00000040.bin                       encoded sum that takes version 40 to 41
    u00000040.commit                    its signed commit
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import SafetensorError
from safetensors.torch import load_file, save

from protocol.control import Snapshot, StateFile
from protocol.errors import PeerFault, StorageError, WireError
from protocol.ids import Digest, Lineage, RoundId, StageId, Version, digest
from protocol.signing import Signed

if TYPE_CHECKING:
    from torch import Tensor

SNAPSHOTS_KEPT = 2  # the newest may be in the middle of being written or fetched by others; one more is safe
PARTS = ("weights", "optimizer")


def kept_snapshots(run_folder: Path) -> tuple[Snapshot, ...]:
    """List the newest snapshot of every stage that an earlier process left in a run's folder."""
    kept: list[Snapshot] = []
    for folder in sorted(run_folder.glob("stage-*")):
        number = folder.name.removeprefix("stage-")
        if number.isdecimal():
            kept += History(folder, stage=StageId(int(number))).snapshots()[:1]
    return tuple(kept)


def file_digest(path: Path) -> Digest:
    """Return the SHA-256 of a file, which may be larger than memory. Takes seconds per gigabyte; raises `OSError`."""
    with path.open("rb") as file:
        return Digest(hashlib.file_digest(file, "sha256").digest())


class History:
    """The snapshots and updates of one stage in one folder."""

    def __init__(self, folder: Path, *, stage: StageId) -> None:
        self._folder = folder
        self._stage = stage
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StorageError(f"cannot write to {folder}: {error.strerror}.") from None

    # -- snapshots ------------------------------------------------------------------------------------

    def save_snapshot(
        self, tensors: Mapping[str, Mapping[str, Tensor]], *, round_id: RoundId, version: Version, lineage: Lineage
    ) -> Snapshot:
        """Write a snapshot (`tensors` by part) and prune what is too old. Atomic: all of it or nothing."""
        files = []
        for part in PARTS:
            data = save(dict(tensors[part]), metadata={"format": "pt"})
            self._write(self._part_path(version, part), data)
            files.append(StateFile(part=part, num_bytes=len(data), digest=digest(data)))
        snapshot = Snapshot(stage=self._stage, round=round_id, version=version, lineage=lineage, files=tuple(files))
        self.adopt_snapshot(snapshot)
        return snapshot

    def adopt_snapshot(self, snapshot: Snapshot) -> None:
        """Make a snapshot real whose part files are in place (written here, or fetched by `incoming_path`).

        Whatever is newer belongs to a lineage that was given up: nobody must be led there.
        """
        self._forget_after(snapshot.version)
        self._write(self._snapshot_path(snapshot.version), snapshot.to_bytes())
        self._prune()

    def incoming_path(self, version: Version, part: str) -> Path:
        """Return where a fetched part belongs; it counts only once `adopt_snapshot` was called."""
        return self._part_path(version, part)

    def snapshots(self) -> tuple[Snapshot, ...]:
        """List the snapshots that are there whole, newest first. Contents are verified when they are loaded."""
        found = []
        for path in sorted(self._folder.glob("v*.json"), reverse=True):
            with contextlib.suppress(WireError, OSError):  # a torn or foreign file is simply not a snapshot
                snapshot = Snapshot.from_bytes(path.read_bytes())
                sizes = [self._part_path(snapshot.version, file.part).stat().st_size for file in snapshot.files]
                if sizes == [file.num_bytes for file in snapshot.files]:
                    found.append(snapshot)
        return tuple(found)

    def discard_snapshot(self, version: Version) -> None:
        """Remove a snapshot that turned out to be damaged, or to be none."""
        for path in [self._snapshot_path(version), *(self._part_path(version, part) for part in PARTS)]:
            path.unlink(missing_ok=True)

    def load_snapshot(self, snapshot: Snapshot) -> dict[str, dict[str, Tensor]]:
        """Read a snapshot's tensors by part, after checking every byte.

        Raises `StorageError` if a file is not what was written, `PeerFault` if it is and holds no tensors.
        """
        loaded = {}
        for file in snapshot.files:
            path = self._part_path(snapshot.version, file.part)
            try:
                if file_digest(path) != file.digest:
                    raise StorageError(f"{path.name} is damaged: its SHA-256 does not fit.")
                loaded[file.part] = load_file(path)
            except OSError as error:
                raise StorageError(f"cannot read {path.name}: {error.strerror}.") from None
            except SafetensorError as error:  # whoever promised that hash promised nonsense
                raise PeerFault(f"{path.name} holds no tensors: {error!s:.100}") from None
        return loaded

    # -- updates --------------------------------------------------------------------------------------

    def append(self, version: Version, update: bytes, commit: Signed) -> None:
        """Keep the update that was applied to `version`."""
        self._write(self._folder / f"u{version:08d}.bin", update)
        self._write(self._folder / f"u{version:08d}.commit", commit.to_bytes())

    def keep_commit(self, version: Version, commit: Signed) -> None:
        """Keep the commit that led from `version` to a snapshot which was fetched: it says who the members are."""
        self._write(self._folder / f"u{version:08d}.commit", commit.to_bytes())

    def commit_of(self, version: Version) -> Signed | None:
        """Return the signed commit that followed `version`, or None if it is not kept (any more)."""
        try:
            return Signed.from_bytes((self._folder / f"u{version:08d}.commit").read_bytes())
        except (OSError, WireError):
            return None

    def resolve(self, kind: str, version: Version, part: str) -> Path | None:
        """Return the file of a blob name `state/STAGE/VERSION/PART` or `update/STAGE/VERSION`, if it is here."""
        if kind == "update":
            path = self._folder / f"u{version:08d}.bin"
        elif kind == "state" and part in PARTS and self._snapshot_path(version).exists():
            path = self._part_path(version, part)
        else:
            return None
        return path if path.exists() else None

    # -- private --------------------------------------------------------------------------------------

    def _snapshot_path(self, version: Version) -> Path:
        return self._folder / f"v{version:08d}.json"

    def _part_path(self, version: Version, part: str) -> Path:
        return self._folder / f"v{version:08d}.{part}.safetensors"

    def _write(self, path: Path, data: bytes) -> None:
        """Write a file so that it is there whole or not at all, also after a power cut."""
        temporary = path.with_suffix(path.suffix + ".part")
        try:
            with temporary.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        except OSError as error:
            temporary.unlink(missing_ok=True)
            raise StorageError(f"cannot write {path.name}: {error.strerror}.", hint="Free some disk space.") from None

    def _forget_after(self, version: Version) -> None:
        for path in [*self._folder.glob("v*.json"), *self._folder.glob("v*.safetensors")]:
            if int(path.name[1:9]) > version:
                path.unlink(missing_ok=True)
        for path in self._folder.glob("u*"):
            if int(path.name[1:9]) >= version:
                path.unlink(missing_ok=True)

    def _prune(self) -> None:
        """Drop old snapshots, updates that none of the kept ones needs, and commits before the oldest one's own."""
        versions = sorted((int(path.stem[1:]) for path in self._folder.glob("v*.json")), reverse=True)
        for version in versions[SNAPSHOTS_KEPT:]:
            self._snapshot_path(Version(version)).unlink(missing_ok=True)
            for part in PARTS:
                self._part_path(Version(version), part).unlink(missing_ok=True)
        oldest = versions[:SNAPSHOTS_KEPT][-1]
        for path in self._folder.glob("u*"):
            if int(path.name[1:9]) < oldest - path.name.endswith(".commit"):
                path.unlink(missing_ok=True)
