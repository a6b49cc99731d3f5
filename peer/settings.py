"""What a volunteer can set, and the defaults. Limits set here always win over the run's wishes."""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass, field
from pathlib import Path

import platformdirs

from peer.memory.planning.budgets import Limits
from protocol.ids import PeerId, RunId

IDENTITY_FILE = "identity.key"
LOCK = "lock"
"""Both in the data folder."""


def default_data_dir() -> Path:
    """Return the per-user data folder of this platform."""
    return Path(platformdirs.user_data_dir("handcar", appauthor=False))


def default_name() -> str:
    """Return a name that is unlikely to be taken and says nothing about the volunteer."""
    return f"peer-{os.urandom(2).hex()}"


@dataclass(frozen=True, slots=True, kw_only=True)
class PeerSettings:
    """One volunteer's choices for `peer join`."""

    name: str = field(default_factory=default_name)
    data_dir: Path = field(default_factory=default_data_dir)
    device: str = "auto"
    """A torch device, or `auto`: the first CUDA device if there is one, else the CPU."""
    threads: int = field(default_factory=lambda: max(1, (os.cpu_count() or 2) - 1))
    """CPU threads for compute; one core is left to the volunteer."""
    stages: tuple[int, ...] = ()
    """Ask for these stages; empty leaves the choice to the coordinator."""
    listen: tuple[str, ...] = ("/ip4/0.0.0.0/tcp/0",)
    announce: tuple[str, ...] = ()
    slots: int = 8
    """Tasks from other peers that may be under way here at once."""
    in_flight: int = 0
    """Microbatches that stage 0 keeps in the pipeline; 0 picks what keeps all stages busy and their waves full."""
    activation_bytes: int = 2 << 30
    """Memory for kept activations; beyond it they are recomputed."""
    limits: Limits = field(default_factory=Limits)
    """Of memory, and of an NVMe drive for what fits nowhere else."""
    audit_bytes: int = 1 << 30
    """Host memory for what audits ask for: past weights, and what crossed our hops lately."""
    upload_mbps: float | None = None
    download_mbps: float | None = None
    """How much of the home's line the peer may take, in megabits (10^6) per second; None: all of it."""

    def nvme_folder(self, run: RunId, peer: PeerId) -> Path | None:
        """Return where this peer's state of a run belongs on the NVMe drive, if it may use one."""
        folder = self.limits.nvme
        return None if folder is None else folder / f"handcar-{run[:12]}-{peer[-8:]}"

    @property
    def system(self) -> str:
        return f"{platform.system()} {platform.machine()}"
