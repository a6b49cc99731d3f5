"""Anchor, drift and turns against the formulas in `peer/engine/anchored.py`, done by hand on whole tensors."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from peer.codecs import codec
from peer.engine.anchored import Mean
from peer.engine.optimizer import OptimizerSpec
from peer.engine.outer import OuterSpec
from peer.engine.stage_engine import StageEngine
from peer.memory.moments import MasterName
from peer.memory.placement import all_on_device
from peer.memory.units import OUTER, Section, Unit
from protocol import layout as layouts
from protocol.control import STATE_PARTS
from protocol.ids import RoundId, Version
from tests.peer.engine.placed import PLACEMENTS, TINY, MakePlacement, options_of, train

SPEC = OuterSpec(learning_rate=0.7, momentum=0.9)
PLAIN = OuterSpec(learning_rate=1.0, momentum=0.0)
PIECE = 3000  # a mean comes in pieces, the last of which is short
ANCHOR, VELOCITY, ERROR, SYNC = OUTER


@pytest.fixture(autouse=True)
def _short_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several shards per block, one of them short."""
    monkeypatch.setattr(layouts, "SHARD_ELEMENTS", 8192)


def build(
    placement: MakePlacement = all_on_device,
    *,
    outer: OuterSpec | None = SPEC,
    master: MasterName = "fp32",
    **options: Any,
) -> StageEngine:
    return StageEngine.build(
        TINY,
        num_stages=3,
        stage=1,
        optimizer=OptimizerSpec(master=master),
        seed=2,
        placement=placement,
        outer=outer,
        **options,
    )


def section(engine: StageEngine, which: Section) -> list[Tensor]:
    """Return copies of a section's shards."""
    units: Iterator[Unit] = engine._units(which)
    return [engine._memory.look(unit).view(torch.float32).clone() for unit in units]


def weights(engine: StageEngine) -> list[Tensor]:
    """Return copies of the weights by shard, from what other people may ask for."""
    found: list[Tensor] = []
    engine._read_shards(lambda block, layout, weights, moments: found.append(weights.clone()))
    return found


def contributions(engine: StageEngine) -> list[Tensor]:
    assert engine.anchored is not None
    return [engine.anchored.contribution(number) for number in range(len(engine.shards))]


def drawn(engine: StageEngine, seed: int) -> list[Tensor]:
    """Draw a mean drift: what other replicas would have brought about. Padding has numbers too."""
    generator = torch.Generator().manual_seed(seed)
    return [1e-3 * torch.randn(shard.num_elements, generator=generator) for shard in engine.shards]


def not_sent(values: Tensor) -> Tensor:
    return values - codec("int8").decode(codec("int8").encode(values), len(values))


def mean_of(
    drift: list[Tensor], rest: Callable[[Tensor], Tensor] | None = not_sent, *, shards: tuple[int, ...] | None = None
) -> Mean:
    def pieces(number: int) -> Iterator[tuple[slice, Tensor]]:
        for start in range(0, len(drift[number]), PIECE):
            part = slice(start, min(start + PIECE, len(drift[number])))
            yield part, drift[number][part].clone()

    return Mean(pieces, rest, shards)


class ByHand:
    """The formulas on whole tensors, shard by shard, from the state of an engine."""

    def __init__(self, engine: StageEngine) -> None:
        self.anchor = weights(engine)
        self.sync = weights(engine)
        self.velocity = [torch.zeros_like(shard) for shard in self.anchor]
        self.error = [torch.zeros_like(shard) for shard in self.anchor]
        self.padding = [shard.padding for shard in engine.shards]

    def contribution(self) -> list[Tensor]:
        return [(a - s) + e for a, s, e in zip(self.anchor, self.sync, self.error, strict=True)]

    def turn(
        self,
        now: list[Tensor],
        drift: list[Tensor] | None,
        *,
        is_counted: bool = True,
        shards: tuple[int, ...] | None = None,
        sync: tuple[int, ...] | None = None,
    ) -> list[Tensor]:
        """Return the weights after a turn from weights `now`."""
        if drift is not None:
            sent = self.contribution()
            now = [each.clone() for each in now]
            for number, mean in enumerate(drift):
                if shards is not None and number not in shards:
                    continue
                if is_counted:
                    pieces = [not_sent(piece) for piece in torch.split(sent[number], PIECE)]
                    self.error[number] = torch.cat(pieces)
                self.velocity[number] = self.velocity[number] * 0.9 + mean
                self.anchor[number] = self.anchor[number] - (self.velocity[number] * 0.9 + mean) * 0.7
                for start, end in self.padding[number]:
                    for each in (self.anchor, self.velocity, self.error):
                        each[number][start:end] = 0.0
                now[number] = (now[number] - self.sync[number]) + self.anchor[number]
        turned = () if drift is None else range(len(now)) if shards is None else shards
        for number, shard in enumerate(now):
            if number in turned or sync is None or number in sync:
                self.sync[number] = shard
        return now


