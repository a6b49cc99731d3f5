"""The values that a tensor starts from: a function of (seed, name) and nothing else.

Owns: the random stream per tensor and Hugging Face's rule for what is drawn. Must not know: stages, shards.

Every replica of a stage draws its own initial weights and must arrive at the same bytes, whatever the cut,
the device or the processor. `torch.randn` does not give that: it has one code path per instruction set, and
they differ in the last bits. numpy's Philox with the ziggurat method is scalar integer work and table
look-ups in double precision, rounded to float32 at the end.
"""

from __future__ import annotations

import hashlib

import numpy as np
import torch
from torch import Tensor

from protocol.architecture import EMBEDDING

DRAW_ELEMENTS = 1 << 20  # draw in pieces, so that double precision never doubles a large embedding


def initialise(
    tensor: Tensor, name: str, *, seed: int, deviation: float, pad_token: int | None = None, first_row: int = 0
) -> None:
    """Fill `tensor`: normal for matrices, one for norms, zero for biases and for the padding token's embedding.

    Where a table is cut into blocks of rows, `first_row` says which these are; each block has a stream of its own.
    """
    with torch.no_grad():
        if name.endswith(".bias"):
            tensor.zero_()
        elif tensor.dim() == 1:
            tensor.fill_(1.0)
        else:
            stream = f"{name}/{first_row}" if first_row else name
            _fill_normal(tensor.view(-1), stream, seed=seed, deviation=deviation)
        if name == EMBEDDING and pad_token is not None and 0 <= pad_token - first_row < len(tensor):
            tensor[pad_token - first_row].zero_()


def _fill_normal(flat: Tensor, stream: str, *, seed: int, deviation: float) -> None:
    key = hashlib.sha256(f"handcar/weights/{seed}/{stream}".encode()).digest()[:16]
    generator = np.random.Generator(np.random.Philox(key=int.from_bytes(key, "little")))
    for start in range(0, flat.numel(), DRAW_ELEMENTS):
        piece = flat[start : start + DRAW_ELEMENTS]
        values = generator.standard_normal(piece.numel()) * deviation
        piece.copy_(torch.from_numpy(values.astype(np.float32)))
