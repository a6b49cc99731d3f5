"""What lies under a folder: which file system, on which kind of drive, and whether training state may stream there.

Owns: reading `/proc/self/mountinfo` and `/sys`, and the list of file systems that are not fit. Must not know: the
store (`store.py`), which refuses what `refuse_unfit` refuses and shows what `warning` says.
"""

from __future__ import annotations

import os
import re
import sys
from dataclasses import dataclass
from pathlib import Path

from protocol.errors import ConfigError, StorageError

# proc(5) names them; `fuse.*` is listed by its prefix, with sshfs, rclone and the like, below
IN_MEMORY = frozenset({"tmpfs", "ramfs", "devtmpfs", "hugetlbfs"})
OVER_NETWORK = frozenset(
    {"nfs", "nfs4", "cifs", "smb3", "smbfs", "9p", "afs", "ceph", "lustre", "glusterfs", "beegfs", "ncpfs", "virtiofs"}
)
WITHOUT_JOURNAL = frozenset({"vfat", "msdos", "exfat"})  # nor owners: others on this machine could read the files

_LOCAL_DRIVE = "Choose a folder on a local SSD."


@dataclass(frozen=True, slots=True)
class Mount:
    """One line of mountinfo, as far as it matters."""

    point: str
    file_system: str
    source: str
    device: str
    """MAJOR:MINOR."""


@dataclass(frozen=True, slots=True)
class Volume:
    """What a folder lies on. Unknown where the system does not say."""

    file_system: str | None = None
    source: str | None = None
    is_rotational: bool | None = None

    def refuse_unfit(self, folder: Path) -> None:
        """Raise `ConfigError` if the state would eat memory, cross a network or not outlive a power cut."""
        kind = self.file_system or ""
        if kind in IN_MEMORY or (self.source or "").startswith("/dev/zram"):
            reason = f"is kept in memory ({kind}), which is what offloading is meant to spare"
        elif kind in OVER_NETWORK:
            reason = f"is on another machine ({kind})"
        elif kind == "fuse" or kind.startswith("fuse."):
            reason = f"is behind a program ({kind}) that does not promise to outlive a power cut"
        elif kind in WITHOUT_JOURNAL:
            reason = f"has a file system ({kind}) that does not outlive a power cut"
        else:
            return
        raise ConfigError(f"training state cannot be kept in {folder}: it {reason}.", hint=_LOCAL_DRIVE)

    @property
    def warning(self) -> str | None:
        """Say what the user should know before training begins there."""
        if self.is_rotational:
            # "says": virtual machines often do, whatever is behind them
            return "the system says that the folder is on a hard disk: if so, training will mostly wait for it."
        return None


def volume_of(folder: Path) -> Volume:
    """Look up what a folder, which need not exist yet, lies on. Raises `StorageError`."""
    if sys.platform != "linux":
        return Volume()
    try:
        # surrogateescape: a mount point may have any name
        mountinfo = Path("/proc/self/mountinfo").read_text("utf-8", errors="surrogateescape")
        mount = mount_of(os.path.realpath(folder), mountinfo)
    except OSError as error:
        raise StorageError(f"cannot find out what {folder} lies on: {error.strerror}.") from error
    if mount is None:
        return Volume()
    return Volume(mount.file_system, mount.source, _is_rotational(mount))


def mount_of(path: str, mountinfo: str) -> Mount | None:
    """Find the mount that an absolute path without symbolic links lies in. Pure."""
    best: Mount | None = None
    for line in mountinfo.splitlines():
        mount = _parsed(line)
        if mount is None or not _contains(mount.point, path):
            continue
        if best is None or len(mount.point) >= len(best.point):  # of two on one point the later one covers the other
            best = mount
    return best


def _parsed(line: str) -> Mount | None:
    """Read `36 35 98:0 /root /point rw,noatime master:1 - ext4 /dev/sda1 rw` (proc(5)); the tags before `-` vary."""
    before, dash, after = line.partition(" - ")
    fields, described = before.split(" "), after.split(" ")
    if not dash or len(fields) < 6 or len(described) < 2:
        return None
    return Mount(_unescaped(fields[4]), described[0], _unescaped(described[1]), fields[2])


def _unescaped(field: str) -> str:
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), field)


def _contains(point: str, path: str) -> bool:
    return point == "/" or path == point or path.startswith(f"{point}/")


def _is_rotational(mount: Mount) -> bool | None:
    """Ask the kernel about the drive. None where it does not know, for example across several drives."""
    device = mount.device
    if device.startswith("0:"):  # btrfs and others give themselves a number; their source is the drive
        try:
            number = os.stat(mount.source).st_rdev
        except (OSError, ValueError):
            return None
        device = f"{os.major(number)}:{os.minor(number)}"
    for queue in ("queue", "../queue"):  # a partition's is its drive's
        try:
            return Path(f"/sys/dev/block/{device}").resolve().joinpath(queue, "rotational").read_text().strip() == "1"
        except OSError:
            continue
    return None
