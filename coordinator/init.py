"""Make a run: text and a model in, a signed run directory out.

Owns: the order of the work (cheap checks first, so that nobody waits a minute for a typo), what overrides
what, and the manifest. Must not know: the command line, the network, torch. Behind `coordinator init` and the
start of `coordinator demo`; every step lives in its own module.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from coordinator.corpus import Corpus, open_corpus, stdlib_corpus
from coordinator.durable import check_empty, new_directory, storage_faults, write_file
from coordinator.presets import DEFAULT_PRESET, Preset, find_preset
from coordinator.rundir import KEY, READABLE_MANIFEST, SIGNED_MANIFEST, TOKENIZER, TOKENS
from coordinator.tokenfiles import write_token_files
from coordinator.tokenizer import DEFINITION, TextTokenizer, make_tokenizer
from protocol.architecture import ModelConfig, check_config, stage_blocks, stage_layers, untie
from protocol.batches import check_enough_tokens, num_windows
from protocol.errors import ConfigError, ModelError, WireError
from protocol.manifest import MANIFEST_CONTEXT, AveragingSpec, BatchSpec, DataSpec, Manifest, ModelSpec
from protocol.signing import seal
from protocol.transport.identity import create
from protocol.wire import Message

MODEL_CONFIG = "config.json"
MAX_NAME_CHARS = 64
SECTIONS = ("batch", "optimizer", "averaging", "timing", "keeping")
# What a config says about the checkpoint or the vocabulary it came with; neither comes along.
_FOREIGN_KEYS = ("_name_or_path", "dtype", "torch_dtype", "transformers_version")

Note = Callable[[str], None]
M = TypeVar("M", bound=Message)


@dataclass(frozen=True, slots=True)
class _Plan:
    """What was asked for, after all checks that need no text."""

    name: str
    preset: Preset
    config: dict[str, Any]
    is_own_config: bool
    was_tied: bool
    tokenizer: str
    seed: int


def init_run(
    directory: Path,
    *,
    corpus: Sequence[Path] | None = None,
    preset: str = DEFAULT_PRESET,
    model: Path | None = None,
    tokenizer: str | None = None,
    stages: int | None = None,
    rounds: int | None = None,
    name: str | None = None,
    seed: int = 0,
    overrides: Mapping[str, Any] | None = None,
    note: Note = lambda line: None,
    now_s: float | None = None,
) -> Manifest:
    """Make the run directory and return its manifest; on any error there is no directory.

    `corpus` None is the standard library's source. `model` is a folder with a Hugging Face config.json (or that
    file), trained with the preset's settings. `overrides` maps `section.field` of the manifest to a value, as in
    `{"batch.eval_every": 5}`. `seed` starts both the weights and the order of the data. `note` is told, in one
    line each, what was decided that nobody asked for.
    """
    with storage_faults(directory):
        check_empty(directory)
    settings = {"batch.data_seed": seed, **(overrides or {})}
    if rounds is not None:
        settings["batch.num_rounds"] = rounds
    base = find_preset(preset)
    chosen = replace(base, **overridden(sections_of(base), settings))
    name = directory.resolve().name if name is None else name
    plan = _plan(chosen, model=model, tokenizer=tokenizer, stages=stages, name=name, seed=seed, note=note)
    text = stdlib_corpus() if corpus is None else open_corpus(corpus)
    with new_directory(directory, last=SIGNED_MANIFEST) as staging:
        made, data = _write_data(staging, text, plan)
        batch = plan.preset.batch
        if "batch.heldout_sequences" not in settings:
            batch = _fit_evaluation(batch, data, note=note)
        check_enough_tokens(data, batch)
        spec = _model_spec(plan, made, note=note)
        created_s = time.time() if now_s is None else now_s
        return _write_manifest(staging, plan, model=spec, data=data, batch=batch, created_s=created_s)


def readable(manifest: Manifest) -> str:
    """Return the manifest as JSON for people: hashes in hex, the model's config as an object."""
    fields = _plain(manifest.model_dump())
    fields["model"]["config"] = json.loads(fields["model"].pop("config_json"))
    about = f"For reading only. What counts is {SIGNED_MANIFEST}; a changed run is a new run."
    return json.dumps({"about": about, "run": manifest.run_id, **fields}, indent=2) + "\n"


def check_averaging(spec: AveragingSpec, config: ModelConfig, num_stages: int) -> None:
    """Raise `ConfigError` unless what is said of averaging fits the cut of the model."""
    if len(spec.stage_codecs) not in (0, num_stages):
        raise ConfigError(
            f"averaging.stage_codecs names {len(spec.stage_codecs)} codecs for {num_stages} stages.",
            hint="Name one for every stage, or set averaging.codec for all of them.",
        )
    fewest = min(len(stage_blocks(config, num_stages, stage)) for stage in range(num_stages))
    if spec.fragments > fewest:
        raise ConfigError(
            f"a stage of {fewest} layers and tables cannot be averaged in {spec.fragments} fragments.",
            hint=f"Set averaging.fragments to at most {fewest}, or cut the model into fewer stages.",
        )


def sections_of(owner: Preset | Manifest) -> dict[str, Any]:
    """Return the sections whose fields `--set` changes."""
    return {section: getattr(owner, section) for section in SECTIONS}


