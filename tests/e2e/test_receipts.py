"""Credits of a real swarm: what everybody did is vouched for by both ends, whoever was away when.

Oracle: the closings, in which the clock adds up the signed paths of the numbers that counted. The receipts come another
way, from every peer to the coordinator.
"""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest

from tests.e2e.processes import run_to_end
from tests.e2e.swarm import Swarm

pytestmark = pytest.mark.timeout(300)

SETTINGS = ("batch.microbatches_per_round=8", "batch.heldout_sequences=32", "batch.eval_every=1000")
ROUNDS = 24


def test_credits_are_those_of_the_signed_paths_though_the_coordinator_was_killed_and_a_peer_left(
    tmp_path: Path, corpus: Path
) -> None:
    """While the coordinator is down one peer stops for good and comes back later: its receipts were on disk."""
    with Swarm(tmp_path, corpus=corpus, rounds=ROUNDS, stages=2, settings=SETTINGS) as swarm:
        swarm.start_coordinator("--start-peers", "3", "--until-finished")
        swarm.start_peers(["oak", "elm", "fir"])
        swarm.wait_version(4)
        assert swarm.coordinator is not None
        swarm.coordinator.is_expected_to_end = True
        swarm.coordinator.kill()
        gone = next(peer for peer in swarm.hosts(stage=0) + swarm.hosts(stage=1) if _has_twin(swarm, peer.name))
        name, version = gone.name, swarm.version()
        swarm.wait_version(version + 2)
        gone.send(signal.SIGTERM)
        assert gone.wait_end(timeout_s=60.0) == 0, gone.story()
        spool = next((tmp_path / f"{name}.data" / "runs").iterdir()) / "reports"
        assert list(spool.iterdir())
        swarm.start_coordinator("--start-peers", "3", "--until-finished", again=True)
        swarm.start_peer(name)
        swarm.wait_finished(timeout_s=120.0)
        with swarm.database() as db:
            vouched = dict(db.execute("SELECT peer || stage, sum(tokens) FROM round_credits GROUP BY peer, stage"))
            paid = dict(db.execute("SELECT peer || stage, sum(tokens) FROM credit_entries GROUP BY peer, stage"))
            (counted,) = db.execute("SELECT sum(tokens) FROM rounds").fetchone()
            evidence = db.execute("SELECT peer, detail FROM evidence").fetchall()
        assert paid == vouched
        assert sum(paid.values()) == 2 * counted
        assert evidence == []
        shown = run_to_end(
            "swarm", ["credits", str(swarm.directory), "--json"], name="credits", folder=tmp_path, timeout_s=30.0
        )
        ranked = json.loads(shown)["data"]["credits"]
        assert sum(row["held_tokens"] for row in ranked) == sum(paid.values())


def _has_twin(swarm: Swarm, name: str) -> bool:
    """Tell whether somebody else hosts the same stage: it can go without the run standing still."""
    return any(name in {host.name for host in hosts} and len(hosts) > 1 for hosts in (swarm.hosts(0), swarm.hosts(1)))
