"""Looking at numbers: whether they are finite, how large they are, and the hash of a shard's state.

Owns: what a hash covers. Must not know: files (`statefiles.py`), the network, who computed the numbers.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable

import torch
from torch import Tensor

from protocol.errors import LocalFault
from protocol.ids import Digest


def check_computed(tensor: Tensor, what: str) -> None:
    """Raise `LocalFault` unless all that this machine computed is finite."""
    if not is_finite(tensor):
        raise LocalFault(f"the {what} that this machine computed is not finite.")


def is_finite(tensor: Tensor) -> bool:
    """Return whether no element is infinite or NaN, in one pass and without a mask as large as the tensor."""
    return math.isfinite(largest(tensor))


def largest(tensor: Tensor) -> float:
    """Return the largest magnitude of an element; NaN if there is one."""
    low, high = (float(bound) for bound in torch.aminmax(tensor.detach()))
    return math.nan if math.isnan(low) or math.isnan(high) else max(-low, high)


def plain_bytes(tensor: Tensor) -> memoryview:
    """Return a flat tensor's bytes (little-endian), without a copy if it is in host memory."""
    return tensor.detach().view(torch.uint8).cpu().numpy().data


def shard_digest(weights: Tensor, moments: Tensor) -> Digest:
    """Hash one shard: its weights, padding (zeros) included, then its moments as they lie in their buffer."""
    hasher = hashlib.sha256(plain_bytes(weights))
    hasher.update(plain_bytes(moments))
    return Digest(hasher.digest())


def state_digest(steps: int, shards: Iterable[Digest]) -> Digest:
    """Hash a stage's state: the optimizer's step count and the digests of its shards in order.

    A hash of hashes, so that a shard can be hashed while it is in place, in any order, and by several threads.
    """
    hasher = hashlib.sha256(steps.to_bytes(8, "little"))
    for each in shards:
        hasher.update(each)
    return Digest(hasher.digest())