def overridden(sections: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """Return sections of a manifest with fields replaced, or raise `ConfigError` naming the one that cannot be."""
    changes: dict[str, dict[str, Any]] = {}
    for key, value in values.items():
        section, _, field = key.partition(".")
        if section not in sections or field not in type(sections[section]).model_fields:
            known = ", ".join(type(sections[section]).model_fields) if section in sections else ", ".join(SECTIONS)
            raise ConfigError(f"there is no setting '{key}'.", hint=f"Known there are {known}.")
        changes.setdefault(section, {})[field] = value
    found = dict(sections)
    for section, fields in changes.items():  # together: whether one can be may depend on another, not on their order
        what = " with ".join(f"{section}.{field}" for field in fields)
        found[section] = _checked(type(found[section]), {**found[section].model_dump(), **fields}, what)
    return found


def read_model_config(path: Path) -> dict[str, Any]:
    """Read a Hugging Face config.json, given itself or its folder, or raise `ModelError`."""
    file = path / MODEL_CONFIG if path.is_dir() else path
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        hint = "--model wants a folder with a Hugging Face config.json."
        raise ModelError(f"cannot read {file}: {error.strerror}.", hint=hint) from error
    except ValueError as error:
        raise ModelError(f"{file} is not JSON: {error}.") from None
    if not isinstance(config, dict):
        raise ModelError(f"{file} does not hold a model's config.")
    return config


def _plan(
    preset: Preset, *, model: Path | None, tokenizer: str | None, stages: int | None, name: str, seed: int, note: Note
) -> _Plan:
    """Settle model, cut and tokenizer, and check them as far as that goes without text."""
    config, was_tied = untie(preset.config if model is None else read_model_config(model))
    if was_tied:
        note("the model's head was tied to its embedding; here each gets its own weights, on its own stage")
    check_config(config)
    num_layers = config["num_hidden_layers"]
    num_stages = min(preset.num_stages, num_layers) if stages is None else stages
    stage_layers(config, num_stages)
    check_averaging(preset.averaging, config, num_stages)
    positions = config.get("max_position_embeddings")
    if positions is not None and preset.batch.sequence_length > positions:
        raise ModelError(
            f"the model sees {positions} tokens at once, fewer than the sequences of {preset.batch.sequence_length}.",
            hint=f"Set batch.sequence_length to at most {positions}.",
        )
    if not 1 <= len(name) <= MAX_NAME_CHARS:
        raise ConfigError(
            f"a run's name has 1 to {MAX_NAME_CHARS} characters, not {len(name)}.", hint="Choose one with --name."
        )
    if tokenizer is None and model is not None and model.is_dir() and (model / DEFINITION).is_file():
        tokenizer = str(model)
    return _Plan(
        name=name,
        preset=replace(preset, num_stages=num_stages),
        config=config,
        is_own_config=model is not None,
        was_tied=was_tied,
        tokenizer=tokenizer or preset.tokenizer,
        seed=seed,
    )


def _checked(kind: type[M], fields: Mapping[str, Any], what: str) -> M:
    try:
        return kind.from_plain(fields)
    except WireError as error:
        raise ConfigError(f"{what} is impossible: {error}.") from None


def _write_data(staging: Path, corpus: Corpus, plan: _Plan) -> tuple[TextTokenizer, DataSpec]:
    made = make_tokenizer(plan.tokenizer, corpus, model_max_length=plan.preset.batch.sequence_length)
    made.save(staging / TOKENIZER)
    with storage_faults(staging / TOKENS):
        (staging / TOKENS).mkdir()
    return made, write_token_files(staging / TOKENS, corpus, made)


def _fit_evaluation(batch: BatchSpec, data: DataSpec, *, note: Note) -> BatchSpec:
    """Evaluate on fewer sequences where the held-out text is short, rather than refuse a small corpus."""
    there_are = num_windows(data.heldout.num_tokens, batch.sequence_length)
    if not 0 < there_are < batch.heldout_sequences:
        return batch
    note(f"the held-out text makes {there_are} sequences instead of {batch.heldout_sequences}; evaluations use those")
    return batch.model_copy(update={"heldout_sequences": there_are})


def _model_spec(plan: _Plan, tokenizer: TextTokenizer, *, note: Note) -> ModelSpec:
    """Fit the config to the tokenizer: its vocabulary, its special ids."""
    config = {key: value for key, value in plan.config.items() if key not in _FOREIGN_KEYS}
    size = tokenizer.vocab_size
    if plan.is_own_config and config["vocab_size"] != size:
        note(
            f"the vocabulary has {size} tokens as in the tokenizer, not {config['vocab_size']} as in the model's config"
        )
    config |= {
        "vocab_size": size,
        "bos_token_id": tokenizer.separator_id,
        "eos_token_id": tokenizer.separator_id,
        "pad_token_id": None,
    }
    check_config(config)
    fields = {
        "config_json": json.dumps(config, sort_keys=True, separators=(",", ":")),
        "num_stages": plan.preset.num_stages,
        "init_seed": plan.seed,
        "was_tied": plan.was_tied,
    }
    return _checked(ModelSpec, fields, "the model's config")


def _write_manifest(
    staging: Path, plan: _Plan, *, model: ModelSpec, data: DataSpec, batch: BatchSpec, created_s: float
) -> Manifest:
    """Make the coordinator's key and have it sign what the run is."""
    key = create(staging / KEY)
    manifest = Manifest(
        name=plan.name,
        created_s=created_s,
        coordinator=key.peer_id,
        model=model,
        data=data,
        batch=batch,
        optimizer=plan.preset.optimizer,
        averaging=plan.preset.averaging,
        timing=plan.preset.timing,
        keeping=plan.preset.keeping,
    )
    write_file(staging / READABLE_MANIFEST, readable(manifest).encode())
    write_file(staging / SIGNED_MANIFEST, seal(key, MANIFEST_CONTEXT, manifest).to_bytes())
    return manifest


def _plain(value: Any) -> Any:
    if isinstance(value, bytes):
        return value.hex()
    if isinstance(value, Mapping):
        return {key: _plain(entry) for key, entry in value.items()}
    return [_plain(entry) for entry in value] if isinstance(value, (list, tuple)) else value
