"""A swarm whose peers have memory for a tenth of their stage trains like one that has plenty, and survives a kill.

Oracle: the same run without limits. Microbatches may come in another order, so sums differ in their last bits.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from protocol.architecture import preset
from tests.e2e.processes import Command
from tests.e2e.swarm import Swarm

pytestmark = pytest.mark.timeout(300)

ROUNDS = 3
SETTINGS = ("batch.microbatches_per_round=4", f"batch.eval_every={ROUNDS}", "batch.heldout_sequences=8")
LAYERS = 96  # 48 per stage: the few that are in slots are less than a tenth
DEVICE_MEMORY = "3400KB"
RUN_TIMEOUT_S = 200.0


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny preset's model, but deep."""
    folder = tmp_path_factory.mktemp("deep")
    config = {**preset("tiny"), "num_hidden_layers": LAYERS}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def unlimited(tmp_path_factory: pytest.TempPathFactory, corpus: Path, model: Path) -> Iterator[Swarm]:
    folder = tmp_path_factory.mktemp("unlimited")
    with Swarm(folder, corpus=corpus, rounds=ROUNDS, settings=SETTINGS, model=model) as swarm:
        swarm.start_coordinator("--start-peers", "2", "--until-finished")
        swarm.start_peers(["p0", "p1"])
        swarm.wait_finished(timeout_s=RUN_TIMEOUT_S)
        yield swarm


def test_a_tenth_of_the_state_in_memory_is_enough(unlimited: Swarm, tmp_path: Path, corpus: Path, model: Path) -> None:
    """Activations and working space are not state, and take as much again."""
    limits = ("--device-memory", DEVICE_MEMORY, "--host-memory", "0", "--nvme", str(tmp_path / "nvme"))
    with Swarm(tmp_path, corpus=corpus, rounds=ROUNDS, settings=SETTINGS, model=model) as swarm:
        swarm.start_coordinator("--start-peers", "2", "--until-finished")
        for name in ("p0", "p1"):
            swarm.start_peer(name, *limits)
        swarm.wait_finished(timeout_s=RUN_TIMEOUT_S)
        planned = [event for peer in swarm.peers.values() for event in peer.events("memory.planned")]
        assert len(planned) == 2
        assert all(0 < event["in_memory"] <= 0.1 for event in planned), planned
        first, *_, last = swarm.rounds()
        assert last.heldout_loss == pytest.approx(unlimited.rounds()[-1].heldout_loss, rel=1e-4)
        assert first.loss is not None
        assert last.heldout_loss is not None
        assert last.heldout_loss < first.loss, "or it is the loss of the initial weights in both"


def test_a_killed_peer_goes_on_from_its_own_drive(tmp_path: Path, corpus: Path, model: Path) -> None:
    """Oracle: it says so, fetches no snapshot, and its state is that of the other replica at every version."""
    limits = ("--device-memory", "7MB", "--host-memory", "0", "--nvme", str(tmp_path / "nvme"))
    settings = (*SETTINGS[:1], "batch.eval_every=40", SETTINGS[2])
    with Swarm(tmp_path, corpus=corpus, rounds=40, stages=1, settings=settings, model=model) as swarm:
        swarm.start_coordinator("--start-peers", "2", "--until-finished")
        for name in ("p0", "p1"):
            swarm.start_peer(name, *limits)
        swarm.wait_version(3)
        swarm.peers["p1"].kill()
        again = swarm.start_peer("p1", *limits)
        swarm.wait("the state on its own drive", lambda: again.events("resume.own_disk"))
        resumed = again.events("resume.own_disk")[0]["version"]
        assert resumed > 0
        swarm.wait("a commit of the one that is back", lambda: _committed(again, after=resumed + 3))
        states: dict[int, set[str]] = {}
        for peer in swarm.peers.values():
            for event in peer.events("round.committed"):
                states.setdefault(event["version"], set()).add(event["state"])
        assert all(len(digests) == 1 for digests in states.values())


def _committed(peer: Command, *, after: int) -> bool:
    return any(event["version"] > after for event in peer.events("round.committed"))
