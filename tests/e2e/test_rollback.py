"""A run goes back to a checkpoint while it trains. Real processes; oracles: versions, events, folders, charters."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from coordinator.store import history
from tests.e2e.processes import run_to_end
from tests.e2e.swarm import Swarm

pytestmark = pytest.mark.timeout(300)

SETTINGS = (
    "batch.microbatches_per_round=8",
    "batch.heldout_sequences=32",
    "batch.eval_every=1000",
    "keeping.checkpoint_every=4",
    "keeping.checkpoints_kept=10",
)


def command(swarm: Swarm, name: str, *arguments: str) -> dict[str, object]:
    flags = [name, str(swarm.directory), *arguments, "--json"]
    found: dict[str, object] = json.loads(
        run_to_end("coordinator", flags, name=name, folder=swarm.folder, timeout_s=30.0)
    )["data"]
    return found


def rounds(swarm: Swarm) -> list[int]:
    listed = command(swarm, "checkpoints")["checkpoints"]
    assert isinstance(listed, list)
    return [row["round"] for row in listed]


@pytest.mark.long
def test_a_run_goes_back_while_it_trains_and_goes_on_from_there(tmp_path: Path, corpus: Path) -> None:
    """Two stages, two replicas each. Oracle also: nobody ends, and everybody comes along."""
    with Swarm(tmp_path, corpus=corpus, rounds=10_000, stages=2, settings=SETTINGS) as swarm:
        swarm.start_coordinator("--start-peers", "4")
        for number, name in enumerate(("ash", "elm", "oak", "fir")):
            swarm.start_peer(name, "--stage", str(number % 2))
        swarm.wait("two checkpoints", lambda: len(rounds(swarm)) >= 2, timeout_s=120.0)
        target = rounds(swarm)[-1]
        command(swarm, "rollback", "--to", str(target), "--reason", "a test")

        def events(kind: str) -> list[str]:
            with swarm.database() as db:
                return [each.detail for each in history.last_events(db, limit=500) if each.kind == kind]

        swarm.wait("the order", lambda: events("run.rolled_back"), timeout_s=30.0)
        swarm.wait(
            "both stages to be founded on it",
            lambda: len([each for each in events("stage.founded") if f"round {target}, version {target}" in each]) >= 2,
            timeout_s=90.0,
        )
        (told,) = events("run.rolled_back")
        assert "a test" in told
        assert list((swarm.directory / "checkpoints").glob("given-up-round-*"))

        def kept(stage: int) -> int:
            with swarm.database() as db:
                query = "SELECT max(version) FROM commits WHERE stage = ? AND NOT gone"
                return int(db.execute(query, (stage,)).fetchone()[0] or 0)

        for stage in (0, 1):
            swarm.wait(f"stage {stage} to go on", lambda: kept(stage) >= target + 5, timeout_s=120.0)  # noqa: B023
        with swarm.database() as db:
            assert db.execute("SELECT min(version), count(*) FROM commits WHERE gone").fetchone() >= (target + 1, 2)
        assert all(peer.code is None for peer in swarm.peers.values())
        assert all(peer.events("stage.goes_back") for peer in swarm.peers.values())
