"""protocol/paths.py: which entries make a path. Oracle: an honest path, and one thing that is wrong with it."""

from __future__ import annotations

from typing import Any

import pytest

from protocol.batches import TaskKind
from protocol.errors import PeerFault
from protocol.ids import PeerId, RoundId, RunId, digest
from protocol.paths import read_path
from protocol.signing import Signed, SigningKey
from tests.protocol.paths import KEYS, sign_path

STRANGER = SigningKey(bytes([9]) * 32)


def test_an_honest_path_is_read_from_front_to_back() -> None:
    entries = read_path(sign_path())
    assert [entry.peer for entry in entries] == [key.peer_id for key in KEYS]
    assert [entry.stages for entry in entries] == [(0,), (1, 2), (3,)]


def test_a_part_of_a_path_is_a_path_for_who_brought_its_input() -> None:
    """So every peer on the way checks all that is behind it."""
    behind = sign_path()[1:]
    assert len(read_path(behind, caller=KEYS[0].peer_id)) == 2
    with pytest.raises(PeerFault, match="called by another"):
        read_path(behind, caller=STRANGER.peer_id)
    with pytest.raises(PeerFault, match="called by another"):
        read_path(behind)


@pytest.mark.parametrize("at", [0, 1, 2])
@pytest.mark.parametrize(
    "change",
    [
        {"peer": STRANGER.peer_id},
        {"caller": STRANGER.peer_id},
        {"behind": digest(b"another path")},
    ],
    ids=lambda change: str(next(iter(change))),
)
def test_an_entry_names_its_signer_its_caller_and_what_is_behind_it(at: int, change: dict[str, Any]) -> None:
    """The one in front takes another entry's word in vain, or the other way round."""
    changes: list[dict[str, Any]] = [{}, {}, {}]
    changes[at] = change
    with pytest.raises(PeerFault):
        read_path(sign_path(changes))


@pytest.mark.parametrize("at", [0, 1, 2])
@pytest.mark.parametrize(
    "change",
    [
        {"run": RunId("cd" * 16)},
        {"kind": TaskKind.EVAL},
        {"round": RoundId(5)},
        {"number": 3},
        {"loss_sum": 2.5},
        {"target_tokens": 65},
    ],
    ids=lambda change: str(next(iter(change))),
)
def test_a_path_is_about_one_microbatch_and_one_loss(at: int, change: dict[str, Any]) -> None:
    changes: list[dict[str, Any]] = [{}, {}, {}]
    changes[at] = change
    with pytest.raises(PeerFault, match="two tasks"):
        read_path(sign_path(changes))


@pytest.mark.parametrize(
    "spans", [((0,), (2,), (3,)), ((0,), (0, 1), (2,)), ((0,), (1, 3), (4,)), ((0,), (1, 2), (2, 3))], ids=str
)
def test_stages_follow_one_another(spans: tuple[tuple[int, ...], ...]) -> None:
    with pytest.raises(PeerFault, match="leaves out stage"):
        read_path(sign_path(spans=spans))


def test_entries_of_two_paths_are_none() -> None:
    """The last stage's word on the same microbatch, that it has given to somebody else. Oracle: `caller`."""
    stolen = sign_path(keys=(STRANGER, *KEYS[1:]))[1:]
    with pytest.raises(PeerFault):
        read_path((sign_path()[0], *stolen))


def test_what_is_not_signed_is_no_path() -> None:
    first, *rest = sign_path()
    forged = Signed(payload=first.payload, signer=first.signer, signature=bytes(64))
    for path in ((), (forged, *rest), sign_path()[:2][1:]):
        with pytest.raises(PeerFault):
            read_path(tuple(path), caller=PeerId("nobody"))
