"""The simulated swarm: virtual time, processes, a coordinator, and the facts that no single peer can know.

Owns: the event queue and the wiring. Runs the very `RoundMachine` that a peer runs; only its driver is fake.
The same seed gives the same run.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from random import Random

from protocol.ids import PeerId, RoundId, RunId, StageId, digest
from protocol.rounds.messages import COMMIT_CONTEXT, Charter, Commit, DoneTask, Seat
from protocol.rounds.settings import Notary, RoundRules, RoundSize, RoundTimers, Settings
from protocol.signing import Signed
from tests.sim.checks import Checks
from tests.sim.coordinator import Coordinator
from tests.sim.network import Link, Network
from tests.sim.notary import FakeNotary
from tests.sim.pipeline import PipelineRules, Task
from tests.sim.process import Process
from tests.sim.reduces import Entry, Reduces, Sum
from tests.sim.replica import Held

RUN = RunId("0123456789abcdef0123456789abcdef")
COORDINATOR = PeerId("coordinator")
GHOSTS_S = 60.0  # how long a vanished peer stays in the DHT
FAST_TIMERS = RoundTimers(
    patience_s=6.0,
    isolation_s=20.0,
    round_deadline_s=60.0,
    reduce_timeout_s=20.0,
    accept_timeout_s=10.0,
    freeze_timeout_s=10.0,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What kind of swarm, and how honest the checks shall be about it."""

    spans: tuple[tuple[int, ...], ...] = ((0,), (0,), (1,), (1,))
    """The stages of each process."""
    num_train: int = 8
    num_eval: int = 1
    eval_every: int = 3
    last_round: int | None = None
    """Which trains nothing and only evaluates, as in a run; None: no end."""
    tokens_per_number: int = 64
    task_s: float = 0.15
    drain_s: float = 0.1
    reduce_s: float = 0.3
    fetch_s: float = 0.3
    apply_s: float = 0.2
    resync_s: float = 1.0
    link: Link = field(default_factory=Link)
    pipeline: PipelineRules = field(default_factory=PipelineRules)
    timers: RoundTimers = FAST_TIMERS
    clip_threshold: float = 1e-3
    hosts_refuse: bool = True
    """Who calls a dead process is told so; otherwise only silence tells."""
    restore_after_s: float = 3.0
    allow_forks: bool = False
    exaggerates: Mapping[str, int] = field(default_factory=dict)
    """Who claims how many times the tokens that it has worked on."""
    num_founders: int | None = None
    """How many processes of each stage the first charter names; the others join."""
    commits_kept: int = 64
    norm_noise: float = 0.0
    """How differently members compute the norm of the same bytes, relative."""
    overlap: bool = False
    """Average a round while the next one computes."""
    through_wire: bool = False
    """Encode and decode every message, as a real network does."""


