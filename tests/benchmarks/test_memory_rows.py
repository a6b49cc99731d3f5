"""The two sides of the memory benchmark compute the same thing, and what measures them measures right.

Oracles: plain PyTorch in its own process, sizes worked out by hand, a fake child whose answers the test knows.
"""

from __future__ import annotations

import subprocess
import sys
import textwrap
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from tests.benchmarks import memory, memory_rivals
from tests.benchmarks.commands import CommandError
from tests.benchmarks.harness import Options, Pairs, Row, Sample, compare, figure
from tests.benchmarks.memory import QUICK, Bench, Size
from tests.benchmarks.memory_disk import RawDisk
from tests.benchmarks.memory_plain import LiveBytes, make_microbatches
from tests.benchmarks.memory_processes import PLAIN, Child, ReportedClock, Steps, memory_cap
from tests.benchmarks.spread import Bar

# no matrix has fewer than 4096 elements: the yardstick's optimizer would keep 32-bit state for it
TINY = replace(QUICK, hidden=128, ffn=128, heads=4, kv_heads=2, layers=3, microbatches=2, batch=2, length=16)

GROUPS = (
    memory.tiers,
    memory.balanced,
    memory.traffic,
    memory.activations,
    memory.planned,
    memory.depth,
    memory.hard_cap,
)

ECHO = """
    import json, sys
    for line in sys.stdin:
        request = json.loads(line)
        if request["do"] == "fail":
            sys.exit("no such thing")
        if request["do"] == "sleep":
            import time; time.sleep(60)
        print(json.dumps({"wall_s": 0.5 * request.get("number", 0), "cpu_s": 2.0, "stalled_s": 0.25}), flush=True)
"""


def fake_child(timeout_s: float = 30.0) -> Child:
    return Child([sys.executable, "-c", textwrap.dedent(ECHO)], timeout_s=timeout_s)


def rows(measured: Iterator[Row]) -> dict[str, Row]:
    return {row.row: row for row in measured}


@pytest.fixture(autouse=True)
def one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """Threads that wait for each other are slow where tests run side by side."""
    monkeypatch.setattr(memory, "THREADS", 1)
    monkeypatch.setattr(memory, "WARMUP", 1)


# -- both sides ---------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.long
def test_ours_and_the_yardstick_compute_the_same(tmp_path: Path) -> None:
    """Oracle: plain PyTorch from the same weights. After two steps outputs and gradients show weights and moments.

    One tier stands for all: tests/peer/engine/test_placements.py shows that they give the same bits.
    """
    bench = Bench(TINY, tmp_path)
    with bench.ours("nvme") as ours:
        ours.ask("save", path=str(tmp_path / "initial"))
        with bench.plain(weights=str(tmp_path / "initial")) as plain:
            for name, child in (("ours", ours), ("plain", plain)):
                for number in (1, 2, 3):
                    child.ask("step", number=number, save=str(tmp_path / f"{name}.{number}"), **TINY.wave)
                child.ask("save", path=str(tmp_path / f"{name}.weights"))
    for file in ("1", "2", "3", "weights"):
        assert_close(load_file(tmp_path / f"ours.{file}"), load_file(tmp_path / f"plain.{file}"))
    moved = load_file(tmp_path / "plain.weights")
    assert all(not torch.equal(weights, moved[name]) for name, weights in load_file(tmp_path / "initial").items())


def assert_close(ours: dict[str, Tensor], plain: dict[str, Tensor]) -> None:
    assert ours.keys() == plain.keys()
    for name, expected in plain.items():
        torch.testing.assert_close(ours[name], expected, rtol=1e-5, atol=1e-7)


