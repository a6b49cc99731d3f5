"""What a card of a tenth of the speed costs those beside it: the row `straggler` of `averaging.py`.

Three replicas of a tiny stage train by local steps and average behind the next round. How long a microbatch takes is
feigned (`tests/e2e/odd_peer.py`: they sleep), so that two cores do for three cards: two of 50 ms, and one of 500 ms.
The yardstick is the same swarm without that one. What is compared is the tokens per second of the two, by what they
report of their work; whatever the slow one does comes on top.

Owns: the two swarms.
"""

from __future__ import annotations

import sysconfig
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

from tests.benchmarks.harness import Options, Row, figure
from tests.e2e.processes import at_s
from tests.e2e.swarm import Swarm

FAST, SLOW = "slow:0.05", "slow:0.5"
OTHERS = ("p0", "p1")
STRAGGLER = "straggler"
ROUNDS, WARM_ROUNDS = 16, 4
RUN_TIMEOUT_S = 400.0
SETTINGS = (
    "averaging.mode=diloco",
    "averaging.codec=int8",
    "averaging.overlap=true",
    "batch.microbatches_per_round=120",
    "batch.heldout_sequences=2",
    f"batch.eval_every={ROUNDS}",
    f"keeping.checkpoint_every={ROUNDS}",
)


def straggler(options: Options) -> Iterator[Row]:
    """Train with and without the slow one."""
    if not options.wants("straggler"):
        return
    with tempfile.TemporaryDirectory(prefix="handcar-bench-") as name:
        alone = _tokens_per_s(Path(name) / "alone", dict.fromkeys(OTHERS, FAST))
        beside = _tokens_per_s(Path(name) / "beside", {**dict.fromkeys(OTHERS, FAST), STRAGGLER: SLOW})
    with_it, without = (sum(each[peer] for peer in OTHERS) for each in (beside, alone))
    note = f"the two beside it; the one of a tenth of their speed does {beside[STRAGGLER]:.0f} tokens/s"
    yield figure("straggler", with_it, without, unit="tokens/s", bar=">= 0.95", note=note)


def _tokens_per_s(folder: Path, peers: Mapping[str, str]) -> Mapping[str, float]:
    """Return what each peer computes per second in the rounds in the middle."""
    corpus = Path(sysconfig.get_path("stdlib")) / "asyncio"
    with Swarm(folder, corpus=corpus, rounds=ROUNDS, stages=1, settings=SETTINGS) as swarm:
        swarm.start_coordinator("--start-peers", str(len(peers)), "--until-finished")
        for name, oddity in peers.items():
            swarm.start_peer(name, oddity=oddity)
        swarm.wait_finished(timeout_s=RUN_TIMEOUT_S)
        opened = {event["round"]: at_s(event) for event in swarm.peers[OTHERS[0]].events("round.open")}
        with swarm.database() as db:
            found = db.execute(
                "SELECT p.name, TOTAL(w.target_tokens) FROM work AS w JOIN peers AS p ON p.peer = w.peer "
                "WHERE w.round >= ? AND w.round < ? GROUP BY p.name",
                (WARM_ROUNDS, ROUNDS - 1),
            ).fetchall()
    seconds = opened[ROUNDS - 1] - opened[WARM_ROUNDS]
    return {name: tokens / seconds for name, tokens in found}
