"""Decide how a span trains within this volunteer's limits: as a whole on the device, or by a plan.

Owns: the short way for spans that fit, and what a plan means for the engine. Must not know: how a plan is made
(`peer/memory/planning/plan.py`), how the memory is used. `build.py` does what is chosen here.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import structlog
import torch

from peer.engine.measure import free_device_bytes, measure
from peer.memory.disk.durable_files import allocated_bytes, make_folder, publish, write_temporary
from peer.memory.disk.store_folder import TABLE_FILE
from peer.memory.placement import Placement, Slots, Tier, all_on_device, check_placement, footprint
from peer.memory.planning.budgets import Budgets, budgets_here, free_disk_bytes, total_host_bytes
from peer.memory.planning.machines import machine
from peer.memory.planning.plan import Plan, plan
from peer.memory.planning.profile import STEP_WORKSPACE_BYTES, Profile, calculated
from peer.memory.planning.ways import Needs, Way
from peer.memory.planning.workload import Mode, Workload
from peer.memory.segments import Segment
from peer.memory.units import SLOTTED, Inventory, Section
from peer.settings import PeerSettings
from protocol.ids import StageId
from protocol.manifest import AveragingMode, Manifest
from protocol.sizes import size_text

log = structlog.get_logger()

ANY_MACHINE = "24gb-pcie4x16"  # what computing takes in bytes is alike on all of them


@dataclass(frozen=True, slots=True, kw_only=True)
class Provision:
    """How a span trains."""

    placement: Placement
    keep_bytes: int
    """What graphs may take that are kept for the backward pass."""
    wave: int = 1
    patience_s: float = 0.0
    """How long the first microbatch of a wave waits for the others."""
    kept: frozenset[Segment] | None = None
    """The segments of the span whose graphs may be kept on the device. None: any, as long as there is room."""
    parked: Mapping[int, Tier] = field(default_factory=dict)
    """Where the inputs of these blocks of the span wait, if not on the device."""
    spilled: Mapping[Segment, Tier] = field(default_factory=dict)
    """Where what the graphs of these segments of the span have saved waits."""
    places: Mapping[Tier, Sequence[int]] = field(default_factory=dict)
    """The sizes of the places for all of that."""
    in_flight: int | None = None
    """How many microbatches may be between their forward and backward pass. None: as many as like."""
    peak_bytes: Mapping[Tier, int] = field(default_factory=dict)
    """What the plan takes of every tier."""

    def kept_in(self, blocks: range) -> set[Segment] | None:
        """Return whose graphs may be kept, for the blocks of one stage, counted within it."""
        return None if self.kept is None else {_within(blocks, each) for each in self.kept if each.block in blocks}

    def parked_in(self, blocks: range) -> dict[int, Tier]:
        """Return where inputs wait, for the blocks of one stage, counted within it."""
        return {block - blocks.start: tier for block, tier in self.parked.items() if block in blocks}

    def spilled_in(self, blocks: range) -> dict[Segment, Tier]:
        """Return where what graphs have saved waits, for the blocks of one stage, counted within it."""
        return {_within(blocks, each): tier for each, tier in self.spilled.items() if each.block in blocks}


def _within(blocks: range, segment: Segment) -> Segment:
    return Segment(segment.block - blocks.start, segment.part)


def choose(
    manifest: Manifest,
    inventory: Inventory,
    settings: PeerSettings,
    *,
    device: str,
    stages: Sequence[StageId],
    nvme: Path | None = None,
) -> Provision:
    """Return the provision for a span of these stages.

    Raises `ConfigError`, saying what would make it fit, if nothing does.
    A span that fits its device as a whole needs no plan; for others, this machine is measured for some seconds. A plan
    is remembered beside the folder `nvme` of the span's state, and made anew only if the volunteer's limits are others
    or it can no longer be carried out: how much is free changes with every browser tab, and with our own files.
    """
    workload = Workload(
        mode=Mode.AVERAGED,
        microbatches=_per_step(manifest),
        stages_behind=manifest.model.num_stages - 1 - max(stages),
        stages=len(stages),
        longest_pass_s=manifest.timing.hop_silence_s / 2,
    )
    key = _key(manifest, inventory, settings, device)
    remembered = None if nvme is None else _read(_memo(nvme), inventory, key=key)
    if remembered is not None and not _fits_machine(remembered, device, nvme):
        log.warning("memory.plan_outgrown", device=device)
        remembered = None
    has_state = nvme is not None and (nvme / TABLE_FILE).exists()
    if remembered is not None and has_state:
        return remembered  # even if all of it would fit the device today: there lies the state
    budgets = budgets_here(settings.limits, free_device_bytes=free_device_bytes(device), store=nvme)
    whole = _whole(manifest, inventory, settings, budgets, workload)
    chosen = whole or remembered
    if chosen is None:
        profile = _measured(manifest, inventory, settings, device=device)
        made = plan(inventory, profile, budgets, workload)
        if nvme is not None and has_state and made.places.get(Tier.NVME) and not made.placement.uses(Tier.NVME):
            # what an earlier plan has left stays where it is
            left_bytes = max(0, budgets.nvme_bytes - allocated_bytes(nvme))
            made = plan(inventory, profile, replace(budgets, nvme_bytes=left_bytes), workload)
        chosen = _as_provision(made)
        if nvme is not None:
            _write(_memo(nvme), chosen, inventory, key=key)
    return chosen


def _per_step(manifest: Manifest) -> int:
    """Return how many microbatches go into an optimizer step."""
    spec, per_round = manifest.averaging, manifest.batch.microbatches_per_round
    return per_round if spec.mode is AveragingMode.GRADIENT else min(per_round, spec.microbatches_per_step)


def _whole(
    manifest: Manifest, inventory: Inventory, settings: PeerSettings, budgets: Budgets, workload: Workload
) -> Provision | None:
    """Return the provision of a span that fits its device as a whole, with what computing takes besides."""
    batch, placement = manifest.batch, all_on_device(inventory)
    profile = calculated(
        machine(ANY_MACHINE)[0],
        inventory.blocks,
        sequences=batch.sequences_per_microbatch,
        sequence_length=batch.sequence_length,
    )
    needs = Needs(inventory, replace(profile, step_workspace_bytes=STEP_WORKSPACE_BYTES), workload)
    num_steady = workload.stages_behind + 1  # one here, and one at each of the stages behind
    left_bytes = budgets.device_bytes - footprint(inventory, placement)[Tier.DEVICE] - _computing(needs, num_steady)
    if left_bytes < settings.activation_bytes // 2:
        return None
    keep_bytes = min(settings.activation_bytes, left_bytes)
    usual = max(settings.slots, manifest.model.num_stages + 1)  # which a peer takes on in any case (`span_parts.py`)
    room = num_steady + _more_in_flight(needs, num_steady, left_bytes - keep_bytes)
    return Provision(placement=placement, keep_bytes=keep_bytes, in_flight=max(usual, room))


def _computing(needs: Needs, in_flight: int) -> int:
    """Return what computing takes of the device, at worst, with so many microbatches in flight and no graphs kept."""
    _, rows = needs.computing(Way(wave=1, waves_in_flight=in_flight))
    return sum(row[Tier.DEVICE] for row in rows.values())


def _more_in_flight(needs: Needs, in_flight: int, left_bytes: int) -> int:
    """Return for how many microbatches more there is room, of those that a round has."""
    each_bytes = _computing(needs, in_flight + 1) - _computing(needs, in_flight)
    most = max(0, needs.workload.microbatches - in_flight)
    return min(most, left_bytes // each_bytes) if most else 0


def _measured(manifest: Manifest, inventory: Inventory, settings: PeerSettings, *, device: str) -> Profile:
    """Measure this machine with the run's model and microbatches."""
    batch = manifest.batch
    return measure(
        manifest.model.config,
        sequences=batch.sequences_per_microbatch,
        sequence_length=batch.sequence_length,
        device=device,
        optimizer=inventory.optimizer,
        master=inventory.master,
        nvme=settings.limits.nvme,
    )


