"""coordinator/init.py: a run directory comes whole, says what it is, or does not come."""

from __future__ import annotations

import json
import stat
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from coordinator.init import init_run, read_model_config
from coordinator.rundir import RunDir
from protocol.batches import num_windows
from protocol.errors import ConfigError, CorpusError, ModelError, StorageError, SwarmError
from protocol.manifest import Manifest
from protocol.signing import SigningKey
from protocol.transport.identity import load
from tests.coordinator.runs import write_prose


@pytest.fixture
def text(tmp_path: Path) -> Path:
    return write_prose(tmp_path / "text.txt", chars=60_000)


def _init(directory: Path, text: Path, **choices: Any) -> Manifest:
    settings: dict[str, Any] = {"corpus": [text], "preset": "tiny", "now_s": 1.0}
    return init_run(directory, **(settings | choices))


def _model(folder: Path, **changes: Any) -> Path:
    config = {
        "model_type": "qwen2",
        "architectures": ["Qwen2ForCausalLM"],
        "hidden_size": 32,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "intermediate_size": 48,
        "vocab_size": 1000,
        "max_position_embeddings": 64,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "bos_token_id": 998,
        "eos_token_id": 999,
        "sliding_window": None,
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config | changes))
    return folder


def test_a_run_holds_all_that_its_manifest_names(tmp_path: Path, text: Path) -> None:
    """Oracle: opening it verifies signature, chunks and tokenizer."""
    manifest = _init(tmp_path / "my run", text)
    run = RunDir.open(tmp_path / "my run")
    assert run.manifest == manifest
    run.verify_tokens()
    assert "tokenizer.json" in run.tokenizer_files()
    assert manifest.name == "my run"
    assert manifest.coordinator == load(tmp_path / "my run" / "coordinator.key").peer_id
    assert stat.S_IMODE((tmp_path / "my run" / "coordinator.key").stat().st_mode) == 0o600
    assert sorted(path.name for path in (tmp_path / "my run").iterdir()) == [
        "coordinator.key", "manifest.json", "manifest.signed", "tokenizer", "tokens",
    ]  # fmt: skip


def test_the_readable_manifest_says_what_the_signed_one_says(tmp_path: Path, text: Path) -> None:
    """Oracle: field by field, hashes as hex, the model's config as an object."""
    manifest = _init(tmp_path / "run", text)
    readable = json.loads((tmp_path / "run" / "manifest.json").read_text())
    assert readable["run"] == manifest.run_id
    assert readable["model"]["config"] == manifest.model.config
    assert readable["data"]["train"]["index_digest"] == manifest.data.train.index_digest.hex()
    assert readable["batch"] == manifest.batch.model_dump()
    assert readable["optimizer"]["name"] == "adamw32"


def test_the_model_is_fitted_to_the_tokenizer(tmp_path: Path, text: Path) -> None:
    """Oracle: by hand; 256 bytes and the separator."""
    config = _init(tmp_path / "run", text).model.config
    assert config["vocab_size"] == 257
    assert config["bos_token_id"] == config["eos_token_id"] == 256
    tokens = np.fromfile(tmp_path / "run" / "tokens" / "train.bin", dtype="<u2")
    assert tokens[0] == 256
    assert tokens.max() < config["vocab_size"]


def test_the_same_choices_give_the_same_data_and_model(tmp_path: Path, text: Path) -> None:
    """Oracle: two runs differ in their coordinator's key alone."""
    one, two = (_init(tmp_path / name, text, name="same", tokenizer="train:300") for name in ("one", "two"))
    assert one.coordinator != two.coordinator
    assert one.model_copy(update={"coordinator": two.coordinator}) == two


def test_choices_and_overrides_reach_the_manifest(tmp_path: Path, text: Path) -> None:
    """Oracle: by hand, one of each kind; a choice by name and the seed included."""
    manifest = _init(
        tmp_path / "run",
        text,
        rounds=3,
        stages=4,
        name="ours",
        seed=5,
        overrides={"optimizer.name": "adamw8bit", "batch.eval_every": 1, "averaging.codec": "int8", "timing.beat_s": 3},
    )
    assert (manifest.batch.num_rounds, manifest.model.num_stages, manifest.name) == (3, 4, "ours")
    assert (manifest.model.init_seed, manifest.batch.data_seed) == (5, 5)
    assert manifest.optimizer.name.value == "adamw8bit"
    assert (manifest.batch.eval_every, manifest.averaging.codec, manifest.timing.beat_s) == (1, "int8", 3.0)


