"""coordinator/presets.py: every preset is one that can be built, cut and trained."""

from __future__ import annotations

import pytest

from coordinator.presets import PRESETS, find_preset
from protocol import architecture
from protocol.architecture import check_config, num_parameters, stage_layers
from protocol.errors import ConfigError
from protocol.manifest import OptimizerName
from protocol.wire import Message

SECTIONS = ("batch", "optimizer", "averaging", "timing", "keeping")


def test_there_is_a_preset_for_every_model_and_no_other() -> None:
    """Oracle: the architectures' own list."""
    assert set(PRESETS) == set(architecture.PRESETS)
    assert all(name == preset.name for name, preset in PRESETS.items())


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_fits_together(name: str) -> None:
    """Oracle: the checks that a run would meet later."""
    preset = find_preset(name)
    check_config(preset.config)
    assert len(stage_layers(preset.config, preset.num_stages)) == preset.num_stages
    assert preset.batch.sequence_length <= preset.config["max_position_embeddings"]
    assert preset.optimizer.warmup_rounds < preset.batch.num_rounds
    assert preset.timing.reduce_timeout_s < preset.timing.round_deadline_s
    assert 3 * preset.timing.beat_s < preset.timing.hop_silence_s < preset.timing.round_deadline_s
    for section in SECTIONS:
        spec: Message = getattr(preset, section)
        assert type(spec).from_bytes(spec.to_bytes()) == spec


def test_the_demo_is_the_one_that_was_measured() -> None:
    """Oracle: the settings for which the learning curve is known."""
    demo = find_preset("demo")
    config = demo.config
    assert (config["hidden_size"], config["num_hidden_layers"], config["num_attention_heads"]) == (192, 4, 3)
    assert (config["intermediate_size"], demo.tokenizer) == (512, "train:1024")
    assert 1.9e6 < num_parameters(config) < 2.3e6
    batch, optimizer = demo.batch, demo.optimizer
    assert (batch.tokens_per_round, batch.sequence_length, batch.num_rounds) == (4096, 256, 60)
    assert (batch.heldout_sequences, batch.sequences_per_microbatch) == (64, 2)
    assert (optimizer.learning_rate, optimizer.warmup_rounds) == (3e-3, 4)
    assert optimizer.name is OptimizerName.ADAMW8BIT


def test_a_config_can_be_changed_without_changing_the_preset() -> None:
    """Oracle: presets are shared by everybody in the process."""
    one = dict(find_preset("tiny").config)
    one["hidden_size"] = 1
    assert find_preset("tiny").config["hidden_size"] != 1


def test_an_unknown_preset_names_those_there_are() -> None:
    """Oracle: the hint."""
    with pytest.raises(ConfigError, match="no preset 'huge'") as caught:
        find_preset("huge")
    assert all(name in caught.value.hint for name in PRESETS)
