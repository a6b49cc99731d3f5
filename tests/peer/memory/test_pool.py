"""What lives on NVMe, in whole or in part: the same training, and a state that outlives the process.

Oracles: training with everything on the device (`placed.py`), bit for bit; the digest at the commit; damage by hand.
"""

from __future__ import annotations

import functools
import io
import random
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from dataclasses import replace
from pathlib import Path
from threading import Timer
from typing import get_args

import pytest
import torch

from peer.engine.optimizer import OptimizerSpec
from peer.engine.stage_engine import StageEngine
from peer.engine.stage_state import Step
from peer.memory.backend import CpuBackend
from peer.memory.disk.store_folder import DATA_FILE
from peer.memory.disk.wear import DAY_S, WriteBudgetSpent
from peer.memory.moments import MasterName
from peer.memory.pages import padded
from peer.memory.placement import Placement, Slots, Tier
from peer.memory.pool import Pool
from peer.memory.units import Inventory, Section, Unit
from protocol import architecture, layout
from protocol.architecture import stage_blocks
from protocol.control import STATE_PARTS
from protocol.errors import StorageError
from protocol.ids import StageId, Version
from tests.peer.engine.placed import (
    MICROBATCHES,
    TARGETS,
    TINY,
    MakePlacement,
    Outcome,
    build,
    free_places,
    hidden,
    pass_wave,
    same,
    train,
    without_home_for_gradients,
)
from tests.peer.engine.stored import (
    NOON_S,
    FarBackend,
    all_on_nvme,
    beside,
    build_stored,
    checkpoint_of,
    commit,
    crash,
    half_and_half,
    held,
    recovered,
    standing_of,
    state_on_nvme,
)

Make = Callable[..., StageEngine]

STAGES = (0, 1, 2)
SMALL_SHARD, SMALL_TABLE = 8192, 64 * 300  # six shards in a layer; two blocks in a table, of two shards each
PLACEMENTS = {"half": half_and_half, "beside": beside, "all": all_on_nvme}


@pytest.fixture(autouse=True)
def _cut(monkeypatch: pytest.MonkeyPatch) -> None:
    use_cut(monkeypatch)


def use_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layout, "SHARD_ELEMENTS", SMALL_SHARD)
    monkeypatch.setattr(architecture, "TABLE_ELEMENTS", SMALL_TABLE)


@pytest.fixture
def make() -> Iterator[Make]:
    with ExitStack() as stack:
        yield lambda *args, **options: stack.enter_context(closing(build_stored(*args, **options)))


@functools.cache
def yardstick(stage: int, master: MasterName = "fp32") -> Outcome:
    with pytest.MonkeyPatch.context() as patch:
        use_cut(patch)
        return train(StageEngine.build(TINY, num_stages=3, stage=stage, optimizer=OptimizerSpec(master=master), seed=2))


# -- the same training ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("placement", PLACEMENTS)
def test_training_is_that_on_the_device(make: Make, stage: int, placement: str, tmp_path: Path) -> None:
    engine = make(stage, PLACEMENTS[placement], tmp_path / "s")
    assert same(train(engine, wave=2), yardstick(stage))


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_a_device_that_is_no_host_memory_is_read_through_staging(make: Make, placement: str, tmp_path: Path) -> None:
    """As a CUDA device is, here without one."""
    engine = make(1, PLACEMENTS[placement], tmp_path / "s", backend=FarBackend())
    assert same(train(engine, wave=2, step_inside=True), yardstick(1))


