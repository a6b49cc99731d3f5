"""Turn committed update bytes into the next version of a stage.

Owns: decode, and what follows from the run's mode: divide once, clip and step, or move the anchor. The same for a
member that took part, for one that adopted the bytes later, and for one that replays a log. That is what keeps replicas
equal. Must not know: how the bytes were agreed on. Runs in the compute thread.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate

import torch
from torch import Tensor

from peer.averaging.reduce import contribution, decoded_parts, encoded_shard_bytes
from peer.averaging.taken import Taken
from peer.codecs import codec
from peer.engine.anchored import Mean
from peer.engine.schedule import LearningRate
from peer.engine.stage_engine import StageEngine
from peer.engine.stage_state import NORM_ELEMENTS
from protocol.errors import WireError
from protocol.rounds.factors import shares_of


@dataclass(frozen=True, slots=True)
class Update:
    """What a group has agreed on, encoded: a sum of gradients, or a mean drift."""

    codec: str
    data: bytes | memoryview
    """A dense codec's sum, shard after shard; with a sparse one, so much for every contributor."""
    weights: tuple[int, ...]
    """For how many target tokens each contribution counts, in the order in which they are added."""
    norm: float | None = None
    """As `update_norm` has found it, if it was asked: then every number has been looked at."""
    shards: tuple[int, ...] | None = None
    """The stage's shards that it has, ascending; None: all of them."""
    taken: Taken | None = None
    """What we were sent when we helped to sum it."""
    factors: tuple[float, ...] = ()
    """By what a sparse codec's contributions are multiplied; without them each by its share of the weights."""

    def shards_of(self, engine: StageEngine) -> Sequence[int]:
        """Return their numbers."""
        return range(len(engine.shards)) if self.shards is None else self.shards


def update_bytes(engine: StageEngine, codec_name: str, num_contributors: int, shards: Iterable[int]) -> int:
    """Return the exact size of an update of some of a stage's shards."""
    each = sum(encoded_shard_bytes(codec_name, engine.shards[number].num_elements) for number in shards)
    return _num_pieces(codec_name, num_contributors) * each


def update_norm(engine: StageEngine, update: Update) -> float:
    """Return the Euclidean norm of a sum, in fp64 and piece by piece; of a mean, that of the sum which it stands for.

    Machines agree on it but for the last bits: torch adds up a piece in an order that depends on its threads. Hence the
    clip scale travels in the commit, and others check it with a tolerance. Raises `WireError` if the bytes do not fit.
    """
    total = 0.0
    for shard in _split(engine, update).values():
        for _, values in shard():
            for piece in torch.split(values, NORM_ELEMENTS):
                total += float(piece.double().square().sum())
    return math.sqrt(total) * (1 if engine.anchored is None else sum(update.weights))


def update_shards(engine: StageEngine, update: Update) -> Iterator[Tensor]:
    """Decode the sum of gradients that an update has, shard after shard, flat fp32. Raises `WireError` as above."""
    for number, pieces in _split(engine, update).items():
        out = torch.empty(engine.shards[number].num_elements)
        _fill(out, pieces())
        yield out


def absorb(
    engine: StageEngine,
    update: Update,
    *,
    clip_scale: float,
    schedule: LearningRate,
    is_ours: bool = False,
    following: Collection[int] | None = None,
) -> None:
    """Take the step that leads from `engine.version` to the next one, one shard at a time.

    `clip_scale` comes with the commit; `is_ours` tells whether we are among the contributors. `following` are the
    shards of the update after this one (None: all), which may be read before it is there. Raises `WireError`, with
    nothing changed, unless the bytes fit this stage. Without their norm they are decoded twice: no shard may change
    before the last one was looked at.
    """
    shards = _split(engine, update)
    norm = update_norm(engine, update) if update.norm is None else update.norm
    if not math.isfinite(norm):
        raise WireError("an update that holds numbers which are none")
    if engine.anchored is not None:
        not_sent = partial(_not_sent, update.codec) if is_ours else None
        engine.turn(Mean(lambda number: shards[number](), not_sent, update.shards), sync=following)
        return
    assert len(shards) == len(engine.shards), "an optimizer step is one of the whole stage"

    def load(number: int, out: Tensor) -> None:
        _fill(out, shards[number]())

    engine.step(schedule.at(engine.version), scale=clip_scale / sum(update.weights), load=load)


def _split(engine: StageEngine, update: Update) -> dict[int, Callable[[], Iterator[tuple[slice, Tensor]]]]:
    """Cut an update into shards of the engine, each of which decodes its parts when it is called.

    Raises `WireError` unless the update is exactly as long as it must be.
    """
    numbers = update.shards_of(engine)
    lengths = [engine.shards[number].num_elements for number in numbers]
    sizes = [encoded_shard_bytes(update.codec, length) for length in lengths]
    num_pieces = _num_pieces(update.codec, len(update.weights))
    if len(update.data) != num_pieces * sum(sizes):
        raise WireError(f"an update of {len(update.data)} bytes does not fit this stage")
    # what is dense has been multiplied already
    factors = (update.factors or shares_of(update.weights)) if num_pieces > 1 else ()
    view, starts = memoryview(update.data), range(0, len(update.data), sum(sizes) or 1)
    return {
        number: partial(
            decoded_parts,
            update.codec,
            [view[start + offset : start + offset + size] for start in starts],
            length,
            factors=factors,
        )
        for number, length, size, offset in zip(
            numbers, lengths, sizes, accumulate(sizes, initial=0), strict=False
        )  # the last end is nobody's start
    }


def _fill(out: Tensor, pieces: Iterable[tuple[slice, Tensor]]) -> None:
    for part, values in pieces:
        out[part].copy_(values)


def _not_sent(codec_name: str, values: Tensor) -> Tensor:
    """Return what a codec leaves out of one piece of a contribution."""
    return torch.sub(values, contribution(values, using=codec(codec_name)))


def _num_pieces(codec_name: str, num_contributors: int) -> int:
    return 1 if codec(codec_name).is_dense else num_contributors