def same(ours: list[Tensor], theirs: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_turns_do_what_the_formulas_say(placement: str, tmp_path: Path) -> None:
    """A round whose mean comes a round late, one that came to nothing, one without us. Oracle: `ByHand`, bit by bit."""
    engine = build(PLACEMENTS[placement], **options_of(placement, tmp_path))
    with closing(engine):
        hand = ByHand(engine)
        plan: list[tuple[int | None, bool]] = [(None, True), (1, True), (None, True), (2, False), (3, True)]
        for turn, (seed, is_counted) in enumerate(plan):
            train(engine, versions=range(turn, turn + 1))
            drift = None if seed is None else drawn(engine, seed)
            expected = hand.turn(weights(engine), drift, is_counted=is_counted)
            engine.turn(None if drift is None else mean_of(drift, not_sent if is_counted else None))
            assert same(weights(engine), expected)
            assert same(contributions(engine), hand.contribution())
            for which, values in ((ANCHOR, hand.anchor), (VELOCITY, hand.velocity), (ERROR, hand.error)):
                assert same(section(engine, which), values), which
        assert engine.version == 3


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_a_fragment_is_turned_and_the_rest_drifts_on(placement: str, tmp_path: Path) -> None:
    """Three fragments whose means come a round late, one void round, all of it at the end. Oracle: `ByHand`."""
    outer = replace(SPEC, fragments=3, last_round=RoundId(6))
    engine = build(PLACEMENTS[placement], outer=outer, **options_of(placement, tmp_path))
    with closing(engine):
        hand = ByHand(engine)
        void, waiting = 2, tuple[int, ...]()
        for number in range(8):
            if number < 7:
                train(engine, versions=range(number, number + 1))
            shards, drift = waiting, drawn(engine, number) if waiting else None
            version = Version(engine.version + 1 + (drift is not None))
            waiting = () if number in (void, 7) else engine.due(version, RoundId(number))
            expected = hand.turn(weights(engine), drift, shards=shards, sync=waiting)
            engine.turn(None if drift is None else mean_of(drift, shards=shards), sync=waiting)
            assert same(weights(engine), expected)
            assert same(contributions(engine), hand.contribution())
            for which, values in ((ANCHOR, hand.anchor), (VELOCITY, hand.velocity), (ERROR, hand.error)):
                assert same(section(engine, which), values), which
            assert engine.state_digest() == fresh_digest(engine)
        assert engine.version == 6
        assert len(shards) == len(engine.shards), "the last turn has everything"


@pytest.mark.parametrize("fragments", [1, 2])
def test_alone_at_rate_one_it_is_plain_training(fragments: int) -> None:
    """One local step per round, no momentum, nothing lost on the wire. Oracle: the same stage without an anchor."""
    ours, plain = build(outer=replace(PLAIN, fragments=fragments)), build(outer=None)
    with closing(ours), closing(plain):
        for version in range(3):
            for engine in (ours, plain):
                train(engine, versions=range(version, version + 1))
            ours.turn(None)
            shards = ours.due(Version(version + 1), RoundId(version))
            ours.turn(mean_of(contributions(ours), torch.zeros_like, shards=shards))
            for a, b in zip(weights(ours), weights(plain), strict=True):
                torch.testing.assert_close(
                    a, b, rtol=1e-5, atol=1e-7 if fragments == 1 else 1e-4
                )  # sums in another order
        assert not same(weights(ours), weights(build(outer=PLAIN)))


def test_open_microbatches_are_recomputed_at_the_merged_weights() -> None:
    """Oracle: an engine that had those weights when the microbatch came in."""
    early, late = build(), build()
    inputs = torch.randn(2, 8, int(TINY["hidden_size"]), generator=torch.Generator().manual_seed(5))
    with closing(early), closing(late):
        drift = drawn(early, 1)
        _, ticket = early.forward(inputs)
        for engine in (early, late):
            engine.turn(None)
            engine.turn(mean_of(drift))
        _, other = late.forward(inputs)
        ours, theirs = early.backward(ticket, inputs), late.backward(other, inputs)
        assert ours is not None
        assert theirs is not None
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("placement", ["device", "host"])
def test_what_is_measured_is_the_anchor(placement: str) -> None:
    """Oracle: the same engine before its local steps, when anchor and weights were the same."""
    engine = build(PLACEMENTS[placement])
    inputs = torch.randn(2, 8, int(TINY["hidden_size"]), generator=torch.Generator().manual_seed(5))
    with closing(engine):
        before = engine.forward_only(inputs)
        train(engine, versions=range(1))
        trained, _ = engine.forward(inputs)
        assert torch.equal(engine.forward_only(inputs), before)
        assert not torch.equal(trained, before)


def test_measuring_holds_one_block_of_the_anchor() -> None:
    """Blocks refer to what they were last bound to. Oracle: how many buffers that is after a pass."""
    engine = build()
    with closing(engine):
        engine.forward_only(torch.randn(2, 8, int(TINY["hidden_size"])))
        storages = {block._weights.untyped_storage().data_ptr() for block in engine._stage.blocks}
        assert len(storages) == 1


def test_what_an_earlier_life_has_contributed_is_not_fed_back() -> None:
    """A peer that comes back replays commits that it has helped to make. Oracle: the error before."""
    engine = build()
    with closing(engine):
        train(engine, versions=range(1))
        engine.turn(None)
        engine.turn(mean_of(drawn(engine, 1)))
        error = section(engine, ERROR)
        assert any(bool(shard.any()) for shard in error)
        engine.turn(mean_of(drawn(engine, 2)))
        assert same(section(engine, ERROR), error)
        engine.resume(version=Version(2), steps=5)
        assert not any(bool(shard.any()) for shard in (*section(engine, ERROR), *contributions(engine)))
        assert same(weights(engine), section(engine, ANCHOR))


@pytest.mark.parametrize("placement", ["device", "host"])
def test_a_saved_anchor_is_where_another_replica_begins(placement: str) -> None:
    """Oracle: the anchor's hash, and a contribution of nothing; moments and error are everybody's own."""
    ours, other = build(), build(PLACEMENTS[placement])
    with closing(ours), closing(other):
        train(ours, versions=range(1))
        ours.turn(None)
        ours.turn(mean_of(drawn(ours, 1)))
        train(ours, versions=range(1, 2))
        train(other, versions=range(1))
        assert other.state_digest() != ours.state_digest()
        files = {part: io.BytesIO() for part in STATE_PARTS}
        ours.write_state(files)
        for file in files.values():
            file.seek(0)
        other.read_state(files, version=Version(7))
        assert (other.version, other.steps) == (7, 0)
        assert other.state_digest() == ours.state_digest()
        assert same(weights(other), section(ours, ANCHOR))
        assert not any(bool(shard.any()) for shard in contributions(other))


@pytest.mark.parametrize("master", ["bf16+16", "bf16-sr"])
def test_narrow_weights_follow_the_anchor(master: MasterName) -> None:
    """Oracle: the anchor itself, or one of its two neighbours in bf16."""
    engine = build(master=master)
    with closing(engine):
        train(engine, versions=range(1))
        engine.turn(None)
        before = section(engine, SYNC)
        engine.turn(mean_of(drawn(engine, 1)))
        engine.turn(None)  # the sync point is what is kept of the weights
        anchor, kept = section(engine, ANCHOR), section(engine, SYNC)
        assert not same(before, kept)
        for a, w in zip(anchor, kept, strict=True):
            if master == "bf16+16":
                assert torch.equal(a, w)
            else:
                assert torch.equal(w, w.bfloat16().float())
                assert bool(((w - a).abs() <= a.abs() * 2.0**-7 + 2.0**-133).all())


def test_what_is_shared_does_not_depend_on_local_steps() -> None:
    """Two replicas with other data agree after every turn. Oracle: each other's hashes."""
    one, two = build(), build()
    with closing(one), closing(two):
        for turn in range(2):
            train(one, versions=range(turn, turn + 1))
            train(two, versions=range(10 + turn, 11 + turn))
            assert not same(weights(one), weights(two))
            drift = drawn(one, turn)
            for engine in (one, two):
                engine.turn(None)
                engine.turn(mean_of(drift))
            assert one.state_digest() == two.state_digest()
            assert one.state_digest() == fresh_digest(one)


def fresh_digest(engine: StageEngine) -> bytes:
    """Hash the shared state from its bytes, not from what was noted on the way."""
    assert engine.anchored is not None
    engine.anchored._digests = [None] * len(engine.shards)
    return engine.state_digest()
