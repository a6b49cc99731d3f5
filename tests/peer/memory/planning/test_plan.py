"""Plans: always within the budget, sensible, and refused in words that help.

Oracles: the budgets; `placement.footprint` and the store's own size; what the simulator says of the plan; each other
(more memory, a longer pipeline, a tighter cap).
"""

from __future__ import annotations

import re
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from peer.memory.pages import padded
from peer.memory.placement import Tier, check_placement, footprint
from peer.memory.planning.plan import Plan, plan
from peer.memory.planning.simulate import Recomputation, simulate_step
from peer.memory.planning.ways import spread
from peer.memory.planning.workload import Mode
from peer.memory.units import Inventory, Section
from protocol.architecture import stage_blocks
from protocol.errors import ConfigError
from protocol.sizes import parse_size
from tests.peer.memory.planning.plans import GB, GIB, LLAMA_8B, MIB, inventory, planned

LAYERS = {"num_hidden_layers": 24}
DEMO = inventory("bench", 4, 1, config=LAYERS)  # six layers of 3.1 M elements: 12 MiB of weights each
LAST = inventory("bench", 4, 3, config=LAYERS)
PLENTY = 64 * GIB


def recomputation_of(found: Plan) -> Recomputation:
    return Recomputation(kept=found.kept, parked=found.parked, spilled=found.spilled)


def check(found: Plan) -> None:
    """Hold a plan against its budgets and its own predictions."""
    of = found.inventory
    check_placement(of, found.placement)
    peak = found.prediction.peak_bytes
    for tier in Tier:
        assert peak[tier] == sum(row.get(tier, 0) for row in found.bytes.values()) <= found.budgets.of(tier)
    state = footprint(of, found.placement)
    sections = ("weights", "gradient", "moments", "slots")
    for tier in Tier:
        assert state[tier] == sum(found.bytes[name].get(tier, 0) for name in sections)
    has_sums = any(unit.section is Section.GRADIENT for unit in found.placement.homes)
    assert has_sums == found.workload.keeps_sums(found.wave)
    done = simulate_step(
        of,
        found.placement,
        found.profile,
        found.workload,
        wave=found.wave,
        recomputation=recomputation_of(found),
    )
    assert done.seconds == found.prediction.step_s
    assert done.written_bytes(Tier.NVME) == found.prediction.written_bytes[Tier.NVME]
    assert found.wave <= found.in_flight <= found.workload.microbatches


# -- within the budget --------------------------------------------------------------------------------


@pytest.mark.slow
@settings(max_examples=30)
@given(
    of=st.sampled_from(
        [DEMO, LAST, inventory("bench", 4, 0), inventory("bench", 4, 1, master="bf16+16", config=LAYERS)]
    ),
    device=st.integers(20, 400),
    host=st.integers(0, 200),
    nvme=st.sampled_from([0, 500]),
    cap=st.sampled_from([None, 10 * GB]),
    mode=st.sampled_from(Mode),
    stages_behind=st.integers(0, 3),
    machine=st.sampled_from(["24gb-pcie4x16-good", "8gb-pcie4x4-poor"]),
)
def test_a_plan_is_within_its_budget_or_refused(
    of: Inventory, device: int, host: int, nvme: int, cap: int | None, mode: Mode, stages_behind: int, machine: str
) -> None:
    try:
        found = planned(
            of,
            machine,
            device=device * MIB,
            host=host * MIB,
            nvme=nvme * MIB,
            cap=cap,
            mode=mode,
            stages_behind=stages_behind,
        )
    except ConfigError:  # what it says is looked at below
        return
    check(found)


@pytest.mark.slow
def test_the_stores_size_is_the_one_it_will_have() -> None:
    """Oracle: the units that the pool describes to the store."""
    from peer.memory.disk.slot_table import required_bytes
    from peer.memory.pool import unit_specs

    found = planned(DEMO, device=90 * MIB, host=60 * MIB, nvme=GIB)
    assert Tier.NVME in found.placement.homes.values()
    assert found.prediction.peak_bytes[Tier.NVME] == required_bytes(unit_specs(DEMO, found.placement))


def test_what_fits_the_device_stays_there_in_waves_of_one() -> None:
    for mode in Mode:
        found = planned(DEMO, device=PLENTY, mode=mode)
        check(found)
        assert set(found.placement.homes.values()) == {Tier.DEVICE}
        assert found.wave == 1
        assert not found.parked
        assert not found.spilled
        assert not any(it.is_recomputed for it in found.activations.values())
        assert found.prediction.stall_s == 0
        assert sum(found.prediction.read_bytes.values()) == 0


