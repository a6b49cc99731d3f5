"""The pipeline against one plain process: the same model, batches and optimizer on the same cores.

Ours is a whole swarm of real processes (two stages, one thread each, activations over p2pd on loopback,
every hop signed and hashed); the reference is `tests/e2e/plain_loop.py` with two threads: transformers'
own model in plain PyTorch, no project import. Both report target tokens per second of a round in steady
state, so starting processes is not counted on either side.
"""

from __future__ import annotations

import itertools
import statistics
import sys
import sysconfig
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from coordinator.rundir import RunDir
from tests.benchmarks.harness import Options, Row, compare, measure_pairs, run
from tests.e2e.reference import ask_plain_loop, training_spec
from tests.e2e.swarm import Swarm

ROUNDS = 8
WARM_ROUNDS = 2  # allocators, connections, the first look at everything
THREADS = 2
BAR = ">= 0.75"  # torch's own 1F1B over gloo reaches 0.77 to 0.88 of one process on such a machine
SETTINGS = (
    "batch.sequences_per_microbatch=1",
    "batch.heldout_sequences=8",
    "optimizer.name=adamw32",
    f"batch.eval_every={ROUNDS}",
)


def swarm_tokens_per_s(folder: Path) -> float:
    """Train a fresh swarm and return the median rate of its rounds."""
    with Swarm(folder, corpus=_corpus(), rounds=ROUNDS, settings=SETTINGS, preset="bench") as swarm:
        swarm.start_coordinator("--start-peers", "2", "--until-finished")
        swarm.start_peers(["first", "second"])
        swarm.wait_finished(timeout_s=600.0)
        feeder = next(peer for peer in swarm.peers.values() if peer.opened_s())
        opened_s = feeder.opened_s()
        tokens = swarm.run_dir().manifest.batch.tokens_per_round
    seconds = [later - earlier for earlier, later in itertools.pairwise(opened_s)]
    return tokens / statistics.median(seconds[WARM_ROUNDS : ROUNDS - 1])


def plain_tokens_per_s(run_dir: RunDir, folder: Path) -> float:
    """Train one plain process on the same batches and return the median rate of its rounds."""
    spec = training_spec(run_dir, folder / "model")
    spec |= {"threads": THREADS, "microbatches": spec["microbatches"][: ROUNDS - 1]}
    spec |= {"learning_rates": spec["learning_rates"][: ROUNDS - 1]}
    del spec["heldout"]
    (answer,) = ask_plain_loop(folder, spec, timeout_s=600.0, threads=THREADS)
    seconds: list[float] = answer["seconds"]
    return run_dir.manifest.batch.tokens_per_round / statistics.median(seconds[WARM_ROUNDS:])


def measure(options: Options) -> Iterator[Row]:
    """Time both sides in turn."""
    with tempfile.TemporaryDirectory(prefix="handcar-bench-") as name:
        folder, made = Path(name), 0
        Swarm(folder / "plain", corpus=_corpus(), rounds=ROUNDS, settings=SETTINGS, preset="bench")
        run_dir = RunDir.open(folder / "plain" / "run")

        def ours() -> float:
            nonlocal made
            made += 1
            return swarm_tokens_per_s(folder / f"swarm-{made}")

        def reference() -> float:
            nonlocal made
            made += 1
            place = folder / f"plain-{made}"
            place.mkdir()
            return plain_tokens_per_s(run_dir, place)

        pairs = measure_pairs(ours, reference, repeats=options.repeats_or(quick=1, full=5), warmup=0)
        yield compare(
            "pipeline", pairs, unit="tokens/s", bar=BAR, note="2 stages x 1 thread against 1 process x 2 threads"
        )


def _corpus() -> Path:
    return Path(sysconfig.get_path("stdlib")) / "asyncio"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark."""
    return run("pipeline: a swarm of two peers against one plain process", measure, argv)


if __name__ == "__main__":
    sys.exit(main())
