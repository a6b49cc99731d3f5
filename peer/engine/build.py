"""Build the engines of a span from the manifest. The one place that translates its fields for torch."""

from __future__ import annotations

import gc
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch

from peer.codecs import codec
from peer.engine.local_checkpoint import move_in
from peer.engine.local_steps import LocalRules
from peer.engine.optimizer import OptimizerSpec
from peer.engine.outer import OuterSpec
from peer.engine.passes import Parking
from peer.engine.provision import Provision, choose
from peer.engine.recompute import Recomputer
from peer.engine.schedule import clip_threshold, learning_rate
from peer.engine.span import SpanEngine
from peer.engine.stage_engine import StageEngine
from peer.engine.weights import PastWeights
from peer.memory.arena import Arena
from peer.memory.backend import backend_for
from peer.memory.disk.durable_files import allocated_bytes
from peer.memory.disk.store_folder import TABLE_FILE
from peer.memory.executor import Executor, open_memory
from peer.memory.placement import Tier
from peer.memory.units import OUTER, Inventory, Section
from peer.model.stage import Stage, build_stage
from peer.settings import PeerSettings
from protocol.errors import LocalFault
from protocol.ids import RoundId, StageId
from protocol.manifest import AveragingMode, Manifest


def build_span(
    manifest: Manifest, stages: Sequence[StageId], settings: PeerSettings, *, nvme: Path | None = None
) -> SpanEngine:
    """Materialise only the given stages, with the initial weights that the manifest's seed defines.

    What the memory engine has committed in the folder `nvme` is taken up again instead, also if all of it fits memory
    today. Raises `LocalFault` if the device is not there or too small.
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
        master=spec.master.value,
        rounding_seed=manifest.model.init_seed,
    )
    with _torch_errors(stages, device), ExitStack() as undo:
        models = {stage: _model(manifest, stage, device) for stage in stages}
        layouts = [layout for model in models.values() for layout in model.layouts]
        outer = _outer(manifest)
        inventory = Inventory(layouts, optimizer.name, optimizer.master, apart=sections_apart(manifest))
        backend = backend_for(device)
        undo.callback(backend.close)
        chosen = choose(
            manifest,
            inventory,
            settings,
            device=device,
            stages=stages,
            nvme=nvme,
        )
        fingerprint = f"{manifest.run_id} {list(stages)} {optimizer}"
        folder, limit_bytes = _store_folder(nvme, chosen, settings.limits.nvme_bytes)
        memory = open_memory(
            inventory,
            chosen.placement,
            backend,
            nvme=folder,
            fingerprint=fingerprint,
            limit_bytes=limit_bytes,
            writes_per_day_bytes=settings.limits.nvme_writes_per_day_bytes,
            books=nvme,
            activations=chosen.places.get(Tier.NVME, ()),
        )
        undo.callback(memory.close)  # or the drive's folder would stay locked
        engines = _engines(models, optimizer, memory, chosen, outer=outer)
        forward_codec, gradient_codec = manifest.averaging.hop_codecs
        span = SpanEngine(
            engines,
            codec=codec(forward_codec),
            gradient_codec=codec(gradient_codec),
            hidden_size=manifest.model.config["hidden_size"],
            num_stages=manifest.model.num_stages,
            microbatch=(manifest.batch.sequences_per_microbatch, manifest.batch.sequence_length),
            wave=chosen.wave,
            wave_patience_s=chosen.patience_s,
            in_flight=chosen.in_flight,
            memory=memory,
            local=None if outer is None else _local_rules(manifest, stages),
            overlap=manifest.averaging.overlap,
        )
        if nvme is not None and not chosen.placement.uses(Tier.NVME) and (nvme / TABLE_FILE).exists():
            span.resumed = move_in(memory, engines, folder=nvme, fingerprint=fingerprint)
        for stage in stages:
            if stage not in span.resumed:
                engines[stage].initialise(manifest.model.init_seed)
        undo.pop_all()
    return span


def build_recomputer(manifest: Manifest, engine: SpanEngine, *, max_bytes: int) -> Recomputer:
    """Return what recomputes others' microbatches at these stages, with up to `max_bytes` of past weights."""
    forward_codec, gradient_codec = manifest.averaging.hop_codecs
    return Recomputer(
        manifest.model.config,
        num_stages=manifest.model.num_stages,
        engines=engine.engines,
        past=PastWeights(max_bytes=max_bytes),
        codec=codec(forward_codec),
        gradient_codec=codec(gradient_codec),
        microbatch=(manifest.batch.sequences_per_microbatch, manifest.batch.sequence_length),
    )


