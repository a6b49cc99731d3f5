"""One trial: a swarm, a plan, and the claim that it goes on afterwards.

Owns: the shape that all simulator tests share.
"""

from __future__ import annotations

from typing import Any

from protocol.ids import StageId
from protocol.rounds.events import Report, Trouble
from protocol.rounds.messages import Commit
from tests.sim.faults import Plan, torment
from tests.sim.world import Options, World

SEEDS = (1, 2, 3)
PAIRS = ((0,), (0,), (1,), (1,))
"""Two stages of two replicas."""
TRIPLES = ((0,), (0,), (0,), (1,), (1,), (1,))


def suffer(seed: int, plan: Plan, *, rounds: int = 3, within_s: float = 60.0, **options: Any) -> World:
    """Run a plan to its end, then `rounds` more rounds at every stage. All invariants are checked on the way."""
    world = World(seed, Options(**{"spans": PAIRS, **options}))
    ends_s = torment(world, plan)
    world.run(ends_s + 0.01)
    world.run_rounds(rounds, within_s=within_s)
    return world


def settle(world: World, *, within_s: float = 40.0) -> None:
    """Wait until all living replicas of each stage stand at one lineage, with one state."""
    world.run_until(lambda: all(len(world.states(stage)) == 1 for stage in world.stages), within_s=within_s)


def commits_of(world: World, stage: int) -> list[Commit]:
    """Return the commits of a stage that anybody applied, in the order of their rounds."""
    return sorted((c for (s, _), c in world.checks.commits.items() if s == stage), key=lambda commit: commit.round)


def commit_of_round(world: World, stage: int, round_id: int) -> Commit:
    """Return the one commit that covers a round."""
    (commit,) = [c for c in commits_of(world, stage) if c.first_round <= round_id <= c.round]
    return commit


def reports(world: World, trouble: Trouble) -> list[Report]:
    """Return what living replicas have reported of one kind."""
    replicas = [replica for process in world.processes.values() for replica in process.replicas.values()]
    return [report for replica in replicas for report in replica.reports if report.trouble is trouble]


def steward_of_next_round(world: World, stage: int) -> str:
    """Return who will conduct the round that is open now: the first in order of the present members."""
    members = [replica.machine for replica in _replicas(world, stage)]
    orders = {machine.conductors for machine in members if machine.conductors}
    (order,) = orders
    return str(order[0])


def _replicas(world: World, stage: int) -> list[Any]:
    hosted = [process.replicas.get(StageId(stage)) for process in world.processes.values()]
    return [replica for replica in hosted if replica is not None]
