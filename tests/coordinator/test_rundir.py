"""coordinator/rundir.py and checkpointfiles.py: nothing damaged is served, and no checkpoint is half there."""

from __future__ import annotations

import errno
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from structlog.testing import capture_logs

from coordinator.checkpointfiles import RECORD, file_name
from coordinator.durable import PART_PREFIX
from coordinator.rundir import RunDir
from protocol.errors import ConfigError, CorpusError, StorageError, SwarmError, WireError
from protocol.ids import RoundId
from protocol.manifest import MANIFEST_CONTEXT
from protocol.signing import SigningKey, seal
from protocol.transport.identity import create
from tests.coordinator.runs import make_run, random_weights, stage_files


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("template"), chars=2_000_000).path


@pytest.fixture
def run(template: Path, tmp_path: Path) -> RunDir:
    return RunDir.open(Path(shutil.copytree(template, tmp_path / "run")))


def _checkpoint(run: RunDir, round_number: int) -> None:
    files = stage_files(run.path.parent / "downloads", random_weights(run.manifest), version=round_number)
    run.write_checkpoint(RoundId(round_number), files)
    shutil.rmtree(run.path.parent / "downloads")


def _flip(path: Path, offset: int) -> None:
    data = bytearray(path.read_bytes())
    data[offset] ^= 1
    path.write_bytes(data)


# --- opening ---------------------------------------------------------------------------------------


def test_a_folder_without_a_run_says_how_to_make_one(tmp_path: Path) -> None:
    """Oracle: exit code 3 and the command."""
    with pytest.raises(ConfigError, match="holds no run") as caught:
        RunDir.open(tmp_path)
    assert "coordinator init" in caught.value.hint


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        ("other key", "does not belong to coordinator.key"),
        ("other signer", "does not belong to coordinator.key"),
        ("no key", "is missing"),
        ("flipped", "damaged|belong"),
        ("cut", "is damaged"),
        ("empty", "is damaged"),
    ],
)
def test_a_manifest_that_the_key_did_not_sign_is_refused(run: RunDir, damage: str, reason: str) -> None:
    """Oracle: exit code 3 in one line, for every way in which key and manifest can part."""
    key, signed = run.path / "coordinator.key", run.path / "manifest.signed"
    if damage in ("other key", "no key"):
        key.unlink()
    if damage == "other key":
        create(key)
    elif damage == "other signer":
        signed.write_bytes(seal(SigningKey.generate(), MANIFEST_CONTEXT, run.manifest).to_bytes())
    elif damage == "flipped":
        _flip(signed, 200)
    elif damage in ("cut", "empty"):
        signed.write_bytes(signed.read_bytes()[:300] if damage == "cut" else b"")
    with pytest.raises(ConfigError, match=reason) as caught:
        RunDir.open(run.path)
    assert caught.value.exit_code == 3
    assert "\n" not in caught.value.one_line()


def test_changing_the_readable_manifest_changes_nothing(run: RunDir) -> None:
    """Oracle: the signed one counts, and the readable one says so."""
    path = run.path / "manifest.json"
    path.write_text(path.read_text().replace('"num_rounds": 8', '"num_rounds": 9'))
    assert RunDir.open(run.path).manifest.batch.num_rounds == 8
    assert "For reading only" in path.read_text()


# --- tokens ----------------------------------------------------------------------------------------


def test_chunks_joined_are_the_file(run: RunDir) -> None:
    """Oracle: the file itself; it has several chunks."""
    spec = run.manifest.data.train
    assert spec.num_chunks > 2
    joined = b"".join(run.read_chunk(spec, chunk) for chunk in range(spec.num_chunks))
    assert joined == (run.path / "tokens" / "train.bin").read_bytes()
    run.verify_tokens()


def test_token_files_are_found_by_name_only(run: RunDir) -> None:
    """Oracle: a peer may ask for anything."""
    assert run.token_file("heldout.bin") == run.manifest.data.heldout
    assert run.token_file("../coordinator.key") is None
    with pytest.raises(WireError, match="has no chunk 99"):
        run.read_chunk(run.manifest.data.train, 99)


