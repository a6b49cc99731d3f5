"""What honest peers pay for being looked at: the rows `clean_throughput`, `clean_bytes`, and both of newcomers.

A whole swarm of real processes, in network namespaces of their own: two stages of three replicas, which train the
`demo` preset's model on the same cores. The reference is the same swarm without defences: nobody keeps payloads,
signs receipts or sketches contributions, and nobody is audited. *Steady* means that the coordinator takes everybody for
one whose last 10,000 audits found nothing; newcomers are looked at in everything they do, as far as others have time.

Owns: both swarms, and reading their speed and bytes. Must not know: what audits do.
"""

from __future__ import annotations

import itertools
import json
import statistics
import subprocess
import sysconfig
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from tests.benchmarks.harness import Options, Pairs, Row, Sample, compare, measure_pairs
from tests.e2e.netns import homes
from tests.e2e.swarm import Swarm

ROWS = ("clean_throughput", "clean_bytes", "newcomers_throughput", "newcomers_bytes")
PROVEN = 10_000
ROUNDS, QUICK_ROUNDS, WARM_ROUNDS = 30, 12, 3
NAMES = ("ash", "elm", "fir", "oak", "yew", "box")
STAGES = 2
SETTINGS = (
    "batch.microbatches_per_round=24",
    "batch.heldout_sequences=8",
    "batch.eval_every=1000",
    "keeping.checkpoint_every=1000",
)


@dataclass(frozen=True, slots=True)
class Price:
    """What a swarm did in its rounds after the first ones."""

    tokens_per_s: float
    bytes_per_round: float
    """Sent by all peers, with all headers."""


def rows(options: Options) -> Iterator[Row]:
    """Measure what was asked for; each side in turn."""
    rounds = QUICK_ROUNDS if options.quick else ROUNDS
    repeats = options.repeats_or(quick=1, full=3)
    with tempfile.TemporaryDirectory(prefix="handcar-bench-") as name:
        numbers = itertools.count()
        for prefix, is_proven in (("clean", True), ("newcomers", False)):
            if not options.wants(f"{prefix}_throughput", f"{prefix}_bytes"):
                continue
            sizes: dict[bool, list[float]] = {False: [], True: []}

            def run(*, is_bare: bool, is_proven: bool, sizes: dict[bool, list[float]]) -> float:
                price = train(Path(name) / str(next(numbers)), is_bare=is_bare, is_proven=is_proven, rounds=rounds)
                sizes[is_bare].append(price.bytes_per_round / 1e6)
                return price.tokens_per_s

            pairs = measure_pairs(
                partial(run, is_bare=False, is_proven=is_proven, sizes=sizes),
                partial(run, is_bare=True, is_proven=is_proven, sizes=sizes),
                repeats=repeats,
                warmup=0,
            )
            in_bytes = Pairs(_with(pairs.ours, sizes[False]), _with(pairs.reference, sizes[True]))
            note = f"2 stages of 3 replicas, {rounds - WARM_ROUNDS} rounds of 24 microbatches each time"
            bars = (">= 0.95", "<= 1.06") if is_proven else (None, None)
            yield compare(f"{prefix}_throughput", pairs, unit="tokens/s", bar=bars[0], note=note)
            yield compare(f"{prefix}_bytes", in_bytes, unit="MB a round", bar=bars[1], note=note)


def train(folder: Path, *, is_bare: bool, is_proven: bool, rounds: int) -> Price:
    """Train one swarm; `is_bare`: without defences."""
    with (
        homes(*NAMES) as net,
        Swarm(
            folder,
            corpus=Path(sysconfig.get_path("stdlib")) / "asyncio",
            rounds=rounds + 1,
            stages=STAGES,
            settings=SETTINGS,
            preset="demo",
            places=net.places,
            log_level="info",
        ) as swarm,
    ):
        oddity = "blind:" if is_bare else f"proven:{PROVEN}" if is_proven else ""
        swarm.start_coordinator("--start-peers", str(len(NAMES)), oddity=oddity)
        for number, name in enumerate(NAMES):
            swarm.start_peer(name, "--stage", str(number % STAGES), oddity="bare:" if is_bare else "")
        sent: dict[int, int] = {}
        for version in (WARM_ROUNDS, rounds):
            swarm.wait_version(version, timeout_s=1200.0)
            sent[version] = sum(_bytes_sent(net.places[name].netns) for name in NAMES)
        opened_s = sorted(swarm.peers[NAMES[0]].opened_s())[WARM_ROUNDS : rounds + 1]
        tokens = swarm.run_dir().manifest.batch.tokens_per_round
    seconds = [later - earlier for earlier, later in itertools.pairwise(opened_s)]
    return Price(
        tokens_per_s=tokens / statistics.fmean(seconds),
        bytes_per_round=(sent[rounds] - sent[WARM_ROUNDS]) / (rounds - WARM_ROUNDS),
    )


def _with(samples: Sequence[Sample], values: Sequence[float]) -> tuple[Sample, ...]:
    return tuple(replace(sample, value=value) for sample, value in zip(samples, values, strict=True))


def _bytes_sent(netns: str) -> int:
    argv = ["ip", "-n", netns, "-json", "-stats", "link", "show", "home"]
    found = json.loads(subprocess.run(argv, check=True, capture_output=True, timeout=30).stdout)
    return sum(
        int(link["stats64"]["tx"]["bytes"]) for link in found if link
    )  # some versions list links of others, empty
