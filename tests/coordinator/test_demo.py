"""The demo's own part: its children, its kills, what it remembers, what it reports.

Oracles: the process table; counters of a database filled by hand. That a whole swarm trains is shown in
tests/e2e. Peers here are small Python programs that wait.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from coordinator import demo as demo_module
from coordinator.demo import Demo, DemoPlan, run_demo
from coordinator.demo_processes import end_children, start_child
from coordinator.demo_report import Facts, StartedPeer, model_card_facts, progress, show_summary, summarise
from coordinator.status import FINISHED, document
from coordinator.store import peers
from coordinator.store.database import DATABASE_FILE, Database
from protocol.control import Leave
from protocol.errors import FinishedError, LocalFault
from tests.coordinator.office import (
    Volunteer,
    closing,
    closing_report,
    open_office,
    sign_closing,
    state,
    work,
)
from tests.coordinator.runs import make_run

SLEEP = "import time; time.sleep(60)"
WAITING = ("-c", SLEEP)
FORKING = f"""
import subprocess, sys, time
print(subprocess.Popen([sys.executable, "-c", "{SLEEP}"]).pid, flush=True)
time.sleep(60)
"""
STUBBORN = """
import signal, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
print("on", flush=True)
time.sleep(60)
"""
PARENT = """
import asyncio, os, sys
from pathlib import Path
from coordinator.demo_processes import start_child

async def main():
    sleeping = ["-c", "import time; time.sleep(60)"]
    child = await start_child("child", sleeping, logs=Path(sys.argv[1]), environment=os.environ)
    print(child.pid, flush=True)
    await asyncio.sleep(60)

asyncio.run(main())
"""


def quiet(line: str) -> None:
    """Take no notice."""


def wait_until(done: Callable[[], bool]) -> bool:
    for _ in range(200):
        if done():
            return True
        time.sleep(0.02)
    return False


def is_gone(pid: int) -> bool:
    return not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


# -- children -----------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="needs Linux: PR_SET_PDEATHSIG")
def test_a_child_does_not_outlive_a_demo_that_was_killed(tmp_path: Path) -> None:
    parent = subprocess.Popen([sys.executable, "-c", PARENT, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    child = int(parent.stdout.readline())
    assert psutil.pid_exists(child)
    os.kill(parent.pid, signal.SIGKILL)
    parent.wait(timeout=10)
    parent.stdout.close()
    assert wait_until(lambda: is_gone(child))


@pytest.mark.slow
async def test_killing_takes_the_whole_process_group(tmp_path: Path) -> None:
    child = await start_child("child", ("-c", FORKING), logs=tmp_path, environment=os.environ, pipe_stdout=True)
    assert child.process.stdout is not None
    grandchild = int(await child.process.stdout.readline())
    child.kill()
    assert await child.process.wait() == -signal.SIGKILL
    assert await asyncio.to_thread(wait_until, lambda: is_gone(grandchild))


@pytest.mark.slow
async def test_a_child_that_does_not_want_to_end_is_killed(tmp_path: Path) -> None:
    children = [
        await start_child("stubborn", ("-c", STUBBORN), logs=tmp_path, environment=os.environ, pipe_stdout=True),
        await start_child("polite", WAITING, logs=tmp_path, environment=os.environ),
    ]
    assert children[0].process.stdout is not None
    await children[0].process.stdout.readline()
    await end_children(children, timeout_s=0.5)
    assert [child.process.returncode for child in children] == [-signal.SIGKILL, -signal.SIGTERM]


@pytest.mark.slow
async def test_what_a_child_said_last_is_known(tmp_path: Path) -> None:
    child = await start_child(
        "child",
        ("-c", "import sys; print('one', flush=True); sys.exit('peer join: E-REF no')"),
        logs=tmp_path,
        environment=os.environ,
    )
    assert await child.process.wait() == 1
    assert child.last_line() == "peer join: E-REF no"


# -- peers of a demo ----------------------------------------------------------------------------------


@asynccontextmanager
async def demo_of(
    folder: Path, monkeypatch: pytest.MonkeyPatch, program: tuple[str, ...], **plan: object
) -> AsyncIterator[Demo]:
    """A demo on a small run whose peers are another program."""
    monkeypatch.setattr(demo_module, "PEER_PROGRAM", program)
    run = make_run(folder)
    (run.path / "logs").mkdir()
    demo = Demo(run, DemoPlan(directory=run.path, **plan), quiet)  # type: ignore[arg-type]
    try:
        yield demo
    finally:
        await demo.end()


@pytest.mark.slow
async def test_a_killed_peer_is_replaced_at_once_and_remembered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with demo_of(tmp_path, monkeypatch, WAITING, num_peers=2) as demo:
        for _ in range(2):
            await demo._start_peer()
        await demo._kill_one()
        await demo._replace_the_dead()
        names = [child.name for child in demo._running_peers()]
        assert len(names) == 2
        assert names[-1] == "peer-3"
        killed = [child for child in demo._peers if child.killed]
        assert [child.process.returncode for child in killed] == [-signal.SIGKILL]
        assert len(demo._peers) == 3
        pids = [child.pid for child in demo._running_peers()]
    assert all(is_gone(pid) for pid in pids)
    kept = json.loads((demo._run.path / "demo.json").read_text())
    assert (kept["peers_killed"], kept["peers_started"]) == (1, 3)


@pytest.mark.slow
async def test_peers_that_somebody_else_kills_are_replaced_however_many(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Trying `kill -9` on them is what a demo is for. Oracle: the signal that ended them."""
    times = demo_module.MAX_CRASHES + 2
    async with demo_of(tmp_path, monkeypatch, WAITING, num_peers=1) as demo:
        await demo._start_peer()
        for _ in range(times):
            (peer,) = demo._running_peers()
            os.kill(peer.pid, signal.SIGKILL)
            await peer.process.wait()
            await demo._replace_the_dead()
    assert json.loads((demo._run.path / "demo.json").read_text())["peers_killed"] == times


