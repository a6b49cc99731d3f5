"""Turn committed update bytes into the next version of a stage.

Owns: decode, divide once, clip, step; the same for a member that took part, for one that adopted the
bytes later, and for one that replays a log. That is what keeps replicas equal. Must not know: how the
bytes were agreed on. Runs in the compute thread.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from peer.averaging.reduce import Reduced, decode_shard, encoded_shard_bytes
from peer.engine.schedule import LearningRate
from peer.engine.stage_engine import StageEngine
from peer.engine.stage_state import NORM_ELEMENTS
from protocol.errors import WireError


@dataclass(frozen=True, slots=True)
class Update:
    """An encoded sum of gradients: shard after shard, each as its codec made it."""

    codec: str
    data: bytes | memoryview
    norm: float | None = None
    """As `update_norm` has found it, if it was asked: then every number has been looked at."""

    @classmethod
    def of(cls, reduced: Reduced) -> Update:
        """Return what a finished reduce has come to."""
        return cls(reduced.codec, reduced.data)


def update_bytes(engine: StageEngine, codec: str) -> int:
    """Return the exact size of a stage's updates."""
    return sum(encoded_shard_bytes(codec, shard.num_elements) for shard in engine.shards)


def update_norm(engine: StageEngine, update: Update) -> float:
    """Return the Euclidean norm of an encoded sum, in fp64 and piece by piece.

    Machines agree on it but for the last bits: torch adds up a piece in an order that depends on its threads. Hence the
    clip scale travels in the commit, and others check it with a tolerance. Raises `WireError` if the bytes do not fit.
    """
    total = 0.0
    for shard, data in zip(engine.shards, _split(engine, update), strict=True):
        values = torch.empty(shard.num_elements)
        decode_shard(update.codec, data, values)
        for start in range(0, values.numel(), NORM_ELEMENTS):
            total += float(values[start : start + NORM_ELEMENTS].double().square().sum())
    return math.sqrt(total)


def absorb(
    engine: StageEngine, update: Update, *, total_tokens: int, clip_scale: float, schedule: LearningRate
) -> None:
    """Take the optimizer step that leads from `engine.version` to the next one, one shard at a time.

    `clip_scale` comes with the commit and `total_tokens` is the number of target tokens in the sum. Raises `WireError`,
    with nothing changed, unless the bytes are a sum of this stage's gradients. Without their norm they are decoded
    twice: no shard may change before the last one was looked at.
    """
    pieces = _split(engine, update)
    norm = update_norm(engine, update) if update.norm is None else update.norm
    if not math.isfinite(norm):
        raise WireError("an update that holds numbers which are none")

    def load(number: int, out: torch.Tensor) -> None:
        decode_shard(update.codec, pieces[number], out)

    engine.step(schedule.at(engine.version), scale=clip_scale / total_tokens, load=load)


def _split(engine: StageEngine, update: Update) -> list[memoryview]:
    """Cut an update into the engine's shards; raises `WireError` unless it is exactly as long as they are."""
    if len(update.data) != update_bytes(engine, update.codec):
        raise WireError(f"an update of {len(update.data)} bytes does not fit this stage")
    view, pieces, offset = memoryview(update.data), [], 0
    for shard in engine.shards:
        size = encoded_shard_bytes(update.codec, shard.num_elements)
        pieces.append(view[offset : offset + size])
        offset += size
    return pieces
