"""`coordinator demo`: a whole swarm on this machine, from text to a model.

Owns: the order of things (make or resume a run, start a coordinator and real peers, kill some if asked, watch,
export) and that nothing is left behind. Must not know: how training works: it starts the same commands that
people type, and reads the run's database like `swarm status DIR` does.

    DIR is the run directory; beside the run it holds peers/NAME (data), logs/, export/ and demo.json.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from coordinator.demo_processes import Child, end_children, start_child
from coordinator.demo_report import Facts, StartedPeer, Summary, model_card_facts, progress, summarise
from coordinator.durable import storage_faults, write_file
from coordinator.export import export
from coordinator.init import init_run
from coordinator.monitor.local import status_of_directory
from coordinator.presets import DEFAULT_PRESET
from coordinator.rundir import SIGNED_MANIFEST, RunDir
from coordinator.status import FINISHED
from coordinator.store import peers
from coordinator.store.database import DATABASE_FILE, reading
from protocol.errors import ConfigError, DeadlineError, FinishedError, LocalFault, StorageError
from protocol.process import interruptible, until_stopped

LOOPBACK = "/ip4/127.0.0.1/tcp/0"
LOGS, PEERS, EXPORT, RECORD = "logs", "peers", "export", "demo.json"
INVITE_TIMEOUT_S = 90.0  # hivemind takes seconds to import on a busy machine, p2pd up to a minute to start
POLL_S = 0.5
PROGRESS_EVERY_S = 5.0
STALL_S = 900.0  # no finished work for so long means that something is broken, not slow
LEAVE_TIMEOUT_S = 30.0
SAMPLE_TIMEOUT_S = 180.0
SAMPLE_PROMPT = "def "
COORDINATOR_PROGRAM = ("-m", "coordinator.cli")
PEER_PROGRAM = ("-m", "peer.cli")  # a name, not an import: coordinator and peer do not know each other
MAX_CRASHES = 5  # peers that end with an error are replaced, but not for ever

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class DemoPlan:
    """What was asked for. None leaves it to the preset, or to the machine."""

    corpus: tuple[Path, ...] = ()
    preset: str | None = None
    stages: int | None = None
    rounds: int | None = None
    seed: int = 0
    overrides: Mapping[str, Any] = field(default_factory=dict)
    num_peers: int = 4
    directory: Path | None = None
    kill_every_s: float | None = None
    threads_per_peer: int | None = None
    peer_options: tuple[str, ...] = ()
    """More options for `peer join`."""


@dataclass(slots=True)
class Record:
    """What a resumed demo has to remember; kept in demo.json."""

    seconds: float = 0.0
    peers_killed: int = 0
    peers_started: int = 0
    peers_running: tuple[str, ...] = ()
    """Who was there at last: they come back as who they are, with what they have kept."""


async def run_demo(plan: DemoPlan, *, say: Say) -> Summary:
    """Run the demo to its end. Raises `KeyboardInterrupt` on SIGINT or SIGTERM, after ending all children."""
    directory = (plan.directory or Path(tempfile.mkdtemp(prefix="handcar-demo-"))).absolute()
    run = await asyncio.to_thread(_make_or_resume, plan, directory, say)
    async with interruptible() as stop:
        demo = Demo(run, plan, say)
        try:
            await until_stopped(stop, demo.train())
        finally:
            await demo.end()
        if not demo.has_ended:
            say(f"stopped; to go on: coordinator demo --dir {directory}")
            raise KeyboardInterrupt
        stop.clear()  # whoever stopped it while peers were leaving wants to see the end
        summary = await until_stopped(stop, demo.conclude())
        if summary is None:
            say(f"stopped; the run is over, its model is left: coordinator export {directory} --to FOLDER")
            raise KeyboardInterrupt
        return summary


class Demo:
    """The processes of one sitting."""

    def __init__(self, run: RunDir, plan: DemoPlan, say: Say) -> None:
        self._run = run
        self._plan = plan
        self._say = say
        self._logs = run.path / LOGS
        self._record = _read_record(run.path)
        self._chance = random.Random(f"{plan.seed}/{self._record.peers_started}")
        self._coordinator: Child | None = None
        self._peers: list[Child] = []
        self._invite = ""
        self._crashes = 0
        self._before_s = self._record.seconds
        self._returning = list(self._record.peers_running[: plan.num_peers])
        """Peers of an earlier sitting that are not there again yet."""
        self._started_s = time.monotonic()
        self._ended_s: float | None = None
        self._replicas = tuple([0] * run.manifest.model.num_stages)
        self._threads = plan.threads_per_peer or max(1, _num_cores() // plan.num_peers)

    # -- training -------------------------------------------------------------------------------------

    async def train(self) -> None:
        """Start everything, watch until the run is over, and let peers leave."""
        with storage_faults(self._logs):
            self._logs.mkdir(exist_ok=True)
        self._started_s = time.monotonic()
        await self._start_coordinator(first=True)
        while self._returning:
            await self._start_peer(self._returning[0])
            del self._returning[0]
        while len(self._peers) < self._plan.num_peers:
            await self._start_peer()
        self._say(f"{self._plan.num_peers} peers with {self._threads} threads each; logs in {self._logs}")
        await self._watch()
        self._ended_s = time.monotonic()
        self._say("the run is over; peers are leaving")
        await _wait_all(self._running_peers(), timeout_s=LEAVE_TIMEOUT_S)

    async def end(self) -> None:
        """End every child that is left, and keep what a resumed demo needs. Peers first: they say goodbye."""
        self._save_record()
        await asyncio.shield(end_children(self._running_peers()))
        if self._coordinator is not None and self._coordinator.is_running:
            await asyncio.shield(end_children([self._coordinator]))

    @property
    def has_ended(self) -> bool:
        """The run has come to its end; only the summary is missing."""
        return self._ended_s is not None

    async def conclude(self) -> Summary:
        """Export the model, let it write something, and sum up."""
        status = status_of_directory(self._run.path)
        target = self._run.path / EXPORT
        newest = await asyncio.to_thread(self._run.newest_checkpoint)
        at = None if newest is None else newest.round
        await asyncio.to_thread(export, self._run, target, facts=model_card_facts(status, exported_round=at))
        facts = Facts(
            seconds=self._record.seconds,
            peers_killed=self._record.peers_killed,
            started=tuple(StartedPeer(name=peer.name, pid=peer.pid, killed=peer.killed) for peer in self._peers),
            replicas=self._replicas,
            export_dir=target,
            exported_round=at,
            seed=self._plan.seed,
            sample=await self._sample(target),
        )
        return summarise(status, facts)

    async def _watch(self) -> None:
        next_kill_s: float | None = None
        shown_s, progressed_s, hops = float("-inf"), time.monotonic(), -1
        while not await self._coordinator_is_done():
            await self._replace_the_dead()
            status = self._status()
            now_s = time.monotonic()
            if status is not None:
                self._note_replicas(status)
                if status["ledger"]["hops"] != hops:  # it also grows while rounds are trained again
                    hops, progressed_s = status["ledger"]["hops"], now_s
                if now_s - shown_s >= PROGRESS_EVERY_S:
                    shown_s = now_s
                    self._save_record()  # a demo that is killed has used up its seconds too
                    self._say(progress(status, peers_killed=self._record.peers_killed))
                next_kill_s = self._next_kill(status, next_kill_s, now_s)
            if next_kill_s is not None and now_s >= next_kill_s:
                await self._kill_one()
                next_kill_s += self._plan.kill_every_s or 0.0
            if now_s - progressed_s > STALL_S:
                raise DeadlineError(f"nothing was finished for {STALL_S:.0f} s.", hint=f"Look into {self._logs}.")
            await asyncio.sleep(POLL_S)

    def _next_kill(self, status: Mapping[str, Any], planned_s: float | None, now_s: float) -> float | None:
        """Return when to kill next: from the start of training until its last round, not while peers say goodbye."""
        is_training = status["state"] == "training" and status["rounds_closed"] < status["num_rounds"]
        if self._plan.kill_every_s is None or not is_training:
            return None
        return now_s + self._plan.kill_every_s if planned_s is None else planned_s

    def _status(self) -> dict[str, Any] | None:
        try:
            return status_of_directory(self._run.path)
        except (ConfigError, StorageError):  # the coordinator has not made it yet, or is just making it
            return None

    def _is_over(self) -> bool:
        status = self._status()
        return status is not None and status["state"] == "finished"

    def _note_replicas(self, status: Mapping[str, Any]) -> None:
        """Remember how many members each stage has; at the end they have all left."""
        if status["state"] == "training":
            counts = [sum(replica["member"] for replica in stage["replicas"]) for stage in status["stages"]]
            if any(counts):
                self._replicas = tuple(counts)

    # -- the coordinator ------------------------------------------------------------------------------

    async def _start_coordinator(self, *, first: bool) -> None:
        where = ("--host-maddr", LOOPBACK) if first else ()  # a second one has to be found at the same address
        self._coordinator = await start_child(
            "coordinator",
            (
                *(*COORDINATOR_PROGRAM, "run", str(self._run.path), *where, "--until-finished"),
                *("--start-peers", str(self._plan.num_peers)),
                *("--log-file", str(self._logs / "coordinator.jsonl"), "--log-level", "info"),
            ),
            logs=self._logs,
            environment=_environment(threads=1),
            pipe_stdout=True,
        )
        assert self._coordinator.process.stdout is not None
        try:
            async with asyncio.timeout(INVITE_TIMEOUT_S):
                line = await self._coordinator.process.stdout.readline()
        except TimeoutError:
            raise DeadlineError(f"the coordinator did not start within {INVITE_TIMEOUT_S:.0f} s.") from None
        self._invite = line.decode().strip()
        if not self._invite:
            raise LocalFault(f"the coordinator did not start: {self._coordinator.last_line()}")

    async def _coordinator_is_done(self) -> bool:
        """Tell whether it ended because the run is over; one that was killed is started again."""
        assert self._coordinator is not None
        code = self._coordinator.process.returncode
        if code is None:
            return False
        if code == 0 or self._is_over():
            return True
        if code > 0:
            raise LocalFault(f"the coordinator ended with {code}: {self._coordinator.last_line()}")
        self._say("the coordinator was killed; starting it again")
        await self._start_coordinator(first=False)
        return False

    # -- peers ----------------------------------------------------------------------------------------

    async def _start_peer(self, name: str | None = None) -> None:
        """Start a new peer, or one of an earlier sitting again."""
        if name is None:
            self._record.peers_started += 1
            name = f"peer-{self._record.peers_started}"
        child = await start_child(
            name,
            (
                *(*PEER_PROGRAM, "join", self._invite, "--name", name, "--listen", LOOPBACK),
                *("--data-dir", str(self._run.path / PEERS / name), "--threads", str(self._threads)),
                *("--log-file", str(self._logs / f"{name}.jsonl"), "--log-level", "info"),
                *self._plan.peer_options,
            ),
            logs=self._logs,
            environment=_environment(threads=self._threads),
        )
        self._peers.append(child)
        self._save_record()

    def _running_peers(self) -> list[Child]:
        return [peer for peer in self._peers if peer.is_running]

    async def _kill_one(self) -> None:
        victim = self._chance.choice(self._running_peers())
        victim.kill()
        await victim.process.wait()
        await self._replace_the_dead()

    async def _replace_the_dead(self) -> None:
        """Start another peer for each that has ended, however it came to its end."""
        for dead in [peer for peer in self._peers if not peer.is_running and not peer.is_replaced]:
            if self._is_over():
                return
            why = self._why_it_ended(dead)
            dead.is_replaced = True
            await self._start_peer()
            self._say(f"{why}, started {self._peers[-1].name}")

    def _why_it_ended(self, dead: Child) -> str:
        """Say why, and count it. Raises `LocalFault` if peers fail again and again."""
        code = dead.process.returncode
        if code == -signal.SIGKILL:  # by us, or by somebody who tries what happens then
            self._record.peers_killed += 1
            by_us, dead.killed = dead.killed, True
            return f"killed {dead.name}" if by_us else f"{dead.name} was killed (if not by you: is memory short?)"
        if code:
            self._crashes += 1
        if self._crashes >= MAX_CRASHES:
            raise LocalFault(
                f"too many peers fail; {dead.name} ended with {code}: {dead.last_line()}",
                hint=f"Look into {self._logs}.",
            )
        return f"{dead.name} ended with {code}" + (f" ({dead.last_line()})" if code else "")

    # -- the end --------------------------------------------------------------------------------------

    async def _sample(self, model: Path) -> str | None:
        """Let the exported model continue a prompt, in a process of its own: this one must not import torch."""
        child = await start_child(
            "sample",
            (*PEER_PROGRAM, "sample", str(model), "--prompt", SAMPLE_PROMPT),
            logs=self._logs,
            environment=_environment(threads=_num_cores()),
            pipe_stdout=True,
        )
        try:
            async with asyncio.timeout(SAMPLE_TIMEOUT_S):
                text, _ = await child.process.communicate()
        except TimeoutError:
            text = b""
        finally:
            child.kill()
            await child.process.wait()
        if child.process.returncode != 0 or not text:
            self._say(f"no sample: {child.last_line()}")
            return None
        return text.decode(errors="replace").rstrip()

    def _save_record(self) -> None:
        self._record.seconds = self._before_s + (self._ended_s or time.monotonic()) - self._started_s
        running = [*dict.fromkeys([*(peer.name for peer in self._running_peers()), *self._returning])]
        fields = {
            "seconds": self._record.seconds,
            "peers_killed": self._record.peers_killed,
            "peers_started": self._record.peers_started,
            "peers_running": running,
        }
        write_file(self._run.path / RECORD, json.dumps(fields).encode())


def _make_or_resume(plan: DemoPlan, directory: Path, say: Say) -> RunDir:
    """Open the unfinished run in `directory`, or make one there; `FinishedError` if it is finished."""
    if (directory / SIGNED_MANIFEST).is_file():
        if _is_finished(directory):
            raise FinishedError(
                f"the run in {directory} has ended.", hint="Choose another --dir, or leave it away for a new one."
            )
        say(f"going on with the run in {directory}, as it was made" + _without(plan))
        return RunDir.open(directory)
    say(f"making a run in {directory}")
    init_run(
        directory,
        corpus=plan.corpus or None,
        preset=plan.preset or DEFAULT_PRESET,
        stages=plan.stages,
        rounds=plan.rounds,
        name="demo",
        seed=plan.seed,
        overrides=plan.overrides,
        note=say,
    )
    return RunDir.open(directory)


def _without(plan: DemoPlan) -> str:
    """Say which of the flags have no effect on a run that is already there."""
    given = {
        "--corpus": plan.corpus,
        "--preset": plan.preset,
        "--stages": plan.stages,
        "--rounds": plan.rounds,
        "--set": plan.overrides,
    }
    flags = [flag for flag, value in given.items() if value]
    return f"; {', '.join(flags)} cannot change it" if flags else ""


def _is_finished(directory: Path) -> bool:
    if not (directory / DATABASE_FILE).is_file():
        return False
    with reading(directory / DATABASE_FILE) as db:
        return peers.get_setting(db, FINISHED) is not None


def _read_record(directory: Path) -> Record:
    try:
        fields = json.loads((directory / RECORD).read_bytes())
        running = tuple(str(name) for name in fields["peers_running"])
        return Record(float(fields["seconds"]), int(fields["peers_killed"]), int(fields["peers_started"]), running)
    except (OSError, ValueError, KeyError, TypeError):  # the first sitting, or one that died in its first moment
        return Record()


async def _wait_all(children: list[Child], *, timeout_s: float) -> None:
    try:
        async with asyncio.timeout(timeout_s):
            await asyncio.gather(*(child.process.wait() for child in children))
    except TimeoutError:
        return


def _environment(*, threads: int) -> dict[str, str]:
    """Return the children's environment: ours, with the cores divided, and no model hub."""
    return {
        **os.environ,
        "OMP_NUM_THREADS": str(threads),
        "MKL_NUM_THREADS": str(threads),
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
    }


def _num_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
