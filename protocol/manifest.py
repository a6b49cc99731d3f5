"""The manifest: everything that defines a run, signed by the coordinator and the same for everybody.

Owns: the fields, their bounds, and the run id (a hash of the manifest). Pure. Must not know: files,
torch, who takes part. A volunteer's own limits are not here: they always win over the manifest
(`peer/settings.py`), but what the manifest fixes cannot be overridden.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from enum import StrEnum
from types import MappingProxyType
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from protocol.ids import Digest, PeerId, RunId, StageId, digest
from protocol.wire import PROTOCOL_VERSION, Message

MANIFEST_CONTEXT = "handcar manifest"

MAX_TOKENS = 1 << 53  # of one file; sizes beyond could not be told from each other as floats
Positive = Annotated[int, Field(ge=1, lt=1 << 31)]
Seed = Annotated[int, Field(ge=-(1 << 63), lt=1 << 63)]
PositiveFloat = Annotated[float, Field(gt=0)]


class OptimizerName(StrEnum):
    """Which AdamW every replica runs."""

    ADAMW8BIT = "adamw8bit"
    ADAMW32 = "adamw32"


class MasterName(StrEnum):
    """How every replica keeps its weights."""

    FP32 = "fp32"
    SPLIT = "bf16+16"
    """As bf16 and the 16 bits that make it fp32 again."""
    ROUNDED = "bf16-sr"
    """As bf16 alone, rounded up or down at random (from the run's seed) after each step."""


class AveragingMode(StrEnum):
    """What the replicas of a stage average."""

    GRADIENT = "gradient"
    """The gradients of a round, for one step of all of them."""
    DILOCO = "diloco"
    """How far each has come by steps of its own."""


class ModelSpec(Message):
    """What is trained: a Hugging Face config, cut into stages, initialised from a seed."""

    config_json: Annotated[str, Field(max_length=32_768)]
    num_stages: Positive
    init_seed: Seed
    was_tied: bool = False
    """The config had tied embeddings; they were untied at init (and the export says so)."""

    @property
    def config(self) -> dict[str, Any]:
        """The Hugging Face config as plain JSON values."""
        config: dict[str, Any] = json.loads(self.config_json)
        return config


class TokenFileSpec(Message):
    """One file of little-endian token ids, verified in chunks.

    The digests of its chunks form an index file; the manifest holds the index's own digest, so a
    terabyte of tokens costs 32 bytes here.
    """

    name: Annotated[str, Field(pattern=r"^[a-z]+\.bin$")]
    num_tokens: Annotated[int, Field(ge=1, le=MAX_TOKENS)]
    bytes_per_token: Literal[2, 4]
    chunk_bytes: Positive
    index_digest: Digest

    @property
    def num_bytes(self) -> int:
        return self.num_tokens * self.bytes_per_token

    @property
    def num_chunks(self) -> int:
        return -(-self.num_bytes // self.chunk_bytes)


class DataSpec(Message):
    """The text, as tokens."""

    vocab_size: Positive
    tokenizer_digest: Digest
    train: TokenFileSpec
    heldout: TokenFileSpec
    heldout_bytes_per_token: PositiveFloat
    """UTF-8 bytes of held-out text per held-out token: turns nats per token into bits per byte."""
    unigram_loss: PositiveFloat
    """Nats per held-out token under the add-one unigram of the training tokens: what knowing nothing costs."""


class BatchSpec(Message):
    """How tokens become rounds."""

    sequence_length: Positive
    sequences_per_microbatch: Positive
    microbatches_per_round: Annotated[int, Field(ge=1, le=65_536)]
    num_rounds: Positive
    data_seed: Seed
    eval_every: Positive
    """A held-out evaluation follows every this many rounds, and the last one."""
    heldout_sequences: Positive

    @property
    def tokens_per_microbatch(self) -> int:
        return self.sequences_per_microbatch * self.sequence_length

    @property
    def tokens_per_round(self) -> int:
        return self.microbatches_per_round * self.tokens_per_microbatch

    @property
    def microbatches_per_evaluation(self) -> int:
        """The last one may hold fewer sequences."""
        return -(-self.heldout_sequences // self.sequences_per_microbatch)


class OptimizerSpec(Message):
    """AdamW and its schedule. `clip` is c in the per-stage threshold `c * sqrt(P_stage / P_total)`."""

    name: Annotated[OptimizerName, Field(strict=False)]
    master: Annotated[MasterName, Field(strict=False)] = MasterName.FP32
    learning_rate: PositiveFloat
    warmup_rounds: Annotated[int, Field(ge=0, lt=1 << 31)]
    final_lr_fraction: Annotated[float, Field(ge=0, le=1)]
    weight_decay: Annotated[float, Field(ge=0)]
    beta1: Annotated[float, Field(ge=0, lt=1)]
    beta2: Annotated[float, Field(ge=0, lt=1)]
    eps: PositiveFloat
    clip: PositiveFloat


AveragingCodec = Literal["fp32", "fp16", "int8", "int4", "sparse", "auto"]
AUTO_CODECS: Mapping[AveragingMode, tuple[str, ...]] = MappingProxyType(
    {AveragingMode.GRADIENT: ("fp16", "int8"), AveragingMode.DILOCO: ("fp16", "int8", "int4", "sparse")}
)
"""What `auto` chooses from."""


class AveragingSpec(Message):
    """How replicas of a stage agree."""

    mode: Annotated[AveragingMode, Field(strict=False)] = AveragingMode.GRADIENT
    codec: AveragingCodec
    """What is averaged travels in it. int4 and sparse leave out much, and are for `diloco`, which sends that later.
    With `auto` a stage's members choose in each round, by what their links and their rounds have shown."""
    stage_codecs: Annotated[tuple[AveragingCodec, ...], Field(strict=False)] = ()
    """The same for each stage, if they differ."""
    overlap: bool = False
    """Average one round while the next one computes: its result comes a round late."""
    fragments: Annotated[int, Field(ge=1, le=64)] = 1
    """`diloco`: a stage is averaged in so many turns, a part of it in each round."""
    microbatches_per_step: Positive = 1
    """`diloco`: how many a replica adds up for a step of its own."""
    outer_learning_rate: Annotated[float, Field(gt=0, le=2)] = 0.7
    outer_momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """`diloco`: the Nesterov step of the anchor."""
    activation_codec: Literal["fp32", "fp16", "bf16", "int8", "int4"]
    """Activations travel in it from stage to stage. Blocks of int4 are turned before they are rounded."""
    activation_gradient_codec: Literal["same", "fp32", "fp16", "bf16", "int8", "int4"] = "same"
    """The gradients by them travel back in it; they bear less rounding."""

    @property
    def hop_codecs(self) -> tuple[str, str]:
        """The names of the codecs of bodies on a hop: there, and back."""
        there, back = self.activation_codec, self.activation_gradient_codec
        return _on_hops(there), _on_hops(there if back == "same" else back)

    def codecs_of(self, stage: StageId) -> tuple[str, ...]:
        """Return what averages of a stage may travel in, from the most exact to the smallest."""
        codec = self.stage_codecs[stage] if self.stage_codecs else self.codec
        return AUTO_CODECS[self.mode] if codec == "auto" else (codec,)

    @model_validator(mode="after")
    def _feeds_errors_back(self) -> Self:
        for codec in (self.codec, *self.stage_codecs):
            if codec in ("int4", "sparse") and self.mode is not AveragingMode.DILOCO:
                raise ValueError(f"codec {codec} is for mode diloco, not {self.mode}")
        if self.fragments > 1 and self.mode is not AveragingMode.DILOCO:
            raise ValueError(f"fragments are for mode diloco, not {self.mode}")
        return self


def _on_hops(name: str) -> str:
    return "int4-turned" if name == "int4" else name


class TimingSpec(Message):
    """The run's deadlines. Generous: a slow home link must not look like a dead one."""

    round_deadline_s: PositiveFloat
    hop_silence_s: PositiveFloat
    """A hop whose progress counter stands still for this long is given up."""
    beat_s: PositiveFloat
    """Steward heartbeat; three missed beats are silence."""
    reduce_timeout_s: PositiveFloat


class KeepingSpec(Message):
    """What is kept, and how often."""

    checkpoint_every: Positive
    """Rounds between checkpoints; the update log reaches back to at least the newest one."""
    checkpoints_kept: Positive


class Manifest(Message):
    """A run. Its hash is its id; its signature is the coordinator's."""

    protocol: Annotated[int, Field(ge=0, lt=1 << 31)] = PROTOCOL_VERSION
    name: Annotated[str, Field(min_length=1, max_length=64)]
    created_s: float
    coordinator: PeerId
    model: ModelSpec
    data: DataSpec
    batch: BatchSpec
    optimizer: OptimizerSpec
    averaging: AveragingSpec
    timing: TimingSpec
    keeping: KeepingSpec

    @model_validator(mode="after")
    def _every_stage_has_a_codec(self) -> Self:
        if len(self.averaging.stage_codecs) not in (0, self.model.num_stages):
            raise ValueError("stage_codecs names one codec for every stage, or none")
        return self

    @property
    def run_id(self) -> RunId:
        """Lower-case hex of the first 16 bytes of the manifest's SHA-256."""
        return RunId(digest(self.to_bytes())[:16].hex())
