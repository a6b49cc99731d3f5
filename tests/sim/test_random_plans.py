"""Two hundred random swarms under random plans: kills at random moments of ballots and whatever else is in stock.

The oracle is `tests/sim/checks.py`, plus: afterwards every stage commits two more rounds, all living replicas
of a stage have one state, and nothing was lost. A failure names its seed: `trial(SEED)` repeats it exactly.
"""

from __future__ import annotations

from collections import Counter
from random import Random

import pytest

from protocol.ids import PeerId
from protocol.rounds.member import Standing
from protocol.rounds.settings import KeyNotary
from protocol.rounds.steward import Phase
from protocol.signing import SigningKey
from tests.sim.faults import Kill, Partition, Pause, Restart, Worsen, random_plan, torment
from tests.sim.network import Link
from tests.sim.trial import PAIRS, TRIPLES, commits_of, settle
from tests.sim.world import Options, World

NUM_TRIALS = 200
KILLS = range(100, 240)  # some fifty seeds for each that hits the moment between frozen and pinged
BLOCK = 20
WILD_BLOCK = 40  # about one in twenty forks
SWARMS = (
    PAIRS,
    TRIPLES,
    ((0, 1), (1,), (0,), (1,)),
    ((0,), (0,), (0,), (0,), (1,)),
    ((0,), (1,), (2,), (0, 1, 2), (1, 2)),
)


def overlaps(seed: int) -> bool:
    """Every other swarm averages one round while the next one computes."""
    return seed % 2 == 1


def trial(seed: int) -> World:
    """Eight seconds of trouble, then peace; at least one more round of every stage has to be committed."""
    rng = Random(seed)
    options = Options(spans=rng.choice(SWARMS), hosts_refuse=rng.random() < 0.5, overlap=overlaps(seed))
    world = World(seed, options)
    ends_s = torment(world, random_plan(rng, world, until_s=8.0, num_faults=8))
    world.run(max(8.0, ends_s) + 0.01)
    world.run_rounds(2, within_s=60.0)
    settle(world)
    assert world.checks.num_lost() == 0
    return world


@pytest.mark.slow
@pytest.mark.parametrize("first", range(0, NUM_TRIALS, BLOCK))
def test_random_plans_end_in_one_lineage(first: int) -> None:
    """Every phase of a round must have been hit by deaths, or the plans are too tame."""
    deaths: Counter[str] = Counter()
    for seed in range(first, first + BLOCK):
        try:
            deaths += trial(seed).checks.phases_at_death
        except AssertionError as error:
            raise AssertionError(f"seed {seed}: {error}") from error
    assert {"open", "frozen"} <= set(deaths)


def kill_trial(seed: int) -> str:
    """Kill and replace one peer at a moment that is uniform over two rounds; return the phase that it hit."""
    rng = Random(seed)
    world = World(seed, Options(spans=TRIPLES, overlap=overlaps(seed)))
    world.run_rounds(2, within_s=60.0)
    world.run(rng.uniform(0.0, world.run_rounds(2, within_s=60.0)))
    victim = rng.choice(sorted(world.processes))
    replicas = [r for process in world.processes.values() for r in process.replicas.values()]
    stages = world.processes[victim].replicas.keys()
    standings = {r.machine.statistics().standing for r in replicas if r.stage in stages}
    phases = {r.machine.statistics().phase for r in replicas if r.stage in stages} - {Phase.IDLE}
    torment(world, [Kill(victim, 0.0), Restart(victim, rng.uniform(0.5, 3.0))])
    world.run_rounds(2, within_s=60.0)
    settle(world)
    assert world.checks.num_lost() == 0
    standing = max(standings, key=list(Standing).index)
    return str(max(phases, key=list(Phase).index).value if phases else standing.value)