def test_a_tight_device_streams_from_the_host_and_recomputes() -> None:
    found = planned(DEMO, device=90 * MIB, host=GIB)
    check(found)
    assert Tier.HOST in found.placement.homes.values()
    assert any(it.is_recomputed for it in found.activations.values())
    assert found.placement.slots.weights in (0, 2, 3)
    assert found.prediction.read_bytes[Tier.HOST] > 0


def test_one_wave_of_local_steps_needs_no_home_for_gradients() -> None:
    """With room for one wave of all microbatches and a slow way to the host, sums are never written."""
    found = planned(DEMO, "24gb-pcie4x4", device=100 * MIB, host=GIB, mode=Mode.LOCAL, microbatches=4)
    check(found)
    if found.wave == 4:
        assert not [unit for unit in found.placement.homes if unit.section is Section.GRADIENT]
        assert found.placement.slots.gradient == 1


def test_graphs_wait_in_host_memory_where_that_is_faster_than_making_them_again() -> None:
    """Two wide layers and long sequences, with room for the state but not for the graphs of eleven microbatches.

    Oracle: the step without host memory, where all is recomputed; through a slow slot fewer graphs are worth it.
    """
    of = Inventory(stage_blocks(LLAMA_8B, 16, 5), "adamw8bit")
    steps = {}
    for host in (0, 24 * GIB):
        for name in ("12gb-pcie4x16", "12gb-pcie4x4"):
            found = planned(
                of,
                name,
                device=9 * GIB,
                host=host,
                microbatches=32,
                sequences=1,
                sequence_length=2048,
                stages_behind=10,
            )
            check(found)
            steps[name, host] = found
    spilling = steps["12gb-pcie4x16", 24 * GIB]
    assert set(spilling.spilled.values()) == {Tier.HOST}
    assert spilling.prediction.step_s < 0.9 * steps["12gb-pcie4x16", 0].prediction.step_s
    assert spilling.prediction.compute_s < steps["12gb-pcie4x16", 0].prediction.compute_s
    assert spilling.prediction.read_bytes[Tier.HOST] == spilling.prediction.written_bytes[Tier.HOST] > 0
    narrow = steps["12gb-pcie4x4", 24 * GIB]
    assert len(narrow.spilled) < len(spilling.spilled)


def test_a_wave_is_no_longer_than_rounds_wait() -> None:
    """Oracle: the wave of a plan without a limit; the warning where a wave of one is too long already."""
    free = planned(DEMO, device=90 * MIB, host=GIB, microbatches=16)
    assert free.wave >= 4
    one_s = free.prediction.step_s / 16
    held = planned(DEMO, device=90 * MIB, host=GIB, microbatches=16, longest_pass_s=one_s * free.wave / 4)
    assert 1 <= held.wave < free.wave
    late = planned(DEMO, device=90 * MIB, host=GIB, microbatches=16, longest_pass_s=one_s / 100)
    assert late.wave == 1
    assert "takes longer through this span" in late.warnings[0]


def test_no_drive_is_used_unless_there_is_a_budget_for_it() -> None:
    found = planned(DEMO, device=90 * MIB, host=GIB, nvme=0)
    assert found.prediction.peak_bytes[Tier.NVME] == 0
    assert found.prediction.nvme_written_per_day_bytes == 0


def test_inputs_wait_on_the_drive_only_within_a_daily_budget() -> None:
    found = planned(DEMO, device=90 * MIB, host=60 * MIB, nvme=GIB)
    assert Tier.NVME not in {tier for it in found.activations.values() for tier in (*it.graphs, it.inputs)}


# -- more and less ------------------------------------------------------------------------------------

DEVICES = [70, 80, 100, 120, 160, 200, 300, 500]


@pytest.mark.slow
@pytest.mark.parametrize("mode", Mode)
@pytest.mark.parametrize("of", [DEMO, LAST], ids=["middle", "last"])
@pytest.mark.parametrize("name", ["24gb-pcie4x16-good", "8gb-pcie4x4-poor"])
def test_more_device_memory_is_never_slower(name: str, of: Inventory, mode: Mode) -> None:
    """By more than twice the tolerance that a smaller wave is given."""
    best = float("inf")
    for device in DEVICES:
        try:
            found = planned(of, name, device=device * MIB, host=GIB, mode=mode)
        except ConfigError:
            assert best == float("inf"), "what fits a small budget fits a larger one"
            continue
        assert found.prediction.step_s <= best * 1.04
        best = min(best, found.prediction.step_s)
    assert best < float("inf")


