"""A simulated coordinator: founds the run, keeps checkpoints, restores stages that have died out.

Owns: charters. It is on no path of a round: `kill` it, and rounds go on; only a stage without any member has
to wait for it.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from coordinator.forks import Branch, branches, have_met, settle
from coordinator.store.tree import CommitLink
from protocol.ids import Lineage, PeerId, RoundId, StageId, Version, digest
from protocol.rounds import Chain, Standing
from protocol.rounds.events import Received, Rejoin
from protocol.rounds.messages import (
    CHARTER_CONTEXT,
    Charter,
    CharterNotice,
    Seat,
)
from protocol.signing import Signed
from tests.sim.replica import Held, Replica

if TYPE_CHECKING:
    from tests.sim.world import World

LOOK_EVERY_S = 1.0


class Coordinator:
    """The organiser's process."""

    def __init__(self, world: World, name: PeerId) -> None:
        self.name = name
        self.alive = True
        self.issues_charters_for_forks = self.settles_forks = False
        self.given_up: set[Lineage] = set()
        self.kept: dict[StageId, Held] = {}
        self.charters: dict[StageId, Signed] = {}
        self._world = world
        self._dead_since_s: dict[StageId, float] = {}
        world.at(LOOK_EVERY_S, self._look)

    def found_run(self) -> None:
        """Write the first charter of every stage; its members hold the initial state already."""
        world = self._world
        for stage in world.stages:
            state = digest(b"initial", str(stage).encode())
            names = world.hosts(stage)[: world.options.num_founders]
            seats = tuple(Seat(peer=name, session=world.processes[name].session) for name in names)
            self.kept[stage] = self.charter(stage, seats, Version(0), state, RoundId(0))
            for name in world.hosts(stage):
                self._tell(world.processes[name].replicas[stage])

    def charter(
        self, stage: StageId, seats: tuple[Seat, ...], version: Version, state: bytes, round_id: RoundId
    ) -> Held:
        """Sign a new charter, one generation up."""
        world = self._world
        before = self.charters.get(stage)
        charter = Charter.model_validate(
            {
                "run": world.settings_for(stage, seats[0]).run,
                "stage": stage,
                "generation": 1 + (world.generation_of(before) if before is not None else 0),
                "round": round_id,
                "version": version,
                "state_digest": state,
                "seats": seats,
            }
        )
        signed = world.notary_of(self.name).seal(CHARTER_CONTEXT, charter)
        self.charters[stage] = signed
        root = Chain.of_charter(world.settings_for(stage, seats[0]), signed).head
        return Held(signed, (), charter.generation, version, root.lineage, round_id, charter.state_digest)

    def _tell(self, replica: Replica) -> None:
        replica.feed(Received(self.name, CharterNotice(stage=replica.stage, charter=self.charters[replica.stage])))

    def _look(self) -> None:
        """Once a second: take copies, tell newcomers their charter, restore what has died, end forks."""
        self._world.at(LOOK_EVERY_S, self._look)
        if not self.alive:
            return
        for stage in self._world.stages:
            replicas = self._reachable(stage)
            self._keep_copy(stage, replicas)
            for replica in replicas:
                self._tell(replica)
            if self.issues_charters_for_forks and stage in self._world.forked:
                self._end_fork(stage, replicas)
            else:
                self._restore_if_dead(stage, replicas)
        if self.settles_forks:
            self._settle_forks()

    def _reachable(self, stage: StageId) -> list[Replica]:
        world = self._world
        return [
            process.replicas[stage]
            for process in world.processes.values()
            if stage in process.replicas and process.answers(self.name)
        ]

    def _keep_copy(self, stage: StageId, replicas: list[Replica]) -> None:
        for replica in replicas:
            held, kept = replica.held, self.kept[stage]
            if held is not None and (held.generation, held.version) > (kept.generation, kept.version):
                self.kept[stage] = held

    def _restore_if_dead(self, stage: StageId, replicas: list[Replica]) -> None:
        """No member able to work for a while: the newest state at hand becomes a new beginning."""
        world = self._world
        working = (Standing.OPEN, Standing.FROZEN)
        if not replicas or any(each.machine.statistics().standing in working for each in replicas):
            self._dead_since_s.pop(stage, None)
            return
        since_s = self._dead_since_s.setdefault(stage, world.now_s)
        if world.now_s - since_s < world.options.restore_after_s:
            return
        del self._dead_since_s[stage]
        states = [each.held for each in replicas if each.held is not None]
        best = max([*states, self.kept[stage]], key=lambda held: (held.generation, held.version))
        others = [each.machine.statistics() for other in world.stages for each in self._reachable(other)]
        rounds = [each.round for each in others if each.standing in working and each.round is not None]
        round_id = RoundId(max([best.next_round, *rounds]))  # over already, perhaps: the others will say so
        self._restart(stage, replicas[:1], best, round_id)

    def _end_fork(self, stage: StageId, replicas: list[Replica]) -> None:
        """Two lineages: the one with more replicas goes on, the others join it anew."""
        branches: dict[bytes, list[Replica]] = {}
        for replica in replicas:
            if replica.held is not None:
                branches.setdefault(replica.held.lineage, []).append(replica)
        if not branches:
            return
        winners = max(branches.values(), key=lambda group: (len(group), group[0].held.version if group[0].held else 0))
        best = winners[0].held
        assert best is not None
        self._world.forked.discard(stage)
        self._restart(stage, winners, best, best.next_round)

    def _settle_forks(self) -> None:
        """Let one half go on and tell the other: the real choice, among commits that have been reported at once."""
        here = {stage: self._reachable(stage) for stage in self._world.stages}
        found = {stage: self._branches(stage, replicas) for stage, replicas in here.items()}
        rivals = {
            stage: [(each.process.name, each.machine.rival) for each in replicas if each.machine.rival is not None]
            for stage, replicas in here.items()
        }
        if any(have_met(found[stage], met) for stage, met in rivals.items()):
            settlement = settle(found, most_tokens=1 << 30)
            assert settlement is not None, "nobody meets anybody in a swarm that is whole"
            self.given_up |= {link.lineage for links in settlement.given_up.values() for link in links}
        for stage, replicas in here.items():
            held = {replica: replica.held.lineage for replica in replicas if replica.held is not None}
            lost = [replica for replica, lineage in held.items() if self._is_given_up(stage, lineage)]
            sources = tuple(replica.process.name for replica in held if replica not in lost)
            for replica in lost:
                replica.feed(Rejoin(held[replica], sources))

    def _branches(self, stage: StageId, replicas: list[Replica]) -> tuple[Branch, ...]:
        standing = {
            each.process.name: each.held.lineage
            for each in replicas
            if each.held is not None and each.machine.statistics().num_members
            if each.held.generation == self._world.generation_of(self.charters[stage])
            if not self._is_given_up(stage, each.held.lineage)
        }
        whole = {tip: self._path(stage, tip) for tip in set(standing.values())}
        shared = set.intersection(*({link.lineage for link in path} for path in whole.values())) if whole else set()
        paths = {tip: [link for link in path if link.lineage not in shared] for tip, path in whole.items()}
        found = branches(stage, paths, standing)
        return found if len(found) > 1 else tuple(replace(one, links=tuple(whole[one.tip])) for one in found)

    def _path(self, stage: StageId, tip: Lineage) -> list[CommitLink]:
        """Return the commits that led to a place, newest first."""
        path = []
        while (commit := self._world.checks.commits.get((stage, tip))) is not None:
            link = CommitLink(
                stage=stage,
                round=commit.round,
                version=commit.version,
                lineage=tip,
                parent=commit.parent,
                closing=(commit.summary.closing_digest, commit.summary.clock),
                tokens=commit.total_tokens,
                members=1,
                takers=1,
            )
            path.append(link)
            tip = commit.parent
        return path

    def _is_given_up(self, stage: StageId, lineage: Lineage) -> bool:
        return not self.given_up.isdisjoint({lineage, *(link.lineage for link in self._path(stage, lineage))})

    def _restart(self, stage: StageId, founders: list[Replica], best: Held, round_id: RoundId) -> None:
        seats = tuple(Seat(peer=each.process.name, session=each.process.session) for each in founders)
        self.kept[stage] = self.charter(stage, seats, best.version, best.state, round_id)
