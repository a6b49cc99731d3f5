"""`make fuzz`: change honest bytes at random and see what the decoders make of them, each in a process of its own.

A finding is any exception but the project's own for bad bytes, more memory than four times the bytes and 1 MiB, a
process that dies by a signal or hangs. Inputs of findings are kept; the same seed tries the same cases.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from tests.fuzz.targets import targets

GRACE_S = 60.0
ROOT = Path(__file__).parents[2]


def main() -> int:
    """Fuzz all targets, or those that are named; return the exit code."""
    parser = argparse.ArgumentParser(prog="fuzz", description=str(__doc__).partition("\n\n")[0])
    parser.add_argument("--seconds", type=float, default=10.0, help="for each target")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="+", metavar="TARGET", help=", ".join(targets()))
    parser.add_argument("--keep", type=Path, default=Path(tempfile.gettempdir()) / "handcar-fuzz", help="findings")
    options = parser.parse_args()
    unknown = set(options.only or ()) - set(targets())
    if unknown:
        parser.error(f"no target is called {sorted(unknown)[0]}")
    findings = 0
    print(f"{'target':20} {'tried':>9} {'refused':>9} {'ms per 64 KiB':>14}")
    for name in options.only or targets():
        found = fuzz(name, seed=options.seed, seconds=options.seconds)
        print(f"{name:20} {found['tried']:>9} {found['refused']:>9} {found['slowest_ms']:>14}", flush=True)
        for number, finding in enumerate(found["findings"]):
            findings += 1
            options.keep.mkdir(parents=True, exist_ok=True)
            path = options.keep / f"{name.replace(' ', '-')}-{options.seed}-{number}"
            path.write_bytes(bytes.fromhex(finding["case"]))
            print(f"  {finding['problem']}\n  {path}", flush=True)
    return 1 if findings else 0


def fuzz(name: str, *, seed: int, seconds: float) -> dict[str, Any]:
    """Let a process try a decoder; a death of it is a finding like any other."""
    with tempfile.TemporaryDirectory(prefix="handcar-fuzz-") as folder:
        argv = [sys.executable, "-m", "tests.fuzz.worker", name, str(seed), str(seconds), folder]
        try:
            done = subprocess.run(
                argv, capture_output=True, text=True, timeout=seconds + GRACE_S, cwd=ROOT, check=False
            )
            code = str(done.returncode)
        except subprocess.TimeoutExpired:
            done, code = None, "none: it hangs"
        if done is not None and done.returncode == 0:
            report: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
            return report
        last = next(Path(folder).glob("*.last"), None)
        case = b"" if last is None else last.read_bytes()
        said = "" if done is None else done.stderr[-300:]
        problem = f"the process ends with {code}: {said}"
        return {"tried": 0, "refused": 0, "slowest_ms": 0.0, "findings": [{"problem": problem, "case": case.hex()}]}


if __name__ == "__main__":
    sys.exit(main())
