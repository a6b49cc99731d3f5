"""The harness measures fairly, computes what it says, and reports a missed bar instead of hiding it.

Oracles: a clock that the test turns by hand, and figures worked out on paper.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.benchmarks import __main__ as every_benchmark
from tests.benchmarks.commands import CommandError, command
from tests.benchmarks.harness import (
    SYSTEM_CLOCK,
    Options,
    Pairs,
    Row,
    Sample,
    compare,
    figure,
    measure_pairs,
    run,
    table,
)
from tests.benchmarks.machine import cpu_model, machine_facts
from tests.benchmarks.spread import Bar, Spread, ratio_interval


class HandClock:
    """A clock that only the measured work moves: `work(wall, cpu)`."""

    def __init__(self) -> None:
        self.wall = self.cpu = 0.0

    def work(self, wall_s: float, cpu_s: float) -> None:
        self.wall += wall_s
        self.cpu += cpu_s

    def wall_s(self) -> float:
        return self.wall

    def cpu_s(self) -> float:
        return self.cpu


def pairs_of(ours: list[float], reference: list[float]) -> Pairs:
    return Pairs(
        tuple(Sample(value=x, wall_s=x, cpu_s=2 * x) for x in ours),
        tuple(Sample(value=x, wall_s=x, cpu_s=2 * x) for x in reference),
    )


def test_sides_alternate_and_warmup_is_not_measured() -> None:
    """Oracle: the order of calls, written down by hand for one warm-up and three repeats."""
    clock, calls = HandClock(), []

    def ours() -> None:
        calls.append("o")
        clock.work(100.0 if len(calls) == 1 else 3.0, 6.0)

    def reference() -> None:
        calls.append("r")
        clock.work(2.0, 1.0)

    pairs = measure_pairs(ours, reference, repeats=3, warmup=1, clock=clock)
    assert "".join(calls) == "or" + "or" + "ro" + "or"
    assert pairs.ours == (Sample(3.0, 3.0, 6.0),) * 3
    assert pairs.reference == (Sample(2.0, 2.0, 1.0),) * 3


def test_a_returned_figure_replaces_the_wall_time_but_the_clocks_stay() -> None:
    clock = HandClock()

    def tokens_per_s() -> float:
        clock.work(5.0, 4.0)
        return 800.0

    sample = measure_pairs(tokens_per_s, tokens_per_s, repeats=1, warmup=0, clock=clock).ours[0]
    assert sample == Sample(value=800.0, wall_s=5.0, cpu_s=4.0)


@pytest.mark.parametrize(("repeats", "warmup"), [(0, 1), (1, -1)])
def test_impossible_repeats_are_refused(repeats: int, warmup: int) -> None:
    with pytest.raises(ValueError, match="cannot measure"):
        measure_pairs(lambda: None, lambda: None, repeats=repeats, warmup=warmup)


def test_row_has_medians_their_ratio_and_the_verdict() -> None:
    """Oracle: medians 3 and 2 by hand; one outlier on each side changes nothing."""
    row = compare("step", pairs_of([2.0, 3.0, 90.0], [2.0, 50.0, 1.0]), unit="s", bar="<= 1.10")
    assert (row.ours.median, row.reference and row.reference.median, row.ratio) == (3.0, 2.0, 1.5)
    assert row.holds is False
    assert compare("step", pairs_of([3.0], [2.0]), unit="s", bar="<= 1.5").holds is True


def test_cpu_seconds_can_be_compared_instead() -> None:
    row = compare("step", pairs_of([3.0], [2.0]), unit="CPU s", quantity="cpu_s")
    assert (row.ours.median, row.holds) == (6.0, None)


@pytest.mark.parametrize(
    ("bar", "value", "holds"),
    [
        ("<= 1.10", 1.10, True),
        ("<= 1.10", 1.1001, False),
        (">= 0.80", 0.80, True),
        (">=0.80", 0.79, False),
        ("< 1e-4", 9e-5, True),
        ("> 1", 1.0, False),
        ("== 0", 0.0, True),
        (" <=  -2.5 ", -3.0, True),
    ],
)
def test_bar_reads_its_operator_and_limit(bar: str, value: float, holds: bool) -> None:
    assert Bar.parse(bar).holds(value) is holds


@pytest.mark.parametrize("bar", ["", "1.10", "=< 1.10", "<= fast", "<= 1.10x", "<= 1,10", "~ 2"])
def test_a_bar_that_cannot_be_read_is_an_error(bar: str) -> None:
    with pytest.raises(ValueError, match="not a bar"):
        Bar.parse(bar)


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=20))
def test_spread_is_ordered_and_has_the_median(values: list[float]) -> None:
    """Oracle: the standard library's median."""
    spread = Spread.of(values)
    assert spread.minimum <= spread.median <= spread.maximum
    assert spread.median == pytest.approx(statistics.median(values), rel=1e-12, abs=1e-9)
    assert -1e-9 <= spread.iqr <= spread.maximum - spread.minimum + 1e-9


