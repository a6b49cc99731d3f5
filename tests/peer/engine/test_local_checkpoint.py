"""When the state on NVMe becomes the one that this peer continues from, and when it must not.

The store, the engines and the training are real; the clock is played. Oracles: the record in the store, and the digest
that an engine opened on the same folder has.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from peer.codecs import codec
from peer.engine.local_checkpoint import MIN_INTERVAL_S, WEAR_BYTES_PER_S, LocalCheckpoint, Standing
from peer.engine.optimizer import AdamW, OptimizerSpec
from peer.engine.span import SpanEngine
from peer.engine.stage_engine import StageEngine
from peer.engine.stage_state import Step
from peer.memory.backend import CpuBackend
from peer.memory.disk.store import NvmeStore
from peer.memory.executor import open_memory
from peer.memory.placement import Placement, Slots, Tier, all_on_device
from peer.memory.pool import Pool
from peer.memory.units import Inventory, Section
from peer.model.stage import build_stage
from protocol.errors import LocalFault, StorageError
from protocol.ids import Lineage, RoundId, StageId, Version
from tests.peer.engine.placed import ACTIVATION_BYTES, TINY, hidden, homes, in_host
from tests.peer.engine.stored import LINEAGE, beside, build_stored, checkpoint_of, commit, recovered, standing_of

FIRST, SECOND = StageId(1), StageId(2)


class Time:
    """Stands still until it is told to go on."""

    now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


class Span:
    """Stages 1 and 2 over one memory, and the checkpoint of both."""

    def __init__(self, folder: Path) -> None:
        spec = OptimizerSpec()
        models = {stage: build_stage(TINY, num_stages=3, stage=stage) for stage in (FIRST, SECOND)}
        inventory = Inventory([each for model in models.values() for each in model.layouts], spec.name)
        self.memory = open_memory(inventory, beside(inventory), CpuBackend(), nvme=folder)
        self.engines: dict[StageId, StageEngine] = {}
        first = 0
        for stage, model in models.items():
            self.engines[stage] = StageEngine(model, spec, self.memory, first_block=first)
            first += len(model.blocks)
        self.time = Time()
        self.checkpoint = LocalCheckpoint(self.memory, self.engines, now_s=self.time)

    def close(self) -> None:
        self.memory.close()

    def step(self, stage: StageId) -> Standing:
        """Take a step, and return where the stage stands then."""
        self.engines[stage].step(1e-3, scale=1.0)
        return standing_of(self.engines[stage])

    @property
    def record(self) -> Mapping[str, Any] | None:
        store = self.memory.pool.store
        assert store is not None
        return store.committed


@pytest.fixture
def span(tmp_path: Path) -> Iterator[Span]:
    with closing(Span(tmp_path / "s")) as made:
        for engine in made.engines.values():
            engine.initialise(1)
        yield made


def versions(record: Mapping[str, Any] | None) -> list[int] | None:
    return None if record is None else [record[str(stage)]["version"] for stage in (FIRST, SECOND)]


# -- when -------------------------------------------------------------------------------------------------------------


def test_a_commit_waits_until_every_stage_has_been_heard_of(span: Span) -> None:
    """The first note is due for a commit, and says nothing about the other stage."""
    span.time.now_s = 1e6
    span.checkpoint.note(FIRST, span.step(FIRST))
    assert span.record is None
    span.checkpoint.note(SECOND, span.step(SECOND))
    assert versions(span.record) == [1, 1]


def test_stages_may_stand_at_different_versions(span: Span) -> None:
    for _ in range(2):
        span.checkpoint.note(FIRST, span.step(FIRST))
    span.checkpoint.note(SECOND, span.step(SECOND))
    span.checkpoint.commit()
    assert versions(span.record) == [2, 1]


def test_a_step_that_nobody_has_noted_is_not_committed(span: Span) -> None:
    """Nobody knows its round or its lineage. Oracle: the record stays; the next note makes up for it."""
    for stage in span.engines:
        span.checkpoint.note(stage, span.step(stage))
    span.checkpoint.commit()
    standing = span.step(SECOND)
    span.checkpoint.commit()
    assert versions(span.record) == [1, 1]
    span.time.now_s = 1e6
    span.checkpoint.note(SECOND, standing)
    assert versions(span.record) == [1, 2]


def test_commits_are_as_far_apart_as_the_drive_wants_them(span: Span) -> None:
    """Oracle: the interval, by hand. What is written beside weighs; what lives on NVMe does not."""
    interval_s = span.checkpoint._interval_s
    assert interval_s == max(MIN_INTERVAL_S, span.memory.pool.beside_bytes / WEAR_BYTES_PER_S)
    for stage in span.engines:
        span.checkpoint.note(stage, span.step(stage))
    assert versions(span.record) == [1, 1], "the first state is kept at once"
    span.time.now_s = interval_s - 1
    span.checkpoint.note(FIRST, span.step(FIRST))
    assert versions(span.record) == [1, 1]
    span.time.now_s = interval_s
    span.checkpoint.note(FIRST, span.step(FIRST))
    assert versions(span.record) == [3, 1]
    span.time.now_s = 2 * interval_s - 1
    span.checkpoint.note(FIRST, span.step(FIRST))
    assert versions(span.record) == [3, 1]


def test_much_beside_the_drive_makes_commits_rare(span: Span, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: 20 GB take a day's allowance of 50 GB two and a half times a day."""
    monkeypatch.setattr(Pool, "beside_bytes", 20 * 10**9)
    assert LocalCheckpoint(span.memory, span.engines)._interval_s == pytest.approx(86_400 / 2.5)


