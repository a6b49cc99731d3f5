"""Budgets: what is taken for free.

Oracles: arithmetic on paper; folders that look like control groups.
"""

from __future__ import annotations

from pathlib import Path

import psutil
import pytest

from peer.memory.disk.volume import Volume
from peer.memory.placement import Tier
from peer.memory.planning import budgets
from peer.memory.planning.budgets import (
    Budgets,
    Limits,
    budgets_here,
    check_limits,
    default_audit_bytes,
    default_budgets,
    free_host_bytes,
    total_host_bytes,
)
from protocol.errors import ConfigError
from tests.peer.memory.planning.plans import GIB, MIB


def test_defaults_leave_something_and_name_no_drive() -> None:
    card = default_budgets(free_host_bytes=32 * GIB, free_device_bytes=10 * GIB)
    assert card == Budgets(device_bytes=9 * GIB, host_bytes=int(31 * GIB * 0.9))
    processor = default_budgets(free_host_bytes=32 * GIB, free_device_bytes=None)
    assert processor == Budgets(device_bytes=int(31 * GIB * 0.9))
    assert default_budgets(free_host_bytes=GIB // 2, free_device_bytes=None) == Budgets(device_bytes=0)


def test_without_a_card_device_and_host_share_the_memory() -> None:
    usable = int(31 * GIB * 0.9)
    some = default_budgets(free_host_bytes=32 * GIB, free_device_bytes=None, device_bytes=GIB)
    assert some == Budgets(device_bytes=GIB, host_bytes=usable - GIB)
    other = default_budgets(free_host_bytes=32 * GIB, free_device_bytes=None, host_bytes=GIB)
    assert other == Budgets(device_bytes=usable - GIB, host_bytes=GIB)
    said = default_budgets(free_host_bytes=GIB, free_device_bytes=None, device_bytes=2 * GIB, host_bytes=3 * GIB)
    assert said == Budgets(device_bytes=2 * GIB, host_bytes=3 * GIB)


def test_a_budget_is_of_a_tier() -> None:
    made = Budgets(device_bytes=1, host_bytes=2, nvme_bytes=3)
    assert [made.of(tier) for tier in Tier] == [1, 2, 3]


# -- what the volunteer allows -------------------------------------------------------------------------


def test_what_audits_may_take_is_left_free(monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: the same machine with so much less; and by default no more than a quarter of a small one."""
    whole = default_budgets(free_host_bytes=32 * GIB, free_device_bytes=None).device_bytes
    kept = default_budgets(free_host_bytes=32 * GIB, free_device_bytes=None, audit_bytes=2 * GIB)
    assert kept.device_bytes == whole - 2 * GIB
    card = default_budgets(free_host_bytes=32 * GIB, free_device_bytes=10 * GIB, audit_bytes=2 * GIB)
    assert card.host_bytes == whole - 2 * GIB
    assert default_budgets(free_host_bytes=2 * GIB, free_device_bytes=None, audit_bytes=2 * GIB).device_bytes == 0
    for free_bytes, expected in ((32 * GIB, GIB), (2 * GIB, int(0.9 * GIB) // 4), (GIB // 2, 0)):
        monkeypatch.setattr(budgets, "free_host_bytes", lambda free_bytes=free_bytes: free_bytes)
        assert default_audit_bytes() == expected


@pytest.mark.parametrize("limits", [Limits(nvme_bytes=GIB), Limits(nvme_writes_per_day_bytes=GIB)])
def test_a_limit_without_its_folder_is_refused(limits: Limits) -> None:
    with pytest.raises(ConfigError, match="needs a folder") as error:
        check_limits(limits)
    assert "--nvme" in error.value.hint
    check_limits(Limits(device_bytes=1, host_bytes=1))


@pytest.mark.parametrize(("kind", "why"), [("tmpfs", "kept in memory"), ("nfs4", "on another machine")])
def test_a_folder_that_no_state_may_be_kept_in_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, why: str
) -> None:
    monkeypatch.setattr(budgets, "volume_of", lambda folder: Volume(kind))
    with pytest.raises(ConfigError, match=why):
        check_limits(Limits(nvme=tmp_path))


def test_our_own_files_count_as_free(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: blocks by hand; a limit still limits; a folder that is not there yet holds nothing."""
    monkeypatch.setattr(budgets, "volume_of", lambda folder: Volume("ext4"))
    monkeypatch.setattr(budgets, "free_disk_bytes", lambda folder: 10 * MIB)
    own = tmp_path / "own"
    own.mkdir()
    (own / "units.data").write_bytes(b"x" * 3 * MIB)

    def on_drive(store: Path | None, nvme_bytes: int | None = None) -> int:
        limits = Limits(nvme=tmp_path, nvme_bytes=nvme_bytes)
        return budgets_here(limits, free_device_bytes=None, store=store).nvme_bytes

    assert on_drive(None) == on_drive(tmp_path / "none") == 10 * MIB
    assert on_drive(own) == 13 * MIB
    assert on_drive(own, 12 * MIB) == 12 * MIB


# -- control groups -----------------------------------------------------------------------------------


@pytest.fixture
def groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine with 16 GiB free, whose control groups lie in a folder."""

    class Free:
        available = 16 * GIB
        total = 32 * GIB

    real = budgets._control_groups
    monkeypatch.setattr(psutil, "virtual_memory", lambda: Free)
    monkeypatch.setattr(budgets, "_control_groups", lambda: real(tmp_path, tmp_path / "own"))
    return tmp_path


def write(folder: Path, **files: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(text + "\n")


def test_no_control_group_limits_nothing(groups: Path) -> None:
    assert free_host_bytes() == 16 * GIB
    assert total_host_bytes() == 32 * GIB


def test_the_tightest_group_of_version_2_counts(groups: Path) -> None:
    (groups / "own").write_text("0::/slice/peer\n")
    write(groups / "slice" / "peer", memory__max="max", memory__current="1")
    write(
        groups / "slice",
        memory__max=str(4 * GIB),
        memory__current=str(3 * GIB),
        memory__stat=f"anon 5\ninactive_file {GIB}",
    )
    assert free_host_bytes() == 2 * GIB  # cached files can go
    assert total_host_bytes() == 4 * GIB


def test_version_1_counts_and_its_largest_number_is_no_limit(groups: Path) -> None:
    (groups / "own").write_text("5:devices:/x\n4:memory:/docker/1\n0::/\n")
    limits = {"memory__limit_in_bytes": str(2 * GIB), "memory__usage_in_bytes": str(GIB)}
    write(groups / "memory" / "docker" / "1", **limits, memory__stat="total_inactive_file 0")
    write(groups / "memory", memory__limit_in_bytes="9223372036854771712", memory__usage_in_bytes="5")
    assert free_host_bytes() == GIB


def test_in_a_container_the_roots_files_are_its_own(groups: Path) -> None:
    (groups / "own").write_text("0::/path/of/another/namespace\n")
    write(groups, memory__max=str(GIB), memory__current="0")
    assert free_host_bytes() == GIB


def test_this_machine_has_some_memory() -> None:
    assert 0 < free_host_bytes() <= psutil.virtual_memory().total
