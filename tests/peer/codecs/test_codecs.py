"""Every codec: exact lengths, bounded error, determinism, and bytes of strangers that never do worse than WireError."""

from __future__ import annotations

import math
import struct

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor

from peer.codecs import codec, codec_names, sparse, turned
from peer.codecs.codec import largest
from protocol.encoding import FP16_BLOCK, INT4_BLOCK, INT8_BLOCK, SPARSE_BLOCK, SPARSE_BLOCK_BYTES
from protocol.errors import ConfigError, LocalFault, WireError

FP32_MAX = torch.finfo(torch.float32).max
names = pytest.mark.parametrize("name", codec_names())

fp32s = st.floats(width=32, allow_nan=False, allow_infinity=False)
magnitudes = st.sampled_from([1e-45, 1e-38, 1e-20, 1e-6, 1.0, 7e4, 1e20, FP32_MAX])
lengths = st.integers(0, 3 * FP16_BLOCK)
sparse_lengths = lengths | st.integers(SPARSE_BLOCK - 2, 2 * SPARSE_BLOCK + 2)


@st.composite
def tensors(draw: st.DrawFn, lengths: st.SearchStrategy[int] = lengths) -> Tensor:
    """A random tensor of any length and scale with a few hand-picked values strewn in."""
    values = torch.randn(draw(lengths), generator=torch.Generator().manual_seed(draw(st.integers(0, 2**32))))
    values = (values.double() * draw(magnitudes)).clamp(-FP32_MAX, FP32_MAX).float()
    if len(values):
        for value in draw(st.lists(fp32s, max_size=5)):
            values[draw(st.integers(0, len(values) - 1))] = value
    return values


def block_tops(values: Tensor, block: int) -> Tensor:
    """The largest magnitude of each value's block, per value, in double precision."""
    if not len(values):
        return values.double()
    starts = range(0, len(values), block)
    return torch.cat([torch.full((len(v),), v.abs().max().item()) for v in (values[s : s + block] for s in starts)])


def allowed_error(name: str, values: Tensor) -> Tensor:
    """The bound that each codec's docstring promises, per value."""
    exact = values.double().abs()
    if name == "fp32":
        return torch.zeros_like(exact)
    if name == "bf16":
        return exact * 2.0**-8 + 2.0**-133
    if name == "fp16":
        top = block_tops(values, FP16_BLOCK)
        return torch.maximum(exact * 2.0**-11, torch.maximum(top * 2.0**-39, torch.tensor(2.0**-150).double()))
    if name == "sparse":
        return sparse_error(values)
    if name == "int4-turned":
        return turned_error(values)
    block, levels = (INT8_BLOCK, 127) if name == "int8" else (INT4_BLOCK, 7)
    top = block_tops(values, block)
    return top / levels * 0.5000003 + torch.where(top < levels * 2.0**-126, top, 0.0)


def turned_error(values: Tensor) -> Tensor:
    """Of any value: what a block's length makes half a scale, on all 128 turned values at once; by blocks."""
    allowed = values.double().abs()
    for start in range(0, len(values), INT4_BLOCK):
        block = allowed[start : start + INT4_BLOCK]
        length = float(block.clamp(max=turned.MAX_MAGNITUDE).square().sum().sqrt())
        most = INT4_BLOCK**0.5 * (length / 14 * 1.0001 + 7 * 2.0**-126)
        block[:] = most + (block - turned.MAX_MAGNITUDE).clamp(min=0.0)
    return allowed


def sparse_error(values: Tensor) -> Tensor:
    """A 14th of the kept magnitudes' span for what is kept, everything for the rest; by sorting, block by block."""
    allowed = values.double().abs()
    for start in range(0, len(values), SPARSE_BLOCK):
        block = allowed[start : start + SPARSE_BLOCK]
        order = block.sort(descending=True, stable=True).indices[: sparse.KEPT]
        kept = block[order]
        least = kept[-1] if len(block) >= sparse.KEPT else torch.zeros(())  # the rest of the block counts as zeros
        block[order] = (kept[0] - least) / 14 * 1.000001 + kept[0] * 2.0**-22 + 2.0**-148
    return allowed


@names
@given(values=tensors())
def test_round_trip_stays_within_the_promised_error(name: str, values: Tensor) -> None:
    """Oracle: the bounds in the docstrings, computed in double precision; the length comes from `encoded_bytes`."""
    before = values.clone()
    data = codec(name).encode(values)
    back = codec(name).decode(data, len(values))
    assert len(data) == codec(name).encoded_bytes(len(values))
    assert back.dtype == torch.float32
    assert back.shape == values.shape
    assert torch.equal(values, before)
    assert bool(((back.double() - values.double()).abs() <= allowed_error(name, values)).all())


