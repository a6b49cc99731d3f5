"""Where the state lives and how work is grouped changes the time that training takes, and not one bit of its result.

Oracle: everything on the device, one microbatch at a time, nothing kept, the step after the last backward pass.
"""

from __future__ import annotations

import functools
import io
import itertools
import random
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from pathlib import Path

import pytest
import torch
from torch import Tensor

from peer.engine.optimizer import OptimizerSpec
from peer.engine.stage_engine import StageEngine
from peer.memory.backend import CpuBackend, Event
from peer.memory.placement import Tier
from peer.memory.schedule import Residency
from peer.memory.segments import segments_of
from peer.memory.units import SLOTTED, Section, Unit
from peer.model.stage import Stage
from protocol import architecture, layout
from protocol.architecture import stage_blocks
from protocol.control import STATE_PARTS
from protocol.errors import CorpusError, LocalFault
from protocol.ids import Version
from tests.peer.engine.placed import (
    ACTIVATION_BYTES,
    GRAPH_BYTES,
    MICROBATCHES,
    PLACEMENTS,
    PLENTY,
    TARGETS,
    TINY,
    Outcome,
    build,
    build_span,
    equal,
    free_places,
    hidden,
    in_host,
    in_host_with_one_slot,
    mixed,
    options_of,
    pass_wave,
    same,
    tokens,
    train,
    without_home_for_gradients,
)
from tests.peer.memory.transfers import FETCH, FLUSH, Transfers

Make = Callable[..., StageEngine]

STAGES = (0, 1, 2)  # first, middle, last
TIERS_BELOW = (Tier.HOST, Tier.NVME)
WAVES = (1, 2, 4)
COMBINATIONS = [
    (1, 0, True),
    (1, PLENTY, False),
    (2, 0, False),
    (2, 100_000, True),
    (4, 0, True),
    (4, 100_000, False),
    (4, PLENTY, True),
]
"""Microbatches in a wave, bytes of graphs that are kept (100,000 hold some), whether the step is inside."""

CUTS = {
    "whole": (layout.SHARD_ELEMENTS, architecture.TABLE_ELEMENTS),  # a shard per block
    "shards": (16384, architecture.TABLE_ELEMENTS),  # three in a layer, two in a table
    "cut": (16384, 64 * 300),  # and two blocks in a table
}
"""The most elements of a shard, and of a table's block."""


@pytest.fixture
def cut(monkeypatch: pytest.MonkeyPatch) -> str:
    """With several shards per block and tables of several blocks; the other cuts are among the slow tests."""
    use_cut("cut", monkeypatch)
    return "cut"


@pytest.fixture
def make() -> Iterator[Make]:
    """Build engines as `build` does, and end their transfer threads after the test."""
    with ExitStack() as stack:
        yield lambda *args, **options: stack.enter_context(closing(build(*args, **options)))


