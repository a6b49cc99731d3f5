"""Measure ours against a reference in the same run, and say plainly whether the bar holds.

Owns: interleaved repeats, medians with spread, the bootstrap interval of the ratio, the table and the
JSON file of a benchmark. Must not know: what is measured. Every module of `tests/benchmarks/` that has
a `main` uses it like this:

    def measure(options: Options) -> Iterator[Row]:
        pairs = measure_pairs(ours, reference, repeats=options.repeats_or(quick=3, full=9))
        yield compare("one step", pairs, unit="s", bar="<= 1.10")

    def main(argv: Sequence[str] | None = None) -> int:
        return run("what this compares", measure, argv)

A missed bar is a result, not an error: it stays in the table and the exit code stays 0. Whatever
raises ends the benchmark with a traceback, exit code 1 and no JSON file.
"""

from __future__ import annotations

import argparse
import gc
import json
import resource
import signal
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Literal, Protocol

from tests.benchmarks.machine import machine_facts
from tests.benchmarks.spread import Bar, Spread, ratio_interval

Run = Callable[[], float | None]
"""One repeat. Returns the figure it measured itself, or None to be judged by the clock."""

Quantity = Literal["value", "wall_s", "cpu_s"]


class Clock(Protocol):
    """The two clocks of a repeat. Both only grow; both are in seconds."""

    def wall_s(self) -> float: ...

    def cpu_s(self) -> float: ...


class SystemClock:
    """Real time, and the CPU time of this process and of the children that it has waited for."""

    def wall_s(self) -> float:
        return time.perf_counter()

    def cpu_s(self) -> float:
        used = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
        return sum(usage.ru_utime + usage.ru_stime for usage in used)


SYSTEM_CLOCK = SystemClock()
INTERRUPTED = 130  # what shells make of Ctrl-C


@dataclass(frozen=True, slots=True)
class Sample:
    """One timed repeat. `value` is what the run returned, else its wall time."""

    value: float
    wall_s: float
    cpu_s: float


