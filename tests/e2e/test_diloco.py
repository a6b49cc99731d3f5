"""Replicas that take steps of their own and average how far they have come.

Oracles: each other's hashes, transformers on the exported model, and for one replica with an outer step that changes
nothing the plain loop.
"""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest

from tests.e2e.processes import run_to_end
from tests.e2e.reference import ask_plain_loop, heldout_spec, training_spec
from tests.e2e.swarm import Swarm

pytestmark = pytest.mark.timeout(240)

ROUNDS = 12
PLAIN_ROUNDS = 6
SETTINGS = (
    "averaging.mode=diloco",
    "batch.microbatches_per_round=8",
    "batch.heldout_sequences=32",
    "keeping.checkpoint_every=4",
)
RUN_TIMEOUT_S = 150.0


@pytest.mark.parametrize(
    "more",
    [
        ('averaging.stage_codecs=["int8","auto"]',),
        pytest.param(
            ("averaging.codec=sparse", "averaging.overlap=true", "averaging.fragments=3"), marks=pytest.mark.long
        ),
    ],
    ids=["codecs", "sparse-overlap-fragments"],
)
def test_replicas_share_an_anchor_and_nothing_else(more: tuple[str, ...], tmp_path: Path, corpus: Path) -> None:
    """Two stages of two replicas. Oracles: the hash of anchor and velocity at every version; the exported model."""
    settings = (*SETTINGS, *more, f"batch.eval_every={ROUNDS}")
    with Swarm(tmp_path, corpus=corpus, rounds=ROUNDS, settings=settings) as swarm:
        swarm.start_coordinator("--start-peers", "4", "--until-finished")
        swarm.start_peers(["p0", "p1", "p2", "p3"])
        swarm.wait_finished(timeout_s=RUN_TIMEOUT_S)
        states = swarm.states()
        assert set(states) == {(stage, version) for stage in (0, 1) for version in range(1, ROUNDS + 1)}
        assert all(len(by_peer) == 2 and len(set(by_peer.values())) == 1 for by_peer in states.values())
        codecs: dict[int, set[str]] = {0: set(), 1: set()}
        for event in itertools.chain.from_iterable(peer.events("round.committed") for peer in swarm.peers.values()):
            codecs[event["stage"]].add(event["codec"])
        assert codecs[0] == ({"sparse"} if "averaging.codec=sparse" in more else {"int8"})
        assert codecs[1] == {"sparse"} or "int8" in codecs[1] <= {"fp16", "int8", "int4", "sparse"}, (
            "auto begins with int8"
        )
        counters = swarm.counters()
        assert (counters.tasks_lost, counters.tokens_dropped, counters.double_counted) == (0, 0, 0)
        assert counters.averagings_ok == 2 * ROUNDS
        export = tmp_path / "export"
        flags = ["export", str(swarm.directory), "--to", str(export)]
        run_to_end("coordinator", flags, name="export", folder=tmp_path, timeout_s=60.0)
        (plain,) = ask_plain_loop(tmp_path, heldout_spec(swarm.run_dir(), export))
        *trained, last = swarm.rounds()
        assert last.heldout_loss == pytest.approx(plain["heldout_loss"], abs=1e-3)
        assert trained[0].loss is not None
        assert trained[-1].loss is not None
        assert trained[-1].loss < trained[0].loss - 0.3


def test_alone_with_one_step_per_round_it_is_plain_training(tmp_path: Path, corpus: Path) -> None:
    """An outer step of rate 1 without momentum puts the anchor where the only replica is. Oracle: the plain loop."""
    settings = (
        *SETTINGS,
        "averaging.codec=fp32",
        "averaging.microbatches_per_step=8",
        "averaging.outer_learning_rate=1.0",
        "averaging.outer_momentum=0.0",
        f"batch.eval_every={PLAIN_ROUNDS}",
    )
    with Swarm(tmp_path, corpus=corpus, rounds=PLAIN_ROUNDS, settings=settings) as swarm:
        swarm.start_coordinator("--start-peers", "2", "--until-finished")
        swarm.start_peers(["p0", "p1"])
        swarm.wait_finished(timeout_s=RUN_TIMEOUT_S)
        (plain,) = ask_plain_loop(tmp_path, training_spec(swarm.run_dir(), tmp_path / "initial"))
        *trained, last = swarm.rounds()
        assert [tally.loss for tally in trained] == pytest.approx(plain["losses"], rel=1e-4)
        assert last.heldout_loss == pytest.approx(plain["heldout_loss"], rel=1e-4)
        assert plain["losses"][-1] < plain["losses"][0], "a run that learns nothing compares nothing"


@pytest.mark.long
def test_gradients_that_are_averaged_meanwhile_come_a_round_late(tmp_path: Path, corpus: Path) -> None:
    """Two stages of two replicas, overlapping. Oracle: the plain loop that takes each step a round late."""
    settings = ("averaging.overlap=true", "averaging.codec=fp32", *SETTINGS[1:], f"batch.eval_every={PLAIN_ROUNDS}")
    with Swarm(tmp_path, corpus=corpus, rounds=PLAIN_ROUNDS, settings=settings) as swarm:
        swarm.start_coordinator("--start-peers", "4", "--until-finished")
        swarm.start_peers(["p0", "p1", "p2", "p3"])
        swarm.wait_finished(timeout_s=RUN_TIMEOUT_S)
        spec = training_spec(swarm.run_dir(), tmp_path / "initial")
        late, prompt = ask_plain_loop(tmp_path, {**spec, "delayed": True}, spec)
        *trained, last = swarm.rounds()
        assert [tally.loss for tally in trained] == pytest.approx(late["losses"], rel=1e-4)
        assert last.heldout_loss == pytest.approx(late["heldout_loss"], rel=1e-4)
        assert late["losses"] != pytest.approx(prompt["losses"], rel=1e-3), "or the delay makes no difference"
        assert all(len(set(by_peer.values())) == 1 for by_peer in swarm.states().values())
