"""`peer bench plan`: what it prints, and what it says of wrong input.

Oracles: the schema of the document; the table of exit codes.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from peer.cli import peer
from protocol.architecture import preset

ELSEWHERE = ("--machine", "8gb-pcie3x16-good", "--preset", "bench", "--device-memory", "300MiB")


def call(*arguments: str | Path) -> Result:
    return CliRunner().invoke(peer, ["bench", "plan", *map(str, arguments)])


def data_of(result: Result) -> dict[str, Any]:
    assert result.exit_code == 0, result.output
    assert len(result.stdout.splitlines()) == 1
    document = json.loads(result.stdout)
    assert document["schema"] == "peer.plan/1"
    data: dict[str, Any] = document["data"]
    return data


def test_a_plan_for_another_machine_is_a_table() -> None:
    result = call(*ELSEWHERE)
    assert result.exit_code == 0, result.output
    assert len(result.stdout.splitlines()) <= 26
    assert "8gb-pcie3x16-good" in result.stdout


def test_options_reach_the_plan() -> None:
    data = data_of(
        call(
            *ELSEWHERE,
            *("--stages", "4", "--stage", "1", "--stage", "2", "--sequences", "2", "--sequence-length", "64"),
            *("--microbatches", "6", "--optimizer", "adamw32", "--master", "bf16-sr", "--mode", "local"),
            *("--host-memory", "3GiB", "--nvme-limit", "7GB", "--nvme-writes-per-day", "100GB", "--json"),
        )
    )
    assert data["optimizer"] == "adamw32"
    assert data["master"] == "bf16-sr"
    assert data["microbatch"] == {"sequences": 2, "sequence_length": 64}
    assert data["workload"] == {
        "mode": "local",
        "microbatches": 6,
        "stages_behind": 1,
        "stages": 2,
        "longest_pass_s": None,
    }
    assert data["budgets"] == {
        "device_bytes": 300 << 20,
        "host_bytes": 3 << 30,
        "nvme_bytes": 7 * 10**9,
        "nvme_writes_per_day_bytes": 100 * 10**9,
    }
    assert {block["kind"] for block in data["blocks"]} == {"layer"}


def test_a_config_file_is_a_model(tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    file.write_text(json.dumps(preset("demo") | {"tie_word_embeddings": True}))
    data = data_of(call("--machine", "24gb-pcie4x16", "--config", file, "--json"))
    assert data["num_parameters"] > 0
    assert data["microbatch"]["sequence_length"] == 256


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("--machine", "cray"), "E-CFG there is no machine 'cray'"),
        ((*ELSEWHERE, "--host-memory", "lots"), "E-CFG --host-memory: 'lots' is no size."),
        ((*ELSEWHERE, "--nvme", "no-folder-yet"), "E-CFG a folder on this machine"),
        (("--nvme-limit", "3GB"), "E-CFG --nvme-limit needs a folder"),
        ((*ELSEWHERE, "--stages", "4", "--stage", "4"), "E-CFG there is no stage 4"),
        ((*ELSEWHERE, "--stages", "4", "--stage", "0", "--stage", "2"), "E-CFG the stages of one peer follow"),
        ((*ELSEWHERE, "--stages", "99"), "E-MODEL"),
        (("--machine", "8gb-pcie4x4", "--preset", "gpt5"), "E-MODEL there is no preset 'gpt5'"),
        ((*ELSEWHERE, "--device-memory", "1MiB"), "E-CFG this span needs"),
    ],
)
def test_bad_input_is_one_line_and_exit_3(arguments: tuple[str, ...], text: str) -> None:
    result = call(*arguments)
    assert result.exit_code == 3, result.output
    assert result.stdout == ""
    assert len(result.stderr.strip().splitlines()) == 1
    assert result.stderr.startswith(f"peer bench plan: {text}")


def test_a_config_that_is_none_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    for text in ("[1]", "{", "{}"):
        file.write_text(text)
        result = call("--machine", "8gb-pcie4x4", "--config", file)
        assert result.exit_code == 3, result.output
        assert len(result.stderr.strip().splitlines()) == 1
    both = call("--machine", "8gb-pcie4x4", "--config", file, "--preset", "1b")
    assert "either a preset or a config" in both.stderr


def test_click_refuses_what_is_no_number() -> None:
    assert call("--sequences", "0").exit_code == 2
    assert call("--mode", "never").exit_code == 2


@pytest.mark.slow
def test_this_machine_is_measured(tmp_path: Path) -> None:
    data = data_of(
        call(
            *("--preset", "tiny", "--sequences", "1", "--sequence-length", "32", "--device", "cpu", "--threads", "1"),
            *("--device-memory", "100MiB", "--host-memory", "100MiB", "--json"),
        )
    )
    assert data["prediction"]["step_s"] > 0
    assert data["prediction"]["process_bytes"] > data["prediction"]["peak_bytes"]["device"] > 0


@pytest.mark.slow
def test_a_plan_for_another_machine_does_not_load_torch() -> None:
    """Oracle: the modules of a fresh interpreter."""
    code = (
        "import sys; from peer.planning import Question, answer; from peer.memory.planning.workload import Mode; "
        "answer(Question(sequences=1, microbatches=1, optimizer='adamw8bit', master='fp32', mode=Mode.LOCAL, "
        "machine='24gb-pcie4x16')); print(*sorted({name.split('.')[0] for name in sys.modules}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert not {"torch", "transformers", "hivemind"} & set(done.stdout.split())
