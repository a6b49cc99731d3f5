"""The simulator: small cases by hand, bytes against the list of operations, and what more of anything does.

Oracles: arithmetic on paper; sums over the operations themselves; the real executor, whose copies and work sleep.
"""

from __future__ import annotations

import time
from collections import Counter
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from peer.memory.placement import Placement, Slots, Tier
from peer.memory.planning.profile import Link, Profile, segment_flop
from peer.memory.planning.simulate import Recomputation, Simulated, Simulation, simulate_step
from peer.memory.planning.workload import Mode, Workload, step_pass, total, trips, wave_passes
from peer.memory.schedule import (
    AT_HOME,
    NOT_NEEDED,
    Enter,
    Fetch,
    Flush,
    Kind,
    Op,
    Residency,
    Work,
    forward_visits,
    schedule,
)
from peer.memory.segments import ATTENTION, FEED_FORWARD, Segment
from peer.memory.units import Inventory, Section, Unit
from tests.peer.memory.planning.plans import homes, inventory, profile

TINY = inventory("tiny", 3, 1)  # two layers, nothing else
LAYER_ELEMENTS = TINY.blocks[0].num_matrix_elements
LAYER_BYTES = TINY.block_bytes(0, Section.WEIGHTS)
WIDE = inventory("tiny", 3, 1, config={"intermediate_size": 60_000})  # its layers are of several shards
STREAMING = Placement(homes=homes(TINY, weights=Tier.HOST), slots=Slots(weights=2))


def layer_profile(**changes: float | Link | None) -> Profile:
    """One second forward and two backward per layer of TINY; a copy of one layer's weights takes one second."""
    link = Link(in_bytes_per_s=LAYER_BYTES, out_bytes_per_s=LAYER_BYTES)
    return profile(**{"host": link, "elements": LAYER_ELEMENTS, **changes})  # type: ignore[arg-type]


def run(ops: list[Op], placement: Placement = STREAMING, **changes: float | Link | None) -> Simulated:
    simulation = Simulation(TINY, placement, layer_profile(**changes))
    simulation.run(ops)
    return simulation.result()


def weights(block: int) -> Unit:
    return Unit(block, Section.WEIGHTS, 0)


# -- by hand ------------------------------------------------------------------------------------------


def test_computing_waits_for_the_first_copy_and_hides_the_second() -> None:
    """On paper: 1 s copy, 1 s compute while the second is copied, 1 s compute."""
    ops, _ = schedule(forward_visits(range(2), 1), TINY, STREAMING)
    done = run(ops)
    assert (done.seconds, done.compute_s, done.stall_s) == pytest.approx((3, 2, 1))
    assert done.fetched[Tier.HOST] == 2 * LAYER_BYTES
    assert done.slowed_s == 0


def test_one_slot_hides_nothing() -> None:
    """On paper: the second copy begins when the first layer is done with."""
    placement = Placement(homes=STREAMING.homes, slots=Slots(weights=1))
    ops, _ = schedule(forward_visits(range(2), 1), TINY, placement)
    assert run(ops, placement).seconds == pytest.approx(4)


def test_a_copy_waits_for_those_before_it_in_its_thread_only() -> None:
    """On paper: two fetches of 1 s in a row; a flush meanwhile in the other direction."""
    ops: list[Op] = [Fetch(weights(0), 0), Flush(weights(1), 1), Fetch(weights(1), 1), Enter(1, 1, NOT_NEEDED)]
    assert run(ops).seconds == pytest.approx(2)
    assert run(ops, host=Link(in_bytes_per_s=LAYER_BYTES, out_bytes_per_s=LAYER_BYTES / 3)).seconds == pytest.approx(4)


def test_a_slot_is_filled_only_after_it_was_emptied() -> None:
    """On paper: 3 s out of slot 0, then 1 s into it."""
    slow_out = Link(in_bytes_per_s=LAYER_BYTES, out_bytes_per_s=LAYER_BYTES / 3)
    assert run([Flush(weights(0), 0), Fetch(weights(1), 0), Enter(1, 0, NOT_NEEDED)], host=slow_out).seconds == (
        pytest.approx(4)
    )


