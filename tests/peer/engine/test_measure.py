"""Measuring this machine: all of a profile is there and within reason. No times are compared.

Oracles: the calculated sizes, what the system says of a process, a backend that notes when it is closed.
"""

from __future__ import annotations

import platform
import subprocess
import sys
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from peer.engine import measure_links
from peer.memory.backend import CpuBackend
from peer.memory.disk.slot_table import UnitSpec, required_bytes
from peer.memory.disk.volume import volume_of
from peer.memory.placement import Tier
from peer.memory.planning.profile import Profile, graph_bytes, workspace_bytes
from protocol.architecture import preset, stage_blocks
from protocol.errors import ConfigError
from protocol.layout import BlockKind
from tests.benchmarks import memory
from tests.benchmarks.harness import Options
from tests.benchmarks.memory import QUICK, Bench

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def measured() -> Profile:
    from peer.engine.measure import measure

    return measure(preset("tiny"), sequences=2, sequence_length=32)


def skip_unless_fit(folder: Path) -> None:
    try:
        volume_of(folder).refuse_unfit(folder)
    except ConfigError as error:
        pytest.skip(f"the temporary folder is not fit: {error}")


def test_every_price_is_there(measured: Profile) -> None:
    for block in stage_blocks(preset("tiny"), 1, 0):
        assert measured.forward_s(block) > 0
        assert measured.backward_s(block) > 0
    assert measured.step_8bit_s > 0
    assert measured.step_32bit_s > 0
    assert measured.link(Tier.HOST).in_bytes_per_s > 1e6
    assert 0 <= measured.link(Tier.HOST).compute_share < 1
    assert measured.is_host_memory
    assert 0 <= measured.gap_share <= 1
    assert measured.nvme is None
    assert Profile.from_json(measured.to_json()) == measured


def test_sizes_are_as_calculated(measured: Profile) -> None:
    layer = next(block for block in stage_blocks(preset("tiny"), 1, 0) if block.kind is BlockKind.LAYER)
    assert measured.blocks[BlockKind.LAYER].graph_bytes == pytest.approx(graph_bytes(layer, 2, 32), rel=0.05)
    assert measured.workspace_bytes(layer) == workspace_bytes(layer, 64)
    assert measured.entry_bytes == 2 * 32 * 64 * 4


def test_a_drive_is_measured_and_left_as_it_was(tmp_path: Path) -> None:
    from peer.engine.measure import measure

    folder = tmp_path / "drive"
    skip_unless_fit(folder)
    profile = measure(preset("tiny"), sequences=1, sequence_length=16, nvme=folder, optimizer="adamw32")
    assert profile.link(Tier.NVME).in_bytes_per_s > 1e5
    assert profile.link(Tier.NVME).out_bytes_per_s > 1e5
    assert list(folder.iterdir()) == []
    assert profile.step_workspace_bytes == 0


def test_the_process_is_measured_without_what_the_probes_held() -> None:
    """Oracle: what the system says of this process afterwards. The probes' buffers alone are 128 MiB and more."""
    from peer.engine.measure import measure

    process_bytes = measure(preset("tiny"), sequences=1, sequence_length=16, optimizer="adamw32").process_bytes
    assert process_bytes == pytest.approx(psutil.Process().memory_info().rss, abs=16 << 20)


@pytest.mark.long
def test_the_plan_says_what_the_process_will_take(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """With state in all three tiers. Oracle: the kernel's peak of a fresh process that trains so. Bytes, no times."""
    skip_unless_fit(tmp_path)
    monkeypatch.setattr(memory, "THREADS", 1)  # what waits for each other is slow where tests run side by side
    monkeypatch.setattr(memory, "WARMUP", 1)
    size = replace(QUICK, hidden=384, ffn=1024, heads=6, kv_heads=6, layers=24, microbatches=2, length=64)
    rows = memory.planned(Bench(size, tmp_path, repeats=1), Options(only=frozenset({"plan_memory"})))
    row = next(row for row in rows if row.row == "plan_memory")
    assert row.holds, row.note


# -- a drive with little room ---------------------------------------------------------------------------------------


def required(unit_bytes: int) -> int:
    """Return the room for the drive's probe, by the store's own account."""
    return required_bytes([UnitSpec("", unit_bytes, durable=False)] * measure_links.DRIVE_UNITS)


@pytest.mark.parametrize("unit_mib", [1, 3, 32, 100])
def test_an_almost_full_drive_is_measured_with_what_is_free(
    unit_mib: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Oracle: what a store of such units takes. Never more than is free, nor much less, nor longer units than usual."""
    free_bytes = required(unit_mib << 20)
    monkeypatch.setattr(measure_links, "free_disk_bytes", lambda _: free_bytes)
    unit_bytes = measure_links._drive_unit_bytes(tmp_path)
    assert required(unit_bytes) <= free_bytes
    assert unit_bytes == min(unit_mib << 20, measure_links.DRIVE_UNIT_BYTES)


def test_a_full_drive_is_refused_and_left_as_it_was(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(measure_links, "free_disk_bytes", lambda _: required(1 << 20) - 1)
    with pytest.raises(ConfigError, match=r"is too full to be measured: 1 B of free space are missing\.$"):
        measure_links.drive_link(tmp_path / "drive", CpuBackend(), lambda _: None)
    assert list(tmp_path.iterdir()) == []


class NotingBackend(CpuBackend):
    """Counts how often it is closed."""

    def __init__(self) -> None:
        self.times_closed = 0

    def close(self) -> None:
        self.times_closed += 1


@pytest.mark.parametrize("is_full", [False, True])
def test_the_device_is_let_go_of(is_full: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Also when the drive turns out not to be fit, which comes last."""
    from peer.engine import measure as measuring

    backend = NotingBackend()
    monkeypatch.setattr(measuring, "backend_for", lambda _: backend)
    monkeypatch.setattr(measure_links, "free_disk_bytes", lambda _: 0)
    with pytest.raises(ConfigError, match="too full") if is_full else nullcontext():
        measuring.measure(
            preset("tiny"), sequences=1, sequence_length=16, optimizer="adamw32", nvme=tmp_path if is_full else None
        )
    assert backend.times_closed == 1


# -- memory that is free --------------------------------------------------------------------------------------------

HOARD = """
import psutil
from peer.memory.backend import give_back_free_memory

held = [bytes(4000) for _ in range(20_000)]  # longer than Python's own pools take, shorter than a mapping
last = bytes(4000)  # above them: what is below it stays with the C library
del held
before = psutil.Process().memory_info().rss
give_back_free_memory()
print(before - psutil.Process().memory_info().rss)
"""


def test_free_memory_goes_back_to_the_system() -> None:
    """Oracle: the kernel's count of a process that has let go of 80 MB."""
    if platform.libc_ver()[0] != "glibc":
        pytest.skip("another C library")
    done = subprocess.run([sys.executable, "-c", HOARD], capture_output=True, text=True, check=True, timeout=120)
    assert int(done.stdout) > 60_000_000
