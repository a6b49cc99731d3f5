"""int4 for activations: every block is turned before it is rounded, so that outliers do not spoil their neighbours.

A few channels of a transformer's hidden states are far larger than the rest. A block of 128 neighbours with one of
them has a scale so coarse that most others become zero. An orthogonal turn (a Hadamard matrix times fixed signs)
spreads each value over its whole block, after which all are about as large; the turn back keeps the error's length.
(QuaRot, arXiv 2404.00456; for activations between pipeline stages TAH-Quant, arXiv 2506.01352.)
"""

from __future__ import annotations

import torch
from torch import Tensor

from peer.codecs.blocks import Int4Codec
from peer.codecs.codec import Buffer, check_flat, check_length, largest, refuse_non_finite, to_blocks
from protocol.encoding import INT4_BLOCK, encoded_bytes, num_blocks
from protocol.errors import WireError

FP32_MAX = torch.finfo(torch.float32).max
MAX_MAGNITUDE = FP32_MAX / INT4_BLOCK  # or a sum over a block might overflow


class TurnedInt4Codec:
    """`int4` of turned blocks of 128, the last one filled up with zeros: as long as `int4` of whole blocks.

    For values that are used once: of an error nobody keeps account. Magnitudes above a 128th of fp32's largest
    count as that.
    """

    name = "int4-turned"
    is_dense = True

    def __init__(self) -> None:
        self._plain = Int4Codec()
        self._signs_K = torch.randint(0, 2, (INT4_BLOCK,), generator=torch.Generator().manual_seed(0)) * 2.0 - 1.0

    def encode(self, values: Tensor) -> bytes:
        check_flat(values)
        refuse_non_finite(values)
        blocks = to_blocks(values.cpu(), INT4_BLOCK).clamp(-MAX_MAGNITUDE, MAX_MAGNITUDE)
        return self._plain.encode(_turned(blocks.mul_(self._signs_K)).view(-1))

    def decode(self, data: Buffer, num_elements: int) -> Tensor:
        check_length(data, self.encoded_bytes(num_elements), codec_name=self.name, num_elements=num_elements)
        blocks = self._plain.decode(data, num_blocks(num_elements, INT4_BLOCK) * INT4_BLOCK).view(-1, INT4_BLOCK)
        values = _turned(blocks).mul_(self._signs_K).view(-1)[:num_elements]
        if not largest(values) <= FP32_MAX:
            raise WireError(f"{self.name}: a block holds more than fp32 does")
        return values

    def encoded_bytes(self, num_elements: int) -> int:
        return encoded_bytes(self.name, num_elements)


def _turned(blocks: Tensor) -> Tensor:
    """Multiply rows of 2**k values by Sylvester's Hadamard matrix over its norm: its own inverse.

    By k rounds of sums and differences of pairs, each of them one rounded operation: the same bits on every machine.
    """
    size = blocks.shape[1]
    width = 1
    while width < size:
        pairs = blocks.view(-1, size // (2 * width), 2, width)
        low, high = pairs[:, :, 0], pairs[:, :, 1]
        blocks = torch.stack((low + high, low - high), dim=2)
        width *= 2
    return blocks.view(-1, size).mul_(size**-0.5)
