"""A watcher of the organiser's looks at stages that too few others have.

Real processes, SQLite and hivemind. Oracles: exit codes, the audits that were kept, the book of credits.
"""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from coordinator.store import credits
from tests.e2e.processes import run_to_end
from tests.e2e.swarm import Swarm

pytestmark = [pytest.mark.timeout(400), pytest.mark.long]

SETTINGS = ("batch.microbatches_per_round=12", "batch.heldout_sequences=32", "batch.eval_every=1000")
DILOCO = ("averaging.mode=diloco", "averaging.microbatches_per_step=2")


@pytest.mark.parametrize("mode", [(), DILOCO], ids=["gradient", "diloco"])
def test_stages_of_one_replica_are_looked_at_and_earn(tmp_path: Path, corpus: Path, mode: tuple[str, ...]) -> None:
    with Swarm(tmp_path, corpus=corpus, rounds=10_000, stages=2, settings=(*SETTINGS, *mode)) as swarm:
        key = swarm.watcher_key("owl")
        swarm.start_coordinator("--start-peers", "2", "--watcher", key)
        watcher = swarm.start_watcher("owl")
        for stage, name in enumerate(("ash", "elm")):
            swarm.start_peer(name, "--stage", str(stage))

        def are_found_right() -> bool:
            findings = swarm.findings()
            return all(findings.get(name, {}).get("valid", 0) >= 20 for name in ("ash", "elm"))

        swarm.wait("twenty audits of each", are_found_right, timeout_s=200.0)
        findings, balances = swarm.findings(), swarm.balances()
        for name in ("ash", "elm"):
            assert set(findings[name]) <= {"valid", "nothing"}, findings
            assert balances[name].held_tokens > 0
        assert "owl" not in balances
        hosts = {peer["name"]: peer["stages"] for peer in swarm.status()["peers"]}
        assert hosts["owl"] == []
        watcher.send(signal.SIGINT)
        assert watcher.wait_end(timeout_s=30.0) == 0, watcher.story()


def test_who_cheats_alone_at_its_stage_is_put_out_by_the_watcher(tmp_path: Path, corpus: Path) -> None:
    with Swarm(tmp_path, corpus=corpus, rounds=10_000, stages=2, settings=SETTINGS) as swarm:
        key = swarm.watcher_key("owl")
        swarm.start_coordinator("--start-peers", "2", "--watcher", key)
        swarm.start_watcher("owl")
        swarm.start_peer("ash", "--stage", "0")
        cheat = swarm.start_peer("fir", "--stage", "1", oddity="flips:0.5")
        cheat.is_expected_to_end = True
        assert cheat.wait_end(timeout_s=240.0) == 4, cheat.story()
        assert "two others recomputed its work" in cheat.story()
        findings, balances = swarm.findings(), swarm.balances()
        assert findings["fir"]["confirmed"] >= 1
        assert set(findings["ash"]) <= {"valid", "nothing"}, findings
        assert balances.get("fir", credits.Balance()).held_tokens == 0


def test_when_the_run_goes_back_the_watcher_does_so_too_and_nobody_is_struck(tmp_path: Path, corpus: Path) -> None:
    """The same rounds and versions come again, with other weights. Oracle: audits after that, and what they found."""
    settings = (*SETTINGS, "keeping.checkpoint_every=4", "keeping.checkpoints_kept=50")
    with Swarm(tmp_path, corpus=corpus, rounds=10_000, stages=2, settings=settings) as swarm:
        key = swarm.watcher_key("owl")
        swarm.start_coordinator("--start-peers", "2", "--watcher", key)
        swarm.start_watcher("owl")
        for stage, name in enumerate(("ash", "elm")):
            swarm.start_peer(name, "--stage", str(stage))

        def valid() -> int:
            return min(swarm.findings().get(name, {}).get("valid", 0) for name in ("ash", "elm"))

        swarm.wait("audits of both", lambda: valid() >= 3, timeout_s=150.0)
        oldest = min(int(each.name.split("-")[1]) for each in (swarm.directory / "checkpoints").glob("round-*"))
        flags = ["rollback", str(swarm.directory), "--to", str(oldest)]
        run_to_end("coordinator", flags, name="rollback", folder=swarm.folder, timeout_s=30.0)
        swarm.wait("the run to go back", lambda: swarm.peers["elm"].events("stage.goes_back"), timeout_s=60.0)
        before = valid()
        swarm.wait("audits of what came after", lambda: valid() >= before + 5, timeout_s=240.0)
        for name, found in swarm.findings().items():
            assert set(found) <= {"valid", "nothing"}, (name, found)


def test_a_key_that_the_organiser_has_not_named_may_not_watch(tmp_path: Path, corpus: Path) -> None:
    with Swarm(tmp_path, corpus=corpus, rounds=10_000, stages=2, settings=SETTINGS) as swarm:
        swarm.start_coordinator()
        watcher = swarm.start_watcher("owl")
        watcher.is_expected_to_end = True
        assert watcher.wait_end(timeout_s=60.0) == 4, watcher.story()
        assert "is no watcher of this run" in watcher.story()