@pytest.mark.slow
def test_kills_at_any_moment_of_two_rounds_hit_every_phase() -> None:
    hit: Counter[str] = Counter()
    for seed in KILLS:
        try:
            hit[kill_trial(seed)] += 1
        except AssertionError as error:
            raise AssertionError(f"seed {seed}: {error}") from error
    print(f"kills by phase, {KILLS}: {dict(hit)}")
    assert {"open", "frozen", "pinging", "reducing", "proposing"} <= set(hit)


def wild_trial(seed: int) -> bool:
    """As above, but with cuts and stops that may last for half a minute; return whether a stage forked."""
    rng = Random(seed)
    options = Options(
        spans=rng.choice(SWARMS), hosts_refuse=rng.random() < 0.5, allow_forks=True, overlap=overlaps(seed)
    )
    world = World(seed, options)
    world.coordinator.settles_forks = True
    names = sorted(world.processes)
    plan = list(random_plan(rng, world, until_s=8.0, num_faults=4))
    for _ in range(3):
        at_s, for_s = rng.uniform(0.1, 6.0), rng.uniform(6.0, 30.0)
        group = tuple(rng.sample(names, rng.randint(1, len(names) - 1)))
        worse = Worsen(at_s, for_s, loss=0.4, duplicates=0.2, jitter_s=2.0)
        plan.append(rng.choice((Partition(group, at_s, for_s), Pause(rng.choice(names), at_s, for_s), worse)))
    world.run(torment(world, plan) + 0.01)
    forked = bool(world.checks.forks())
    world.run_rounds(2, within_s=120.0)
    settle(world, within_s=120.0)
    assert not world.checks.forks()
    return forked


@pytest.mark.slow
@pytest.mark.parametrize("first", range(0, 2 * WILD_BLOCK, WILD_BLOCK))
def test_torn_swarms_are_one_again_afterwards(first: int) -> None:
    """Forks are allowed here; they must be noticed and ended. Some must occur, or the plans are too tame."""
    assert sum(wild_trial(seed) for seed in range(first, first + WILD_BLOCK)) > 0


@pytest.mark.slow
def test_forty_eight_peers_survive_a_death_every_second() -> None:
    """Six stages of eight; a random peer dies each second for twenty and is replaced at once."""
    spans = tuple((index % 6,) for index in range(48))
    world = World(7, Options(spans=spans, num_train=48, link=Link(loss=0.01, duplicates=0.01)))
    names = list(world.processes)
    plan: list[Kill | Restart] = []
    for second in range(20):
        peer = str(world.rng.choice(names))
        plan += [Kill(peer, second + 0.3), Restart(peer, second + 0.8)]
    world.run(torment(world, plan))
    world.run_rounds(2, within_s=60.0)
    settle(world)
    assert world.checks.num_lost() == 0
    world.run_until(lambda: len(commits_of(world, 3)[-1].contributors) == 8, within_s=60.0)


def test_real_signatures_and_real_bytes_make_no_difference() -> None:
    """Ed25519 keys, every message encoded and decoded: the same machines commit, lose a peer, and go on."""
    keys = [SigningKey(bytes([number]) * 32) for number in range(5)]
    by_name = {key.peer_id: KeyNotary(key) for key in keys}
    world = World(
        1,
        Options(spans=PAIRS, through_wire=True),
        notaries=by_name.__getitem__,
        names=[key.peer_id for key in keys[:4]],
        coordinator=keys[4].peer_id,
    )
    victim = PeerId(keys[3].peer_id)
    torment(world, [Kill(victim, 2.0), Restart(victim, 3.0)])
    world.run_until(lambda: any(commit.joiners for commit in commits_of(world, 1)), within_s=40.0)
    settle(world)


def test_the_same_seed_gives_the_same_run() -> None:
    """Otherwise a seed in a failure message is worth nothing. Oracle: all lineages and the number of messages."""
    first, second = trial(11), trial(11)
    assert first.checks.commits.keys() == second.checks.commits.keys()
    assert first.network.num_sent == second.network.num_sent
