"""The identity file: the one secret a peer or coordinator keeps, in the form that p2pd reads too.

Owns: creating, reading and refusing the key file. Must not know: hivemind, the network, where the file lives
in a data directory. Called once by each app, before `node.py` hands the same path to p2pd.

The file is libp2p's protobuf of an Ed25519 private key: `08 01 12 40 | 32-byte seed | 32-byte public key`.
Who copies it *is* that peer, so it is 0600 from its first byte on disk and refused when it is not.
"""

from __future__ import annotations

import os
import secrets
import stat
from pathlib import Path

from protocol.errors import ConfigError, StorageError
from protocol.signing import PUBLIC_KEY_BYTES, SEED_BYTES, SigningKey

_PREFIX = bytes.fromhex("08011240")
FILE_BYTES = len(_PREFIX) + SEED_BYTES + PUBLIC_KEY_BYTES
_OPEN_TO_OTHERS = stat.S_IRWXG | stat.S_IRWXO


def load_or_create(path: Path) -> SigningKey:
    """Return the key in `path`, making a new one there if nothing is."""
    try:
        return load(path)
    except FileNotFoundError:
        return create(path)


def create(path: Path, key: SigningKey | None = None) -> SigningKey:
    """Write `key` (a new one by default) to `path` and return the key that is there afterwards.

    Never overwrites: of two processes that create at the same time one wins and both return the winner's key.
    """
    key = key or SigningKey.generate()
    try:
        _write_new(path, _PREFIX + key.secret_seed() + key.public_bytes)
    except FileExistsError:
        return load(path)
    except OSError as error:
        raise StorageError(f"cannot write the identity file {path}: {error.strerror}.") from error
    return key


def replace(path: Path, key: SigningKey, *, aside: Path) -> None:
    """Put `key` in the place of the one in `path`, which is kept `aside`. At every moment there is one in `path`."""
    following = path.with_name(f".{path.name}.next")
    try:
        following.unlink(missing_ok=True)  # of an attempt that was cut short
        _write_new(following, _PREFIX + key.secret_seed() + key.public_bytes)
        if not aside.exists():
            os.link(path, aside)
        os.replace(following, path)
        _sync_directory(path.parent)
    except OSError as error:
        raise StorageError(f"cannot write the identity file {path}: {error.strerror}.") from error


def load(path: Path) -> SigningKey:
    """Read the key in `path`; `FileNotFoundError` if nothing is there.

    Raises `StorageError` for a file that is open to others, `ConfigError` for one that is not a key.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # a FIFO must not block us
    except FileNotFoundError:
        raise
    except OSError as error:
        raise StorageError(f"cannot read the identity file {path}: {error.strerror}.") from error
    try:
        _check_safe(os.fstat(descriptor), path)  # of what was opened, not of what the name points to by now
        return _parse(os.read(descriptor, FILE_BYTES + 1), path)
    finally:
        os.close(descriptor)


def _check_safe(status: os.stat_result, path: Path) -> None:
    if not stat.S_ISREG(status.st_mode):
        raise ConfigError(f"the identity {path} is not a file.")
    if status.st_mode & _OPEN_TO_OTHERS:
        raise StorageError(
            f"the identity file {path} is open to others (mode {stat.S_IMODE(status.st_mode):04o}).",
            hint=f"Run: chmod 600 {path}",
        )


def _parse(data: bytes, path: Path) -> SigningKey:
    if len(data) != FILE_BYTES or not data.startswith(_PREFIX):
        raise ConfigError(
            f"{path} is not an Ed25519 identity file of {FILE_BYTES} bytes.",
            hint="Restore it from a backup, or move it away to get a new identity.",
        )
    key = SigningKey(data[len(_PREFIX) : len(_PREFIX) + SEED_BYTES])
    if key.public_bytes != data[-PUBLIC_KEY_BYTES:]:
        raise ConfigError(f"the identity file {path} is damaged.", hint="Restore it from a backup.")
    return key


def _write_new(path: Path, data: bytes) -> None:
    """Make `path` appear at once with all its bytes and mode 0600, or raise `FileExistsError`."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.link(temporary, path)  # unlike a rename, a link fails when the name is taken
    finally:
        os.unlink(temporary)
    _sync_directory(path.parent)


def _sync_directory(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
