"""Presets: whole runs by name, each a model and the settings that were chosen for it.

Owns: batch, optimizer, averaging, deadlines, tokenizer and stages per preset. Must not know: corpora,
files; the model configs themselves are protocol (`protocol/architecture.py`). `coordinator/init.py` starts
from a preset and lets the organiser override any field.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from protocol.architecture import ModelConfig, preset
from protocol.errors import ConfigError
from protocol.manifest import AveragingSpec, BatchSpec, KeepingSpec, OptimizerName, OptimizerSpec, TimingSpec

DEFAULT_PRESET = "demo"
HELDOUT_SEQUENCES = 64  # 16 Ki tokens of the demo: the standard error of their mean loss is some 0.02 nats


@dataclass(frozen=True, slots=True, kw_only=True)
class Preset:
    """Everything `coordinator init` needs besides a corpus."""

    name: str
    summary: str
    tokenizer: str
    num_stages: int
    batch: BatchSpec
    optimizer: OptimizerSpec
    averaging: AveragingSpec
    timing: TimingSpec
    keeping: KeepingSpec

    @property
    def config(self) -> ModelConfig:
        """A copy of the model's Hugging Face config; its vocabulary size is the tokenizer's to decide."""
        return preset(self.name)


def find_preset(name: str) -> Preset:
    """Return the preset called `name`, or raise `ConfigError` listing those there are."""
    if name not in PRESETS:
        raise ConfigError(f"there is no preset {name!r}.", hint="Presets are " + ", ".join(PRESETS) + ".")
    return PRESETS[name]


def _batch(
    *, sequence_length: int, sequences: int, microbatches: int, rounds: int, eval_every: int, heldout: int
) -> BatchSpec:
    return BatchSpec(
        sequence_length=sequence_length,
        sequences_per_microbatch=sequences,
        microbatches_per_round=microbatches,
        num_rounds=rounds,
        data_seed=0,
        eval_every=eval_every,
        heldout_sequences=heldout,
    )


def _adamw(name: OptimizerName, *, learning_rate: float, warmup_rounds: int) -> OptimizerSpec:
    """AdamW as small language models are usually trained; the tail of the cosine still learns."""
    return OptimizerSpec(
        name=name,
        learning_rate=learning_rate,
        warmup_rounds=warmup_rounds,
        final_lr_fraction=0.3,
        weight_decay=0.1,
        beta1=0.9,
        beta2=0.95,
        eps=1e-8,
        clip=1.0,
    )


# One machine, all peers on loopback, more processes than cores. A starting peer imports torch for several
# seconds of everybody's CPU, so the beats leave three times that before anybody counts as silent.
_ONE_MACHINE = TimingSpec(round_deadline_s=300.0, hop_silence_s=20.0, beat_s=2.0, reduce_timeout_s=60.0)

# Homes with 20 Mbit/s up: half a billion parameters as int8 take 412 s to average (facts behind docs/architecture.md),
# so a reduction gets twice that, and a round twice the reduction besides its compute.
_HOMES = TimingSpec(round_deadline_s=3600.0, hop_silence_s=120.0, beat_s=10.0, reduce_timeout_s=900.0)

# A checkpoint costs every stage's bytes once; five rounds of a demo are some 15 s of work to lose.
_OFTEN = KeepingSpec(checkpoint_every=5, checkpoints_kept=3)
_RARELY = KeepingSpec(checkpoint_every=50, checkpoints_kept=3)

_TINY = Preset(
    name="tiny",
    summary="a toy for tests: 4 layers, bytes, 8 rounds",
    tokenizer="bytes",
    num_stages=2,
    batch=_batch(sequence_length=32, sequences=2, microbatches=4, rounds=8, eval_every=4, heldout=8),
    optimizer=_adamw(OptimizerName.ADAMW32, learning_rate=3e-3, warmup_rounds=2),
    averaging=AveragingSpec(codec="fp32", activation_codec="fp32"),  # exact, so that tests can compare bits
    timing=TimingSpec(round_deadline_s=60.0, hop_silence_s=10.0, beat_s=1.0, reduce_timeout_s=20.0),
    keeping=KeepingSpec(checkpoint_every=2, checkpoints_kept=2),
)

_DEMO = Preset(
    name="demo",
    summary="2M parameters on one machine, a few minutes: 4 layers, width 192, 60 rounds of 4,096 tokens",
    tokenizer="train:1024",
    num_stages=2,
    # Two sequences per microbatch: eight tasks a round keep several replicas busy, and a hop still has work to do.
    batch=_batch(sequence_length=256, sequences=2, microbatches=8, rounds=60, eval_every=10, heldout=HELDOUT_SEQUENCES),
    optimizer=_adamw(OptimizerName.ADAMW8BIT, learning_rate=3e-3, warmup_rounds=4),
    averaging=AveragingSpec(codec="fp16", activation_codec="fp16"),
    timing=_ONE_MACHINE,
    keeping=_OFTEN,
)

_BENCH = Preset(
    name="bench",
    summary="30M parameters for benchmarks: 8 layers, width 512",
    tokenizer="train:4096",
    num_stages=2,
    batch=_batch(sequence_length=256, sequences=2, microbatches=8, rounds=20, eval_every=10, heldout=HELDOUT_SEQUENCES),
    optimizer=_adamw(OptimizerName.ADAMW8BIT, learning_rate=1e-3, warmup_rounds=4),
    averaging=AveragingSpec(codec="fp16", activation_codec="fp16"),
    timing=_ONE_MACHINE,
    keeping=_OFTEN,
)

_1B = Preset(
    name="1b",
    summary="1.2 billion parameters for real cards on home links: the shape of Llama-3.2-1B",
    tokenizer="train:65536",
    num_stages=8,
    # 262,144 tokens a round: half an hour of averaging has to be worth its bytes.
    batch=_batch(sequence_length=2048, sequences=1, microbatches=128, rounds=20_000, eval_every=50, heldout=64),
    optimizer=_adamw(OptimizerName.ADAMW8BIT, learning_rate=3e-4, warmup_rounds=1_000),
    averaging=AveragingSpec(codec="int8", activation_codec="int8"),
    timing=_HOMES,
    keeping=_RARELY,
)

PRESETS: Mapping[str, Preset] = MappingProxyType({entry.name: entry for entry in (_TINY, _DEMO, _BENCH, _1B)})
