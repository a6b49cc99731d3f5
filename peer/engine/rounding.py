"""Weights as bf16: what is kept of an fp32 value, and what happens to the rest.

Owns: the three ways from fp32 to bf16 on flat buffers, in place. Must not know: optimizers, shards' contents, where
buffers live. A buffer stays fp32 all the time; rounded to bf16 means that the lower half of every value's bits is zero.

With the remainder (16 bits more) nothing is lost: the two together are the fp32 master weight. Without it, plain
rounding would lose every update smaller than half a step of bf16 (2^-9 of the value), so training stalls; rounding up
or down at random, in proportion to the distance, keeps them on average (Gupta et al. 2015, arXiv 1502.02551; for LLM
training Ozkara et al. 2025, arXiv 2502.20566). All of it is integer arithmetic on the bits, and the random bits are a
function of (seed, step, shard, element): replicas, devices and resumed runs get the same ones.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import torch
from torch import Tensor

PIECE_ELEMENTS = 1 << 20  # rounded at a time, so that temporaries stay small
_LOWER = 0xFFFF
_UPPER = -0x10000  # as int32
_HALF = 0x8000
_EXPONENT = 0x7F800000


def join(weights: Tensor, remainder: Tensor) -> None:
    """Turn rounded weights into the master weights: add what was kept beside them (int16)."""
    weights.view(torch.int32).add_(remainder)


def split(weights: Tensor, remainder: Tensor) -> None:
    """Round master weights to the nearest bf16, and keep the rest of their bits in `remainder` (int16)."""
    for bits, kept in zip(_pieces(weights.view(torch.int32)), _pieces(remainder), strict=True):
        nearest = _carried(bits, bits + _HALF)
        kept.copy_(bits - nearest)
        bits.copy_(nearest)


def round_nearest(weights: Tensor) -> None:
    """Round to the nearest bf16, and half way away from zero."""
    for bits in _pieces(weights.view(torch.int32)):
        bits.copy_(_carried(bits, bits + _HALF))


def round_at_random(weights: Tensor, *, seed: int, step: int, name: str) -> None:
    """Round up or down, each with the probability that makes the mean right.

    The bits below bf16 are a fraction of its step; adding 16 random bits carries over in that fraction of cases. As the
    bits are sign and magnitude, this is symmetric about zero.
    """
    key = hashlib.sha256(f"handcar/rounding/{seed}/{step}/{name}".encode()).digest()
    low, high = (int.from_bytes(key[start : start + 4], "little", signed=True) for start in (0, 4))
    start = 0
    for bits in _pieces(weights.view(torch.int32)):
        index = torch.arange(start, start + bits.numel(), dtype=torch.int32, device=bits.device)
        bits.copy_(_carried(bits, _noise(index, low, high).add_(bits)))
        start += bits.numel()


def _carried(bits: Tensor, raised: Tensor) -> Tensor:
    """Return the upper halves of raised bits; of infinity and NaN, where a carry would make a number, their own."""
    is_number = bits.bitwise_and(_EXPONENT) != _EXPONENT
    return raised.where(is_number, bits).bitwise_and_(_UPPER)


def _noise(index: Tensor, low: int, high: int) -> Tensor:
    """Hash element numbers to 16 bits each: Wellons' `lowbias32` mixer, keyed before and between its rounds."""
    mixed = index.bitwise_xor_(low)
    mixed ^= (mixed >> 16) & 0xFFFF
    mixed *= 0x7FEB352D
    mixed ^= (mixed >> 15) & 0x1FFFF
    mixed ^= high
    mixed *= 0x846CA68B - (1 << 32)
    mixed ^= (mixed >> 16) & 0xFFFF
    return mixed.bitwise_and_(_LOWER)


def _pieces(flat: Tensor) -> Iterator[Tensor]:
    yield from torch.split(flat, PIECE_ELEMENTS)