def test_a_slot_taken_without_a_fetch_waits_for_what_leaves_it() -> None:
    slow_out = Link(in_bytes_per_s=LAYER_BYTES, out_bytes_per_s=LAYER_BYTES / 3)
    assert run([Flush(weights(0), 0), Enter(1, 0, NOT_NEEDED)], host=slow_out).stall_s == pytest.approx(3)
    assert run([Flush(weights(0), 0), Enter(0, 0, NOT_NEEDED)], host=slow_out).stall_s == 0  # it is that block's own


def test_a_flush_starts_after_what_was_computed_before_it() -> None:
    ops: list[Op] = [Work(Kind.FORWARD, 0, 0), Flush(weights(0), 0), Fetch(weights(0), 1), Enter(0, 1, NOT_NEEDED)]
    assert run(ops).seconds == pytest.approx(1 + 1 + 1)


def test_a_step_waits_until_its_weights_are_home() -> None:
    ops: list[Op] = [Flush(weights(0), 0), Work(Kind.STEP, 0, 0, AT_HOME)]
    assert run(ops).stall_s == pytest.approx(1)
    assert run([ops[0], Work(Kind.READ, 0, 0, AT_HOME)]).stall_s == 0


def test_recomputation_costs_a_forward_pass_and_keeping_does_not() -> None:
    ops: list[Op] = [Work(Kind.BACKWARD, 0, 0)]
    assert run(ops).seconds == pytest.approx(1 + 2)
    flop = segment_flop(TINY.blocks[0], 1, 4)
    for kept, again_s in (({ATTENTION, FEED_FORWARD}, 0.0), ({ATTENTION}, flop[FEED_FORWARD] / sum(flop))):
        recomputation = Recomputation(kept=frozenset(Segment(0, part) for part in kept))
        simulation = Simulation(TINY, STREAMING, layer_profile(), recomputation)
        simulation.run(ops)
        assert simulation.result().seconds == pytest.approx(2 + again_s)


def test_a_parked_input_goes_out_and_is_waited_for() -> None:
    """On paper: forward 1 s; out 2 s, back 2 s; recomputed backward 3 s."""
    entry_bytes = profile().entry_bytes
    link = Link(in_bytes_per_s=entry_bytes / 2, out_bytes_per_s=entry_bytes / 2)
    simulation = Simulation(TINY, STREAMING, layer_profile(host=link), Recomputation(parked={0: Tier.HOST}))
    simulation.run(
        [Work(Kind.FORWARD, 0, 0), Work(Kind.PARK, 0, 0), Work(Kind.RECALL, 0, 0), Work(Kind.BACKWARD, 0, 0)]
    )
    done = simulation.result()
    assert (done.seconds, done.stall_s) == pytest.approx((1 + 4 + 3, 4))
    assert done.parked[Tier.HOST] == entry_bytes


def test_a_graph_that_left_is_waited_for_and_not_made_again() -> None:
    """On paper: as an input's, 2 s each way, but for the forward pass that the backward pass does not repeat."""
    costs = layer_profile()
    place_bytes = costs.place_bytes(TINY.blocks[0], FEED_FORWARD)
    link = Link(in_bytes_per_s=place_bytes / 2, out_bytes_per_s=place_bytes / 2)
    recomputation = Recomputation(
        kept=frozenset({Segment(0, ATTENTION)}), spilled={Segment(0, FEED_FORWARD): Tier.HOST}
    )
    simulation = Simulation(TINY, STREAMING, layer_profile(host=link), recomputation)
    simulation.run(
        [Work(Kind.FORWARD, 0, 0), Work(Kind.PARK, 0, 0), Work(Kind.RECALL, 0, 0), Work(Kind.BACKWARD, 0, 0)]
    )
    done = simulation.result()
    assert (done.seconds, done.stall_s) == pytest.approx((1 + 4 + 2, 4))
    assert done.parked[Tier.HOST] == place_bytes


