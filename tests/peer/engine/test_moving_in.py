"""A state that was left on NVMe comes back into memory when new limits make all of it fit there.

Stores and engines are real. Oracle: the digest that the engine on NVMe had, and what a later engine on NVMe finds.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any, get_args

import pytest
import torch

from peer.engine import build
from peer.engine.build import build_span
from peer.engine.local_checkpoint import Standing, move_in
from peer.engine.optimizer import OptimizerSpec
from peer.engine.provision import Provision
from peer.engine.span import SpanEngine
from peer.engine.stage_engine import StageEngine
from peer.memory.backend import CpuBackend
from peer.memory.disk.store_folder import DATA_FILE, TABLE_FILE
from peer.memory.executor import open_memory
from peer.memory.moments import MasterName
from peer.memory.placement import Placement, Tier, all_on_device
from peer.memory.units import Inventory
from peer.model.stage import build_stage
from peer.settings import PeerSettings
from protocol.ids import StageId
from protocol.manifest import Manifest, ModelSpec
from tests.peer.engine.placed import ACTIVATION_BYTES, TINY, MakePlacement, in_host, mixed
from tests.peer.engine.stored import (
    FarBackend,
    all_on_nvme,
    beside,
    build_stored,
    commit,
    half_and_half,
    recovered,
    standing_of,
)
from tests.protocol.manifests import manifest

STAGE = StageId(1)


def leave(folder: Path, placement: MakePlacement = all_on_nvme, master: MasterName = "fp32") -> tuple[bytes, Standing]:
    """Train with the state on NVMe, commit, take one step more, and go; return digest and standing of the commit."""
    with closing(build_stored(STAGE, placement, folder, master=master)) as engine:
        for _ in range(2):
            engine.step(1e-3, scale=1.0)
        commit(engine)
        left = engine.state_digest(), standing_of(engine)
        engine.step(1e-3, scale=1.0)
        return left


def in_memory(
    placement: MakePlacement, *, master: MasterName = "fp32", backend: CpuBackend | None = None
) -> StageEngine:
    """Build an engine that has nothing to do with any drive."""
    model, spec = build_stage(TINY, num_stages=3, stage=STAGE), OptimizerSpec(master=master)
    inventory = Inventory(model.layouts, spec.name, spec.master)
    return StageEngine(model, spec, open_memory(inventory, placement(inventory), backend or CpuBackend()))


def moved_in(engine: StageEngine, folder: Path, *, fingerprint: str = "test") -> dict[StageId, Standing]:
    return move_in(engine._memory, {STAGE: engine}, folder=folder, fingerprint=fingerprint)


@pytest.mark.parametrize("master", get_args(MasterName))
@pytest.mark.parametrize("placement", [all_on_device, in_host, mixed])
@pytest.mark.parametrize("before", [all_on_nvme, half_and_half, beside])
def test_the_state_is_the_same_bit_by_bit(
    before: MakePlacement, placement: Callable[[Inventory], Placement], master: MasterName, tmp_path: Path
) -> None:
    """Wherever it lay, and wherever it lives now. Oracle: digest, standing, and the digest a step later."""
    digest, standing = leave(tmp_path / "s", before, master)
    with closing(in_memory(placement, master=master)) as engine:
        assert moved_in(engine, tmp_path / "s") == {STAGE: standing}
        assert (engine.version, engine.steps) == (2, 2)
        assert engine.state_digest() == digest
        engine.step(1e-3, scale=1.0)
        later = engine.state_digest()
    with closing(build_stored(STAGE, before, tmp_path / "s", seed=None, master=master)) as again:
        assert recovered(again) == 2, "it was only read"
        assert again.state_digest() == digest
        again.step(1e-3, scale=1.0)
        assert again.state_digest() == later


def test_a_device_that_no_disk_can_read_into_is_filled_as_well(tmp_path: Path) -> None:
    digest, _ = leave(tmp_path / "s")
    with closing(in_memory(mixed, backend=FarBackend())) as engine:
        assert moved_in(engine, tmp_path / "s")
        assert engine.state_digest() == digest


@pytest.mark.parametrize("damage", ["data", "table", "another span", "never committed"])
def test_what_is_not_whole_or_not_ours_is_left_alone(damage: str, tmp_path: Path) -> None:
    """Oracle: no standing, an engine that can still begin anew, and the files as they were."""
    folder = tmp_path / "s"
    if damage == "never committed":
        build_stored(STAGE, all_on_nvme, folder).close()
    else:
        leave(folder)
    if damage in ("data", "table"):
        path = folder / (DATA_FILE if damage == "data" else TABLE_FILE)
        data = bytearray(path.read_bytes())
        for at in range(0, len(data), 1000):
            data[at] ^= 0xFF
        path.write_bytes(data)
    table = (folder / TABLE_FILE).read_bytes()
    with closing(in_memory(in_host)) as engine, closing(in_memory(in_host)) as fresh:
        assert moved_in(engine, folder, fingerprint="other" if damage == "another span" else "test") == {}
        for each in (engine, fresh):
            each.initialise(3)
        assert (engine.version, engine.state_digest()) == (0, fresh.state_digest())
    assert (folder / TABLE_FILE).read_bytes() == table


def test_a_span_that_fits_memory_today_begins_with_what_lies_on_the_drive(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Also where activations alone go to the drive: their store must not throw the state away. Oracle: standing and
    digest, three starts in a row."""
    run = manifest(model=ModelSpec(config_json=json.dumps(TINY), num_stages=3, init_seed=1))
    nvme = tmp_path / "s"

    def start(placement: MakePlacement, **more: Any) -> SpanEngine:
        def choose(manifest: Manifest, inventory: Inventory, *_: object, **__: object) -> Provision:
            return Provision(placement=placement(inventory), keep_bytes=0, **more)

        monkeypatch.setattr(build, "choose", choose)
        return build_span(run, [STAGE], PeerSettings(device="cpu", threads=torch.get_num_threads()), nvme=nvme)

    with closing(start(all_on_nvme)) as span:
        assert span.resumed == {}
        span.engines[STAGE].step(1e-3, scale=1.0)
        standing, digest = standing_of(span.engines[STAGE]), span.engines[STAGE].state_digest()
        span.note_standing(STAGE, standing)
    on_drive = {"places": {Tier.NVME: [ACTIVATION_BYTES]}, "parked": {0: Tier.NVME}}
    for placement, more in ((all_on_device, {}), (in_host, on_drive), (all_on_nvme, {})):
        with closing(start(placement, **more)) as span:
            assert span.resumed == {STAGE: standing}
            assert span.engines[STAGE].state_digest() == digest
