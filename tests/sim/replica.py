"""A simulated driver: performs the actions of one real `RoundMachine` and reports what came of them.

Owns: one replica's state, accumulator, staging and update log, all as plain values that can be compared.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from protocol.ids import Digest, Lineage, PeerId, RoundId, StageId, Version, digest
from protocol.rounds import RoundMachine, Settings
from protocol.rounds.events import (
    AbortReduce,
    Action,
    Applied,
    Apply,
    ApplyFailed,
    BitsChanged,
    CommitStep,
    Event,
    Fetch,
    Fetched,
    FetchFailed,
    Freeze,
    Frozen,
    Left,
    NewLineage,
    OpenRound,
    Replay,
    Report,
    Resync,
    Send,
    Shut,
    StartReduce,
    Synced,
    Trouble,
)
from protocol.rounds.messages import Commit
from protocol.signing import Signed
from tests.sim.reduces import Entry

if TYPE_CHECKING:
    from tests.sim.process import Process


@dataclass(frozen=True, slots=True)
class Held:
    """A state that a replica has: everything that a joiner could fetch from it."""

    charter: Signed
    commits: tuple[Signed, ...]
    """The newest one, or none at the charter itself."""
    generation: int
    version: Version
    lineage: Lineage
    next_round: RoundId
    state: Digest


class Replica:
    """One stage at one process, in one life of that process."""

    def __init__(self, process: Process, stage: StageId, settings: Settings) -> None:
        self.process = process
        self.world = process.world
        self.stage = stage
        self.machine = RoundMachine(settings)
        self.held: Held | None = None
        self.opened: OpenRound | None = None
        self.is_frozen = True
        self.entries: list[Entry] = []
        """What was added up since the last freeze."""
        self.contribution: list[Entry] = []
        self.staged: set[Digest] = set()
        self.logged: set[Digest] = set()
        self.reports: list[Report] = []
        self.has_left = False
        self._work = 0  # which long-running job is the current one; older ones end in nothing

    # -- in and out --------------------------------------------------------------------------------

    def feed(self, event: Event) -> None:
        """Give the machine an event, and perform what it wants."""
        for action in self.machine.handle(event, self.world.now_s):
            self.world.checks.on_action(self, action)
            self._perform(action)

    def accumulate(self, round_id: RoundId, version: Version, number: int, tokens: int) -> None:
        """Add a microbatch's gradient, which was computed at `version`."""
        assert self.takes(round_id), "a gradient was added to a closed round"
        assert self.opened is not None
        assert self.held is not None
        assert self.held.version == version, "an optimizer step came between forward and backward"
        self.entries.append((round_id, number, tokens))

    def takes(self, round_id: RoundId) -> bool:
        """Tell whether tasks of this round are welcome."""
        return self.opened is not None and not self.is_frozen and self.opened.round == round_id

    @property
    def tokens(self) -> int:
        """What it says that it has added up."""
        return self.world.claim_of(self.process.name, self.contribution)

    def start(self) -> None:
        """Begin as a process does that has nothing: with what anybody has."""
        self._perform(Resync(None, ()))

    # -- actions -----------------------------------------------------------------------------------

    def _perform(self, action: Action) -> None:
        later = self.process.later
        options, rng = self.world.options, self.world.rng
        match action:
            case Send(to, message):
                self.process.send(to, message)
            case OpenRound():
                self._open(action)
            case Freeze(closing):
                self._freeze(action)
                later(rng.uniform(0.0, options.drain_s), lambda: self.feed(Frozen(closing.round, self.tokens)))
            case Shut(round_id):
                self.is_frozen = True
                self.process.pipeline.end_round(self, round_id)
            case StartReduce():
                self.world.reduces.join(self, action, tuple(self.contribution))
            case AbortReduce(group_id):
                self.world.reduces.abort(self, group_id)
            case Fetch(commit, sources):
                later(options.fetch_s, lambda: self._fetch(commit, sources))
            case Apply(commit, signed, lineage):
                self.is_frozen = True  # as a driver does if nobody has told it that the round is over
                self._start(options.apply_s, lambda: self._apply((CommitStep(commit, signed, lineage),)))
            case Replay(steps, sources):
                self.is_frozen = True
                self._start(options.fetch_s * len(steps), lambda: self._replay(steps, sources))
            case Resync():
                self.world.checks.on_given_up(self, may_go_back=action.is_choice)
                self.is_frozen, self.opened, self.held = True, None, None
                self._start(options.resync_s, lambda: self._resync(action))
            case NewLineage():
                self._rename(action)
            case BitsChanged(round_id, done):
                self.process.pipeline.note_done(round_id, done)
            case Left():
                self.has_left = True
                later(0.1, self.process.leave)
            case Report():
                self.reports.append(action)
                if action.trouble is Trouble.FORKED:
                    self.world.forked.add(self.stage)

    def _rename(self, action: NewLineage) -> None:
        """A newer charter starts a new lineage at the very state that we have."""
        held = self.held
        assert held is not None
        generation = self.world.generation_of(action.charter)
        self.held = Held(action.charter, (), generation, held.version, action.lineage, action.round, held.state)

    def _open(self, action: OpenRound) -> None:
        if action.fresh:
            self.entries, self.contribution = [], []
        self.opened, self.is_frozen = action, False
        self.process.pipeline.open_round(self, action)

    def _freeze(self, action: Freeze) -> None:
        self.is_frozen = True
        self.process.pipeline.end_round(self, action.closing.round)
        self.contribution = [*([] if action.replaces else self.contribution), *self.entries]
        self.entries = []

    def _start(self, took_s: float, job: object) -> None:
        self._work += 1
        ticket = self._work
        assert callable(job)
        self.process.later(took_s, lambda: job() if ticket == self._work else None)

    def _apply(self, steps: tuple[CommitStep, ...]) -> None:
        for step in steps:
            self._absorb(step)
        assert self.held is not None
        self.feed(Applied(self.held.lineage, self.held.state))

    def _absorb(self, step: CommitStep) -> None:
        held, commit = self.held, step.commit
        assert held is not None
        assert commit.parent == held.lineage, "applied a commit to another state"
        state = digest(held.state, commit.digest, repr((commit.clip_scale, commit.total_tokens)).encode())
        self.held = Held(
            held.charter,
            (step.signed,),
            held.generation,
            Version(held.version + 1),
            step.lineage,
            RoundId(commit.round + 1),
            state,
        )
        self.logged.add(commit.digest)
        self.world.checks.on_applied(self, step, state)

    def _replay(self, steps: tuple[CommitStep, ...], sources: tuple[PeerId, ...]) -> None:
        if all(self._can_get(step.commit, sources) for step in steps):
            self._apply(steps)
        else:
            self.feed(ApplyFailed(steps[-1].lineage, "nobody has the bytes"))

    def _fetch(self, commit: Commit, sources: tuple[PeerId, ...]) -> None:
        if self._can_get(commit, sources):
            self.staged = {commit.digest}
            self.feed(Fetched(commit.digest, self.world.sums[commit.digest].norm))
        else:
            self.feed(FetchFailed(commit.digest, "nobody has the bytes"))

    def _can_get(self, commit: Commit, sources: tuple[PeerId, ...]) -> bool:
        if commit.digest in self.staged | self.logged:
            return True
        others = [self.world.processes[peer].replicas.get(self.stage) for peer in sources]
        me = self.process.name
        return any(
            other is not None and other.process.answers(me) and commit.digest in other.staged | other.logged
            for other in others
        )

    def _resync(self, action: Resync) -> None:
        """Take the newest state that anybody within reach has; ask again if nobody has any."""
        among = action.sources if action.is_choice else None
        best = self.world.newest_held(self.stage, asker=self.process.name, among=among)
        least = 0 if action.charter is None else self.world.generation_of(action.charter)
        if best is None or best.generation < least:
            self._start(self.world.options.resync_s, lambda: self._resync(action))
            return
        self.held = best
        self.logged |= {self.world.commit_of(signed).digest for signed in best.commits}
        self.feed(Synced(best.charter, best.commits, best.state))
