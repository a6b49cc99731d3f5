"""How a span trains is chosen once, and found again as long as it can be carried out.

The machine is played: what it has free, and what was measured on it. Oracles: the provision of the first start;
arithmetic on paper; the state that an engine finds again.
"""

from __future__ import annotations

import errno
import json
import os
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from peer.engine import provision
from peer.engine.provision import Provision, _read, _write, choose
from peer.memory.disk.durable_files import allocated_bytes
from peer.memory.disk.slot_table import UnitSpec
from peer.memory.disk.store_folder import TABLE_FILE
from peer.memory.placement import Tier, all_on_device, footprint
from peer.memory.planning import budgets
from peer.memory.planning.budgets import Limits
from peer.memory.planning.machines import machine
from peer.memory.planning.profile import Link, Profile, calculated, graph_bytes, workspace_bytes
from peer.memory.segments import Segment
from peer.memory.units import Inventory
from peer.settings import PeerSettings
from protocol.architecture import preset, stage_blocks
from protocol.errors import ConfigError, StorageError
from protocol.ids import StageId
from protocol.manifest import Manifest, ModelSpec
from tests.peer.engine.stored import all_on_nvme, build_stored, commit, recovered, state_on_nvme
from tests.peer.memory.disk.small_store import open_store, refusing
from tests.protocol.manifests import batch_spec, manifest

MIB, GIB = 1 << 20, 1 << 30
CONFIG = preset("bench") | {"num_hidden_layers": 24, "layer_types": None}
SPAN = Inventory(stage_blocks(CONFIG, 4, 1), "adamw8bit")
SEQUENCES, LENGTH = 2, 32
DEVICE_BYTES = 90 * MIB