def _as_provision(chosen: Plan) -> Provision:
    """Carry a plan out, and say so."""
    for warning in chosen.warnings:
        log.warning("memory.plan", warning=warning)
    num_waves = len(chosen.workload.waves(chosen.wave))
    log.info(
        "memory.planned",
        wave=chosen.wave,
        device=size_text(chosen.prediction.peak_bytes[Tier.DEVICE]),
        host=size_text(chosen.prediction.peak_bytes[Tier.HOST]),
        nvme=size_text(chosen.prediction.peak_bytes[Tier.NVME]),
        in_memory=round(_share_in_memory(chosen.inventory, chosen.placement), 3),
        step_s=round(chosen.prediction.step_s, 3),
    )
    return Provision(
        placement=chosen.placement,
        keep_bytes=chosen.keep_bytes,
        wave=chosen.wave,
        patience_s=0.0 if chosen.wave == 1 else chosen.prediction.step_s / (2 * num_waves),
        kept=chosen.kept,
        parked=chosen.parked,
        spilled=chosen.spilled,
        places=chosen.places,
        in_flight=chosen.in_flight,
        peak_bytes=chosen.prediction.peak_bytes,
    )


def _share_in_memory(inventory: Inventory, placement: Placement) -> float:
    """Return how much of the training state is in memory, slots included."""
    taken = footprint(inventory, placement)
    whole = sum(inventory.num_bytes(unit) for section in Section for unit in inventory.units(section))
    return (taken[Tier.DEVICE] + taken[Tier.HOST]) / whole


