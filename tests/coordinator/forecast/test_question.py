"""coordinator/forecast/question.py: what people write, and where the rest comes from.

Oracles: the presets, a run directory's manifest, and what is written.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from coordinator.forecast.question import Question, read_peers, read_question
from coordinator.forecast.swarm import DEFAULT_PING_MS, DEFAULT_WAVE, Peers
from coordinator.presets import find_preset
from protocol.architecture import num_parameters
from protocol.errors import ConfigError
from tests.coordinator.runs import make_run

USUAL = Peers(count=1, upload_mbps=1.0, download_mbps=2.0, tflops=3.0, stage_seconds=(4.0,), device_bytes=5)


@pytest.mark.parametrize(
    ("text", "changes"),
    [
        ("8x", {"count": 8}),
        ("8x20/100mbps", {"count": 8, "upload_mbps": 20.0, "download_mbps": 100.0}),
        ("20/100mbps,10.5tflops", {"upload_mbps": 20.0, "download_mbps": 100.0, "tflops": 10.5, "stage_seconds": ()}),
        (
            "2x 7tflops, device=8GB, host=1GiB",
            {"count": 2, "tflops": 7.0, "device_bytes": 8 * 10**9, "host_bytes": 2**30},
        ),
        ("3xpcie=5.5,drive=2", {"count": 3, "pcie_gb_per_s": 5.5, "drive_gb_per_s": 2.0}),
        ("seconds=0.3/0.25", {"stage_seconds": (0.3, 0.25)}),
    ],
)
def test_peers_are_read(text: str, changes: dict[str, Any]) -> None:
    if "tflops" in changes:
        changes = {**changes, "stage_seconds": ()}
    assert read_peers(text, USUAL) == replace(USUAL, **changes)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("fast", "'fast' says nothing"),
        ("0x20/100mbps", "peers: 0 is not"),
        ("9999999x", "peers: 9999999 is not"),
        ("20mbps", "'20mbps' says nothing"),
        ("0/100mbps", "upload: '0' is not a number above 0"),
        ("1..5tflops", "tflops: '1..5' is not"),
        ("pcie=nan", "pcie: 'nan' is not"),
        ("drive=inf", "drive: 'inf' is not"),
        ("device=8", "device memory: '8' has no unit"),
        ("seconds=1/-2", "stage seconds: '-2' is not"),
        ("speed=9", "'speed=9' says nothing"),
    ],
)
def test_what_says_nothing_about_peers_is_refused(text: str, why: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read_peers(text, USUAL)
    assert why in str(caught.value)


def test_a_preset_brings_model_and_settings() -> None:
    """Oracle: the preset. Its tokenizer decides about the vocabulary: 65,536 tokens, where the config says 128,256."""
    asked = read_question(Question(preset="1b"))
    preset = find_preset("1b")
    assert asked.model.num_stages == preset.num_stages
    assert asked.model.config["vocab_size"] == 65_536
    assert (asked.recipe.batch, asked.recipe.averaging) == (preset.batch, preset.averaging)
    assert asked.target_tokens == preset.batch.num_rounds * preset.batch.tokens_per_round
    assert [peers.count for peers in asked.swarm.peers] == [preset.num_stages]
    assert (asked.swarm.ping_ms, asked.swarm.wave) == (DEFAULT_PING_MS, DEFAULT_WAVE)


def test_the_vocabulary_of_bytes_is_known_before_there_is_a_tokenizer(tmp_path: Path) -> None:
    """Oracle: a run that was made with it."""
    asked = read_question(Question(preset="tiny"))
    assert asked.model.config["vocab_size"] == make_run(tmp_path).manifest.data.vocab_size


def test_a_run_brings_its_own(tmp_path: Path) -> None:
    run = make_run(tmp_path, overrides={"averaging.mode": "diloco", "averaging.codec": "sparse"})
    asked = read_question(Question(directory=run.path, settings={"averaging.codec": "int4"}))
    manifest = run.manifest
    assert asked.name == manifest.name
    assert asked.model.num_stages == manifest.model.num_stages
    assert asked.model.num_parameters == num_parameters(manifest.model.config)
    assert asked.recipe.batch == manifest.batch
    assert asked.recipe.averaging == manifest.averaging.model_copy(update={"codec": "int4"})


def test_a_models_config_keeps_its_vocabulary(tmp_path: Path) -> None:
    config = {**find_preset("demo").config, "vocab_size": 777, "tie_word_embeddings": True}
    (tmp_path / "config.json").write_text(json.dumps(config))
    asked = read_question(Question(model=tmp_path, preset="tiny", num_stages=3))
    assert asked.model.config["vocab_size"] == 777
    assert not asked.model.config["tie_word_embeddings"]
    assert asked.model.num_stages == 3
    assert asked.recipe.batch == find_preset("tiny").batch
    assert asked.name == tmp_path.name


def test_peers_are_counted_together() -> None:
    """Oracle: on paper: two kinds, and three more for each of four stages."""
    asked = read_question(
        Question(
            preset="bench",
            num_stages=4,
            kinds=("2x40/40mbps", "5tflops"),
            replicas=3,
            usual={"upload_mbps": 10.0, "download_mbps": None, "tflops": None, "device_bytes": "6GiB"},
        )
    )
    assert [peers.count for peers in asked.swarm.peers] == [2, 1, 12]
    assert [peers.upload_mbps for peers in asked.swarm.peers] == [40.0, 10.0, 10.0]
    assert {peers.device_bytes for peers in asked.swarm.peers} == {6 * 2**30}
    assert read_question(Question(preset="bench", num_stages=4, num_peers=9)).swarm.num_peers == 9
    assert read_question(Question(preset="bench", num_stages=4, stages_per_peer=2)).swarm.num_peers == 2


@pytest.mark.parametrize(
    ("question", "why"),
    [
        (Question(), "nothing to plan"),
        (Question(directory=Path("run"), preset="1b"), "its own model"),
        (Question(preset="huge"), "no preset 'huge'"),
        (Question(preset="bench", num_stages=99), "cannot be cut"),
        (Question(preset="bench", settings={"batch.size": 3}), "no setting 'batch.size'"),
        (Question(preset="bench", settings={"averaging.codec": "int4"}), "impossible"),
        (Question(preset="bench", settings={"averaging.stage_codecs": ["int8"]}), "names 1 codecs for 2 stages"),
        (Question(preset="bench", settings={"averaging.mode": "diloco", "averaging.fragments": 60}), "60 fragments"),
        (Question(preset="bench", usual={"stage_seconds": "1/2/3"}), "3 stages were measured, and there are 2"),
        (Question(preset="bench", ping_ms=float("nan")), "latency: nan"),
        (Question(preset="bench", target_tokens=float("inf")), "inf is not a number of tokens"),
        (Question(preset="bench", kinds=("600000x", "600000x")), "beyond this plan"),
    ],
)
def test_what_cannot_be_is_refused(question: Question, why: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read_question(question)
    assert why in str(caught.value)
