"""The identity in a data folder: showing it, replacing its key, and the statements by which the old one hands over.

Owns: the file of statements, and the order in which a rotation reaches the disk. Must not know: what the coordinator
makes of a statement; the network. A peer that runs is never rotated under its feet: the folder's lock is taken.

The statement is on disk before the new key takes the old one's place. One whose key never did so, because everything
stopped in between, belongs to no chain that leads to us, and is not shown.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

from peer.memory.disk.durable_files import publish, write_temporary
from peer.settings import IDENTITY_FILE, LOCK
from protocol.errors import ConfigError, PeerFault, StorageError
from protocol.handover import HANDOVER_CONTEXT, MAX_HANDOVERS, Handover, hand_over
from protocol.ids import PeerId
from protocol.process import folder_lock
from protocol.signing import Signed, SigningKey, unseal
from protocol.transport import identity

HANDOVERS_FILE = "handovers"


@dataclass(frozen=True, slots=True)
class Rotation:
    """What a rotation has done."""

    before: PeerId
    now: PeerId
    kept: Path
    """The old key."""


def load_identity(data_dir: Path) -> SigningKey:
    """Return the folder's key; `ConfigError` if it has none yet."""
    try:
        return identity.load(data_dir / IDENTITY_FILE)
    except FileNotFoundError:
        raise ConfigError(f"{data_dir} has no identity yet.", hint="Make one: peer identity create") from None


def make_identity(data_dir: Path) -> SigningKey:
    """Return the folder's key; a new one if it has none yet."""
    try:
        data_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StorageError(f"cannot make {data_dir}: {error.strerror}.") from error
    return identity.load_or_create(data_dir / IDENTITY_FILE)


def load_handovers(data_dir: Path, me: PeerId) -> tuple[Signed, ...]:
    """Return the statements that lead to our key, the oldest first."""
    path = data_dir / HANDOVERS_FILE
    try:
        by_successor = dict(map(_parse, path.read_text("ascii").split()))
    except FileNotFoundError:
        return ()
    except OSError as error:
        raise StorageError(f"cannot read {path}: {error.strerror}.") from error
    except (ValueError, PeerFault):
        hint = "Restore it from a backup, or delete it and join as a newcomer."
        raise ConfigError(f"{path} is damaged.", hint=hint) from None
    chain: list[Signed] = []
    while me in by_successor and len(chain) < MAX_HANDOVERS:
        chain.append(by_successor.pop(me))
        me = chain[-1].signer
    return tuple(reversed(chain))


def rotate(data_dir: Path) -> Rotation:
    """Replace the folder's key by a new one, to which the old one hands over. The old one is kept aside."""
    with folder_lock(data_dir / LOCK, owner="peer", otherwise="Stop it first."):
        old, new = load_identity(data_dir), SigningKey.generate()
        load_handovers(data_dir, old.peer_id)  # or nobody would ever see the one that is added
        _append(data_dir / HANDOVERS_FILE, hand_over(old, new.peer_id, issued_s=time.time()))
        kept = data_dir / f"identity-{old.peer_id}.key"
        identity.replace(data_dir / IDENTITY_FILE, new, aside=kept)
        return Rotation(old.peer_id, new.peer_id, kept)


def _append(path: Path, signed: Signed) -> None:
    """Add a line, so that the file has it as a whole or is as it was."""
    try:
        lines = path.read_text("ascii") if path.exists() else ""
    except OSError as error:
        raise StorageError(f"cannot read {path}: {error.strerror}.") from error
    publish(write_temporary(path, f"{lines}{signed.to_bytes().hex()}\n".encode("ascii")), path)


def _parse(line: str) -> tuple[PeerId, Signed]:
    signed = Signed.from_bytes(bytes.fromhex(line))
    return unseal(signed, HANDOVER_CONTEXT, Handover).successor, signed
