"""Views into flat buffers."""

from __future__ import annotations

import pytest
import torch

from peer.model.shards import Shard, allocate_shard
from protocol.architecture import ShardKind, ShardLayout, TensorSlot

LAYOUT = ShardLayout("layer.0", ShardKind.LAYER, (TensorSlot("a", (10, 30), 0), TensorSlot("b", (5,), 512)), 512, 768)


@pytest.fixture
def shard() -> Shard:
    return allocate_shard(LAYOUT, device=torch.device("cpu"), dtype=torch.float32)


def test_views_share_memory_with_the_flat_buffers(shard: Shard) -> None:
    """Oracle: what is written through a view is found at the slot's offset."""
    shard.weight_view(LAYOUT.slots[0])[1, 2] = 3.0
    shard.gradient_view(LAYOUT.slots[1])[4] = 5.0
    assert shard.weights.nonzero().flatten().tolist() == [32]
    assert shard.gradient.nonzero().flatten().tolist() == [516]


def test_buffers_start_at_a_cache_line(shard: Shard) -> None:
    """Oracle: addresses."""
    assert shard.weights.data_ptr() % 64 == shard.gradient.data_ptr() % 64 == 0


def test_a_given_gradient_loses_what_stands_in_its_padding(shard: Shard) -> None:
    """Oracle: only the elements of the two tensors are taken over."""
    shard.set_gradient(torch.ones(768))
    assert float(shard.gradient.sum()) == 305
    assert all(not shard.gradient[start:end].any() for start, end in LAYOUT.padding())


@pytest.mark.parametrize("wrong", [torch.ones(767), torch.ones(768, dtype=torch.float64)])
def test_a_gradient_of_another_size_or_type_is_refused(shard: Shard, wrong: torch.Tensor) -> None:
    """Oracle: ValueError, and the gradient is as before."""
    with pytest.raises(ValueError, match="layer\\.0"):
        shard.set_gradient(wrong)
    assert not shard.gradient.any()
