"""Answer `peer bench plan`: from what was asked on the command line to a plan.

Owns: turning options into model, budgets, profile and workload. Must not know: click, how a plan looks. torch is
imported only where this machine is measured, so that a plan for another machine is there at once.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from peer.memory.moments import MasterName, OptimizerName
from peer.memory.planning import machines
from peer.memory.planning.budgets import Budgets, Limits, budgets_here, check_limits, free_host_bytes
from peer.memory.planning.plan import Plan, plan
from peer.memory.planning.profile import Profile, calculated
from peer.memory.planning.workload import Mode, Workload
from peer.memory.units import Inventory
from protocol.architecture import check_config, preset, stage_blocks, untie
from protocol.errors import ConfigError
from protocol.layout import BlockLayout
from protocol.sizes import size_text

DEFAULT_PRESET = "demo"
DEFAULT_LENGTH = 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """What a plan is wanted for."""

    preset: str | None = None
    config: Path | None = None
    num_stages: int = 1
    stages: Sequence[int] = ()
    """Empty: all of them."""
    sequences: int
    sequence_length: int | None = None
    """None: the model's longest, up to 1,024."""
    microbatches: int
    optimizer: OptimizerName
    master: MasterName
    mode: Mode
    machine: str | None = None
    """None: this one."""
    device: str = "cpu"
    threads: int | None = None
    limits: Limits = field(default_factory=Limits)


def answer(question: Question) -> Plan:
    """Return the plan. Raises `ConfigError` for what cannot be, in one line."""
    config = _config(question)
    length = question.sequence_length or min(DEFAULT_LENGTH, config.get("max_position_embeddings", DEFAULT_LENGTH))
    stages = _stages(question)
    blocks = [block for stage in stages for block in stage_blocks(config, question.num_stages, stage)]
    if question.machine is not None:
        profile, budgets = _elsewhere(question, blocks, length)
    else:
        profile, budgets = _here(question, config, length)
    workload = Workload(
        mode=question.mode,
        microbatches=question.microbatches,
        stages_behind=question.num_stages - 1 - stages[-1],
        stages=len(stages),
    )
    found = plan(Inventory(blocks, question.optimizer, question.master), profile, budgets, workload)
    return found if question.machine is not None else replace(found, warnings=(*found.warnings, *_too_much(found)))


def _config(question: Question) -> dict[str, Any]:
    if question.preset is not None and question.config is not None:
        raise ConfigError("a model is either a preset or a config file.", hint="Leave one of the two out.")
    if question.config is None:
        config: Any = preset(question.preset or DEFAULT_PRESET)
    else:
        try:
            config = json.loads(question.config.read_text("utf-8"))
        except (OSError, ValueError) as error:
            raise ConfigError(f"cannot read {question.config}: {error}.") from None
        if not isinstance(config, Mapping):
            raise ConfigError(f"{question.config} is not the config.json of a model.")
    untied, _ = untie(config)
    check_config(untied)
    return untied


def _stages(question: Question) -> list[int]:
    stages = sorted(set(question.stages)) or list(range(question.num_stages))
    if stages != list(range(stages[0], stages[-1] + 1)):
        raise ConfigError("the stages of one peer follow each other.", hint="Name a row of stages without gaps.")
    if not 0 <= stages[0] <= stages[-1] < question.num_stages:
        raise ConfigError(
            f"there is no stage {stages[-1]} in a cut of {question.num_stages}.", hint="Stages count from 0."
        )
    return stages


def _elsewhere(question: Question, blocks: Sequence[BlockLayout], length: int) -> tuple[Profile, Budgets]:
    """Return what a machine should take by its data sheet, and what it usually has."""
    assert question.machine is not None
    limits = question.limits
    if limits.nvme is not None:
        raise ConfigError("a folder on this machine says nothing about another one.", hint="Leave --nvme out.")
    machine, device_bytes = machines.machine(question.machine)
    nvme_bytes = 0
    if machine.nvme_read_bytes_per_s is not None:
        nvme_bytes = machines.DRIVE_BYTES if limits.nvme_bytes is None else limits.nvme_bytes
    budgets = Budgets(
        device_bytes=device_bytes if limits.device_bytes is None else limits.device_bytes,
        host_bytes=machines.HOST_BYTES if limits.host_bytes is None else limits.host_bytes,
        nvme_bytes=nvme_bytes,
        nvme_writes_per_day_bytes=limits.nvme_writes_per_day_bytes,
    )
    profile = calculated(machine, blocks, sequences=question.sequences, sequence_length=length)
    return profile, budgets


def _here(question: Question, config: Mapping[str, Any], length: int) -> tuple[Profile, Budgets]:
    """Measure this machine."""
    limits = question.limits
    check_limits(limits)
    from peer.engine.build import choose_device  # these two import torch
    from peer.engine.measure import free_device_bytes, measure

    device = choose_device(question.device)
    budgets = budgets_here(limits, free_device_bytes=free_device_bytes(device))
    profile = measure(
        config,
        sequences=question.sequences,
        sequence_length=length,
        device=device,
        optimizer=question.optimizer,
        master=question.master,
        nvme=limits.nvme,
        threads=question.threads,
    )
    return profile, budgets


def _too_much(found: Plan) -> list[str]:
    free_bytes = free_host_bytes()
    wanted_bytes = found.prediction.process_bytes
    if wanted_bytes <= free_bytes:
        return []
    return [f"this takes {size_text(wanted_bytes)} of the host's memory, and {size_text(free_bytes)} are free now."]
