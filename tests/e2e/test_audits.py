"""A peer that cheats is found out by two others that recompute its work, and put out; nobody honest is.

Real processes, SQLite and hivemind. Oracles: exit codes, the audits that were kept, the book of credits.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from coordinator.audit.office import OFF, SPOILT
from coordinator.store import credits
from tests.e2e.swarm import Swarm

pytestmark = [pytest.mark.timeout(400), pytest.mark.long]

SETTINGS = ("batch.microbatches_per_round=24", "batch.heldout_sequences=32", "batch.eval_every=1000")
DILOCO = ("averaging.mode=diloco",)


RECOMPUTED = "two others recomputed its work and found it wrong"


@pytest.mark.parametrize("mode", [(), DILOCO], ids=["gradient", "diloco"])
def test_who_averages_while_it_computes_is_found_right(tmp_path: Path, corpus: Path, mode: tuple[str, ...]) -> None:
    """When a step is taken the next contribution is there already, and with local steps nobody has its weights.

    Oracle: audits of all, and that all sums add up.
    """
    names = ("ash", "elm", "oak", "fir", "yew", "box")
    settings = (*SETTINGS, "averaging.overlap=true", *mode)
    with Swarm(tmp_path, corpus=corpus, rounds=10_000, stages=2, settings=settings) as swarm:
        swarm.start_coordinator("--start-peers", "6")
        for number, name in enumerate(names):
            swarm.start_peer(name, "--stage", str(number % 2))
        swarm.wait(
            "twenty audits of each",
            lambda: all(swarm.findings().get(name, {}).get("valid", 0) >= 20 for name in names),
            timeout_s=240.0,
        )
        # far off with local steps may be by chance once, which has no consequence
        usual = {"valid", "nothing"} | ({"differs", "confirmed", "cleared"} if mode else set())
        assert all(set(found) <= usual for found in swarm.findings().values()), swarm.findings()
        assert swarm.coordinator is not None
        assert swarm.coordinator.events("audit.sum") == []
        assert {peer["state"] for peer in swarm.status()["peers"]}.isdisjoint({"quarantined", "banned"})


@pytest.mark.parametrize(
    ("oddity", "why", "mode"),
    [
        ("flips:1.0", (RECOMPUTED,), ()),
        ("spoils:1.0", (RECOMPUTED,), ()),
        ("hides:1.0", (SPOILT,), ()),
        ("twists:1.0", (SPOILT,), ()),
        # mostly by about, unless it happens to stand where all stand
        ("wakes:3", (OFF, RECOMPUTED), (*DILOCO, "averaging.overlap=true")),
    ],
)
def test_who_cheats_is_put_out_and_nobody_else(
    tmp_path: Path, corpus: Path, oddity: str, why: tuple[str, ...], mode: tuple[str, ...]
) -> None:
    """With activations and gradients that it sends on, with what it adds to averages, or makes of them."""
    with Swarm(tmp_path, corpus=corpus, rounds=10_000, stages=2, settings=(*SETTINGS, *mode)) as swarm:
        swarm.start_coordinator("--start-peers", "4")
        swarm.start_peer("ash", "--stage", "0")
        for name in ("elm", "oak"):
            swarm.start_peer(name, "--stage", "1")
        cheat = swarm.start_peer("fir", "--stage", "1", oddity=oddity)
        cheat.is_expected_to_end = True
        assert cheat.wait_end(timeout_s=240.0) == 4, cheat.story()
        assert any(each in cheat.story() for each in why)
        version = swarm.version(0)
        swarm.wait_version(version + 5, timeout_s=60.0)
        findings, balances = swarm.findings(), swarm.balances()
        assert (findings["fir"].get("confirmed", 0) >= 1) is (SPOILT not in why)
        usual = {"valid", "nothing", "cleared"} | ({"differs", "confirmed"} if mode else set())
        for name in ("ash", "elm", "oak"):
            assert set(findings.get(name, {})) <= usual, findings
        assert balances.get("fir", credits.Balance()).held_tokens == 0
        assert balances["elm"].held_tokens > 0
        assert balances["oak"].held_tokens > 0
        assert swarm.status()["round"] > 0
