"""Recomputing a microbatch from what crossed hops. Oracle: an engine that has done the work, cut to the same tokens."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from peer.codecs import codec
from peer.engine.optimizer import OptimizerSpec
from peer.engine.recompute import Recomputer
from peer.engine.stage_engine import StageEngine
from peer.engine.weights import PastWeights
from protocol.architecture import preset
from protocol.ids import StageId, Version
from protocol.sketch import distance

TINY = preset("tiny")
NUM_STAGES = 3
SEQUENCES, LENGTH, PREFIX = 2, 32, 8
SEED = b"s" * 32


def recomputer(own: StageEngine, stage: StageId, codec_name: str) -> Recomputer:
    return Recomputer(
        TINY,
        num_stages=NUM_STAGES,
        engines={stage: own},
        past=PastWeights(max_bytes=1 << 30),
        codec=codec(codec_name),
        gradient_codec=codec(codec_name),
        microbatch=(SEQUENCES, LENGTH),
    )


@pytest.mark.parametrize("codec_name", ["fp32", "bf16", "int8", "int4"])
@pytest.mark.parametrize("stage", [StageId(0), StageId(1)])
def test_the_first_tokens_come_out_as_with_all_others_behind_them(stage: StageId, codec_name: str) -> None:
    """And what is done to them alone is seen as clearly as in the whole, where it is little."""
    own = StageEngine.build(TINY, num_stages=NUM_STAGES, stage=stage, optimizer=OptimizerSpec(name="adamw8bit"), seed=2)
    recompute, used = recomputer(own, stage, codec_name), codec(codec_name)
    drawn = torch.Generator().manual_seed(1)
    inputs = torch.randn(SEQUENCES, LENGTH, TINY["hidden_size"], generator=drawn)
    given = bytes(used.encode(inputs.reshape(-1)))
    entered = used.decode(given, inputs.numel()).view_as(inputs)
    if stage == 0:
        entered = torch.randint(0, 512, (SEQUENCES, LENGTH), generator=drawn)
    source = entered.numpy().astype(np.int64) if stage == 0 else given
    outputs = own.forward_only(entered)
    sent = bytes(used.encode(outputs.reshape(-1).contiguous()))
    found = recompute.recompute(((stage, Version(0)),), source, b"", SEED, prefix=PREFIX)
    assert found is not None
    assert found.returned == b""
    seen = recompute.sketch_bytes(sent, SEED, is_gradient=False, prefix=PREFIX)
    assert distance(seen, found.outputs) < 1e-3
    outputs[:, PREFIX - 1] *= -1
    sent = bytes(used.encode(outputs.reshape(-1).contiguous()))
    seen = recompute.sketch_bytes(sent, SEED, is_gradient=False, prefix=PREFIX)
    assert distance(seen, found.outputs) > 0.4
