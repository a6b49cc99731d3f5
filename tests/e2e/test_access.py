"""Invites and identities with real processes: who comes in, who does not, and what they are told.

Oracles: exit codes and the one line on stderr, the coordinator's own lists and journal.
"""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path
from typing import Any

import pytest

from coordinator.store import history
from peer.settings import IDENTITY_FILE
from tests.e2e.processes import Command, run_to_end
from tests.e2e.swarm import Swarm

pytestmark = pytest.mark.timeout(300)

SETTINGS = ("batch.microbatches_per_round=8", "batch.heldout_sequences=32", "batch.eval_every=1000")
REFUSAL_TIMEOUT_S = 60.0


def ask(swarm: Swarm, command: str, *arguments: str) -> Any:
    """Run one of the coordinator's commands, and return what it says as JSON."""
    flags = [command, str(swarm.directory), *arguments, "--json"]
    return json.loads(run_to_end("coordinator", flags, name=command, folder=swarm.folder, timeout_s=30.0))["data"]


def assert_refused(peer: Command, text: str) -> None:
    """Wait until a peer has ended with one line that says why; the rest is its live line."""
    peer.is_expected_to_end = True
    assert peer.wait_end(timeout_s=REFUSAL_TIMEOUT_S) == 4, peer.story()
    (line,) = [line for line in peer.err.read_text().splitlines() if line.startswith("peer join: ")][-1:]
    assert line.startswith("peer join: E-REF "), line
    assert text in line


def kinds(swarm: Swarm) -> list[str]:
    with swarm.database() as db:
        return [event.kind for event in history.last_events(db, limit=200)]


def test_a_single_use_invite_lets_one_peer_in_until_it_is_revoked(tmp_path: Path, corpus: Path) -> None:
    with Swarm(tmp_path, corpus=corpus, rounds=10_000, stages=1, settings=SETTINGS) as swarm:
        swarm.start_coordinator("--access", "invite")
        assert_refused(swarm.start_peer("stranger"), "by invitation")
        made = ask(swarm, "invite", "--uses", "1", "--expires", "1h", "--note", "for oak")
        swarm.invite = made["invite"]
        oak = swarm.start_peer("oak")
        swarm.wait_version(1)
        assert_refused(swarm.start_peer("elm"), "used up")
        oak.kill()  # it comes back by the same use, also to a coordinator that was restarted
        assert swarm.coordinator is not None
        swarm.coordinator.kill()
        invite = swarm.invite
        swarm.start_coordinator(again=True)
        swarm.invite = invite
        oak = swarm.start_peer("oak")
        version = swarm.version()
        swarm.wait_version(version + 1)
        (row,) = ask(swarm, "invites")["invites"]
        assert ([peer["name"] for peer in row["peers"]], row["uses_left"]) == (["oak"], 0)
        ask(swarm, "uninvite", made["id"])
        assert_refused(oak, f"invite {made['id']} was revoked")
        assert_refused(swarm.start_peer("oak"), "was revoked")


@pytest.mark.long
def test_a_cloned_key_is_frozen_until_it_is_rotated(tmp_path: Path, corpus: Path) -> None:
    """Oracle also: a peer beside them trains on, and one that is only restarted stays in."""
    with Swarm(tmp_path, corpus=corpus, rounds=10_000, stages=1, settings=SETTINGS) as swarm:
        swarm.start_coordinator()
        swarm.start_peers(["oak", "elm"])
        swarm.wait_version(2)
        swarm.peers["elm"].kill()
        swarm.start_peer("elm")
        (tmp_path / "copy.data").mkdir()
        shutil.copy2(tmp_path / "oak.data" / IDENTITY_FILE, tmp_path / "copy.data" / IDENTITY_FILE)
        started_s = time.monotonic()
        clones = [swarm.peers["oak"], swarm.start_peer("copy")]
        for clone in clones:
            clone.is_expected_to_end = True
        swarm.wait("the freeze", lambda: "peer.frozen" in kinds(swarm), timeout_s=120.0)
        assert time.monotonic() - started_s < 120.0
        for clone in clones:
            assert_refused(clone, "frozen: two processes use this peer's key")
            assert "peer identity rotate" in clone.err.read_text()
        assert_refused(swarm.start_peer("oak"), "frozen")
        version = swarm.version()
        swarm.wait_version(version + 3, timeout_s=90.0)
        flags = ["identity", "rotate", "--data-dir", str(tmp_path / "oak.data"), "--json"]
        rotated = json.loads(run_to_end("peer", flags, name="rotate", folder=tmp_path, timeout_s=30.0))["data"]
        oak = swarm.start_peer("oak")
        before = len(oak.events("round.committed"))
        swarm.wait("oak to train again", lambda: len(oak.events("round.committed")) > before, timeout_s=90.0)
        assert_refused(swarm.start_peer("copy"), f"replaced by {rotated['peer']}")
        assert swarm.peers["elm"].code is None
        assert kinds(swarm).count("peer.frozen") == 1
