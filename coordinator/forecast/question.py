"""From what `coordinator plan` was asked to a swarm, a model and a recipe.

Owns: which of a run directory, a preset and a model's config says what, how peers are written, and refusing what cannot
be in one line. Must not know: click, what is forecast.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from coordinator.forecast.swarm import DEFAULT_PING_MS, DEFAULT_WAVE, Model, Peers, Recipe, Swarm
from coordinator.init import check_averaging, overridden, read_model_config, sections_of
from coordinator.presets import DEFAULT_PRESET, find_preset
from coordinator.rundir import RunDir
from coordinator.tokenizer import foreseen_size
from protocol.architecture import check_config, stage_layers, untie
from protocol.errors import ConfigError
from protocol.sizes import parse_size

MAX_PEERS = 1_000_000
PEERS_EXAMPLE = "Write it like 8x20/100mbps,10tflops,device=8GB,host=32GB."
SEPARATOR = "/"  # between the seconds of stages


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """What was asked. None: not said."""

    directory: Path | None = None
    preset: str | None = None
    model: Path | None = None
    num_stages: int | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    kinds: tuple[str, ...] = ()
    """Of peers, as people write them."""
    num_peers: int | None = None
    """More peers, of the kind that `usual` says."""
    replicas: int | None = None
    """The same, so many for every stage."""
    usual: Mapping[str, str | float | None] = field(default_factory=dict)
    """What peers have of whom nothing else is said: as the words in `kinds`, by the fields of `Peers`."""
    ping_ms: float | None = None
    boundary_s: float | None = None
    wave: int | None = None
    stages_per_peer: int = 1
    in_flight: int | None = None
    recomputes: bool = True
    target_tokens: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """The same, ready for a forecast."""

    name: str
    """Of run, preset or model."""
    swarm: Swarm
    model: Model
    recipe: Recipe
    target_tokens: float


def read_question(question: Question) -> Asked:
    """Settle everything. Raises `ConfigError` for what cannot be."""
    name, config, num_stages, sections = _source(question)
    num_stages = num_stages if question.num_stages is None else question.num_stages
    stage_layers(config, num_stages)  # refuses cuts that cannot be
    sections = overridden(sections, question.settings)
    check_averaging(sections["averaging"], config, num_stages)
    recipe = Recipe(**sections)
    tokens = question.target_tokens
    if tokens is not None and not math.isfinite(tokens):
        raise ConfigError(f"{tokens} is not a number of tokens.")
    return Asked(
        name=name,
        swarm=_swarm(question, num_stages),
        model=Model(config, num_stages),
        recipe=recipe,
        target_tokens=float(recipe.batch.num_rounds * recipe.batch.tokens_per_round) if tokens is None else tokens,
    )


def _source(question: Question) -> tuple[str, Mapping[str, Any], int, dict[str, Any]]:
    """Return name, config, stages and sections of the manifest, from wherever they are to come."""
    if question.directory is not None:
        if question.preset is not None or question.model is not None:
            raise ConfigError("a run has its own model and settings.", hint="Leave out --preset and --model.")
        manifest = RunDir.open(question.directory).manifest
        return manifest.name, manifest.model.config, manifest.model.num_stages, sections_of(manifest)
    if question.preset is None and question.model is None:
        raise ConfigError("there is nothing to plan.", hint="Name a run's directory, or a --preset, or a --model.")
    preset = find_preset(question.preset or DEFAULT_PRESET)
    config = preset.config if question.model is None else read_model_config(question.model)
    if question.model is None and (size := foreseen_size(preset.tokenizer)) is not None:
        config = {**config, "vocab_size": size}
    config, _ = untie(config)
    check_config(config)
    name = preset.name if question.model is None else question.model.resolve().name
    return name, config, min(preset.num_stages, config["num_hidden_layers"]), sections_of(preset)


# -- peers --------------------------------------------------------------------------------------------


def _swarm(question: Question, num_stages: int) -> Swarm:
    usual = _with(Peers(count=1), {key: value for key, value in question.usual.items() if value is not None})
    kinds = [read_peers(text, usual) for text in question.kinds]
    num_spans = max(1, num_stages // question.stages_per_peer)
    more = question.num_peers or (question.replicas or 0) * num_spans or (0 if kinds else num_spans)
    kinds += [replace(usual, count=more)] if more else []
    if sum(peers.count for peers in kinds) > MAX_PEERS:
        raise ConfigError(f"a swarm of more than {MAX_PEERS:,} peers is beyond this plan.")
    for measured in (peers.stage_seconds for peers in kinds):
        if len(measured) not in (0, 1, num_stages):
            raise ConfigError(
                f"{len(measured)} stages were measured, and there are {num_stages}.",
                hint=f"Give one number of seconds for all stages, or one for each as in 0.3{SEPARATOR}0.25.",
            )
    for what, number in (("latency", question.ping_ms), ("round", question.boundary_s)):
        if number is not None and not math.isfinite(number):
            raise ConfigError(f"{what}: {number} is not a time.")
    return Swarm(
        peers=tuple(kinds),
        ping_ms=DEFAULT_PING_MS if question.ping_ms is None else question.ping_ms,
        stages_per_peer=question.stages_per_peer,
        wave=question.wave or DEFAULT_WAVE,
        recomputes=question.recomputes,
        in_flight=question.in_flight,
        boundary_s=question.boundary_s,
    )


def read_peers(text: str, usual: Peers) -> Peers:
    """Read `COUNTxUP/DOWNmbps,Ntflops,NAME=VALUE,...`; what is left out is as usual. Raises `ConfigError`."""
    found = re.fullmatch(r"(?:(\d+)x)?(.*)", "".join(text.lower().split()), re.ASCII)
    assert found is not None, "anything fits the second group"
    values: dict[str, str | float] = {"count": found[1] or "1"}
    for word in filter(None, found[2].split(",")):
        values |= _values(word, text)
    return _with(usual, values)


def _values(word: str, text: str) -> dict[str, str | float]:
    if match := re.fullmatch(r"([\d.]+)/([\d.]+)mbps", word):
        return {"upload_mbps": match[1], "download_mbps": match[2]}
    if match := re.fullmatch(r"([\d.]+)tflops", word):
        return {"tflops": match[1], "stage_seconds": ""}  # what was measured was of others
    key, _, value = word.partition("=")
    if key in _KEYS and value:
        return {_KEYS[key]: value}
    raise ConfigError(f"--peer {text[:60]}: '{word[:40]}' says nothing about peers.", hint=PEERS_EXAMPLE)


_KEYS = {
    "device": "device_bytes",
    "host": "host_bytes",
    "pcie": "pcie_gb_per_s",
    "drive": "drive_gb_per_s",
    "seconds": "stage_seconds",
}
OPTIONS = {
    "count": "peers",
    "device_bytes": "device memory",
    "host_bytes": "host memory",
    "upload_mbps": "upload",
    "download_mbps": "download",
    "tflops": "tflops",
    "pcie_gb_per_s": "pcie",
    "drive_gb_per_s": "drive",
    "stage_seconds": "stage seconds",
}
assert {*OPTIONS} == {each.name for each in fields(Peers)}


def _with(peers: Peers, values: Mapping[str, str | float]) -> Peers:
    """Return peers with some fields replaced by what was written for them."""
    return replace(peers, **{key: _read(key, str(value)) for key, value in values.items()})


def _read(key: str, text: str) -> Any:
    what = OPTIONS[key]
    if key == "count":
        if not 1 <= int(text) <= MAX_PEERS:
            raise ConfigError(f"{what}: {text[:20]} is not a number from 1 to {MAX_PEERS:,}.")
        return int(text)
    if key in ("device_bytes", "host_bytes"):
        return parse_size(text, what=what)
    if key == "stage_seconds":
        return tuple(_positive(each, what) for each in text.split(SEPARATOR)) if text else ()
    return _positive(text, what)


def _positive(text: str, what: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0 < number < math.inf:
        raise ConfigError(f"{what}: '{text[:40]}' is not a number above 0.", hint=PEERS_EXAMPLE)
    return number
