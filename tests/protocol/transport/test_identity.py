"""The identity file (`protocol/transport/identity.py`)."""

from __future__ import annotations

import os
import stat
import threading
from pathlib import Path

import pytest

from protocol.errors import ConfigError, StorageError
from protocol.signing import SigningKey
from protocol.transport import identity

KEY = SigningKey(bytes(range(32)))


def test_a_created_key_is_loaded_again(tmp_path: Path) -> None:
    """Oracle: the second call finds what the first one wrote."""
    path = tmp_path / "identity.key"
    first = identity.load_or_create(path)
    assert identity.load_or_create(path).peer_id == first.peer_id
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert os.listdir(tmp_path) == ["identity.key"]


def test_the_file_is_what_libp2p_reads(tmp_path: Path) -> None:
    """Oracle: libp2p's private key protobuf, {1: Ed25519 (1), 2: seed and public key}."""
    identity.create(tmp_path / "key", KEY)
    assert (tmp_path / "key").read_bytes() == bytes.fromhex("08011240") + bytes(range(32)) + KEY.public_bytes


@pytest.mark.parametrize("umask", [0o000, 0o022, 0o077])
def test_the_key_is_never_readable_by_others_not_even_before_it_has_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, umask: int
) -> None:
    """Oracle: every file in the directory has mode 0600 at each of the steps in which the key reaches the disk."""
    seen: list[int] = []

    def look() -> None:
        seen.extend(stat.S_IMODE(entry.stat().st_mode) for entry in os.scandir(tmp_path))

    def watched(name: str) -> None:
        real = getattr(os, name)

        def spy(*args: object, **kwargs: object) -> object:
            look()
            result = real(*args, **kwargs)
            look()
            return result

        monkeypatch.setattr(os, name, spy)

    for name in ("open", "fdopen", "fsync", "link", "unlink"):
        watched(name)
    before = os.umask(umask)
    try:
        identity.create(tmp_path / "key", KEY)
    finally:
        os.umask(before)
    assert seen
    assert set(seen) == {0o600}


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o644, 0o660, 0o602, 0o610])
def test_a_key_that_others_can_touch_is_refused_in_one_line(tmp_path: Path, mode: int) -> None:
    """Oracle: E-DISK, exit 5, and the command that repairs it."""
    path = tmp_path / "key"
    identity.create(path, KEY)
    path.chmod(mode)
    with pytest.raises(StorageError) as caught:
        identity.load_or_create(path)
    assert f"chmod 600 {path}" in caught.value.one_line()
    assert caught.value.exit_code == 5


def _valid() -> bytes:
    return bytes.fromhex("08011240") + KEY.secret_seed() + KEY.public_bytes


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"hello",
        _valid()[:-1],
        _valid() + b"\n",
        bytes.fromhex("08001240") + _valid()[4:],  # says it is an RSA key
        _valid()[:36] + bytes(32),  # the public half of another key
        bytes(10_000_000),
    ],
)
def test_what_is_not_a_key_is_refused_and_left_alone(tmp_path: Path, content: bytes) -> None:
    """Oracle: E-CFG, exit 3; the file is still there afterwards, byte for byte."""
    path = tmp_path / "key"
    path.write_bytes(content)
    path.chmod(0o600)
    with pytest.raises(ConfigError) as caught:
        identity.load_or_create(path)
    assert caught.value.exit_code == 3
    assert path.read_bytes() == content


def test_a_directory_a_fifo_and_a_missing_parent_are_clear_errors(tmp_path: Path) -> None:
    """Oracle: none of them blocks or creates anything."""
    os.mkfifo(tmp_path / "fifo", 0o600)
    for name in (".", "fifo"):
        with pytest.raises((ConfigError, StorageError)):
            identity.load_or_create(tmp_path / name)
    with pytest.raises(StorageError, match="No such file"):
        identity.load_or_create(tmp_path / "missing" / "key")


def test_an_existing_key_is_never_overwritten(tmp_path: Path) -> None:
    """Oracle: create() on a taken name returns the key that is there."""
    path = tmp_path / "key"
    identity.create(path, KEY)
    assert identity.create(path, SigningKey.generate()).peer_id == KEY.peer_id


def test_of_many_creators_one_wins_and_all_agree(tmp_path: Path) -> None:
    """Oracle: eight threads that start together end with one and the same key."""
    path = tmp_path / "key"
    gate = threading.Barrier(8)
    found: list[str] = []

    def run() -> None:
        gate.wait()
        found.append(identity.load_or_create(path).peer_id)

    threads = [threading.Thread(target=run) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert len(found) == 8
    assert len(set(found)) == 1
    assert os.listdir(tmp_path) == ["key"]