@pytest.mark.parametrize("shard", range(6))
def test_a_slot_is_not_filled_before_all_of_it_has_been_written_home(
    make: Make, shard: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The shards that come in take other ways than those that leave, so each has to wait for all of them. Oracle: the
    undisturbed training, though one shard of the first layer leaves last."""
    engine = make(1, half_and_half, tmp_path / "s")
    for version in range(2):
        outcome = Outcome()
        pass_wave(engine, list(range(version * MICROBATCHES, (version + 1) * MICROBATCHES)), outcome)
        unit = Unit(0, Section.WEIGHTS, shard)
        with held(monkeypatch, Pool, "flush", lambda moved, *_: moved == unit) as gate:  # noqa: B023
            opening = Timer(0.02, gate.set)
            opening.start()
            engine.step(1e-3, scale=1 / TARGETS)
            digest = engine.state_digest()
            opening.join()
        assert digest == yardstick(1).digests[version]


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(8))
def test_no_order_of_copies_changes_a_bit(
    make: Make, seed: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Homes, slots, waves, forms of weights and the time that each copy takes are drawn. Oracle: as above; places."""
    dice = random.Random(seed)
    for name in ("fetch", "flush", "park", "recall"):
        monkeypatch.setattr(Pool, name, slowed(getattr(Pool, name), dice))
    for number in range(3):
        stage, parked = dice.choice(STAGES), dice.choice([None, Tier.HOST, Tier.NVME])
        master: MasterName = dice.choice(get_args(MasterName))
        engine = make(
            stage,
            lambda inventory: drawn_placement(inventory, dice),
            tmp_path / str(number),
            master=master,
            parked=parked,
            places=3 * MICROBATCHES,
            backend=dice.choice([CpuBackend(), FarBackend()]),
        )
        outcome = train(engine, wave=dice.choice([1, 2, 4]), step_inside=dice.choice([False, True]))
        assert same(outcome, yardstick(stage, master)), engine._memory.pool.placement
        if parked is not None:
            engine._memory._wait_idle()
            assert len(free_places(engine, parked)) == 3 * MICROBATCHES


def slowed(copy: Callable[..., None], dice: random.Random) -> Callable[..., None]:
    def slow(*arguments: object) -> None:
        time.sleep(dice.choice([0.0] * 12 + [0.001, 0.003]))
        copy(*arguments)
        time.sleep(dice.choice([0.0] * 12 + [0.002]))

    return slow


def drawn_placement(inventory: Inventory, dice: random.Random) -> Placement:
    """Put a block's weights and gradient on the device as a whole, everything else wherever it falls."""
    chosen: dict[Unit, Tier] = {}
    for section in Section:
        for block in range(len(inventory.blocks)):
            is_free = section is Section.MOMENTS
            whole = None if is_free or dice.random() < 0.8 else Tier.DEVICE
            for unit in inventory.block_units(block, section):
                chosen[unit] = whole or dice.choice(list(Tier) if is_free else [Tier.HOST, Tier.NVME])
    chosen[Unit(0, Section.MOMENTS, 0)] = Tier.NVME  # so that there is a store
    slots = Slots(weights=dice.randint(1, 4), gradient=dice.randint(1, 3), moments=dice.randint(1, 4))
    return Placement(homes=chosen, slots=slots)


def test_a_sum_without_a_home_is_not_begun_anew_in_silence() -> None:
    """Two waves before the step, and one slot for the gradients of two layers: the plan is wrong. Oracle: an error, and
    not what the slot happens to hold; with as many slots as layers it is right."""
    with closing(build(1, without_home_for_gradients)) as engine:
        with pytest.raises(ValueError, match="has no home"):
            train(engine, wave=2, step_inside=True)
        assert engine.state_digest() == build(1).state_digest()
    with closing(build(1, lambda inventory: with_slots(without_home_for_gradients(inventory), 2))) as engine:
        assert same(train(engine, wave=2, step_inside=True), yardstick(1))


def with_slots(placement: Placement, gradient: int) -> Placement:
    return replace(placement, slots=replace(placement.slots, gradient=gradient))


# -- a state that outlives the process --------------------------------------------------------------------------------


@pytest.mark.parametrize("master", ["fp32", "bf16-sr", "bf16+16"])
@pytest.mark.parametrize("placement", ["half", "beside"])
def test_what_was_committed_is_there_after_a_crash(
    make: Make, placement: str, master: MasterName, tmp_path: Path
) -> None:
    """The crash comes in the middle of the next version. Oracle: the digest at the commit, and of training on."""
    before = build_stored(1, PLACEMENTS[placement], tmp_path / "s", master=master)
    train(before, wave=4, versions=range(1))
    commit(before)
    committed = before.state_digest()
    undisturbed = train(before, wave=4, versions=range(1, 2))
    crash(before)

    after = make(1, PLACEMENTS[placement], tmp_path / "s", master=master, seed=None)
    assert recovered(after) == 1
    assert (after.version, after.steps, after.state_digest()) == (1, 1, committed)
    assert train(after, wave=4, versions=range(1, 2)).digests == undisturbed.digests


def test_going_back_to_the_commit_does_not_need_a_new_process(make: Make, tmp_path: Path) -> None:
    """Oracle: the digest at the commit, though every unit has been written since."""
    engine = make(1, half_and_half, tmp_path / "s")
    commit(engine)
    committed = engine.state_digest()
    train(engine, wave=4, versions=range(1))
    assert engine.state_digest() != committed
    assert recovered(engine) == 0
    assert engine.state_digest() == committed


def test_before_the_first_commit_there_is_nothing(make: Make, tmp_path: Path) -> None:
    crash(build_stored(1, half_and_half, tmp_path / "s"))
    assert recovered(make(1, half_and_half, tmp_path / "s", seed=None)) is None


@pytest.mark.parametrize("place", ["NVMe", "memory"])
def test_a_flipped_byte_is_noticed(make: Make, place: str, tmp_path: Path) -> None:
    """In what lives there, and in what was written beside it. Oracle: the error; no state rather than a wrong one."""
    engine = build_stored(1, half_and_half, tmp_path / "s")
    commit(engine)
    pool = engine._memory.pool
    tier = {"NVMe": Tier.NVME, "memory": Tier.HOST}[place]
    unit = next(unit for unit in pool.inventory.units(Section.WEIGHTS) if pool.placement.homes[unit] is tier)
    assert pool.store is not None
    stored = pool.store._units[pool._in_store[unit]]
    assert stored.committed is not None
    offset = stored.offset(stored.committed.number) + 1000
    crash(engine)
    with (tmp_path / "s" / DATA_FILE).open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 1]))

    after = make(1, half_and_half, tmp_path / "s", seed=None)
    with pytest.raises(StorageError, match=r"weights\.layer\..* is damaged"):
        after._memory.recover()
    assert recovered(after) is None
    after.initialise(2)
    assert same(train(after, wave=4), yardstick(1))


