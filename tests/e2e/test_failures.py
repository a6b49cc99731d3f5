"""Peers and coordinators that leave, die and come back, one after the other, while a swarm trains.

One swarm of two stages lives through all of it; every test first fills it up to two replicas per stage, so each
can also run alone. Oracles are the processes' exit codes, the peers' own logs and the coordinator's ledger.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from itertools import count
from pathlib import Path

import pytest

from tests.e2e.processes import Command
from tests.e2e.swarm import Swarm

pytestmark = pytest.mark.timeout(240)

STAGES = (0, 1)
ROUNDS = 20_000  # the run is not meant to end
SETTINGS = ("keeping.checkpoint_every=5", "batch.eval_every=1000")
LOST_AFTER_S = "6"
PATIENCE_S = 90.0
DRAIN_S = 15.0
P2PD_S = 5.0
STANDSTILL_S = 15.0  # well beyond `LOST_AFTER_S`


class Life:
    """A swarm that never ends, and the names of its peers."""

    def __init__(self, swarm: Swarm) -> None:
        self.swarm = swarm
        self.founded: list[int] = []
        self._names = (f"p{number}" for number in count())

    def join(self) -> Command:
        """Start one more peer."""
        return self.swarm.start_peer(next(self._names))

    def fill(self) -> None:
        """Have two replicas of each stage, all of them members at work; what an earlier test left dead is not ours."""
        for peer in self.swarm.peers.values():
            peer.is_expected_to_end = peer.code is not None
        living = self.swarm.living()
        for _ in range(2 * len(STAGES) - len(living)):
            self.join()
        self.swarm.wait(
            "two members of each stage",
            lambda: all(len(self.members(stage)) == 2 for stage in STAGES),
            timeout_s=PATIENCE_S,
        )

    def members(self, stage: int) -> list[Command]:
        """Return the living peers that the newest commit of a stage came to."""
        newest = self.swarm.version(stage)
        return [
            peer
            for peer in self.swarm.hosts(stage)
            if any(
                event["version"] >= newest - 1 for event in peer.events("round.committed") if event["stage"] == stage
            )
        ]

    def wait_rounds(self, more: int, *, stage: int) -> None:
        """Wait until a stage has committed so many more rounds."""
        self.swarm.wait_version(self.swarm.version(stage) + more, stage=stage, timeout_s=PATIENCE_S)

    def generations(self) -> list[int]:
        """Return how often each stage was founded."""
        return [stage["generation"] for stage in self.swarm.status()["stages"]]

    def check_ledger(self) -> None:
        """Every closed round, without a gap from the first, has all its microbatches."""
        rounds = self.swarm.rounds()
        tokens = self.swarm.run_dir().manifest.batch.tokens_per_round
        assert [tally.round for tally in rounds] == list(range(len(rounds)))
        assert {(tally.tokens, tally.tasks_lost) for tally in rounds} == {(tokens, 0)}


@pytest.fixture(scope="module")
def life(tmp_path_factory: pytest.TempPathFactory, corpus: Path) -> Iterator[Life]:
    with Swarm(tmp_path_factory.mktemp("life"), corpus=corpus, rounds=ROUNDS, settings=SETTINGS) as swarm:
        swarm.start_coordinator("--start-peers", "4", "--lost-after", LOST_AFTER_S)
        life = Life(swarm)
        life.fill()
        yield life


def test_rounds_go_on_without_a_replica_that_was_killed(life: Life) -> None:
    life.fill()
    victim, survivor = life.members(1)
    victim.kill()
    victim.wait_helpers_end(timeout_s=P2PD_S)
    life.wait_rounds(5, stage=1)
    assert life.members(1) == [survivor]
    life.check_ledger()


def test_a_newcomer_becomes_the_second_replica_with_the_same_state(life: Life) -> None:
    """Oracle: the state digests that both replicas log for the versions they share."""
    life.fill()
    for stage in STAGES:
        life.wait_rounds(3, stage=stage)
    names = {stage: {peer.name for peer in life.members(stage)} for stage in STAGES}
    for (stage, version), by_peer in life.swarm.states().items():
        assert len(set(by_peer.values())) == 1, f"stage {stage}, version {version}: {by_peer}"
    newest = {stage: life.swarm.version(stage) - 1 for stage in STAGES}
    assert all(names[stage] <= set(life.swarm.states()[stage, newest[stage]]) for stage in STAGES)


def test_ctrl_c_drains_and_the_others_go_on(life: Life) -> None:
    life.fill()
    leaver, stayer = life.members(0)
    before = life.swarm.counters()
    leaver.send(signal.SIGINT)
    assert leaver.wait_end(timeout_s=DRAIN_S) == 0, leaver.story()
    life.wait_rounds(4, stage=0)
    assert life.members(0) == [stayer]
    assert any(
        event["kind"] == "peer.left" and leaver.name in event["detail"] for event in life.swarm.status()["events"]
    )
    after = life.swarm.counters()
    assert after.tokens_dropped == before.tokens_dropped
    assert after.double_counted == before.double_counted
    life.check_ledger()


def test_a_second_ctrl_c_ends_a_peer_at_once(life: Life) -> None:
    """The coordinator is held still meanwhile, so that the goodbye to it would take its full three seconds."""
    life.fill()
    peer = life.members(0)[0]
    coordinator = life.swarm.coordinator
    assert coordinator is not None
    coordinator.send(signal.SIGSTOP)
    try:
        peer.send(signal.SIGINT)
        time.sleep(0.3)  # two signals of one kind that are pending together are one
        assert peer.code is None
        peer.send(signal.SIGINT)
        assert peer.wait_end(timeout_s=1.5) == 130
    finally:
        coordinator.send(signal.SIGCONT)
    life.wait_rounds(3, stage=0)


@pytest.mark.long
def test_a_stage_without_replicas_is_restored_on_a_peer_of_another_stage(life: Life) -> None:
    """Nobody joins: one of the two peers of the other stage has to move, in the process that it is."""
    _kill_stage_1(life)
    _check_restored(life)


@pytest.mark.long
def test_a_stage_without_replicas_is_restored_on_a_newcomer(life: Life) -> None:
    """Whoever joins before the dead are missed may be placed elsewhere first; the stage comes back all the same."""
    _kill_stage_1(life)
    life.join()
    _check_restored(life)


def test_rounds_go_on_without_the_coordinator_and_it_catches_up(life: Life) -> None:
    """Oracle: after its restart, the ledger has every round that was trained while it was dead."""
    life.fill()
    coordinator, invite, generations = life.swarm.coordinator, life.swarm.invite, life.generations()
    assert coordinator is not None
    life.swarm.wait("a closed round", life.swarm.rounds)
    coordinator.kill()
    coordinator.wait_helpers_end(timeout_s=P2PD_S)
    life.wait_rounds(8, stage=0)
    closed = life.swarm.rounds()[-1].round
    life.swarm.start_coordinator("--start-peers", "4", "--lost-after", LOST_AFTER_S, again=True)
    assert life.swarm.invite == invite
    newest = max(event["round"] for peer in life.swarm.living() for event in peer.events("round.committed"))
    assert newest > closed + 5
    life.swarm.wait("the missed rounds", lambda: life.swarm.rounds()[-1].round >= newest, timeout_s=PATIENCE_S)
    life.swarm.wait(
        "everybody's beat",
        lambda: sum(peer["presence"] == "live" for peer in life.swarm.status()["peers"]) == 4,
        timeout_s=PATIENCE_S,
    )
    life.wait_rounds(3, stage=0)
    assert life.generations() == generations, "the coordinator founded a stage that was alive"
    life.check_ledger()


def _kill_stage_1(life: Life) -> None:
    """Kill both replicas of stage 1, some rounds after a checkpoint."""
    life.fill()
    life.founded = life.generations()
    life.wait_rounds(6, stage=1)
    for victim in life.swarm.hosts(1):
        victim.kill()


def _check_restored(life: Life) -> None:
    """Oracle: one new charter, of that stage alone, and a loss that does not start again from the top."""
    life.swarm.wait("stage 1 at work", lambda: life.members(1), timeout_s=PATIENCE_S)
    life.wait_rounds(8, stage=1)  # in the first ones it learns again what the other stage has gone on with
    assert life.generations() == [life.founded[0], life.founded[1] + 1]
    losses = [tally.loss for tally in life.swarm.rounds() if tally.loss is not None]
    assert max(losses[-3:]) < losses[0] - 1.0
    life.check_ledger()


def test_averaging_goes_on_while_the_coordinator_stands_still(life: Life) -> None:
    """Oracle: the ledger, which hears of those averagings once the coordinator goes on."""
    life.fill()
    coordinator, before = life.swarm.coordinator, life.swarm.counters().averagings_ok
    generations = life.generations()
    assert coordinator is not None
    coordinator.send(signal.SIGSTOP)
    try:
        time.sleep(STANDSTILL_S)
        version = life.swarm.version(0)
    finally:
        coordinator.send(signal.SIGCONT)
    life.swarm.wait(
        "the standstill's averagings", lambda: life.swarm.counters().averagings_ok >= before + 3, timeout_s=PATIENCE_S
    )
    life.swarm.wait(
        "every round of the standstill", lambda: life.swarm.rounds()[-1].round >= version - 1, timeout_s=PATIENCE_S
    )
    assert life.generations() == generations
    life.check_ledger()
