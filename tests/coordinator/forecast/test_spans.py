"""coordinator/forecast/spans.py: numbers about stages are those by which peers allocate and compute.

Oracles: the peer's own inventory, planner and cut into parts; `protocol/architecture.py`.
"""

from __future__ import annotations

import pytest

from coordinator.forecast.spans import PART_ELEMENTS, Span, spans_of
from coordinator.presets import PRESETS, find_preset
from peer.averaging import parts
from peer.averaging.reduce import encoded_shard_bytes
from peer.codecs import codec_names
from peer.memory.planning.machines import machine
from peer.memory.planning.profile import calculated
from peer.memory.units import Inventory, Section
from protocol.architecture import num_parameters, stage_blocks
from protocol.layout import BlockKind
from protocol.manifest import MasterName, OptimizerName

STAGES = {"tiny": 2, "demo": 2, "bench": 3, "1b": 8}


def spans(name: str) -> tuple[Span, ...]:
    return spans_of(find_preset(name).config, STAGES[name])


@pytest.mark.parametrize("name", PRESETS)
def test_parameters_are_those_of_the_architecture(name: str) -> None:
    config = find_preset(name).config
    assert [span.num_parameters for span in spans(name)] == [
        num_parameters(config, STAGES[name], stage) for stage in range(STAGES[name])
    ]
    assert sum(span.num_parameters for span in spans(name)) == num_parameters(config)


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("optimizer", OptimizerName)
@pytest.mark.parametrize("master", MasterName)
def test_state_takes_what_peers_allocate(name: str, optimizer: OptimizerName, master: MasterName) -> None:
    """Oracle: `Inventory`, which the memory engine allocates by. It aligns each array of moments to 256 bytes."""
    spec = find_preset(name).optimizer.model_copy(update={"name": optimizer, "master": master})
    for stage, span in enumerate(spans(name)):
        blocks = stage_blocks(find_preset(name).config, STAGES[name], stage)
        inventory = Inventory(blocks, optimizer.value, master.value)
        allocated = {
            section: sum(inventory.block_bytes(block, section) for block in range(len(blocks)))
            for section in (Section.WEIGHTS, Section.MOMENTS)
        }
        assert 4 * span.num_elements == allocated[Section.WEIGHTS]
        assert span.moment_bytes(spec) == pytest.approx(allocated[Section.MOMENTS], rel=0.01, abs=16 * 256)


@pytest.mark.parametrize("name", PRESETS)
def test_arithmetic_is_that_of_the_planner_for_one_machine(name: str) -> None:
    """Oracle: `peer bench plan` by a data sheet: seconds times rate, without look-ups and norms."""
    card, _ = machine("24gb-pcie4x16")
    batch = find_preset(name).batch
    tokens = batch.sequences_per_microbatch * batch.sequence_length
    config = find_preset(name).config
    every = [block for stage in range(STAGES[name]) for block in stage_blocks(config, STAGES[name], stage)]
    profile = calculated(card, every, sequences=batch.sequences_per_microbatch, sequence_length=batch.sequence_length)
    for stage, span in enumerate(spans(name)):
        blocks = stage_blocks(config, STAGES[name], stage)
        heads = [block for block in blocks if block.kind is BlockKind.HEAD]
        seconds = 0.0
        for block in blocks:
            if block.kind is BlockKind.LAYER:
                seconds += 2 * profile.forward_s(block) + profile.backward_s(block)
            elif block.kind is BlockKind.HEAD:
                seconds += profile.backward_s(block) + (len(heads) > 1) * profile.forward_s(block)
        flop = tokens * span.training_flop(batch.sequence_length, recomputes=True)
        assert flop == pytest.approx(seconds * card.flop_per_s, rel=0.01)


def test_a_layer_takes_six_or_eight_operations_per_parameter_and_token() -> None:
    """Oracle: the rule of thumb, for short sequences; norms are 0.02 % of the parameters here."""
    middle = spans("1b")[3]
    assert middle.training_flop(1, recomputes=False) == pytest.approx(6 * middle.num_parameters, rel=1e-3)
    assert middle.training_flop(1, recomputes=True) == pytest.approx(8 * middle.num_parameters, rel=1e-3)


@pytest.mark.parametrize("name", codec_names())
def test_contributions_are_as_large_as_the_reduce_makes_them(name: str) -> None:
    for span in spans("bench"):
        assert span.encoded_bytes(name) == sum(encoded_shard_bytes(name, shard) for shard in span.shards)


def test_parts_are_those_of_the_reduce() -> None:
    assert PART_ELEMENTS == parts.PART_ELEMENTS
    for span in spans("bench"):
        assert span.num_parts == len(parts.cut(span.shards, num_members=3))


def test_joined_stages_are_the_sum_of_them() -> None:
    """Oracle: a cut into fewer stages has the same layers."""
    whole, (one,) = Span.of(spans("bench")), spans_of(find_preset("bench").config, 1)
    assert whole.stages == (0, 1, 2)
    assert whole.num_parameters == one.num_parameters
    assert sorted(whole.shards) == sorted(one.shards)
    assert whole.training_flop(256, recomputes=True) == one.training_flop(256, recomputes=True)
