"""How many bytes numbers take once they are encoded. Pure: no torch.

Owns: the size of every codec, which follows from the number of elements alone, and whether sums of what it carries can
be encoded again. Must not know: how values become bytes (`peer/codecs/`, which takes its sizes from here), who sends
them. The coordinator counts bytes with it before anybody has sent one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

FP16_BLOCK = 1024  # one exponent byte per 1,024 values: 0.05 % on top
INT8_BLOCK = 256  # bitsandbytes' block: small enough that one outlier spoils few neighbours
INT4_BLOCK = 128  # with 15 levels an outlier spoils more, so there are fewer neighbours
SPARSE_BLOCK = 4096
SPARSE_BLOCK_BYTES = 104  # 48 of low bits of indices, 16 of their bitmap, 32 of codes, 8 of bounds

_SCALE_BYTES = 4  # fp32


def encoded_bytes(codec: str, num_elements: int) -> int:
    """Return the exact length of the encoding of `num_elements` values in the codec of that name."""
    return _SIZES[codec](num_elements)


def is_dense(codec: str) -> bool:
    """Tell whether every value is sent, so that a sum of decoded values can be encoded again."""
    return codec != "sparse"


def num_blocks(num_elements: int, block: int) -> int:
    """Return how many blocks hold `num_elements` values, the last of them perhaps not full."""
    return -(-num_elements // block)


_SIZES: Mapping[str, Callable[[int], int]] = MappingProxyType(
    {
        "fp32": lambda n: 4 * n,
        "fp16": lambda n: 2 * n + num_blocks(n, FP16_BLOCK),
        "bf16": lambda n: 2 * n,
        "int8": lambda n: n + _SCALE_BYTES * num_blocks(n, INT8_BLOCK),
        "int4": lambda n: num_blocks(n, 2) + _SCALE_BYTES * num_blocks(n, INT4_BLOCK),
        "int4-turned": lambda n: (INT4_BLOCK // 2 + _SCALE_BYTES) * num_blocks(n, INT4_BLOCK),
        "sparse": lambda n: SPARSE_BLOCK_BYTES * num_blocks(n, SPARSE_BLOCK),
    }
)
