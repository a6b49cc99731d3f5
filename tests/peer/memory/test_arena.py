"""What waits for its backward pass outside the device: the same training, and no place is ever lost.

Oracles: training with everything on the device (`placed.py`), bit for bit; the places that are free.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from pathlib import Path
from threading import Timer, current_thread, main_thread
from typing import Any

import pytest
import torch
from torch import Tensor

from peer.engine.stage_engine import StageEngine
from peer.memory.arena import Arena, Parked
from peer.memory.backend import CpuBackend
from peer.memory.disk.store import NvmeStore
from peer.memory.disk.wear import DAY_S, WriteBudgetSpent
from peer.memory.placement import Tier, all_on_device
from peer.memory.pool import Pool
from protocol.errors import LocalFault, StorageError
from tests.peer.engine.placed import (
    ACTIVATION_BYTES,
    MICROBATCHES,
    SHAPE,
    TINY,
    MakePlacement,
    Outcome,
    build,
    equal,
    free_places,
    hidden,
    in_host,
    pass_wave,
    same,
    train,
)
from tests.peer.engine.stored import (
    NOON_S,
    FarBackend,
    all_on_nvme,
    beside,
    build_stored,
    commit,
    crash,
    held,
    recovered,
)

Make = Callable[..., StageEngine]

STAGES = (0, 1, 2)
TIERS = (Tier.HOST, Tier.NVME)
PLACES = 3 * MICROBATCHES  # three blocks at most, all microbatches of a step
PADDED_BYTES = 4096  # of an activation on NVMe
assert ACTIVATION_BYTES == PADDED_BYTES


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Make]:
    """Build engines that park the inputs of all layers, and close them after the test."""
    numbers = itertools.count()
    with ExitStack() as stack:

        def made(stage: int = 1, tier: Tier = Tier.HOST, *, places: int = PLACES, **options: Any) -> StageEngine:
            folder = tmp_path / str(next(numbers)) if tier is Tier.NVME else None
            return stack.enter_context(closing(build(stage, nvme=folder, parked=tier, places=places, **options)))

        yield made


@functools.cache
def yardstick(stage: int) -> Outcome:
    return train(build(stage))


def arena_of(engine: StageEngine) -> Arena:
    assert engine._parking is not None
    return engine._parking.arena


def idle_places(engine: StageEngine, tier: Tier = Tier.HOST) -> list[int]:
    """Return the places that nobody uses, once nothing is under way any more."""
    engine._memory._wait_idle()
    return free_places(engine, tier)


def all_free(engine: StageEngine, tier: Tier = Tier.HOST, places: int = PLACES) -> bool:
    return idle_places(engine, tier) == list(range(places))


def flat(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(-1).view(torch.uint8)


def parked(engine: StageEngine) -> list[Parked]:
    entries = [entry for tape in engine._pending.values() for entry in tape.entries.values()]
    return [entry for entry in entries if isinstance(entry, Parked)]


# -- the same training ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wave", [1, 2, 4])
@pytest.mark.parametrize("tier", TIERS)
@pytest.mark.parametrize("stage", STAGES)
def test_training_does_not_notice(make: Make, stage: int, tier: Tier, wave: int) -> None:
    engine = make(stage, tier)
    assert same(train(engine, wave=wave), yardstick(stage))
    assert all_free(engine, tier)
    assert engine._memory.pool.traffic.flushed[Tier.NVME] == (0 if tier is Tier.HOST else moved_bytes(stage))


def moved_bytes(stage: int) -> int:
    """Every layer's input and, on the last stage, the norm's, once per microbatch."""
    return {0: 1, 1: 2, 2: 2}[stage] * 2 * MICROBATCHES * ACTIVATION_BYTES


@pytest.mark.parametrize("tier", TIERS)
def test_graphs_may_be_kept_besides(make: Make, tier: Tier) -> None:
    """Oracle: the bits; some of the inputs were parked and some of the graphs kept."""
    engine = make(1, tier, keep=90_000)
    passed = engine.forward_wave([hidden(number) for number in range(MICROBATCHES)])
    assert 0 < len(parked(engine)) < 2 * MICROBATCHES
    assert engine.statistics().kept_bytes > 0
    for _, ticket in passed:
        engine.discard(ticket)
    assert same(train(engine, wave=4), yardstick(1))
    assert all_free(engine, tier)


@pytest.mark.parametrize("tier", TIERS)
def test_everything_may_be_somewhere_else(make: Make, tier: Tier) -> None:
    """Weights, gradients, moments and inputs take turns in the threads of one tier."""
    engine = make(1, tier, placement=in_host if tier is Tier.HOST else all_on_nvme)
    assert same(train(engine, wave=2, step_inside=True), yardstick(1))
    assert all_free(engine, tier)


@pytest.mark.parametrize("placement", [all_on_device, all_on_nvme])
def test_a_device_that_is_no_host_memory_is_reached_through_staging(placement: MakePlacement, tmp_path: Path) -> None:
    """As a CUDA device is, here without one; also where nothing but activations is on NVMe."""
    engine = build_stored(1, placement, tmp_path / "s", parked=Tier.NVME, places=PLACES, backend=FarBackend())
    with closing(engine):
        assert same(train(engine, wave=2), yardstick(1))
        assert all_free(engine, Tier.NVME)


@pytest.mark.parametrize("tier", TIERS)
def test_a_step_forgets_what_is_parked_and_it_is_computed_again(make: Make, tier: Tier) -> None:
    """Oracle: the same with everything on the device."""
    results = []
    for engine in (make(1, tier), build(1)):
        (_, early), (_, late) = engine.forward_wave([hidden(1), hidden(2)])
        outcome = Outcome()
        pass_wave(engine, [0], outcome)
        engine.step(1e-2, scale=1.0)
        if engine._parking is not None:
            assert all_free(engine, tier)
        back = engine.backward_wave([(late, hidden(3)), (early, hidden(4))])
        results.append([each for each in back if each is not None] + engine.gradient_shards())
        assert engine.statistics().recomputed == 3
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(*results, strict=True))


# -- places -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tier", TIERS)
def test_a_discarded_microbatch_gives_its_places_back(make: Make, tier: Tier) -> None:
    engine = make(1, tier, places=4)
    (_, first), (_, second) = engine.forward_wave([hidden(1), hidden(2)])
    assert idle_places(engine, tier) == []
    engine.discard(first)
    assert len(idle_places(engine, tier)) == 2
    engine.forward(hidden(3))
    engine.discard(second)
    assert len(idle_places(engine, tier)) == 2


def test_a_place_is_free_only_when_nothing_is_under_way_there(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another microbatch would be overwritten by who is late. Oracle: the places while the copy out is held up, and
    after it."""
    engine = make(1)
    with held(monkeypatch, CpuBackend, "to_host", lambda *_: True) as gate:
        _, ticket = engine.forward(hidden(1))
        engine.discard(ticket)
        assert len(free_places(engine, Tier.HOST)) == PLACES - 2
        gate.set()
        assert all_free(engine)


