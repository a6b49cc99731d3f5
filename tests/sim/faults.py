"""Declarative fault plans: what goes wrong, when, and with whom.

Owns: the vocabulary. `torment(world, plan)` schedules a plan; `random_plan` makes one from a seed. Times are
virtual seconds from the start.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from random import Random

from protocol.ids import PeerId, StageId
from tests.sim.network import Cut
from tests.sim.world import World


@dataclass(frozen=True, slots=True)
class Kill:
    """SIGKILL."""

    peer: str
    at_s: float


@dataclass(frozen=True, slots=True)
class Restart:
    """A new life under the same identity; joins like anybody else."""

    peer: str
    at_s: float


@dataclass(frozen=True, slots=True)
class Leave:
    """Ctrl-C."""

    peer: str
    at_s: float


@dataclass(frozen=True, slots=True)
class Ban:
    """Nobody has anything to do with it any more, from when they hear of that: each at another moment. It ends then."""

    peer: str
    at_s: float
    heard_within_s: float = 0.5


@dataclass(frozen=True, slots=True)
class Pause:
    """SIGSTOP, then SIGCONT."""

    peer: str
    at_s: float
    for_s: float


@dataclass(frozen=True, slots=True)
class Partition:
    """Two groups that do not hear each other; `one_way`: only the second does not hear the first."""

    group: tuple[str, ...]
    at_s: float
    for_s: float
    one_way: bool = False


@dataclass(frozen=True, slots=True)
class Slow:
    """Computes so many times slower, from then on."""

    peer: str
    factor: float
    at_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Worsen:
    """The whole network loses, duplicates and delays more, for a while."""

    at_s: float
    for_s: float
    loss: float = 0.0
    duplicates: float = 0.0
    jitter_s: float = 0.03


@dataclass(frozen=True, slots=True)
class DropKind:
    """Messages of one class get lost with this probability, for a while."""

    kind: str
    at_s: float
    for_s: float
    loss: float = 1.0


@dataclass(frozen=True, slots=True)
class FailReduces:
    """The next so many ends of reduces are failures."""

    at_s: float
    count: int


@dataclass(frozen=True, slots=True)
class BreakLink:
    """Two peers cannot sum with each other, though they talk."""

    one: str
    other: str
    at_s: float = 0.0


@dataclass(frozen=True, slots=True)
class CutStreams:
    """All streams between a peer and others break once (a relay's limit, a reset)."""

    peer: str
    at_s: float


@dataclass(frozen=True, slots=True)
class CoordinatorAway:
    """The coordinator is gone for a while."""

    at_s: float
    for_s: float


@dataclass(frozen=True, slots=True)
class When:
    """A fault that begins with the `count`-th message of a kind, before that message is on its way.

    In the fault "@sender" and "@target" stand for the two ends of that message; its `at_s` counts from there.
    """

    kind: str
    count: int
    fault: Fault


Fault = (
    Kill
    | Restart
    | Leave
    | Ban
    | Pause
    | Partition
    | Slow
    | Worsen
    | DropKind
    | FailReduces
    | BreakLink
    | CutStreams
    | CoordinatorAway
)
Plan = Sequence[Fault | When]


def torment(world: World, plan: Plan) -> float:
    """Schedule a plan, and return when its last timed fault is over."""
    ends_s = 0.0
    waiting: dict[tuple[str, int], list[Fault]] = {}
    for fault in plan:
        if isinstance(fault, When):
            waiting.setdefault((fault.kind, fault.count), []).append(fault.fault)
        else:
            ends_s = max(ends_s, _schedule(world, fault))
    counts: Counter[str] = Counter()

    def on_send(sender: PeerId, to: PeerId, kind: str) -> None:
        counts[kind] += 1
        for fault in waiting.pop((kind, counts[kind]), []):
            _schedule(world, _name_ends(fault, sender, to))

    world.network.on_send = on_send
    return ends_s


def _schedule(world: World, fault: Fault) -> float:
    """Begin a fault at its time; at once if that is now."""
    if fault.at_s > 0:
        world.at(fault.at_s, lambda: _begin(world, fault))
    else:
        _begin(world, fault)
    for_s: float = getattr(fault, "for_s", 0.0)
    if for_s:
        world.at(fault.at_s + for_s, lambda: _end(world, fault))
    return fault.at_s + for_s


def _name_ends(fault: Fault, sender: PeerId, to: PeerId) -> Fault:
    """Put the ends of the triggering message in place of their placeholders."""
    names = {"@sender": sender, "@target": to}
    changes: dict[str, object] = {}
    for field in ("peer", "one", "other"):
        value = getattr(fault, field, None)
        if value in names:
            changes[field] = names[value]
    if isinstance(fault, Partition):
        changes["group"] = tuple(names.get(peer, PeerId(peer)) for peer in fault.group)
    return replace(fault, **changes)  # type: ignore[arg-type]


def _begin(world: World, fault: Fault) -> None:
    processes, network = world.processes, world.network
    match fault:
        case Kill(peer):
            if processes[PeerId(peer)].alive:
                processes[PeerId(peer)].kill()
        case Restart(peer):
            if not processes[PeerId(peer)].alive:
                revive(world, PeerId(peer))
            elif processes[PeerId(peer)].draining:  # not gone yet
                _schedule(world, Restart(peer, 1.0))
        case Leave(peer):
            processes[PeerId(peer)].drain()
        case Ban(peer, heard_within_s=within_s):
            for process in processes.values():
                world.at(world.rng.uniform(0, within_s), partial(process.hear_of_ban, PeerId(peer)))
        case Pause(peer):
            processes[PeerId(peer)].pause()
        case Partition():
            network.cuts += _cuts(world, fault)
        case Slow(peer, factor):
            world.speeds[PeerId(peer)] = factor
        case Worsen(loss=loss, duplicates=duplicates, jitter_s=jitter_s):
            network.worsen(loss=loss, duplicates=duplicates, jitter_s=jitter_s)
        case DropKind(kind=kind, loss=loss):
            network.dropped_kinds[kind] = loss
        case FailReduces(count=count):
            world.reduces.fail_next = count
        case BreakLink(one, other):
            world.reduces.broken_links.add(frozenset((PeerId(one), PeerId(other))))
        case CutStreams(peer):
            cut_streams(world, PeerId(peer))
        case CoordinatorAway():
            world.coordinator.alive = False


def _end(world: World, fault: Fault) -> None:
    network = world.network
    match fault:
        case Pause(peer):
            process = world.processes[PeerId(peer)]
            if process.paused:
                process.resume()
        case Partition():
            for cut in _cuts(world, fault):
                if cut in network.cuts:
                    network.cuts.remove(cut)
        case Worsen():
            network.link = world.options.link
        case DropKind(kind=kind):
            network.dropped_kinds.pop(kind, None)
        case CoordinatorAway():
            world.coordinator.alive = True


def revive(world: World, name: PeerId) -> None:
    """Start a process again: it asks anybody for its stages' state, as a joiner does."""
    process = world.processes[name]
    process.start()
    for replica in process.replicas.values():
        replica.start()


def cut_streams(world: World, name: PeerId) -> None:
    """Break every hop to and from a peer. With resumption nothing is lost; without, the work is done twice."""
    if world.options.pipeline.resume:
        return
    for process in world.processes.values():
        for hop in list(process.pipeline.hops):
            if name in (hop.caller.name, hop.callee.name) and hop.caller is not hop.callee:
                hop.caller.pipeline.give_up(hop)


def _cuts(world: World, fault: Partition) -> list[Cut]:
    inside = frozenset(PeerId(peer) for peer in fault.group)
    outside = frozenset({*world.processes, world.coordinator.name}) - inside
    there = Cut(inside, outside)
    return [there] if fault.one_way else [there, Cut(outside, inside)]


def random_plan(rng: Random, world: World, *, until_s: float, num_faults: int) -> Plan:
    """Draw faults that a sound protocol survives without a fork: any kills, but only short cuts and stops.

    About half of them strike at a moment of a ballot. No cut or stop is as long as half the patience, and
    none begins within the patience after another: a stage that is torn for longer than that forks by design.
    """
    plan: list[Fault | When] = []
    names = sorted(world.processes)
    for _ in range(num_faults):
        when = When(rng.choice(BALLOT_KINDS), rng.randint(1, 40), Kill("", 0.0)) if rng.random() < 0.5 else None
        at_s = 0.0 if when is not None else rng.uniform(0.01, until_s)
        peer = rng.choice(names) if when is None else rng.choice(("@sender", "@target"))
        for fault in _random_faults(rng, world, peer, at_s):
            plan.append(fault if when is None else replace(when, fault=fault))
    return plan


def _random_faults(rng: Random, world: World, peer: str, at_s: float) -> list[Fault]:
    for_s = rng.uniform(0.2, world.timers.patience_s / 2)
    match rng.choice(("kill", "kill", "kill", "pause", "cut", "worsen", "drop", "fail", "away", "leave")):
        case "kill":
            return [Kill(peer, at_s), Restart(peer, at_s + rng.uniform(0.1, 6.0))]
        case "leave":
            return [Leave(peer, at_s), Restart(peer, at_s + rng.uniform(8.0, 12.0))]
        case "fail":
            return [FailReduces(at_s, rng.randint(1, 4))]
        case "away":
            return [CoordinatorAway(at_s, rng.uniform(1.0, 8.0))]
        case "worsen":
            return [Worsen(at_s, for_s, loss=0.1, duplicates=0.2, jitter_s=rng.uniform(0.05, 0.3))]
        case "drop":
            return [DropKind(rng.choice(LOSABLE), at_s, for_s, loss=rng.uniform(0.3, 1.0))]
        case "pause":
            return [Pause(peer, at_s, for_s)]
        case _:
            return [Partition((peer,), at_s, for_s, one_way=rng.random() < 0.3)]


BALLOT_KINDS = ("Ping", "Pong", "Begin", "ReduceResult", "Propose", "Accept", "Committed", "ClosingNotice")
LOSABLE = ("Committed", "ClosingNotice", "Begin", "Accept", "Propose", "ReduceResult", "Pong", "DoneUnion", "Ready")


def stage_peers(world: World, stage: int) -> list[str]:
    """Return the names of the processes of a stage."""
    return [str(name) for name in world.hosts(StageId(stage))]