@pytest.mark.parametrize(("file", "offset", "chunk"), [("train.bin", 2_100_000, 2), ("heldout.bin", 0, 0)])
def test_a_flipped_byte_is_named_with_its_file_and_chunk(run: RunDir, file: str, offset: int, chunk: int) -> None:
    """Oracle: exit code 3; sound chunks are still served, the damaged one never."""
    _flip(run.path / "tokens" / file, offset)
    with pytest.raises(CorpusError, match=rf"{file} is damaged: chunk {chunk} ") as caught:
        run.verify_tokens()
    assert caught.value.exit_code == 3
    spec = run.token_file(file)
    assert spec is not None
    with pytest.raises(CorpusError):
        run.read_chunk(spec, chunk)
    for sound in set(range(spec.num_chunks)) - {chunk}:
        run.read_chunk(spec, sound)


@pytest.mark.parametrize("damage", ["cut", "longer", "missing", "index", "index missing"])
def test_a_token_file_that_is_not_the_manifests_is_refused(run: RunDir, damage: str) -> None:
    """Oracle: exit code 3, the file named."""
    path = run.path / "tokens" / "train.bin"
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:-1])
    elif damage == "longer":
        path.write_bytes(path.read_bytes() + b"\0\0")
    elif damage == "missing":
        path.unlink()
    elif damage == "index":
        _flip(path.with_suffix(".index"), 3)
    else:
        path.with_suffix(".index").unlink()
    with pytest.raises(CorpusError, match="train") as caught:
        run.verify_tokens()
    assert "\n" not in caught.value.one_line()


def test_another_tokenizer_is_refused(run: RunDir) -> None:
    """Oracle: an export with it would decode to nonsense."""
    path = run.path / "tokenizer" / "tokenizer_config.json"
    path.write_text(path.read_text() + " ")
    with pytest.raises(ConfigError, match="is not the one of this run"):
        run.tokenizer_files()


# --- checkpoints -----------------------------------------------------------------------------------


def test_a_checkpoint_comes_back_as_it_was(run: RunDir) -> None:
    """Oracle: the record, and the files byte by byte."""
    files = stage_files(run.path.parent / "downloads", random_weights(run.manifest), version=40)
    written = run.write_checkpoint(RoundId(40), files)
    found = run.newest_checkpoint()
    assert found == written
    assert found.round == 40
    assert [stage.version for stage in found.record.stages] == [40, 40]
    assert [bytes.fromhex(stage.lineage) for stage in found.record.stages] == [entry.lineage for entry in files]
    for entry in files:
        for part, path in entry.parts.items():
            assert found.file(entry.stage, part).read_bytes() == path.read_bytes()


def test_the_layout_on_disk_is_as_documented(run: RunDir) -> None:
    """Oracle: names and record as people and other tools find them."""
    _checkpoint(run, 40)
    folder = run.path / "checkpoints" / "round-000040"
    assert sorted(path.name for path in folder.iterdir()) == [
        "checkpoint.json",
        "stage-0.optimizer.safetensors",
        "stage-0.weights.safetensors",
        "stage-1.optimizer.safetensors",
        "stage-1.weights.safetensors",
    ]
    record = json.loads((folder / RECORD).read_text())
    assert (record["run"], record["round"]) == (run.manifest.run_id, 40)
    first = record["stages"][0]
    assert set(first) == {"stage", "version", "lineage", "files"}
    assert set(first["files"][0]) == {"name", "bytes", "sha256"}
    assert first["files"][0]["bytes"] == (folder / first["files"][0]["name"]).stat().st_size


def test_the_last_few_are_kept_and_the_oldest_go(run: RunDir) -> None:
    """Oracle: the tiny preset keeps 2, counted by round, not by time of writing."""
    for number in (2, 4, 6, 8):
        _checkpoint(run, number)
    assert run.checkpoints.rounds() == (8, 6)
    assert sorted(path.name for path in (run.path / "checkpoints").iterdir()) == ["round-000006", "round-000008"]


def test_a_run_without_checkpoints_has_none(run: RunDir) -> None:
    """Oracle: None, and no folder made by looking."""
    assert run.newest_checkpoint() is None
    assert not (run.path / "checkpoints").exists()