@pytest.mark.slow
@pytest.mark.parametrize("mode", Mode)
def test_more_host_memory_is_never_slower_and_writes_less(mode: Mode) -> None:
    taken = []
    for host in (40, 50, 60, 80, 120, 300):
        found = planned(DEMO, "8gb-pcie4x4-poor", device=90 * MIB, host=host * MIB, nvme=GIB, mode=mode)
        check(found)
        taken.append(found.prediction)
    assert taken[0].written_bytes[Tier.NVME] > 0
    assert taken[-1].written_bytes[Tier.NVME] == 0
    for less, more in pairwise(taken):
        assert more.step_s <= less.step_s * 1.04


def test_a_longer_pipeline_keeps_more_microbatches_in_flight() -> None:
    alone = planned(DEMO, device=PLENTY, stages_behind=0)
    among = planned(DEMO, device=PLENTY, stages_behind=3)
    assert (alone.in_flight, among.in_flight) == (1, 4)
    assert among.keep_bytes == 4 * alone.keep_bytes


def test_too_few_waves_in_flight_are_warned_of() -> None:
    found = planned(DEMO, device=80 * MIB, host=GIB, stages_behind=7)
    if found.in_flight < 8 * found.wave:
        assert any("waves in flight" in warning for warning in found.warnings)


def test_a_cap_on_writes_pins_more_or_is_warned_of() -> None:
    free = planned(DEMO, device=90 * MIB, host=60 * MIB, nvme=GIB, mode=Mode.LOCAL)
    capped = planned(DEMO, device=90 * MIB, host=60 * MIB, nvme=GIB, mode=Mode.LOCAL, cap=GB)
    assert capped.prediction.written_bytes[Tier.NVME] <= free.prediction.written_bytes[Tier.NVME]
    assert capped.prediction.nvme_written_per_day_bytes > GB
    assert re.search(r"stand still for \d+\.\d hours", " ".join(capped.warnings))
    assert capped.prediction.tokens_per_s < free.prediction.tokens_per_s
    assert re.search(r"worn out in \d+ days", " ".join(free.warnings))
    unwarned = planned(DEMO, device=90 * MIB, host=60 * MIB, nvme=GIB, mode=Mode.LOCAL, cap=10**9 * GB)
    assert not unwarned.warnings


def test_a_cap_under_which_nothing_would_ever_be_trained_is_refused() -> None:
    """Oracles: with what the message asks for there is a plan; the bytes of the units on the drive, summed by hand."""
    sizes: dict[str, Any] = {"device": 90 * MIB, "host": 60 * MIB, "nvme": GIB}
    with pytest.raises(ConfigError, match="it would never train") as error:
        planned(DEMO, **sizes, cap=40 * MIB)
    assert "\n" not in error.value.one_line()
    match = re.match(r"Allow ([\d.]+ \w+) with --nvme-writes-per-day", error.value.hint)
    assert match
    found = planned(DEMO, **sizes, cap=parse_size(match[1]))
    check(found)
    on_drive = [unit for unit, tier in found.placement.homes.items() if tier is Tier.NVME]
    by_section = {
        section: sum(padded(DEMO.num_bytes(unit)) for unit in on_drive if unit.section is section)
        for section in Section
    }
    first_bytes = by_section[Section.WEIGHTS] + by_section[Section.MOMENTS]
    assert first_bytes + found.prediction.written_bytes[Tier.NVME] <= parse_size(match[1])
    assert first_bytes + sum(by_section.values()) + by_section[Section.GRADIENT] <= parse_size(match[1])


def test_a_cap_of_few_rounds_a_day_is_warned_of() -> None:
    """Oracle: bytes of a round by the plan's own prediction."""
    sizes: dict[str, Any] = {"device": 90 * MIB, "host": 60 * MIB, "nvme": GIB, "mode": Mode.LOCAL}
    free = planned(DEMO, **sizes)
    round_bytes = free.prediction.written_bytes[Tier.NVME]
    assert round_bytes > 0
    few = planned(DEMO, **sizes, cap=9 * round_bytes)
    assert re.search(r"in a day are enough for \d\.\d rounds", " ".join(few.warnings))
    assert "rounds" not in " ".join(planned(DEMO, **sizes, cap=30 * round_bytes).warnings)