def test_only_so_many_inputs_leave_at_a_time() -> None:
    """On paper: 2 s out each; the third waits for the first, the fourth for the second."""
    entry_bytes = profile().entry_bytes
    link = Link(in_bytes_per_s=entry_bytes / 2, out_bytes_per_s=entry_bytes / 2)
    simulation = Simulation(TINY, STREAMING, layer_profile(host=link), Recomputation(parked={0: Tier.HOST}))
    waited_s = []
    for index in range(4):
        simulation.run([Work(Kind.PARK, 0, index)])
        waited_s.append(simulation.result().stall_s)
    assert waited_s == pytest.approx([0, 0, 2, 4])


def test_looking_at_moments_waits_for_what_leaves_their_slot() -> None:
    """On paper: a shard's moments, 3 s out of the slot in which the next one's are looked at without a fetch."""
    unit = Unit(0, Section.MOMENTS, 0)
    placement = Placement(homes=homes(TINY, moments=Tier.HOST), slots=Slots(moments=1))
    link = Link(in_bytes_per_s=LAYER_BYTES, out_bytes_per_s=TINY.num_bytes(unit) / 3)
    assert run([Flush(unit, 0), Work(Kind.READ, 1, 0, 0)], placement, host=link).stall_s == pytest.approx(3)


def test_every_unit_that_comes_into_a_slot_waits_for_what_leaves_it() -> None:
    """On paper: 3 s out of the slot over one link, then two units in, the second over another link that is free."""
    first, second = WIDE.block_units(1, Section.WEIGHTS)[:2]
    found = homes(WIDE, weights=Tier.HOST) | {second: Tier.NVME}
    placement = Placement(homes=found, slots=Slots(weights=1))
    gone = Unit(0, Section.WEIGHTS, 0)
    costs = profile(
        host=Link(in_bytes_per_s=1e15, out_bytes_per_s=WIDE.num_bytes(gone) / 3),
        nvme=Link(in_bytes_per_s=WIDE.num_bytes(second), out_bytes_per_s=1e15),
    )
    simulation = Simulation(WIDE, placement, costs)
    simulation.run([Flush(gone, 0), Fetch(first, 0), Fetch(second, 0), Enter(1, 0, NOT_NEEDED)])
    assert simulation.result().stall_s == pytest.approx(3 + 1)


def test_copies_slow_down_what_is_computed_beside_them() -> None:
    """On paper: for the 2 s of both copies computing goes at half speed, so the first second takes two."""
    link = Link(in_bytes_per_s=LAYER_BYTES, out_bytes_per_s=LAYER_BYTES, compute_share=0.5)
    ops: list[Op] = [Fetch(weights(0), 0), Fetch(weights(1), 1), Work(Kind.FORWARD, 0, 0), Work(Kind.FORWARD, 0, 1)]
    done = run(ops, host=link)
    assert (done.seconds, done.compute_s, done.slowed_s) == pytest.approx((3, 2, 1))


# -- bytes and time of whole steps --------------------------------------------------------------------

ALL_TIERS = st.sampled_from(Tier)


@st.composite
def placements(draw: st.DrawFn, of: Inventory) -> Placement:
    """Draw any placement that could be run, with two or three slots each."""
    found: dict[Unit, Tier] = {}
    for block in range(len(of.blocks)):
        for section in (Section.WEIGHTS, Section.GRADIENT):
            tier = draw(ALL_TIERS)
            found |= dict.fromkeys(of.block_units(block, section), tier)
    found |= {unit: draw(ALL_TIERS) for unit in of.units(Section.MOMENTS)}
    count = st.integers(1, 3)
    return Placement(homes=found, slots=Slots(weights=draw(count), gradient=draw(count), moments=draw(count)))


WHOLE = inventory("tiny", 2, 1)  # layers, norm, head


def whole_profile() -> Profile:
    return profile(
        forward_s=1e-3,
        backward_s=2e-3,
        table_s=1e-3,
        step_s=1e-9,
        elements=LAYER_ELEMENTS,
        nvme=Link(in_bytes_per_s=3e8, out_bytes_per_s=1e8),
        host=Link(in_bytes_per_s=1e9, out_bytes_per_s=1e9),
    )