def test_what_could_not_be_written_home_is_not_committed(
    make: Make, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A commit would hold what that unit was before. Oracle: the error, long after the step has ended well."""
    engine = make(1, half_and_half, tmp_path / "s")
    engine._memory.settle()
    lost = Unit(1, Section.WEIGHTS, 1)
    assert engine._memory.pool.placement.homes[lost] is Tier.HOST

    flush = Pool.flush

    def failing(pool: Pool, unit: Unit, slot: int, after: object) -> None:
        if unit == lost:
            raise StorageError("the copy failed")
        flush(pool, unit, slot, after)

    with monkeypatch.context() as patch:
        patch.setattr(Pool, "flush", failing)
        engine.step(1e-3, scale=1.0)
        with pytest.raises(StorageError, match="the copy failed"):
            engine._memory.settle()
    with pytest.raises(StorageError):
        engine.state_digest()
    with pytest.raises(StorageError, match="the copy failed"):
        engine._memory.commit({})


@pytest.mark.parametrize("how", ["drawn", "read"])
def test_a_state_that_could_not_be_written_home_can_be_replaced_at_once(
    make: Make, how: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The last write fails when the step has ended well, so nobody has heard of it. Oracle: the undisturbed training,
    from a state that is drawn or read over it."""
    files = {part: io.BytesIO() for part in STATE_PARTS}
    build(1).write_state(files)
    for file in files.values():
        file.seek(0)
    engine = make(1, half_and_half, tmp_path / "s")
    engine._memory.settle()
    lost, flush = Unit(1, Section.WEIGHTS, 4), Pool.flush
    assert engine._memory.pool.placement.homes[lost] is Tier.NVME

    def failing(pool: Pool, unit: Unit, slot: int, after: object) -> None:
        if unit == lost:
            raise StorageError("the copy failed")
        flush(pool, unit, slot, after)

    with monkeypatch.context() as patch:
        patch.setattr(Pool, "flush", failing)
        engine.step(1e-3, scale=1.0)
        engine._memory._wait_idle()
    if how == "drawn":
        engine.initialise(2)
    else:
        engine.read_state(files, version=Version(0))
    assert same(train(engine, wave=4), yardstick(1))
    commit(engine)


# -- a drive that takes only so much a day ---------------------------------------------------------------------------


class Time:
    """Stands still until it is told to go on."""

    def __init__(self) -> None:
        self.now_s = NOON_S

    def __call__(self) -> float:
        return self.now_s


def step_bytes(placement: MakePlacement) -> tuple[int, int]:
    """Return what a step writes to the drive, and what a commit writes beside it."""
    inventory = Inventory(stage_blocks(TINY, 3, 1), "adamw8bit")
    homes = placement(inventory).homes
    state = [unit for section in (Section.WEIGHTS, Section.MOMENTS) for unit in inventory.units(section)]
    sizes = [(homes[unit] is Tier.NVME, padded(inventory.num_bytes(unit))) for unit in state]
    return sum(size for is_there, size in sizes if is_there), sum(size for is_there, size in sizes if not is_there)


def limited(make: Make, placement: MakePlacement, folder: Path, left: int) -> tuple[StageEngine, Time]:
    """Build an engine whose drive takes `left` more bytes today, and commit its initial state."""
    time = Time()
    engine = make(1, placement, folder, now_s=time)
    commit(engine)
    store = engine._memory.pool.store
    assert store is not None
    store._budget._per_day_bytes = store.statistics().written_today_bytes + left
    assert store.budget_left_bytes() == left
    return engine, time


@pytest.mark.parametrize("how", ["after", "inside"])
def test_a_step_that_the_budget_does_not_cover_is_refused_before_anything_has_changed(
    make: Make, how: str, tmp_path: Path
) -> None:
    """One byte is missing. Oracle: the digest, and the gradients; on the next day the training as if nothing had
    happened."""
    engine, time = limited(make, state_on_nvme, tmp_path / "s", step_bytes(state_on_nvme)[0] - 1)
    before = engine.state_digest()
    passed = engine.forward_wave([hidden(number) for number in range(MICROBATCHES)])
    wave = [(ticket, hidden(100 + number)) for number, (_, ticket) in enumerate(passed)]
    if how == "after":
        engine.backward_wave(wave)
        sums = [each.clone() for each in engine.gradient_shards()]
        with pytest.raises(WriteBudgetSpent):
            engine.step(1e-3, scale=1 / TARGETS)
        assert all(torch.equal(a, b) for a, b in zip(sums, engine.gradient_shards(), strict=True))
    else:
        with pytest.raises(WriteBudgetSpent):
            engine.backward_wave(wave, step=Step(1e-3, 1 / TARGETS))
        assert not any(each.any() for each in engine.gradient_shards())
        assert engine.statistics().pending == 0
    assert (engine.version, engine.state_digest()) == (0, before)
    time.now_s += DAY_S
    if how == "after":
        engine.step(1e-3, scale=1 / TARGETS)
    else:
        passed = engine.forward_wave([hidden(number) for number in range(MICROBATCHES)])
        wave = [(ticket, hidden(100 + number)) for number, (_, ticket) in enumerate(passed)]
        engine.backward_wave(wave, step=Step(1e-3, 1 / TARGETS))
    assert engine.state_digest() == yardstick(1).digests[0]


def test_the_budget_of_a_pass_counts_what_is_still_on_its_way(
    make: Make, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """One byte is missing for two steps, and the first one's last write has not begun when the second one asks. Oracle:
    it is refused before anything has changed, and not in its midst; two steps with everything on the device."""
    reference, digests = build(1), []
    for _ in range(2):
        reference.step(1e-3, scale=1.0)
        digests.append(reference.state_digest())
    engine, time = limited(make, state_on_nvme, tmp_path / "s", 2 * step_bytes(state_on_nvme)[0] - 1)
    last = Unit(1, Section.MOMENTS, 5)
    with held(monkeypatch, Pool, "flush", lambda unit, *_: unit == last) as gate:
        engine.step(1e-3, scale=1.0)
        opening = Timer(0.02, gate.set)
        opening.start()
        with pytest.raises(WriteBudgetSpent):
            engine.step(1e-3, scale=1.0)
        opening.join()
    assert (engine.version, engine.state_digest()) == (1, digests[0])
    time.now_s += DAY_S
    engine.step(1e-3, scale=1.0)
    assert engine.state_digest() == digests[1]


def test_a_commit_that_the_budget_does_not_cover_costs_the_checkpoint_alone(make: Make, tmp_path: Path) -> None:
    """Oracle: the old record; the new one on the next day."""
    engine, time = limited(make, beside, tmp_path / "s", sum(step_bytes(beside)) - 1)
    engine.step(1e-3, scale=1.0)
    checkpoint = checkpoint_of(engine)
    checkpoint.note(StageId(1), standing_of(engine))
    checkpoint.commit()
    store = engine._memory.pool.store
    assert store is not None
    assert store.committed is not None
    assert store.committed["1"] == {"version": 0, "round": 0, "lineage": "00" * 32, "steps": 0}
    time.now_s += DAY_S
    commit(engine)
