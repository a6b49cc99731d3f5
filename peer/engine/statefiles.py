"""A stage's state as two safetensors files, written and read from front to back, one shard at a time.

Owns: which tensors a file holds, in which order, and what of a shard goes into it. Must not know: where the files are,
who else has them, whether their bytes were checked (`peer/averaging/history.py` does that).

`weights` holds the weights by their Hugging Face names, fp32, without padding. `optimizer` holds the step count and
every shard's moments as they lie in their buffer (`peer/memory/moments.py`). Both are in the order of the shards, so
neither the writer nor the reader ever holds more than one of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import BinaryIO, Protocol

import torch
from torch import Tensor

from peer.engine.state import plain_bytes
from peer.memory.moments import MasterName, OptimizerName, moment_bytes
from protocol.control import STATE_PARTS
from protocol.errors import StorageError, WireError
from protocol.layout import BlockLayout, Shape, ShardLayout
from protocol.tensors import PREFIX_BYTES, format_header, header_length, parse_header

WEIGHTS, OPTIMIZER = STATE_PARTS
STEPS = "optimizer.steps"


class UnfitState(StorageError):
    """Files that are no state of this stage. What else fails while they are read is this machine's doing."""


class Sink(Protocol):
    """A file that is only written."""

    def write(self, data: bytes | memoryview, /) -> object: ...


class StateFormat:
    """What the files of one stage hold."""

    def __init__(
        self,
        blocks: Sequence[BlockLayout],
        optimizer: OptimizerName,
        master: MasterName = "fp32",
        *,
        is_anchored: bool = False,
    ) -> None:
        """The state of a stage that `is_anchored` is its anchor, and one fp32 number of momentum for each weight."""
        weights: dict[str, Shape] = {}
        moments: dict[str, Shape] = {}
        for block in blocks:
            for slot in block.slots:
                rows, *others = slot.shape
                weights[slot.name] = (slot.first_row + rows, *others)
            for shard in block.shards():
                size = 4 * shard.num_elements if is_anchored else moment_bytes(shard, optimizer, master)
                moments[f"optimizer.{shard.name}"] = (size,)
        self.weights = {name: ("F32", shape) for name, shape in weights.items()}
        self.moments = {STEPS: ("I64", ()), **{name: ("U8", shape) for name, shape in moments.items()}}


class StateWriter:
    """Writes the state into two open files. Every shard has to come, in order."""

    def __init__(self, files: Mapping[str, Sink], form: StateFormat, *, steps: int) -> None:
        self._files = files
        files[WEIGHTS].write(format_header(form.weights))
        files[OPTIMIZER].write(format_header(form.moments))
        files[OPTIMIZER].write(steps.to_bytes(8, "little"))

    def write(self, layout: ShardLayout, weights: Tensor, moments: Tensor) -> None:
        for start, end in _filled(layout):
            self._files[WEIGHTS].write(plain_bytes(weights[start:end]))
        self._files[OPTIMIZER].write(plain_bytes(moments))


class StateReader:
    """Reads the state out of two open files. Every shard has to be asked for, in order.

    Raises `UnfitState` at once if the files are not of this stage, and later if they end too soon.
    """

    def __init__(self, files: Mapping[str, BinaryIO], form: StateFormat) -> None:
        if missing := {*STATE_PARTS} - {*files}:
            raise UnfitState(f"the saved state has no {min(missing)}.")
        self._files = files
        _check(files[WEIGHTS], form.weights)
        _check(files[OPTIMIZER], form.moments)
        self.steps = int.from_bytes(_read(files[OPTIMIZER], 8), "little", signed=True)
        if self.steps < 0:
            raise UnfitState(f"the saved state counts {self.steps} steps.")

    def read(self, layout: ShardLayout, weights: Tensor, moments: Tensor) -> None:
        """Write a shard's saved weights and moments into its buffers."""
        weights.zero_()
        for start, end in _filled(layout):
            _read_into(self._files[WEIGHTS], weights[start:end])
        _read_into(self._files[OPTIMIZER], moments)


def _filled(layout: ShardLayout) -> list[tuple[int, int]]:
    """Return the ranges of a shard that are no padding."""
    starts = [0, *(end for _, end in layout.padding)]
    ends = [*(start for start, _ in layout.padding), layout.num_elements]
    return [(start, end) for start, end in zip(starts, ends, strict=True) if start < end]


def _check(file: BinaryIO, expected: Mapping[str, tuple[str, Shape]]) -> None:
    """Read a file's header; raise `UnfitState` unless it holds exactly these tensors in this order."""
    try:
        header = parse_header(_take(file, header_length(_take(file, PREFIX_BYTES))), file_bytes=_size(file))
    except WireError as error:
        raise UnfitState(f"the saved state is none: {error}.") from None
    found = {name: (entry.dtype, entry.shape) for name, entry in header.tensors.items()}
    if unequal := found.keys() ^ expected.keys():
        raise UnfitState(f"the saved state does not fit this stage: {min(unequal)} is missing or unknown.")
    for name, wanted in expected.items():
        if found[name] != wanted:
            raise UnfitState(f"the saved state does not fit this stage: {name} is {found[name]}, not {wanted}.")
    in_file = sorted(header.tensors, key=lambda name: (header.tensors[name].start, header.tensors[name].end))
    if in_file != list(expected):
        raise UnfitState("the saved state does not fit this stage: its tensors are in another order.")


def _size(file: BinaryIO) -> int:
    position = file.tell()
    size = file.seek(0, 2)
    file.seek(position)
    return size


def _read_into(file: BinaryIO, target: Tensor) -> None:
    target.copy_(torch.frombuffer(bytearray(_read(file, target.nbytes)), dtype=target.dtype))


def _read(file: BinaryIO, num_bytes: int) -> bytes:
    data = _take(file, num_bytes)
    if len(data) != num_bytes:
        raise UnfitState("the saved state ends too soon.")
    return data


def _take(file: BinaryIO, num_bytes: int) -> bytes:
    """Read what there is of so many bytes."""
    try:
        return file.read(num_bytes)
    except OSError as error:
        raise StorageError(f"cannot read the saved state: {error.strerror}.") from None
