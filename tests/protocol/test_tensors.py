"""protocol/tensors.py: the header reader against the safetensors library, and what it refuses."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load, save

from protocol.errors import WireError
from protocol.tensors import (
    BYTES_PER_ELEMENT,
    MAX_HEADER_BYTES,
    PREFIX_BYTES,
    TensorHeader,
    check_tensors,
    format_header,
    header_length,
    parse_header,
)

NUMPY_TYPES = {
    "F64": "<f8", "F32": "<f4", "F16": "<f2", "I64": "<i8", "I32": "<i4", "I16": "<i2", "I8": "i1", "U8": "u1",
    "BOOL": "?",
}  # fmt: skip


def _parse(file: bytes) -> TensorHeader:
    length = header_length(file[:PREFIX_BYTES])
    return parse_header(file[PREFIX_BYTES : PREFIX_BYTES + length], file_bytes=len(file))


def _header(tensors: dict[str, Any], *, body_bytes: int) -> TensorHeader:
    data = json.dumps(tensors).encode()
    return parse_header(data, file_bytes=PREFIX_BYTES + len(data) + body_bytes)


@given(
    shapes=st.dictionaries(
        st.text("abc.", min_size=1, max_size=8), st.lists(st.integers(0, 4), max_size=3).map(tuple), max_size=5
    )
)
def test_a_header_says_what_safetensors_wrote(shapes: dict[str, tuple[int, ...]]) -> None:
    """Oracle: the library's own writer, and the values found at the places that the header names."""
    arrays = {name: np.full(shape, index, dtype=np.float32) for index, (name, shape) in enumerate(shapes.items())}
    file = save(arrays, metadata={"format": "pt"})
    header = _parse(file)
    assert header.metadata == {"format": "pt"}
    assert {name: entry.shape for name, entry in header.tensors.items()} == shapes
    body = file[PREFIX_BYTES + header_length(file) :]
    for name, entry in header.tensors.items():
        assert entry.dtype == "F32"
        assert body[entry.start : entry.end] == arrays[name].tobytes()


@given(
    tensors=st.dictionaries(
        st.text("abc.é", min_size=1, max_size=8),
        st.tuples(st.sampled_from(sorted(NUMPY_TYPES)), st.lists(st.integers(0, 4), max_size=3).map(tuple)),
        max_size=6,
    ),
    seed=st.integers(0, 1000),
)
def test_safetensors_reads_what_a_formatted_header_says(
    tensors: dict[str, tuple[str, tuple[int, ...]]], seed: int
) -> None:
    """Oracle: the library's own reader gives back every tensor, and our parser what was asked for."""
    random = np.random.default_rng(seed)
    arrays = {name: random.integers(0, 2, shape).astype(NUMPY_TYPES[dtype]) for name, (dtype, shape) in tensors.items()}
    start = format_header(tensors)
    file = start + b"".join(array.tobytes() for array in arrays.values())
    loaded = load(file)
    assert loaded.keys() == arrays.keys()
    for name, array in arrays.items():
        assert loaded[name].dtype == array.dtype
        assert loaded[name].shape == array.shape
        assert loaded[name].tobytes() == array.tobytes()
    header = _parse(file)
    assert header.metadata == {"format": "pt"}
    assert {name: (entry.dtype, entry.shape) for name, entry in header.tensors.items()} == tensors
    assert len(start) % PREFIX_BYTES == 0


def test_a_formatted_header_is_the_librarys_own_where_the_order_is() -> None:
    """Oracle: the bytes that safetensors writes for tensors of one type, which it sorts by name."""
    arrays = {f"layer.{index}": np.full((index, 3), index, dtype=np.float32) for index in range(1, 9)}
    body = b"".join(array.tobytes() for array in arrays.values())
    ours = format_header({name: ("F32", array.shape) for name, array in arrays.items()}) + body
    assert ours == save(arrays, metadata={"format": "pt"})


