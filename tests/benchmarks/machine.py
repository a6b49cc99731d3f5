"""What a benchmark ran on, as far as it explains the figures. Nothing that names a person, host or path."""

from __future__ import annotations

import os
import platform
import re
import subprocess
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path

import psutil

PACKAGES = ("torch", "hivemind", "bitsandbytes", "transformers", "numpy")
ROOT = Path(__file__).parents[2]


def machine_facts() -> dict[str, object]:
    """Return hardware, versions and the commit, as they are now."""
    return {
        "cpu": cpu_model(),
        "cores": os.cpu_count(),
        "cores_usable": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_bytes": psutil.virtual_memory().total,
        "gpu": gpu_names(),
        "load_1m": round(os.getloadavg()[0], 2),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        **{name: _version(name) for name in PACKAGES},
        "commit": commit(),
        "date": datetime.now(UTC).date().isoformat(),
    }


def cpu_model(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """Return the processor's name as the system gives it, or its architecture where it gives none."""
    if cpuinfo.exists():
        match = re.search(
            r"^model name\s*:\s*(.+)$", cpuinfo.read_text(encoding="utf-8", errors="replace"), re.MULTILINE
        )
        return match[1].strip() if match else platform.machine()
    return _first_line("sysctl", "-n", "machdep.cpu.brand_string") or platform.machine()


def gpu_names() -> list[str]:
    """Return the names of the NVIDIA GPUs that the driver lists; empty without a driver."""
    return _lines("nvidia-smi", "--query-gpu=name", "--format=csv,noheader")


def commit() -> str | None:
    """Return the commit of this checkout, with '+' if tracked files differ from it; None outside of one."""
    name = _first_line("git", "rev-parse", "--short=12", "HEAD")
    changed = _lines("git", "status", "--porcelain", "--untracked-files=no")
    return name + ("+" if changed else "") if name else None


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _first_line(*command: str) -> str | None:
    lines = _lines(*command)
    return lines[0] if lines else None


def _lines(*command: str) -> list[str]:
    """Return what `command` printed; nothing if it is not there, fails or hangs: a fact may be missing."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10, cwd=ROOT)
    except (OSError, subprocess.SubprocessError):
        return []
    return [line.strip() for line in done.stdout.splitlines() if line.strip()]
