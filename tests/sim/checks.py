"""What must hold at every moment, whatever fails: checked on every event, action and application.

Owns: the books of the whole swarm, which no peer has. A broken promise raises at once, with the time.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING

from protocol.ids import Digest, Lineage, PeerId, RoundId, StageId
from protocol.rounds.events import Action, CommitStep, Freeze, OpenRound, Send, StartReduce
from protocol.rounds.messages import Accept, Ballot, Closing, Commit, Pong

if TYPE_CHECKING:
    from tests.sim.pipeline import Task
    from tests.sim.replica import Replica
    from tests.sim.world import World


@dataclass(slots=True)
class Life:
    """What one replica has shown in one life."""

    generation: int = 0
    version: int = -1
    promised: dict[Lineage, Ballot] | None = None


class Checks:
    """The invariants."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._lives: dict[tuple[PeerId, StageId, int], Life] = {}
        self._states: dict[tuple[StageId, Lineage], Digest] = {}
        self.appliers: dict[tuple[StageId, Lineage], dict[Lineage, set[tuple[PeerId, int]]]] = defaultdict(
            lambda: defaultdict(set)
        )
        self.commits: dict[tuple[StageId, Lineage], Commit] = {}
        self.closings: dict[RoundId, list[Closing]] = defaultdict(list)
        self.done: dict[RoundId, set[int]] = defaultdict(set)
        self.phases_at_death: Counter[str] = Counter()

    # -- as it happens -----------------------------------------------------------------------------

    def on_action(self, replica: Replica, action: Action) -> None:
        """Look at what a machine wants to do."""
        match action:
            case Send(message=Pong() | Accept() as answer):
                self._promise_only_grows(replica, answer)
            case Freeze(closing):
                self._closing_is_true(closing)
            case OpenRound():
                self._opens_where_it_stands(replica, action)
            case StartReduce(group=group, round=round_id):
                mine = {each.peer: each.tokens for each in group}[replica.process.name]
                assert not replica.takes(round_id), "reduced while tasks were still taken"
                assert mine == replica.tokens, "reduced another amount than announced"

    def on_applied(self, replica: Replica, step: CommitStep, state: Digest) -> None:
        """A commit has been applied: versions only grow, equal lineages mean equal states, and no fork."""
        life = self._life(replica)
        held = replica.held
        assert held is not None
        assert (held.generation, held.version) > (life.generation, life.version), "a version came back"
        life.generation, life.version = held.generation, held.version
        known = self._states.setdefault((replica.stage, step.lineage), state)
        assert known == state, "one lineage, two states"
        parent = (replica.stage, step.commit.parent)
        self.appliers[parent][step.lineage].add((replica.process.name, replica.process.session))
        self.commits.setdefault((replica.stage, step.lineage), step.commit)
        self._commit_is_true(replica.stage, step.commit)
        if not self._world.options.allow_forks:
            assert len(self._living(parent)) <= 1, self._fork_message(parent)

    def on_given_up(self, replica: Replica, *, may_go_back: bool) -> None:
        """It fetches its state anew: it no longer stands by what it applied."""
        if may_go_back:
            self._life(replica).version = -1
        for (stage, _), successors in self.appliers.items():
            if stage == replica.stage:
                for lives in successors.values():
                    lives.discard((replica.process.name, replica.process.session))

    def on_done(self, task: Task) -> None:
        """A feeder holds the last stage's answer."""
        self.done[task.round].add(task.number)

    def on_death(self, stage: StageId, replica: Replica) -> None:
        """Remember in which phase replicas died, so that a test can claim to have hit them all."""
        self.phases_at_death[f"{replica.machine.statistics().standing.value}"] += 1

    # -- afterwards --------------------------------------------------------------------------------

    def forks(self) -> list[tuple[StageId, Lineage]]:
        """Return the places where replicas that are alive now once took different commits."""
        return [parent for parent in self.appliers if len(self._living(parent)) > 1]

    def num_lost(self) -> int:
        """Return the numbers that the closings in the stage-0 commits call lost."""
        return sum(commit.summary.tasks_lost for (stage, _), commit in self.commits.items() if stage == 0)

    def total(self, figure: str) -> int:
        """Add up one figure over all commits."""
        return sum(int(getattr(commit, figure)) for commit in self.commits.values())

    # -- rules -------------------------------------------------------------------------------------

    @staticmethod
    def _credited(stage: StageId, closing: Closing) -> int:
        return sum(credit.tokens for credit in closing.credits if credit.stage == stage)

    def _life(self, replica: Replica) -> Life:
        key = (replica.process.name, replica.stage, replica.process.session)
        return self._lives.setdefault(key, Life())

    def _living(self, parent: tuple[StageId, Lineage]) -> list[Lineage]:
        """Return the successors of a lineage that some life still going on has applied and not given up."""
        stage = parent[0]
        return [
            lineage
            for lineage, lives in self.appliers[parent].items()
            if any(self._still_holds(stage, lineage, life) for life in lives)
        ]

    def _still_holds(self, stage: StageId, lineage: Lineage, life: tuple[PeerId, int]) -> bool:
        process = self._world.processes[life[0]]
        replica = process.replicas.get(stage)
        if not process.alive or process.session != life[1] or replica is None or replica.held is None:
            return False
        return replica.held.generation == self.commits[stage, lineage].generation

    def _fork_message(self, parent: tuple[StageId, Lineage]) -> str:
        sides = {lineage.hex()[:6]: sorted(who) for lineage, who in self.appliers[parent].items()}
        return f"stage {parent[0]} has forked at {self._world.now_s:.2f} s: {sides}"

    def _promise_only_grows(self, replica: Replica, answer: Pong | Accept) -> None:
        life = self._life(replica)
        promised = life.promised if life.promised is not None else {}
        before = promised.get(answer.parent)
        assert before is None or not before.outranks(answer.ballot), "answered an older ballot"
        life.promised = {answer.parent: answer.ballot, **{k: v for k, v in promised.items() if k != answer.parent}}

    def _closing_is_true(self, closing: Closing) -> None:
        """Bits need proof, and only the deadline may leave one out."""
        done = {number for number in range(closing.num_train + closing.num_eval) if closing.bits >> number & 1}
        assert done <= self.done[closing.round], "a closing claims what nobody has finished"
        if closing not in self.closings[closing.round]:
            self.closings[closing.round].append(closing)

    def _opens_where_it_stands(self, replica: Replica, opened: OpenRound) -> None:
        held = replica.held
        assert held is not None
        assert (opened.lineage, opened.version) == (held.lineage, held.version), "opened another version"

    def _commit_is_true(self, stage: StageId, commit: Commit) -> None:
        """What counts is what was really summed and is credited, of the rounds that the commit covers."""
        total = self._world.sums[commit.digest]
        sums = {peer: self._world.claim_of(peer, entries) for peer, entries in total.parts}
        assert sums == {each.peer: each.tokens for each in commit.contributors}, "the tokens are not the sums"
        assert sum(each.weight for each in commit.contributors) == commit.total_tokens
        if commit.first_round == commit.round:  # of several, a closing may never have been heard
            most = max(self._credited(stage, closing) for closing in self.closings[commit.round])
            assert 0 < commit.total_tokens <= most, "more counts than was credited"
        for _, entries in total.parts:
            rounds = {round_id for round_id, _, _ in entries}
            assert all(commit.first_round <= round_id <= commit.round for round_id in rounds), "foreign work in a sum"
