"""How much of its time a peer computes on a home line: the rows `link_*` of `averaging.py`.

Two replicas of a model of 7M parameters, real processes with a thread each. Each lives in a network namespace of its
own behind a token bucket (tc's tbf) of 20 Mbit/s up and 100 Mbit/s down; they meet on a bridge in one more namespace,
where the coordinator lives too. What is compared is compute seconds over wall seconds, by what peers report, against
the same swarm without token buckets.

One stage, because two cores hold two threads: four peers would wait for cores. Who owns which number of a round is
drawn by hash, so one of the two is done before the other, on a link of any speed, and another one in every run.
Therefore the share is that of both together; the note has each.

`link_baseline`: gradients of fp16 at every step, averaged while everybody waits. `link_utilisation`: local steps, the
drift in a low codec, averaged while the next round computes.
"""

from __future__ import annotations

import json
import os
import sysconfig
import tempfile
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from statistics import fmean

from protocol.architecture import preset
from tests.benchmarks.harness import Options, Row, figure
from tests.e2e.netns import homes
from tests.e2e.swarm import Swarm

PEERS = ("p0", "p1")
CONFIG = preset("bench") | {
    "hidden_size": 256,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "intermediate_size": 688,
}
UP_MBPS, DOWN_MBPS = 20, 100
ROUNDS, WARM_ROUNDS = 10, 2
RUN_TIMEOUT_S = 400.0
COMMON = (
    "batch.sequence_length=128",
    "batch.sequences_per_microbatch=1",
    "batch.microbatches_per_round=96",
    "batch.heldout_sequences=4",
    f"batch.eval_every={ROUNDS}",
)
GRADIENTS = ("averaging.mode=gradient", "averaging.codec=fp16")
HIDDEN = (
    "averaging.mode=diloco",
    "averaging.codec=int8",
    "averaging.overlap=true",
    "averaging.microbatches_per_step=4",
)


def links(options: Options) -> Iterator[Row]:
    """Train the same swarm three times, and compare how much of their time its peers compute."""
    rows = [row for row in ("link_baseline", "link_utilisation") if options.wants(row)]
    if not rows:
        return
    if os.geteuid() != 0:
        for row in rows:
            yield figure(row, 0, unit="share", note="not run: network namespaces need root")
        return
    with tempfile.TemporaryDirectory(prefix="handcar-bench-") as name:
        folder = Path(name)
        for row, settings, bar in (
            ("link_baseline", GRADIENTS, "< 0.60"),
            ("link_utilisation", HIDDEN, ">= 0.95"),
        ):
            if row not in rows:
                continue
            free = _utilisation(folder / f"{row}-free", settings, is_limited=False)
            home = _utilisation(folder / f"{row}-home", settings, is_limited=True)
            each = ", ".join(f"{peer} {home[peer] / free[peer]:.3f}" for peer in sorted(home))
            note = f"{UP_MBPS}/{DOWN_MBPS} Mbit/s; {each}; {' '.join(settings)}"
            yield figure(row, fmean(home.values()), fmean(free.values()), unit="share", bar=bar, note=note)


def _utilisation(folder: Path, settings: tuple[str, ...], *, is_limited: bool) -> Mapping[str, float]:
    """Return compute seconds per wall second of every peer, the mean of its rounds, by name."""
    corpus, model = Path(sysconfig.get_path("stdlib")) / "asyncio", folder / "model"
    model.mkdir(parents=True)
    (model / "config.json").write_text(json.dumps(CONFIG))
    with homes(*PEERS) as network:
        if is_limited:
            network.limit(up_mbps=UP_MBPS, down_mbps=DOWN_MBPS)
        with Swarm(
            folder,
            corpus=corpus,
            rounds=ROUNDS,
            stages=1,
            settings=(*COMMON, *settings),
            preset="bench",
            model=model,
            places=network.places,
        ) as swarm:
            swarm.start_coordinator("--start-peers", str(len(PEERS)), "--until-finished")
            swarm.start_peers(PEERS)
            swarm.wait_finished(timeout_s=RUN_TIMEOUT_S)
        with swarm.database() as db:
            rows = db.execute(
                "SELECT p.name, w.compute_seconds / w.seconds FROM work AS w JOIN peers AS p ON p.peer = w.peer "
                "WHERE w.round >= ? AND w.round < ?",
                (WARM_ROUNDS, ROUNDS - 1),
            ).fetchall()
    shares: defaultdict[str, list[float]] = defaultdict(list)
    for peer, share in rows:
        shares[peer].append(share)
    return {peer: fmean(found) for peer, found in shares.items()}