# -- remembering ----------------------------------------------------------------------------------------


def _memo(nvme: Path) -> Path:
    return nvme.with_name(f"{nvme.name}.plan.json")


def _fits_machine(chosen: Provision, device: str, nvme: Path | None) -> bool:
    """Tell whether a plan can be carried out at all, whatever else uses the machine at the moment."""
    peak_bytes = dict.fromkeys(Tier, 0) | dict(chosen.peak_bytes)
    total_bytes = total_host_bytes()
    if device.startswith("cuda"):
        if peak_bytes[Tier.DEVICE] > torch.cuda.mem_get_info(device)[1]:
            return False
    else:
        total_bytes -= peak_bytes[Tier.DEVICE]
    room_bytes = 0 if nvme is None else free_disk_bytes(nvme, margin_bytes=0) + allocated_bytes(nvme)
    return peak_bytes[Tier.HOST] <= total_bytes and peak_bytes[Tier.NVME] <= room_bytes


def _key(manifest: Manifest, inventory: Inventory, settings: PeerSettings, device: str) -> str:
    """Return what a plan depends on, but for how much is free at the moment."""
    parts = (
        manifest.run_id,
        [block.name for block in inventory.blocks],
        device,
        settings.threads,
        settings.limits,
    )
    return repr(parts)


def _write(memo: Path, chosen: Provision, inventory: Inventory, *, key: str) -> None:
    homes = chosen.placement.homes
    record = {
        "key": key,
        "homes": [[homes.get(unit) for unit in inventory.units(section)] for section in Section],
        "slots": [chosen.placement.slots.of(section) for section in SLOTTED],
        "keep_bytes": chosen.keep_bytes,
        "wave": chosen.wave,
        "patience_s": chosen.patience_s,
        "kept": None if chosen.kept is None else sorted(chosen.kept),
        "parked": sorted(chosen.parked.items()),
        "spilled": sorted(chosen.spilled.items()),
        "places": sorted((tier, sorted(Counter(sizes).items())) for tier, sizes in chosen.places.items()),
        "in_flight": chosen.in_flight,
        "peak_bytes": sorted(chosen.peak_bytes.items()),
    }
    make_folder(memo.parent)
    publish(write_temporary(memo, json.dumps(record).encode()), memo)


def _read(memo: Path, inventory: Inventory, *, key: str) -> Provision | None:
    """Return the plan that was made for the same, if there is one that can be read."""
    try:
        record = json.loads(memo.read_text())
        if record["key"] != key:
            return None
        homes = {
            unit: Tier(tier)
            for section, tiers in zip(Section, record["homes"], strict=True)
            for unit, tier in zip(inventory.units(section), tiers, strict=True)
            if tier is not None
        }
        slots = Slots(**{section.value: int(count) for section, count in zip(SLOTTED, record["slots"], strict=True)})
        placement = Placement(homes=homes, slots=slots)
        check_placement(inventory, placement)
        return Provision(
            placement=placement,
            keep_bytes=int(record["keep_bytes"]),
            wave=int(record["wave"]),
            patience_s=float(record["patience_s"]),
            kept=None if record["kept"] is None else frozenset(Segment(*map(int, each)) for each in record["kept"]),
            parked={int(block): Tier(tier) for block, tier in record["parked"]},
            spilled={Segment(*map(int, each)): Tier(tier) for each, tier in record["spilled"]},
            places={
                Tier(tier): tuple(Counter({int(size): int(count) for size, count in sizes}).elements())
                for tier, sizes in record["places"]
            },
            in_flight=None if record["in_flight"] is None else int(record["in_flight"]),
            peak_bytes={Tier(tier): int(size) for tier, size in record["peak_bytes"]},
        )
    except (OSError, ValueError, KeyError, TypeError):  # none, or one of an older version: a new one costs seconds
        return None
