"""The sparse codec: of every 4,096 values the 64 largest, with 4 bits each.

For differences that are averaged with error feedback: what is not sent now is added to what comes next (deep gradient
compression, arXiv 1712.01887; top-k of what local steps have changed: SparseLoCo, arXiv 2508.15706). 0.0254 bytes per
value, 1/157 of fp32.

Layout, each for all blocks: the low bits of the indices, their bitmaps, the codes, and two fp32 per block, the
smallest and the largest magnitude that it sends. Indices grow within a block and are Elias-Fano coded (Elias 1974):
the lower 6 bits of each, packed, and a bitmap in which bit `(index >> 6) + i` stands for the i-th. That is 8 bits per
index at a fixed length, where plain ones take 12. A code is a sign (1: negative) above 3 bits of magnitude, evenly
from the smallest to the largest.

Legend: B blocks of N = 4,096 values, of which K = 64 are kept.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from peer.codecs.codec import (
    Buffer,
    check_flat,
    check_length,
    from_bytes,
    refuse_non_finite,
    to_blocks,
    to_bytes,
)
from protocol.encoding import SPARSE_BLOCK as BLOCK
from protocol.encoding import encoded_bytes, num_blocks
from protocol.errors import WireError

KEPT = 64
LOW_BITS = 6  # of an index: log2(BLOCK / KEPT), which is where Elias-Fano is shortest
TOP_LEVEL = 7
SIGN = 8
LOW_BYTES = KEPT * LOW_BITS // 8
HIGH_BITS = KEPT + (BLOCK >> LOW_BITS)
HIGH_BYTES = HIGH_BITS // 8
CODE_BYTES = KEPT // 2


class SparseCodec:
    """The 64 largest of 4,096 values; all others become zero. Ties go to the lower index.

    What is kept is off by at most a 14th of the difference between the largest and the smallest kept magnitude.
    """

    name = "sparse"
    is_dense = False

    def encode(self, values: Tensor) -> bytes:
        check_flat(values)
        if not len(values):
            return b""
        blocks_BN = to_blocks(values, BLOCK)
        refuse_non_finite(blocks_BN.abs().amax(dim=1))
        index_BK = _largest(blocks_BN)
        kept_BK = blocks_BN.gather(1, index_BK)
        size_BK = kept_BK.abs()
        least_B1, most_B1 = size_BK.aminmax(dim=1, keepdim=True)
        step_B1 = (most_B1 - least_B1) / TOP_LEVEL
        level_BK = ((size_BK - least_B1) / torch.where(step_B1 == 0, torch.inf, step_B1)).round_().clamp_(0, TOP_LEVEL)
        code_BK = level_BK.to(torch.uint8) | (kept_BK < 0).to(torch.uint8) * SIGN
        low_BK = (index_BK & ((1 << LOW_BITS) - 1)).to(torch.uint8)
        high_BK = (index_BK >> LOW_BITS) + torch.arange(KEPT, device=values.device)
        bitmap = torch.zeros(len(blocks_BN), HIGH_BITS, dtype=torch.uint8, device=values.device).scatter_(1, high_BK, 1)
        return b"".join(
            to_bytes(part.contiguous().view(-1))
            for part in (
                _pack(low_BK, LOW_BITS),
                _pack(bitmap, 1),
                _pack(code_BK, 4),
                torch.cat((least_B1, most_B1), dim=1),
            )
        )

    def decode(self, data: Buffer, num_elements: int) -> Tensor:
        check_length(data, self.encoded_bytes(num_elements), codec_name=self.name, num_elements=num_elements)
        if not num_elements:
            return torch.empty(0)
        blocks = num_blocks(num_elements, BLOCK)
        view, start = memoryview(data), 0
        parts = []
        for size in (LOW_BYTES, HIGH_BYTES, CODE_BYTES):
            parts.append(from_bytes(view[start : start + blocks * size], torch.uint8, blocks * size).view(blocks, size))
            start += blocks * size
        bounds_B2 = from_bytes(view[start:], torch.float32, 2 * blocks).view(blocks, 2)
        least_B1, most_B1 = bounds_B2[:, :1], bounds_B2[:, 1:]
        if not bool(((least_B1 >= 0) & (most_B1 >= least_B1) & (most_B1 < torch.inf)).all()):  # also false for NaN
            raise WireError("sparse: the magnitudes of a block are negative, out of order or not finite")
        index_BK = _indices(_unpack(parts[0], LOW_BITS), _unpack(parts[1], 1))
        code_BK = _unpack(parts[2], 4)
        step_B1 = (most_B1 - least_B1) / TOP_LEVEL
        size_BK = torch.minimum(least_B1 + (code_BK & TOP_LEVEL) * step_B1, most_B1)
        kept_BK = torch.where(code_BK >= SIGN, -size_BK, size_BK)
        values = torch.zeros(blocks, BLOCK).scatter_(1, index_BK, kept_BK).view(-1)
        if bool(values[num_elements:].any()):
            raise WireError("sparse: a value behind the last one")
        return values[:num_elements].clone() if num_elements < len(values) else values

    def encoded_bytes(self, num_elements: int) -> int:
        return encoded_bytes(self.name, num_elements)


def _largest(blocks_BN: Tensor) -> Tensor:  # -> (B, K) int64
    """Return the indices of the largest magnitudes in growing order, the same on every machine.

    The bits of a positive fp32 grow with its value, and with the index below them no two keys are equal.
    """
    rank_N = torch.arange(BLOCK - 1, -1, -1, device=blocks_BN.device)
    key_BN = blocks_BN.abs().view(torch.int32).to(torch.int64) * BLOCK + rank_N
    key_BK = key_BN.topk(KEPT, dim=1, sorted=False).values
    return (BLOCK - 1 - key_BK % BLOCK).sort(dim=1).values


def _indices(low_BK: Tensor, bitmap: Tensor) -> Tensor:  # -> (B, K) int64
    """Undo Elias-Fano; raises `WireError` for what is not K indices that grow."""
    if not bool((bitmap.sum(dim=1) == KEPT).all()):
        raise WireError(f"sparse: a block does not have {KEPT} indices")
    high_BK = bitmap.nonzero()[:, 1].view(-1, KEPT) - torch.arange(KEPT)
    index_BK = (high_BK << LOW_BITS) | low_BK
    if not bool((index_BK[:, 1:] > index_BK[:, :-1]).all()) or int(index_BK.amax()) >= BLOCK:
        raise WireError("sparse: the indices of a block do not grow")
    return index_BK


def _pack(numbers: Tensor, bits: int) -> Tensor:
    """Pack uint8 numbers of `bits` bits each, row by row, the first into the lowest bits."""
    each = np.unpackbits(numbers.cpu().numpy()[:, :, None], axis=2, count=bits, bitorder="little")
    return torch.from_numpy(np.packbits(each.reshape(len(each), -1), axis=1, bitorder="little"))


def _unpack(packed: Tensor, bits: int) -> Tensor:  # -> int64
    """Undo `_pack`."""
    each = np.unpackbits(packed.numpy(), axis=1, bitorder="little").reshape(len(packed), -1, bits)
    return torch.from_numpy(np.packbits(each, axis=2, bitorder="little")[:, :, 0]).to(torch.int64)
