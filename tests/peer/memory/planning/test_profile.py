"""Profiles: there and back as JSON, scaled to other blocks, and calculated from data sheets.

Oracles: the profile itself; arithmetic on paper; what autograd says that it saved.
"""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from peer.memory.placement import Tier
from peer.memory.planning.machines import CARDS, DRIVES, LINKS, machine
from peer.memory.planning.profile import Link, Profile, calculated, graph_bytes, workspace_bytes
from peer.memory.planning.workload import parts_of
from peer.memory.segments import segments_of
from peer.memory.units import Inventory
from protocol.architecture import preset, stage_blocks
from protocol.errors import ConfigError
from tests.peer.memory.planning.plans import GIB, inventory, profile

ONE_B = inventory("1b")
FIRST_LAYER = parts_of(ONE_B).body[0]


@pytest.mark.parametrize("name", ["24gb-pcie4x16-good", "8gb-pcie4x4"])
def test_json_there_and_back(name: str) -> None:
    made = calculated(machine(name)[0], ONE_B.blocks, sequences=2, sequence_length=64)
    assert Profile.from_json(made.to_json()) == made


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"machine": 3}'])
def test_other_json_is_refused_in_one_line(text: str) -> None:
    with pytest.raises(ConfigError, match="not the profile of a machine") as error:
        Profile.from_json(text)
    assert "\n" not in error.value.one_line()


@pytest.mark.parametrize("change", [{"sequences": 0}, {"step_8bit_s": -1.0}, {"blocks": {}}])
def test_nonsense_is_refused(change: dict[str, object]) -> None:
    fields = json.loads(profile().to_json()) | change
    with pytest.raises(ConfigError, match="makes no sense"):
        Profile.from_json(json.dumps(fields))


def test_costs_follow_the_matrix_elements() -> None:
    layer = ONE_B.blocks[FIRST_LAYER]
    measured = profile(elements=layer.num_matrix_elements // 2)
    assert measured.forward_s(layer) == pytest.approx(2.0)
    assert measured.backward_s(layer) == pytest.approx(4.0)
    embedding = ONE_B.blocks[0]
    assert measured.forward_s(embedding) == 0.5  # a look-up is as long in any table


def test_a_step_is_priced_by_what_is_kept_in_8_bit() -> None:
    """On paper: a layer's matrices at one price, its norms and tables at another."""
    costs = replace(profile(), step_8bit_s=1.0, step_32bit_s=100.0)
    layer, table = ONE_B.shards[FIRST_LAYER][-1], ONE_B.shards[0][0]
    vectors = layer.num_elements - layer.num_matrix_elements
    assert vectors == 2 * 2048
    assert costs.step_s(layer, "adamw8bit") == layer.num_matrix_elements + 100 * vectors
    assert costs.step_s(layer, "adamw32") == 100 * layer.num_elements
    assert costs.step_s(table, "adamw8bit") == 100 * table.num_elements


def test_calculated_rates_are_those_of_the_data_sheet() -> None:
    """On paper: 2 FLOP per matrix element and token, and attention; a drive is read through host memory."""
    found, memory_bytes = machine("24gb-pcie4x16-good")
    costs = calculated(found, ONE_B.blocks, sequences=4, sequence_length=1024)
    layer = ONE_B.blocks[FIRST_LAYER]
    flop = 2 * layer.num_matrix_elements * 4096 + 2 * 4096 * 1024 * 2048
    assert costs.forward_s(layer) == pytest.approx(flop / 50e12)
    assert costs.backward_s(layer) == pytest.approx(2 * flop / 50e12)
    assert costs.link(Tier.HOST) == Link(in_bytes_per_s=22e9, out_bytes_per_s=22e9)
    assert costs.link(Tier.NVME).in_bytes_per_s == pytest.approx(1 / (1 / 5e9 + 1 / 22e9))
    assert costs.entry_bytes == 4 * 1024 * 2048 * 4
    assert memory_bytes == 23 * GIB


def test_every_machine_has_a_name() -> None:
    for card in CARDS:
        for link in LINKS:
            for drive in DRIVES:
                assert machine(f"{card}-{link}-{drive}")[0].name == f"{card}-{link}-{drive}"
            assert machine(f"{card}-{link}")[0].nvme_read_bytes_per_s is None


@pytest.mark.parametrize("name", ["", "24gb", "24gb-pcie9", "24gb-pcie4x16-good-good", "4gb-pcie4x16"])
def test_an_unknown_machine_is_refused_with_the_choices(name: str) -> None:
    with pytest.raises(ConfigError, match="there is no machine") as error:
        machine(name)
    assert all(word in error.value.hint for word in (*CARDS, *LINKS, *DRIVES))


@pytest.mark.slow
@pytest.mark.parametrize("model_type", ["llama", "qwen3"])
@pytest.mark.parametrize(("heads", "kv_heads", "ffn"), [(4, 4, 128), (4, 2, 192)])
def test_graph_bytes_are_what_autograd_saves(model_type: str, heads: int, kv_heads: int, ffn: int) -> None:
    """Oracle: what the graphs of the segments say."""
    import torch

    from peer.engine.graph import Graph
    from peer.model.stage import build_stage

    config = preset("tiny") | {
        "model_type": model_type,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": 64,
        "hidden_size": 256,
        "intermediate_size": ffn,
        "num_hidden_layers": 1,
    }
    stage = build_stage(config, num_stages=1, stage=0)
    sequences, length = 2, 48
    for index in stage.body:
        block, layout = stage.blocks[index], stage.layouts[index]
        block.bind(torch.randn(layout.num_elements) * 0.02, torch.zeros(layout.num_elements))
        found = [
            Graph(stage, *segment, torch.randn(sequences, length, 256)).num_bytes
            for segment in segments_of(index, layout.kind)
        ]
        assert found == pytest.approx(graph_bytes(layout, sequences, length), rel=0.01)


def test_a_heads_workspace_is_bounded_by_its_pieces() -> None:
    blocks = Inventory(stage_blocks(preset("1b"), 2, 1), "adamw8bit").blocks
    head = blocks[-1]
    assert workspace_bytes(head, 10) == 2 * 4 * 10 * head.slots[0].shape[0]
    assert workspace_bytes(head, 100_000) == 2 * (64 << 20)
