"""Everything is killed in the middle of a run; started again, it goes on from its newest checkpoint to the end."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from tests.e2e.swarm import Swarm

pytestmark = pytest.mark.timeout(240)

ROUNDS = 80  # at five and more a second: the first checkpoint has to be home long before the end
SETTINGS = ("keeping.checkpoint_every=5", "batch.eval_every=40", "batch.heldout_sequences=16")
FLAGS = ("--lost-after", "5", "--until-finished")


@pytest.mark.long
def test_a_run_that_was_killed_twice_is_trained_to_its_end(tmp_path: Path, corpus: Path) -> None:
    """First one replica dies, then everything, with a checkpoint that is older than what the peers have kept.

    Oracles: the first commits after it, and the ledger at the end.
    """
    with Swarm(tmp_path, corpus=corpus, rounds=ROUNDS, settings=SETTINGS) as swarm:
        swarm.start_coordinator("--start-peers", "4", *FLAGS)
        swarm.start_peers(["p0", "p1", "p2", "p3"])
        swarm.wait_version(3, stage=1)
        swarm.hosts(1)[0].kill()
        coordinator = swarm.coordinator
        assert coordinator is not None
        swarm.wait("a checkpoint", lambda: swarm.run_dir().newest_checkpoint())
        coordinator.send(signal.SIGSTOP)  # it collects no more, so that the peers' own snapshots get ahead of it
        checkpoint = swarm.run_dir().newest_checkpoint()
        assert checkpoint is not None
        swarm.wait_version(checkpoint.round + 7, stage=1)
        for command in (coordinator, *swarm.living()):
            command.kill()
        before = {name: len(peer.events()) for name, peer in swarm.peers.items()}

        swarm.start_coordinator(*FLAGS, again=True)
        swarm.start_peers(["p0", "p1"])
        swarm.wait_finished(timeout_s=150.0)

        for name in ("p0", "p1"):
            later = swarm.peers[name].events()[before[name] :]
            first = next(event for event in later if event["event"] == "round.committed")
            assert (first["round"], first["version"]) == (checkpoint.round, checkpoint.round + 1)
        rounds = swarm.rounds()
        tokens = swarm.run_dir().manifest.batch.tokens_per_round
        assert [tally.round for tally in rounds] == list(range(ROUNDS + 1))  # the last one only evaluates
        assert {tally.tokens for tally in rounds[:-1]} == {tokens}
        assert swarm.counters().tasks_lost == 0
        assert rounds[-1].heldout_loss is not None
        assert rounds[-1].heldout_loss < swarm.run_dir().manifest.data.unigram_loss + 1.0
        final = swarm.run_dir().newest_checkpoint()
        assert final is not None
        assert final.round == ROUNDS
