"""Handcar's own commands as real processes, each in a session of its own, none of which outlives the tests.

Owns: starting a command, its output files, signals to it, waiting for its end with a deadline. Must not know:
what a command does; `swarm.py` knows that.

Importing torch, hivemind and transformers takes a command several seconds of CPU, and these tests start some
two dozen. So they are forked from a server (multiprocessing's) that has imported them once and then runs the
command's entry point, with arguments, signals and files as a shell would. HANDCAR_E2E_COLD=1 starts a new
interpreter for each instead.
"""

from __future__ import annotations

import ctypes
import importlib
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from datetime import datetime
from multiprocessing import forkserver
from pathlib import Path
from typing import Any, Literal

import psutil

Program = Literal["peer", "coordinator", "swarm", "odd-peer", "odd-coordinator"]

ENTRY_POINTS: dict[Program, str] = {
    "peer": "peer.cli",
    "coordinator": "coordinator.cli",
    "swarm": "coordinator.monitor.cli",
    "odd-peer": "tests.e2e.odd_peer",
    "odd-coordinator": "tests.e2e.odd_coordinator",
}
PRELOADED = ["peer.app", "coordinator.app", "coordinator.init", "coordinator.export", "bitsandbytes"]
IS_COLD = os.environ.get("HANDCAR_E2E_COLD") == "1"
POLL_S = 0.05
KILL_TIMEOUT_S = 10.0
TAIL_CHARS = 2500
PR_SET_PDEATHSIG = 1


class Command:
    """One running (or ended) command."""

    def __init__(
        self, program: Program, arguments: Sequence[str], *, name: str, folder: Path, netns: str | None = None
    ) -> None:
        """Start it; its output goes to files in `folder` that several lives of one name share.

        `netns` names the network namespace that it is to live in.
        """
        self.name = name
        self.out = folder / f"{name}.out"
        self.err = folder / f"{name}.err"
        self.log = folder / f"{name}.jsonl"
        self.is_expected_to_end = False
        self._said_before = len(_text(self.out))
        self._helpers: list[psutil.Process] = []
        start = _start_cold if IS_COLD else _start_warm
        self._child = start(program, list(arguments), self.out, self.err, netns)

    @property
    def pid(self) -> int:
        pid = self._child.pid
        assert pid is not None
        return pid

    @property
    def code(self) -> int | None:
        """The exit code, or None while it runs; minus the signal if that ended it."""
        if isinstance(self._child, subprocess.Popen):
            return self._child.poll()
        return self._child.exitcode

    def kill(self) -> None:
        """Kill it as `kill -9` does: this process only; its p2pd has to notice by itself."""
        self._helpers = _descendants(self.pid)
        self.send(signal.SIGKILL)
        self.wait_end(timeout_s=KILL_TIMEOUT_S)

    def send(self, number: signal.Signals) -> None:
        """Send a signal to it, of which it may end."""
        if number in (signal.SIGKILL, signal.SIGINT, signal.SIGTERM):
            self.is_expected_to_end = True
        if self.code is None:
            os.kill(self.pid, number)

    def wait_end(self, *, timeout_s: float) -> int:
        """Return its exit code, or fail if it has not ended in time."""
        deadline_s = time.monotonic() + timeout_s
        while (code := self.code) is None:
            assert time.monotonic() < deadline_s, f"{self.name} has not ended after {timeout_s:g} s\n{self.story()}"
            time.sleep(POLL_S)
        return code

    def wait_helpers_end(self, *, timeout_s: float) -> None:
        """Fail unless what it had started (p2pd) when it was killed ends as well."""
        _, alive = psutil.wait_procs(self._helpers, timeout=timeout_s)
        assert not alive, f"{self.name} left {alive} behind"

    def end(self) -> None:
        """Kill it and everything it started, at once."""
        if self.code is not None:
            return
        for process in [*_descendants(self.pid), psutil.Process(self.pid)]:
            try:
                process.kill()
            except psutil.NoSuchProcess:
                continue
        self.wait_end(timeout_s=KILL_TIMEOUT_S)

    def stdout(self) -> str:
        """Return the complete lines that this life has printed."""
        return _text(self.out)[self._said_before :].rpartition("\n")[0]

    def events(self, name: str | None = None) -> list[dict[str, Any]]:
        """Return its log events (of one name), oldest first; of all lives that this log file has seen."""
        lines = _text(self.log).split("\n")[:-1]  # the last one may be half written
        found = [json.loads(line) for line in lines]
        return found if name is None else [event for event in found if event["event"] == name]

    def opened_s(self, *, stage: int = 0) -> list[float]:
        """Return when rounds of a stage were opened here."""
        return [at_s(event) for event in self.events("round.open") if event["stage"] == stage]

    def story(self) -> str:
        """Return the ends of its stderr and its log, for a failure's message."""
        tails = [f"{path.name}: ...{_text(path)[-TAIL_CHARS:]}" for path in (self.err, self.log)]
        return f"--- {self.name} (exit code {self.code})\n" + "\n".join(tails)