def _store_folder(nvme: Path | None, chosen: Provision, limit_bytes: int | None) -> tuple[Path | None, int | None]:
    """Return where a plan's store goes, and how large it may be.

    A store for activations alone must not take the place of a state that an earlier plan has left.
    """
    if nvme is None:
        return None, limit_bytes
    scratch = nvme / "activations"
    is_kept_there = chosen.placement.uses(Tier.NVME)
    if is_kept_there or not chosen.places.get(Tier.NVME):
        shutil.rmtree(scratch, ignore_errors=True)  # nothing in it lasts
    if is_kept_there:
        return nvme, limit_bytes
    left_bytes = allocated_bytes(nvme) - allocated_bytes(scratch)
    return scratch, None if limit_bytes is None else max(0, limit_bytes - left_bytes)


def _engines(
    models: Mapping[StageId, Stage],
    optimizer: OptimizerSpec,
    memory: Executor,
    chosen: Provision,
    *,
    outer: OuterSpec | None,
) -> dict[StageId, StageEngine]:
    """Make the engines of stages that share a memory, their blocks one behind the other."""
    arena = Arena(memory, chosen.places) if chosen.places else None
    engines, first_block = {}, 0
    for stage, model in models.items():
        own = range(first_block, first_block + len(model.blocks))
        engines[stage] = StageEngine(
            model,
            optimizer,
            memory,
            first_block=first_block,
            keep_budget_bytes=chosen.keep_bytes // (len(models) if chosen.kept is None else 1),
            kept=chosen.kept_in(own),
            parking=None if arena is None else Parking(arena, chosen.parked_in(own), chosen.spilled_in(own)),
            outer=outer,
        )
        first_block = own.stop
    return engines


def sections_apart(manifest: Manifest) -> tuple[Section, ...]:
    """Return what a run keeps besides weights, gradients and moments."""
    if manifest.averaging.mode is AveragingMode.DILOCO:
        return OUTER
    return (Section.HELD,) if manifest.averaging.overlap else ()


def _outer(manifest: Manifest) -> OuterSpec | None:
    """Return how the anchor moves, if replicas take steps of their own."""
    spec = manifest.averaging
    if spec.mode is not AveragingMode.DILOCO:
        return None
    return OuterSpec(
        learning_rate=spec.outer_learning_rate,
        momentum=spec.outer_momentum,
        fragments=spec.fragments,
        last_round=RoundId(manifest.batch.num_rounds - 1),
    )


def _local_rules(manifest: Manifest, stages: Sequence[StageId]) -> LocalRules:
    """Return when replicas take steps of their own, and how large those are."""
    return LocalRules(
        every=manifest.averaging.microbatches_per_step,
        clip={stage: clip_threshold(manifest, stage) for stage in stages},
        schedule=learning_rate(manifest),
    )


@contextmanager
def _torch_errors(stages: Sequence[StageId], device: str) -> Iterator[None]:
    """Translate torch's ways of saying "no such device" and "out of memory"."""
    try:
        yield
    except (RuntimeError, AssertionError) as error:
        reason = " ".join(str(error).split())[:200]
        raise LocalFault(f"cannot build stages {list(stages)} on '{device}': {reason}.") from None


def choose_device(wanted: str) -> str:
    """Resolve `auto`."""
    if wanted != "auto":
        return wanted
    return "cuda" if torch.cuda.is_available() else "cpu"


def _model(manifest: Manifest, stage: StageId, device: str) -> Stage:
    return build_stage(manifest.model.config, num_stages=manifest.model.num_stages, stage=stage, device=device)
