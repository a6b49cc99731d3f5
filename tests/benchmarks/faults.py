"""What faults cost: peers that are killed and replaced all the time, and a coordinator that is gone for a minute.

The first part runs `coordinator demo` twice: six peers on three stages, once left alone and once with a random peer
killed every 20 s, for as many rounds as take about five minutes then (on two cores). Same tokens, so their held-out
losses can be compared; what the ledger says of the disturbed one is shown beside. The second part takes the coordinator
away from a small swarm, by SIGKILL and by SIGSTOP, and asks the ledger afterwards what went on meanwhile.
"""

from __future__ import annotations

import json
import signal
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from tests.benchmarks.commands import checked_output
from tests.benchmarks.harness import Options, Row, figure, run
from tests.e2e.processes import stop_server
from tests.e2e.swarm import Swarm

PEERS, STAGES = 6, 3
KILL_EVERY_S = 20
ROUNDS, QUICK_ROUNDS = 210, 24
DEMO_TIMEOUT_S = 1800.0
AWAY_S, QUICK_AWAY_S = 60.0, 10.0
PATIENCE_S = 120.0
FOREVER = 20_000  # rounds
SETTINGS = ("keeping.checkpoint_every=20", "batch.eval_every=1000")
COORDINATOR = ("--start-peers", "4", "--lost-after", "10")


def demo(folder: Path, *, rounds: int, flags: Sequence[str] = ()) -> dict[str, Any]:
    """Run a demo to its end and return the data of its JSON."""
    sizes = ("--peers", PEERS, "--stages", STAGES, "--rounds", rounds)
    words = [sys.executable, "-m", "coordinator.cli", "demo", *map(str, sizes), "--dir", str(folder), "--json", *flags]
    stdout = checked_output(words, timeout_s=DEMO_TIMEOUT_S)
    data: dict[str, Any] = json.loads(stdout.strip().split("\n")[-1])["data"]
    return data


def measure_kills(folder: Path, *, rounds: int) -> Iterator[Row]:
    """Set a demo with kills beside one without."""
    calm = demo(folder / "calm", rounds=rounds)
    hit = demo(folder / "hit", rounds=rounds, flags=("--kill-one-peer-every", str(KILL_EVERY_S)))
    note = (
        f"{hit['peers_killed']} of {hit['peers_joined']} peers killed in {hit['seconds']:.0f} s, {rounds} rounds; "
        f"{hit['averagings_ok']} averagings, {hit['rounds_solo']} stage rounds alone"
    )
    yield figure("faults_loss", hit["heldout_loss"], calm["heldout_loss"], unit="nats", bar="<= 1.02", note=note)
    yield figure("faults_tasks_lost", hit["tasks_lost"], unit="tasks", bar="<= 0")
    yield figure("faults_tasks_resent", hit["tasks_resent"], unit="tasks", note=f"of {hit['tasks_done']}")
    yield figure("faults_tokens_dropped", hit["tokens_dropped"], unit="tokens", note=f"of {hit['tokens'] * STAGES}")
    yield figure("faults_double_counted", hit["double_counted"], unit="tokens", note=f"of {hit['tokens'] * STAGES}")
    yield figure("faults_speed", hit["tokens_per_s"], calm["tokens_per_s"], unit="tokens/s")


def measure_coordinator(folder: Path, *, away_s: float) -> Iterator[Row]:
    """Take the coordinator away from two stages of two replicas, and look into its ledger when it is back."""
    corpus = Path(sysconfig.get_path("stdlib")) / "asyncio"
    with Swarm(folder, corpus=corpus, rounds=FOREVER, settings=SETTINGS) as swarm:
        coordinator = swarm.start_coordinator(*COORDINATOR)
        swarm.start_peers(["one", "two", "three", "four"])
        swarm.wait("averagings", lambda: swarm.counters().averagings_ok >= 4, timeout_s=PATIENCE_S)

        coordinator.kill()
        before = swarm.version(0)
        time.sleep(away_s)
        after = swarm.version(0)
        coordinator = swarm.start_coordinator(*COORDINATOR, again=True)
        swarm.wait("the missed rounds", lambda: swarm.rounds()[-1].round >= after - 1, timeout_s=PATIENCE_S)
        gaps = len(swarm.rounds()) <= swarm.rounds()[-1].round
        note = f"killed for {away_s:g} s; the ledger {'lacks some of' if gaps else 'has all of'} them afterwards"
        yield figure("coordinator_killed", after - before, unit="rounds", bar=">= 1", note=note)

        averagings = swarm.counters().averagings_ok
        coordinator.send(signal.SIGSTOP)
        time.sleep(away_s)
        newest = swarm.version(0)
        coordinator.send(signal.SIGCONT)
        swarm.wait("the missed rounds", lambda: swarm.rounds()[-1].round >= newest - 1, timeout_s=PATIENCE_S)
        more = swarm.counters().averagings_ok - averagings
        yield figure("coordinator_stopped", more, unit="averagings", bar=">= 3", note=f"stopped for {away_s:g} s")
        yield figure("coordinator_tasks_lost", swarm.counters().tasks_lost, unit="tasks", bar="<= 0")


def measure(options: Options) -> Iterator[Row]:
    """Do both parts."""
    with tempfile.TemporaryDirectory(prefix="handcar-bench-") as name:
        yield from measure_kills(Path(name), rounds=QUICK_ROUNDS if options.quick else ROUNDS)
        try:
            yield from measure_coordinator(Path(name) / "away", away_s=QUICK_AWAY_S if options.quick else AWAY_S)
        finally:
            stop_server()


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark."""
    return run("faults: killed peers and a coordinator that is away", measure, argv)


if __name__ == "__main__":
    sys.exit(main())
