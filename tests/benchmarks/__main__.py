"""Run every benchmark of this package, each in a process of its own: `python -m tests.benchmarks`.

A benchmark is a module here that defines `main`. One that fails does not stop the others, but makes the
exit code 1. `--json` gathers the rows of all of them, each with the name of its benchmark.
"""

from __future__ import annotations

import ast
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from tests.benchmarks.harness import parse_arguments, write_json
from tests.benchmarks.machine import machine_facts

HERE = Path(__file__).parent


def benchmarks(folder: Path = HERE) -> list[str]:
    """Return the names of the modules in `folder` that define `main`, without importing them."""
    return sorted(path.stem for path in folder.glob("[!_]*.py") if _defines_main(path))


def main(argv: Sequence[str] | None = None) -> int:
    """Run them in the order of their names and return the exit code."""
    arguments = parse_arguments("Run all benchmarks.", argv)
    machine = machine_facts()
    flags = ["--quick"] if arguments.quick else []
    if arguments.repeats is not None:
        flags += ["--repeats", str(arguments.repeats)]
    if arguments.only:
        flags += ["--only", *arguments.only]
    rows: list[dict[str, object]] = []
    failed: list[str] = []
    for name in benchmarks():
        print(f"== {name}", flush=True)
        measured = _run(name, flags)
        if measured is None:
            failed.append(name)
        else:
            rows += measured
        print(flush=True)
    missed = [f"{row['benchmark']}: {row['row']}" for row in rows if row["holds"] is False]
    print(f"{len(rows)} rows, {len(missed)} bars missed, {len(failed)} benchmarks failed")
    for line in missed + [f"{name}: failed" for name in failed]:
        print(f"  {line}")
    if arguments.json is not None:
        write_json(arguments.json, machine | {"quick": arguments.quick, "failed": failed}, rows)
    return 1 if failed else 0


def _run(name: str, flags: Sequence[str]) -> list[dict[str, object]] | None:
    with tempfile.TemporaryDirectory() as folder:
        results = Path(folder) / "rows.json"
        done = subprocess.run([sys.executable, "-m", f"tests.benchmarks.{name}", *flags, "--json", str(results)])
        if done.returncode != 0:
            return None
        rows = json.loads(results.read_text(encoding="utf-8"))["rows"]
    return [{"benchmark": name, **row} for row in rows]


def _defines_main(path: Path) -> bool:
    module = ast.parse(path.read_text(encoding="utf-8"), filename=str(path))
    return any(isinstance(node, ast.FunctionDef) and node.name == "main" for node in module.body)


if __name__ == "__main__":
    raise SystemExit(main())
