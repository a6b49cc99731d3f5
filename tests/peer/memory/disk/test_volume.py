"""Which file systems and drives are refused or warned about.

Oracles: lines of /proc/self/mountinfo as proc(5) describes them; `os.stat` for this machine's own.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from peer.memory.disk.volume import Mount, Volume, mount_of, volume_of
from protocol.errors import ConfigError

MOUNTINFO = r"""
22 27 0:21 / /proc rw,relatime - proc proc rw
27 1 259:2 / / rw,relatime shared:1 - ext4 /dev/nvme0n1p2 rw
30 27 0:27 / /dev/shm rw,nosuid,nodev shared:4 master:2 - tmpfs tmpfs rw
40 27 0:44 /@home /home rw,relatime shared:9 - btrfs /dev/mapper/luks-1 rw,subvol=/@home
41 40 0:50 / /home/ann/My\040Share rw - cifs //nas/my\040share rw
42 27 0:51 / /data rw - autofs systemd-1 rw
43 42 8:17 / /data rw,relatime shared:12 - xfs /dev/sdb1 rw
a line that nobody understands
"""

FOUND = {
    "/var/lib/handcar": "ext4",
    "/": "ext4",
    "/dev/shm/x": "tmpfs",
    "/dev/shmx": "ext4",
    "/home/ann": "btrfs",
    "/home/ann/My Share/x": "cifs",
    "/data/x": "xfs",
}


@pytest.mark.parametrize(("path", "file_system"), FOUND.items())
def test_the_innermost_and_last_mount_counts(path: str, file_system: str) -> None:
    mount = mount_of(path, MOUNTINFO)
    assert mount is not None
    assert mount.file_system == file_system


def test_a_line_is_read_in_full() -> None:
    assert mount_of("/home/ann/My Share", MOUNTINFO) == Mount("/home/ann/My Share", "cifs", "//nas/my share", "0:50")


def test_nothing_mounted_is_nothing_known() -> None:
    assert mount_of("/x", "") is None


UNFIT = {
    "tmpfs": "kept in memory",
    "ramfs": "kept in memory",
    "nfs4": "on another machine",
    "cifs": "on another machine",
    "9p": "on another machine",
    "fuse.sshfs": "behind a program",
    "fuse": "behind a program",
    "exfat": "does not outlive a power cut",
}


@pytest.mark.parametrize(("file_system", "reason"), UNFIT.items())
def test_unfit_file_systems_are_refused(file_system: str, reason: str) -> None:
    with pytest.raises(ConfigError, match=reason) as refusal:
        Volume(file_system).refuse_unfit(Path("/x"))
    assert f"({file_system})" in str(refusal.value)
    assert refusal.value.hint == "Choose a folder on a local SSD."


def test_a_compressed_memory_drive_is_memory() -> None:
    with pytest.raises(ConfigError, match="kept in memory"):
        Volume("ext4", "/dev/zram0").refuse_unfit(Path("/x"))


@pytest.mark.parametrize("file_system", ["ext4", "xfs", "btrfs", "zfs", "f2fs", "overlay", "fuseblk", None])
def test_others_are_taken(file_system: str | None) -> None:
    Volume(file_system).refuse_unfit(Path("/x"))


def test_a_hard_disk_is_warned_about() -> None:
    assert "hard disk" in (Volume("ext4", is_rotational=True).warning or "")
    assert Volume("ext4", is_rotational=False).warning is None
    assert Volume("ext4").warning is None


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_this_machine_is_understood(tmp_path: Path) -> None:
    """Oracle: the kernel's memory file system, and whatever pytest's folder lies on, through a link."""
    assert volume_of(Path("/proc")).file_system == "proc"
    (tmp_path / "link").symlink_to(tmp_path)
    assert volume_of(tmp_path / "link" / "not yet there") == volume_of(tmp_path)
    assert os.stat(tmp_path).st_dev != os.stat("/proc").st_dev
    assert volume_of(tmp_path).file_system not in {None, "proc"}