class World:
    """Everything there is."""

    def __init__(
        self,
        seed: int,
        options: Options,
        *,
        notaries: Callable[[PeerId], Notary] = FakeNotary,
        names: Sequence[PeerId] = (),
        coordinator: PeerId = COORDINATOR,
    ) -> None:
        self.rng = Random(seed)
        self.options = options
        self.timers = options.timers
        self.now_s = 0.0
        self._heap: list[tuple[float, int, Callable[[], None]]] = []
        self._count = 0
        self._sessions = 0
        self._notaries = lru_cache(maxsize=None)(notaries)
        self.network = Network(self.rng, options.link)
        self.sums: dict[object, Sum] = {}
        self.speeds: dict[PeerId, float] = {}
        self.forked: set[StageId] = set()
        self.num_resent = 0
        self.rules = RoundRules(
            size_of=self._size_of,
            check_done=self._check_done,
            clip_threshold=options.clip_threshold,
            commits_kept=options.commits_kept,
            tokens_per_round=sum(map(self.tokens_of, range(options.num_train))),
            overlap=options.overlap,
            last_round=None if options.last_round is None else RoundId(options.last_round),
        )
        self.checks = Checks(self)
        self.reduces = Reduces(self)
        names = names or [PeerId(f"p{index:02d}") for index in range(len(options.spans))]
        self.processes = {
            name: Process(self, name, tuple(StageId(stage) for stage in span))
            for name, span in zip(names, options.spans, strict=True)
        }
        self.last_stage = max(stage for span in options.spans for stage in span)
        self.coordinator = Coordinator(self, coordinator)
        for process in self.processes.values():
            process.start()
        self.coordinator.found_run()
        self._refresh_directories()
        self.run(options.resync_s)  # the founders load the initial state; a plan's times count from here

    # -- time --------------------------------------------------------------------------------------

    def at(self, delay_s: float, job: Callable[[], None]) -> None:
        """Do something later."""
        self._count += 1
        heapq.heappush(self._heap, (self.now_s + delay_s, self._count, job))

    def run(self, seconds: float) -> None:
        """Let virtual time pass."""
        until_s = self.now_s + seconds
        while self._heap and self._heap[0][0] <= until_s:
            self.now_s, _, job = heapq.heappop(self._heap)
            job()
        self.now_s = until_s

    def run_until(self, condition: Callable[[], bool], *, within_s: float) -> float:
        """Let time pass until something holds, and return how long that took."""
        started_s = self.now_s
        while not condition():
            assert self.now_s - started_s < within_s, f"not within {within_s} s\n{self.describe()}"
            self.run(0.25)
        return self.now_s - started_s

    def run_rounds(self, count: int, *, within_s: float) -> float:
        """Let every stage commit so many rounds more."""
        goals = {stage: self.newest_round(stage) + count for stage in self.stages}
        return self.run_until(
            lambda: all(self.newest_round(stage) >= goal for stage, goal in goals.items()), within_s=within_s
        )

    # -- facts -------------------------------------------------------------------------------------

    @property
    def stages(self) -> tuple[StageId, ...]:
        return tuple(StageId(stage) for stage in range(self.last_stage + 1))

    def hosts(self, stage: StageId) -> tuple[PeerId, ...]:
        """Return everybody who was ever meant to host a stage, ghosts included."""
        return tuple(name for name, process in self.processes.items() if stage in process.stages)

    def directory(self) -> Mapping[StageId, tuple[PeerId, ...]]:
        """What the DHT says: also those who vanished a short while ago."""
        fresh = {
            name for name, process in self.processes.items() if process.alive or self.now_s - process.seen_s < GHOSTS_S
        }
        return {stage: tuple(name for name in self.hosts(stage) if name in fresh) for stage in self.stages}

    def newest_round(self, stage: StageId) -> int:
        """Return the next round of the most advanced replica that is alive."""
        return max((held.next_round for held in self._alive_held(stage)), default=-1)

    def newest_held(self, stage: StageId, *, asker: PeerId, among: Collection[PeerId] | None = None) -> Held | None:
        """Return the newest state that a process can reach: at other replicas, or the coordinator's copy."""
        found = [
            process.replicas[stage].held
            for process in self.processes.values()
            if stage in process.replicas and process.name != asker and process.answers(asker)
            if among is None or process.name in among
        ]
        if self.coordinator.alive and among is None:
            found.append(self.coordinator.kept.get(stage))
        known = [held for held in found if held is not None]
        return max(known, key=lambda held: (held.generation, held.version), default=None)

    def _alive_held(self, stage: StageId) -> list[Held]:
        replicas = [process.replicas.get(stage) for process in self.processes.values() if process.alive]
        return [replica.held for replica in replicas if replica is not None and replica.held is not None]

    def states(self, stage: StageId) -> set[tuple[bytes, bytes]]:
        """Return the different (lineage, state) pairs that living replicas stand at."""
        return {(held.lineage, held.state) for held in self._alive_held(stage)}

    def is_over(self, task: Task) -> bool:
        """Tell whether the feeder of a task has ended, or its round."""
        feeder = task.feeder
        return not feeder.alive or feeder.session != task.feeder_session

    def task_s(self, name: PeerId) -> float:
        """Return the time of one microbatch at one stage."""
        return self.options.task_s * self.speeds.get(name, 1.0) * self.rng.uniform(0.8, 1.2)

    def tokens_of(self, number: int) -> int:
        """Return the target tokens of a number; all different, so that books that balance do so for a reason."""
        return self.options.tokens_per_number + number

    def claim_of(self, name: PeerId, entries: Sequence[Entry]) -> int:
        """Return how many tokens a process claims for what it has added up."""
        return sum(tokens for _, _, tokens in entries) * self.options.exaggerates.get(name, 1)

    def _size_of(self, round_id: RoundId) -> RoundSize:
        options = self.options
        first = 0 if options.num_train == 0 else 1
        evaluates = options.eval_every > 0 and round_id >= first and round_id % options.eval_every == 0
        if options.last_round is not None and round_id >= options.last_round:
            return RoundSize(0, options.num_eval if round_id == options.last_round else 0)
        return RoundSize(options.num_train, options.num_eval if evaluates else 0)

    def evidence_of(self, round_id: RoundId, number: int) -> bytes:
        """Make what stands for the last stage's signed answer."""
        return digest(b"evidence", repr((round_id, number)).encode())[:8]

    def _check_done(self, round_id: RoundId, task: DoneTask) -> bool:
        return task.evidence == self.evidence_of(round_id, task.number)

    # -- records and settings ----------------------------------------------------------------------

    def new_session(self) -> int:
        """Return a number that no other life of a process has."""
        self._sessions += 1
        return self._sessions

    def settings_for(self, stage: StageId, me: Seat) -> Settings:
        """Tell a machine who it is."""
        return Settings(
            run=RUN,
            stage=stage,
            me=me,
            coordinator=self.coordinator.name,
            timers=self.timers,
            rules=self.rules,
            notary=self._notaries(me.peer),
        )

    def notary_of(self, name: PeerId) -> Notary:
        """Return somebody's pen."""
        return self._notaries(name)

    def generation_of(self, charter: Signed) -> int:
        """Look into a charter."""
        return Charter.from_bytes(charter.payload).generation

    def commit_of(self, signed: Signed) -> Commit:
        """Look into a commit."""
        return self._notaries(self.coordinator.name).unseal(signed, COMMIT_CONTEXT, Commit)

    def _refresh_directories(self) -> None:
        for process in self.processes.values():
            if process.alive and not process.paused:
                process.tell_roster()
        self.at(5.0, self._refresh_directories)

    def describe(self) -> str:
        """Say where everybody stands; for the message of a failed test."""
        lines = [f"at {self.now_s:.2f} s"]
        for name, process in self.processes.items():
            mark = "paused" if process.paused else "alive" if process.alive else "dead"
            lines.append(f"{name} {mark} session {process.session}")
            for stage, replica in process.replicas.items():
                facts = replica.machine.statistics()
                lines.append(
                    f"   stage {stage} {facts.standing.value} round {facts.round} version {facts.version} "
                    f"gen {facts.generation} members {facts.num_members} steward {facts.steward}/{facts.ballot} "
                    f"done {facts.num_done}/{facts.num_numbers} tokens {replica.tokens} "
                    f"lineage {facts.lineage.hex()[:6] if facts.lineage else None}"
                )
        return "\n".join(lines)
