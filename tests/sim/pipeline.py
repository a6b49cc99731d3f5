"""A coarse model of the pipeline at one process: it feeds numbers, and takes hops from others.

Owns: nested hops with slots, waves, resumption and re-sending, as design section 5 describes them, with the
time of a task as a number. It exists to give the round machine realistic work and realistic accidents; the
pipeline itself is tested where it lives. The switches in `PipelineRules` turn single rules off, to show what
they are for.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from protocol.ids import PeerId, RoundId, StageId, Version
from protocol.ownership import candidates, owners
from protocol.rounds.events import OpenRound, TaskDone
from protocol.rounds.messages import Credit, DoneTask

if TYPE_CHECKING:
    from tests.sim.process import Process
    from tests.sim.replica import Replica

LOOK_EVERY_S = 0.5  # how often a waiting caller looks at its callee


@dataclass(frozen=True, slots=True, kw_only=True)
class PipelineRules:
    """The rules of a hop, and the means to break them."""

    width: int = 4
    """Numbers that one feeder has in flight."""
    slots: int = 16
    run_through: bool = True
    """A task that enters a span stays on that peer to its end, in one slot."""
    resume: bool = True
    """A broken stream is resumed with the same peer."""
    hop_silence_s: float = 1.5
    takeover_s: float = 3.0
    """A feeder that is done takes other people's numbers after they have stood still for so long."""
    wave: int = 1
    wave_wait_s: float = 0.2


@dataclass(slots=True, eq=False)
class Task:
    """One attempt of a feeder to get one number done."""

    feeder: Process
    feeder_session: int
    round: RoundId
    number: int
    tokens: int
    carries_gradient: bool
    num_sent: int = 0
    versions: dict[tuple[StageId, PeerId], Version] = field(default_factory=dict)
    path: dict[StageId, PeerId] = field(default_factory=dict)
    over: bool = False


@dataclass(slots=True, eq=False)
class Hop:
    """A caller waiting for a callee."""

    task: Task
    caller: Process
    caller_session: int
    callee: Process
    callee_session: int
    first: StageId
    last: StageId
    on_answer: Callable[[], None]
    again: Callable[[], None]
    """Sends the task to another replica."""
    given_up: bool = False
    answered: bool = False
    bad_since_s: float | None = None


