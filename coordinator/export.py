"""Turn the newest checkpoint into a plain Hugging Face model folder.

Owns: the folder's files and the checks that it will load: every stage's weights file becomes one shard of the
model. Must not know: torch (files are copied and their headers read), the network. Behind
`coordinator export DIR --to HF_DIR` and the end of `coordinator demo`.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from coordinator.checkpointfiles import WEIGHTS, Checkpoint
from coordinator.durable import check_empty, new_directory, storage_faults
from coordinator.rundir import RunDir
from protocol.architecture import stage_tensors
from protocol.errors import ConfigError, StorageError, WireError
from protocol.ids import RoundId
from protocol.manifest import Manifest
from protocol.tensors import PREFIX_BYTES, TensorHeader, check_tensors, header_length, parse_header

CONFIG = "config.json"
INDEX = "model.safetensors.index.json"
GENERATION_CONFIG = "generation_config.json"
MODEL_CARD = "README.md"
_TORCH_NAMES: Mapping[str, str] = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}


@dataclass(frozen=True, slots=True)
class Exported:
    """What was exported, and where to."""

    path: Path
    round: RoundId
    num_parameters: int


@dataclass(frozen=True, slots=True)
class _Shard:
    """One stage's weights: where they are, what they hold, what they will be called."""

    source: Path
    header: TensorHeader
    name: str


def export(run: RunDir, to: Path, *, facts: Mapping[str, str] | None = None) -> Exported:
    """Write the newest sound checkpoint as a model folder at `to`, which must not exist or be empty.

    `facts` are further lines for the model card, such as the held-out loss. Raises `ConfigError` if there is
    nothing to export yet, `StorageError` if the weights are not those of the run's model.
    """
    with storage_faults(to):
        check_empty(to)
    checkpoint = run.newest_checkpoint()
    if checkpoint is None:
        raise ConfigError(f"{run.path} has no sound checkpoint yet.", hint="Let the run reach its first checkpoint.")
    tokenizer = run.tokenizer_files()
    shards = _shards(run.manifest, checkpoint)
    num_parameters = sum(prod(entry.shape) for shard in shards for entry in shard.header.tensors.values())
    with new_directory(to, last=CONFIG) as folder, storage_faults(to):
        for shard in shards:
            shutil.copyfile(shard.source, folder / shard.name)
        for name, data in tokenizer.items():
            (folder / name).write_bytes(data)
        config = _config(run.manifest, shards)
        _write_json(folder / INDEX, _index(shards, num_parameters))
        _write_json(folder / GENERATION_CONFIG, _generation_config(config))
        _write_json(folder / CONFIG, config)
        card = _model_card(run.manifest, checkpoint, num_parameters=num_parameters, facts=facts or {})
        (folder / MODEL_CARD).write_text(card, encoding="utf-8")
    return Exported(to, checkpoint.round, num_parameters)


def read_tensor_header(path: Path) -> TensorHeader:
    """Read and check the header of a safetensors file, or raise `StorageError`."""
    try:
        with path.open("rb") as file:
            length = header_length(file.read(PREFIX_BYTES))
            data = file.read(length)
            if len(data) < length:
                raise WireError("the file ends inside its header")
            return parse_header(data, file_bytes=path.stat().st_size)
    except OSError as error:
        raise StorageError(f"cannot read {path}: {error.strerror}.") from error
    except WireError as error:
        raise StorageError(f"{path} is not a safetensors file: {error}.") from error


def _shards(manifest: Manifest, checkpoint: Checkpoint) -> list[_Shard]:
    """Check every stage's weights against the model and give them their Hugging Face names."""
    shards = []
    num_stages = manifest.model.num_stages
    for stage in range(num_stages):
        path = checkpoint.file(stage, WEIGHTS)
        header = read_tensor_header(path)
        try:
            check_tensors(header, stage_tensors(manifest.model.config, num_stages, stage))
        except WireError as error:
            raise StorageError(f"{path} does not hold stage {stage}: {error}.") from error
        if header.metadata.get("format") != "pt":  # without it transformers refuses the file
            raise StorageError(f"{path} does not say that its tensors are PyTorch's.")
        shards.append(_Shard(path, header, f"model-{stage + 1:05d}-of-{num_stages:05d}.safetensors"))
    return shards


def _config(manifest: Manifest, shards: list[_Shard]) -> dict[str, Any]:
    dtypes = {entry.dtype for shard in shards for entry in shard.header.tensors.values()}
    if len(dtypes) != 1 or not dtypes <= _TORCH_NAMES.keys():
        raise StorageError(
            f"the weights have the types {', '.join(sorted(dtypes))}, not one of {', '.join(_TORCH_NAMES)}."
        )
    return {
        **manifest.model.config,
        "tie_word_embeddings": False,
        "torch_dtype": _TORCH_NAMES[dtypes.pop()],
    }


def _index(shards: list[_Shard], num_parameters: int) -> dict[str, Any]:
    total_size = sum(entry.num_bytes for shard in shards for entry in shard.header.tensors.values())
    return {
        "metadata": {"total_parameters": num_parameters, "total_size": total_size},
        "weight_map": {name: shard.name for shard in shards for name in shard.header.tensors},
    }


def _generation_config(config: Mapping[str, Any]) -> dict[str, Any]:
    ids = {key: config[key] for key in ("bos_token_id", "eos_token_id") if config.get(key) is not None}
    return {**ids, "do_sample": True}  # a small model that always takes the likeliest token repeats itself


def _model_card(manifest: Manifest, checkpoint: Checkpoint, *, num_parameters: int, facts: Mapping[str, str]) -> str:
    versions = {stage.version for stage in checkpoint.record.stages}
    lines = {
        "Run": f"`{manifest.run_id}`, signed by `{manifest.coordinator}`",
        "Parameters": f"{num_parameters:,}",
        "State": f"before round {checkpoint.round} of {manifest.batch.num_rounds}, after {max(versions)} updates",
        "Tokens per round": f"{manifest.batch.tokens_per_round:,}, in sequences of {manifest.batch.sequence_length}",
        "Optimizer": f"{manifest.optimizer.name.value}, learning rate {manifest.optimizer.learning_rate:g}",
        "Training text": f"{manifest.data.train.num_tokens:,} tokens",
        "Unigram loss": f"{manifest.data.unigram_loss:.4f} nats per held-out token, from token frequencies alone",
        "Held-out text": f"{manifest.data.heldout_bytes_per_token:.3f} bytes per token",
        **facts,
    }
    note = "\nThe config that this run started from tied the head to the embedding; here they are two matrices.\n"
    rows = "".join(f"| {name} | {value} |\n" for name, value in lines.items())
    return (
        f"---\nlibrary_name: transformers\npipeline_tag: text-generation\ntags: [handcar]\n---\n"
        f"# {manifest.name}\n\nTrained from scratch by volunteers with Handcar, stage by stage.\n\n"
        f"| | |\n|---|---|\n{rows}{note if manifest.model.was_tied else ''}\n"
        "```python\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        'model = AutoModelForCausalLM.from_pretrained(".")\ntokenizer = AutoTokenizer.from_pretrained(".")\n```\n'
    )


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
