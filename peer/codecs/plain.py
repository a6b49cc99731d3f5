"""Codecs that keep each value by itself: fp32 unchanged, bf16 rounded.

bf16 has fp32's range and 8 bits of mantissa: right for activations, whose neighbours differ by orders of
magnitude, and too coarse for sums of gradients.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from peer.codecs.codec import Buffer, check_flat, check_length, from_bytes, largest, refuse_non_finite, to_bytes
from protocol.encoding import encoded_bytes
from protocol.errors import WireError

BF16_MAX = torch.finfo(torch.bfloat16).max


class Fp32Codec:
    """4 bytes per value, exact."""

    name = "fp32"
    is_dense = True

    def encode(self, values: Tensor) -> bytes:
        check_flat(values)
        refuse_non_finite(values)
        return to_bytes(values)

    def decode(self, data: Buffer, num_elements: int) -> Tensor:
        check_length(data, self.encoded_bytes(num_elements), codec_name=self.name, num_elements=num_elements)
        values = from_bytes(data, torch.float32, num_elements)
        if not math.isfinite(largest(values)):
            raise WireError("fp32: NaN or infinity")
        return values

    def encoded_bytes(self, num_elements: int) -> int:
        return encoded_bytes(self.name, num_elements)


class Bf16Codec:
    """2 bytes per value, relative error up to 2**-8. Values beyond bf16's largest become the largest."""

    name = "bf16"
    is_dense = True

    def encode(self, values: Tensor) -> bytes:
        check_flat(values)
        refuse_non_finite(values)
        return to_bytes(values.clamp(-BF16_MAX, BF16_MAX).to(torch.bfloat16).view(torch.int16))

    def decode(self, data: Buffer, num_elements: int) -> Tensor:
        check_length(data, self.encoded_bytes(num_elements), codec_name=self.name, num_elements=num_elements)
        values = from_bytes(data, torch.int16, num_elements).view(torch.bfloat16).to(torch.float32)
        if not math.isfinite(largest(values)):
            raise WireError("bf16: NaN or infinity")
        return values

    def encoded_bytes(self, num_elements: int) -> int:
        return encoded_bytes(self.name, num_elements)