class Pipeline:
    """The hops and the feeding of one process, in one life."""

    def __init__(self, process: Process) -> None:
        self._process = process
        self._world = process.world
        self._rules = process.world.options.pipeline
        self._opened: OpenRound | None = None
        self._done = 0
        self._moved_s: dict[PeerId, float] = {}
        self._flying: dict[int, Task] = {}
        self._owners: dict[int, PeerId] = {}
        self._slots = self._rules.slots
        self._wave: list[tuple[float, Callable[[], None]]] = []
        self._life = 0
        self.hops: set[Hop] = set()
        self.num_sent = 0

    # -- feeding -----------------------------------------------------------------------------------

    def open_round(self, replica: Replica, opened: OpenRound) -> None:
        """Stage 0: begin with our own numbers. What belongs to another opening, frozen or not, is over."""
        self.end_round(replica, opened.round)
        if replica.stage != 0:
            return
        size = self._world.rules.size_of(opened.round)
        numbers = range(size.num_train + size.num_eval)
        self._owners = owners(f"{opened.round}", numbers, dict.fromkeys(opened.members, 1.0))
        self._opened, self._done, self._flying = opened, 0, {}
        self._moved_s = dict.fromkeys(opened.members, self._world.now_s)
        self._life += 1
        life = self._life
        self._feed(life)

    def end_round(self, replica: Replica, round_id: RoundId) -> None:
        """The round is over at one of our stages: what is still on its way is dropped."""
        if replica.stage == 0:
            self._opened = None
            for task in self._flying.values():
                task.over = True
        for hop in [hop for hop in self.hops if hop.task.round <= round_id and hop.task.over]:
            self._drop(hop)

    def note_done(self, round_id: RoundId, done: int) -> None:
        """Somebody's numbers have moved."""
        if self._opened is None or self._opened.round != round_id:
            return
        changed = done ^ self._done
        self._done = done
        for number, owner in self._owners.items():
            if changed >> number & 1:
                self._moved_s[owner] = self._world.now_s

    def _feed(self, life: int) -> None:
        """Keep the window full: own numbers first, then others' that stand still, oldest first."""
        opened = self._opened
        if opened is None or life != self._life:
            return
        now_s = self._world.now_s
        free = [number for number in self._owners if not self._done >> number & 1 and number not in self._flying]
        mine = [number for number in free if self._owners[number] == self._process.name]
        stuck_s = self._rules.takeover_s
        others = [number for number in free if now_s - self._moved_s[self._owners[number]] > stuck_s]
        for number in [*mine, *others][: max(0, self._rules.width - len(self._flying))]:
            self._start(opened, number)
        self._process.later(LOOK_EVERY_S / 2, lambda: self._feed(life))

    def _start(self, opened: OpenRound, number: int) -> None:
        size = self._world.rules.size_of(opened.round)
        process = self._process
        task = Task(
            process, process.session, opened.round, number, self._world.tokens_of(number), number < size.num_train
        )
        self._flying[number] = task
        self.call(task, StageId(0), lambda: self._finish(task))

    def _finish(self, task: Task) -> None:
        self._flying.pop(task.number, None)
        if task.over:
            return
        self._world.checks.on_done(task)
        credits = tuple(Credit(stage=stage, peer=peer, tokens=task.tokens) for stage, peer in sorted(task.path.items()))
        done = DoneTask(
            number=task.number,
            evidence=self._world.evidence_of(task.round, task.number),
            loss_sum=float(task.tokens),
            target_tokens=task.tokens,
            credits=credits,
        )
        self._process.replicas[StageId(0)].feed(TaskDone(task.round, done))

    # -- calling -----------------------------------------------------------------------------------

    def call(self, task: Task, stage: StageId, on_answer: Callable[[], None], tries: int = 0) -> None:
        """Find a replica of `stage` for a task, and wait for its answer. BUSY and dead ones cost a moment."""
        if task.over or self._world.is_over(task):
            self._flying.pop(task.number, None)
            return
        order = candidates(f"{task.round}", task.number, stage, dict.fromkeys(self._world.hosts(stage), 1.0))
        name = order[tries % len(order)]
        if self._process.name in order and tries == 0 and stage == 0:
            name = self._process.name  # a feeder starts at home if it can
        callee = self._world.processes[name]
        task.num_sent += 1
        self.num_sent += 1

        def again() -> None:
            self.call(task, stage, on_answer, tries + 1)

        if not self._world.network.connects(self._process.name, name) or not callee.alive:
            self._process.later(0.2, again)
            return
        delay_s = next(self._world.network.fates(self._process.name, name, "OpenTask"), None)
        if delay_s is None or callee.paused:
            self._process.later(0.5, again)
            return
        if not callee.pipeline.accepts(task, stage):
            self._process.later(0.15, again)
            return
        session = self._process.session
        hop = Hop(task, self._process, session, callee, callee.session, stage, stage, on_answer, again)
        callee.later(delay_s, lambda: callee.pipeline.serve(hop))
        self._watch(hop)

    def _watch(self, hop: Hop) -> None:
        """Look at the callee now and then; send the task elsewhere when it cannot be reached any more."""
        if hop.answered or hop.given_up:
            return
        callee = hop.callee
        bad = (
            not callee.alive
            or callee.session != hop.callee_session
            or callee.paused
            or not self._world.network.connects(hop.caller.name, callee.name)
        )
        now_s = self._world.now_s
        hop.bad_since_s = (hop.bad_since_s if hop.bad_since_s is not None else now_s) if bad else None
        if hop.bad_since_s is not None and now_s - hop.bad_since_s >= self._rules.hop_silence_s:
            self.give_up(hop)
            return
        self._process.later(LOOK_EVERY_S, lambda: self._watch(hop))

    def give_up(self, hop: Hop) -> None:
        """Send the task to another replica; whatever the callee does with it is work done twice."""
        if not hop.answered and not hop.given_up:
            hop.given_up = True
            self._world.num_resent += 1
            hop.again()

    # -- serving -----------------------------------------------------------------------------------

    def accepts(self, task: Task, stage: StageId) -> bool:
        """Promise a slot, or say BUSY."""
        replica = self._process.replicas.get(stage)
        if self._slots <= 0 or replica is None or not replica.takes(task.round):
            return False
        self._slots -= 1
        return True

    def serve(self, hop: Hop) -> None:
        """Forward through our span; then onwards, or the loss."""
        self.hops.add(hop)
        self._forward(hop)

    def _forward(self, hop: Hop) -> None:
        """Pass one stage of ours; remember at which version."""
        opened = self._process.replicas[hop.last].opened
        hop.task.versions[hop.last, self._process.name] = opened.version if opened is not None else Version(-1)
        self._compute(hop, lambda: self._after_forward(hop))

    def _compute(self, hop: Hop, then: Callable[[], None]) -> None:
        """Spend the time of a task; tasks start in waves if the run says so."""
        took_s = self._world.task_s(self._process.name)
        self._wave.append((self._world.now_s, lambda: self._process.later(took_s, then)))
        if len(self._wave) >= self._rules.wave:
            self._start_wave()
        elif self._rules.wave_wait_s < float("inf"):
            self._process.later(self._rules.wave_wait_s, self._start_late_wave)

    def _start_late_wave(self) -> None:
        if self._wave and self._world.now_s - self._wave[0][0] >= self._rules.wave_wait_s - 1e-9:
            self._start_wave()

    def _start_wave(self) -> None:
        wave, self._wave = self._wave, []
        for _, start in wave:
            start()

    def _after_forward(self, hop: Hop) -> None:
        if hop not in self.hops:
            return
        if hop.last == self._world.last_stage:
            self._backward(hop)
            return
        following = StageId(hop.last + 1)
        ours = self._process.replicas.get(following)
        if ours is not None and self._rules.run_through and ours.machine.statistics().round is not None:
            if ours.takes(hop.task.round):
                hop.last = following
                self._forward(hop)
            elif not hop.task.over and not self._world.is_over(
                hop.task
            ):  # not open yet: nobody else's slot is taken while we wait for ourselves
                self._process.later(0.1, lambda: self._after_forward(hop))
        else:
            self.call(hop.task, following, lambda: self._backward(hop))

    def _backward(self, hop: Hop) -> None:
        if hop in self.hops:
            self._compute(hop, lambda: self._accumulate(hop))

    def _accumulate(self, hop: Hop) -> None:
        """Add the gradients of our stages, then answer; or drop it all if the round has ended here."""
        task, name = hop.task, self._process.name
        for each in range(hop.last, hop.first - 1, -1):
            stage = StageId(each)
            replica = self._process.replicas[stage]
            version = task.versions[stage, name]
            opened = replica.opened
            if opened is None or opened.version != version or not replica.takes(task.round):
                self._refuse(hop)
                return
            if task.carries_gradient:
                replica.accumulate(task.round, version, task.number, task.tokens)
        self._answer(hop)

    def _refuse(self, hop: Hop) -> None:
        """The round, or the state that the forward pass used, is no more: the caller may try elsewhere."""
        self._drop(hop)
        caller = hop.caller
        if caller.alive and caller.session == hop.caller_session:
            caller.later(self._world.network.link.delay_s, lambda: caller.pipeline.give_up(hop))

    def _answer(self, hop: Hop) -> None:
        """Hand the gradient back. The caller may be gone, or out of reach for a while: then it resumes."""
        caller = hop.caller
        if hop.given_up or not caller.alive or caller.session != hop.caller_session:
            self._drop(hop)
            return
        if not self._world.network.connects(self._process.name, caller.name) or caller.paused:
            self._process.later(LOOK_EVERY_S, lambda: self._answer(hop))
            return
        self._drop(hop)
        name = self._process.name

        def deliver() -> None:
            if hop.given_up or hop.answered:
                return
            hop.answered = True
            hop.task.path.update({StageId(each): name for each in range(hop.first, hop.last + 1)})
            hop.on_answer()

        delay_s = self._world.network.link.delay_s
        caller.later(delay_s, deliver)

    def _drop(self, hop: Hop) -> None:
        if hop in self.hops:
            self.hops.discard(hop)
            self._slots += 1
