"""From committed bytes to the next version, and back from disk: replicas that do the same stay the same."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from peer.averaging.absorb import Update, absorb, update_bytes, update_norm
from peer.averaging.history import SNAPSHOTS_KEPT, History, kept_snapshots
from peer.averaging.reduce import decoded_parts, encoded_shard_bytes
from peer.codecs import Buffer, codec
from peer.engine.optimizer import OptimizerSpec
from peer.engine.schedule import LearningRate
from peer.engine.span import SpanEngine
from peer.engine.stage_engine import StageEngine
from protocol.architecture import preset
from protocol.control import Snapshot
from protocol.errors import StorageError, WireError
from protocol.ids import Lineage, RoundId, StageId, Version
from protocol.signing import Signed, SigningKey

SCHEDULE = LearningRate(peak=1e-2, warmup=0, total=10)
STAGE = StageId(0)
LINEAGE = Lineage(bytes(32))
MICROBATCH = (1, 4)  # sequences, tokens
TOKENS = (20, 30)  # of the contributors


def engine() -> StageEngine:
    return StageEngine.build(preset("tiny"), num_stages=2, stage=0, optimizer=OptimizerSpec(name="adamw8bit"), seed=3)


def update(target: StageEngine, name: str = "fp16", seed: int = 0) -> Update:
    """Encode a random sum for every shard, the way a reduce does."""
    random = torch.Generator().manual_seed(seed)
    data = b""
    for shard in target.shards:
        values = torch.randn(shard.num_elements, generator=random)
        encoded = codec(name).encode(values)
        assert len(encoded) == encoded_shard_bytes(name, len(values)), "tiny shards are one part each"
        data += encoded
    return Update(name, data, TOKENS)


def test_two_replicas_that_absorb_the_same_bytes_are_equal() -> None:
    """Oracle: digests over weights and moments; a different clip scale must show."""
    one, two, other = engine(), engine(), engine()
    for target, scale in ((one, 0.5), (two, 0.5), (other, 0.25)):
        absorb(target, update(target), clip_scale=scale, schedule=SCHEDULE)
    assert one.version == 1
    assert one.state_digest() == two.state_digest()
    assert one.state_digest() != other.state_digest()


def test_the_norm_is_that_of_what_everybody_decodes() -> None:
    """Oracle: torch's own norm over the decoded values."""
    target = engine()
    sum_ = update(target)
    decoded, offset = [], 0
    for shard in target.shards:
        size = encoded_shard_bytes("fp16", shard.num_elements)
        decoded.append(codec("fp16").decode(sum_.data[offset : offset + size], shard.num_elements))
        offset += size
    expected = float(torch.cat(decoded).double().norm())
    assert update_norm(target, sum_) == pytest.approx(expected, rel=1e-12)


def test_an_update_of_the_wrong_length_changes_nothing() -> None:
    """Oracle: the digest before and after."""
    target = engine()
    before = target.state_digest()
    broken = Update("fp16", update(target).data[:-1], TOKENS)
    assert update_bytes(target, "fp16", len(TOKENS), range(len(target.shards))) == len(broken.data) + 1
    with pytest.raises(WireError):
        absorb(target, broken, clip_scale=1.0, schedule=SCHEDULE)
    assert target.state_digest() == before


@pytest.mark.parametrize("name", ["fp32", "bf16", "fp16", "int8"])
def test_an_update_whose_last_number_is_none_changes_nothing(name: str) -> None:
    """Oracle: the digest before and after: no shard may step before the last one has been looked at."""
    target = engine()
    before = target.state_digest()
    endings = {"fp32": b"\x00\x00\x80\x7f", "bf16": b"\x80\x7f", "fp16": b"\x7f", "int8": b"\x00\x00\xc0\x7f"}
    good = bytes(update(target, name).data)
    broken = Update(name, good[: -len(endings[name])] + endings[name], TOKENS)
    with pytest.raises(WireError):
        absorb(target, broken, clip_scale=1.0, schedule=SCHEDULE)
    assert (target.state_digest(), target.version) == (before, 0)
    absorb(target, Update(name, good, TOKENS), clip_scale=1.0, schedule=SCHEDULE)
    assert target.version == 1