@given(placements(WHOLE), st.sampled_from(Mode), st.integers(1, 3), st.integers(1, 3))
def test_bytes_are_those_of_the_operations(placement: Placement, mode: Mode, wave: int, num_waves: int) -> None:
    """Oracle: the operations of the lists, one by one."""
    simulation, residency = Simulation(WHOLE, placement, whole_profile()), Residency()
    fetched: Counter[Tier] = Counter()
    flushed: Counter[Tier] = Counter()
    for number in range(num_waves):
        step = mode is Mode.LOCAL and number == num_waves - 1
        passes = wave_passes(WHOLE, wave, is_first=number == 0, step=step)
        for each in [*passes, *([step_pass(WHOLE)] if mode is Mode.AVERAGED and number == num_waves - 1 else [])]:
            ops, residency = schedule(each.visits, WHOLE, placement, residency, then=each.then)
            simulation.run(ops)
            for op in ops:
                if isinstance(op, Fetch | Flush):
                    counter = fetched if isinstance(op, Fetch) else flushed
                    counter[placement.homes[op.unit]] += WHOLE.num_bytes(op.unit)
    done = simulation.result()
    assert done.fetched == fetched
    assert done.flushed == flushed
    assert done.seconds == pytest.approx(done.compute_s + done.stall_s + done.slowed_s)


@given(placements(WHOLE), st.sampled_from(Mode), st.integers(1, 9))
def test_a_step_is_never_faster_than_its_parts(placement: Placement, mode: Mode, microbatches: int) -> None:
    """Oracles: what is computed in any order; the copies of each direction, of which slots may save some."""
    workload = Workload(mode=mode, microbatches=microbatches)
    costs = whole_profile()
    done = simulate_step(WHOLE, placement, costs, workload, wave=2, recomputation=Recomputation())
    each_s = sum(
        costs.forward_s(block) * (2 if costs.blocks[block.kind].graph_bytes else 0) + costs.backward_s(block)
        for block in WHOLE.blocks
    )
    step_s = sum(costs.step_s(shard, WHOLE.optimizer) for shards in WHOLE.shards for shard in shards)
    assert done.compute_s == pytest.approx(microbatches * each_s + step_s)
    assert done.seconds >= done.compute_s - 1e-9
    most: Counter[tuple[Tier, str]] = Counter()
    for unit, tier in placement.homes.items():
        count = total(trips(WHOLE, unit.block, unit.section, workload, 2))
        most[tier, "in"] += count.fetches * WHOLE.num_bytes(unit)
        most[tier, "out"] += count.flushes * WHOLE.num_bytes(unit)
    for tier in (Tier.HOST, Tier.NVME):
        assert done.fetched[tier] <= most[tier, "in"]
        assert done.flushed[tier] <= most[tier, "out"]


@pytest.mark.parametrize("mode", Mode)
def test_waves_that_are_not_simulated_are_counted(mode: Mode) -> None:
    """Oracle: all waves of the step, one by one."""
    workload = Workload(mode=mode, microbatches=15)
    placement = Placement(
        homes=homes(WHOLE, weights=Tier.HOST, gradient=Tier.NVME, moments=Tier.HOST),
        slots=Slots(weights=2, gradient=2, moments=2),
    )
    simulation, residency = Simulation(WHOLE, placement, whole_profile()), Residency()
    sizes = workload.waves(2)
    assert sizes == [2] * 7 + [1]
    start = Simulated()
    for number in [len(sizes) - 1, *range(len(sizes))]:
        step = mode is Mode.LOCAL and number == len(sizes) - 1
        passes = wave_passes(WHOLE, sizes[number], is_first=number == 0, step=step)
        if mode is Mode.AVERAGED and number == len(sizes) - 1:
            passes.append(step_pass(WHOLE))
        for each in passes:
            ops, residency = schedule(each.visits, WHOLE, placement, residency, then=each.then)
            simulation.run(ops)
        if start == Simulated():
            start = simulation.result()
    counted = simulate_step(WHOLE, placement, whole_profile(), workload, wave=2, recomputation=Recomputation())
    whole = simulation.result().since(start)
    assert counted.fetched == whole.fetched
    assert counted.flushed == whole.flushed
    assert counted.compute_s == pytest.approx(whole.compute_s)
    assert counted.seconds == pytest.approx(whole.seconds, rel=0.01)


