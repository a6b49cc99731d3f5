"""What a plan looks like, for people and for programs. Oracle: the plan itself."""

from __future__ import annotations

import json
from typing import Any

import pytest

from peer.memory.placement import Tier
from peer.memory.planning.plan import Plan
from peer.memory.planning.plan_report import SCHEMA, describe, to_json
from peer.memory.planning.workload import Mode
from tests.peer.memory.planning.plans import GB, GIB, MIB, inventory, planned

OF = inventory("bench", 4, 3, config={"num_hidden_layers": 24})


@pytest.fixture(scope="module")
def tight() -> Plan:
    return planned(OF, device=120 * MIB, host=50 * MIB, nvme=GIB, cap=GB)


def test_the_table_is_short_and_aligned(tight: Plan) -> None:
    lines = describe(tight).splitlines()
    assert 15 < len(lines) <= 26
    assert all(line == line.rstrip() for line in lines)
    rows = lines[lines.index("") + 1 : lines.index("", lines.index("") + 1)]
    assert len({len(row) for row in rows}) == 1
    assert rows[0].split() == ["device", "host", "NVMe"]
    assert [row.split("  ")[0] for row in rows[-2:]] == ["total", "budget"]


def test_the_table_says_what_matters(tight: Plan) -> None:
    text = describe(tight)
    assert f"waves of {tight.wave}" in text
    assert f"{tight.prediction.tokens_per_s:,.0f} tokens/s" in text
    assert "1 GB allowed" in text
    assert "stand still" in text
    assert "second copies" in text


def test_a_plan_without_limits_says_nothing_of_drives() -> None:
    text = describe(planned(OF, device=2 * GIB))
    assert "activations    of 6 layers, 6 kept on the device" in text
    assert "wear" not in text
    assert "nothing" in text


def test_json_says_the_same(tight: Plan) -> None:
    document = json.loads(to_json(tight))
    assert (document["schema"], document["ok"]) == (SCHEMA, True)
    data: dict[str, Any] = document["data"]
    assert data["wave"] == tight.wave
    assert data["prediction"]["step_s"] == tight.prediction.step_s
    assert data["prediction"]["peak_bytes"]["nvme"] == tight.prediction.peak_bytes[Tier.NVME]
    assert data["budgets"]["nvme_writes_per_day_bytes"] == GB
    assert data["warnings"] == list(tight.warnings)
    total = {tier: sum(row[tier] for row in data["bytes"].values()) for tier in ("device", "host", "nvme")}
    assert total == data["prediction"]["peak_bytes"]


def test_json_names_the_home_of_every_shard(tight: Plan) -> None:
    blocks = json.loads(to_json(tight))["data"]["blocks"]
    assert [block["name"] for block in blocks] == [block.name for block in OF.blocks]
    for unit, tier in tight.placement.homes.items():
        assert blocks[unit.block]["homes"][unit.section.value][unit.shard] == tier.name.lower()
    assert [block["activation"] is not None for block in blocks] == [
        block["kind"] in ("layer", "norm") for block in blocks
    ]


def test_gradients_without_a_home_are_null() -> None:
    found = planned(OF, device=2 * GIB, mode=Mode.LOCAL, microbatches=1)
    blocks = json.loads(to_json(found))["data"]["blocks"]
    assert {tier for block in blocks for tier in block["homes"]["gradient"]} == {None}