@dataclass(frozen=True, slots=True)
class Pairs:
    """The repeats of both sides; those with the same index ran next to each other."""

    ours: tuple[Sample, ...]
    reference: tuple[Sample, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One line of the table. `ratio` is ours over reference, and what the bar is about.

    A row without a reference has no ratio: its bar is about `ours` itself. A row without a bar is there to be read.
    """

    row: str
    ours: Spread
    unit: str
    reference: Spread | None = None
    ratio: float | None = None
    ratio_interval: tuple[float, float] | None = None
    bar: Bar | None = None
    slack: float | None = None
    """If given, the bar is about the better end of the ratio's interval, and the ratio may miss it by this much."""
    note: str = ""
    more: Mapping[str, float | None] = field(default_factory=dict)
    """What else was counted, for who reads the JSON file."""

    @property
    def holds(self) -> bool | None:
        if self.bar is None:
            return None
        if self.slack is not None and self.ratio is not None and self.ratio_interval is not None:
            return self.bar.holds_within(self.slack, self.ratio, self.ratio_interval)
        return self.bar.holds(self.ours.median if self.ratio is None else self.ratio)

    def to_json(self) -> dict[str, object]:
        """Return the row as the results file has it: plain numbers first, then how sure they are."""
        return {
            "row": self.row,
            "ours": self.ours.median,
            "reference": None if self.reference is None else self.reference.median,
            "ratio": self.ratio,
            "unit": self.unit,
            "bar": None if self.bar is None else self.bar.text,
            "slack": self.slack,
            "holds": self.holds,
            "ratio_95": None if self.ratio_interval is None else list(self.ratio_interval),
            "ours_spread": self.ours.to_json(),
            "reference_spread": None if self.reference is None else self.reference.to_json(),
            "note": self.note,
            **self.more,
        }


@dataclass(frozen=True, slots=True)
class Options:
    """What the command line asked for."""

    quick: bool = False
    repeats: int | None = None
    only: frozenset[str] = frozenset()
    """The rows to measure; empty for all of them."""

    def wants(self, *rows: str) -> bool:
        """Tell whether any of these rows was asked for: what measures several at once need not run for none."""
        return not self.only or not self.only.isdisjoint(rows)

    def repeats_or(self, *, quick: int, full: int) -> int:
        """Return the number of repeats: the user's, or the benchmark's own for this kind of run."""
        if self.repeats is not None:
            return self.repeats
        return quick if self.quick else full


Measure = Callable[[Options], Iterable[Row]]


def measure_pairs(ours: Run, reference: Run, *, repeats: int, warmup: int = 1, clock: Clock = SYSTEM_CLOCK) -> Pairs:
    """Run both sides in turn, `warmup` times unmeasured and `repeats` times measured.

    Which side goes first alternates, so that a machine that gets warmer or busier favours neither.
    """
    if repeats < 1 or warmup < 0:
        raise ValueError(f"cannot measure {repeats} repeats after {warmup} for warming up")
    for _ in range(warmup):
        ours()
        reference()
    ours_samples: list[Sample] = []
    reference_samples: list[Sample] = []
    for index in range(repeats):
        if index % 2 == 0:
            ours_samples.append(_timed(ours, clock))
            reference_samples.append(_timed(reference, clock))
        else:
            reference_samples.append(_timed(reference, clock))
            ours_samples.append(_timed(ours, clock))
    return Pairs(tuple(ours_samples), tuple(reference_samples))


def compare(
    row: str,
    pairs: Pairs,
    *,
    unit: str,
    bar: str | None = None,
    slack: float | None = None,
    quantity: Quantity = "value",
    note: str = "",
) -> Row:
    """Make the row that sets our median against the reference's, with a 95 % interval of their ratio.

    With `slack` the bar holds if the interval reaches it and the ratio misses it by no more than that: for times on a
    machine that others use too.
    """
    ours = [getattr(sample, quantity) for sample in pairs.ours]
    reference = [getattr(sample, quantity) for sample in pairs.reference]
    ours_spread, reference_spread = Spread.of(ours), Spread.of(reference)
    if reference_spread.median == 0:
        raise ValueError(f"row '{row}': the reference is 0, so there is no ratio")
    return Row(
        row=row,
        ours=ours_spread,
        reference=reference_spread,
        ratio=ours_spread.median / reference_spread.median,
        ratio_interval=ratio_interval(ours, reference),
        unit=unit,
        bar=None if bar is None else Bar.parse(bar),
        slack=slack,
        note=note,
    )


def figure(
    row: str, ours: float, reference: float | None = None, *, unit: str, bar: str | None = None, note: str = ""
) -> Row:
    """Make a row of numbers that need no repeats, such as counted bytes."""
    if reference == 0:
        raise ValueError(f"row '{row}': the reference is 0, so there is no ratio")
    return Row(
        row=row,
        ours=Spread.of([ours]),
        reference=None if reference is None else Spread.of([reference]),
        ratio=None if reference is None else ours / reference,
        unit=unit,
        bar=None if bar is None else Bar.parse(bar),
        note=note,
    )


def run(title: str, measure: Measure, argv: Sequence[str] | None = None) -> int:
    """Be the command line of a benchmark: measure, print the table, write the JSON. Returns the exit code.

    Interrupted, it has what was measured until then.
    """
    arguments = parse_arguments(title, argv)
    machine = machine_facts()  # before, so that the load it notes is not our own
    options = Options(quick=arguments.quick, repeats=arguments.repeats, only=frozenset(arguments.only))
    rows: list[Row] = []
    exit_code = 0
    signal.signal(signal.SIGTERM, _interrupt)  # or what was started would be left behind
    try:
        for row in measure(options):
            if options.wants(row.row):
                rows.append(row)
                print(f"measured: {row.row}", file=sys.stderr, flush=True)
    except KeyboardInterrupt:  # an hour's rows are worth having without the last ones
        exit_code = INTERRUPTED
    print(title + (" (quick)" if arguments.quick else "") + (" - interrupted" if exit_code else ""))
    print(table(rows))
    if arguments.json is not None:
        write_json(arguments.json, machine | {"quick": arguments.quick}, [row.to_json() for row in rows])
    return exit_code


def _interrupt(_number: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def parse_arguments(title: str, argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the flags that all benchmarks share: `quick`, `repeats`, `only`, `json`."""
    parser = argparse.ArgumentParser(description=title)
    parser.add_argument(
        "--quick", action="store_true", help="fewer and smaller repeats: does it work, and roughly how fast"
    )
    parser.add_argument("--repeats", type=int, metavar="N", help="measure every pair N times")
    parser.add_argument("--only", nargs="+", default=[], metavar="ROW", help="measure these rows and no others")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write machine and rows to FILE")
    return parser.parse_args(argv)


def write_json(path: Path, machine: dict[str, object], rows: Sequence[dict[str, object]]) -> None:
    """Write the results file: what it ran on, and the rows."""
    path.write_text(json.dumps({"machine": machine, "rows": list(rows)}, indent=2) + "\n", encoding="utf-8")


def table(rows: Sequence[Row]) -> str:
    """Lay the rows out in columns: medians with (smallest - largest), the ratio with its interval, the verdict."""
    header = ("row", "ours", "reference", "unit", "ratio [95 %]", "bar", "holds")
    lines = [header, *(_cells(row) for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    lines.insert(1, tuple("-" * width for width in widths))
    laid_out = [
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines
    ]
    notes = [f"{row.row}: {row.note}" for row in rows if row.note]
    return "\n".join(laid_out + notes)


def _timed(run_once: Run, clock: Clock) -> Sample:
    gc.collect()  # garbage of the other side must not be paid for here
    cpu_before_s, wall_before_s = clock.cpu_s(), clock.wall_s()
    value = run_once()
    wall_s = clock.wall_s() - wall_before_s
    cpu_s = clock.cpu_s() - cpu_before_s
    return Sample(value=wall_s if value is None else value, wall_s=wall_s, cpu_s=cpu_s)


def _cells(row: Row) -> tuple[str, ...]:
    ratio = "" if row.ratio is None else f"{row.ratio:.3f}"
    if row.ratio_interval is not None:
        ratio += f" [{row.ratio_interval[0]:.3f}, {row.ratio_interval[1]:.3f}]"
    verdict = {True: "yes", False: "NO", None: ""}[row.holds]
    bar = "" if row.bar is None else row.bar.text
    reference = "" if row.reference is None else str(row.reference)
    return (row.row, str(row.ours), reference, row.unit, ratio, bar, verdict)
