"""Snapshots and updates on disk: whole or not there, pruned, and never a way into a history that was given up.

Oracles: the bytes that were saved; damage done to the files by hand.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from peer.averaging.history import SNAPSHOTS_KEPT, UPDATES_KEPT_S, HashingFile, History, kept_snapshots
from protocol.control import STATE_PARTS, Snapshot
from protocol.errors import StorageError
from protocol.ids import Lineage, RoundId, StageId, Version, digest
from protocol.signing import Signed, SigningKey

STAGE = StageId(3)
LINEAGE = Lineage(bytes(range(32)))
COMMIT = Signed(payload=b"a commit", signer=SigningKey.generate().peer_id, signature=bytes(64))


@pytest.fixture
def history(tmp_path: Path) -> History:
    return History(tmp_path / "stage-3", stage=STAGE, updates_kept_s=0.0)


def contents(part: str, version: int) -> bytes:
    return f"{part} of version {version} ".encode() * (version + 1)


@pytest.mark.parametrize("damage", [None, "flipped", "short", "empty", "gone"])
def test_an_update_is_handed_out_if_it_is_what_was_kept(history: History, damage: str | None) -> None:
    """Oracle: the bytes, which nobody can write to; None."""
    update = bytes(range(256)) * 100
    history.append(Version(4), update, COMMIT)
    path = history.folder / "u00000004.bin"
    damaged = {"flipped": update[:-1] + b"x", "short": update[:-1], "empty": b""}
    if damage == "gone":
        path.unlink()
    elif damage is not None:
        path.write_bytes(damaged[damage])
    found = history.update_of(Version(4), digest(update))
    assert found == (update if damage is None else None)
    assert found is None or found.readonly


def save(history: History, version: int) -> Snapshot:
    def write(files: Mapping[str, HashingFile]) -> None:
        for part, file in files.items():
            data = contents(part, version)
            for start in range(0, len(data), 7):  # in pieces, of either kind
                file.write(data[start : start + 7] if start % 2 else memoryview(data)[start : start + 7])

    return history.save_snapshot(write, round_id=RoundId(version), version=Version(version), lineage=LINEAGE)


def versions(history: History) -> list[int]:
    return [snapshot.version for snapshot in history.snapshots()]


def test_a_snapshot_comes_back_as_it_was(history: History) -> None:
    saved = save(history, 7)
    assert history.snapshots() == (saved,)
    history.check_snapshot(saved)
    with history.open_snapshot(saved) as files:
        loaded = {part: file.read() for part, file in files.items()}
    assert all(file.closed for file in files.values())
    assert set(loaded) == set(STATE_PARTS)
    for part in STATE_PARTS:
        assert loaded[part] == contents(part, 7)
        path = history.resolve("state", Version(7), part)
        assert path is not None
        said = next(file for file in saved.files if file.part == part)
        assert path.stat().st_size == said.num_bytes == len(loaded[part])
        assert said.digest == digest(loaded[part])


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), ValueError("a bug"), KeyboardInterrupt()])
def test_a_snapshot_that_was_not_written_to_its_end_leaves_nothing(
    tmp_path: Path, history: History, error: BaseException
) -> None:
    """Oracle: the files from before, and an error that says what is wrong (a full disk is no bug)."""
    saved = save(history, 1)
    before = sorted((tmp_path / "stage-3").iterdir())

    def write(files: Mapping[str, HashingFile]) -> None:
        files[STATE_PARTS[0]].write(b"the first half")
        raise error

    with pytest.raises(StorageError if isinstance(error, OSError) else type(error)):
        history.save_snapshot(write, round_id=RoundId(2), version=Version(2), lineage=LINEAGE)
    assert sorted((tmp_path / "stage-3").iterdir()) == before
    assert history.snapshots() == (saved,)


@pytest.mark.parametrize("part", STATE_PARTS)
def test_a_snapshot_that_is_gone_cannot_be_opened(history: History, part: str) -> None:
    saved = save(history, 1)
    history.incoming_path(Version(1), part).unlink()
    with pytest.raises(StorageError, match="No such file"):
        history.check_snapshot(saved)
    with pytest.raises(StorageError, match="No such file"), history.open_snapshot(saved):
        pass


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


@pytest.mark.parametrize("damage", [Path.unlink, _cut], ids=["missing", "cut short"])
@pytest.mark.parametrize("suffix", ["json", "safetensors"])
def test_what_is_not_whole_is_not_offered(
    tmp_path: Path, history: History, suffix: str, damage: Callable[[Path], None]
) -> None:
    """A torn snapshot must not be told to the coordinator, which might found the stage again on it."""
    save(history, 1)
    save(history, 2)
    damage(next((tmp_path / "stage-3").glob(f"v00000002*.{suffix}")))
    assert versions(history) == [1]
    assert [snapshot.version for snapshot in kept_snapshots(tmp_path)] == [1]


def test_a_flipped_bit_is_found_when_it_is_loaded_and_can_be_forgotten(tmp_path: Path, history: History) -> None:
    saved = save(history, 1)
    path = next((tmp_path / "stage-3").glob("*.safetensors"))
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(StorageError, match="damaged"):
        history.check_snapshot(saved)
    history.discard_snapshot(Version(1))
    assert versions(history) == []
    assert versions_after(history, 1) == [1]


def versions_after(history: History, version: int) -> list[int]:
    save(history, version)
    return versions(history)


def test_old_snapshots_and_what_only_they_need_are_dropped(tmp_path: Path, history: History) -> None:
    for version in range(6):
        save(history, version)
        history.append(Version(version), b"update", COMMIT)
    kept = list(range(6))[-SNAPSHOTS_KEPT:]
    assert versions(history) == kept[::-1]
    assert history.resolve("update", Version(kept[0]), "") is not None
    assert history.resolve("update", Version(kept[0] - 1), "") is None
    assert history.commit_of(Version(kept[0] - 1)) == COMMIT  # says who the members of the oldest one were
    assert history.commit_of(Version(kept[0] - 2)) is None


def test_what_was_kept_lately_stays_though_no_snapshot_needs_it(tmp_path: Path) -> None:
    """Else nobody could follow short rounds who looks twice a second."""
    history = History(tmp_path / "stage-3", stage=STAGE)
    for version in range(6):
        save(history, version)
        history.append(Version(version), b"update", COMMIT)
    for name in ("u00000000.bin", "u00000000.commit"):
        os.utime(history.folder / name, (0, time.time() - UPDATES_KEPT_S))
    save(history, 6)
    assert len(versions(history)) == SNAPSHOTS_KEPT
    assert history.resolve("update", Version(1), "") is not None
    assert history.commit_of(Version(1)) == COMMIT
    assert history.resolve("update", Version(0), "") is None
    assert history.commit_of(Version(0)) is None


def test_adopting_an_older_state_forgets_the_future_that_was_given_up(history: History) -> None:
    older = save(history, 4)
    for version in (4, 5):
        history.append(Version(version), b"update", COMMIT)
    save(history, 6)
    history.adopt_snapshot(older)
    assert versions(history) == [4]
    assert history.resolve("update", Version(4), "") is None
    assert history.commit_of(Version(5)) is None


@pytest.mark.parametrize(
    ("kind", "version", "part"), [("state", 9, "weights"), ("state", 1, "../x"), ("update", 9, ""), ("key", 1, "")]
)
def test_names_that_lead_nowhere(history: History, kind: str, version: int, part: str) -> None:
    save(history, 1)
    assert history.resolve(kind, Version(version), part) is None
