"""A peer is banned while it trains: it hears why and ends, the others go on without it, and it may come back.

Oracles: exit codes and messages, the logs of the others, the coordinator's books.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.e2e.processes import run_to_end
from tests.e2e.swarm import Swarm

pytestmark = pytest.mark.timeout(240)

SETTINGS = ("batch.microbatches_per_round=8", "batch.heldout_sequences=32", "batch.eval_every=1000")


def test_a_banned_peer_hears_why_and_the_others_go_on(tmp_path: Path, corpus: Path) -> None:
    """Two replicas of one stage. Oracle also: who was named in commits after the ban."""
    with Swarm(tmp_path, corpus=corpus, rounds=10_000, stages=1, settings=SETTINGS) as swarm:
        swarm.start_coordinator("--start-peers", "2")
        swarm.start_peers(["oak", "elm"])
        swarm.wait_version(3)
        oak = swarm.peers["oak"]
        oak.is_expected_to_end = True
        flags = ["ban", str(swarm.directory), "oak", "--reason", "it sends nonsense"]
        run_to_end("coordinator", flags, name="ban", folder=tmp_path, timeout_s=30.0)
        assert oak.wait_end(timeout_s=30.0) == 4, oak.story()
        assert "it sends nonsense" in oak.story()
        version = swarm.version()
        swarm.wait_version(version + 5, timeout_s=60.0)
        assert swarm.peers["elm"].events("round.open")[-1]["peers"] == 1
        again = swarm.start_peer("oak")
        again.is_expected_to_end = True
        assert again.wait_end(timeout_s=60.0) == 4
        run_to_end("coordinator", ["unban", str(swarm.directory), "oak"], name="unban", folder=tmp_path, timeout_s=30.0)
        swarm.start_peer("oak")
        swarm.wait("oak to take part again", lambda: swarm.peers["oak"].events("round.committed"), timeout_s=90.0)
