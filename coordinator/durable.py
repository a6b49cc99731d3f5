"""Files and folders that are either wholly there or not at all, whatever kills us in between.

Owns: write-beside, fsync, rename; and turning the operating system's "no" into a `StorageError` of one
line. Must not know: what is written. Everything that the coordinator keeps outside SQLite goes through
here: run directories, token files, checkpoints, exports.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from protocol.errors import ConfigError, StorageError

ASIDE_PREFIX = "given-up-"  # what the run has gone back from
PART_PREFIX = ".part-"  # whatever starts so was being made when somebody died, and may be deleted
COPY_BYTES = 1024 * 1024


@contextmanager
def storage_faults(path: Path) -> Iterator[None]:
    """Raise `StorageError` naming `path` for any `OSError` inside."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error) or type(error).__name__
        raise StorageError(
            f"cannot write {path}: {reason}.", hint="Free some space there, or choose another directory."
        ) from error


def write_file(path: Path, data: bytes) -> None:
    """Replace `path` by a file of these bytes, durably and in one step."""
    with storage_faults(path):
        handle, temporary = tempfile.mkstemp(prefix=PART_PREFIX, dir=path.parent)
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.chmod(temporary, 0o644)  # mkstemp makes 0600, and these files are for reading
            os.replace(temporary, path)
        except BaseException:
            with suppress(OSError):
                os.unlink(temporary)
            raise
        sync_directory(path.parent)


@contextmanager
def new_directory(final: Path, *, last: str) -> Iterator[Path]:
    """Yield an empty folder that becomes `final` if the body succeeds, and vanishes if it does not.

    Refuses a `final` that already holds something. An existing empty folder is filled, not replaced: it may
    be a mount point or somebody's working directory. Its entry `last` then appears last, so a folder
    without it was never finished. Durable when the body has left.
    """
    existed = final.is_dir()
    with storage_faults(final):
        check_empty(final)
        parent = final if existed else final.parent
        parent.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=f"{PART_PREFIX}{final.name}-", dir=parent))
    try:
        yield staging
        with storage_faults(final):
            staging.chmod(0o755)
            sync_tree(staging)
            if existed:
                for entry in sorted(staging.iterdir(), key=lambda entry: entry.name == last):
                    entry.rename(final / entry.name)
                staging.rmdir()
            else:
                staging.rename(final)
            sync_directory(parent)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise


def check_empty(path: Path) -> None:
    """Raise `ConfigError` unless `path` is free to become a new folder; clear what a killed attempt left in it."""
    if not path.exists():
        return
    if not path.is_dir():
        raise ConfigError(f"{path} is a file, not a directory.")
    for entry in path.iterdir():
        if not entry.name.startswith(PART_PREFIX):
            raise ConfigError(f"{path} is not empty.", hint="Choose a directory that does not exist yet.")
        shutil.rmtree(entry, ignore_errors=True)


def sync_directory(path: Path) -> None:
    """Make renames in `path` survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_tree(path: Path) -> None:
    """Make every file below `path` survive a power cut."""
    for folder, _, names in os.walk(path):
        for name in names:
            descriptor = os.open(os.path.join(folder, name), os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
        sync_directory(Path(folder))