@pytest.mark.slow
@pytest.mark.long
def test_a_small_run_yields_the_rows_that_are_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: every step writes each weight and moment once (6.06 bytes, and padding), whatever the wave."""
    monkeypatch.setattr(memory, "QUICK", TINY)
    only = frozenset({"nvme", "nvme_bytes", "nvme_written", "nvme_written_by_wave"})
    found = rows(memory.measure(Options(quick=True, repeats=1, only=only)))
    assert only <= found.keys()
    assert 6.0 < found["nvme_written"].ours.median < 6.4
    assert found["nvme_written_by_wave"].ratio == 1.0


@pytest.mark.slow
def test_the_yardstick_reports_what_it_holds(tmp_path: Path) -> None:
    """Oracle: 4 bytes for a weight and, of these small tensors, 2 and a bit for a moment pair; 4 for a gradient."""
    bench = Bench(TINY, tmp_path)
    with bench.plain() as plain:
        bench.steps(plain)()
        held, live = plain.ask("memory"), bench.live_bytes(plain)
        assert 6 * TINY.parameters < held["state"] == held["device"] < 6.2 * TINY.parameters
        assert 4 * TINY.parameters < live < 4 * TINY.parameters + (4 << 20)
        assert 0 < held["rss"] <= held["peak_rss"]


def test_the_yardstick_imports_nothing_of_ours() -> None:
    """Oracle: isolated from this checkout, it still starts; an unknown request then ends it."""
    source = Path(PLAIN[-1]).read_text(encoding="utf-8")
    assert not any(f"{verb} {package}" in source for verb in ("import", "from") for package in ("peer", "protocol"))


def test_microbatches_are_the_same_for_every_side_and_fresh_in_every_step() -> None:
    first, again, next_step = (
        make_microbatches(8, microbatches=2, batch=1, length=4, number=number) for number in (1, 1, 2)
    )
    assert all(torch.equal(a, b) for pair in zip(first, again, strict=True) for a, b in zip(*pair, strict=True))
    assert not torch.equal(first[0][0], next_step[0][0])
    assert not torch.equal(first[0][0], first[1][0])


# -- what measures ------------------------------------------------------------------------------------


def test_live_bytes_follow_tensors_and_not_their_views() -> None:
    """Oracle: float32 tensors of 1000 elements, counted by hand."""
    before = torch.zeros(1000)
    with LiveBytes() as live:
        kept = before + 1
        assert live.now == 4000
        view = kept.view(10, 100)[3]
        before.mul_(2)
        assert live.now == 4000
        temporary = kept * 2
        assert live.now == live.peak == 8000
        del temporary
        assert (live.now, live.peak) == (4000, 8000)
        del kept
        assert live.now == 4000  # the view holds it
        del view
        assert live.now == 0


def test_live_bytes_see_a_backward_pass() -> None:
    weights = torch.ones(1000, requires_grad=True)
    with LiveBytes() as live:
        torch.autograd.backward((weights * weights).sum())
        assert live.now == 4000  # its gradient
    assert live.peak >= 8000


def test_a_child_answers_line_by_line_and_its_cpu_time_is_counted() -> None:
    clock = ReportedClock()
    with fake_child() as child:
        steps = Steps(child, clock, {"microbatches": 1})
        assert [steps(), steps()] == [0.5, 1.0]
        assert (steps.stalled_s, clock.cpu_s()) == (0.25, 4.0)


def test_a_child_that_ends_says_why() -> None:
    with fake_child() as child, pytest.raises(CommandError, match="ended with 1 at 'fail': no such thing"):
        child.ask("fail")


def test_a_child_that_hangs_is_given_up() -> None:
    with fake_child(timeout_s=0.2) as child, pytest.raises(CommandError, match="no answer to 'sleep' within"):
        child.ask("sleep")


def test_raw_disk_moves_what_it_is_asked_to(tmp_path: Path) -> None:
    """Oracle: the size of the file; the file is gone afterwards."""
    path = tmp_path / "raw"
    try:
        disk = RawDisk(path, file_bytes=100_000, request_bytes=16_000)
    except OSError as error:
        pytest.skip(f"no direct I/O here: {error}")
    with disk:
        assert path.stat().st_size == 7 * 16_384
        assert disk.move(read_bytes=300_000, written_bytes=50_000) > 0
    assert not path.exists()


@pytest.mark.slow
def test_the_kernel_ends_what_exceeds_its_cap() -> None:
    """Oracle: a child that touches 100 MiB under a cap of 64, and one that touches 10."""
    touch = "import sys; held = bytearray(int(sys.argv[1]) << 20); print(len(held))"
    try:
        with memory_cap(64 << 20) as cap:
            small, large = (
                subprocess.run([*cap.wrapper, sys.executable, "-c", touch, mebibytes], capture_output=True)
                for mebibytes in ("10", "100")
            )
            folder, peak_bytes = cap.folder, cap.peak_bytes()
    except OSError as error:
        pytest.skip(f"no memory cap can be set here: {error}")
    assert small.returncode == 0
    assert large.returncode == -9
    assert 10 << 20 < peak_bytes <= 64 << 20
    assert not folder.exists()


# -- rows ---------------------------------------------------------------------------------------------


def test_only_the_wanted_rows_are_measured(tmp_path: Path) -> None:
    """Oracle: groups of rows that would start processes yield nothing; there is no `Bench.ours` to be had."""
    bench = Bench(TINY, tmp_path / "is not there")
    options = Options(only=frozenset({"optimizer_bytes"}))
    for group in GROUPS:
        assert list(group(bench, options)) == []
    assert "optimizer_bytes" in rows(memory.optimizer_bytes(bench, options))
    assert Options().wants("anything")
    assert options.wants("host", "optimizer_bytes")
    assert not options.wants("host")


@pytest.mark.parametrize("size", [memory.FULL, memory.QUICK, memory.BILLION])
def test_sizes_are_those_of_the_issue(size: Size) -> None:
    expected = {1024: 300e6, 576: 96e6, 2048: 1e9}[size.hidden]
    assert size.parameters == pytest.approx(expected, rel=0.05)


def test_optimizer_state_of_the_layers_is_a_quarter(tmp_path: Path) -> None:
    """Oracle: (1 + 4 / 256) bytes for each of two moments against 4."""
    found = rows(memory.optimizer_bytes(Bench(QUICK, tmp_path), Options()))
    assert found["optimizer_bytes"].ratio == pytest.approx((1 + 4 / 256) / 4, rel=0.01)
    assert found["optimizer_bytes"].holds is True
    assert (found["optimizer_bytes_whole"].ratio or 0.0) > (found["optimizer_bytes"].ratio or 1.0)


def test_a_cap_that_cannot_be_set_is_a_row_that_does_not_hold(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(num_bytes: int) -> None:
        raise PermissionError("not yours")

    monkeypatch.setattr(memory, "memory_cap", refuse)
    (row,) = memory.hard_cap(Bench(TINY, tmp_path), Options())
    assert row.holds is False
    assert row.note.startswith("not run: ")


def test_a_rival_that_is_not_there_is_named(tmp_path: Path) -> None:
    rival = memory_rivals.Rival("none", "nothing", offloads=True, needs="no_such_module_anywhere")
    (row,) = memory_rivals._against(Bench(TINY, tmp_path), rival)
    assert (row.row, row.holds, row.note) == ("none_rss", None, "not run: not installed")


def test_a_time_holds_by_its_interval_and_within_the_slack() -> None:
    """Oracle: the rule of issue 3, on figures made by hand."""
    bar = Bar.parse("<= 1.10")
    assert bar.holds_within(0.05, 1.14, (1.09, 1.30))
    assert not bar.holds_within(0.05, 1.16, (1.09, 1.30))
    assert not bar.holds_within(0.05, 1.12, (1.11, 1.13))
    assert Bar.parse(">= 0.80").holds_within(0.05, 0.76, (0.70, 0.81))
    times = Pairs(*(tuple(Sample(s, s, s) for s in seconds) for seconds in ([1.0, 1.12, 1.2], [1.0, 1.0, 1.0])))
    assert compare("x", times, unit="s", bar="<= 1.10", slack=0.05).holds is True
    assert compare("x", times, unit="s", bar="<= 1.10").holds is False
    assert figure("x", 1.12, 1.0, unit="B", bar="<= 1.10").holds is False
