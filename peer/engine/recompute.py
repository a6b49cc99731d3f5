"""Recompute a microbatch at some of our stages as a neighbour would have done it, and sketch what comes out.

Owns: going from bytes on the wire to sketches. Must not know: who asked, where the bytes are from. Runs in the compute
thread.

What comes out is encoded and decoded again before it is sketched: two machines that differ in the last bits then mostly
agree on every bit, and the codec's own error cancels out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
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
from protocol.sketch import sketch

if TYPE_CHECKING:
    import numpy

    TokenArray = numpy.ndarray[tuple[int, int], numpy.dtype[numpy.int64]]
    Source = bytes | bytearray | TokenArray


@dataclass(frozen=True, slots=True)
class Recomputed:
    """Sketches of what one microbatch comes to; empty where nothing goes on or back."""

    outputs: bytes
    returned: bytes
    loss_sum: float | None


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

    def recompute(
        self,
        places: Sequence[tuple[StageId, Version]],
        source: Source,
        target: Source,
        seed: bytes,
    ) -> Recomputed | None:
        """Take a microbatch through stages of these versions and back; None if their weights are not here any more.

        `source` are tokens (B, T) or encoded activations, `target` labels (B, T) at the last stage, else the encoded
        gradient by the outputs. Raises `WireError` or `PeerFault` for bytes that are none, `LocalFault` if this machine
        cannot compute.
        """
        weights = [self._weights(*place) for place in places]
        replays = [self._replay(stage) for stage, _ in places]
        climbs: list[Climb] = []
        hidden = self._decode(source, self._codec)
        for replay, flat in zip(replays, weights, strict=True):
            if flat is None:
                return None
            climbs.append(replay.up(flat, [hidden]))
            hidden = climbs[-1].outputs[0]
        loss_sum = None
        is_first, is_last = places[0][0] == 0, places[-1][0] == self._num_stages - 1
        if is_last:
            labels = self._decode(target, self._codec)
            ((loss_sum, gradient),) = replays[-1].losses(climbs[-1], [labels])
        else:
            gradient = self._decode(target, self._gradient_codec)
        for replay, climb in zip(reversed(replays), reversed(climbs), strict=True):
            (gradient,) = replay.down(climb, [gradient])
        return Recomputed(
            outputs=b"" if is_last else self.sketch_of(self._through(hidden, self._codec), seed),
            returned=b"" if is_first else self.sketch_of(self._through(gradient, self._gradient_codec), seed),
            loss_sum=loss_sum,
        )

    def sketch_bytes(self, data: bytes | bytearray, seed: bytes, *, is_gradient: bool) -> bytes:
        """Sketch what crossed a hop. May be called from any thread."""
        return self.sketch_of(self._decode(data, self._gradient_codec if is_gradient else self._codec), seed)

    @staticmethod
    def sketch_of(values: Tensor, seed: bytes) -> bytes:
        """Sketch activations or gradients (B, T, D)."""
        return sketch(values.detach().reshape(-1).float().cpu().numpy(), seed)

    def _weights(self, stage: StageId, version: Version) -> Sequence[Tensor] | None:
        found = self._past.find(stage, version)
        if found is not None:
            return found
        engine = self._engines[stage]
        return engine.shared_weights() if engine.version == version else None

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