@pytest.mark.slow
async def test_seconds_of_a_demo_that_was_killed_are_not_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: the next sitting, which has never seen the end of the first."""
    async with demo_of(tmp_path, monkeypatch, WAITING, num_peers=1) as first:
        await asyncio.sleep(0.2)
        await first._start_peer()  # which writes the record, as progress does
        second = Demo(first._run, DemoPlan(directory=first._run.path), quiet)
        assert 0.2 <= second._before_s < 10.0


@pytest.mark.slow
async def test_a_sitting_that_ends_before_all_peers_are_back_forgets_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They have kept state under their names. Oracle: the names in demo.json after each sitting."""

    def running() -> list[str]:
        names: list[str] = json.loads((tmp_path / "run" / "demo.json").read_text())["peers_running"]
        return names

    async with demo_of(tmp_path, monkeypatch, WAITING, num_peers=2) as first:
        for _ in range(2):
            await first._start_peer()
    assert running() == ["peer-1", "peer-2"]
    again = Demo(first._run, DemoPlan(directory=first._run.path, num_peers=2), quiet)
    await again._start_peer("peer-1")
    await again.end()
    assert running() == ["peer-1", "peer-2"]


@pytest.mark.slow
async def test_who_is_killed_follows_from_the_seed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    victims = []
    for sitting, seed in enumerate((1, 1)):
        async with demo_of(tmp_path / str(sitting), monkeypatch, WAITING, num_peers=4, seed=seed) as demo:
            for _ in range(4):
                await demo._start_peer()
            for _ in range(3):
                await demo._kill_one()
            victims.append([child.name for child in demo._peers if child.killed])
    assert victims[0] == victims[1]


@pytest.mark.slow
async def test_peers_that_end_by_themselves_are_replaced_but_not_for_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with demo_of(tmp_path, monkeypatch, ("-c", "raise SystemExit('E-X broken')"), num_peers=1) as demo:
        await demo._start_peer()

        async def let_them_end() -> None:
            while True:
                await asyncio.gather(*(child.process.wait() for child in demo._peers))
                await demo._replace_the_dead()

        with pytest.raises(LocalFault, match="E-X broken"):
            await let_them_end()
        assert len(demo._peers) == demo_module.MAX_CRASHES


async def test_a_finished_run_is_refused(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    database = await Database.open(run.path / DATABASE_FILE)
    await database.run(peers.put_setting, FINISHED, "1")
    await database.close()
    with pytest.raises(FinishedError) as caught:
        await run_demo(DemoPlan(directory=run.path), say=quiet)
    assert caught.value.exit_code == 3


def test_cores_are_divided_among_peers_and_nobody_gets_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo_module, "_num_cores", lambda: 8)
    run = make_run(tmp_path)
    threads = [Demo(run, DemoPlan(num_peers=number), quiet)._threads for number in (1, 3, 8, 20)]
    assert threads == [8, 2, 1, 1]
    assert Demo(run, DemoPlan(num_peers=8, threads_per_peer=3), quiet)._threads == 3


