"""Names for the things that the whole swarm refers to.

Owns: the `NewType`s that keep a round from being passed where a version is meant, and the one hash
function of the protocol. Knows nothing else.
"""

from __future__ import annotations

import hashlib
from typing import NewType

PeerId = NewType("PeerId", str)
"""Base58 libp2p peer id of an Ed25519 key. The id *contains* the public key (`protocol/signing.py`)."""

RunId = NewType("RunId", str)
"""Lower-case hex of the first 16 bytes of the manifest's hash: a run is its manifest."""

StageId = NewType("StageId", int)
"""Index of a stage, counted from the embedding."""

RoundId = NewType("RoundId", int)
"""Number of a round; the first is 0; only grows."""

Version = NewType("Version", int)
"""Number of committed updates that a stage has absorbed. Per stage; differs from the round after a void one."""

Digest = NewType("Digest", bytes)
"""SHA-256, 32 bytes."""

Lineage = NewType("Lineage", bytes)
"""SHA-256 over a stage's chain of commits, 32 bytes (design: `H(parent lineage, commit)`)."""

DIGEST_BYTES = 32


class RunningDigest:
    """The digest of bytes that come one piece after another."""

    def __init__(self) -> None:
        self._hasher = hashlib.sha256()

    def update(self, data: bytes | memoryview) -> None:
        self._hasher.update(data)

    def value(self) -> Digest:
        """Return the digest of what has come so far."""
        return Digest(self._hasher.digest())


def digest(*parts: bytes | memoryview) -> Digest:
    """Hash the concatenation of `parts` with SHA-256."""
    hasher = hashlib.sha256()
    for part in parts:
        hasher.update(part)
    return Digest(hasher.digest())
