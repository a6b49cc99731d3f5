"""`coordinator plan`: what it prints, and what it says of wrong input.

Oracles: the schema of the document; the table of exit codes; arithmetic on paper.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from coordinator.cli import coordinator
from coordinator.forecast.report import duration
from tests.coordinator.runs import make_run

QUICK = ("--preset", "bench", "--replicas", "2")


def call(*arguments: str | Path) -> Result:
    return CliRunner().invoke(coordinator, ["plan", *map(str, arguments)])


def data_of(result: Result) -> dict[str, Any]:
    assert result.exit_code == 0, result.output
    assert len(result.stdout.splitlines()) == 1
    document = json.loads(result.stdout)
    assert (document["schema"], document["ok"]) == ("coordinator.plan/1", True)
    data: dict[str, Any] = document["data"]
    return data


def test_a_plan_is_a_page() -> None:
    result = call(*QUICK, "--peer", "2x40/200mbps,20tflops,device=8GB")
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert 25 <= len(lines) <= 40
    assert max(map(len, lines[:14])) <= 120
    for word in ("bench", "6 peers", "tokens/s", "bytes per token", "2 x 40/200 Mbit/s, 20 TFLOP/s", "use "):
        assert word in result.stdout


def test_a_run_can_be_planned(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    data = data_of(call(run.path, "--peers", "6", "--json"))
    assert data["model"]["name"] == run.manifest.name
    assert len(data["model"]["stages"]) == run.manifest.model.num_stages
    assert data["target_tokens"] == run.manifest.batch.num_rounds * run.manifest.batch.tokens_per_round


def test_measured_seconds_are_all_that_counts_on_loopback() -> None:
    """Oracle: on paper: 8 microbatches of 512 tokens through stages of 0.2 and 0.3 s, and 0.5 s between rounds."""
    data = data_of(
        call(
            *("--preset", "bench", "--stages", "2", "--stage-seconds", "0.2/0.3", "--round-seconds", "0.5"),
            *("--upload-mbps", "1e9", "--download-mbps", "1e9", "--latency-ms", "0", "--json"),
            *("--set", "batch.eval_every=1000000000", "--set", "keeping.checkpoint_every=1000000000"),
        )
    )
    assert data["asked"]["round_s"] == pytest.approx(0.2 + 8 * 0.3 + 0.5, rel=1e-3)
    assert data["asked"]["tokens_per_s"] == pytest.approx(8 * 512 / 3.1, rel=1e-3)


def test_options_reach_the_forecast() -> None:
    data = data_of(
        call(
            *QUICK,
            *("--stages", "4", "--stages-per-peer", "2", "--wave", "3", "--in-flight", "5", "--keep-activations"),
            *("--device-memory", "4GB", "--host-memory", "2GB", "--pcie", "20", "--drive", "3", "--tflops", "7"),
            *("--target-tokens", "10e9", "--set", "averaging.activation_codec=int8", "--json"),
        )
    )
    swarm = data["swarm"]
    assert (swarm["stages_per_peer"], swarm["wave"], swarm["in_flight"], swarm["recomputes"]) == (2, 3, 5, False)
    (peers,) = swarm["peers"]
    assert (peers["count"], peers["device_bytes"], peers["host_bytes"]) == (4, 4 * 10**9, 2 * 10**9)
    assert (peers["pcie_gb_per_s"], peers["drive_gb_per_s"], peers["tflops"]) == (20.0, 3.0, 7.0)
    assert data["target_tokens"] == 1e10
    assert data["asked"]["activation_codec"] == "int8"
    assert data["asked"]["days"] == pytest.approx(1e10 / data["asked"]["tokens_per_s"] / 86_400)


def test_a_deadline_that_would_be_missed_is_warned_of() -> None:
    """Oracle: on paper: 8 microbatches of 100 s, where a round is closed after 300 s."""
    result = call("--preset", "bench", "--stage-seconds", "100")
    assert "a round takes 15.0 min and is given up after 5.0 min: --set timing.round_deadline_s=" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "exit_code", "text"),
    [
        ((), 3, "there is nothing to plan"),
        (("--preset", "huge"), 3, "no preset 'huge'"),
        (("--preset", "bench", "--peers", "1"), 3, "1 peers cannot host 2 stages"),
        (("--preset", "bench", "--peer", "lots"), 3, "'lots' says nothing about peers"),
        (("--preset", "bench", "--stages", "99"), 3, "E-MODEL"),
        (("--preset", "bench", "--stages", "3", "--stages-per-peer", "2", "--peers", "9"), 3, "cannot be dealt out"),
        (("--preset", "bench", "--set", "averaging.codec=int4"), 3, "impossible"),
        (("--preset", "bench", "--device-memory", "1MB", "--host-memory", "1MB"), 3, "does not fit a peer"),
        (("--preset", "bench", "--tflops", "nan"), 3, "tflops: 'nan'"),
        (("--preset", "bench", "--tflops", "-3"), 2, "--tflops"),
        (("--preset", "bench", "--peers", "0"), 2, "--peers"),
    ],
)
def test_wrong_values_are_one_line(arguments: tuple[str, ...], exit_code: int, text: str) -> None:
    result = call(*arguments)
    assert result.exit_code == exit_code, result.output
    assert result.stdout == ""
    assert text in result.stderr
    if exit_code == 3:
        assert len(result.stderr.strip().splitlines()) == 1


def test_a_directory_without_a_run_is_refused(tmp_path: Path) -> None:
    result = call(tmp_path)
    assert result.exit_code == 3
    assert "holds no run" in result.stderr


def test_times_are_written_in_units_that_can_be_read() -> None:
    assert [duration(seconds) for seconds in (0.0, 0.1234, 99, 600, 36_000)] == [
        "0 s",
        "0.123 s",
        "99 s",
        "10.0 min",
        "10.0 h",
    ]