def test_a_place_is_free_only_when_nothing_is_under_way_back(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """A backward pass that fails has sent for more than it has taken. Oracle: as above."""
    engine = make(1)
    _, ticket = engine.forward(hidden(1))
    first, second = parked(engine)
    with held(monkeypatch, CpuBackend, "to_device", lambda *_: True) as gate:
        arena_of(engine).recall(first)
        engine.discard(ticket)
        engine._memory.start(Tier.HOST, "out", lambda: None).result()
        assert len(free_places(engine, Tier.HOST)) == PLACES - 1
        gate.set()
        assert all_free(engine)
    assert not second.is_recalled


def test_a_place_that_is_used_again_at_once_holds_the_later_input(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Discarded while it was on its way, with no room to spare. Oracle: the sums of an engine that never saw it."""
    engine, other = make(1, places=4), build(1)
    with held(monkeypatch, CpuBackend, "to_host", lambda *_: True) as gate:
        _, unwanted = engine.forward(hidden(1))
        engine.discard(unwanted)
        Timer(0.02, gate.set).start()
        engine._memory._wait_idle()
    for each in (engine, other):
        pass_wave(each, [2, 3], Outcome())
    assert all(
        torch.equal(ours, theirs)
        for ours, theirs in zip(engine.gradient_shards(), other.gradient_shards(), strict=True)
    )


@pytest.mark.parametrize("tier", TIERS)
def test_without_room_a_microbatch_fails_and_keeps_nothing(make: Make, tier: Tier) -> None:
    """Oracle: LocalFault; the microbatch that was there before goes on; the places in the end."""
    engine, other = make(1, tier, places=3), build(1)
    _, ticket = engine.forward(hidden(1))
    for _ in range(3):
        with pytest.raises(LocalFault, match="no room left for activations"):
            engine.forward(hidden(2))
        assert len(idle_places(engine, tier)) == 1
    assert engine.statistics().pending == 1
    engine.backward(ticket, hidden(3))
    _, other_ticket = other.forward(hidden(1))
    other.backward(other_ticket, hidden(3))
    assert all(
        torch.equal(ours, theirs)
        for ours, theirs in zip(engine.gradient_shards(), other.gradient_shards(), strict=True)
    )
    assert all_free(engine, tier, places=3)


def test_a_microbatch_waits_for_places_that_are_being_given_back(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """As many open as were planned, but copies of one that was discarded are not over. Oracle: as if it never was."""
    engine, other = make(1, places=2), build(1)
    with held(monkeypatch, CpuBackend, "to_host", lambda *_: True) as gate:
        engine.discard(engine.forward(hidden(1))[1])
        assert not free_places(engine, Tier.HOST)
        Timer(0.02, gate.set).start()
        _, ticket = engine.forward(hidden(2))
    _, other_ticket = other.forward(hidden(2))
    assert equal([engine.backward(ticket, hidden(3))], [other.backward(other_ticket, hidden(3))])  # type: ignore[list-item]


def test_a_small_activation_takes_a_large_place_if_it_must(make: Make) -> None:
    """And a large one never a small one. Oracle: which places are free; the bytes that come back."""
    engine = make(1, places=0)
    arena = Arena(engine._memory, {Tier.HOST: [100, 1000, 100]})
    pieces = [torch.arange(90, dtype=torch.uint8) + number for number in range(4)]
    entries = [arena.park([piece], Tier.HOST) for piece in pieces[:3]]
    assert [entry.place for entry in entries] == [0, 2, 1]
    with pytest.raises(LocalFault, match="no room left"):
        arena.park([pieces[3]], Tier.HOST)
    arena.drop(entries[0])
    large = torch.zeros(500, dtype=torch.uint8)
    assert arena.may_park([large], Tier.HOST)
    with pytest.raises(LocalFault, match="no room left"):
        arena.park([large], Tier.HOST)
    assert not arena.may_park([torch.zeros(1001, dtype=torch.uint8)], Tier.HOST)
    for entry, piece in zip(entries[1:], pieces[1:3], strict=True):
        assert torch.equal(arena.take(entry)[0], piece)


def test_a_commit_waits_for_activations_on_their_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both pass through the same staging buffer where no disk can read the device. Oracle: the digest of what a later
    process finds; the gradient of an engine that committed nothing."""
    other = build(1)
    engine = build_stored(1, beside, tmp_path / "s", parked=Tier.NVME, places=PLACES, backend=FarBackend())
    with closing(engine):
        with held(monkeypatch, FarBackend, "to_host", lambda *_: current_thread() is not main_thread()) as gate:
            _, ticket = engine.forward(hidden(1))
            Timer(0.05, gate.set).start()
            commit(engine)
        digest = engine.state_digest()
        _, other_ticket = other.forward(hidden(1))
        assert equal([engine.backward(ticket, hidden(2))], [other.backward(other_ticket, hidden(2))])  # type: ignore[list-item]
        crash(engine)
    with closing(build_stored(1, beside, tmp_path / "s", seed=None, backend=FarBackend())) as after:
        assert recovered(after) == 0
        assert after.state_digest() == digest


@pytest.mark.parametrize("failing", ["write", "read"])
def test_a_drive_that_fails_costs_the_microbatch_and_no_place(
    make: Make, failing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: the error where the input is wanted; the places, and a later training as if nothing had happened."""
    engine = make(1, Tier.NVME)

    def broken(store: NvmeStore, unit: int, data: memoryview) -> None:
        raise StorageError("the drive is gone")

    for _ in range(2):
        with monkeypatch.context() as patch:
            patch.setattr(NvmeStore, failing, broken)
            passed = engine.forward_wave([hidden(1), hidden(2)])
            with pytest.raises(StorageError, match="the drive is gone"):
                engine.backward_wave([(ticket, hidden(3)) for _, ticket in passed])
        assert all_free(engine, Tier.NVME)
    engine.zero_gradients()
    assert same(train(engine, wave=4), yardstick(1))


def test_an_input_that_is_being_moved_is_not_let_go(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody but the copy refers to it. Oracle: what comes back, though its memory is asked for by others meanwhile."""
    engine = make(1)
    arena = arena_of(engine)
    with held(monkeypatch, CpuBackend, "to_host", lambda *_: True) as gate:
        entry = arena.park([flat(hidden(1))], Tier.HOST)
        rubbish = [torch.full((*SHAPE, int(TINY["hidden_size"])), 9.0) for _ in range(100)]
        gate.set()
        engine._memory._wait_idle()
    assert torch.equal(arena.take(entry)[0], flat(hidden(1)))
    assert len(rubbish) == 100


# -- what is not parked -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tier", TIERS)
def test_smaller_microbatches_are_parked_too(make: Make, tier: Tier) -> None:
    """A place is as good for less. Oracle: every input has one; the sums of everything on the device."""
    engine, other = make(1, tier, places=4), build(1)
    results = []
    for each in (engine, other):
        (_, whole), (_, small) = each.forward_wave([hidden(1), hidden(2)[:1]])
        if each is engine:
            assert len(parked(each)) == 4
            assert not any(isinstance(entry, Tensor) for entry in each._pending[small.number].entries.values())
        each.backward_wave([(small, hidden(3)[:1]), (whole, hidden(4))])
        results.append(each.gradient_shards())
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(*results, strict=True))
    assert all_free(engine, tier, places=4)


class Time:
    """Stands still until it is told to go on."""

    now_s = NOON_S

    def __call__(self) -> float:
        return self.now_s


def limited(tmp_path: Path, time: Time, num_writes: int) -> StageEngine:
    """Build an engine whose drive takes so many activations a day, and a few bytes."""
    return build_stored(
        1,
        all_on_device,
        tmp_path / "s",
        parked=Tier.NVME,
        places=PLACES,
        writes_per_day_bytes=num_writes * PADDED_BYTES + 100,
        now_s=time,
    )


def test_a_spent_write_budget_keeps_inputs_on_the_device_until_the_next_day(tmp_path: Path) -> None:
    """Oracle: what was parked; the training with everything on the device."""
    time = Time()
    with closing(limited(tmp_path, time, num_writes=3)) as engine:
        outcome = train(engine, wave=1, versions=range(1))
        assert engine._memory.pool.traffic.flushed[Tier.NVME] == 3 * ACTIVATION_BYTES
        time.now_s += DAY_S
        outcome.digests += train(engine, wave=1, versions=range(1, 2)).digests
        assert engine._memory.pool.traffic.flushed[Tier.NVME] == 6 * ACTIVATION_BYTES
        assert outcome.digests == yardstick(1).digests
        assert all_free(engine, Tier.NVME)


def test_what_is_on_its_way_counts_as_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise more is sent than the budget has room for, and a microbatch is lost. Oracle: no error, with the first
    write held up."""
    time = Time()
    with closing(limited(tmp_path, time, num_writes=3)) as engine:
        with held(monkeypatch, Pool, "park", lambda place, *_: True) as gate:
            opening = Timer(0.02, gate.set)
            opening.start()
            passed = engine.forward_wave([hidden(number) for number in range(MICROBATCHES)])
            assert len(parked(engine)) == 3
            opening.join()
        engine.backward_wave([(ticket, hidden(9)) for _, ticket in passed])
        assert all_free(engine, Tier.NVME)


def test_a_spent_budget_is_said_so_by_who_parks_all_the_same(tmp_path: Path) -> None:
    """`may_park` is asked first; whoever does not ask hears of it, and the place is free again."""
    time = Time()
    with closing(limited(tmp_path, time, num_writes=0)) as engine:
        arena = arena_of(engine)
        assert not arena.may_park([flat(hidden(1))], Tier.NVME)
        assert not arena.may_park([flat(hidden(1)[:1])], Tier.NVME)
        entry = arena.park([flat(hidden(1))], Tier.NVME)
        with pytest.raises(WriteBudgetSpent):
            arena.take(entry)
        assert all_free(engine, Tier.NVME)
