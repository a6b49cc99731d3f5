"""Snapshots and updates on disk: whole or not there, pruned, and never a way into a history that was given up.

Oracles: the tensors and bytes that were saved; damage done to the files by hand.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from peer.averaging.history import PARTS, SNAPSHOTS_KEPT, History, kept_snapshots
from protocol.control import Snapshot
from protocol.errors import StorageError
from protocol.ids import Lineage, RoundId, StageId, Version
from protocol.signing import Signed, SigningKey

STAGE = StageId(3)
LINEAGE = Lineage(bytes(range(32)))
COMMIT = Signed(payload=b"a commit", signer=SigningKey.generate().peer_id, signature=bytes(64))


@pytest.fixture
def history(tmp_path: Path) -> History:
    return History(tmp_path / "stage-3", stage=STAGE)


def save(history: History, version: int) -> Snapshot:
    tensors = {part: {f"{part}.a": torch.full((2, 3), float(version))} for part in PARTS}
    return history.save_snapshot(tensors, round_id=RoundId(version), version=Version(version), lineage=LINEAGE)


def versions(history: History) -> list[int]:
    return [snapshot.version for snapshot in history.snapshots()]


def test_a_snapshot_comes_back_as_it_was(history: History) -> None:
    saved = save(history, 7)
    assert history.snapshots() == (saved,)
    loaded = history.load_snapshot(saved)
    assert set(loaded) == set(PARTS)
    for part in PARTS:
        assert torch.equal(loaded[part][f"{part}.a"], torch.full((2, 3), 7.0))
        path = history.resolve("state", Version(7), part)
        assert path is not None
        assert path.stat().st_size == next(file.num_bytes for file in saved.files if file.part == part)


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
        history.load_snapshot(saved)
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
