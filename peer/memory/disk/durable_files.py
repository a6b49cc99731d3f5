"""Small files that are there whole or not at all, also after a power cut; and what a refusal of the disk means.

Owns: the order of write, sync, rename and sync of the folder; turning an `OSError` into a `StorageError` with advice.
Must not know: what the files hold. `store_folder.py` and `wear.py` write with it.
"""

from __future__ import annotations

import errno
import os
import sys
from pathlib import Path

from protocol.errors import StorageError

if sys.platform == "darwin":
    import fcntl

FILE_MODE = 0o600
FOLDER_MODE = 0o700

_FREE_SPACE = "Free some disk space there, or choose another folder."
_OTHER_FOLDER = "Choose a folder that this user may write to."
_HINTS = {
    errno.ENOSPC: _FREE_SPACE,
    errno.EDQUOT: _FREE_SPACE,
    errno.EIO: "The drive or its cable may be failing: look at its SMART data and the system's log.",
    errno.EFBIG: "This system limits how large a file may be: raise it (ulimit -f), or use another file system.",
    errno.EROFS: _OTHER_FOLDER,
    errno.EACCES: _OTHER_FOLDER,
    errno.EPERM: _OTHER_FOLDER,
    errno.ENOTDIR: _OTHER_FOLDER,
    errno.EEXIST: _OTHER_FOLDER,
}


def disk_fault(what: str, error: OSError) -> StorageError:
    """Say in one line, beginning with `what`, what the disk refused, and what to do about it."""
    return StorageError(f"{what}: {error.strerror or error}.", hint=_HINTS.get(error.errno or 0))


def make_folder(folder: Path) -> None:
    """Make a folder that only its owner can look into. One that exists stays as it is: others may use it too."""
    try:
        if folder.is_dir():
            return
        make_folder(folder.parent)
        folder.mkdir(mode=FOLDER_MODE, exist_ok=True)
        sync_folder(folder.parent)  # else a power cut may take the folder with all that was synced in it
    except OSError as error:
        raise disk_fault(f"cannot make the folder {folder}", error) from error


def allocated_bytes(folder: Path) -> int:
    """Return the disk space of all files below a folder, which is free again once they are gone; 0 if there is none."""
    try:
        return sum(
            allocated_bytes(Path(entry.path)) if entry.is_dir(follow_symlinks=False) else entry.stat().st_blocks * 512
            for entry in os.scandir(folder)
        )
    except (FileNotFoundError, NotADirectoryError):
        return 0
    except OSError as error:
        raise disk_fault(f"cannot look into {folder}", error) from error


def write_temporary(path: Path, data: bytes) -> Path:
    """Write and sync what is to become `path`, which stays as it is. Raises `StorageError`."""
    temporary = path.with_name(f"{path.name}.new")
    try:
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, FILE_MODE)
        try:
            view = memoryview(data)
            while view:
                view = view[os.write(descriptor, view) :]
            sync_file(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise disk_fault(f"cannot write {path}", error) from error
    return temporary


def publish(temporary: Path, path: Path) -> None:
    """Let a written file take its place. After a `StorageError` nobody knows which one a power cut would leave."""
    try:
        temporary.replace(path)
        sync_folder(path.parent)
    except OSError as error:
        raise disk_fault(f"cannot replace {path}", error) from error


def sync_folder(folder: Path) -> None:
    """Make the names in a folder survive a power cut. Raises `OSError`."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        sync_file(descriptor)
    finally:
        os.close(descriptor)


def sync_file(descriptor: int) -> None:
    """Make a file's bytes and size survive a power cut. Raises `OSError`."""
    if sys.platform == "darwin":
        fcntl.fcntl(descriptor, fcntl.F_FULLFSYNC)  # its fsync leaves the bytes in the drive's cache
    else:
        os.fsync(descriptor)


def sync_data(descriptor: int) -> None:
    """Make the bytes of a file that keeps its size survive a power cut. Raises `OSError`."""
    if sys.platform == "darwin":
        fcntl.fcntl(descriptor, fcntl.F_FULLFSYNC)
    else:
        os.fdatasync(descriptor)
