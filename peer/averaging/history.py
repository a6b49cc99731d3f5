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
import mmap
import os
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import BinaryIO

from peer.memory.disk.durable_files import disk_fault, sync_folder
from protocol.control import STATE_PARTS, Snapshot, StateFile
from protocol.errors import StorageError, WireError
from protocol.ids import Digest, Lineage, RoundId, StageId, Version
from protocol.signing import Signed

SNAPSHOTS_KEPT = 2  # the newest may be in the middle of being written or fetched by others; one more is safe
UPDATES_KEPT_S = 30.0  # at least, however short the rounds are: who looks twice a second, or was just told, follows


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

    def __init__(self, folder: Path, *, stage: StageId, updates_kept_s: float = UPDATES_KEPT_S) -> None:
        self.folder = folder
        self._stage, self._updates_kept_s = stage, updates_kept_s
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StorageError(f"cannot write to {folder}: {error.strerror}.") from None

    # -- snapshots ------------------------------------------------------------------------------------

    def save_snapshot(
        self,
        write: Callable[[Mapping[str, HashingFile]], None],
        *,
        round_id: RoundId,
        version: Version,
        lineage: Lineage,
    ) -> Snapshot:
        """Write a snapshot and prune what is too old. Atomic: all of it or nothing.

        `write` is given an open file for each part and writes the state into them from front to back.
        """
        with contextlib.ExitStack() as stack:
            writing = {part: stack.enter_context(self._writing(self._part_path(version, part))) for part in STATE_PARTS}
            write(writing)
            files = tuple(
                StateFile(part=part, num_bytes=file.num_bytes, digest=file.digest()) for part, file in writing.items()
            )
        snapshot = Snapshot(stage=self._stage, round=round_id, version=version, lineage=lineage, files=files)
        self.adopt_snapshot(snapshot)
        return snapshot

    def adopt_snapshot(self, snapshot: Snapshot) -> None:
        """Make a snapshot real whose part files are in place (written here, or fetched by `incoming_path`).

        Whatever is newer belongs to a lineage that was given up: nobody must be led there.
        """
        self.forget_after(snapshot.version)
        self._write(self._snapshot_path(snapshot.version), snapshot.to_bytes())
        self._prune()

    def incoming_path(self, version: Version, part: str) -> Path:
        """Return where a fetched part belongs; it counts only once `adopt_snapshot` was called."""
        return self._part_path(version, part)

    def snapshots(self) -> tuple[Snapshot, ...]:
        """List the snapshots that are there whole, newest first. Contents are verified when they are loaded."""
        found = []
        for path in sorted(self.folder.glob("v*.json"), reverse=True):
            with contextlib.suppress(WireError, OSError):  # a torn or foreign file is simply not a snapshot
                snapshot = Snapshot.from_bytes(path.read_bytes())
                sizes = [self._part_path(snapshot.version, file.part).stat().st_size for file in snapshot.files]
                if sizes == [file.num_bytes for file in snapshot.files]:
                    found.append(snapshot)
        return tuple(found)

    def discard_snapshot(self, version: Version) -> None:
        """Remove a snapshot that turned out to be damaged, or to be none."""
        for path in [self._snapshot_path(version), *(self._part_path(version, part) for part in STATE_PARTS)]:
            path.unlink(missing_ok=True)

    def check_snapshot(self, snapshot: Snapshot) -> None:
        """Read every byte of a snapshot's files; raise `StorageError` if one is not what was written.

        Takes seconds per gigabyte.
        """
        for file in snapshot.files:
            path = self._part_path(snapshot.version, file.part)
            with _readable(path):
                if file_digest(path) != file.digest:
                    raise StorageError(f"{path.name} is damaged: its SHA-256 does not fit.")

    @contextlib.contextmanager
    def open_snapshot(self, snapshot: Snapshot) -> Iterator[dict[str, BinaryIO]]:
        """Open a snapshot's files by part; raises `StorageError` where that fails."""
        with contextlib.ExitStack() as stack:
            files: dict[str, BinaryIO] = {}
            for file in snapshot.files:
                path = self._part_path(snapshot.version, file.part)
                with _readable(path):
                    files[file.part] = stack.enter_context(path.open("rb"))
            yield files

    # -- updates --------------------------------------------------------------------------------------

    def append(self, version: Version, update: bytes | memoryview, commit: Signed) -> None:
        """Keep the update that was applied to `version`, also after a power cut. Raises `StorageError`.

        A peer that comes back alone goes by it: what the coordinator is told of next should be here.
        """
        self._write(self.folder / f"u{version:08d}.bin", update)
        self._write(self.folder / f"u{version:08d}.commit", commit.to_bytes())
        try:
            sync_folder(self.folder)
        except OSError as error:
            raise disk_fault(f"cannot keep the names in {self.folder}", error) from None

    def keep_commit(self, version: Version, commit: Signed) -> None:
        """Keep the commit that led from `version` to a snapshot which was fetched: it says who the members are."""
        self._write(self.folder / f"u{version:08d}.commit", commit.to_bytes())

    def commit_of(self, version: Version) -> Signed | None:
        """Return the signed commit that followed `version`, or None if it is not kept (any more)."""
        try:
            return Signed.from_bytes((self.folder / f"u{version:08d}.commit").read_bytes())
        except (OSError, WireError):
            return None

    def update_of(self, version: Version, known: Digest) -> memoryview | None:
        """Map the update that was applied to `version`, without a copy; None unless it is here with this SHA-256.

        It is read once before: a mapping can only say by a signal that the drive fails. Raises `StorageError` then.
        """
        path = self.folder / f"u{version:08d}.bin"
        with _readable(path), contextlib.suppress(FileNotFoundError):
            if file_digest(path) == known:
                with path.open("rb") as file:
                    return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
        return None

    def resolve(self, kind: str, version: Version, part: str) -> Path | None:
        """Return the file of a blob name `state/STAGE/VERSION/PART` or `update/STAGE/VERSION`, if it is here."""
        if kind == "update":
            path = self.folder / f"u{version:08d}.bin"
        elif kind == "state" and part in STATE_PARTS and self._snapshot_path(version).exists():
            path = self._part_path(version, part)
        else:
            return None
        return path if path.exists() else None

    def forget_after(self, version: Version) -> None:
        """Drop snapshots newer than a version, and what led there: they are of a lineage that was given up."""
        for path in [*self.folder.glob("v*.json"), *self.folder.glob("v*.safetensors")]:
            if int(path.name[1:9]) > version:
                path.unlink(missing_ok=True)
        for path in self.folder.glob("u*"):
            if int(path.name[1:9]) >= version:
                path.unlink(missing_ok=True)

    # -- private --------------------------------------------------------------------------------------

    def _snapshot_path(self, version: Version) -> Path:
        return self.folder / f"v{version:08d}.json"

    def _part_path(self, version: Version, part: str) -> Path:
        return self.folder / f"v{version:08d}.{part}.safetensors"

    def _write(self, path: Path, data: bytes | memoryview) -> None:
        """Write a file so that it is there whole or not at all, also after a power cut."""
        with self._writing(path) as file:
            file.write(data)

    @contextlib.contextmanager
    def _writing(self, path: Path) -> Iterator[HashingFile]:
        """Open a file that gets its name only once it is whole and on the disk."""
        temporary = path.with_suffix(path.suffix + ".part")
        try:
            with temporary.open("wb") as file:
                yield HashingFile(file)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        except OSError as error:
            temporary.unlink(missing_ok=True)
            raise StorageError(f"cannot write {path.name}: {error.strerror}.", hint="Free some disk space.") from None
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise

    def _prune(self) -> None:
        """Drop old snapshots, older updates that none of the kept ones needs, and commits before the oldest one's."""
        versions = sorted((int(path.stem[1:]) for path in self.folder.glob("v*.json")), reverse=True)
        for version in versions[SNAPSHOTS_KEPT:]:
            self._snapshot_path(Version(version)).unlink(missing_ok=True)
            for part in STATE_PARTS:
                self._part_path(Version(version), part).unlink(missing_ok=True)
        oldest = versions[:SNAPSHOTS_KEPT][-1]
        for path in self.folder.glob("u*"):
            if int(path.name[1:9]) < oldest - path.name.endswith(".commit") and self._is_old(path):
                path.unlink(missing_ok=True)

    def _is_old(self, update: Path) -> bool:
        try:
            return abs(time.time() - update.stat().st_mtime) >= self._updates_kept_s
        except OSError:  # it is gone
            return False


class HashingFile:
    """A file that is written from front to back, and its hash."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self._hasher = file, hashlib.sha256()
        self.num_bytes = 0

    def write(self, data: bytes | memoryview) -> None:
        self._file.write(data)
        self._hasher.update(data)
        self.num_bytes += len(data)

    def digest(self) -> Digest:
        return Digest(self._hasher.digest())


@contextlib.contextmanager
def _readable(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise StorageError(f"cannot read {path.name}: {error.strerror}.") from None