def test_spread_of_four_has_the_quartiles_of_the_textbook() -> None:
    assert Spread.of([1.0, 2.0, 3.0, 4.0]) == Spread(median=2.5, minimum=1.0, maximum=4.0, iqr=1.5, repeats=4)


def test_interval_is_exact_for_constant_ratios_and_the_same_every_time() -> None:
    """A machine that slows down threefold slows both sides of a pair: the ratio stays 2, and the interval shows it."""
    reference = [1.0, 3.0, 2.0, 1.5, 2.5]
    assert ratio_interval([2 * x for x in reference], reference) == (2.0, 2.0)
    noisy = [1.1, 2.7, 2.3, 1.4, 2.9]
    first, again = ratio_interval(noisy, reference), ratio_interval(noisy, reference)
    assert first is not None
    assert first == again
    assert first[0] < statistics.median(noisy) / statistics.median(reference) < first[1]


def test_interval_gets_narrower_with_more_pairs() -> None:
    few = ratio_interval([1.0, 1.2, 0.9], [1.0, 1.0, 1.0])
    many = ratio_interval([1.0, 1.2, 0.9] * 20, [1.0] * 60)
    assert few is not None
    assert many is not None
    assert many[1] - many[0] < few[1] - few[0]
    assert ratio_interval([1.0], [1.0]) is None


@pytest.mark.parametrize(
    "make", [lambda: figure("x", 1.0, 0.0, unit="B"), lambda: compare("x", pairs_of([1], [0]), unit="s")]
)
def test_a_reference_of_zero_is_refused(make: object) -> None:
    assert callable(make)
    with pytest.raises(ValueError, match="the reference is 0"):
        make()


def test_bar_of_a_row_without_reference_is_about_the_figure_itself() -> None:
    assert figure("double counted", 0, unit="tokens", bar="== 0").holds is True
    assert figure("bytes", 6.0, 4.0, unit="B", bar="<= 1.4").holds is False


def test_table_shows_a_missed_bar_and_keeps_its_columns_straight() -> None:
    rows = [
        compare("a row with a long name", pairs_of([3.0, 3.5], [2.0, 2.0]), unit="s", bar="<= 1.10", note="cold"),
        figure("bytes", 1234567.0, unit="B"),
    ]
    lines = table(rows).splitlines()
    assert lines[0].split() == ["row", "ours", "reference", "unit", "ratio", "[95", "%]", "bar", "holds"]
    assert lines[2].endswith("NO")
    assert lines[2].index("3.25 (3 - 3.5)") == lines[0].index("ours") == lines[3].index("1.235e+06")
    assert lines[4] == "a row with a long name: cold"


def one_missed_row(options: Options) -> Iterator[Row]:
    yield compare(
        "step",
        pairs_of([3.0] * options.repeats_or(quick=1, full=2), [2.0] * (1 if options.quick else 2)),
        unit="s",
        bar="<= 1.10",
    )


