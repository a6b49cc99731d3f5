"""A complete manifest for tests of the protocol, small and made by hand."""

from __future__ import annotations

import json
from typing import Any

from protocol.architecture import preset
from protocol.ids import digest
from protocol.manifest import (
    AveragingSpec,
    BatchSpec,
    DataSpec,
    KeepingSpec,
    Manifest,
    ModelSpec,
    OptimizerName,
    OptimizerSpec,
    TimingSpec,
    TokenFileSpec,
)
from protocol.signing import SigningKey

KEY = SigningKey(bytes(range(32)))


def token_file(name: str, num_tokens: int) -> TokenFileSpec:
    """Describe a token file that exists nowhere."""
    return TokenFileSpec(
        name=name, num_tokens=num_tokens, bytes_per_token=2, chunk_bytes=1 << 20, index_digest=digest(name.encode())
    )


def data_spec(*, train_tokens: int = 10_000, heldout_tokens: int = 1_000) -> DataSpec:
    """Describe a corpus of given sizes."""
    return DataSpec(
        vocab_size=257,
        tokenizer_digest=digest(b"tokenizer"),
        train=token_file("train.bin", train_tokens),
        heldout=token_file("heldout.bin", heldout_tokens),
        heldout_bytes_per_token=1.0,
        unigram_loss=3.1,
    )


def batch_spec(**changes: Any) -> BatchSpec:
    """Return 4 microbatches of 2 sequences of 32 tokens, 10 rounds, an evaluation every 4; change what you like."""
    fields: dict[str, Any] = {
        "sequence_length": 32,
        "sequences_per_microbatch": 2,
        "microbatches_per_round": 4,
        "num_rounds": 10,
        "data_seed": 7,
        "eval_every": 4,
        "heldout_sequences": 8,
    }
    return BatchSpec(**(fields | changes))


def manifest(**changes: Any) -> Manifest:
    """Return a whole manifest; change what you like."""
    fields: dict[str, Any] = {
        "name": "a run",
        "created_s": 1_700_000_000.5,
        "coordinator": KEY.peer_id,
        "model": ModelSpec(config_json=json.dumps(preset("tiny"), sort_keys=True), num_stages=2, init_seed=-1),
        "data": data_spec(),
        "batch": batch_spec(),
        "optimizer": OptimizerSpec(
            name=OptimizerName.ADAMW8BIT,
            learning_rate=3e-3,
            warmup_rounds=4,
            final_lr_fraction=0.1,
            weight_decay=0.1,
            beta1=0.9,
            beta2=0.95,
            eps=1e-8,
            clip=1.0,
        ),
        "averaging": AveragingSpec(codec="fp32", activation_codec="fp32"),
        "timing": TimingSpec(round_deadline_s=60.0, hop_silence_s=10.0, beat_s=1.0, reduce_timeout_s=20.0),
        "keeping": KeepingSpec(checkpoint_every=5, checkpoints_kept=3),
    }
    return Manifest(**(fields | changes))