def at_s(event: dict[str, Any]) -> float:
    """Return when something was logged, in seconds of the wall clock."""
    return datetime.fromisoformat(str(event["timestamp"])).timestamp()


def wait_for(condition: Callable[[], object], command: Command, *, timeout_s: float) -> None:
    """Wait until the condition is true; fail if the command ends before or it takes too long."""
    deadline_s = time.monotonic() + timeout_s
    while not condition():
        assert command.code is None, command.story()
        assert time.monotonic() < deadline_s, f"waited for {timeout_s:g} s\n{command.story()}"
        time.sleep(POLL_S)


def run_to_end(program: Program, arguments: Sequence[str], *, name: str, folder: Path, timeout_s: float) -> str:
    """Run a command, and return its stdout; fail unless it ends well."""
    command = Command(program, arguments, name=name, folder=folder)
    try:
        code = command.wait_end(timeout_s=timeout_s)
    finally:
        command.end()
    assert code == 0, command.story()
    return command.stdout()


def stop_server() -> None:
    """End the server that warm commands are forked from, if there is one."""
    forkserver._forkserver._stop()  # type: ignore[attr-defined]  # multiprocessing itself only does so at exit


def _start_cold(
    program: Program, arguments: list[str], out: Path, err: Path, netns: str | None
) -> subprocess.Popen[bytes]:
    prefix = [] if netns is None else ["ip", "netns", "exec", netns]
    with out.open("ab") as out_file, err.open("ab") as err_file:
        return subprocess.Popen(
            [*prefix, sys.executable, "-m", ENTRY_POINTS[program], *arguments],
            stdin=subprocess.DEVNULL,
            stdout=out_file,
            stderr=err_file,
            start_new_session=True,
        )


def _start_warm(
    program: Program, arguments: list[str], out: Path, err: Path, netns: str | None
) -> multiprocessing.process.BaseProcess:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    child = context.Process(target=_run_entry_point, args=(program, arguments, str(out), str(err), netns))
    child.start()
    return child


def _run_entry_point(program: Program, arguments: list[str], out: str, err: str, netns: str | None) -> None:
    """Become the command; in the child."""
    os.setsid()
    if netns is not None:
        _enter_namespace(netns)
    if sys.platform == "linux":  # the server ends with the tests, however they end
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    for descriptor, path in ((1, out), (2, err)):
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        os.dup2(file, descriptor)
        os.close(file)
    sys.argv = [program, *arguments]
    importlib.import_module(ENTRY_POINTS[program]).main()


def _enter_namespace(netns: str) -> None:
    """Move this thread, the only one yet, to a network namespace; what it starts will be there too."""
    descriptor = os.open(f"/run/netns/{netns}", os.O_RDONLY)
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.setns(descriptor, 0):
        raise OSError(ctypes.get_errno(), f"cannot enter network namespace {netns}")
    os.close(descriptor)


def _descendants(pid: int) -> list[psutil.Process]:
    try:
        return list(psutil.Process(pid).children(recursive=True))
    except psutil.NoSuchProcess:
        return []


def _text(path: Path) -> str:
    """Return what is in a file, nothing if it is not there yet."""
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return ""