def test_a_state_that_is_committed_is_not_written_again(span: Span, tmp_path: Path) -> None:
    """Neither on closing nor after a restart. Oracle: bytes and commits as the store counts them."""

    def counts(of: Span) -> tuple[int, int]:
        store = of.memory.pool.store
        assert store is not None
        return store.statistics().bytes_written, store.statistics().commits

    standings = {stage: span.step(stage) for stage in span.engines}
    for stage, standing in standings.items():
        span.checkpoint.note(stage, standing)
    before = counts(span)
    assert before[1] == 1
    span.time.now_s = 1e6
    span.checkpoint.note(FIRST, standings[FIRST])
    span.checkpoint.commit()
    assert counts(span) == before
    span.checkpoint.note(FIRST, replace(standings[FIRST], round=RoundId(7)))  # the same bytes, told otherwise
    assert counts(span)[1] == 2
    span.checkpoint.note(FIRST, span.step(FIRST))
    span.checkpoint.commit()
    assert counts(span)[1] == 3
    span.close()
    with closing(Span(tmp_path / "s")) as after:
        assert len(after.checkpoint.recover()) == 2
        after.checkpoint.commit()
        assert counts(after) == (0, 0)


# -- what must not be committed ---------------------------------------------------------------------------------------


def test_a_state_that_has_just_been_replaced_is_not_committed(span: Span) -> None:
    """Even where its version happens to be that of the state before: its lineage is another. Oracle: the old record."""
    for stage in span.engines:
        span.checkpoint.note(stage, span.step(stage))
    span.checkpoint.commit()
    span.engines[FIRST].initialise(9)
    span.engines[FIRST].step(1e-3, scale=1.0)
    before = span.memory.pool.store
    assert before is not None
    commits = before.statistics().commits
    span.checkpoint.commit()
    assert before.statistics().commits == commits