@pytest.mark.parametrize("mode", Mode)
def test_larger_waves_copy_less_and_are_not_slower(mode: Mode) -> None:
    placement = Placement(
        homes=homes(WHOLE, weights=Tier.HOST, gradient=Tier.HOST, moments=Tier.HOST),
        slots=Slots(weights=2, gradient=2, moments=2),
    )
    done = [
        simulate_step(
            WHOLE,
            placement,
            whole_profile(),
            Workload(mode=mode, microbatches=16),
            wave=wave,
            recomputation=Recomputation(),
        )
        for wave in (1, 2, 4, 8, 16)
    ]
    read = [each.fetched[Tier.HOST] for each in done]
    assert read == sorted(read, reverse=True)
    assert read[0] > 4 * read[-1]
    for smaller, larger in pairwise(done):
        assert larger.seconds <= smaller.seconds * 1.001


# -- the executor -------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("mode", Mode)
@pytest.mark.parametrize("copy_s", [0.002, 0.02], ids=["compute-bound", "copy-bound"])
def test_the_executor_takes_about_as_long(mode: Mode, copy_s: float) -> None:
    """Oracle: the executor itself, on the same lists, with work and copies that sleep as long as they cost.

    The factor is loose: threads wake up late on a busy machine. The bytes are exact.
    """
    import torch

    from peer.memory.backend import CpuBackend, Event
    from peer.memory.executor import Executor
    from peer.memory.pool import Pool

    placement = Placement(
        homes=homes(WHOLE, weights=Tier.HOST, gradient=Tier.HOST, moments=Tier.HOST),
        slots=Slots(weights=2, gradient=2, moments=2),
    )
    rate = WHOLE.block_bytes(0, Section.WEIGHTS) / copy_s
    costs = profile(
        forward_s=0.005,
        backward_s=0.01,
        table_s=0.005,
        step_s=0.002 / LAYER_ELEMENTS,
        elements=LAYER_ELEMENTS,
        host=Link(in_bytes_per_s=rate, out_bytes_per_s=rate),
    )
    prices = Simulation(WHOLE, placement, costs)

    class SleepingBackend(CpuBackend):
        def to_device(self, target: torch.Tensor, source: torch.Tensor, after: Event) -> None:
            time.sleep(target.numel() / rate)

        def to_host(self, target: torch.Tensor, source: torch.Tensor, after: Event) -> None:
            time.sleep(target.numel() / rate)

    class SleepingWorker:
        def enter(self, block: int, weights: torch.Tensor, gradient: torch.Tensor | None) -> None:
            pass

        def work(self, work: Work, moments: torch.Tensor | None) -> None:
            before = prices.result().compute_s
            prices.run([work])
            time.sleep(prices.result().compute_s - before)

    backend = SleepingBackend()
    executor = Executor(Pool(WHOLE, placement, backend), backend)
    workload, worker = Workload(mode=mode, microbatches=4), SleepingWorker()
    try:
        for measured in (False, True):
            executor.settle()
            started_s, waited_s = time.perf_counter(), executor.stalls.waited_s
            executor.pool.traffic.fetched.clear()
            for number in range(2):
                step = mode is Mode.LOCAL and number == 1
                passes = wave_passes(WHOLE, 2, is_first=number == 0, step=step)
                for each in [*passes, *([step_pass(WHOLE)] if mode is Mode.AVERAGED and number else [])]:
                    executor.run(each.visits, worker, then=each.then)
            if measured:
                took_s, stalled_s = time.perf_counter() - started_s, executor.stalls.waited_s - waited_s
                fetched = executor.pool.traffic.fetched[Tier.HOST]
    finally:
        executor.close()
    expected = simulate_step(WHOLE, placement, costs, workload, wave=2, recomputation=Recomputation())
    assert fetched == expected.fetched[Tier.HOST]
    assert expected.seconds * 0.8 <= took_s <= expected.seconds * 1.6
    assert stalled_s <= expected.stall_s * 1.6 + 0.2 * took_s
