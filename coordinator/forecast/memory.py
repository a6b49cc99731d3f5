"""Where the state of a span lives on a peer, and what it costs to bring it to the device. Pure.

Owns: bytes of state per tier, and the seconds of streaming. Must not know: links, rounds. It is a rough version of
`peer bench plan`, which simulates a step on one machine: here nothing is pinned cleverly, and activations are not
counted, so leave room for them in what training may take of a device (or use measured seconds).

fp32 per element: weights 4 bytes, the gradient's sum 4, moments 2.03 (8-bit AdamW, layers) or 8; another 16 in `diloco`
mode (anchor, velocity, error, last sync), or 4 for a gradient that is averaged while the next one adds up. Weights
outside the device take 2 where the manifest keeps them as bf16.

What does not fit leaves the device in this order: what is only touched when a round ends; moments, which come and go
once per optimizer step; then weights and gradients, which come once per wave: weights on the way up and on the way
down, gradients on the way down. Copies run beside computing, so a wave takes the longer of the two.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from coordinator.forecast.spans import Span
from coordinator.forecast.swarm import Peers, Recipe
from protocol.errors import ConfigError
from protocol.manifest import AveragingMode, MasterName
from protocol.sizes import size_text

_FP32_BYTES = 4
_BF16_BYTES = 2
_OUTER_BYTES = 4 * _FP32_BYTES
_HELD_BYTES = _FP32_BYTES


@dataclass(frozen=True, slots=True, kw_only=True)
class Residence:
    """Where the state is."""

    device_bytes: int
    host_bytes: int = 0
    drive_bytes: int = 0
    wave: int = 1
    """Microbatches that share one load of a block."""
    wave_s: float = 0.0
    """Copying to the device for one wave."""
    step_s: float = 0.0
    """The same for an optimizer step that is a pass of its own."""

    @property
    def total_bytes(self) -> int:
        return self.device_bytes + self.host_bytes + self.drive_bytes

    def standing(self) -> Residence:
        """Return the same bytes, with nothing copied."""
        return replace(self, wave=1, wave_s=0.0, step_s=0.0)


def shared_bytes(span: Span, recipe: Recipe) -> int:
    """Return the size of what replicas agree on, which is hashed after every round and goes into checkpoints."""
    if recipe.averaging.mode is AveragingMode.DILOCO:
        return 2 * _FP32_BYTES * span.num_elements  # anchor and velocity
    return _FP32_BYTES * span.num_elements + span.moment_bytes(recipe.optimizer)


def apart_bytes(span: Span, recipe: Recipe) -> int:
    """Return the size of what is only touched when a round ends."""
    if recipe.averaging.mode is AveragingMode.DILOCO:
        return _OUTER_BYTES * span.num_elements
    return _HELD_BYTES * span.num_elements if recipe.averaging.overlap else 0


def residence(peers: Peers, span: Span, recipe: Recipe, *, wave: int) -> Residence:
    """Put a span's state into a peer's memory. Raises `ConfigError`, saying what is missing, if there is no room."""
    moments, apart = span.moment_bytes(recipe.optimizer), apart_bytes(span, recipe)
    in_use = 2 * _FP32_BYTES * span.num_elements  # weights and gradients
    total = in_use + moments + apart
    excess = 0 if peers.device_bytes is None else max(0, total - peers.device_bytes)
    if not excess:
        return Residence(device_bytes=total)
    apart_away = min(apart, excess)
    moments_away = min(moments, excess - apart_away)
    elements_away = span.num_elements * (excess - apart_away - moments_away) / in_use
    home_bytes = _FP32_BYTES if recipe.optimizer.master is MasterName.FP32 else _BF16_BYTES
    weights, gradients = home_bytes * elements_away, _FP32_BYTES * elements_away
    away = int(weights + gradients) + moments_away + apart_away
    host, drive = _tiers(peers, span, away)
    wave_bytes, step_bytes = 2 * weights + gradients, weights + gradients + moments_away
    if recipe.averaging.mode is AveragingMode.DILOCO:  # the step is in the last wave of those that it adds up
        per_step = recipe.averaging.microbatches_per_step
        wave = min(wave, per_step)
        wave_bytes, step_bytes = wave_bytes + moments_away * wave / per_step, 0.0
    return Residence(
        device_bytes=total - excess,
        host_bytes=host,
        drive_bytes=drive,
        wave=min(wave, recipe.batch.microbatches_per_round),
        wave_s=wave_bytes * _seconds_per_byte(peers, host, drive),
        step_s=step_bytes * _seconds_per_byte(peers, host, drive),
    )


def _seconds_per_byte(peers: Peers, host: int, drive: int) -> float:
    """Return what a byte takes to the device on average; from a drive it comes through host memory."""
    pcie_s = 1e-9 / peers.pcie_gb_per_s
    drive_s = 0.0 if peers.drive_gb_per_s is None else 1e-9 / peers.drive_gb_per_s + pcie_s
    return (host * pcie_s + drive * drive_s) / (host + drive)


def _tiers(peers: Peers, span: Span, away: int) -> tuple[int, int]:
    """Split what is away from the device between host memory and a drive."""
    host = away if peers.host_bytes is None else min(away, peers.host_bytes)
    if host < away and peers.drive_gb_per_s is None:
        stages = f"stage {span.stages[0]}" if len(span.stages) == 1 else f"stages {span.stages[0]}-{span.stages[-1]}"
        raise ConfigError(
            f"{stages} do{'es' * (len(span.stages) == 1)} not fit a peer with {size_text(peers.device_bytes or 0)} of "
            f"device and {size_text(host)} of host memory: {size_text(away - host)} are missing.",
            hint="Cut the model into more stages, or give peers more memory or a drive.",
        )
    return host, away - host
