"""An engine whose state is in a store: built so that a test chooses the clock, the budget and the backend.

Owns: making it, leaving it as a crash would, and gates that hold up single copies. `placed.py` trains it.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Event
from typing import Any

import pytest

from peer.engine.local_checkpoint import LocalCheckpoint, Standing
from peer.engine.optimizer import OptimizerSpec
from peer.engine.passes import Parking
from peer.engine.stage_engine import StageEngine
from peer.memory.arena import Arena
from peer.memory.backend import Backend, CpuBackend
from peer.memory.disk.store import NvmeStore
from peer.memory.executor import Executor
from peer.memory.moments import MasterName
from peer.memory.placement import Placement, Slots, Tier
from peer.memory.pool import Pool, unit_specs
from peer.memory.units import Inventory, Section, Unit
from peer.model.stage import build_stage
from protocol.ids import Lineage, RoundId, StageId, Version
from tests.peer.engine.placed import ACTIVATION_BYTES, TINY, MakePlacement, homes
from tests.peer.memory.disk.stored_versions import LOCAL

NOON_S = 1_000_000 * 86_400 / 2 + 43_200.0
LINEAGE = Lineage(bytes(32))
PATIENCE_S = 10.0


def build_stored(
    stage: int,
    placement: MakePlacement,
    folder: Path,
    *,
    seed: int | None = 2,
    master: MasterName = "fp32",
    parked: Tier | None = None,
    places: int = 0,
    backend: Backend | None = None,
    **options: Any,
) -> StageEngine:
    """Build an engine with a store in `folder`; `options` go to the store. Without a seed it has no state yet."""
    model = build_stage(TINY, num_stages=3, stage=stage)
    spec = OptimizerSpec(master=master)
    inventory = Inventory(model.layouts, spec.name, spec.master)
    chosen, backend = placement(inventory), backend or CpuBackend()
    sizes = [ACTIVATION_BYTES] * places
    room = sizes if parked is Tier.NVME else []
    specs = unit_specs(inventory, chosen, activations=room)
    store = NvmeStore.open(folder, specs, fingerprint="test", replace=True, volume=LOCAL, **options)
    memory = Executor(Pool(inventory, chosen, backend, store, activations=room), backend)
    parking = None
    if parked is not None:
        parking = Parking(Arena(memory, {parked: sizes}), dict.fromkeys(model.body, parked))
    engine = StageEngine(model, spec, memory, parking=parking)
    if seed is not None:
        engine.initialise(seed)
    return engine


def standing_of(engine: StageEngine) -> Standing:
    return Standing(engine.version, RoundId(engine.version), LINEAGE)


def checkpoint_of(engine: StageEngine, *, now_s: Callable[[], float] = lambda: 0.0) -> LocalCheckpoint:
    return LocalCheckpoint(engine._memory, {StageId(1): engine}, now_s=now_s)


def commit(engine: StageEngine) -> None:
    """Make the present state the one that a later engine recovers."""
    checkpoint = checkpoint_of(engine)
    checkpoint.note(StageId(1), standing_of(engine))
    checkpoint.commit()
    store = engine._memory.pool.store
    assert store is not None
    record = store.committed
    assert record is not None
    entry = record["1"]
    assert isinstance(entry, dict)
    assert entry["version"] == engine.version


def crash(engine: StageEngine) -> None:
    """Let go of the store's folder as the kernel does for a process that dies: nothing is committed or counted."""
    engine._memory._abandon()
    for thread in engine._memory._threads.values():
        thread.shutdown()
    store = engine._memory.pool.store
    assert store is not None
    os.close(store._file._descriptor)
    store._folder.unlock()
    store._is_closed = True


def recovered(engine: StageEngine) -> Version | None:
    """Bring an engine to what its store holds; None if it holds nothing."""
    found = checkpoint_of(engine).recover()
    return found[StageId(1)].version if found else None


class FarBackend(CpuBackend):
    """A device that no disk can read into, so that everything from there goes through staging buffers."""

    is_host_memory = False


@contextmanager
def held(monkeypatch: pytest.MonkeyPatch, owner: type, name: str, which: Callable[..., bool]) -> Iterator[Event]:
    """Hold up the calls of a method that `which` picks (by its arguments) until the event is set, or the block ends."""
    gate, original = Event(), getattr(owner, name)

    def waiting(self: Any, *arguments: Any) -> Any:
        if which(*arguments):
            assert gate.wait(PATIENCE_S), "nobody opened the gate"
        return original(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, waiting)
        try:
            yield gate
        finally:
            gate.set()


# -- placements with NVMe -------------------------------------------------------------------------------------------


def half_and_half(inventory: Inventory) -> Placement:
    """Shards of one block in turn in host memory and on NVMe, every third shard's moments on the device; one slot."""

    def tier(unit: Unit) -> Tier:
        if unit.section is Section.MOMENTS and unit.shard % 3 == 2:
            return Tier.DEVICE
        return Tier.NVME if (unit.block + unit.shard) % 2 else Tier.HOST

    return Placement(homes=homes(inventory, tier), slots=Slots(weights=1, gradient=1, moments=1))


def beside(inventory: Inventory) -> Placement:
    """Weights of one block on NVMe; all else on the device and in host memory, so that a commit has to write it."""

    def tier(unit: Unit) -> Tier:
        if unit.section is Section.WEIGHTS and unit.block == 0:
            return Tier.NVME
        return Tier.DEVICE if unit.section is not Section.MOMENTS or unit.shard % 2 else Tier.HOST

    return Placement(homes=homes(inventory, tier), slots=Slots(weights=1, gradient=1, moments=1))


def all_on_nvme(inventory: Inventory) -> Placement:
    return Placement(homes=homes(inventory, lambda unit: Tier.NVME), slots=Slots(weights=1, gradient=1, moments=1))


def state_on_nvme(inventory: Inventory) -> Placement:
    """The state on NVMe, gradients on the device: only steps write there."""
    return Placement(
        homes=homes(inventory, lambda unit: Tier.DEVICE if unit.section is Section.GRADIENT else Tier.NVME),
        slots=Slots(weights=1, moments=1),
    )
