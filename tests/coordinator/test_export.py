"""coordinator/export.py: what is exported is what transformers loads."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from structlog.testing import capture_logs

from coordinator.export import export, read_tensor_header
from coordinator.rundir import RunDir
from protocol.errors import ConfigError, StorageError
from protocol.ids import RoundId
from tests.coordinator.runs import Weights, make_run, random_weights, stage_files


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    return make_run(tmp_path, tokenizer="train:300")


def _add(run: RunDir, weights: Sequence[Weights], *, version: int = 8, metadata: str = "pt") -> None:
    files = stage_files(run.path.parent / "downloads", weights, version=version, metadata=metadata)
    run.write_checkpoint(RoundId(version), files)


@pytest.mark.slow
@pytest.mark.parametrize("stages", [1, 2, 4])
def test_transformers_loads_the_export_and_computes_the_same_logits(tmp_path: Path, stages: int) -> None:
    """Oracle: a transformers model built from the manifest's config and given the same tensors by hand."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    auto: Any = AutoModelForCausalLM
    run = make_run(tmp_path, tokenizer="train:300", stages=stages)
    weights = random_weights(run.manifest)
    _add(run, weights)
    exported = export(run, tmp_path / "model")

    config = AutoConfig.for_model(**run.manifest.model.config)
    reference = auto.from_config(config)
    tensors = {name: torch.from_numpy(array) for stage in weights for name, array in stage.items()}
    assert not reference.load_state_dict(tensors, strict=False).unexpected_keys
    loaded, report = auto.from_pretrained(exported.path, output_loading_info=True)
    assert not any(report.values())
    assert loaded.dtype == torch.float32
    assert loaded.num_parameters() == exported.num_parameters

    tokenizer = AutoTokenizer.from_pretrained(exported.path)
    text = (tmp_path / "text.txt").read_text(encoding="utf-8")[:200]
    ids = tokenizer(text, return_tensors="pt")["input_ids"]
    assert tokenizer.decode(ids[0]) == text
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids).logits, reference(ids).logits, rtol=0, atol=0)
        sample = loaded.generate(ids[:, :4], max_new_tokens=3)
    assert sample.shape[1] <= 7


