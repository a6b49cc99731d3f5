"""Rotating the key of a data folder (`peer/identity.py`). Oracles: the files, the chain opened by hand, exit codes."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from peer.cli import peer
from peer.identity import HANDOVERS_FILE, load_handovers, rotate
from peer.settings import IDENTITY_FILE, LOCK
from protocol.errors import ConfigError, StorageError
from protocol.handover import MAX_HANDOVERS, check_handovers
from protocol.ids import PeerId
from protocol.process import folder_lock
from protocol.signing import SigningKey
from protocol.transport import identity


def call(*arguments: str | Path) -> Result:
    return CliRunner().invoke(peer, ["identity", *(str(word) for word in arguments)])


def create(folder: Path) -> SigningKey:
    folder.mkdir(exist_ok=True)
    return identity.create(folder / IDENTITY_FILE)


def current(folder: Path) -> PeerId:
    return identity.load(folder / IDENTITY_FILE).peer_id


def test_a_rotation_makes_a_key_keeps_the_old_one_and_hands_over(tmp_path: Path) -> None:
    old = create(tmp_path)
    done = rotate(tmp_path)
    assert (done.before, done.now) == (old.peer_id, current(tmp_path))
    assert done.now != done.before
    assert identity.load(done.kept).peer_id == old.peer_id
    assert {stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / IDENTITY_FILE, done.kept)} == {0o600}
    assert check_handovers(load_handovers(tmp_path, done.now), last=done.now) == (old.peer_id,)
    assert sorted(os.listdir(tmp_path)) == sorted([IDENTITY_FILE, done.kept.name, HANDOVERS_FILE, LOCK])


def test_rotations_make_a_chain_of_which_the_newest_are_shown(tmp_path: Path) -> None:
    keys = [create(tmp_path).peer_id]
    for _ in range(MAX_HANDOVERS + 2):
        keys.append(rotate(tmp_path).now)
    shown = check_handovers(load_handovers(tmp_path, keys[-1]), last=keys[-1])
    assert shown == tuple(keys[-1 - MAX_HANDOVERS : -1])
    assert load_handovers(tmp_path, SigningKey.generate().peer_id) == (), "of another identity, nothing"


@pytest.mark.parametrize("step", range(8))
def test_a_rotation_that_is_cut_short_leaves_one_identity_and_can_be_done_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    """Oracle: whatever key is there, the chain leads to it from the first one, unless it is that."""
    old = create(tmp_path).peer_id
    taken = 0

    class Cut(BaseException):
        pass

    def cut_at(name: str) -> None:
        real = getattr(os, name)

        def cutting(*args: object, **kwargs: object) -> object:
            nonlocal taken
            taken += 1
            if taken > step:
                raise Cut
            return real(*args, **kwargs)

        monkeypatch.setattr(os, name, cutting)

    with monkeypatch.context():
        for name in ("fsync", "link", "replace"):
            cut_at(name)
        try:
            rotate(tmp_path)
        except Cut:
            assert taken > step
    monkeypatch.undo()
    for _ in range(2):
        now = current(tmp_path)
        assert check_handovers(load_handovers(tmp_path, now), last=now)[:1] == (() if now == old else (old,))
        rotate(tmp_path)


def test_a_peer_that_runs_is_not_rotated(tmp_path: Path) -> None:
    before = create(tmp_path).peer_id
    with folder_lock(tmp_path / LOCK, owner="peer", otherwise=""), pytest.raises(StorageError, match="another peer"):
        rotate(tmp_path)
    assert current(tmp_path) == before


def test_statements_that_cannot_be_read_are_one_error_and_nothing_is_rotated(tmp_path: Path) -> None:
    before = create(tmp_path).peer_id
    for text in ("zz\n", "00\n", "\xff"):
        (tmp_path / HANDOVERS_FILE).write_text(text, "latin-1")
        with pytest.raises(ConfigError, match="damaged"):
            load_handovers(tmp_path, before)
        with pytest.raises(ConfigError, match="damaged"):
            rotate(tmp_path)
        assert current(tmp_path) == before


# -- commands -------------------------------------------------------------------------------------------


def test_commands_show_and_rotate(tmp_path: Path) -> None:
    old = create(tmp_path).peer_id
    assert call("show", "--data-dir", tmp_path).stdout == f"{old}\n"
    said = json.loads(call("rotate", "--data-dir", tmp_path, "--json").stdout)
    assert (said["schema"], said["data"]["before"]) == ("peer.rotate/1", old)
    shown = json.loads(call("show", "--data-dir", tmp_path, "--json").stdout)
    assert (shown["schema"], shown["data"]["peer"], shown["data"]["before"]) == (
        "peer.identity/1",
        said["data"]["peer"],
        [old],
    )


def test_a_key_is_made_once(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "one"
    made = call("create", "--data-dir", folder).stdout
    assert made == call("create", "--data-dir", folder).stdout == call("show", "--data-dir", folder).stdout
    assert json.loads(call("create", "--data-dir", folder, "--json").stdout)["data"]["peer"] == made.strip()
    assert (folder / IDENTITY_FILE).stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("command", ["show", "rotate"])
def test_what_cannot_be_is_one_line(tmp_path: Path, command: str) -> None:
    result = call(command, "--data-dir", tmp_path / "nothing")
    assert (result.exit_code, len(result.stderr.strip().splitlines())) == (3, 1), result.output
    create(tmp_path)
    (tmp_path / IDENTITY_FILE).chmod(0o640)
    result = call(command, "--data-dir", tmp_path)
    assert (result.exit_code, len(result.stderr.strip().splitlines())) == (5, 1), result.output
    assert "chmod 600" in result.stderr
