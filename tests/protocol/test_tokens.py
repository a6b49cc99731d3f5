"""protocol/tokens.py: the arithmetic from windows to chunks, and what an index refuses."""

from __future__ import annotations

import hashlib
from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol.batches import num_windows
from protocol.errors import WireError
from protocol.ids import Digest, digest
from protocol.manifest import TokenFileSpec
from protocol.tokens import ChunkIndex, chunk_range, chunks_of, index_bytes, window_range


def _spec(data: bytes, *, chunk_bytes: int, bytes_per_token: Literal[2, 4] = 2) -> tuple[TokenFileSpec, bytes]:
    """Describe `data` the way `TokenFileWriter` does, by slicing it naively."""
    pieces = [data[start : start + chunk_bytes] for start in range(0, len(data), chunk_bytes)]
    index = index_bytes(Digest(hashlib.sha256(piece).digest()) for piece in pieces)
    spec = TokenFileSpec(
        name="train.bin",
        num_tokens=len(data) // bytes_per_token,
        bytes_per_token=bytes_per_token,
        chunk_bytes=chunk_bytes,
        index_digest=digest(index),
    )
    return spec, index


@given(
    num_tokens=st.integers(2, 120),
    bytes_per_token=st.sampled_from([2, 4]),
    chunk_tokens=st.integers(1, 50),
    sequence_length=st.integers(1, 30),
)
def test_chunks_of_a_window_hold_exactly_its_bytes(
    num_tokens: int, bytes_per_token: Literal[2, 4], chunk_tokens: int, sequence_length: int
) -> None:
    """Oracle: slicing the whole file. Without the first or the last chunk named, the window's ends are missing."""
    data = b"".join(token.to_bytes(bytes_per_token, "little") for token in range(num_tokens))
    spec, _ = _spec(data, chunk_bytes=chunk_tokens * bytes_per_token, bytes_per_token=bytes_per_token)
    for window in range(num_windows(num_tokens, sequence_length)):
        span = window_range(spec, window, sequence_length=sequence_length)
        tokens = range(window * sequence_length, window * sequence_length + sequence_length + 1)
        assert data[span.start : span.end] == b"".join(token.to_bytes(bytes_per_token, "little") for token in tokens)
        chunks = chunks_of(spec, [window], sequence_length=sequence_length)
        holding = [chunk for chunk in range(spec.num_chunks) if _overlaps(spec, chunk, span.start, span.end)]
        assert list(chunks) == holding


def _overlaps(spec: TokenFileSpec, chunk: int, start: int, end: int) -> bool:
    span = chunk_range(spec, chunk)
    return span.start < end and start < span.end


def test_the_last_window_ends_with_the_last_usable_token() -> None:
    """Oracle: by hand. 9 tokens make two windows of 4 (+1), 8 tokens only one."""
    spec, _ = _spec(bytes(18), chunk_bytes=8)
    assert window_range(spec, 1, sequence_length=4).end == 18
    with pytest.raises(WireError, match="no window 2 of 4"):
        window_range(spec, 2, sequence_length=4)
    short, _ = _spec(bytes(16), chunk_bytes=8)
    with pytest.raises(WireError, match="no window 1"):
        window_range(short, 1, sequence_length=4)


@pytest.mark.parametrize("window", [-1, 10**9])
def test_windows_outside_the_file_are_refused(window: int) -> None:
    """Oracle: the file has window 0 only."""
    spec, _ = _spec(bytes(10), chunk_bytes=8)
    with pytest.raises(WireError):
        chunks_of(spec, [0, window], sequence_length=4)


def test_chunks_cover_the_file_once() -> None:
    """Oracle: concatenation gives the file back, the last chunk being the rest."""
    data = bytes(range(250))
    spec, _ = _spec(data, chunk_bytes=64)
    spans = [chunk_range(spec, chunk) for chunk in range(spec.num_chunks)]
    assert b"".join(data[span.start : span.end] for span in spans) == data
    assert [span.length for span in spans] == [64, 64, 64, 58]


@pytest.mark.parametrize("chunk", [-1, 4])
def test_chunks_outside_the_file_are_refused(chunk: int) -> None:
    """Oracle: the file has chunks 0 to 3."""
    spec, index = _spec(bytes(250), chunk_bytes=64)
    with pytest.raises(WireError, match="has no chunk"):
        ChunkIndex.parse(spec, index).digest_of(chunk)


def test_an_index_accepts_its_own_chunks_only() -> None:
    """Oracle: one flipped bit, a cut and a swap are each noticed."""
    data = bytes(range(256))
    spec, raw = _spec(data, chunk_bytes=64)
    index = ChunkIndex.parse(spec, raw)
    assert all(index.fits(chunk, data[chunk * 64 : chunk * 64 + 64]) for chunk in range(4))
    flipped = bytearray(data[:64])
    flipped[17] ^= 4
    assert not index.fits(0, bytes(flipped))
    assert not index.fits(0, data[:63])
    assert not index.fits(0, data[:65])
    assert not index.fits(0, data[64:128])


@pytest.mark.parametrize("change", ["flip", "cut", "extend", "swap", "empty"])
def test_a_changed_index_is_refused(change: str) -> None:
    """Oracle: the manifest holds the index's own hash."""
    spec, index = _spec(bytes(range(256)), chunk_bytes=64)
    changed = {
        "flip": bytes([index[0] ^ 1]) + index[1:],
        "cut": index[:-1],
        "extend": index + bytes(32),
        "swap": index[32:64] + index[:32] + index[64:],
        "empty": b"",
    }[change]
    with pytest.raises(WireError, match=r"train\.bin"):
        ChunkIndex.parse(spec, changed)
