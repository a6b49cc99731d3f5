"""One process that feeds a decoder: it may die of it, which is what its parent wants to know.

Owns: the loop, and what is noted of every case before it is tried. Must not know: other processes. Its last case lies
in a file, so that a crash can be repeated.
"""

from __future__ import annotations

import json
import resource
import sys
import time
import tracemalloc
from pathlib import Path
from random import Random

from protocol.errors import InviteError, PeerFault
from tests.fuzz.mutations import MAX_BYTES, mutate
from tests.fuzz.targets import Target, hostile_seeds, targets

ALLOWED = (PeerFault, InviteError)
MEASURED_EVERY = 50
HOSTILE_SHARE = 0.05  # of the cases begin with bytes that are made to be expensive, and take their time
MORE_BYTES, BYTES_PER_BYTE = 1 << 20, 4
ADDRESS_SPACE_BYTES = 8 << 30  # a decoder that asks for more than that fails here instead of on a volunteer's machine


def run(name: str, *, seed: int, seconds: float, folder: Path) -> dict[str, object]:
    """Try changed seeds on a decoder for some seconds; return what came of it."""
    target = targets()[name]
    chance, tried, raised, slowest_s = Random(f"{name}/{seed}"), 0, 0, 0.0
    findings: list[dict[str, str]] = []
    last = folder / f"{name.replace(' ', '-')}.last"
    pool, nasty = list(target.seeds), hostile_seeds()
    ends_s = time.monotonic() + seconds
    with last.open("wb", buffering=0) as file:
        while time.monotonic() < ends_s and len(findings) < 5:
            seed_bytes = chance.choice(nasty if chance.random() < HOSTILE_SHARE else pool)
            case = mutate(seed_bytes, pool, chance)
            file.seek(0)
            file.truncate()
            file.write(case)
            problem, took_s, refused = _try(target, case, measured=tried % MEASURED_EVERY == 0)
            tried += 1
            raised += refused
            slowest_s = max(slowest_s, took_s * (64 * 1024) / max(len(case), 64 * 1024))
            if problem is not None:
                findings.append({"problem": problem, "case": case.hex()})
            elif not refused and len(pool) < 500:
                pool.append(case)  # it was let through: what follows may get deeper
    last.unlink()
    slowest_ms = round(1000 * slowest_s, 1)
    return {"target": name, "tried": tried, "refused": raised, "slowest_ms": slowest_ms, "findings": findings}


def _try(target: Target, case: bytes, *, measured: bool) -> tuple[str | None, float, bool]:
    if measured:
        tracemalloc.start()
    started_s, refused, problem = time.thread_time(), False, None
    try:
        target.decode(case)
    except ALLOWED:
        refused = True
    except Exception as error:  # noqa: BLE001  (that is what is looked for)
        problem = f"{type(error).__name__}: {error}"[:300]
    took_s = time.thread_time() - started_s
    if measured:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        if peak > BYTES_PER_BYTE * len(case) + MORE_BYTES:
            problem = problem or f"it takes {peak} bytes of memory for {len(case)}"
        took_s = 0.0  # being watched takes most of it
    return problem, took_s, refused


def main() -> None:
    """Run what the command line says; print one line of JSON."""
    name, seed, seconds, folder = sys.argv[1:]
    resource.setrlimit(resource.RLIMIT_AS, (ADDRESS_SPACE_BYTES, ADDRESS_SPACE_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    assert MAX_BYTES < MORE_BYTES
    print(json.dumps(run(name, seed=int(seed), seconds=float(seconds), folder=Path(folder))))


if __name__ == "__main__":
    main()