@pytest.mark.parametrize("order", [("averaging.mode", "averaging.codec"), ("averaging.codec", "averaging.mode")])
def test_settings_that_need_each_other_may_come_in_any_order(
    tmp_path: Path, text: Path, order: tuple[str, str]
) -> None:
    """Oracle: by hand; either of the two alone would be refused, or mean something else."""
    values = {"averaging.mode": "diloco", "averaging.codec": "int4"}
    manifest = _init(tmp_path / "run", text, overrides={key: values[key] for key in order})
    assert (manifest.averaging.mode.value, manifest.averaging.codec) == ("diloco", "int4")


def test_a_model_of_ones_own_is_untied_and_told_about(tmp_path: Path, text: Path) -> None:
    """Oracle: the notes, and a config that fits the tokenizer and forgets the checkpoint it came with."""
    notes: list[str] = []
    manifest = _init(tmp_path / "run", text, model=_model(tmp_path / "model"), note=notes.append)
    config = manifest.model.config
    assert manifest.model.was_tied
    assert config["tie_word_embeddings"] is False
    assert (config["model_type"], config["vocab_size"], config["eos_token_id"]) == ("qwen2", 257, 256)
    assert "torch_dtype" not in config
    assert any("tied" in line for line in notes)
    assert any("257 tokens" in line and "1000" in line for line in notes)


def test_a_model_that_brings_a_tokenizer_is_trained_with_it(tmp_path: Path, text: Path) -> None:
    """Oracle: the vocabulary is the folder's tokenizer's, unless another is asked for."""
    _init(tmp_path / "first", text, tokenizer="train:300")
    model = _model(tmp_path / "model", tie_word_embeddings=False)
    for file in (tmp_path / "first" / "tokenizer").iterdir():
        (model / file.name).write_bytes(file.read_bytes())
    assert _init(tmp_path / "second", text, model=model).data.vocab_size == 300
    assert _init(tmp_path / "third", text, model=model, tokenizer="bytes").data.vocab_size == 257


def test_a_model_with_fewer_layers_than_the_presets_stages_gets_fewer_stages(tmp_path: Path, text: Path) -> None:
    """Oracle: one layer, one stage, as nobody asked for more."""
    assert _init(tmp_path / "run", text, model=_model(tmp_path / "model", num_hidden_layers=1)).model.num_stages == 1


def test_a_short_held_out_text_is_used_whole(tmp_path: Path) -> None:
    """Oracle: by hand; 2 % of 5,000 bytes and a separator make 3 sequences of 32, and a note says so."""
    notes: list[str] = []
    text = tmp_path / "short.txt"
    text.write_text("x" * 5_000)
    manifest = _init(tmp_path / "run", text, note=notes.append)
    assert num_windows(manifest.data.heldout.num_tokens, 32) == 3
    assert manifest.batch.heldout_sequences == 3
    assert any("3 sequences instead of 8" in line for line in notes)
    with pytest.raises(CorpusError, match="but 8 are needed"):
        _init(tmp_path / "strict", text, overrides={"batch.heldout_sequences": 8})