@pytest.mark.parametrize("how", ["after", "inside"])
def test_a_step_that_fails_half_way_is_not_committed(
    how: str, span: Span, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Some shards are a version ahead then, and the engine still names the old one. Oracle: what a new engine finds."""
    for stage in span.engines:
        span.checkpoint.note(stage, span.step(stage))
    span.checkpoint.commit()
    committed = [engine.state_digest() for engine in span.engines.values()]
    step, calls = AdamW.step, iter([False, True])

    def failing(optimizer: AdamW, *arguments: Any, **options: Any) -> None:
        if next(calls):
            raise LocalFault("the machine is on fire.")
        step(optimizer, *arguments, **options)

    engine = span.engines[FIRST]
    _, ticket = engine.forward(hidden(1))
    ways: dict[str, Callable[[], object]] = {
        "after": lambda: engine.step(1e-3, scale=1.0),
        "inside": lambda: engine.backward_wave([(ticket, hidden(2))], step=Step(1e-3, 1.0)),
    }
    with monkeypatch.context() as patch:
        patch.setattr(AdamW, "step", failing)
        with pytest.raises(LocalFault):
            ways[how]()
    span.checkpoint.commit()  # as on closing
    span.close()
    with closing(Span(tmp_path / "s")) as after:
        assert {stage: one.version for stage, one in after.checkpoint.recover().items()} == {FIRST: 1, SECOND: 1}
        assert [engine.state_digest() for engine in after.engines.values()] == committed


def test_a_step_that_the_budget_refuses_leaves_a_state_that_can_be_committed(
    span: Span, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It pauses the peer, which commits on closing. Oracle: the record."""
    for stage in span.engines:
        span.checkpoint.note(stage, span.step(stage))

    def refuse(*_: object) -> None:
        raise StorageError("spent")

    with monkeypatch.context() as patch:
        patch.setattr(NvmeStore, "require_budget", refuse)
        with pytest.raises(StorageError, match="spent"):
            span.step(FIRST)
    span.checkpoint.commit()
    assert versions(span.record) == [1, 1]


def test_a_commit_that_fails_costs_the_checkpoint_and_not_the_training(
    span: Span, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Oracle: no error; the old record, also after a restart; training goes on and is committed when the disk is well
    again, an interval later."""
    for stage in span.engines:
        span.checkpoint.note(stage, span.step(stage))
    span.checkpoint.commit()
    interval_s = span.checkpoint._interval_s

    def broken(*_: object) -> None:
        raise StorageError("the disk is full")

    with monkeypatch.context() as patch:
        patch.setattr(NvmeStore, "commit", broken)
        span.time.now_s = interval_s
        span.checkpoint.note(FIRST, span.step(FIRST))
    assert versions(span.record) == [1, 1]
    span.checkpoint.note(FIRST, span.step(FIRST))
    assert versions(span.record) == [1, 1]
    span.time.now_s = 2 * interval_s
    span.checkpoint.note(FIRST, span.step(FIRST))
    assert versions(span.record) == [4, 1]


# -- coming back ------------------------------------------------------------------------------------------------------


def test_standings_come_back_with_the_state(span: Span, tmp_path: Path) -> None:
    """Oracle: what was noted, field by field; the engines' own counts; the digests."""
    noted = {}
    for number, (stage, engine) in enumerate(span.engines.items()):
        for _ in range(number + 1):
            engine.step(1e-3, scale=1.0)
        noted[stage] = Standing(engine.version, RoundId(40 + number), Lineage(bytes([number]) * 32))
        span.checkpoint.note(stage, noted[stage])
    span.checkpoint.commit()
    digests = [engine.state_digest() for engine in span.engines.values()]
    span.close()
    with closing(Span(tmp_path / "s")) as after:
        assert after.checkpoint.recover() == noted
        assert [(each.version, each.steps) for each in after.engines.values()] == [(1, 1), (2, 2)]
        assert [engine.state_digest() for engine in after.engines.values()] == digests
        after.checkpoint.commit()  # nothing has changed: it is still known
        assert versions(after.record) == [1, 2]


@pytest.mark.parametrize(
    "record",
    [
        {},
        {"1": 7},
        {"1": {"version": 1, "round": 1, "steps": 1}},
        {"1": {"version": "1", "round": 1, "steps": 1, "lineage": "00" * 32}},
        {"1": {"version": 1, "round": 1, "steps": 1, "lineage": "no hex"}},
        {"1": {"version": 1, "round": 1, "steps": 1, "lineage": 3}},
        {"2": {"version": 1, "round": 1, "steps": 1, "lineage": "00" * 32}},
    ],
)
def test_a_record_of_another_kind_is_none(record: dict[str, Any], tmp_path: Path) -> None:
    """It is whole, so another version of Handcar wrote it. Oracle: no standing, and an engine at version 0."""
    with closing(build_stored(1, beside, tmp_path / "s")) as engine:
        engine._memory.commit(record)
    with closing(build_stored(1, beside, tmp_path / "s", seed=None)) as engine:
        assert recovered(engine) is None
        assert engine.version == 0


@pytest.mark.parametrize("placement", [all_on_device, in_host])
def test_without_nvme_nothing_is_kept(placement: Callable[[Inventory], Placement]) -> None:
    """Oracle: no store, no standing, and no error."""
    engine = StageEngine.build(TINY, num_stages=3, stage=1, optimizer=OptimizerSpec(), placement=placement, seed=1)
    with closing(engine):
        checkpoint = checkpoint_of(engine, now_s=lambda: 1e9)
        assert checkpoint.recover() == {}
        checkpoint.note(FIRST, standing_of(engine))
        checkpoint.commit()


def test_a_store_for_activations_alone_keeps_no_state(tmp_path: Path) -> None:
    """There is a store then, and what it holds is no state: a record in it would promise one. Oracle: nothing is found
    by the next process, which has to begin as if there were no store."""

    def engine() -> StageEngine:
        return StageEngine.build(
            TINY,
            num_stages=3,
            stage=1,
            optimizer=OptimizerSpec(),
            placement=in_host,
            seed=1,
            nvme=tmp_path / "s",
            inputs=dict.fromkeys(range(1), Tier.NVME),
            places={Tier.NVME: [ACTIVATION_BYTES] * 4},
        )

    with closing(engine()) as before:
        checkpoint = checkpoint_of(before)
        before.step(1e-3, scale=1.0)
        checkpoint.note(FIRST, standing_of(before))
        checkpoint.commit()
    with closing(engine()) as after:
        assert recovered(after) is None


def test_gradients_alone_on_nvme_keep_the_state_too(tmp_path: Path) -> None:
    """Oracle: the digest after a restart."""

    def placement(inventory: Inventory) -> Placement:
        return Placement(
            homes=homes(inventory, lambda unit: Tier.NVME if unit.section is Section.GRADIENT else Tier.DEVICE),
            slots=Slots(gradient=1),
        )

    with closing(build_stored(1, placement, tmp_path / "s")) as before:
        before.step(1e-3, scale=1.0)
        commit(before)
        digest = before.state_digest()
    with closing(build_stored(1, placement, tmp_path / "s", seed=None)) as after:
        assert recovered(after) == 1
        assert after.state_digest() == digest


# -- as part of a span ------------------------------------------------------------------------------------------------


def test_a_span_commits_on_closing_and_its_next_life_begins_there(tmp_path: Path) -> None:
    """Oracle: the digest; `resumed`, which decides what is drawn anew and what is asked for in the network."""

    def span_engine() -> SpanEngine:
        engine = build_stored(1, beside, tmp_path / "s", seed=None)
        return SpanEngine(
            {FIRST: engine},
            codec=codec("fp32"),
            hidden_size=int(TINY["hidden_size"]),
            num_stages=3,
            microbatch=(2, 8),
            memory=engine._memory,
        )

    first = span_engine()
    assert first.resumed == {}
    engine = first.engines[FIRST]
    engine.initialise(3)
    engine.step(1e-3, scale=1.0)
    first.note_standing(FIRST, standing_of(engine))
    digest = engine.state_digest()
    first.close()
    second = span_engine()
    assert second.resumed == {FIRST: Standing(Version(1), RoundId(1), LINEAGE)}
    assert second.engines[FIRST].state_digest() == digest
    second.close()
