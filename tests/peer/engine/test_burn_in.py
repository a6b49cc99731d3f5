"""Whether a device computes what it should. Oracle: faults that are put in, one value or one word each."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from torch import Tensor

from peer.cli import peer
from peer.engine import burn_in as module
from peer.engine.burn_in import burn_in, wrong_in_memory
from peer.engine.replay import Replay

CPU = torch.device("cpu")
MIB = 1 << 20


def test_a_sound_machine_is_sound() -> None:
    told: list[tuple[int, int]] = []
    found = burn_in("cpu", seconds=0.0, memory_bytes=3 * MIB, on_progress=lambda *counts: told.append(counts))
    assert found.is_sound
    assert (found.passes, found.wrong_passes, found.wrong_words, found.memory_bytes) == (2, 0, 0, 3 * MIB)
    assert found.worst <= module.SAME
    assert told == [(2, 0)]


@pytest.mark.parametrize("fault", [1.0, float("nan"), float("inf")])
def test_one_wrong_value_in_one_pass_is_found(fault: float, monkeypatch: pytest.MonkeyPatch) -> None:
    honest = Replay.down
    calls: list[None] = []

    def down(self: Replay, *arguments: Any) -> list[Tensor]:
        (returned,) = honest(self, *arguments)
        calls.append(None)
        if len(calls) == 2:  # the first one is what others are compared with
            returned.view(-1)[1234] = fault
        return [returned]

    monkeypatch.setattr(Replay, "down", down)
    found = burn_in("cpu", seconds=0.0, memory_bytes=0)
    assert not found.is_sound
    assert found.wrong_passes == 1


@pytest.mark.parametrize("pattern", [0, 1, 2])
def test_a_word_that_does_not_stay_is_found(pattern: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """With each of the patterns; in the last piece, which is not full."""
    honest, fills = module._fill, []
    num_chunks = 3
    monkeypatch.setattr(module, "CHUNK_BYTES", MIB)

    def fill(chunk: Tensor, number: int, what: int | None) -> None:
        honest(chunk, number, what)
        fills.append(number)
        if len(fills) == pattern * 2 * num_chunks + num_chunks:
            chunk[7] ^= 1 << 20

    monkeypatch.setattr(module, "_fill", fill)
    assert wrong_in_memory(CPU, 2 * MIB + 4096) == 1
    assert sorted(set(fills)) == list(range(num_chunks))


def test_every_word_of_the_last_pattern_is_another(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CHUNK_BYTES", 1024)
    chunks = [torch.empty(256, dtype=torch.int32) for _ in range(3)]
    for number, chunk in enumerate(chunks):
        module._fill(chunk, number, None)
    assert len(set(torch.cat(chunks).tolist())) == 3 * 256


# -- the command ----------------------------------------------------------------------------------------


def call(*arguments: str) -> Any:
    return CliRunner().invoke(peer, ["bench", "burn-in", *arguments])


def test_the_command_says_what_came_of_it() -> None:
    result = call("--device", "cpu", "--minutes", "0", "--memory", "2MiB", "--json")
    assert result.exit_code == 0, result.output
    said = json.loads(result.stdout)
    assert said["schema"] == "peer.burn-in/1"
    assert said["data"]["sound"] is True
    shown = call("--device", "cpu", "--minutes", "0", "--memory", "2MiB")
    assert shown.stdout.splitlines()[-1] == "sound"


def test_a_fault_is_exit_code_5_and_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "wrong_in_memory", lambda device, num_bytes: 3)
    result = call("--device", "cpu", "--minutes", "0", "--memory", "1MiB")
    assert result.exit_code == 5
    assert "6 words wrong" in result.stdout
    assert result.stderr.strip().splitlines()[-1].startswith("peer bench burn-in: E-LOCAL cpu does not compute")


@pytest.mark.parametrize(
    ("arguments", "code"),
    [(("--device", "cuda:7"), 5), (("--device", "toaster"), 5), (("--minutes", "-1"), 2), (("--memory", "much"), 3)],
)
def test_what_cannot_be_tried_is_one_line(arguments: tuple[str, ...], code: int) -> None:
    result = call("--minutes", "0", *arguments)
    assert result.exit_code == code, result.output
    assert "Traceback" not in result.output
