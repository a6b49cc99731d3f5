"""Models, machines and plans for the tests of the planner; pure, no torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from peer.memory.moments import MasterName, OptimizerName
from peer.memory.placement import Tier
from peer.memory.planning.budgets import Budgets
from peer.memory.planning.machines import machine
from peer.memory.planning.plan import Plan, plan
from peer.memory.planning.profile import BlockCost, Link, Profile, calculated
from peer.memory.planning.workload import Mode, Workload
from peer.memory.units import Inventory, Section, Unit
from protocol.architecture import preset, stage_blocks
from protocol.layout import BlockKind

MIB, GIB, GB = 1 << 20, 1 << 30, 10**9

LLAMA_8B = preset("1b") | {
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "intermediate_size": 14336,
}


def inventory(
    name: str = "tiny",
    num_stages: int = 1,
    stage: int = 0,
    *,
    optimizer: OptimizerName = "adamw8bit",
    master: MasterName = "fp32",
    config: Mapping[str, Any] | None = None,
) -> Inventory:
    """Return a stage of a preset, with parts of its config changed."""
    return Inventory(stage_blocks({**preset(name), **(config or {})}, num_stages, stage), optimizer, master)


def profile(
    *,
    forward_s: float = 1.0,
    backward_s: float = 2.0,
    table_s: float = 0.5,
    step_s: float = 0.0,
    host: Link | None = None,
    nvme: Link | None = None,
    elements: int = 1,
    graph_bytes: tuple[int, ...] = (400, 600),
) -> Profile:
    """Return round prices, for sums that can be done by hand; `elements` of the layer and the head measured."""
    body = BlockCost(forward_s=forward_s, backward_s=backward_s, num_matrix_elements=elements, graph_bytes=graph_bytes)
    table = BlockCost(forward_s=table_s, backward_s=table_s, num_matrix_elements=elements)
    return Profile(
        machine="paper",
        sequences=1,
        sequence_length=4,
        width=64,
        blocks={
            BlockKind.LAYER: body,
            BlockKind.NORM: BlockCost(forward_s=0.0, backward_s=0.0, num_matrix_elements=1),
            BlockKind.EMBEDDING: table,
            BlockKind.HEAD: table,
        },
        step_8bit_s=step_s,
        step_32bit_s=step_s,
        clear_s=0.0,
        host=host or Link(in_bytes_per_s=1e6, out_bytes_per_s=1e6),
        nvme=nvme,
    )


def planned(
    of: Inventory,
    name: str = "12gb-pcie4x16-good",
    *,
    device: int,
    host: int = 0,
    nvme: int = 0,
    cap: int | None = None,
    mode: Mode = Mode.AVERAGED,
    microbatches: int = 8,
    sequences: int = 2,
    sequence_length: int = 128,
    stages_behind: int = 0,
    longest_pass_s: float | None = None,
) -> Plan:
    costs = calculated(machine(name)[0], of.blocks, sequences=sequences, sequence_length=sequence_length)
    budgets = Budgets(device_bytes=device, host_bytes=host, nvme_bytes=nvme, nvme_writes_per_day_bytes=cap)
    workload = Workload(
        mode=mode, microbatches=microbatches, stages_behind=stages_behind, longest_pass_s=longest_pass_s
    )
    return plan(of, costs, budgets, workload)


def homes(of: Inventory, **sections: Tier) -> dict[Unit, Tier]:
    """Place whole sections; those that are not named live on the device."""
    return {unit: sections.get(section.value, Tier.DEVICE) for section in Section for unit in of.units(section)}
