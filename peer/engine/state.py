"""A stage's state as named tensors: comparing, hashing, checking for numbers that are none.

Owns: the rule that state is a mapping from stable names to plain tensors (safetensors in a file, ranges on
the wire) and the bytes that a hash covers. Must not know: what the tensors mean, files, the network.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from protocol.errors import StorageError
from protocol.ids import Digest


def check_same_tensors(own: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> None:
    """Raise `StorageError` unless `given` has exactly the names, shapes and types of `own`."""
    if unequal := own.keys() ^ given.keys():
        raise StorageError(f"the saved state does not fit this stage: {min(unequal)} is missing or unknown.")
    for name, tensor in own.items():
        if given[name].shape != tensor.shape or given[name].dtype != tensor.dtype:
            raise StorageError(
                f"the saved state does not fit this stage: {name} is {tuple(given[name].shape)} {given[name].dtype}, "
                f"not {tuple(tensor.shape)} {tensor.dtype}."
            )


def tensors_digest(tensors: Iterable[Tensor]) -> Digest:
    """Hash the tensors' elements (little-endian, row by row) in the order given."""
    hasher = hashlib.sha256()  # not ids.digest: that wants all parts at once, and on a GPU every part is a copy
    for tensor in tensors:
        plain = tensor.detach().contiguous().reshape(-1).view(torch.uint8).cpu()
        hasher.update(plain.numpy().data)
    return Digest(hasher.digest())


def is_finite(tensor: Tensor) -> bool:
    """Return whether no element is infinite or NaN, in one pass and without a mask as large as the tensor."""
    return math.isfinite(largest(tensor))


def largest(tensor: Tensor) -> float:
    """Return the largest magnitude of an element; NaN if there is one."""
    low, high = (float(bound) for bound in torch.aminmax(tensor.detach()))
    return math.nan if math.isnan(low) or math.isnan(high) else max(-low, high)
