"""Recompute a microbatch at some of our stages as a neighbour would have done it, and sketch what comes out.

Owns: going from bytes on the wire to sketches. Must not know: who asked, where the bytes are from. Runs in the compute
thread.

What comes out is encoded and decoded again before it is sketched: two machines that differ in the last bits then mostly
agree on every bit, and the codec's own error cancels out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from peer.codecs import Codec
from peer.engine.replay import Climb, Replay
from peer.engine.stage_engine import MAX_MAGNITUDE, StageEngine
from peer.engine.state import largest
from peer.engine.weights import PastWeights
from protocol.architecture import ModelConfig
from protocol.errors import PeerFault
from protocol.ids import StageId, Version
from protocol.sketch import Values, sketch, sketch_shards

if TYPE_CHECKING:
    import numpy

    TokenArray = numpy.ndarray[tuple[int, int], numpy.dtype[numpy.int64]]
    Source = bytes | bytearray | TokenArray


@dataclass(frozen=True, slots=True)
class Recomputed:
    """Sketches of what one microbatch comes to; empty where nothing goes on or back."""

    outputs: bytes
    returned: bytes


class Recomputer:
    """Stages that this peer hosts, with weights of versions that it still has."""

    def __init__(
        self,
        config: ModelConfig,
        *,
        num_stages: int,
        engines: Mapping[StageId, StageEngine],
        past: PastWeights,
        codec: Codec,
        gradient_codec: Codec,
        microbatch: tuple[int, int],
    ) -> None:
        """`microbatch` is the run's (B, T). Stages are built when they are needed first."""
        self._config, self._num_stages = config, num_stages
        self._engines, self._past = engines, past
        self._codec, self._gradient_codec = codec, gradient_codec
        self._microbatch = microbatch
        self._replays: dict[StageId, Replay] = {}

    def keep(self, stage: StageId) -> None:
        """Keep the weights of a stage, which are about to go to the next version."""
        engine = self._engines[stage]
        self._past.keep(stage, engine.version, num_elements=engine.num_elements, copy=engine.shared_weights)

    def forget(self, stage: StageId) -> None:
        """Drop what was kept of a stage."""
        self._past.forget(stage)

    def recompute(
        self,
        places: Sequence[tuple[StageId, Version]],
        source: Source,
        target: Source,
        seed: bytes,
        *,
        prefix: int | None = None,
    ) -> Recomputed | None:
        """Take a microbatch through stages of these versions and back; None if their weights are not here any more.

        With a `prefix`, only so many tokens of every sequence, and forward only: attention is causal, so they come out
        as they would with all others behind them. `target` is not looked at then.

        `source` are tokens (B, T) or encoded activations, `target` labels (B, T) at the last stage, else the encoded
        gradient by the outputs. Raises `WireError` or `PeerFault` for bytes that are none, `LocalFault` if this machine
        cannot compute.
        """
        weights = self._weights(places)
        if weights is None:
            return None
        if prefix is not None:
            hidden = self._up(places, weights, self._decode(source, self._codec)[:, :prefix])[-1].outputs[0]
            return Recomputed(outputs=self.sketch_of(self._through(hidden, self._codec), seed), returned=b"")
        hidden, gradient = self.there_and_back(places, weights, source, target)
        is_first, is_last = places[0][0] == 0, places[-1][0] == self._num_stages - 1
        return Recomputed(
            outputs=b"" if is_last else self.sketch_of(self._through(hidden, self._codec), seed),
            returned=b"" if is_first else self.sketch_of(self._through(gradient, self._gradient_codec), seed),
        )

    def there_and_back(
        self,
        places: Sequence[tuple[StageId, Version]],
        weights: Sequence[Sequence[Tensor]],
        source: Source,
        target: Source,
        on_gradient: Callable[[StageId, int, Tensor], None] = lambda stage, block, gradient: None,
    ) -> tuple[Tensor, Tensor]:
        """Return outputs and the gradient by the inputs; `on_gradient` hears of that by each block's weights."""
        replays = [self._replay(stage) for stage, _ in places]
        climbs = self._up(places, weights, self._decode(source, self._codec))
        hidden = climbs[-1].outputs[0]
        if places[-1][0] == self._num_stages - 1:
            labels = self._decode(target, self._codec)
            ((_, gradient),) = replays[-1].losses(climbs[-1], [labels], partial(on_gradient, places[-1][0]))
        else:
            gradient = self._decode(target, self._gradient_codec)
        for (stage, _), replay, climb in zip(reversed(places), reversed(replays), reversed(climbs), strict=True):
            (gradient,) = replay.down(climb, [gradient], partial(on_gradient, stage))
        return hidden, gradient

    def _up(
        self, places: Sequence[tuple[StageId, Version]], weights: Sequence[Sequence[Tensor]], hidden: Tensor
    ) -> list[Climb]:
        """Take a microbatch from its inputs to the end of the last place."""
        climbs: list[Climb] = []
        for (stage, _), flat in zip(places, weights, strict=True):
            climbs.append(self._replay(stage).up(flat, [hidden]))
            hidden = climbs[-1].outputs[0]
        return climbs

    def sum_of(self, places: Sequence[tuple[StageId, Version]], stage: StageId) -> GradientSum | None:
        """Begin to recompute what microbatches add up to at one of these stages; None if weights are not here."""
        weights = self._weights(places)
        return None if weights is None else GradientSum(self, places, weights, stage)

    def sketch_bytes(
        self, data: bytes | bytearray, seed: bytes, *, is_gradient: bool, prefix: int | None = None
    ) -> bytes:
        """Sketch what crossed a hop, or a prefix of its sequences. May be called from any thread."""
        values = self._decode(data, self._gradient_codec if is_gradient else self._codec)
        return self.sketch_of(values[:, :prefix], seed)

    def shards_of(self, stage: StageId) -> list[tuple[int, int, int]]:
        """List a stage's shards: block, start and stop within it."""
        return [
            (number, shard.start, shard.stop)
            for number, layout in enumerate(self._engines[stage].layouts)
            for shard in layout.shards()
        ]

    @staticmethod
    def sketch_of(values: Tensor, seed: bytes) -> bytes:
        """Sketch activations or gradients (B, T, D)."""
        return sketch(_flat(values), seed)

    def _weights(self, places: Sequence[tuple[StageId, Version]]) -> list[Sequence[Tensor]] | None:
        """Return the weights of all places; None if one is not here. Those of the present version are kept, too."""
        found = []
        for stage, version in places:
            if self._past.find(stage, version) is None and self._engines[stage].version == version:
                self.keep(stage)
            found.append(self._past.find(stage, version))
        here = [weights for weights in found if weights is not None]
        return here if len(here) == len(found) else None

    def _replay(self, stage: StageId) -> Replay:
        if stage not in self._replays:
            device = self._engines[stage].device
            self._replays[stage] = Replay(self._config, num_stages=self._num_stages, stage=stage, device=device)
        return self._replays[stage]

    def _through(self, values: Tensor, codec: Codec) -> Tensor:
        flat = values.reshape(-1).contiguous()
        return codec.decode(codec.encode(flat), flat.numel()).view_as(values)

    def _decode(self, source: Source, codec: Codec) -> Tensor:
        """Return token ids (B, T) for a token array, hidden values (B, T, D) for bytes."""
        if not isinstance(source, (bytes, bytearray)):
            return torch.from_numpy(source)
        sequences, length = self._microbatch
        width = self._config["hidden_size"]
        for batch in range(sequences, 0, -1):
            if codec.encoded_bytes(batch * length * width) == len(source):
                values = codec.decode(source, batch * length * width).view(batch, length, width)
                if not largest(values) <= MAX_MAGNITUDE:
                    raise PeerFault("bytes that crossed a hop have numbers that no model makes.")
                return values
        raise PeerFault(f"{len(source)} bytes that crossed a hop are no activations of this run.")