@pytest.mark.parametrize("is_checked", [True, False])
def test_an_update_is_decoded_once_if_it_was_looked_at_before(
    monkeypatch: pytest.MonkeyPatch, is_checked: bool
) -> None:
    """Oracle: how many shards were decoded; the digest of a step that looks at them again."""
    own, other = engine(), engine()
    sum_ = update(own)
    absorb(other, sum_, clip_scale=1.0, schedule=SCHEDULE)
    if is_checked:
        sum_ = replace(sum_, norm=update_norm(own, sum_))
    decoded: list[int] = []

    def decode(name: str, data: Sequence[Buffer], length: int, **options: Any) -> Iterator[tuple[slice, torch.Tensor]]:
        decoded.append(length)
        return decoded_parts(name, data, length, **options)

    monkeypatch.setattr("peer.averaging.absorb.decoded_parts", decode)
    absorb(own, sum_, clip_scale=1.0, schedule=SCHEDULE)
    assert len(decoded) == len(own.shards) * (1 if is_checked else 2)
    assert own.state_digest() == other.state_digest()


def test_a_step_is_the_one_from_the_decoded_sums() -> None:
    """Oracle: the engine's own step with the values that torch decodes, clipped and divided once."""
    absorbed, stepped = engine(), engine()
    sum_ = update(absorbed)
    sizes = [encoded_shard_bytes("fp16", shard.num_elements) for shard in absorbed.shards]
    ends = list(itertools.accumulate(sizes, initial=0))

    def load(number: int, out: torch.Tensor) -> None:
        piece = sum_.data[ends[number] : ends[number + 1]]
        out.copy_(codec("fp16").decode(piece, absorbed.shards[number].num_elements))

    absorb(absorbed, sum_, clip_scale=0.5, schedule=SCHEDULE)
    stepped.step(SCHEDULE.at(0), scale=0.5 / 50, load=load)
    assert absorbed.state_digest() == stepped.state_digest()


def signed() -> Signed:
    key = SigningKey(bytes(32))
    return Signed(payload=b"commit", signer=key.peer_id, signature=key.sign("c", b"commit"))


def snap(history: History, span: SpanEngine, version: int) -> Snapshot:
    return history.save_snapshot(
        lambda files: span.write_state(STAGE, files),
        round_id=RoundId(version),
        version=Version(version),
        lineage=LINEAGE,
    )


def test_a_snapshot_and_its_log_lead_to_the_same_state(tmp_path: Path) -> None:
    """Oracle: an undisturbed engine; the other one starts from disk at version 1 and replays the rest."""
    target, history = engine(), History(tmp_path, stage=STAGE)
    span = SpanEngine({STAGE: target}, codec=codec("fp32"), hidden_size=64, num_stages=2, microbatch=MICROBATCH)
    for version in range(3):
        if version == 1:
            snap(history, span, 1)
        step = update(target, seed=version)
        absorb(target, step, clip_scale=1.0, schedule=SCHEDULE)
        history.append(Version(version), step.data, signed())
    again, reopened = engine(), History(tmp_path, stage=STAGE)
    (snapshot,) = reopened.snapshots()
    reopened.check_snapshot(snapshot)
    with reopened.open_snapshot(snapshot) as files:
        again.read_state(files, version=snapshot.version)
    assert again.version == 1
    for version in (1, 2):
        path = reopened.resolve("update", Version(version), "")
        assert path is not None
        absorb(again, Update("fp16", path.read_bytes(), TOKENS), clip_scale=1.0, schedule=SCHEDULE)
    assert again.state_digest() == target.state_digest()
    assert kept_snapshots(tmp_path.parent) == ()


def test_a_flipped_byte_on_disk_is_never_loaded(tmp_path: Path) -> None:
    """Oracle: the snapshot's digests."""
    history = History(tmp_path, stage=STAGE)
    span = SpanEngine({STAGE: engine()}, codec=codec("fp32"), hidden_size=64, num_stages=2, microbatch=MICROBATCH)
    snapshot = snap(history, span, 0)
    path = history.incoming_path(Version(0), "weights")
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(StorageError, match="damaged"):
        history.check_snapshot(snapshot)


def test_old_snapshots_and_the_updates_before_them_are_pruned(tmp_path: Path) -> None:
    """Oracle: the number of snapshots kept, and that the log reaches back to the oldest of them."""
    history = History(tmp_path / "stage-0", stage=STAGE, updates_kept_s=0.0)
    span = SpanEngine({STAGE: engine()}, codec=codec("fp32"), hidden_size=64, num_stages=2, microbatch=MICROBATCH)
    for version in range(4):
        snap(history, span, version)
        history.append(Version(version), b"update", signed())
    assert [snapshot.version for snapshot in history.snapshots()] == [3, 2][:SNAPSHOTS_KEPT]
    assert history.resolve("update", Version(1), "") is None
    assert history.commit_of(Version(0)) is None
    assert history.commit_of(Version(1)) == signed(), "it says who the members at version 2 are"
    assert history.commit_of(Version(2)) == signed()
    assert [snapshot.version for snapshot in kept_snapshots(tmp_path)] == [3]
