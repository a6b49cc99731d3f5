"""The only replica of a stage is killed between checkpoints, and goes on from its own drive as if nothing had happened.

Oracles: the state digests that it logged before the kill, the charter that it gets after it, the ledger, the loss.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest

from coordinator.store import history
from coordinator.store.tallies import RoundTally
from protocol.architecture import preset
from protocol.rounds.messages import Charter
from protocol.signing import Signed
from tests.e2e.processes import Command
from tests.e2e.swarm import Swarm

pytestmark = pytest.mark.timeout(300)

SETTINGS = ("batch.microbatches_per_round=2", "batch.eval_every=500", "keeping.checkpoint_every=500")
LAYERS = 12
DEVICE_MEMORY = "3400KB"  # for a third of its stage, and for computing


def test_a_lone_replica_that_is_killed_loses_no_round(tmp_path: Path, corpus: Path) -> None:
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "config.json").write_text(json.dumps({**preset("tiny"), "num_hidden_layers": LAYERS}))
    limits = ("--device-memory", DEVICE_MEMORY, "--host-memory", "0", "--nvme", str(tmp_path / "nvme"))
    with Swarm(tmp_path, corpus=corpus, rounds=500, settings=SETTINGS, model=tmp_path / "deep") as swarm:
        swarm.start_coordinator("--start-peers", "2")
        swarm.start_peer("front", "--stage", "0")
        swarm.start_peer("back", "--stage", "1", *limits)
        lives, reached = 1, 0
        states: dict[int, str] = {}
        while reached not in states:  # a step was kept, and the kill came before its line: nothing to compare with
            swarm.wait_version(reached + 5, stage=1)
            swarm.peers["back"].kill()
            states = {event["version"]: event["state"] for event in swarm.peers["back"].events("round.committed")}
            again, resumed = _come_back(swarm, *limits)
            lives, reached = lives + 1, resumed["reached"]
            assert resumed["version"] > 0, "what lies on the drive"
            assert max(states) <= reached <= max(states) + 1
        swarm.wait("commits of the one that is back", lambda: len(_committed(again)) > len(states) + 3)
        assert _committed(again)[len(states)] == reached + 1
        charter = _charter(swarm, stage=1)
        assert (charter.generation, charter.version) == (lives, reached)
        assert charter.state_digest.hex()[:12] == states[reached]

        after = swarm.rounds()
        before = [tally for tally in after if tally.round < max(states)]  # with short rounds most was reported later
        assert not swarm.run_dir().newest_checkpoint()
        assert swarm.counters().rounds_rolled_back == 0
        first, last = fmean(_losses(before[:2])), fmean(_losses(after[-3:]))
        assert last < first - 0.3 * (first - fmean(_losses(before[-3:]))), "or it is the initial weights again"


def _come_back(swarm: Swarm, *limits: str) -> tuple[Command, dict[str, Any]]:
    """Start the one that was killed again; return what it says of its own state."""
    earlier = len(swarm.peers["back"].events("resume.own_disk"))
    again = swarm.start_peer("back", "--stage", "1", *limits)
    swarm.wait("its own state", lambda: again.events("resume.own_disk")[earlier:])
    return again, again.events("resume.own_disk")[-1]


def _committed(peer: Command) -> list[int]:
    """Return the versions that it has committed, in all its lives."""
    return [event["version"] for event in peer.events("round.committed")]


def _losses(rounds: Sequence[RoundTally]) -> list[float]:
    return [tally.loss for tally in rounds if tally.loss is not None]


def _charter(swarm: Swarm, *, stage: int) -> Charter:
    with swarm.database() as db:
        (row,) = (row for row in history.newest_charters(db) if row.stage == stage)
    return Charter.from_bytes(Signed.from_bytes(row.signed).payload)