def test_plans_are_the_same_every_time() -> None:
    first, second = (planned(DEMO, device=90 * MIB, host=60 * MIB, nvme=GIB) for _ in range(2))
    assert first.placement == second.placement
    assert first.prediction == second.prediction


def test_bf16_weights_take_half_the_room_elsewhere() -> None:
    wide = planned(DEMO, device=90 * MIB, host=GIB)
    narrow = planned(inventory("bench", 4, 1, master="bf16-sr", config=LAYERS), device=90 * MIB, host=GIB)
    check(narrow)
    assert narrow.prediction.peak_bytes[Tier.HOST] < wide.prediction.peak_bytes[Tier.HOST]
    assert narrow.prediction.step_s <= wide.prediction.step_s * 1.04


# -- refusals -----------------------------------------------------------------------------------------


def refusal(*, device: int, host: int = 0, nvme: int = 0) -> ConfigError:
    with pytest.raises(ConfigError) as error:
        planned(DEMO, device=device, host=host, nvme=nvme)
    assert "\n" not in error.value.one_line()
    return error.value


def test_too_small_a_device_is_told_how_much_is_missing() -> None:
    """Oracle: with what the message asks for, there is a plan."""
    error = refusal(device=20 * MIB, host=GIB)
    assert "device memory" in str(error)
    match = re.match(r"Allow ([\d.]+ \w+) more", error.hint)
    assert match
    check(planned(DEMO, device=20 * MIB + parse_size(match[1]) + MIB, host=GIB))
    with pytest.raises(ConfigError):
        planned(DEMO, device=20 * MIB + parse_size(match[1]) - MIB, host=GIB)


def test_too_little_in_all_is_told_what_would_help() -> None:
    """Oracle: with what the message asks for, there is a plan."""
    error = refusal(device=90 * MIB, host=MIB)
    assert "does not fit" in str(error)
    assert "a folder on an NVMe drive" in error.hint
    match = re.match(r"Allow ([\d.]+ \w+) more of host", error.hint)
    assert match
    check(planned(DEMO, device=90 * MIB, host=MIB + parse_size(match[1]) + MIB))


def test_too_small_a_drive_is_told_so() -> None:
    error = refusal(device=90 * MIB, host=60 * MIB, nvme=20 * MIB)
    match = re.search(r"or ([\d.]+ \w+) more on the drive", error.hint)
    assert match
    check(planned(DEMO, device=90 * MIB, host=60 * MIB, nvme=20 * MIB + parse_size(match[1]) + MIB))


def test_a_drive_needs_some_host_memory_to_work_with() -> None:
    error = refusal(device=90 * MIB, host=0, nvme=GIB)
    match = re.match(r"Allow ([\d.]+ \w+) more of host", error.hint)
    assert match
    check(planned(DEMO, device=90 * MIB, host=parse_size(match[1]) + MIB, nvme=GIB))


def test_a_machine_whose_drive_was_not_measured_does_not_use_it() -> None:
    with pytest.raises(ConfigError, match="does not fit"):
        planned(DEMO, "12gb-pcie4x16", device=90 * MIB, host=MIB, nvme=GIB)


# -- pieces -------------------------------------------------------------------------------------------


@given(st.integers(1, 70), st.data())
def test_any_beginning_is_spread_evenly(length: int, data: st.DataObject) -> None:
    """Between two neighbours of a beginning there is no gap much longer than there has to be."""
    order = spread(range(length))
    assert sorted(order) == list(range(length))
    count = data.draw(st.integers(1, length))
    chosen = sorted(order[:count])
    gaps = [second - first for first, second in zip([-1, *chosen], [*chosen, length], strict=True)]
    assert max(gaps) <= 4 * length / count + 1


def test_plan_is_importable_without_torch() -> None:
    """Oracle: this module's own imports; torch is loaded by other tests, so only the names are looked at."""
    import ast
    from pathlib import Path

    folder = Path(plan.__code__.co_filename).parent
    for name in ("plan", "fit", "ways", "simulate", "profile", "machines", "budgets", "workload", "plan_report"):
        for node in ast.walk(ast.parse((folder / f"{name}.py").read_text("utf-8"))):
            if isinstance(node, ast.ImportFrom):
                assert node.module not in ("torch", "peer.memory.pool", "peer.memory.backend", "peer.memory.executor")