@given(seed=st.integers(0, 2**32), outlier=st.integers(0, INT4_BLOCK - 1), size=st.floats(14.0, 40.0))
def test_a_block_with_an_outlier_is_better_turned(seed: int, outlier: int, size: float) -> None:
    """Activations have outliers. Oracle: `int4` of the same values, of which only the outlier is left."""
    values = torch.randn(INT4_BLOCK, generator=torch.Generator().manual_seed(seed)).clamp(-2.0, 2.0)
    values[outlier] = 2.0 * size
    plain, spread = (codec(name).decode(codec(name).encode(values), INT4_BLOCK) for name in ("int4", "int4-turned"))
    assert int(torch.count_nonzero(plain)) == 1
    assert float((spread - values).square().sum()) < float((plain - values).square().sum())


@names
@given(values=tensors())
def test_same_values_give_same_bytes(name: str, values: Tensor) -> None:
    """Oracle: a second encoding of a copy."""
    assert codec(name).encode(values) == codec(name).encode(values.clone())


@names
@given(values=tensors())
def test_decoded_values_are_fresh_and_writable(name: str, values: Tensor) -> None:
    """The reduce adds to decoded tensors in place; that must not reach the bytes that came in."""
    data = bytearray(codec(name).encode(values))
    kept = bytes(data)
    codec(name).decode(data, len(values)).add_(1.0)
    assert bytes(data) == kept


@names
@given(data=st.data())
def test_any_bytes_decode_to_finite_values_or_wire_error(name: str, data: st.DataObject) -> None:
    """Oracle: whatever a stranger sends, there is no third outcome."""
    num_elements = data.draw(st.integers(0, 2 * INT8_BLOCK + 3))
    exact = codec(name).encoded_bytes(num_elements)
    length = data.draw(st.one_of(st.just(exact), st.integers(0, exact + 8)))
    junk = data.draw(st.binary(min_size=length, max_size=length))
    try:
        values = codec(name).decode(junk, num_elements)
    except WireError:
        return
    assert length == exact
    assert len(values) == num_elements
    assert bool(torch.isfinite(values).all())


@names
@given(num_elements=lengths, wrong=st.integers(-4, 4))
def test_any_other_length_is_refused(name: str, num_elements: int, wrong: int) -> None:
    length = codec(name).encoded_bytes(num_elements) + wrong
    assume(wrong != 0 and length >= 0)
    with pytest.raises(WireError, match=f"{num_elements} elements"):
        codec(name).decode(bytes(length), num_elements)


@names
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_non_finite_values_are_refused_at_encode(name: str, bad: float) -> None:
    values = torch.zeros(1500)
    values[1400] = bad
    with pytest.raises(LocalFault, match="NaN or infinity"):
        codec(name).encode(values)


@names
def test_anything_but_flat_fp32_is_our_own_bug(name: str) -> None:
    for values in (torch.zeros(4, dtype=torch.float16), torch.zeros(2, 2), torch.zeros(8)[::2]):
        with pytest.raises(ValueError, match="flat contiguous fp32"):
            codec(name).encode(values)


@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e9])
def test_fp16_sums_of_gradients_neither_overflow_nor_vanish(scale: float) -> None:
    """Oracle: a plain cast to fp16 loses all of these at 1e-12 and 1e9; the block exponent keeps 11 bits."""
    values = torch.linspace(0.5, 1.0, 4096) * scale
    back = codec("fp16").decode(codec("fp16").encode(values), 4096)
    torch.testing.assert_close(back, values, rtol=2.0**-11, atol=0.0)


def test_int8_rounds_half_to_even() -> None:
    """Oracle: scale is exactly 1 with a largest value of 127, so levels are the rounded values themselves."""
    values = torch.tensor([127.0, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5])
    back = codec("int8").decode(codec("int8").encode(values), len(values))
    assert back.tolist() == [127.0, 0.0, 2.0, 2.0, 0.0, -2.0, -2.0]


def test_int8_blocks_do_not_share_an_outlier() -> None:
    values = torch.full((2 * INT8_BLOCK,), 1e-3)
    values[0] = 1e3
    back = codec("int8").decode(codec("int8").encode(values), len(values))
    assert back[1].item() == 0.0
    torch.testing.assert_close(back[INT8_BLOCK:], values[INT8_BLOCK:])


@pytest.mark.parametrize("scale", [float("nan"), float("inf"), -1.0, FP32_MAX])
def test_int8_refuses_scales_that_no_encoder_writes(scale: float) -> None:
    with pytest.raises(WireError, match="scale"):
        codec("int8").decode(bytes(4) + struct.pack("<f", scale), 4)


def test_int8_refuses_the_level_that_no_encoder_writes() -> None:
    with pytest.raises(WireError, match="-128"):
        codec("int8").decode(b"\x80" + struct.pack("<f", 1.0), 1)


