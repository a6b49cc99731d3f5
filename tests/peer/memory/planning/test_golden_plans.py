"""Golden plans: what is planned for machines that nobody here has.

Oracle: `golden_plans.json`, which was looked through by people. A change of the planner that changes it should be one
that was meant; then write it anew and read the difference:

    python -m tests.peer.memory.planning.test_golden_plans && git diff --word-diff tests/peer/memory/planning
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from peer.memory.placement import Tier
from peer.memory.planning.machines import CARDS, LINKS, machine
from peer.memory.planning.plan import Plan
from peer.memory.planning.workload import Mode
from peer.memory.segments import NAMES
from peer.memory.units import Inventory
from protocol.architecture import stage_blocks
from protocol.errors import ConfigError
from tests.peer.memory.planning.plans import GB, GIB, LLAMA_8B, inventory, planned

FILE = Path(__file__).with_name("golden_plans.json")

MODELS = {
    "1b": inventory("1b"),  # the whole of it
    "8b/4": Inventory(stage_blocks(LLAMA_8B, 4, 1), "adamw8bit"),  # eight layers, and two stages behind them
}
HOST_BYTES = {"24gb": 16 * GIB, "12gb": 8 * GIB, "8gb": 8 * GIB}
DRIVE_BYTES = 500 * GB
CASES = [
    (model, f"{card}-{link}-{drive}", mode)
    for model in MODELS
    for card in CARDS
    for link in LINKS
    for drive in (("good",) if card == "24gb" else ("good", "poor"))
    for mode in Mode
]


def plan_of(model: str, name: str, mode: Mode) -> Plan:
    return planned(
        MODELS[model],
        name,
        device=machine(name)[1],
        host=HOST_BYTES[name.split("-")[0]],
        nvme=DRIVE_BYTES,
        mode=mode,
        microbatches=16,
        sequences=2,
        sequence_length=1024,
        stages_behind=2 if model == "8b/4" else 0,
    )


def summary(model: str, name: str, mode: Mode) -> dict[str, Any]:
    """Return what matters of a plan, rounded so that the last bits of a float do not show."""
    try:
        found = plan_of(model, name, mode)
    except ConfigError as error:
        return {"refused": error.one_line()}
    prediction = found.prediction
    homes: dict[str, Counter[str]] = {}
    for unit, tier in found.placement.homes.items():
        homes.setdefault(unit.section.value, Counter())[tier.name.lower()] += 1
    graphs = Counter(
        f"{NAMES[part]} {'recomputed' if tier is None else tier.name.lower()}"
        for it in found.activations.values()
        if len(it.graphs) == len(NAMES)
        for part, tier in enumerate(it.graphs)
    )
    tiers = (Tier.HOST, Tier.NVME)
    return {
        "wave": found.wave,
        "in_flight": found.in_flight,
        "graphs": dict(sorted(graphs.items())),
        "inputs": sorted({it.inputs.name.lower() for it in found.activations.values() if it.is_recomputed}),
        "slots": [found.placement.slots.weights, found.placement.slots.gradient, found.placement.slots.moments],
        "shards": {section: dict(sorted(count.items())) for section, count in homes.items()},
        "gib": [round(prediction.peak_bytes[tier] / GIB, 1) for tier in Tier],
        "step_s": float(f"{prediction.step_s:.3g}"),
        "stall_percent": round(100 * prediction.stall_s / prediction.step_s),
        "read_gb": [round(prediction.read_bytes[tier] / GB, 1) for tier in tiers],
        "written_gb": [round(prediction.written_bytes[tier] / GB, 1) for tier in tiers],
    }


def write() -> None:
    """Write the file anew: a line per plan."""
    plans = {" ".join(case): summary(*case) for case in CASES}
    lines = ",\n".join(f" {json.dumps(name)}: {json.dumps(plan)}" for name, plan in plans.items())
    FILE.write_text(f"{{\n{lines}\n}}\n", "utf-8")


@pytest.fixture(scope="module")
def golden() -> dict[str, Any]:
    written: dict[str, Any] = json.loads(FILE.read_text("utf-8"))
    return written


def test_all_cases_are_there(golden: dict[str, Any]) -> None:
    assert list(golden) == [" ".join(case) for case in CASES]


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize(("model", "name", "mode"), CASES[::10], ids=[" ".join(case) for case in CASES[::10]])
def test_a_plan_is_the_golden_one(golden: dict[str, Any], model: str, name: str, mode: Mode) -> None:
    """A tenth of them: all take a minute and a half, and a change of the planner shows in most."""
    assert summary(model, name, mode) == golden[f"{model} {name} {mode}"]


def test_golden_plans_make_sense(golden: dict[str, Any]) -> None:
    """A faster slot, a better drive and a larger card are not slower; plans use what there is."""
    made = {tuple(name.split()): plan for name, plan in golden.items() if "step_s" in plan}
    assert len(made) > 0.9 * len(golden)
    for (model, name, mode), plan in made.items():
        card, link, drive = name.split("-")
        better = [f"{card}-{link}-good"]
        if link == "pcie3x16":
            better.append(f"{card}-pcie4x16-{drive}")
        if link == "pcie4x4":
            better.append(f"{card}-pcie3x16-{drive}")
        for other in better:
            assert made[model, other, mode]["step_s"] <= plan["step_s"] * 1.03, (model, name, other)
        assert plan["gib"][0] <= machine(name)[1] / GIB


if __name__ == "__main__":
    write()
