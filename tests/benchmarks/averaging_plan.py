"""What `coordinator plan` says of a swarm against what that swarm does: the rows `plan_*` of `averaging.py`.

Two peers on loopback with a thread each train a model of 7M parameters. Two short runs give the machine's figures, one
of a pipeline and one of replicas: seconds per microbatch and stage; how fast an average moves, which on loopback is how
fast it is encoded and summed; and what a round takes beside all that (the optimizer's step, the hash, ballots), so that
the plans of these runs come out right. The plans of three other runs take the figures and are compared with what
happened: other activations and a longer round; a longer round of replicas; a longer one still that averages in another
codec, behind compute.

Owns: the runs, and the way from their figures to the plan's options. Bytes are what peers and coordinator count.
"""

from __future__ import annotations

import itertools
import json
import statistics
import sysconfig
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tests.benchmarks.averaging_links import CONFIG
from tests.benchmarks.harness import Options, Row, figure
from tests.e2e.processes import run_to_end
from tests.e2e.swarm import Swarm

ROUNDS, WARM_ROUNDS = 9, 2
RUN_TIMEOUT_S = 300.0
LOOPBACK_MBPS = 4000.0
COMMON = (
    "batch.sequence_length=128",
    "batch.sequences_per_microbatch=1",
    "batch.heldout_sequences=2",
    f"batch.eval_every={ROUNDS}",
    f"keeping.checkpoint_every={ROUNDS}",
)


@dataclass(frozen=True, slots=True)
class Case:
    """One run of two peers."""

    name: str
    stages: int
    settings: tuple[str, ...]


MEASURED = (
    Case("two stages, fp16", 2, ("batch.microbatches_per_round=24",)),
    Case("two replicas, fp16", 1, ("batch.microbatches_per_round=24",)),
)
PLANNED = (
    Case("two stages, int8, 48", 2, ("batch.microbatches_per_round=48", "averaging.activation_codec=int8")),
    Case("two replicas, fp16, 48", 1, ("batch.microbatches_per_round=48",)),
    Case(
        "two replicas, int8, 72, overlap",
        1,
        ("batch.microbatches_per_round=72", "averaging.codec=int8", "averaging.overlap=true"),
    ),
)


@dataclass(frozen=True, slots=True)
class Found:
    """What a run did, in its rounds in the middle."""

    directory: Path
    tokens_per_s: float
    bytes_per_token: float
    stage_s: tuple[float, ...]
    """Computing per microbatch, by stage."""
    round_s: float
    averaging_mbps: float | None
    """How fast a member sends while it averages; None if nobody did."""


@dataclass(frozen=True, slots=True)
class Figures:
    """What a plan is told of the machine."""

    stage_s: tuple[float, ...]
    beside_s: float
    """What a round takes beside computing and averaging."""
    mbps: float


def plans(options: Options) -> Iterator[Row]:
    """Compare plans with runs, one row for tokens per second and one for bytes per token of each."""
    if not options.wants("plan_tokens_s", "plan_bytes"):
        return
    with tempfile.TemporaryDirectory(prefix="handcar-bench-") as name:
        folder = Path(name)
        figures = {case.stages: _figures(_run(folder / f"measured-{case.stages}", case)) for case in MEASURED}
        speeds, sizes = [], []
        for number, case in enumerate(PLANNED):
            found = _run(folder / f"planned-{number}", case)
            said = _plan(found.directory, figures[case.stages])
            bytes_per_token = said["activation_bytes_per_token"] + said["averaging_bytes_per_token"]
            speeds.append((case.name, said["tokens_per_s"], found.tokens_per_s))
            sizes.append((case.name, bytes_per_token, found.bytes_per_token))
    yield _row("plan_tokens_s", speeds, unit="tokens/s")
    yield _row("plan_bytes", sizes, unit="bytes per token")