REFUSALS: dict[str, tuple[dict[str, Any], type[SwarmError], str]] = {
    "corpus missing": ({"corpus": [Path("/nowhere/at/all")]}, CorpusError, "no file or folder /nowhere/at/all"),
    "no corpus named": ({"corpus": []}, CorpusError, "no corpus"),
    "too few training tokens": ({"overrides": {"batch.microbatches_per_round": 60_000}}, CorpusError, "are needed"),
    "too few held-out tokens": ({"overrides": {"batch.heldout_sequences": 10_000}}, CorpusError, r"heldout\.bin"),
    "more stages than layers": ({"stages": 5}, ModelError, "4 layers cannot be cut into 5"),
    "no stages": ({"stages": 0}, ModelError, "0 stages"),
    "unknown preset": ({"preset": "huge"}, ConfigError, "no preset"),
    "unknown section": ({"overrides": {"model.init_seed": 1}}, ConfigError, "no setting 'model.init_seed'"),
    "unknown field": ({"overrides": {"batch.size": 1}}, ConfigError, r"no setting 'batch\.size'"),
    "fragments of gradients": ({"overrides": {"averaging.fragments": 2}}, ConfigError, "fragments are for mode diloco"),
    "more fragments than there are blocks": (
        {"overrides": {"averaging.mode": "diloco", "averaging.fragments": 60}},
        ConfigError,
        "cannot be averaged in 60 fragments",
    ),
    "impossible value": ({"overrides": {"optimizer.beta1": 2.0}}, ConfigError, "optimizer.beta1 is impossible"),
    "value of another type": ({"overrides": {"batch.num_rounds": "many"}}, ConfigError, "valid integer"),
    "no rounds": ({"rounds": 0}, ConfigError, "num_rounds is impossible"),
    "impossible tokenizer": ({"tokenizer": "train:7"}, ConfigError, "not a tokenizer"),
    "sequences longer than the model": ({"overrides": {"batch.sequence_length": 129}}, ModelError, "sees 128 tokens"),
    "endless name": ({"name": "x" * 65}, ConfigError, "1 to 64 characters"),
    "model missing": ({"model": Path("/nowhere")}, ModelError, "cannot read /nowhere"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_a_refusal_is_one_line_with_its_exit_code_and_leaves_nothing(tmp_path: Path, text: Path, case: str) -> None:
    """Oracle: exit code 3, the reason, and a parent folder that looks as before."""
    choices, kind, reason = REFUSALS[case]
    with pytest.raises(kind, match=reason) as caught:
        _init(tmp_path / "run", text, **choices)
    assert caught.value.exit_code == 3
    assert "\n" not in caught.value.one_line()
    assert [path.name for path in tmp_path.iterdir()] == ["text.txt"]


@pytest.mark.parametrize(
    ("content", "reason"),
    [("{", "not JSON"), ("[]", "does not hold"), ('{"model_type": "gpt2"}', "model_type 'gpt2' is not supported")],
)
def test_a_model_that_cannot_be_trained_is_refused(tmp_path: Path, text: Path, content: str, reason: str) -> None:
    """Oracle: the reason, exit code 3."""
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(ModelError, match=reason):
        _init(tmp_path / "run", text, model=tmp_path)
    assert not (tmp_path / "run").exists()


def test_a_config_can_be_named_by_its_file(tmp_path: Path) -> None:
    """Oracle: the folder and the file are the same model."""
    folder = _model(tmp_path / "model")
    assert read_model_config(folder) == read_model_config(folder / "config.json")


def test_a_folder_with_something_in_it_is_never_touched(tmp_path: Path, text: Path) -> None:
    """Oracle: exit code 3 and the file as it was; an empty folder is welcome."""
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("years")
    with pytest.raises(ConfigError, match="is not empty"):
        _init(tmp_path / "full", text)
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["thesis.tex"]
    (tmp_path / "empty").mkdir()
    _init(tmp_path / "empty", text)
    RunDir.open(tmp_path / "empty").verify_tokens()


def test_a_second_init_does_not_overwrite_the_first(tmp_path: Path, text: Path) -> None:
    """Oracle: the first run's key is still there."""
    _init(tmp_path / "run", text)
    before = RunDir.open(tmp_path / "run").key.peer_id
    with pytest.raises(ConfigError, match="is not empty"):
        _init(tmp_path / "run", text)
    assert RunDir.open(tmp_path / "run").key.peer_id == before


def test_an_unwritable_place_is_a_fault_of_this_machine(tmp_path: Path, text: Path) -> None:
    """Oracle: exit code 5, and told before a single byte of text was read."""
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError) as caught:
        _init(tmp_path / "file" / "run", text)
    assert caught.value.exit_code == 5


def test_a_disk_that_fills_up_leaves_nothing(tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: ENOSPC while syncing is exit code 5, and the half-made run is gone."""

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(StorageError, match="No space left"):
        _init(tmp_path / "run", text)
    assert [path.name for path in tmp_path.iterdir()] == ["text.txt"]


@pytest.mark.slow
def test_the_standard_library_is_the_default_corpus(tmp_path: Path) -> None:
    """Oracle: a demo-sized run without any choice but the directory; this is what `coordinator demo` starts with."""
    manifest = init_run(tmp_path / "run", overrides={"batch.num_rounds": 2}, tokenizer="bytes")
    assert manifest.data.train.num_tokens > 5_000_000
    assert manifest.batch.heldout_sequences == 64
    assert manifest.data.unigram_loss > 2
    assert isinstance(RunDir.open(tmp_path / "run").key, SigningKey)