class GradientSum:
    """What microbatches add up to at one stage; one at a time, so that training goes on in between."""

    def __init__(
        self,
        recomputer: Recomputer,
        places: Sequence[tuple[StageId, Version]],
        weights: Sequence[Sequence[Tensor]],
        stage: StageId,
    ) -> None:
        self._recomputer, self._places, self._weights, self._stage = recomputer, places, weights, stage
        self._sums: dict[int, Tensor] = {}

    def add(self, source: Source, target: Source) -> None:
        """Add one microbatch's gradient. In the compute thread; raises like `Recomputer.recompute`."""
        self._recomputer.there_and_back(self._places, self._weights, source, target, self._note)

    def sketch(self, seed: bytes) -> bytes:
        """Sketch the sum."""
        blocks = [self._sums[number] for number in sorted(self._sums)]
        layouts = self._recomputer.shards_of(self._stage)
        shards = (blocks[block][start:stop] for block, start, stop in layouts)
        return sketch_shards(map(_flat, shards), seed)

    def _note(self, stage: StageId, block: int, gradient: Tensor) -> None:
        if stage != self._stage:
            return
        if block in self._sums:
            self._sums[block] += gradient.cpu()
        else:
            self._sums[block] = gradient.cpu()


def _flat(values: Tensor) -> Values:
    return values.detach().reshape(-1).float().cpu().numpy()
