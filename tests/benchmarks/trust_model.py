"""What the swarm of the attack table trains, and on which machines.

Owns: model, text, manifest, and in which ways honest machines compute. Must not know: peers.
"""

from __future__ import annotations

import json
import random
import sysconfig
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

import numpy
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from protocol.architecture import preset
from protocol.ids import StageId
from protocol.manifest import AveragingMode, AveragingSpec, Manifest, ModelSpec
from tests.protocol.manifests import batch_spec, data_spec, manifest

STAGES, REPLICAS = 3, 4
LAST = StageId(STAGES - 1)
SEQUENCES, LENGTH = 4, 32
MICROBATCHES = 8  # of a round: two for each replica
TOKENS = SEQUENCES * LENGTH
HELDOUT_BATCHES = 16
CONFIG = preset("tiny") | {"vocab_size": 256}  # text is bytes
SHAPE = (SEQUENCES, LENGTH, CONFIG["hidden_size"])  # B, T, D

HopCodec = Literal["fp32", "fp16", "bf16", "int8", "int4"]
Source = bytes | numpy.ndarray[tuple[int, int], numpy.dtype[numpy.int64]]


@dataclass(frozen=True, slots=True)
class Machine:
    """On what a peer computes: results of honest machines differ by it."""

    name: str
    is_bf16: bool = False
    kernel: SDPBackend | None = None

    @contextmanager
    def computing(self) -> Iterator[None]:
        """Compute like that while the block runs."""
        with ExitStack() as stack:
            if self.kernel is not None:
                stack.enter_context(sdpa_kernel(self.kernel))
            if self.is_bf16:
                stack.enter_context(torch.autocast("cpu", dtype=torch.bfloat16, cache_enabled=False))
            yield


FP32 = Machine("fp32")
MACHINES = (
    FP32,
    Machine("fp32, plain attention", kernel=SDPBackend.MATH),
    Machine("bf16", is_bf16=True),
    Machine("bf16, plain attention", is_bf16=True, kernel=SDPBackend.MATH),
)


def make_manifest(seed: int, rounds: int, *, mode: str, codec: HopCodec, microbatches: int = MICROBATCHES) -> Manifest:
    """Return the manifest of a training, whose hops use a codec."""
    usual = manifest().optimizer
    return manifest(
        model=ModelSpec(config_json=json.dumps(CONFIG, sort_keys=True), num_stages=STAGES, init_seed=seed),
        data=data_spec(train_tokens=1 << 20, heldout_tokens=1 << 14).model_copy(update={"vocab_size": 256}),
        batch=batch_spec(
            sequence_length=LENGTH,
            sequences_per_microbatch=SEQUENCES,
            microbatches_per_round=microbatches,
            num_rounds=rounds,
            eval_every=100_000,
        ),
        optimizer=usual.model_copy(update={"learning_rate": 4e-3, "warmup_rounds": 5}),
        averaging=AveragingSpec(mode=AveragingMode(mode), codec="fp16", activation_codec=codec),
    )


@cache
def _bytes(*, is_heldout: bool) -> numpy.ndarray[tuple[int], numpy.dtype[numpy.uint8]]:
    folder = Path(sysconfig.get_path("stdlib")) / "asyncio"
    data = b"".join(path.read_bytes() for path in sorted(folder.glob("*.py")))
    cut = len(data) * 9 // 10
    return numpy.frombuffer(data[cut:] if is_heldout else data[:cut], dtype=numpy.uint8)


def windows(seed: str, *, is_heldout: bool) -> tuple[Tensor, Tensor]:
    """Return inputs and labels (B, T) at random places of the text."""
    data = _bytes(is_heldout=is_heldout)
    chance = random.Random(seed)
    starts = [chance.randrange(len(data) - LENGTH - 1) for _ in range(SEQUENCES)]
    rows = numpy.stack([data[start : start + LENGTH + 1] for start in starts]).astype(numpy.int64)
    return torch.from_numpy(rows[:, :-1].copy()), torch.from_numpy(rows[:, 1:].copy())
