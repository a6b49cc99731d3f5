"""What `peer join` refuses before it imports, draws or joins anything.

Oracles: the table of exit codes; the modules of a fresh interpreter.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from peer.cli import peer
from peer.memory.disk.volume import Volume
from peer.memory.planning import budgets

INVITE = "handcar1:cut-short"  # refused too, but later


@pytest.mark.parametrize(
    ("options", "kind", "said"),
    [
        (("--nvme", "/dev/shm/x"), "tmpfs", "E-CFG training state cannot be kept in /dev/shm/x: it is kept in memory"),
        (("--nvme", "/mnt/x"), "nfs4", "E-CFG training state cannot be kept in /mnt/x: it is on another machine"),
        (("--nvme-limit", "3GB"), "ext4", "E-CFG --nvme-limit needs a folder."),
        (("--nvme-writes-per-day", "3GB"), "ext4", "E-CFG --nvme-writes-per-day needs a folder."),
        (("--nvme", "/mnt/x", "--nvme-limit", "3GB"), "ext4", "E-INV"),
    ],
)
def test_a_drive_that_is_no_good_is_refused_at_once(
    options: tuple[str, ...], kind: str, said: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(budgets, "volume_of", lambda folder: Volume(kind))
    result = CliRunner().invoke(peer, ["join", INVITE, "--data-dir", str(tmp_path / "data"), *options])
    assert result.exit_code == 3, result.output
    assert len(result.stderr.strip().splitlines()) == 1
    assert result.stderr.startswith(f"peer join: {said}")
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.skipif(not Path("/dev/shm").is_dir(), reason="no file system in memory is known here")
def test_a_folder_in_memory_is_refused_without_torch() -> None:
    code = (
        "import sys; from peer.cli import peer; "
        f"sys.argv[1:] = ['join', {INVITE!r}, '--nvme', '/dev/shm/handcar-test']\n"
        "try:\n    peer()\nfinally:\n    print(*sorted({name.split('.')[0] for name in sys.modules}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, "kept in memory (tmpfs)" in done.stderr) == (3, True), done.stderr
    assert not {"torch", "transformers", "hivemind"} & set(done.stdout.split())
