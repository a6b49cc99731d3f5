"""A swarm computes what one process computes: losses, weights, the exported model.

Oracle: `plain_loop.py`, a single process that trains transformers' own model with torch's AdamW. Everything is
fp32 here (gradients, activations, moments), so what is left are orders of summation.
"""

from __future__ import annotations

import ast
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from coordinator.export import read_tensor_header
from protocol.architecture import stage_blocks
from protocol.layout import BlockKind
from tests.e2e.processes import run_to_end
from tests.e2e.reference import PLAIN_LOOP, ask_plain_loop, heldout_spec, training_spec
from tests.e2e.swarm import Swarm

pytestmark = pytest.mark.timeout(300)

ROUNDS = 20
FEW_ROUNDS = 6
SETTINGS = (
    "batch.microbatches_per_round=8",  # so that each of two replicas of a stage has work in every round
    "batch.eval_every=10",
    "batch.heldout_sequences=32",
    "keeping.checkpoint_every=10",
    "optimizer.clip=0.5",  # binding in some rounds and not in others, or the rule would not be tried
    "averaging.codec=fp32",
    "averaging.activation_codec=fp32",
)
EIGHT_BIT = "optimizer.name=adamw8bit"
THIRTY_TWO_BIT = "optimizer.name=adamw32"
RUN_TIMEOUT_S = 200.0


@dataclass(frozen=True)
class Trained:
    """A swarm whose run is over."""

    swarm: Swarm
    export: Path

    @property
    def losses(self) -> list[float]:
        return [tally.loss for tally in self.swarm.rounds() if tally.loss is not None]

    @property
    def heldout_loss(self) -> float:
        loss = self.swarm.rounds()[-1].heldout_loss
        assert loss is not None
        return loss


@dataclass(frozen=True)
class Yardstick:
    """What one process says about the same run."""

    losses: list[float]
    clip_scales: list[list[float]]
    heldout_loss: float
    exported_heldout_loss: float
    overlapping_losses: list[float]


@contextmanager
def _training(folder: Path, corpus: Path, *, peers: int, optimizer: str) -> Iterator[Swarm]:
    """Start a swarm that trains until it is finished."""
    with Swarm(folder, corpus=corpus, rounds=ROUNDS, settings=(*SETTINGS, optimizer)) as swarm:
        swarm.start_coordinator("--start-peers", str(peers), "--until-finished")
        swarm.start_peers([f"p{number}" for number in range(peers)])
        yield swarm


def _finish(swarm: Swarm) -> Trained:
    """Wait for the end, and export the model."""
    swarm.wait_finished(timeout_s=RUN_TIMEOUT_S)
    export = swarm.folder / "export"
    flags = ["export", str(swarm.directory), "--to", str(export)]
    run_to_end("coordinator", flags, name="export", folder=swarm.folder, timeout_s=60.0)
    return Trained(swarm, export)


@pytest.fixture(scope="module")
def small_swarms(tmp_path_factory: pytest.TempPathFactory, corpus: Path) -> Iterator[tuple[Trained, Trained]]:
    """Two swarms of one replica per stage at a time (a round waits more than it computes): 32 and 8 bits."""
    folder = tmp_path_factory.mktemp("small")
    with (
        _training(folder / "one", corpus, peers=2, optimizer=THIRTY_TWO_BIT) as one,
        _training(folder / "eight", corpus, peers=2, optimizer=EIGHT_BIT) as eight,
    ):
        yield _finish(one), _finish(eight)


@pytest.fixture(scope="module")
def one_replica(small_swarms: tuple[Trained, Trained]) -> Trained:
    return small_swarms[0]


@pytest.fixture(scope="module")
def eight_bits(small_swarms: tuple[Trained, Trained]) -> Trained:
    return small_swarms[1]


@pytest.fixture(scope="module")
def two_replicas(tmp_path_factory: pytest.TempPathFactory, corpus: Path) -> Iterator[Trained]:
    with _training(tmp_path_factory.mktemp("two"), corpus, peers=4, optimizer=THIRTY_TWO_BIT) as swarm:
        yield _finish(swarm)


@pytest.fixture(scope="module")
def overlapping(tmp_path_factory: pytest.TempPathFactory, corpus: Path) -> Iterator[Trained]:
    """Stages 0 and 1 on one peer, 1 and 2 on another: many tasks enter the second span behind its first stage."""
    folder = tmp_path_factory.mktemp("overlapping")
    settings = (*SETTINGS, THIRTY_TWO_BIT)
    with Swarm(folder, corpus=corpus, rounds=FEW_ROUNDS, stages=3, settings=settings) as swarm:
        swarm.start_coordinator("--start-peers", "2", "--until-finished")
        for name, stages in (("front", ("0", "1")), ("back", ("1", "2"))):
            swarm.start_peer(name, *(word for stage in stages for word in ("--stage", stage)))
        yield _finish(swarm)


@pytest.fixture(scope="module")
def yardstick(tmp_path_factory: pytest.TempPathFactory, one_replica: Trained, overlapping: Trained) -> Yardstick:
    """What one process says about all of them: it takes longer to start than to train."""
    folder = tmp_path_factory.mktemp("yardstick")
    run = one_replica.swarm.run_dir()
    trained, exported, three_stages = ask_plain_loop(
        folder,
        training_spec(run, folder / "two-stages"),
        heldout_spec(run, one_replica.export),
        training_spec(overlapping.swarm.run_dir(), folder / "three-stages"),
    )
    return Yardstick(
        losses=trained["losses"],
        clip_scales=trained["clip_scales"],
        heldout_loss=trained["heldout_loss"],
        exported_heldout_loss=exported["heldout_loss"],
        overlapping_losses=three_stages["losses"],
    )


