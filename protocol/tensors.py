"""What a safetensors file says it holds: names, types, shapes and places, read from its header alone. Pure.

Owns: writing, parsing and checking the header. Must not know: files, torch, the values. The coordinator checks with it
what it exports, without torch; a peer can check what it was sent before any library maps it.

A safetensors file is `length: u64 little-endian, JSON header, tensor bytes`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

from protocol.errors import WireError

PREFIX_BYTES = 8
MAX_HEADER_BYTES = 16 * 1024 * 1024  # about 100,000 tensors; the largest stages have some hundreds
MAX_AXES = 16  # the product of a hundred thousand sizes takes longer than anybody waits
METADATA = "__metadata__"
BYTES_PER_ELEMENT: Mapping[str, int] = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """One tensor: `dtype` as safetensors spells it, and its bytes `[start, end)` behind the header."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int

    @property
    def num_bytes(self) -> int:
        return self.end - self.start


@dataclass(frozen=True, slots=True)
class TensorHeader:
    """A checked header: the tensors fill the file without gap or overlap."""

    metadata: Mapping[str, str]
    tensors: Mapping[str, TensorEntry]


def header_length(prefix: bytes) -> int:
    """Return the length of the JSON header from a file's first 8 bytes, or raise `WireError`."""
    if len(prefix) < PREFIX_BYTES:
        raise WireError("a tensor file cannot be shorter than 8 bytes")
    length = int.from_bytes(prefix[:PREFIX_BYTES], "little")
    if length > MAX_HEADER_BYTES:
        raise WireError(f"tensor header of {length} bytes is over the limit of {MAX_HEADER_BYTES}")
    return length


def parse_header(data: bytes, *, file_bytes: int) -> TensorHeader:
    """Parse the JSON header of a file of `file_bytes` in all, or raise `WireError`."""
    try:
        fields = json.loads(data, object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise WireError(f"tensor header is not JSON: {error}") from None
    if not isinstance(fields, dict):
        raise WireError("tensor header is not a JSON object")
    metadata = fields.pop(METADATA, {})
    if not (isinstance(metadata, dict) and all(isinstance(value, str) for value in metadata.values())):
        raise WireError("tensor metadata is not text")
    tensors = {name: _entry(name, value) for name, value in fields.items()}
    _check_places(tensors, body_bytes=file_bytes - PREFIX_BYTES - len(data))
    return TensorHeader(metadata, tensors)


def format_header(tensors: Mapping[str, tuple[str, tuple[int, ...]]]) -> bytes:
    """Return the beginning of a file of tensors, given by name as (dtype, shape), that follow in the same order."""
    fields: dict[str, Any] = {METADATA: {"format": "pt"}}
    position = 0
    for name, (dtype, shape) in tensors.items():
        end = position + prod(shape) * BYTES_PER_ELEMENT[dtype]
        fields[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [position, end]}
        position = end
    data = json.dumps(fields, separators=(",", ":")).encode()
    data += b" " * (-len(data) % PREFIX_BYTES)  # so that the tensors start aligned
    return len(data).to_bytes(PREFIX_BYTES, "little") + data


def check_tensors(header: TensorHeader, expected: Mapping[str, tuple[int, ...]]) -> None:
    """Raise `WireError` naming the first tensor that is missing, not expected, or of another shape."""
    for name, shape in expected.items():
        if name not in header.tensors:
            raise WireError(f"tensor {name} is missing")
        if header.tensors[name].shape != tuple(shape):
            raise WireError(f"tensor {name} has shape {header.tensors[name].shape} instead of {tuple(shape)}")
    unexpected = sorted(set(header.tensors) - set(expected))
    if unexpected:
        raise WireError(f"tensor {unexpected[0]} does not belong here")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) != len(pairs):
        raise ValueError("a name occurs twice")
    return fields


def _entry(name: str, value: Any) -> TensorEntry:
    if not (isinstance(value, dict) and value.keys() == {"dtype", "shape", "data_offsets"}):
        raise WireError(f"tensor {name} is not described by dtype, shape and data_offsets")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in BYTES_PER_ELEMENT:
        raise WireError(f"tensor {name} has the unknown type {str(dtype)[:16]!r}")
    if not (_are_counts(shape) and len(shape) <= MAX_AXES and _are_counts(offsets) and len(offsets) == 2):
        raise WireError(f"tensor {name} has an impossible shape or place")
    if offsets[1] - offsets[0] != prod(shape) * BYTES_PER_ELEMENT[dtype]:
        raise WireError(f"tensor {name} does not fill its place")
    return TensorEntry(dtype, tuple(shape), *offsets)


def _are_counts(values: Any) -> bool:
    """Tell a list of sizes; `type` and not `isinstance`, because JSON's true is an int to Python."""
    return isinstance(values, list) and all(type(value) is int and 0 <= value < 1 << 48 for value in values)


def _check_places(tensors: Mapping[str, TensorEntry], *, body_bytes: int) -> None:
    position = 0
    for name, entry in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].end)):
        if entry.start != position:
            raise WireError(f"tensor {name} does not follow the one before it")
        position = entry.end
    if position != body_bytes:
        raise WireError(f"tensors take {position} bytes, but the file has {body_bytes} for them")