def use_cut(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    shard_elements, table_elements = CUTS[how]
    monkeypatch.setattr(layout, "SHARD_ELEMENTS", shard_elements)
    monkeypatch.setattr(architecture, "TABLE_ELEMENTS", table_elements)


@functools.cache
def yardstick(stage: int, how: str) -> Outcome:
    with pytest.MonkeyPatch.context() as patch:
        use_cut(how, patch)
        return train(build(stage))


def check(stage: int, how: str, placement: str, folder: Path, *, wave: int, keep: int, step_inside: bool) -> None:
    with closing(build(stage, PLACEMENTS[placement], keep=keep, **options_of(placement, folder))) as engine:
        outcome = train(engine, wave=wave, step_inside=step_inside)
        assert engine.statistics().pending == engine.statistics().kept_bytes == 0
    assert same(outcome, yardstick(stage, how))
    assert not step_inside or not outcome.sums


def test_the_yardstick_measures_something() -> None:
    """Oracle: the state changes with every step, everything is there, and the cuts are what they are meant to be."""
    for stage in STAGES:
        outcome = yardstick(stage, "whole")
        assert len({*outcome.digests, build(stage).state_digest()}) == len(outcome.digests) + 1
        assert all(any(shard.any() for shard in sums) for sums in outcome.sums)
        per_microbatch = {0: 1, 1: 2, 2: 1}[stage]
        assert len(outcome.tensors) == per_microbatch * MICROBATCHES * len(outcome.digests)
        assert not same(outcome, yardstick(stage, "cut"))  # a hash of other shards


@pytest.mark.parametrize(
    ("how", "shards"),
    [
        ("whole", [[1, 1], [1, 1], [1, 1, 1]]),
        ("shards", [[2, 3], [3, 3], [3, 1, 2]]),
        ("cut", [[1, 1, 3], [3, 3], [3, 1, 1, 1]]),
    ],
)
def test_the_cuts_are_what_they_are_meant_to_be(
    how: str, shards: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: by hand: the number of shards of each block of each stage."""
    use_cut(how, monkeypatch)
    assert [[len(each) for each in build(stage)._memory.pool.inventory.shards] for stage in STAGES] == shards


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("placement", PLACEMENTS)
def test_training_does_not_depend_on_the_placement(stage: int, placement: str, cut: str, tmp_path: Path) -> None:
    """With waves of two; every other combination of wave, budget and step is among the slow tests."""
    check(stage, cut, placement, tmp_path, wave=2, keep=0, step_inside=stage == 1)


@pytest.mark.parametrize(("wave", "keep", "step_inside"), [*itertools.product(WAVES, (0, PLENTY), (False, True))])
def test_training_does_not_depend_on_waves_nor_on_what_is_kept(
    wave: int, keep: int, step_inside: bool, cut: str, tmp_path: Path
) -> None:
    """With one slot of each kind, so that everything moves all the time."""
    check(2, cut, "host, one slot", tmp_path, wave=wave, keep=keep, step_inside=step_inside)


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("how", CUTS)
def test_no_combination_changes_a_bit(
    stage: int, placement: str, how: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    use_cut(how, monkeypatch)
    for number, (wave, keep, step_inside) in enumerate(COMBINATIONS):
        check(stage, how, placement, tmp_path / str(number), wave=wave, keep=keep, step_inside=step_inside)


def test_the_cut_into_shards_alone_changes_no_weight(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: the weights of the engine with a shard per block."""
    whole = build(2)
    train(whole)
    ours = whole.weight_tensors()
    use_cut("shards", monkeypatch)
    cut_up = make(2, in_host)
    train(cut_up)
    theirs = cut_up.weight_tensors()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("keep", [0, PLENTY])
def test_gradients_need_no_home_if_the_step_is_taken_inside(make: Make, stage: int, keep: int, cut: str) -> None:
    """One slot is enough for all gradients of a peer that takes all of a step's microbatches in one wave."""
    outcome = train(make(stage, without_home_for_gradients, keep=keep), wave=MICROBATCHES, step_inside=True)
    assert same(outcome, yardstick(stage, cut))


@pytest.mark.parametrize("tier", [Tier.HOST, Tier.NVME])
@pytest.mark.parametrize("keep", [0, 120_000])
@pytest.mark.parametrize("stage", [pytest.param(0, marks=pytest.mark.slow), 1, pytest.param(2, marks=pytest.mark.slow)])
def test_inputs_may_wait_in_another_tier(make: Make, stage: int, keep: int, tier: Tier, tmp_path: Path) -> None:
    """Those of some blocks; the graphs of others are kept. As many places as blocks and microbatches are enough."""
    places = 3 * MICROBATCHES
    engine = make(
        stage,
        in_host,
        keep=keep,
        nvme=tmp_path / "nvme" if tier is Tier.NVME else None,
        parked=tier,
        places=places,
    )
    assert same(train(engine, wave=4), yardstick(stage, "whole"))
    assert len(free_places(engine, tier)) == places


@pytest.mark.parametrize("tier", [Tier.HOST, Tier.NVME])
@pytest.mark.parametrize("stage", [pytest.param(0, marks=pytest.mark.slow), 1, pytest.param(2, marks=pytest.mark.slow)])
def test_graphs_may_wait_in_another_tier(make: Make, stage: int, tier: Tier, tmp_path: Path) -> None:
    """Nothing is computed twice then. Oracle: as above, with graphs that never left; the count; the free places."""
    places = 3 * 2 * MICROBATCHES
    engine = make(
        stage,
        in_host,
        nvme=tmp_path / "nvme" if tier is Tier.NVME else None,
        spilled=tier,
        graph_places=places,
    )
    if stage < 2:
        _, ticket = engine.forward((tokens if stage == 0 else hidden)(50))
        graphs = engine._pending[ticket.number].graphs.values()
        assert len(graphs) >= 2
        assert all(graph.parked is not None and not graph.savings for graph in graphs)
        engine.discard(ticket)
    assert same(train(engine, wave=4), yardstick(stage, "whole"))
    assert engine.statistics().recomputed == 0
    assert engine.statistics().kept_bytes == 0
    assert len(free_places(engine, tier)) == places


@pytest.mark.parametrize("seed", range(4))
def test_every_segment_may_have_a_fate_of_its_own(make: Make, cut: str, seed: int, tmp_path: Path) -> None:
    """Each segment's graph is kept, waits in host memory or on NVMe, or is made again from an input that waits there:
    drawn. Oracle: training with everything on the device, bit for bit; every place is free in the end."""
    dice = random.Random(seed)
    layouts = stage_blocks(TINY, 3, 1)
    segments = [segment for block, layout in enumerate(layouts) for segment in segments_of(block, layout.kind)]
    fates = {segment: dice.choice([None, Tier.DEVICE, Tier.HOST, Tier.NVME]) for segment in segments}
    elsewhere = {segment: tier for segment, tier in fates.items() if tier in (Tier.HOST, Tier.NVME)}
    there = dice.choice([Tier.HOST, Tier.NVME])
    engine = StageEngine.build(
        TINY,
        num_stages=3,
        stage=1,
        optimizer=OptimizerSpec(),
        seed=2,
        placement=in_host,
        keep_budget_bytes=PLENTY,
        nvme=tmp_path / "nvme",
        kept=[segment for segment, tier in fates.items() if tier is Tier.DEVICE],
        inputs=dict.fromkeys(range(len(layouts)), there),
        graphs=elsewhere,
        places={tier: [ACTIVATION_BYTES, GRAPH_BYTES] * len(segments) * MICROBATCHES for tier in TIERS_BELOW},
    )
    with closing(engine):
        assert same(train(engine, wave=dice.choice([1, 2, 4])), yardstick(1, cut))
        engine._memory._wait_idle()
        for tier in TIERS_BELOW:
            assert len(free_places(engine, tier)) == 2 * len(segments) * MICROBATCHES
        assert engine.statistics().kept_bytes == 0


# -- state ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_state_moves_between_placements(make: Make, placement: str, cut: str, tmp_path: Path) -> None:
    """Saved after one step where it lives, read and trained on elsewhere. Oracle: the undisturbed training."""
    files = {part: io.BytesIO() for part in STATE_PARTS}
    before = make(2, PLACEMENTS[placement], **options_of(placement, tmp_path / "a"))
    train(before, wave=2, versions=range(1))
    weights = before.weight_tensors()
    before.write_state(files)
    for file in files.values():
        file.seek(0)
    others = list(PLACEMENTS)
    other = others[(others.index(placement) + 1) % len(others)]
    after = make(2, PLACEMENTS[other], keep=PLENTY, **options_of(other, tmp_path / "b"))
    train(after, wave=4, step_inside=True, versions=range(7, 8))  # has another state, and its slots are full of it
    after.read_state(files, version=Version(1))
    assert all(torch.equal(tensor, weights[name]) for name, tensor in after.weight_tensors().items())
    outcome = train(after, wave=2, versions=range(1, 2))
    expected = yardstick(2, cut)
    assert outcome.digests == expected.digests[1:]
    assert outcome.losses == expected.losses[MICROBATCHES:]


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_an_open_microbatch_outlives_a_step(make: Make, placement: str, tmp_path: Path) -> None:
    """Oracle: everything on the device. Two stay open while the weights change under them and their slots are used by
    others; one of them is kept as a graph in one engine and as inputs in the other."""
    results = []
    for where, keep in (("device", 0), (placement, PLENTY)):
        engine = make(1, PLACEMENTS[where], keep=keep, **options_of(where, tmp_path))
        (_, early), (_, late) = engine.forward_wave([hidden(50), hidden(51)])
        outcome = Outcome()
        pass_wave(engine, [0, 1], outcome)
        outcome.tensors += [each for each in engine.backward_wave([(early, hidden(60))]) if each is not None]
        engine.step(1e-2, scale=1.0)
        outputs, fresh = engine.forward(hidden(52))
        back = engine.backward_wave([(fresh, hidden(61)), (late, hidden(62))])
        outcome.tensors += [outputs, *(each for each in back if each is not None)]
        outcome.sums.append([shard.clone() for shard in engine.gradient_shards()])
        outcome.digests.append(engine.state_digest())
        results.append(outcome)
    assert same(*results)


def test_two_stages_share_one_memory_without_touching_each_other(cut: str) -> None:
    """Blocks of a span lie in one pool and take turns in its slots. Oracle: each stage alone."""
    engines = build_span(in_host_with_one_slot, (1, 2))
    outcomes = {1: Outcome(), 2: Outcome()}
    for version in range(2):
        for number in range(version * MICROBATCHES, (version + 1) * MICROBATCHES):
            for stage in (2, 1):
                pass_wave(engines[stage], [number], outcomes[stage])
        for stage, engine in engines.items():
            outcomes[stage].sums.append([shard.clone() for shard in engine.gradient_shards()])
            engine.step(1e-3, scale=1 / TARGETS)
        for stage, engine in engines.items():
            outcomes[stage].digests.append(engine.state_digest())
    engines[1].close()
    assert all(same(outcome, yardstick(stage, cut)) for stage, outcome in outcomes.items())


# -- slow and failing transfers ---------------------------------------------------------------------------------------


@pytest.fixture
def transfers(monkeypatch: pytest.MonkeyPatch) -> Iterator[Transfers]:
    watched = Transfers(monkeypatch)
    yield watched
    assert not watched.collisions


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("stage", STAGES)
def test_a_slow_transfer_changes_nothing(stage: int, seed: int, cut: str, transfers: Transfers, tmp_path: Path) -> None:
    """Each takes its own time, before and after the copy; what waits for what is up to the executor."""
    chance = random.Random(seed)
    transfers.delay_s = lambda: chance.choice([0.0, 0.0, 0.0, 0.002])
    placement = list(PLACEMENTS)[1 + seed % (len(PLACEMENTS) - 1)]
    check(stage, cut, placement, tmp_path, wave=chance.choice(WAVES), keep=seed % 2 * PLENTY, step_inside=seed % 3 == 0)
    assert transfers.seen


def test_some_slow_transfers_change_nothing(make: Make, transfers: Transfers, cut: str) -> None:
    """As above, once and quickly."""
    chance = random.Random(1)
    transfers.delay_s = lambda: chance.choice([0.0] * 20 + [0.002])
    assert same(train(make(2, mixed), wave=4), yardstick(2, cut))


def pass_waves(engine: StageEngine, num_waves: int) -> None:
    for _ in range(num_waves):
        pass_wave(engine, [0, 1], Outcome())


def nth(number: int, what: str, section: Section | None = None) -> Callable[[str, Unit], bool]:
    """Let the transfer of that number fail, counted from 0 among those of a kind."""
    counter = itertools.count()

    def fails(kind: str, unit: Unit) -> bool:
        return kind == what and section in (None, unit.section) and next(counter) == number

    return fails


@pytest.mark.parametrize("number", [0, 1, 2, 3, 7])
def test_a_fetch_that_fails_is_heard_of_and_the_next_pass_goes_well(
    make: Make, number: int, transfers: Transfers, cut: str
) -> None:
    """Oracle: the error itself, no matter which fetch it was; then the training as if nothing had happened."""
    engine = make(1, in_host_with_one_slot)
    before = engine.state_digest()
    transfers.fails = nth(number, FETCH)
    with pytest.raises(OSError, match="Input/output"):
        pass_waves(engine, 9)  # what is fetched ahead is only missed by the pass that wants it
    assert not transfers.under_way
    assert engine._memory._residency == Residency()
    engine.zero_gradients()
    assert engine.state_digest() == before
    assert same(train(engine, wave=2), yardstick(1, cut))


@pytest.mark.parametrize("section", SLOTTED)
@pytest.mark.parametrize("number", [0, -1])
def test_a_flush_that_fails_is_heard_of_and_a_restored_state_goes_well(
    make: Make, section: Section, number: int, transfers: Transfers, cut: str
) -> None:
    """What could not be written home is never taken for what should be there: the error comes again until the state is
    read from elsewhere. Oracle: training that goes on from there."""
    engine = make(1, in_host)
    files = saved(engine)
    num_units = len(list(engine._units(section)))
    per_step = num_units * (MICROBATCHES // 2 if section is Section.GRADIENT else 1)
    transfers.fails = nth(number % per_step, FLUSH, section)
    with pytest.raises(OSError, match="Input/output"):
        train(engine, wave=2)
    engine._memory._abandon()
    assert not transfers.under_way
    if section is not Section.GRADIENT:
        for _ in range(2):
            with pytest.raises(OSError, match="Input/output"):
                engine.state_digest()
    restore(engine, files)
    assert same(train(engine, wave=2), yardstick(1, cut))


def saved(engine: StageEngine) -> dict[str, io.BytesIO]:
    files = {part: io.BytesIO() for part in STATE_PARTS}
    engine.write_state(files)
    return files


def restore(engine: StageEngine, files: dict[str, io.BytesIO]) -> None:
    for file in files.values():
        file.seek(0)
    engine.read_state(files, version=Version(0))


@pytest.mark.parametrize("call", [0, 3])
@pytest.mark.parametrize("placement", ["host", "host, one slot", "mixed"])
def test_an_error_while_computing_leaves_no_transfer_under_way(
    make: Make, call: int, placement: str, transfers: Transfers, monkeypatch: pytest.MonkeyPatch, cut: str
) -> None:
    """Oracle: the copies themselves, counted; the error is the worker's; then the training as if nothing had
    happened."""
    engine = make(1, PLACEMENTS[placement])
    train(engine, wave=2, versions=range(9, 10))  # so that there is something on its way
    restore(engine, saved(build(1)))
    transfers.delay_s = lambda: 0.0005
    calls = itertools.count()
    compute = Stage.pass_segment

    def failing(stage: Stage, block: int, segment: int, hidden_BTD: Tensor) -> Tensor:
        if next(calls) == call:
            raise LocalFault("the machine is on fire.")
        return compute(stage, block, segment, hidden_BTD)

    with monkeypatch.context() as patch:
        patch.setattr(Stage, "pass_segment", failing)
        with pytest.raises(LocalFault, match="fire"):
            pass_wave(engine, [0, 1], Outcome())
    assert not transfers.under_way
    num_seen = len(transfers.seen)
    time.sleep(0.003)
    assert len(transfers.seen) == num_seen
    assert engine.statistics().pending == engine.statistics().kept_bytes == 0
    transfers.delay_s = lambda: 0.0
    engine.zero_gradients()
    assert same(train(engine, wave=2), yardstick(1, cut))


def test_an_error_while_computing_leaves_no_input_on_its_way(
    make: Make, cut: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: the copies to the host, counted; every place is free again."""
    engine = make(1, in_host, parked=Tier.HOST, places=4)
    engine._memory.settle()
    begun, ended = itertools.count(), itertools.count()
    copy, compute = CpuBackend.to_host, Stage.pass_segment

    def slow(backend: CpuBackend, target: Tensor, source: Tensor, after: Event) -> None:
        next(begun)
        time.sleep(0.01)
        copy(backend, target, source, after)
        next(ended)

    def failing(stage: Stage, block: int, segment: int, hidden_BTD: Tensor) -> Tensor:
        if block == 1:
            raise LocalFault("the machine is on fire.")
        return compute(stage, block, segment, hidden_BTD)

    with monkeypatch.context() as patch:
        patch.setattr(CpuBackend, "to_host", slow)
        patch.setattr(Stage, "pass_segment", failing)
        with pytest.raises(LocalFault, match="fire"):
            pass_wave(engine, [0, 1], Outcome())
        assert next(begun) == next(ended) == 2
    assert len(free_places(engine, Tier.HOST)) == 4
    assert same(train(engine, wave=2), yardstick(1, cut))


@pytest.mark.parametrize("way", ["to_host", "to_device"])
def test_an_input_that_does_not_come_back_costs_its_microbatch_and_no_place(
    make: Make, way: str, cut: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: the error itself, the free places, and the training after it. Nothing else moves here."""
    engine = make(1, parked=Tier.HOST, places=4)

    def failing(backend: CpuBackend, target: Tensor, source: Tensor, after: Event) -> None:
        raise OSError(5, "Input/output error")

    _, early = engine.forward(hidden(50))
    with monkeypatch.context() as patch:
        patch.setattr(CpuBackend, way, failing)
        (_, late), *_ = engine.forward_wave([hidden(51)])
        with pytest.raises(OSError, match="Input/output"):
            engine.backward(late, hidden(52))
    engine.discard(early)
    assert engine.statistics().pending == 0
    engine._memory._abandon()
    assert free_places(engine, Tier.HOST) == [0, 1, 2, 3]
    engine.zero_gradients()
    assert same(train(engine, wave=2), yardstick(1, cut))


@pytest.mark.parametrize("stage", [0, 2])
def test_bad_tokens_are_refused_before_anything_moves(make: Make, stage: int, transfers: Transfers) -> None:
    """Oracle: no transfer, no gradient."""
    engine = make(stage, in_host)
    engine._memory.settle()
    num_seen = len(transfers.seen)
    bad = tokens(0) + 500
    with pytest.raises(CorpusError, match="outside the vocabulary"):
        engine.forward(bad) if stage == 0 else engine.loss_and_backward(hidden(0), bad)
    assert len(transfers.seen) == num_seen
    assert equal(engine.gradient_shards(), [torch.zeros(shard.num_elements) for shard in engine.shards])
