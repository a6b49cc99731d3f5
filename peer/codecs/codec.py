"""What a codec is, and the checks that all codecs share.

Owns: the `Codec` protocol and the way between tensors and little-endian bytes. Must not know: who sends
the bytes, or why. Used by averaging (gradients) and by the pipeline (activations).

A codec is a pure function of the values: the same numbers give the same bytes on every machine, because
replicas compare hashes of what they decoded. It has no state. Error feedback belongs to the caller, who
can form `values - decode(encode(values))` with any codec; a codec that keeps only some of the values
(sparse) fits as long as the number kept follows from the number of elements.
"""

from __future__ import annotations

import math
import sys
from typing import Protocol

import torch
from torch import Tensor

from protocol.errors import LocalFault, WireError

Buffer = bytes | bytearray | memoryview

if sys.byteorder != "little":  # the wire is little-endian and tensors are copied to it as they lie in memory
    raise ImportError("Handcar runs on little-endian machines only")


class Codec(Protocol):
    """Turns flat fp32 tensors into bytes of an exactly known number, and back."""

    @property
    def name(self) -> str:
        """The name by which manifests and headers refer to it."""

    @property
    def is_dense(self) -> bool:
        """Whether every value is sent, so that a sum of decoded values can be encoded again."""

    def encode(self, values: Tensor) -> bytes:
        """Encode a flat contiguous fp32 tensor, which is left alone. Raises `LocalFault` if a value is not finite."""

    def decode(self, data: Buffer, num_elements: int) -> Tensor:
        """Return a fresh fp32 tensor on the CPU, all of it finite; `WireError` if `data` is not that many elements."""

    def encoded_bytes(self, num_elements: int) -> int:
        """Return the exact length of the encoding of `num_elements` values."""


def check_flat(values: Tensor) -> None:
    """Refuse what the caller should never have passed."""
    if values.dtype != torch.float32 or values.dim() != 1 or not values.is_contiguous():
        raise ValueError(f"codecs take flat contiguous fp32, not {values.dtype} of shape {tuple(values.shape)}")


def largest(values: Tensor) -> float:
    """Return the largest magnitude; NaN if any value is NaN, 0 of nothing. Much faster than `isfinite().all()`."""
    if not len(values):
        return 0.0
    low, high = (float(bound) for bound in torch.aminmax(values))
    return max(-low, high)  # aminmax gives NaN twice or not at all


def refuse_non_finite(probe: Tensor) -> None:
    """Raise `LocalFault` unless `probe` (the values, or the maxima of their blocks) is finite."""
    if not math.isfinite(largest(probe)):
        raise LocalFault(
            "a tensor to be sent holds NaN or infinity",
            hint="If this repeats, the device's memory or clocks are suspect.",
        )


def check_length(data: Buffer, expected_bytes: int, *, codec_name: str, num_elements: int) -> None:
    """Raise `WireError` unless `data` is exactly as long as it must be; nothing has been read from it yet."""
    if len(data) != expected_bytes:
        raise WireError(f"{codec_name}: {len(data)} bytes where {num_elements} elements take {expected_bytes}")


def to_bytes(values: Tensor) -> bytes:
    """Copy a contiguous tensor out as its raw little-endian bytes."""
    raw: bytes = values.cpu().view(torch.uint8).numpy().tobytes()
    return raw


def from_bytes(data: Buffer, dtype: torch.dtype, num_elements: int) -> Tensor:
    """Copy raw little-endian bytes into a fresh tensor (fresh, because callers add to it in place)."""
    values = torch.empty(num_elements, dtype=dtype)
    memoryview(values.view(torch.uint8).numpy().data)[:] = data
    return values


def to_blocks(values: Tensor, block: int) -> Tensor:  # -> (blocks, block)
    """View flat values as rows of `block`, the last one filled up with zeros."""
    missing = -len(values) % block
    return (torch.nn.functional.pad(values, (0, missing)) if missing else values).view(-1, block)
