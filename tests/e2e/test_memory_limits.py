"""A swarm whose peers have memory for a tenth of their stage trains like one process with plenty, and survives a kill.

Oracle: `plain_loop.py`. Microbatches may come in another order, so sums differ in their last bits.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from protocol.architecture import preset
from tests.e2e.processes import Command
from tests.e2e.reference import ask_plain_loop, training_spec
from tests.e2e.swarm import Swarm

pytestmark = pytest.mark.timeout(300)

ROUNDS = 3
SETTINGS = ("batch.microbatches_per_round=4", f"batch.eval_every={ROUNDS}", "batch.heldout_sequences=8")
LAYERS = 48  # per stage: the few that are in slots are less than a tenth
LIMITS = ("--device-memory", "3400KB", "--host-memory", "0")
ROOMY = ("--device-memory", "4MB", "--host-memory", "0")  # embedding and head in one stage take more
MANY_ROUNDS = 200  # the run is not meant to end
RUN_TIMEOUT_S = 200.0


def _deep_model(folder: Path, layers: int) -> Path:
    """Write the tiny preset's model, but deep, and return its folder."""
    model = folder / "deep"
    model.mkdir()
    (model / "config.json").write_text(json.dumps({**preset("tiny"), "num_hidden_layers": layers}))
    return model


@pytest.mark.long
def test_a_tenth_of_the_state_in_memory_is_enough(tmp_path: Path, corpus: Path) -> None:
    """Activations and working space are not state, and take as much again."""
    model = _deep_model(tmp_path, 2 * LAYERS)
    with Swarm(tmp_path, corpus=corpus, rounds=ROUNDS, settings=SETTINGS, model=model) as swarm:
        swarm.start_coordinator("--start-peers", "2", "--until-finished")
        for name in ("p0", "p1"):
            swarm.start_peer(name, *LIMITS, "--nvme", str(tmp_path / "nvme"))
        swarm.wait_finished(timeout_s=RUN_TIMEOUT_S)
    planned = [event for peer in swarm.peers.values() for event in peer.events("memory.planned")]
    assert len(planned) == 2
    assert all(0 < event["in_memory"] <= 0.1 for event in planned), planned
    (plain,) = ask_plain_loop(tmp_path, training_spec(swarm.run_dir(), tmp_path / "initial"))
    *trained, last = swarm.rounds()
    assert [tally.loss for tally in trained] == pytest.approx(plain["losses"], rel=1e-4)
    assert last.heldout_loss == pytest.approx(plain["heldout_loss"], rel=1e-4)
    assert plain["heldout_loss"] < plain["losses"][0], "or it is the loss of the initial weights in both"


@pytest.mark.long
def test_a_killed_peer_goes_on_from_its_own_drive(tmp_path: Path, corpus: Path) -> None:
    """Oracle: it says so, fetches no snapshot, and its state is that of the other replica at every version."""
    limits = (*ROOMY, "--nvme", str(tmp_path / "nvme"))
    settings = (*SETTINGS[:1], f"batch.eval_every={MANY_ROUNDS}", SETTINGS[2])
    model = _deep_model(tmp_path, LAYERS)
    with Swarm(tmp_path, corpus=corpus, rounds=MANY_ROUNDS, stages=1, settings=settings, model=model) as swarm:
        swarm.start_coordinator("--start-peers", "2")
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