def _row(row: str, compared: Sequence[tuple[str, float, float]], *, unit: str) -> Row:
    """Show the plan that is farthest off; all of them in the note."""
    _, said, was = max(compared, key=lambda each: abs(each[1] / each[2] - 1))
    note = "; ".join(f"{name}: {said:.4g} for {was:.4g} ({said / was - 1:+.1%})" for name, said, was in compared)
    bar = "<= 1.15" if said >= was else ">= 0.85"
    return figure(row, said, was, unit=unit, bar=bar, note=f"plan for run, the worst of: {note}")


def _run(folder: Path, case: Case) -> Found:
    corpus, model = Path(sysconfig.get_path("stdlib")) / "asyncio", folder / "model"
    model.mkdir(parents=True)
    (model / "config.json").write_text(json.dumps(CONFIG))
    with Swarm(
        folder,
        corpus=corpus,
        rounds=ROUNDS,
        settings=(*COMMON, *case.settings),
        preset="bench",
        model=model,
        stages=case.stages,
    ) as swarm:
        swarm.start_coordinator("--start-peers", "2", "--until-finished")
        swarm.start_peers(["first", "second"])
        swarm.wait_finished(timeout_s=RUN_TIMEOUT_S)
        batch = swarm.run_dir().manifest.batch
        feeder = next(peer for peer in swarm.peers.values() if peer.opened_s())
        seconds = [later - earlier for earlier, later in itertools.pairwise(feeder.opened_s())]
        round_s = statistics.median(seconds[WARM_ROUNDS : ROUNDS - 1])
        with swarm.database() as db:
            span, rounds = (WARM_ROUNDS, ROUNDS - 1), ROUNDS - 1 - WARM_ROUNDS
            computed = dict(
                db.execute(
                    "SELECT p.name, TOTAL(w.compute_seconds) FROM work AS w JOIN peers AS p ON p.peer = w.peer "
                    "WHERE w.round >= ? AND w.round < ? GROUP BY p.name",
                    span,
                ).fetchall()
            )
            hosts = [
                {peer.name for peer in swarm.peers.values() if peer.opened_s(stage=stage)}
                for stage in range(case.stages)
            ]
            num_computed = rounds * batch.microbatches_per_round
            stage_s = tuple(sum(computed[name] for name in names) / num_computed for names in hosts)
            moved = "SELECT TOTAL(activation_bytes) FROM work WHERE round >= ? AND round < ?"
            averaged = "SELECT TOTAL(bytes_sent) FROM averagings WHERE ok AND round >= ? AND round < ?"
            # of a hop its caller alone counts both ways
            rate = "SELECT bytes_sent * 8e-6 / seconds FROM averagings WHERE ok AND round >= ? AND round < ?"
            rates = [row[0] for row in db.execute(rate, span)]
            num_bytes = db.execute(moved, span).fetchone()[0] + db.execute(averaged, span).fetchone()[0]
    return Found(
        directory=swarm.directory,
        tokens_per_s=batch.tokens_per_round / round_s,
        bytes_per_token=num_bytes / rounds / batch.tokens_per_round,
        stage_s=stage_s,
        round_s=round_s,
        averaging_mbps=statistics.median(rates) if rates else None,
    )


def _figures(measured: Found) -> Figures:
    """Return what a plan needs so that it comes out right for a run."""
    bare = Figures(measured.stage_s, 0.0, measured.averaging_mbps or LOOPBACK_MBPS)
    lacking_s = measured.round_s - float(_plan(measured.directory, bare)["round_s"])
    return replace(bare, beside_s=max(0.0, lacking_s))


def _plan(directory: Path, figures: Figures) -> dict[str, Any]:
    flags = ["--stage-seconds", "/".join(f"{seconds:.6f}" for seconds in figures.stage_s)]
    flags += ["--round-seconds", str(figures.beside_s), "--latency-ms", "0", "--keep-activations", "--json"]
    flags += ["--upload-mbps", f"{figures.mbps:.1f}", "--download-mbps", f"{figures.mbps:.1f}", "--peers", "2"]
    said = run_to_end(
        "coordinator", ["plan", str(directory), *flags], name="plan", folder=directory.parent, timeout_s=60.0
    )
    answer: dict[str, Any] = json.loads(said.strip().split("\n")[-1])
    asked: dict[str, Any] = answer["data"]["asked"]
    return asked
