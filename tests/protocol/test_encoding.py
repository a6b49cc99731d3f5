"""protocol/encoding.py: what is said of sizes is what the codecs do.

Oracle: the codecs themselves, which encode.
"""

from __future__ import annotations

import pytest
import torch

from peer.codecs import codec, codec_names
from protocol import encoding
from protocol.encoding import FP16_BLOCK, INT4_BLOCK, INT8_BLOCK, SPARSE_BLOCK, encoded_bytes, is_dense

BORDERS = sorted(
    {
        max(0, block * times + more)
        for block in (FP16_BLOCK, INT8_BLOCK, INT4_BLOCK, SPARSE_BLOCK)
        for times in (0, 1, 3)
        for more in (-1, 0, 1)
    }
)


def test_every_codec_has_a_size() -> None:
    assert set(encoding._SIZES) == set(codec_names())


@pytest.mark.parametrize("name", codec_names())
def test_sizes_are_those_of_real_encodings(name: str) -> None:
    values = torch.randn(max(BORDERS), generator=torch.Generator().manual_seed(1))
    for num_elements in BORDERS:
        assert len(codec(name).encode(values[:num_elements])) == encoded_bytes(name, num_elements)


@pytest.mark.parametrize("name", codec_names())
def test_a_codec_is_as_dense_as_it_says_itself(name: str) -> None:
    assert is_dense(name) == codec(name).is_dense