class Played:
    """A processor with as much free memory and disk as a test says; measuring it is counted."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.free_host_bytes = 64 * GIB
        self.total_host_bytes = 64 * GIB
        self.free_disk_bytes = 64 * GIB
        self.num_measured = 0
        patch.setattr(budgets, "free_host_bytes", lambda: self.free_host_bytes)
        patch.setattr(provision, "total_host_bytes", lambda: self.total_host_bytes)
        patch.setattr(provision, "measure", self._measure)
        patch.setattr(budgets, "free_disk_bytes", self._free_disk)
        patch.setattr(provision, "free_disk_bytes", self._free_disk)

    def _free_disk(self, folder: Path, *, margin_bytes: int = budgets.DISK_MARGIN_BYTES) -> int:
        return max(0, self.free_disk_bytes - margin_bytes)

    def _measure(self, *_: Any, **__: Any) -> Profile:
        self.num_measured += 1
        made = calculated(machine("24gb-pcie4x16")[0], SPAN.blocks, sequences=SEQUENCES, sequence_length=LENGTH)
        return replace(made, nvme=Link(in_bytes_per_s=2e9, out_bytes_per_s=1e9), is_host_memory=True)


@pytest.fixture
def played(monkeypatch: pytest.MonkeyPatch) -> Played:
    return Played(monkeypatch)


def run_of(*, microbatches: int = 4) -> Manifest:
    batch = batch_spec(sequences_per_microbatch=SEQUENCES, sequence_length=LENGTH, microbatches_per_round=microbatches)
    return manifest(model=ModelSpec(config_json=json.dumps(CONFIG), num_stages=4, init_seed=1), batch=batch)


def chosen(limits: Limits, nvme: Path | None = None, **settings: Any) -> Provision:
    made = PeerSettings(limits=limits, threads=1, **settings)
    return choose(run_of(), SPAN, made, device="cpu", stages=[StageId(1)], nvme=nvme)


def leave_state(nvme: Path) -> None:
    """Leave what a start with a plan on NVMe leaves."""
    open_store(nvme, units=(UnitSpec("state", MIB),)).close()
    assert (nvme / TABLE_FILE).exists()


def tight(tmp_path: Path, **changes: Any) -> Limits:
    return replace(Limits(device_bytes=DEVICE_BYTES, nvme=tmp_path), **changes)


WHOLE = footprint(SPAN, all_on_device(SPAN))[Tier.DEVICE]


# -- remembering ------------------------------------------------------------------------------------------------------


def test_what_is_free_at_the_moment_changes_no_plan(played: Played, tmp_path: Path) -> None:
    """A browser more, and our own files on the drive. Oracle: the provision of the first start."""
    played.free_host_bytes = DEVICE_BYTES + 2 * GIB
    first = chosen(tight(tmp_path), tmp_path / "state")
    assert first.peak_bytes[Tier.NVME] > 0 or first.peak_bytes[Tier.HOST] > 0
    leave_state(tmp_path / "state")
    for free_bytes in (played.free_host_bytes - 50 * MIB, GIB, 64 * GIB):
        played.free_host_bytes = free_bytes
        assert chosen(tight(tmp_path), tmp_path / "state") == first
    assert played.num_measured == 1


def test_a_plan_on_the_drive_outlasts_memory_that_comes_free(played: Played, tmp_path: Path) -> None:
    """All of it would fit the device today, but the state lies on the drive. Oracle: the first provision; without
    state there, the short way."""
    played.free_host_bytes = DEVICE_BYTES + 2 * GIB
    limits, nvme = Limits(host_bytes=40 * MIB, nvme=tmp_path), tmp_path / "state"
    first = chosen(limits, nvme, activation_bytes=8 * GIB)
    played.free_host_bytes = 32 * GIB
    assert chosen(limits, nvme, activation_bytes=8 * GIB).placement == all_on_device(SPAN)
    leave_state(nvme)
    assert chosen(limits, nvme, activation_bytes=8 * GIB) == first


def test_a_plan_is_remembered_with_all_that_waits_elsewhere(tmp_path: Path) -> None:
    """Oracle: the same object, through the file: segments kept and spilled, inputs parked, places of several sizes."""
    first = Provision(
        placement=all_on_device(SPAN),
        keep_bytes=5,
        wave=2,
        patience_s=0.5,
        kept=frozenset({Segment(0, 1), Segment(1, 0)}),
        parked={1: Tier.NVME},
        spilled={Segment(0, 0): Tier.HOST},
        places={Tier.HOST: (4096, 4096, 8192), Tier.NVME: (4096,)},
        in_flight=3,
        peak_bytes={Tier.DEVICE: 7},
    )
    _write(tmp_path / "memo", first, SPAN, key="here")
    assert _read(tmp_path / "memo", SPAN, key="here") == first
    assert _read(tmp_path / "memo", SPAN, key="elsewhere") is None


@pytest.mark.slow
def test_other_limits_are_another_plan(played: Played, tmp_path: Path) -> None:
    first = chosen(tight(tmp_path, host_bytes=GIB), tmp_path / "state")
    leave_state(tmp_path / "state")
    second = chosen(tight(tmp_path, host_bytes=40 * MIB), tmp_path / "state")
    assert played.num_measured == 2
    assert second.peak_bytes[Tier.HOST] <= 40 * MIB < first.peak_bytes[Tier.HOST]


@pytest.mark.slow
@pytest.mark.parametrize("lacking", ["total_host_bytes", "free_disk_bytes"])
def test_a_plan_that_cannot_be_carried_out_any_more_is_made_anew(played: Played, tmp_path: Path, lacking: str) -> None:
    """Memory was taken out of the machine, or others have filled the drive. Oracle: the measurements counted."""
    limits = tight(tmp_path, host_bytes=40 * MIB)
    first = chosen(limits, tmp_path / "state")
    assert first.peak_bytes[Tier.NVME] > 50 * MIB
    leave_state(tmp_path / "state")
    setattr(played, lacking, 50 * MIB)
    if lacking == "free_disk_bytes":
        with pytest.raises(ConfigError, match="does not fit"):
            chosen(limits, tmp_path / "state")
    else:
        chosen(limits, tmp_path / "state")
    assert played.num_measured == 2


@pytest.mark.slow
def test_a_drive_that_is_full_of_our_own_state_is_large_enough(played: Played, tmp_path: Path) -> None:
    """The store's own blocks are all that is left. Oracle: the provision of the first start, also if made anew."""
    limits, nvme = tight(tmp_path, host_bytes=40 * MIB), tmp_path / "state"
    first = chosen(limits, nvme)
    open_store(nvme, units=(UnitSpec("state", first.peak_bytes[Tier.NVME] // 2),)).close()
    assert allocated_bytes(nvme) >= first.peak_bytes[Tier.NVME] - 2 * MIB
    played.free_disk_bytes = 4 * MIB
    assert chosen(limits, nvme) == first
    assert played.num_measured == 1
    played.free_disk_bytes = budgets.DISK_MARGIN_BYTES + 4 * MIB
    nvme.with_name("state.plan.json").unlink()
    assert chosen(limits, nvme).peak_bytes == first.peak_bytes
    assert played.num_measured == 2


@pytest.mark.parametrize("damage", [b"", b"{", b"[]", b'{"key": 1}'])
def test_a_memo_that_cannot_be_read_is_none(played: Played, tmp_path: Path, damage: bytes) -> None:
    """Oracle: the provision that is made anew; the memo is whole again, and nothing half-written lies about."""
    first = chosen(tight(tmp_path), tmp_path / "state")
    memo = tmp_path / "state.plan.json"
    memo.write_bytes(damage)
    assert chosen(tight(tmp_path), tmp_path / "state") == first
    assert chosen(tight(tmp_path), tmp_path / "state") == first
    assert (played.num_measured, list(tmp_path.iterdir())) == (2, [memo])


@pytest.mark.slow
def test_a_memo_is_replaced_as_a_whole_or_not_at_all(
    played: Played, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk fills up while another plan is written. Oracles: the bytes of before; their provision."""
    first = chosen(tight(tmp_path), tmp_path / "state")
    memo = tmp_path / "state.plan.json"
    before = memo.read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", refusing(errno.ENOSPC))
        with pytest.raises(StorageError, match=r"cannot write .*state\.plan\.json"):
            chosen(tight(tmp_path, host_bytes=GIB), tmp_path / "state")
    assert (memo.read_bytes(), list(tmp_path.iterdir())) == (before, [memo])
    assert chosen(tight(tmp_path), tmp_path / "state") == first


def test_a_plan_says_how_many_microbatches_it_has_room_for(played: Played, tmp_path: Path) -> None:
    """Oracle: whole waves of the plan, within a round's microbatches."""
    found = chosen(tight(tmp_path))
    assert found.in_flight in {min(found.wave * waves, 4) for waves in (1, 2, 3)}


# -- the short way ----------------------------------------------------------------------------------------------------


def test_graphs_leave_room_to_compute(played: Played) -> None:
    """Oracle: on paper, the device less the state less what a layer's backward pass takes over its graph."""
    device_bytes = WHOLE + 2 * GIB
    layer = SPAN.blocks[0]
    working_bytes = sum(graph_bytes(layer, SEQUENCES, LENGTH)) + workspace_bytes(layer, SEQUENCES * LENGTH)
    found = chosen(Limits(device_bytes=device_bytes), activation_bytes=3 * GIB)
    assert found.placement == all_on_device(SPAN)
    assert 1.5 * GIB < found.keep_bytes <= 2 * GIB - working_bytes
    assert chosen(Limits(device_bytes=device_bytes), activation_bytes=GIB).keep_bytes == GIB
    assert played.num_measured == 0


def test_a_span_that_fits_says_how_many_microbatches_it_has_room_for(played: Played) -> None:
    """Oracle: on paper, each layer's input for each; no fewer than any peer takes on, no more than a round has."""

    def in_flight(device_bytes: int) -> int:
        made = PeerSettings(limits=Limits(device_bytes=device_bytes), threads=1, activation_bytes=MIB)
        found = choose(run_of(microbatches=100), SPAN, made, device="cpu", stages=[StageId(1)])
        assert (found.placement, found.keep_bytes) == (all_on_device(SPAN), MIB)
        assert found.in_flight is not None
        return found.in_flight

    each_bytes = len(SPAN.blocks) * SEQUENCES * LENGTH * CONFIG["hidden_size"] * 4
    device_bytes = WHOLE + 64 * MIB
    room = in_flight(device_bytes)
    assert PeerSettings().slots < room < 63 * MIB // each_bytes
    assert [in_flight(device_bytes + more * each_bytes) for more in (1, 10, 1000)] == [room + 1, room + 10, 100]
    steady = 3  # one here, and one in each of the two stages behind
    assert in_flight(device_bytes - (room - steady) * each_bytes) == PeerSettings().slots
    assert played.num_measured == 0


# -- the state under another plan -------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_state_outlives_a_plan_with_other_scratch(tmp_path: Path) -> None:
    """Gradients move to the drive, and places for activations; then away again. Oracle: the digest."""
    with closing(build_stored(1, state_on_nvme, tmp_path / "s")) as engine:
        engine.step(1e-3, scale=1.0)
        commit(engine)
        digest = engine.state_digest()
    with closing(build_stored(1, all_on_nvme, tmp_path / "s", seed=None, parked=Tier.NVME, places=3)) as engine:
        assert recovered(engine) == 1
        assert engine.state_digest() == digest
        engine.step(1e-3, scale=1.0)
        commit(engine)
        digest = engine.state_digest()
    with closing(build_stored(1, state_on_nvme, tmp_path / "s", seed=None)) as engine:
        assert recovered(engine) == 2
        assert engine.state_digest() == digest
