"""Swarms, models and recipes of which a forecast can be made on paper."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from coordinator.forecast.swarm import Model, Peers, Recipe, Swarm
from coordinator.init import overridden, sections_of
from coordinator.presets import find_preset

QUIET = {
    "batch.sequence_length": 256,
    "batch.sequences_per_microbatch": 2,
    "batch.microbatches_per_round": 12,
    "batch.heldout_sequences": 2,
    "batch.eval_every": 1_000_000_000,
    "keeping.checkpoint_every": 1_000_000_000,
    "averaging.codec": "fp32",
    "averaging.activation_codec": "fp32",
}
"""No evaluations and no checkpoints to speak of."""

FAST = Peers(count=1, upload_mbps=1e12, download_mbps=1e12, stage_seconds=(1.0,))
"""A second for each microbatch and stage, and links that take no time."""

STILL = Swarm(peers=(FAST,), ping_ms=0.0, boundary_s=0.0)
"""No latency, nothing between rounds."""


def recipe(**settings: Any) -> Recipe:
    """Return the bench preset's recipe, quiet but for `settings`, as in `batch__eval_every=3`."""
    changes = {name.replace("__", "."): value for name, value in settings.items()}
    return Recipe(**overridden(sections_of(find_preset("bench")), QUIET | changes))


def model(num_stages: int = 1, *, preset: str = "bench") -> Model:
    """Return a preset's model, cut."""
    return Model(find_preset(preset).config, num_stages)


def swarm(*peers: Peers, **others: Any) -> Swarm:
    """Return a swarm without latency; a second per microbatch unless said otherwise."""
    return replace(STILL, peers=peers or (FAST,), **others)


def mbps(bytes_per_s: float) -> float:
    """Return a link's rate as it is sold."""
    return bytes_per_s * 8 / 1e6