# -- what it reports ----------------------------------------------------------------------------------

PROMISED = (
    *("rounds", "tokens", "seconds", "tokens_per_s", "loss_first", "loss_last", "heldout_loss", "unigram_loss"),
    *("bits_per_byte", "heldout_tokens", "peers_killed", "peers_joined", "tasks_done", "tasks_resent", "tasks_lost"),
    *("tokens_dropped", "double_counted", "averagings_ok", "averagings_failed", "rounds_solo", "hops"),
    *("activation_bytes", "stages", "peers", "export_dir"),
)


async def test_the_summary_holds_what_is_promised(tmp_path: Path) -> None:
    """Oracle: the list of fields in the description of `coordinator demo --json`, and a run filled by hand."""
    a, b = Volunteer("peer-1"), Volunteer("peer-2")
    async with open_office(tmp_path, start_peers=2) as office:
        for number, volunteer in enumerate((a, b)):
            await office.join(volunteer)
            await office.beat(volunteer, state(number))
        await office.tick()
        last = closing(
            office.manifest, 10, tasks=0, num_train=0, num_eval=4, done=b"\x0f", eval_loss_sum=512.0, eval_tokens=256
        )
        closings = [closing(office.manifest, 0, loss_sum=256 * 6.0), closing(office.manifest, 1), last]
        reports = [(number + 1, closing_report(sign_closing(a, one))) for number, one in enumerate(closings)]
        await office.beat(a, state(0), reports=(*reports, (9, work(1, target_tokens=300))))
        for volunteer in (a, b):
            await office.services.registry.leave(volunteer.peer, Leave())
        now_s = office.services.clock.wall()
        status = await office.services.database.run(document, office.manifest, now_s=now_s)
    facts = Facts(
        seconds=4.0,
        peers_killed=1,
        started=(
            StartedPeer(name="peer-1", pid=11, killed=False),
            StartedPeer(name="peer-9", pid=12, killed=True),
        ),
        replicas=(1, 1),
        export_dir=tmp_path / "export",
        exported_round=10,
        seed=3,
        sample="def main():",
    )
    summary = summarise(status, facts)
    data = json.loads(json.dumps(summary.data, allow_nan=False))
    assert set(PROMISED) <= set(data)
    assert (data["rounds"], data["tokens"], data["tokens_per_s"]) == (2, 512, 128.0)
    assert (data["loss_first"], data["loss_last"], data["heldout_loss"]) == (6.0, 5.0, 2.0)
    assert (data["heldout_tokens"], data["peers_joined"], data["peers_killed"]) == (256, 2, 1)
    assert data["stages"] == [{"stage": 0, "replicas": 1}, {"stage": 1, "replicas": 1}]
    assert data["peers"] == [
        {"name": "peer-1", "pid": 11, "stages": [0], "tokens": 300, "killed": False},
        {"name": "peer-9", "pid": 12, "stages": [], "tokens": 0, "killed": True},
    ]
    assert Path(data["export_dir"]).is_absolute()
    assert "2.0000 nats" in model_card_facts(status, exported_round=10)["Held-out loss"]
    assert summarise(status, replace(facts, exported_round=11)).data["heldout_loss"] == 2.0, "nothing was trained since"
    older = replace(facts, exported_round=9)
    assert summarise(status, older).data["heldout_loss"] is None, "the held-out loss of another model"
    assert model_card_facts(status, exported_round=9) == {}
    lines: list[str] = []
    show_summary(summary, say=lines.append)
    assert "    def main():" in lines
    assert any("2 rounds, 512 tokens in 4 s (128 tok/s)" in line for line in lines)
    assert "round 10/10" in progress(status, peers_killed=1)


async def test_progress_says_what_is_waited_for(tmp_path: Path) -> None:
    async with open_office(tmp_path) as office:
        await office.join(Volunteer("a"))
        await office.tick()
        now_s = office.services.clock.wall()
        status = await office.services.database.run(document, office.manifest, now_s=now_s)
    assert progress(status, peers_killed=0) == "1 peers here, waiting for a replica of stages 0, 1"
    assert model_card_facts(status, exported_round=None) == {}