@pytest.mark.parametrize("shift", [-128, -114, 127])
def test_fp16_refuses_exponents_that_no_encoder_writes(shift: int) -> None:
    with pytest.raises(WireError, match="exponent"):
        codec("fp16").decode(bytes(2) + struct.pack("<b", shift), 1)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 65504.0])
def test_fp16_refuses_values_beyond_the_scaled_range(value: float) -> None:
    with pytest.raises(WireError, match="range"):
        codec("fp16").decode(struct.pack("<e", value) + b"\x00", 1)


def test_int4_packs_two_levels_per_byte() -> None:
    """Oracle: levels by hand; the first of two is in the lower half."""
    data = codec("int4").encode(torch.tensor([7.0, -7.0, 1.0, -2.0, 3.0]))
    assert data == bytes([0x97, 0xE1, 0x03]) + struct.pack("<f", 1.0)


@pytest.mark.parametrize(("levels", "message"), [(b"\x08", "-8"), (b"\x80", "-8|behind"), (b"\x10", "behind")])
def test_int4_refuses_what_no_encoder_writes(levels: bytes, message: str) -> None:
    with pytest.raises(WireError, match=message):
        codec("int4").decode(levels + struct.pack("<f", 1.0), 1)


@given(values=tensors(sparse_lengths))
def test_sparse_keeps_the_largest_of_every_block(values: Tensor) -> None:
    """Oracle: a stable sort by magnitude; what is not among the first 64 of a block comes back as zero."""
    back = codec("sparse").decode(codec("sparse").encode(values), len(values))
    for start in range(0, len(values), SPARSE_BLOCK):
        block, got = values[start : start + SPARSE_BLOCK], back[start : start + SPARSE_BLOCK]
        rest = block.abs().sort(descending=True, stable=True).indices[sparse.KEPT :]
        assert not bool(got[rest].any())
        assert bool((got * block >= 0).all())
    assert bool(((back.double() - values.double()).abs() <= sparse_error(values)).all())


def test_sparse_takes_a_hundredth_of_fp32() -> None:
    """Oracle: the issue's figure, for a whole number of blocks."""
    assert codec("sparse").encoded_bytes(1 << 20) <= 4 * (1 << 20) / 100


def sparse_parts() -> tuple[bytearray, int, int]:
    """A valid encoding of one block, and where its bitmap and its magnitudes start."""
    values = torch.randn(SPARSE_BLOCK, generator=torch.Generator().manual_seed(1))
    bitmap = sparse.LOW_BYTES
    return bytearray(codec("sparse").encode(values)), bitmap, SPARSE_BLOCK_BYTES - 8


@pytest.mark.parametrize(
    ("least", "most"), [(float("nan"), 1.0), (0.0, float("nan")), (-1.0, 1.0), (2.0, 1.0), (0.0, float("inf"))]
)
def test_sparse_refuses_magnitudes_that_no_encoder_writes(least: float, most: float) -> None:
    data, _, magnitudes = sparse_parts()
    data[magnitudes:] = struct.pack("<ff", least, most)
    with pytest.raises(WireError, match="magnitudes"):
        codec("sparse").decode(data, SPARSE_BLOCK)


def test_sparse_refuses_indices_that_no_encoder_writes() -> None:
    """Too few, twice the same, beyond the block, and a value where a short block has none."""
    data, bitmap, _ = sparse_parts()
    few = bytearray(data)
    few[bitmap : bitmap + sparse.HIGH_BYTES] = bytes(sparse.HIGH_BYTES)
    with pytest.raises(WireError, match="64 indices"):
        codec("sparse").decode(few, SPARSE_BLOCK)
    same = bytearray(data)
    same[:bitmap] = bytes(bitmap)
    same[bitmap : bitmap + sparse.HIGH_BYTES] = b"\xff" * 8 + bytes(8)  # 64 indices, all of them 0
    with pytest.raises(WireError, match="do not grow"):
        codec("sparse").decode(same, SPARSE_BLOCK)
    beyond = bytearray(data)
    beyond[bitmap : bitmap + sparse.HIGH_BYTES] = bytes(8) + b"\xff" * 8
    with pytest.raises(WireError, match="do not grow"):
        codec("sparse").decode(beyond, SPARSE_BLOCK)
    with pytest.raises(WireError, match="behind"):
        codec("sparse").decode(data, 100)


def test_unknown_codec_lists_the_known_ones() -> None:
    with pytest.raises(ConfigError, match="zip") as caught:
        codec("zip")
    assert all(name in caught.value.hint for name in ("fp32", "fp16", "bf16", "int8", "int4", "sparse"))


@pytest.mark.parametrize("position", [0, 7, 31, 1000])
def test_largest_never_overlooks_a_nan(position: int) -> None:
    """The finiteness of everything that is sent or received hangs on this one pass."""
    values = torch.randn(1001, generator=torch.Generator().manual_seed(position))
    assert largest(values) == values.abs().max().item()
    values[position] = float("nan")
    assert math.isnan(largest(values))