def test_missed_bar_is_written_and_the_exit_code_stays_zero(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "rows.json"
    assert run("ours against theirs", one_missed_row, ["--json", str(path)]) == 0
    written = json.loads(path.read_text(encoding="utf-8"))
    assert set(written) == {"machine", "rows"}
    row = written["rows"][0]
    expected = {
        "row": "step",
        "ours": 3.0,
        "reference": 2.0,
        "ratio": 1.5,
        "unit": "s",
        "bar": "<= 1.10",
        "holds": False,
    }
    assert {key: row[key] for key in expected} == expected
    assert row["ours_spread"] == {"min": 3.0, "max": 3.0, "iqr": 0.0, "repeats": 2}
    assert "NO" in capsys.readouterr().out


def test_quick_and_repeats_reach_the_benchmark() -> None:
    seen: list[Options] = []

    def measure(options: Options) -> list[Row]:
        seen.append(options)
        return []

    run("title", measure, ["--quick"])
    run("title", measure, ["--repeats", "5"])
    assert [options.repeats_or(quick=3, full=9) for options in seen] == [3, 5]
    assert Options().repeats_or(quick=3, full=9) == 9


def test_an_error_leaves_no_results_file(tmp_path: Path) -> None:
    def measure(options: Options) -> Iterator[Row]:
        yield figure("first", 1.0, unit="s")
        raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        run("title", measure, ["--json", str(tmp_path / "rows.json")])
    assert not list(tmp_path.iterdir())


def test_system_clock_counts_the_cpu_of_children() -> None:
    """Oracle: the child's own account of its CPU time, which the parent's must contain."""
    spin = "import time\nwhile time.process_time() < 0.1: pass\nprint(time.process_time())"
    before_s = SYSTEM_CLOCK.cpu_s()
    used_s = float(subprocess.run([sys.executable, "-c", spin], capture_output=True, check=True).stdout)
    assert SYSTEM_CLOCK.cpu_s() - before_s >= used_s - 0.01


def test_command_parses_its_figure_and_sees_the_environment() -> None:
    code = "import os; print(os.environ['HANDCAR_TEST_FIGURE'])"
    once = command([sys.executable, "-c", code], timeout_s=30, parse=float, env={"HANDCAR_TEST_FIGURE": "12.5"})
    assert once() == 12.5
    assert command([sys.executable, "-c", "print(1)"], timeout_s=30)() is None


def test_failed_command_is_an_error_with_the_end_of_its_stderr() -> None:
    once = command([sys.executable, "-c", "import sys; sys.exit('no such corpus')"], timeout_s=30)
    with pytest.raises(CommandError, match="ended with 1: no such corpus"):
        once()


@pytest.mark.slow
def test_command_over_its_time_is_ended_with_everything_it_started(tmp_path: Path) -> None:
    """Oracle: the grandchild's process id, which must be gone. The deadline only has to outlast Python's start."""
    code = (
        "import subprocess, sys, time, pathlib\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
        f"pathlib.Path({str(tmp_path / 'pid')!r}).write_text(str(child.pid))\n"
        "time.sleep(60)"
    )
    with pytest.raises(CommandError, match="did not end within"):
        command([sys.executable, "-c", code], timeout_s=1.5)()
    pid = int((tmp_path / "pid").read_text())
    deadline = time.monotonic() + 5
    while _runs(pid) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not _runs(pid)


def _runs(pid: int) -> bool:
    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def test_machine_facts_name_no_person_and_no_host() -> None:
    """Oracle: this machine's own host and home names."""
    facts = machine_facts()
    assert facts["cores"]
    assert facts["torch"]
    assert isinstance(facts["memory_bytes"], int)
    text = json.dumps(facts)
    assert str(Path.home()) not in text
    assert set(facts) & {"host", "hostname", "user", "node"} == set()


def test_cpu_model_reads_linux_and_survives_its_absence(tmp_path: Path) -> None:
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text("processor\t: 0\nmodel name\t: Home CPU @ 3 GHz\n")
    assert cpu_model(cpuinfo) == "Home CPU @ 3 GHz"
    cpuinfo.write_text("processor\t: 0\n")
    assert cpu_model(cpuinfo)
    assert cpu_model(tmp_path / "none")


def test_only_modules_with_a_main_are_benchmarks(tmp_path: Path) -> None:
    (tmp_path / "pipeline.py").write_text("def main(argv=None): ...\n")
    (tmp_path / "harness.py").write_text("def run(): ...\nif True:\n    def main(): ...\n")
    (tmp_path / "__main__.py").write_text("def main(): ...\n")
    assert every_benchmark.benchmarks(tmp_path) == ["pipeline"]
    assert "harness" not in every_benchmark.benchmarks()


def test_whoever_interrupts_keeps_what_was_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Oracle: the exit code, the table, and the file."""

    def measure(options: Options) -> Iterator[Row]:
        yield figure("first", 1.0, unit="s")
        raise KeyboardInterrupt

    path = tmp_path / "some.json"
    assert run("some", measure, ["--json", str(path)]) == 130
    assert [row["row"] for row in json.loads(path.read_text(encoding="utf-8"))["rows"]] == ["first"]
    assert "some - interrupted" in capsys.readouterr().out


def test_all_run_even_if_one_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Oracle: three fake benchmarks; the middle one fails, the last one misses its bar."""
    rows = {
        "a": [figure("one", 1.0, unit="s").to_json()],
        "b": None,
        "c": [figure("two", 2.0, unit="s", bar="< 1").to_json()],
    }

    def fake(name: str, flags: object) -> list[dict[str, object]] | None:
        measured = rows[name]
        return None if measured is None else [{"benchmark": name, **row} for row in measured]

    monkeypatch.setattr(every_benchmark, "benchmarks", lambda: list(rows))
    monkeypatch.setattr(every_benchmark, "_run", fake)
    path = tmp_path / "all.json"
    assert every_benchmark.main(["--json", str(path)]) == 1
    written = json.loads(path.read_text(encoding="utf-8"))
    assert [(row["benchmark"], row["row"]) for row in written["rows"]] == [("a", "one"), ("c", "two")]
    assert written["machine"]["failed"] == ["b"]
    assert "2 rows, 1 bars missed, 1 benchmarks failed" in capsys.readouterr().out


def test_a_failing_benchmark_process_has_no_rows(capfd: pytest.CaptureFixture[str]) -> None:
    """Real processes: a module that does not exist, so `python -m` exits with 1."""
    assert every_benchmark._run("no_such_benchmark", ["--quick"]) is None
    assert "no_such_benchmark" in capfd.readouterr().err