DAMAGES = {
    "weights cut": "has \\d+ bytes instead of",
    "weights flipped": "SHA-256",
    "optimizer missing": "cannot read",
    "record cut": "is damaged",
    "record missing": "cannot read",
    "record of another run": "belongs to",
    "a stage missing": "does not hold all 2 stages",
    "a file outside": "is damaged",
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_falls_back_to_the_one_before_and_says_why(run: RunDir, damage: str) -> None:
    """Oracle: round 4 instead of round 6, with one warning that names round and problem."""
    _checkpoint(run, 4)
    _checkpoint(run, 6)
    _damage(run.path / "checkpoints" / "round-000006", damage)
    with capture_logs() as logs:
        found = run.newest_checkpoint()
    assert found is not None
    assert found.round == 4
    (warning,) = logs
    assert (warning["event"], warning["log_level"], warning["round"]) == ("checkpoint.damaged", "warning", 6)
    with pytest.raises(StorageError, match=DAMAGES[damage]):
        run.checkpoints.open(RoundId(6))


def _damage(folder: Path, damage: str) -> None:
    weights = folder / file_name(1, "weights")
    if damage == "weights cut":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif damage == "weights flipped":
        _flip(weights, weights.stat().st_size - 5)
    elif damage == "optimizer missing":
        (folder / file_name(0, "optimizer")).unlink()
    elif damage == "record cut":
        (folder / RECORD).write_bytes((folder / RECORD).read_bytes()[:-20])
    elif damage == "record missing":
        (folder / RECORD).unlink()
    else:
        record: dict[str, Any] = json.loads((folder / RECORD).read_text())
        if damage == "record of another run":
            record["run"] = "0" * 32
        elif damage == "a stage missing":
            record["stages"].pop()
        else:
            record["stages"][0]["files"][0]["name"] = "../../coordinator.key"
        (folder / RECORD).write_text(json.dumps(record))


def test_when_all_are_damaged_there_is_none(run: RunDir) -> None:
    """Oracle: None and two warnings, rather than an error or a damaged state."""
    for number in (4, 6):
        _checkpoint(run, number)
        _damage(run.path / "checkpoints" / f"round-{number:06d}", "weights cut")
    with capture_logs() as logs:
        assert run.newest_checkpoint() is None
    assert [entry["round"] for entry in logs] == [6, 4]


@pytest.mark.parametrize("at", ["link", "copy", "sync"])
def test_a_full_disk_loses_no_checkpoint(run: RunDir, at: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: exit code 5; the checkpoint before is untouched, downloads too, and nothing half-made is left."""
    _checkpoint(run, 4)
    files = stage_files(run.path.parent / "downloads", random_weights(run.manifest), version=6)

    def full(*arguments: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        if at != "sync":
            patch.setattr(os, "link", full)
        if at == "copy":
            patch.setattr(shutil, "copyfile", full)
        elif at == "sync":
            patch.setattr(os, "fsync", full)
        if at == "link":  # no links here: copied instead
            assert run.write_checkpoint(RoundId(6), files).round == 6
            return
        with pytest.raises(StorageError, match="No space left") as caught:
            run.write_checkpoint(RoundId(6), files)
    assert caught.value.exit_code == 5
    assert [path.name for path in (run.path / "checkpoints").iterdir()] == ["round-000004"]
    assert all(path.is_file() for entry in files for path in entry.parts.values())
    assert run.write_checkpoint(RoundId(6), files) == run.newest_checkpoint()


def test_a_round_that_is_reached_again_replaces_its_damaged_checkpoint(run: RunDir) -> None:
    """Oracle: after falling back from 6 to 4, training comes to 6 again; the new 6 is sound."""
    _checkpoint(run, 4)
    _checkpoint(run, 6)
    _damage(run.path / "checkpoints" / "round-000006", "weights cut")
    _checkpoint(run, 6)
    found = run.newest_checkpoint()
    assert found is not None
    assert found.round == 6
    assert run.checkpoints.rounds() == (6, 4)


def test_a_failed_rewrite_keeps_the_checkpoint_it_was_to_replace(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: the sound round 6 is still there after a second write of it failed."""
    _checkpoint(run, 6)
    files = stage_files(run.path.parent / "downloads", random_weights(run.manifest, seed=1), version=6)
    before = run.newest_checkpoint()
    for entry in files:
        entry.parts["weights"].unlink()
    with pytest.raises(SwarmError):
        run.write_checkpoint(RoundId(6), files)
    assert run.newest_checkpoint() == before


def test_what_a_killed_write_left_is_ignored_and_cleared(run: RunDir) -> None:
    """Oracle: a part folder is neither a checkpoint nor kept for ever."""
    _checkpoint(run, 4)
    part = run.path / "checkpoints" / f"{PART_PREFIX}xyz"
    part.mkdir()
    (part / "stage-0.weights.safetensors").write_bytes(b"half")
    found = run.newest_checkpoint()
    assert found is not None
    assert found.round == 4
    _checkpoint(run, 6)
    assert not part.exists()
