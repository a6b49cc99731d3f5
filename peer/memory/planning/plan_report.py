"""A plan for people, and as JSON.

Owns: the table of `peer bench plan` and the shape of `peer.plan/1`. Must not know: how a plan was found.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from typing import Any

from peer.memory.placement import Tier
from peer.memory.planning.plan import Plan
from peer.memory.segments import NAMES as SEGMENT_NAMES
from peer.memory.units import Section
from protocol.layout import BlockKind
from protocol.sizes import size_text

SCHEMA = "peer.plan/1"
PLACES = {Tier.DEVICE: "on the device", Tier.HOST: "in host memory", Tier.NVME: "on NVMe"}
TIER_NAMES = {Tier.DEVICE: "device", Tier.HOST: "host", Tier.NVME: "NVMe"}
ROWS = {
    "weights": "weights",
    "gradient": "gradient sums",
    "moments": "optimizer",
    "slots": "slots",
    "activations": "activations",
    "working": "working space",
    "gaps": "allocator's gaps",
    "staging": "staging",
    "copies": "second copies",
}
NOTHING = "-"

_ELSEWHERE = (Tier.HOST, Tier.NVME)


def describe(plan: Plan) -> str:
    """Return a plan as a table of at most some 25 lines."""
    return "\n".join([*_heading(plan), "", *_memory(plan), "", *_step(plan)])


def to_json(plan: Plan) -> str:
    """Return the one line that `--json` prints."""
    prediction = plan.prediction
    data: dict[str, Any] = {
        "machine": plan.profile.machine,
        "optimizer": plan.inventory.optimizer,
        "master": plan.inventory.master,
        "num_parameters": _num_parameters(plan),
        "microbatch": {"sequences": plan.profile.sequences, "sequence_length": plan.profile.sequence_length},
        "workload": asdict(plan.workload),
        "budgets": asdict(plan.budgets),
        "wave": plan.wave,
        "in_flight": plan.in_flight,
        "slots": asdict(plan.placement.slots),
        "keep_bytes": plan.keep_bytes,
        "num_places": {tier.name.lower(): len(sizes) for tier, sizes in plan.places.items()},
        "bytes": {name: _by_tier(row) for name, row in plan.bytes.items()},
        "blocks": list(_blocks(plan)),
        "prediction": {
            "step_s": prediction.step_s,
            "compute_s": prediction.compute_s,
            "stall_s": prediction.stall_s,
            "slowed_s": prediction.slowed_s,
            "tokens_per_s": prediction.tokens_per_s,
            "read_bytes": _by_tier(prediction.read_bytes, _ELSEWHERE),
            "written_bytes": _by_tier(prediction.written_bytes, _ELSEWHERE),
            "peak_bytes": _by_tier(prediction.peak_bytes),
            "process_bytes": prediction.process_bytes,
            "nvme_written_per_day_bytes": prediction.nvme_written_per_day_bytes,
        },
        "warnings": list(plan.warnings),
    }
    return json.dumps({"schema": SCHEMA, "ok": True, "data": data}, separators=(",", ":"), allow_nan=False)


def _heading(plan: Plan) -> Iterator[str]:
    kinds = Counter(block.kind for block in plan.inventory.blocks)
    parts = [f"{kinds[BlockKind.LAYER]} layers"]
    parts += [kind.value for kind in (BlockKind.EMBEDDING, BlockKind.HEAD) if kinds[kind]]
    yield _line("span", f"{', '.join(parts)}: {_num_parameters(plan) / 1e6:,.1f} M parameters, {_optimizer(plan)}")
    profile, workload = plan.profile, plan.workload
    size = f"{profile.sequences} x {profile.sequence_length:,} tokens"
    yield _line("machine", profile.machine)
    yield _line("microbatch", f"{size}, {workload.microbatches} per step, in waves of {plan.wave}")
    yield _line("in flight", f"{plan.in_flight} microbatch{'es' * (plan.in_flight > 1)}")
    yield _line("activations", _activations(plan))


def _memory(plan: Plan) -> Iterator[str]:
    yield _columns("", [TIER_NAMES[tier] for tier in Tier])
    for name, title in ROWS.items():
        row = plan.bytes.get(name, {})
        if any(row.values()):
            yield _columns(title, [_size(row.get(tier, 0)) for tier in Tier])
    yield _columns("total", [_size(plan.prediction.peak_bytes[tier]) for tier in Tier])
    yield _columns("budget", [_size(plan.budgets.of(tier)) for tier in Tier])


def _step(plan: Plan) -> Iterator[str]:
    prediction = plan.prediction
    waiting = f"{_seconds(prediction.compute_s)} computing, {_seconds(prediction.stall_s)} waiting for copies"
    if prediction.slowed_s > 0:
        waiting += f", {_seconds(prediction.slowed_s)} lost to copies beside it"
    yield _line("step", f"{_seconds(prediction.step_s)} ({waiting}); {prediction.tokens_per_s:,.0f} tokens/s")
    for title, by_tier in (("read", prediction.read_bytes), ("written", prediction.written_bytes)):
        parts = [f"{by_tier[tier] / 1e9:,.2f} GB {TIER_NAMES[tier]}" for tier in _ELSEWHERE if by_tier.get(tier)]
        yield _line(title, (", ".join(parts) or "nothing") + (" per step" if parts else ""))
    if prediction.nvme_written_per_day_bytes:
        cap = plan.budgets.nvme_writes_per_day_bytes
        allowed = "no limit set" if cap is None else f"{cap / 1e9:,.0f} GB allowed"
        yield _line("wear", f"{prediction.nvme_written_per_day_bytes / 1e9:,.0f} GB a day at that speed, {allowed}")
    yield _line("process", f"{size_text(prediction.process_bytes)} of the host's memory, libraries included")
    for warning in plan.warnings:
        yield _line("warning", warning)


def _activations(plan: Plan) -> str:
    layers = [
        activation
        for block, activation in plan.activations.items()
        if plan.inventory.blocks[block].kind is BlockKind.LAYER
    ]
    fates = [Counter(activation.graphs[index] for activation in layers) for index in range(len(SEGMENT_NAMES))]
    if fates[0] == fates[1]:
        return f"of {len(layers)} layers, {_fates(fates[0], layers[0].inputs)}"
    parts = (f"{name}: {_fates(fate, layers[0].inputs)}" for name, fate in zip(SEGMENT_NAMES, fates, strict=True))
    return f"of {len(layers)} layers, {'; '.join(parts)}"


def _fates(fates: Mapping[Tier | None, int], inputs: Tier) -> str:
    """Say how many graphs wait where, and how many are made again from what."""
    parts = [f"{count} kept {PLACES[tier]}" for tier in Tier if (count := fates.get(tier, 0))]
    if count := fates.get(None, 0):
        parts.append(f"{count} recomputed from inputs {PLACES[inputs]}")
    return ", ".join(parts)


def _blocks(plan: Plan) -> Iterator[dict[str, Any]]:
    homes = plan.placement.homes
    for index, block in enumerate(plan.inventory.blocks):
        activation = plan.activations.get(index)
        yield {
            "name": block.name,
            "kind": block.kind.value,
            "homes": {
                section.value: [
                    None if (tier := homes.get(unit)) is None else tier.name.lower()
                    for unit in plan.inventory.block_units(index, section)
                ]
                for section in Section
                if plan.inventory.block_units(index, section)
            },
            "activation": activation
            and {
                "graphs": ["recomputed" if tier is None else tier.name.lower() for tier in activation.graphs],
                "inputs": activation.inputs.name.lower(),
            },
        }


def _by_tier(row: Mapping[Tier, int], tiers: tuple[Tier, ...] = tuple(Tier)) -> dict[str, int]:
    return {tier.name.lower(): row.get(tier, 0) for tier in tiers}


def _num_parameters(plan: Plan) -> int:
    return sum(block.num_parameters for block in plan.inventory.blocks)


def _optimizer(plan: Plan) -> str:
    return f"{plan.inventory.optimizer}, {plan.inventory.master} weights, {plan.workload.mode.value}"


def _line(label: str, text: str) -> str:
    return f"{label:<14} {text}"


def _columns(label: str, cells: list[str]) -> str:
    return f"{label:<14} " + " ".join(f"{cell:>12}" for cell in cells)


def _size(num_bytes: int) -> str:
    return size_text(num_bytes) if num_bytes else NOTHING


def _seconds(seconds: float) -> str:
    return f"{seconds:,.1f} s" if seconds >= 10 else f"{seconds:.3g} s"
