"""Codecs that share one scale among the values of a block: fp16, int8 and int4.

Gradients summed over thousands of tokens can be far above fp16's largest value (65,504) and those of a
quiet layer far below its smallest; a scale per block brings each block's largest value to where the
format is densest. Layout of all: all values first, then one scale per block.

Legend: a part of N values is B blocks; `scale_B1` has one row per block.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from peer.codecs.codec import (
    Buffer,
    check_flat,
    check_length,
    from_bytes,
    largest,
    refuse_non_finite,
    to_blocks,
    to_bytes,
)
from protocol.encoding import FP16_BLOCK, INT4_BLOCK, INT8_BLOCK, encoded_bytes, num_blocks
from protocol.errors import WireError

FP16_TOP = 32_752.0  # largest fp16 below 2**15; keeps a block that holds fp32's maximum finite after decoding
FP16_TOP_EXPONENT = 15
MIN_SHIFT = FP16_TOP_EXPONENT - 128  # frexp of fp32's largest value gives exponent 128
MAX_SHIFT = 126  # 2**126 and 2**-126 are both normal fp32 numbers, so scaling is exact

MIN_SCALE = torch.finfo(torch.float32).tiny  # below it a scale loses bits; such a block is zeros


class Fp16Codec:
    """2 bytes per value: fp16 times a power of two per block.

    Relative error up to 2**-11 for values down to 2**-28 of their block's largest; below that the
    absolute error is at most 2**-39 of the block's largest, or fp32's own smallest step if that is more.
    """

    name = "fp16"
    is_dense = True

    def encode(self, values: Tensor) -> bytes:
        check_flat(values)
        if not len(values):
            return b""
        blocks = to_blocks(values, FP16_BLOCK)
        top_B1 = blocks.abs().amax(dim=1, keepdim=True)
        refuse_non_finite(top_B1.view(-1))
        shift_B1 = (FP16_TOP_EXPONENT - torch.frexp(top_B1).exponent).clamp(MIN_SHIFT, MAX_SHIFT).to(torch.int32)
        scaled = (blocks * _power_of_two(shift_B1)).to(torch.float16).clamp_(-FP16_TOP, FP16_TOP)
        return to_bytes(scaled.view(-1)[: len(values)]) + to_bytes(shift_B1.view(-1).to(torch.int8))

    def decode(self, data: Buffer, num_elements: int) -> Tensor:
        check_length(data, self.encoded_bytes(num_elements), codec_name=self.name, num_elements=num_elements)
        if not num_elements:
            return torch.empty(0)
        view = memoryview(data)
        values = from_bytes(view[: 2 * num_elements], torch.float16, num_elements).to(torch.float32)
        shift_B = from_bytes(view[2 * num_elements :], torch.int8, num_blocks(num_elements, FP16_BLOCK))
        if not largest(values) <= FP16_TOP:  # NaN is refused too
            raise WireError("fp16: a value beyond the scaled range")
        if int(shift_B.amin()) < MIN_SHIFT or int(shift_B.amax()) > MAX_SHIFT:
            raise WireError("fp16: a block's exponent is out of range")
        return _scale_blocks(values, _power_of_two(-shift_B.to(torch.int32)), FP16_BLOCK)

    def encoded_bytes(self, num_elements: int) -> int:
        return encoded_bytes(self.name, num_elements)


def _max_scale(top: int) -> float:
    return float(torch.nextafter(torch.tensor(torch.finfo(torch.float32).max / top), torch.tensor(0.0)))


class _LevelsCodec:
    """Whole levels from `-top` to `top` and an fp32 scale per block: `round(value / scale)`, half to even."""

    name: ClassVar[str]
    is_dense: ClassVar[bool] = True
    block: ClassVar[int]
    top: ClassVar[int]
    max_scale: ClassVar[float]
    """The largest of which `top` times is still a finite fp32."""
    levels_per_byte: ClassVar[int]

    def encode(self, values: Tensor) -> bytes:
        check_flat(values)
        if not len(values):
            return b""
        blocks = to_blocks(values, self.block)
        top_B1 = blocks.abs().amax(dim=1, keepdim=True)
        refuse_non_finite(top_B1.view(-1))
        scale_B1 = (top_B1 / self.top).clamp(max=self.max_scale)
        scale_B1 = torch.where(scale_B1 < MIN_SCALE, 0.0, scale_B1)
        divisor_B1 = torch.where(scale_B1 == 0, torch.inf, scale_B1)
        levels = (blocks / divisor_B1).round_().clamp_(-self.top, self.top).to(torch.int8).view(-1)
        return to_bytes(self._pack(levels)[: self._level_bytes(len(values))]) + to_bytes(scale_B1.view(-1))

    def decode(self, data: Buffer, num_elements: int) -> Tensor:
        check_length(data, self.encoded_bytes(num_elements), codec_name=self.name, num_elements=num_elements)
        if not num_elements:
            return torch.empty(0)
        view, size = memoryview(data), self._level_bytes(num_elements)
        levels = self._unpack(from_bytes(view[:size], torch.int8, size))
        scale_B = from_bytes(view[size:], torch.float32, num_blocks(num_elements, self.block))
        if not (bool(scale_B.amin() >= 0) and bool(scale_B.amax() <= self.max_scale)):  # also false for NaN
            raise WireError(f"{self.name}: a block's scale is negative, too large or not a number")
        if int(levels.amin()) < -self.top:
            raise WireError(f"{self.name}: level {-self.top - 1} is never written")
        if bool(levels[num_elements:].any()):
            raise WireError(f"{self.name}: a level behind the last value")
        return _scale_blocks(levels[:num_elements].to(torch.float32), scale_B, self.block)

    def encoded_bytes(self, num_elements: int) -> int:
        return encoded_bytes(self.name, num_elements)

    def _level_bytes(self, num_elements: int) -> int:
        return -(-num_elements // self.levels_per_byte)

    def _pack(self, levels: Tensor) -> Tensor:
        return levels

    def _unpack(self, packed: Tensor) -> Tensor:
        return packed


class Int8Codec(_LevelsCodec):
    """1 byte per value plus an fp32 scale per 256, which is their largest magnitude / 127.

    Error up to half a scale (and up to 127 * 2**-126 in a block of nothing but such tiny values).
    """

    name = "int8"
    block = INT8_BLOCK
    top = 127
    max_scale = _max_scale(127)
    levels_per_byte = 1


class Int4Codec(_LevelsCodec):
    """Half a byte per value plus an fp32 scale per 128, which is their largest magnitude / 7. Wants error feedback.

    The first of two values is in the lower half of their byte. Error up to half a scale (and up to 7 * 2**-126 in a
    block of nothing but such tiny values).
    """

    name = "int4"
    block = INT4_BLOCK
    top = 7
    max_scale = _max_scale(7)
    levels_per_byte = 2

    def _pack(self, levels: Tensor) -> Tensor:
        return (levels[0::2] & 0xF) | (levels[1::2] << 4)

    def _unpack(self, packed: Tensor) -> Tensor:
        return torch.stack(((packed << 4) >> 4, packed >> 4), dim=1).view(-1)  # int8 shifts keep the sign


def _power_of_two(exponent: Tensor) -> Tensor:
    """Return 2**exponent as fp32 by writing the exponent field: exact, unlike a library's `pow`."""
    return ((exponent + 127) << 23).view(torch.float32)


def _scale_blocks(values: Tensor, scale_B: Tensor, block: int) -> Tensor:
    """Multiply each block of flat `values` by its scale, in place."""
    whole = len(values) // block
    values[: whole * block].view(whole, block).mul_(scale_B[:whole, None])
    if whole < len(scale_B):
        values[whole * block :].mul_(scale_B[whole])
    return values
