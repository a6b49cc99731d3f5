"""Kill -9 a member of a stage at any moment of an averaging, again and again, and look at what the others make of it.

    python -m tests.e2e.averaging_chaos [--kills 100] [--seed 0]        (make chaos-averaging)

Three replicas of one stage train by local steps and average behind the next round, over lines so slow that they are
always either averaging or about to. One of them is killed, and comes back as a newcomer. Of every version all that ever
stood there must have had the same anchor and velocity, so no replica is ever averaged in part; and the others have to
commit again soon. The moments are drawn uniformly over a round; the report counts what the victim was at.
"""

from __future__ import annotations

import argparse
import random
import sys
import sysconfig
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.e2e.processes import Command, at_s, stop_server
from tests.e2e.swarm import Swarm

PEERS = ("p0", "p1", "p2")
ROUNDS = 100_000  # more than there is time for
SETTINGS = (
    "averaging.mode=diloco",
    "averaging.codec=int8",
    "averaging.overlap=true",
    "batch.microbatches_per_round=24",
    f"batch.eval_every={ROUNDS}",
    "keeping.checkpoint_every=5",
)
SLOW_LINE = ("--upload-mbps", "6")
"""An average of this model takes about a second."""
MAX_ROUND_S = 2.0
PHASES = ("round.open", "round.frozen", "averaging.begun", "averaging.done", "round.committed")
"""What a replica logs when it gets there."""
PATIENCE_S = 60.0
MAX_PAUSE_S = 20.0


@dataclass(slots=True)
class Report:
    """What the kills have hit."""

    kills: int = 0
    versions: int = 0
    phases: Counter[str] = field(default_factory=Counter)
    pauses_s: list[float] = field(default_factory=list)
    """From each kill to the next commit of the others."""


def run(folder: Path, *, kills: int, seed: int, say: Callable[[str], None]) -> Report:
    """Do it `kills` times; raises `AssertionError` at the first state that differs, or if the others do not go on."""
    dice, report = random.Random(seed), Report()
    corpus = Path(sysconfig.get_path("stdlib")) / "asyncio"
    with Swarm(folder, corpus=corpus, rounds=ROUNDS, stages=1, settings=SETTINGS) as swarm:
        swarm.start_coordinator("--start-peers", str(len(PEERS)))
        for name in PEERS:
            swarm.start_peer(name, *SLOW_LINE)
        _wait_whole(swarm, after_s=0.0)
        for _ in range(kills):
            time.sleep(dice.uniform(0.0, MAX_ROUND_S))
            victim = swarm.peers[dice.choice(PEERS)]
            phase, version = _phase(victim), swarm.version()
            killed_s = time.time()
            victim.kill()
            _wait_beyond(swarm, version)
            pause_s = min(_times(swarm, "round.committed", after_s=killed_s), default=time.time()) - killed_s
            assert pause_s <= MAX_PAUSE_S, f"the others have committed nothing for {pause_s:.1f} s"
            restarted_s = time.time()
            swarm.start_peer(victim.name, *SLOW_LINE)
            _wait_whole(swarm, after_s=restarted_s)
            _check_states(swarm)
            report.kills += 1
            report.versions = swarm.version()
            report.phases[phase] += 1
            report.pauses_s.append(pause_s)
            say(f"kill {report.kills}: {victim.name} after {phase}; the others committed {pause_s:.1f} s later")
    return report


def _wait_beyond(swarm: Swarm, version: int) -> None:
    swarm.wait("the others to commit", lambda: swarm.version() > version, timeout_s=PATIENCE_S)


def _wait_whole(swarm: Swarm, *, after_s: float) -> None:
    """Wait until all three have a seat."""
    full = lambda event: event["peers"] == len(PEERS)  # noqa: E731
    swarm.wait(
        "all to be members", lambda: any(_times(swarm, "round.open", after_s=after_s, where=full)), timeout_s=PATIENCE_S
    )


def _times(
    swarm: Swarm, name: str, *, after_s: float, where: Callable[[dict[str, Any]], bool] = lambda event: True
) -> Sequence[float]:
    """Return when living peers have logged an event since then."""
    return [
        now_s
        for peer in swarm.living()
        for event in peer.events(name)
        if (now_s := at_s(event)) > after_s and where(event)
    ]


def _phase(peer: Command) -> str:
    """Return what a replica was at, by the last thing that it has said of itself."""
    said = [event["event"] for event in peer.events() if event["event"] in PHASES]
    return str(said[-1]) if said else "nothing"


def _check_states(swarm: Swarm) -> None:
    for (stage, version), by_peer in swarm.states().items():
        assert len(set(by_peer.values())) == 1, f"stage {stage}, version {version}: {dict(by_peer)}"


def main() -> int:
    """Run it from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="handcar-chaos-") as name:
        report = run(Path(name), kills=options.kills, seed=options.seed, say=lambda text: print(text, flush=True))
    stop_server()
    pauses = sorted(report.pauses_s)
    print(
        f"{report.kills} kills, version {report.versions} reached, equal states at every version; after "
        f"{dict(report.phases)}; the others went on after {pauses[len(pauses) // 2]:.1f} s (median), "
        f"{pauses[-1]:.1f} s at most"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
