"""A real swarm on loopback: a run directory, a coordinator, peers, and what they say about themselves.

Owns: making a run from the `tiny` preset, starting its processes, waiting for what they report, and reading
losses, counters and state digests. Must not know: what a test expects.
"""

from __future__ import annotations

import sqlite3
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

from coordinator.monitor.local import status_of_directory
from coordinator.rundir import RunDir
from coordinator.store import audits, credits, tallies
from coordinator.store.database import DATABASE_FILE, open_readonly
from peer.identity import make_identity
from protocol.ids import PeerId
from protocol.invite import PREFIX
from tests.e2e.processes import POLL_S, Command, run_to_end

LOOPBACK = "/ip4/127.0.0.1/tcp/0"
INIT_TIMEOUT_S = 60.0
START_TIMEOUT_S = 90.0  # cold starts of five processes on two busy cores take half of that


@dataclass(frozen=True, slots=True)
class Place:
    """Where a process of a swarm lives, if not on loopback."""

    netns: str
    address: str
    """IPv4."""


class Swarm:
    """One run and its processes. Use it as a context: nothing outlives the block."""

    def __init__(
        self,
        folder: Path,
        *,
        corpus: Path | None = None,
        rounds: int = 0,
        stages: int = 2,
        settings: Sequence[str] = (),
        preset: str = "tiny",
        model: Path | None = None,
        places: Mapping[str, Place] | None = None,
        directory: Path | None = None,
        log_level: str = "debug",
    ) -> None:
        """Make the run in `folder`; `settings` are `section.field=value` on top of the preset.

        Without a `corpus` it is there already, in `directory`.

        `model` is a folder with another model than the preset's. `places` say where the coordinator, under this name,
        and peers live.
        """
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.directory = directory or folder / "run"
        self.invite = ""
        self.coordinator: Command | None = None
        self.peers: dict[str, Command] = {}
        self._ended: list[Command] = []
        self._places = places or {}
        self._log_level = log_level
        if corpus is None:
            return
        flags = ["--corpus", str(corpus), "--preset", preset, "--stages", str(stages), "--rounds", str(rounds)]
        flags += [] if model is None else ["--model", str(model)]
        for setting in settings:
            flags += ["--set", setting]
        run_to_end(
            "coordinator", ["init", str(self.directory), *flags], name="init", folder=folder, timeout_s=INIT_TIMEOUT_S
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.end()

    # -- processes --------------------------------------------------------------------------------------

    def start_coordinator(self, *flags: str, again: bool = False, oddity: str = "") -> Command:
        """Start the coordinator and wait for its invite; `again` lets it listen where it did before.

        `oddity` is what is to be wrong with it (`odd_coordinator.py`).
        """
        where = () if again else ("--host-maddr", self._listen_at("coordinator"))
        program = ("odd-coordinator", "coordinator", oddity) if oddity else ("coordinator", "coordinator")
        coordinator = self._start(*program, "run", str(self.directory), *where, *flags)
        self.coordinator = coordinator
        self.wait("the invite", lambda: coordinator.stdout().startswith(PREFIX))
        self.invite = coordinator.stdout().split("\n")[0]
        return coordinator

    def start_peer(self, name: str, *flags: str, oddity: str = "") -> Command:
        """Start `peer join`; a name that was used before comes back with its data folder.

        `oddity` is what is to be wrong with it (`odd_peer.py`).
        """
        place = ("--data-dir", str(self.folder / f"{name}.data"), "--listen", self._listen_at(name), "--threads", "1")
        program = ("odd-peer", name, oddity) if oddity else ("peer", name)
        peer = self._start(*program, "join", self.invite, "--name", name, *place, *flags)
        self.peers[name] = peer
        return peer

    def start_watcher(self, name: str, *flags: str) -> Command:
        """Start `peer watch` with a key that the coordinator was told of (`watcher_key`)."""
        folder = str(self.folder / f"{name}.data")
        arguments = ("watch", self.invite, "--name", name, "--data-dir", folder, "--threads", "1", *flags)
        self.peers[name] = watcher = self._start("peer", name, *arguments)
        return watcher

    def watcher_key(self, name: str) -> PeerId:
        """Make a watcher's key, and return its peer id."""
        return make_identity(self.folder / f"{name}.data").peer_id

    def start_peers(self, names: Sequence[str]) -> None:
        """Start several peers."""
        for name in names:
            self.start_peer(name)

    def living(self) -> list[Command]:
        """Return the peers that run."""
        return [peer for peer in self.peers.values() if peer.code is None]

    def end(self) -> None:
        """End all processes."""
        everybody = [*self.peers.values(), *self._ended]
        for command in [*everybody, *([self.coordinator] if self.coordinator else [])]:
            command.end()

    def _start(self, program: Any, name: str, *arguments: str) -> Command:
        if name in self.peers:
            self._ended.append(self.peers.pop(name))
        log = ("--log-file", str(self.folder / f"{name}.jsonl"), "--log-level", self._log_level, "--debug")
        place = self._places.get(name)
        netns = None if place is None else place.netns
        return Command(program, [*arguments, *log], name=name, folder=self.folder, netns=netns)

    def _listen_at(self, name: str) -> str:
        return f"/ip4/{self._places[name].address}/tcp/0" if name in self._places else LOOPBACK

    # -- waiting ----------------------------------------------------------------------------------------

    def wait(self, what: str, condition: Callable[[], object], *, timeout_s: float = START_TIMEOUT_S) -> None:
        """Wait until the condition is true; fail with everybody's last words if it takes too long or one dies."""
        deadline_s = time.monotonic() + timeout_s
        while not condition():
            for command in self._everybody():
                if command.code not in (None, 0) and not command.is_expected_to_end:
                    raise AssertionError(f"{command.name} died while we waited for {what}\n{self.story()}")
            assert time.monotonic() < deadline_s, f"waited {timeout_s:g} s for {what}\n{self.story()}"
            time.sleep(POLL_S)

    def wait_version(self, version: int, *, stage: int | None = None, timeout_s: float = START_TIMEOUT_S) -> None:
        """Wait until some living peer (of a stage) has committed that version."""
        self.wait(f"version {version}", lambda: self.version(stage) >= version, timeout_s=timeout_s)

    def wait_finished(self, *, timeout_s: float) -> None:
        """Wait until the coordinator ends by itself, and then every living peer."""
        assert self.coordinator is not None
        self.wait("the end of the run", lambda: self.coordinator and self.coordinator.code == 0, timeout_s=timeout_s)
        for peer in self.living():
            assert peer.wait_end(timeout_s=30.0) == 0, peer.story()

    def story(self) -> str:
        """Return everybody's last words."""
        return "\n".join(command.story() for command in self._everybody())

    def _everybody(self) -> list[Command]:
        return [*([self.coordinator] if self.coordinator else []), *self.peers.values()]

    # -- what they say ----------------------------------------------------------------------------------

    def version(self, stage: int | None = None) -> int:
        """Return the newest version that a living peer has committed (of one stage), 0 if none has."""
        commits = [event for peer in self.living() for event in peer.events("round.committed")]
        return max((event["version"] for event in commits if stage in (None, event["stage"])), default=0)

    def states(self) -> Mapping[tuple[int, int], Mapping[str, str]]:
        """Return the state digest (its first digits) by stage and version, by peer."""
        states: dict[tuple[int, int], dict[str, str]] = defaultdict(dict)
        for peer in self.peers.values():
            for event in peer.events("round.committed"):
                states[event["stage"], event["version"]][peer.name] = event["state"]
        return states

    def hosts(self, stage: int) -> list[Command]:
        """Return the living peers that have committed rounds of a stage, in order of their names."""
        found = [peer for peer in self.living() if any(event["stage"] == stage for event in peer.events("round.open"))]
        return sorted(found, key=lambda peer: peer.name)

    def status(self) -> dict[str, Any]:
        """Return the status document, from the run directory."""
        return status_of_directory(self.directory)

    def database(self) -> closing[sqlite3.Connection]:
        """Open the coordinator's database, to be read; close it with the block."""
        return closing(open_readonly(self.directory / DATABASE_FILE))

    def rounds(self) -> list[tallies.RoundTally]:
        """Return the closed rounds, oldest first."""
        with self.database() as db:
            return tallies.round_tallies(db)

    def counters(self) -> tallies.Counters:
        """Return the ledger's counters."""
        with self.database() as db:
            return tallies.counters(db)

    def findings(self) -> dict[str, dict[str, int]]:
        """Return how many audits of each peer, by its name, came to what."""
        with self.database() as db:
            return _by_name(db, audits.count_findings(db))

    def balances(self) -> dict[str, credits.Balance]:
        """Return each peer's credits, by its name."""
        with self.database() as db:
            return _by_name(db, credits.balances(db))

    def run_dir(self) -> RunDir:
        """Return the run directory, opened."""
        return RunDir.open(self.directory)


_Told = TypeVar("_Told")


def _by_name(db: sqlite3.Connection, told: Mapping[PeerId, _Told]) -> dict[str, _Told]:
    names = {PeerId(peer): name for peer, name in db.execute("SELECT peer, name FROM peers")}
    return {names[peer]: each for peer, each in told.items()}
