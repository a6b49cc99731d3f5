"""Build the engines of a span from the manifest. The one place that translates its fields for torch."""

from __future__ import annotations

import gc
from collections.abc import Sequence

import torch

from peer.codecs import codec
from peer.engine.optimizer import OptimizerSpec
from peer.engine.schedule import LearningRate
from peer.engine.span import SpanEngine
from peer.engine.stage_engine import StageEngine
from peer.settings import PeerSettings
from protocol.errors import LocalFault
from protocol.ids import StageId
from protocol.manifest import Manifest


def build_span(manifest: Manifest, stages: Sequence[StageId], settings: PeerSettings) -> SpanEngine:
    """Materialise only the given stages, with the initial weights that the manifest's seed defines.

    Raises `LocalFault` if the device is not there or too small.
    """
    torch.set_num_threads(settings.threads)
    device = choose_device(settings.device)
    gc.collect()  # the span before this one hung together in circles, and its memory is needed now
    if device.startswith("cuda"):
        torch.cuda.empty_cache()
    spec = manifest.optimizer
    optimizer = OptimizerSpec(
        name=spec.name.value,
        betas=(spec.beta1, spec.beta2),
        epsilon=spec.eps,
        weight_decay=spec.weight_decay,
    )
    try:
        engines = {
            stage: StageEngine.build(
                manifest.model.config,
                num_stages=manifest.model.num_stages,
                stage=stage,
                optimizer=optimizer,
                seed=manifest.model.init_seed,
                device=device,
                keep_budget_bytes=settings.activation_bytes // len(stages),
            )
            for stage in stages
        }
    except (RuntimeError, AssertionError) as error:  # torch's ways of saying "no such device" and "out of memory"
        reason = " ".join(str(error).split())[:200]
        raise LocalFault(f"cannot build stages {list(stages)} on '{device}': {reason}.") from None
    return SpanEngine(
        engines,
        codec=codec(manifest.averaging.activation_codec),
        hidden_size=manifest.model.config["hidden_size"],
        num_stages=manifest.model.num_stages,
        microbatch=(manifest.batch.sequences_per_microbatch, manifest.batch.sequence_length),
    )


def choose_device(wanted: str) -> str:
    """Resolve `auto`."""
    if wanted != "auto":
        return wanted
    return "cuda" if torch.cuda.is_available() else "cpu"


def learning_rate(manifest: Manifest) -> LearningRate:
    """Return the run's schedule, by version."""
    spec = manifest.optimizer
    return LearningRate(
        peak=spec.learning_rate,
        warmup=min(spec.warmup_rounds, manifest.batch.num_rounds),
        total=manifest.batch.num_rounds,
        final_fraction=spec.final_lr_fraction,
    )