def test_the_folder_is_as_hugging_face_describes_it(run: RunDir, tmp_path: Path) -> None:
    """Oracle: by hand; sharded weights with an index whose entries are in the shards it names."""
    weights = random_weights(run.manifest)
    _add(run, weights)
    exported = export(run, tmp_path / "model", facts={"Held-out loss": "5.43 nats"})
    assert exported.round == 8
    assert sorted(path.name for path in exported.path.iterdir()) == [
        "README.md",
        "config.json",
        "generation_config.json",
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
        "model.safetensors.index.json",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    index = json.loads((exported.path / "model.safetensors.index.json").read_text())
    for name, shard in index["weight_map"].items():
        assert name in read_tensor_header(exported.path / shard).tensors
    assert set(index["weight_map"]) == {name for stage in weights for name in stage}
    assert index["metadata"]["total_size"] == exported.num_parameters * 4
    config = json.loads((exported.path / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert (config["tie_word_embeddings"], config["torch_dtype"], config["vocab_size"]) == (False, "float32", 300)
    generation = json.loads((exported.path / "generation_config.json").read_text())
    assert generation["eos_token_id"] == config["eos_token_id"] == 0


def test_the_model_card_tells_the_run(run: RunDir, tmp_path: Path) -> None:
    """Oracle: the facts that a reader wants, and a note only if the model was untied."""
    _add(run, random_weights(run.manifest))
    card = (export(run, tmp_path / "model", facts={"Held-out loss": "5.43 nats"}).path / "README.md").read_text()
    for fact in (run.manifest.run_id, "5.43 nats", "round 8 of 8", f"{run.manifest.data.unigram_loss:.4f}"):
        assert fact in card
    assert "tied" not in card


def test_the_newest_sound_checkpoint_is_exported(run: RunDir, tmp_path: Path) -> None:
    """Oracle: round 6 is damaged, so round 4 is taken, with a warning."""
    _add(run, random_weights(run.manifest, seed=4), version=4)
    _add(run, random_weights(run.manifest, seed=6), version=6)
    damaged = run.path / "checkpoints" / "round-000006" / "stage-1.weights.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1])
    with capture_logs() as logs:
        assert export(run, tmp_path / "model").round == 4
    assert logs[0]["event"] == "checkpoint.damaged"


def test_nothing_to_export_is_one_clear_line(run: RunDir, tmp_path: Path) -> None:
    """Oracle: exit code 3, and no folder."""
    with pytest.raises(ConfigError, match="no sound checkpoint yet") as caught:
        export(run, tmp_path / "model")
    assert caught.value.exit_code == 3
    assert not (tmp_path / "model").exists()


def test_an_existing_folder_is_not_overwritten(run: RunDir, tmp_path: Path) -> None:
    """Oracle: the second export is refused and the first stays."""
    _add(run, random_weights(run.manifest))
    export(run, tmp_path / "model")
    before = (tmp_path / "model" / "config.json").stat().st_mtime_ns
    with pytest.raises(ConfigError, match="is not empty"):
        export(run, tmp_path / "model")
    assert (tmp_path / "model" / "config.json").stat().st_mtime_ns == before


def _spoil(weights: Sequence[Weights], how: str) -> list[dict[str, Any]]:
    stages: list[dict[str, Any]] = [dict(stage) for stage in weights]
    if how == "missing":
        del stages[1]["model.norm.weight"]
    elif how == "shape":
        stages[0]["model.embed_tokens.weight"] = stages[0]["model.embed_tokens.weight"][:-1]
    elif how == "extra":
        stages[0]["optimizer.step"] = np.zeros(1, dtype=np.float32)
    elif how == "type":
        stages[1]["lm_head.weight"] = stages[1]["lm_head.weight"].astype(np.float16)
    elif how == "integers":
        stages = [{name: array.astype(np.int32) for name, array in stage.items()} for stage in stages]
    elif how == "swapped":
        stages.reverse()
    return stages


@pytest.mark.parametrize(
    ("how", "reason"),
    [
        ("missing", "model.norm.weight is missing"),
        ("shape", "model.embed_tokens.weight has shape"),
        ("extra", "optimizer.step does not belong"),
        ("type", "F16, F32"),
        ("integers", "types I32"),
        ("swapped", "does not hold stage 0"),
        ("format", "does not say that its tensors are PyTorch's"),
    ],
)
def test_weights_that_are_not_the_models_are_refused(run: RunDir, tmp_path: Path, how: str, reason: str) -> None:
    """Oracle: each would load wrongly or not at all; exit code 5, the file named, nothing written."""
    _add(run, _spoil(random_weights(run.manifest), how), metadata="np" if how == "format" else "pt")
    with pytest.raises(StorageError, match=reason) as caught:
        export(run, tmp_path / "model")
    assert "\n" not in caught.value.one_line()
    assert not (tmp_path / "model").exists()


def test_something_that_is_not_safetensors_is_refused(tmp_path: Path) -> None:
    """Oracle: a header that claims more than there is."""
    path = tmp_path / "x.safetensors"
    path.write_bytes((50).to_bytes(8, "little") + b"{}")
    with pytest.raises(StorageError, match="not a safetensors file"):
        read_tensor_header(path)


def test_a_disk_that_fills_up_leaves_no_half_model(
    run: RunDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: exit code 5, and neither the folder nor parts of it remain."""
    _add(run, random_weights(run.manifest))

    def full(source: object, target: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("shutil.copyfile", full)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(StorageError, match="No space left"):
        export(run, tmp_path / "model")
    assert sorted(tmp_path.iterdir()) == before


def test_an_untied_model_says_so(tmp_path: Path) -> None:
    """Oracle: the card of a run that was started from a tied config."""
    config = {
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 32, "num_hidden_layers": 2,
        "num_attention_heads": 2, "intermediate_size": 48, "vocab_size": 99, "tie_word_embeddings": True,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    run = make_run(tmp_path, model=tmp_path)
    _add(run, random_weights(run.manifest))
    folder = export(run, tmp_path / "model").path
    assert "tied the head" in (folder / "README.md").read_text()
    assert json.loads((folder / "config.json").read_text())["tie_word_embeddings"] is False
