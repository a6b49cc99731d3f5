"""A swarm that is torn in two for longer than its members have patience, and is one again.

Oracles: state hashes of all peers at every version, the coordinator's books, the process table.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.e2e.netns import Homes, homes
from tests.e2e.swarm import Swarm

pytestmark = [
    pytest.mark.long,
    pytest.mark.timeout(300),
    pytest.mark.skipif(os.geteuid() != 0, reason="network namespaces need root"),
]

ONE, OTHER = ("p0", "p1"), ("p2", "p3")
STAGES = (0, 1)
APART = 3
"""Rounds that each half commits by itself."""
SETTINGS = ("batch.microbatches_per_round=8", "batch.heldout_sequences=32", "batch.eval_every=1000")


@pytest.mark.parametrize("more", [(), ("averaging.mode=diloco", "averaging.overlap=true")], ids=["gradient", "overlap"])
def test_two_halves_of_a_torn_swarm_are_one_again(more: tuple[str, ...], tmp_path: Path, corpus: Path) -> None:
    """Every peer hosts both stages. Two lose their way to the two others, though nobody loses it to the coordinator."""
    with (
        homes(*ONE, *OTHER) as network,
        Swarm(tmp_path, corpus=corpus, rounds=1000, settings=(*SETTINGS, *more), places=network.places) as swarm,
    ):
        swarm.start_coordinator("--start-peers", "4", "--lost-after", "5")
        for name in (*ONE, *OTHER):
            swarm.start_peer(name, "--stage", "0", "--stage", "1")
        swarm.wait_version(3, stage=1)
        _tear(swarm, network)
        swarm.wait("the settlement", lambda: len(_torn(swarm)) == 2, timeout_s=60.0)
        together = {stage: swarm.version(stage) for stage in STAGES}
        swarm.wait("all of them together again", lambda: _have_agreed(swarm, together), timeout_s=90.0)
        assert all(peer.code is None for peer in swarm.peers.values())
        parted = {key for key, states in swarm.states().items() if len(set(states.values())) > 1}
        assert {stage for stage, _ in parted} == set(STAGES), "each half had a state of its own"
        rollbacks = swarm.status()["rollbacks"]
        assert {(each["stage"], each["torn"]) for each in rollbacks} == {(stage, True) for stage in STAGES}
        for each in rollbacks:
            assert each["rounds"] == each["version_before"] - each["version"] >= APART
        counters = swarm.counters()
        assert counters.rounds_rolled_back == sum(each["rounds"] for each in rollbacks)
        assert counters.tokens_dropped >= sum(each["tokens"] for each in rollbacks) > 0


def _tear(swarm: Swarm, network: Homes) -> None:
    """Tear the swarm until both halves have gone on."""
    network.cut(ONE, OTHER)
    before = _versions(swarm)
    goal = {key: version + APART + 1 for key, version in before.items()}  # one may have been under way

    def have_gone_on() -> bool:
        now = _versions(swarm)
        return all(now[key] >= version for key, version in goal.items())

    swarm.wait("both halves to go on", have_gone_on, timeout_s=90.0)
    network.mend(ONE, OTHER)


def _versions(swarm: Swarm) -> dict[tuple[str, int], int]:
    """Return what each peer has come to, by stage."""
    newest: dict[tuple[str, int], int] = {}
    for peer in swarm.peers.values():
        for event in peer.events("round.committed"):
            newest[peer.name, event["stage"]] = event["version"]
    return newest


def _torn(swarm: Swarm) -> list[str]:
    with swarm.database() as db:
        return [detail for (detail,) in db.execute("SELECT detail FROM events WHERE kind = 'stage.torn'")]


def _have_agreed(swarm: Swarm, since: dict[int, int]) -> bool:
    """Tell whether all have come to the same state of every stage, later than some versions."""
    agreed = {
        stage
        for (stage, version), states in swarm.states().items()
        if version > since[stage] + 1 and len(states) == 4 and len(set(states.values())) == 1
    }
    return agreed == set(STAGES)