def test_the_yardstick_imports_nothing_of_the_project() -> None:
    """Oracle: its syntax tree; it also runs isolated, without our folder on its path."""
    tree = ast.parse(PLAIN_LOOP.read_text(encoding="utf-8"))
    imported = {name.name for node in ast.walk(tree) if isinstance(node, ast.Import) for name in node.names}
    imported |= {node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert not {name.split(".")[0] for name in imported} & {"peer", "coordinator", "protocol", "tests"}


def test_two_stages_follow_one_process(one_replica: Trained, yardstick: Yardstick) -> None:
    """Oracle: the plain loop's loss of every round. The project promises 1e-4 and reaches 6e-8; 1e-5 is asked here,
    because a clip threshold that is wrong by 2 % already makes 4e-5."""
    assert len(yardstick.losses) == ROUNDS
    assert yardstick.losses[-1] < yardstick.losses[0] - 0.5, "a run that learns nothing compares nothing"
    scales = [scale for scales in yardstick.clip_scales for scale in scales]
    assert min(scales) < 0.9, "clipping never took place"
    assert one_replica.losses == pytest.approx(yardstick.losses, rel=1e-5)
    assert one_replica.heldout_loss == pytest.approx(yardstick.heldout_loss, rel=1e-5)


def test_two_replicas_of_each_stage_follow_one_process(two_replicas: Trained, yardstick: Yardstick) -> None:
    """Oracle: the plain loop's loss of every round. The project promises 1e-3 and reaches 5e-8."""
    assert two_replicas.losses == pytest.approx(yardstick.losses, rel=1e-4)
    assert two_replicas.heldout_loss == pytest.approx(yardstick.heldout_loss, rel=1e-4)


def test_spans_that_overlap_follow_one_process(overlapping: Trained, yardstick: Yardstick) -> None:
    """Oracle: the plain loop's loss of every round, and both peers' part in the stage that they share."""
    assert overlapping.losses == pytest.approx(yardstick.overlapping_losses, rel=1e-4)
    assert overlapping.swarm.counters().double_counted == 0
    shared = [by_peer for (stage, _), by_peer in overlapping.swarm.states().items() if stage == 1]
    assert len(shared) == FEW_ROUNDS
    assert all(len(by_peer) == 2 and len(set(by_peer.values())) == 1 for by_peer in shared)


def test_replicas_hold_the_same_bytes_at_every_version(two_replicas: Trained) -> None:
    """Oracle: the SHA-256 of weights and optimizer state that every replica takes of its own state."""
    states = two_replicas.swarm.states()
    assert set(states) == {(stage, version) for stage in (0, 1) for version in range(1, ROUNDS + 1)}
    for place, by_peer in states.items():
        assert len(by_peer) == 2, f"stage and version {place}: {by_peer}"
        assert len(set(by_peer.values())) == 1, f"stage and version {place}: {by_peer}"
    digests = [next(iter(by_peer.values())) for by_peer in states.values()]
    assert len(set(digests)) == len(digests), "a state that did not change from version to version"


def test_both_replicas_of_a_stage_had_work(two_replicas: Trained) -> None:
    """Oracle: the peers' own reports; without this the averaging above would have averaged nothing."""
    assert all(peer["tokens"] > 0 for peer in two_replicas.swarm.status()["peers"])
    assert two_replicas.swarm.counters().averagings_ok == 2 * ROUNDS


def test_nothing_was_lost_or_counted_twice(one_replica: Trained, two_replicas: Trained) -> None:
    """Oracle: the plan of the run, against the ledger."""
    for trained in (one_replica, two_replicas):
        counters = trained.swarm.counters()
        tokens = trained.swarm.run_dir().manifest.batch.tokens_per_round
        assert (counters.tokens, counters.tasks_lost) == (ROUNDS * tokens, 0)
        assert (counters.tokens_dropped, counters.double_counted) == (0, 0)


def test_held_out_loss_is_that_of_the_exported_model(one_replica: Trained, yardstick: Yardstick) -> None:
    """Oracle: transformers, on what `coordinator export` wrote."""
    assert one_replica.heldout_loss == pytest.approx(yardstick.exported_heldout_loss, abs=1e-3)


def test_8_bit_adamw_ends_where_32_bit_adamw_ends(eight_bits: Trained, one_replica: Trained) -> None:
    """Oracle: the 32-bit run of the same seed, to 1 % in held-out loss; the checkpoint shows that bits were saved: two
    moments of 8 or 32 bit per element of a layer, and of 32 bit elsewhere."""
    assert eight_bits.heldout_loss == pytest.approx(one_replica.heldout_loss, rel=0.01)
    layers, others = _moment_bytes_per_element(eight_bits)
    assert 2.03 < layers < 2.2  # a scale per 256 elements, and the vectors in 32 bit
    assert others == 8
    assert _moment_bytes_per_element(one_replica) == (8, 8)


def _moment_bytes_per_element(trained: Trained) -> tuple[float, float]:
    """Return what the newest checkpoint's moments take per element: of layers, and of everything else."""
    run = trained.swarm.run_dir()
    checkpoint = run.newest_checkpoint()
    assert checkpoint is not None
    taken, elements = Counter[bool](), Counter[bool]()
    for stage in (0, 1):
        header = read_tensor_header(checkpoint.file(stage, "optimizer"))
        for block in stage_blocks(run.manifest.model.config, 2, stage):
            for shard in block.shards():
                is_layer = block.kind is BlockKind.LAYER
                taken[is_layer] += header.tensors[f"optimizer.{shard.name}"].num_bytes
                elements[is_layer] += shard.num_elements
        assert len(header.tensors) == 1 + sum(
            len(block.shards()) for block in stage_blocks(run.manifest.model.config, 2, stage)
        )
    return taken[True] / elements[True], taken[False] / elements[False]
