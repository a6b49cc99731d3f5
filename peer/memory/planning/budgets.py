"""How much of each tier training may take: what the user says, else what this machine has free.

Owns: `Budgets`, and asking the system for free memory. Must not know: torch (a card's free memory is passed in), what
the memory is used for.

Budgets are for state, activations and working space. The process itself (Python and its libraries, some 700 MB) stands
beside them; the defaults leave room for it.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass, replace
from pathlib import Path

import psutil

from peer.memory.disk.durable_files import allocated_bytes
from peer.memory.disk.volume import volume_of
from peer.memory.placement import Tier
from protocol.errors import ConfigError

RESERVE_BYTES = 1 << 30
"""Left alone by default: the process itself, and what others on this machine will want."""
RESERVE_SHARE = 0.1
"""Left alone besides, of what is free."""
AUDIT_BYTES = 1 << 30
DISK_MARGIN_BYTES = 1 << 29  # as much as `store_folder.py` insists on

_UNLIMITED_BYTES = 1 << 60  # version 1 of cgroups writes "no limit" as a very large number


@dataclass(frozen=True, slots=True, kw_only=True)
class Budgets:
    """What training may take. 0 bytes: that tier is not used."""

    device_bytes: int
    host_bytes: int = 0
    nvme_bytes: int = 0
    nvme_writes_per_day_bytes: int | None = None
    """None: no cap."""

    def of(self, tier: Tier) -> int:
        return {Tier.DEVICE: self.device_bytes, Tier.HOST: self.host_bytes, Tier.NVME: self.nvme_bytes}[tier]


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What the volunteer allows. None: not said."""

    device_bytes: int | None = None
    host_bytes: int | None = None
    nvme: Path | None = None
    nvme_bytes: int | None = None
    nvme_writes_per_day_bytes: int | None = None
    audit_bytes: int = 0
    """Host memory that audits take besides: what is not said above is less by that."""


def default_budgets(
    *,
    free_host_bytes: int,
    free_device_bytes: int | None,
    device_bytes: int | None = None,
    host_bytes: int | None = None,
    audit_bytes: int = 0,
) -> Budgets:
    """Fill in what the user did not say (None): most of what is free. No NVMe: that is the user's to offer.

    `audit_bytes` of the host's are for audits.

    Without a card (`free_device_bytes` None) the device is a part of the host's memory: all of it, unless the user
    says otherwise.
    """
    usable_bytes = max(0, _usable(free_host_bytes) - audit_bytes)
    if device_bytes is None and free_device_bytes is not None:
        device_bytes = int(free_device_bytes * (1 - RESERVE_SHARE))  # an allocator's gaps
    elif device_bytes is None:
        device_bytes = max(0, usable_bytes - (host_bytes or 0))
    if host_bytes is None:
        in_use_bytes = device_bytes if free_device_bytes is None else 0
        host_bytes = max(0, usable_bytes - in_use_bytes)
    return Budgets(device_bytes=device_bytes, host_bytes=host_bytes)


def default_audit_bytes() -> int:
    """Return what audits may take if the user has not said: a small machine should train rather than look at others."""
    return min(AUDIT_BYTES, _usable(free_host_bytes()) // 4)


def _usable(free_bytes: int) -> int:
    return max(0, int((free_bytes - RESERVE_BYTES) * (1 - RESERVE_SHARE)))


def check_limits(limits: Limits) -> None:
    """Raise `ConfigError` for a limit without its folder, or a folder that no state may be kept in."""
    if limits.nvme is not None:
        volume_of(limits.nvme).refuse_unfit(limits.nvme)
        return
    for option, given in (
        ("--nvme-limit", limits.nvme_bytes),
        ("--nvme-writes-per-day", limits.nvme_writes_per_day_bytes),
    ):
        if given is not None:
            raise ConfigError(f"{option} needs a folder.", hint="Name one on an NVMe drive with --nvme.")


def budgets_here(limits: Limits, *, free_device_bytes: int | None, store: Path | None = None) -> Budgets:
    """Return what training may take on this machine. Raises `ConfigError` as `check_limits` does.

    What the folder `store` holds on the drive already is this peer's own, and counts as free.
    """
    check_limits(limits)
    budgets = default_budgets(
        free_host_bytes=free_host_bytes(),
        free_device_bytes=free_device_bytes,
        device_bytes=limits.device_bytes,
        host_bytes=limits.host_bytes,
        audit_bytes=limits.audit_bytes,
    )
    if limits.nvme is None:
        return budgets
    free_bytes = free_disk_bytes(limits.nvme) + (0 if store is None else allocated_bytes(store))
    return replace(
        budgets,
        nvme_bytes=free_bytes if limits.nvme_bytes is None else min(limits.nvme_bytes, free_bytes),
        nvme_writes_per_day_bytes=limits.nvme_writes_per_day_bytes,
    )


def free_disk_bytes(folder: Path, *, margin_bytes: int = DISK_MARGIN_BYTES) -> int:
    """Return how much a folder's drive can take, whether the folder is there yet or not."""
    existing = next(each for each in (folder.absolute(), *folder.absolute().parents) if each.exists())
    return max(0, shutil.disk_usage(existing).free - margin_bytes)


def free_host_bytes() -> int:
    """Return how much memory this process may still take: what the machine has free, within its control group."""
    free = [int(psutil.virtual_memory().available)]
    for limit_file, used_file, cache_key in _control_groups():
        limit, used = _number(limit_file), _number(used_file)
        if limit is not None and used is not None and limit < _UNLIMITED_BYTES:
            free.append(max(0, limit - used + _cached_bytes(used_file.parent / "memory.stat", cache_key)))
    return min(free)


def total_host_bytes() -> int:
    """Return how much memory this process could ever take: what the machine has, within its control group."""
    limits = (_number(limit_file) for limit_file, _, _ in _control_groups())
    return min([int(psutil.virtual_memory().total), *(limit for limit in limits if limit is not None)])


def _control_groups(root: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> list[_Group]:
    """List the files of this process's control group and of those around it, in both versions of cgroups.

    In a container the path may be that of another namespace; then its folder is not there, and the root's files are
    the container's own.
    """
    try:
        lines = own.read_text().splitlines()
    except OSError:
        return []  # no Linux
    groups: list[_Group] = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "memory":
            base, names = root / "memory", ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        elif not controllers:
            base, names = root, ("memory.max", "memory.current", "inactive_file")
        else:
            continue
        folder = base / path.strip("/")
        for each in (folder, *folder.parents):
            groups.append((each / names[0], each / names[1], names[2]))
            if each == base:
                break
    return groups


_Group = tuple[Path, Path, str]
"""Limit, usage, and what `memory.stat` calls cached files that can go at once."""


def _number(path: Path) -> int | None:
    try:
        text = path.read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdecimal() else None  # "max" is no limit


def _cached_bytes(stat: Path, key: str) -> int:
    try:
        lines = stat.read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith(f"{key} ")), 0)