def test_every_type_has_its_size() -> None:
    """Oracle: numpy's sizes; it has no bfloat16, which is half a float32."""
    sizes = {name: np.dtype(numpys).itemsize for name, numpys in NUMPY_TYPES.items()} | {"BF16": 2}
    assert sizes == BYTES_PER_ELEMENT


@given(st.binary(max_size=200))
def test_random_bytes_are_refused_as_wire_errors(file: bytes) -> None:
    """Oracle: whatever comes, nothing but `WireError` leaves the parser."""
    try:
        _parse(file)
    except WireError:
        return
    assert json.loads(file[PREFIX_BYTES : PREFIX_BYTES + header_length(file)]) is not None


@pytest.mark.parametrize(
    ("tensors", "body_bytes", "reason"),
    [
        ({"a": {"dtype": "F32", "shape": [2], "data_offsets": [4, 12]}}, 12, "does not follow"),
        ({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}, 12, "the file has 12"),
        ({"a": {"dtype": "F32", "shape": [3], "data_offsets": [0, 8]}}, 8, "does not fill"),
        ({"a": {"dtype": "F31", "shape": [2], "data_offsets": [0, 8]}}, 8, "unknown type"),
        ({"a": {"dtype": "F32", "shape": [-2], "data_offsets": [0, -8]}}, 0, "impossible"),
        ({"a": {"dtype": "F32", "shape": [True], "data_offsets": [0, 4]}}, 4, "impossible"),
        ({"a": {"dtype": "F32", "shape": [1 << 60], "data_offsets": [0, 4]}}, 4, "impossible"),
        ({"a": {"dtype": "F32", "shape": [1] * 10_000, "data_offsets": [0, 4]}}, 4, "impossible"),
        ({"a": {"dtype": "F32", "shape": [2]}}, 8, "described by"),
        ({"a": [2]}, 8, "described by"),
        ({"a": {"dtype": ["F32"], "shape": [2], "data_offsets": [0, 8]}}, 8, "unknown type"),
        ({"__metadata__": {"format": 1}}, 0, "not text"),
        (
            {
                "a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]},
                "b": {"dtype": "F32", "shape": [2], "data_offsets": [4, 12]},
            },
            12,
            "tensor b does not follow",
        ),
    ],
)
def test_an_impossible_header_is_refused(tensors: dict[str, Any], body_bytes: int, reason: str) -> None:
    """Oracle: by hand, one broken rule each."""
    with pytest.raises(WireError, match=reason):
        _header(tensors, body_bytes=body_bytes)


def test_a_name_that_occurs_twice_is_refused() -> None:
    """Oracle: readers disagree about which of the two counts."""
    entry = '{"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}'
    data = f'{{"a": {entry}, "a": {entry}}}'.encode()
    with pytest.raises(WireError, match="twice"):
        parse_header(data, file_bytes=PREFIX_BYTES + len(data) + 1)


def test_deep_nesting_is_refused_without_a_crash() -> None:
    """Oracle: 100,000 brackets overflow the recursion of json.loads."""
    data = b"[" * 100_000
    with pytest.raises(WireError):
        parse_header(data, file_bytes=PREFIX_BYTES + len(data))


def test_a_huge_header_is_refused_before_it_is_read() -> None:
    """Oracle: eight bytes are enough to say no."""
    with pytest.raises(WireError, match="over the limit"):
        header_length((MAX_HEADER_BYTES + 1).to_bytes(8, "little"))
    with pytest.raises(WireError, match="8 bytes"):
        header_length(b"1234567")


def test_a_wrong_tensor_is_named() -> None:
    """Oracle: by hand; missing, of another shape, too many."""
    header = _header({"a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}}, body_bytes=24)
    check_tensors(header, {"a": (2, 3)})
    with pytest.raises(WireError, match="b is missing"):
        check_tensors(header, {"a": (2, 3), "b": (1,)})
    with pytest.raises(WireError, match=r"a has shape \(2, 3\) instead of \(3, 2\)"):
        check_tensors(header, {"a": (3, 2)})
    with pytest.raises(WireError, match="a does not belong"):
        check_tensors(header, {})
