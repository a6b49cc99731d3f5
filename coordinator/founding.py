"""When a stage's lineage begins, and with whom. Pure: a view in, decisions out; no clock, no keys, no database.

Owns: the rules by which charters are issued and peers are moved to empty stages. Must not know: signatures,
how peers are reached. `charters.py` makes the view once per tick and carries the decisions out.

* *Start*: every stage has a ready replica and enough peers are ready: charters for all stages at once.
* *A stage died* while others live: as soon as a peer has restored it, a charter with the next generation
  takes it to the others' round. Nobody there or on the way: after a while a peer of a well covered stage moves.
* *Something better may be on the way*: those who are ready hold less than was reached, and somebody else of that stage
  is here but not ready: it has a moment to come up with more before the rest is given up.
* *Everything died*: when every stage has been restored: charters for all, next generation. If all that the stages had
  reached is there again, nothing is given up; otherwise they go back to the newest round that all of them hold.
* Never over members who may still make commits: a peer that acts, one that has been silent too short to be
  given up, and one that we have not heard since we started ourselves all block a charter for their stages.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum

from coordinator.placement import Host, choose_mover
from protocol.ids import Digest, PeerId, RoundId, StageId, Version
from protocol.rounds.messages import Seat


class Standing(Enum):
    """What we know of a peer."""

    HERE = "here"
    UNHEARD = "unheard"
    """Was live when we stopped; has not spoken since."""
    MISSING = "missing"
    """Silent, but nobody else misses it yet: it may only have lost the way to us."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Replica:
    """One replica of a stage, by its host's last word."""

    seat: Seat
    stage: StageId
    round: RoundId
    version: Version
    ready: bool
    """Holds a state and could work."""
    acting: bool
    """Is a member: its last charter or commit names this life of the peer, and goes on."""
    is_lost: bool
    """Stands in the half of a torn swarm that was given up: something to go on from only if there is nothing else."""
    state_digest: Digest | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Participant:
    """One peer that is here, or may come back."""

    peer: PeerId
    standing: Standing
    stages: tuple[StageId, ...]
    """What it is asked to host."""
    replicas: tuple[Replica, ...] = ()
    pinned: bool = False
    joined_s: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class View:
    """All that a decision looks at. Times are seconds on one monotonic clock."""

    num_stages: int
    participants: tuple[Participant, ...]
    generations: Mapping[StageId, int]
    """Generation of the newest charter of every stage; empty before the start."""
    start_peers: int
    floor: Mapping[StageId, Version]
    """The newest checkpoint's versions: a stage is never founded on less, so that a peer which missed the
    checkpoint cannot throw the training away."""
    reached: Mapping[StageId, Version]
    """What the stages had come to, as far as was reported."""
    next_round: RoundId
    """The round after the newest that was reported of any stage."""
    vacant_s: Mapping[StageId, float]
    """For how long nobody has been hosting, or asked to host, a stage."""
    short_s: Mapping[StageId, float]
    """For how long a stage without members could only have been founded on less than it had reached."""
    awake_s: float
    """For how long we have been hearing from anybody."""
    settle_s: float
    """How long after waking up everybody may take to report, before silence counts; how long somebody who is here may
    take to come up with more of what a stage had reached."""
    move_after_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Founding:
    """A charter to issue."""

    stage: StageId
    generation: int
    round: RoundId
    version: Version
    state_digest: Digest
    seats: tuple[Seat, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Move:
    """A peer to move to a stage."""

    peer: PeerId
    stage: StageId


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """What to do now, and what we wait for (shown to the organiser; empty if nothing)."""

    foundings: tuple[Founding, ...] = ()
    moves: tuple[Move, ...] = ()
    waiting_for: str = ""


def decide(view: View) -> Decision:
    """Return what should happen now. Called again and again; deciding nothing is the usual case."""
    stages = [StageId(stage) for stage in range(view.num_stages)]
    dead = [stage for stage in stages if not may_act(view, stage)]
    if not dead:
        return Decision()
    moves = _moves(view)
    started = bool(view.generations)
    if started and view.awake_s < view.settle_s:
        return Decision(waiting_for="the peers to report after an interruption")
    if len(dead) == view.num_stages:
        return _found_all(view, stages, moves, at_least=1 if started else view.start_peers)
    return _refound(view, dead, moves)


def may_act(view: View, stage: StageId) -> bool:
    """Tell whether any peer may still be making commits for `stage`."""
    return any(stage in _acting_stages(participant) for participant in view.participants)


def is_hosted(view: View, stage: StageId) -> bool:
    """Tell whether anybody who may be there is asked to host `stage`."""
    return any(stage in participant.stages for participant in view.participants)


def is_short(view: View, stage: StageId) -> bool:
    """Tell whether a stage without members has somebody to found it, but on less than it had reached."""
    versions = [replica.version for replica in _ready(view, stage)]
    return bool(versions) and max(versions) < view.reached.get(stage, 0) and not may_act(view, stage)


def _acting_stages(participant: Participant) -> frozenset[StageId]:
    if participant.standing is Standing.UNHEARD:
        return frozenset(participant.stages)
    return frozenset(replica.stage for replica in participant.replicas if replica.acting)


def _ready(view: View, stage: StageId) -> list[Replica]:
    """List the replicas of a stage that could be named in a charter now."""
    ready = [
        replica
        for participant in view.participants
        if participant.standing is Standing.HERE and stage in participant.stages
        for replica in participant.replicas
        if replica.stage == stage and replica.ready and replica.state_digest is not None
        if replica.version >= view.floor.get(stage, 0)
    ]
    return [replica for replica in ready if not replica.is_lost] or ready


def _founders(view: View, stage: StageId) -> list[Replica]:
    """List whom to name in a charter now; nobody while somebody else who is here may soon be ready with more."""
    ready = _ready(view, stage)
    others = {
        participant.peer
        for participant in view.participants
        if participant.standing is Standing.HERE and stage in participant.stages
    } - {replica.seat.peer for replica in ready}
    is_awaited = bool(others) and is_short(view, stage) and view.short_s.get(stage, 0.0) < view.settle_s
    return [] if is_awaited else ready


def _found_all(view: View, stages: Sequence[StageId], moves: tuple[Move, ...], *, at_least: int) -> Decision:
    """Found every stage at the newest round that all of them can start from."""
    ready = {stage: _founders(view, stage) for stage in stages}
    num_ready = len({replica.seat.peer for replicas in ready.values() for replica in replicas})
    missing = [stage for stage in stages if not ready[stage]]
    if missing:
        return Decision(moves=moves, waiting_for=f"a replica of {_named(missing)}")
    if num_ready < at_least:
        return Decision(moves=moves, waiting_for=f"{at_least - num_ready} more of {at_least} peers")
    return Decision(foundings=_from_one_moment(view, ready), moves=moves)


def _from_one_moment(view: View, ready: Mapping[StageId, list[Replica]]) -> tuple[Founding, ...]:
    """Found all stages so that they fit together as well as they can.

    Replicas that have kept all that was reached go on as if nothing had happened, though their stages may be a round
    apart: one had taken the last step before everything died, and another had not. If something is lost, a round that
    all of them hold is a better beginning than states from different times. Without one each stage goes on from its
    newest, as a stage does that died alone: nobody here would ever hold another state.
    """
    rounds = {stage: {replica.round for replica in replicas} for stage, replicas in ready.items()}
    is_all_there = all(
        stage in view.reached and max(replica.version for replica in replicas) >= view.reached[stage]
        for stage, replicas in ready.items()
    )
    common = set.intersection(*rounds.values())
    if common and not is_all_there:
        round_id = max(common)
        ready = {stage: [one for one in replicas if one.round == round_id] for stage, replicas in ready.items()}
    else:
        # a step may not have been reported; whoever claims more than that must not take the run to its end
        round_id = RoundId(min(max(set.union(*rounds.values())), view.next_round + 1))
    return tuple(_founding(view, stage, replicas, round_id) for stage, replicas in ready.items())


def _refound(view: View, dead: Sequence[StageId], moves: tuple[Move, ...]) -> Decision:
    """Found the dead stages whose state somebody has restored, at the round of the living."""
    rounds = [
        replica.round
        for participant in view.participants
        if participant.standing is Standing.HERE
        for replica in participant.replicas
        if replica.acting
    ]
    if not rounds:  # whoever keeps the other stages alive is not heard at the moment
        return Decision(moves=moves, waiting_for="the other stages to report")
    restored = {stage: founders for stage in dead if (founders := _founders(view, stage))}
    missing = [stage for stage in dead if stage not in restored]
    return Decision(
        foundings=tuple(_founding(view, stage, founders, max(rounds)) for stage, founders in restored.items()),
        moves=moves,
        waiting_for=f"somebody to restore {_named(missing)}" if missing else "",
    )


def _founding(view: View, stage: StageId, replicas: Iterable[Replica], round_id: RoundId) -> Founding:
    """Name the replicas that agree on the newest version; the others join later, as any joiner does."""
    replicas = list(replicas)
    version = max(replica.version for replica in replicas)
    newest = [replica for replica in replicas if replica.version == version]
    # the state that most replicas hold wins; then the lower digest, so that the choice can be explained
    digests = Counter(replica.state_digest for replica in newest if replica.state_digest is not None)
    digest = min(digests, key=lambda known: (-digests[known], known))
    return Founding(
        stage=stage,
        generation=view.generations.get(stage, 0) + 1,
        round=round_id,
        version=version,
        state_digest=digest,
        seats=tuple(
            sorted((replica.seat for replica in newest if replica.state_digest == digest), key=lambda seat: seat.peer)
        ),
    )


def _moves(view: View) -> tuple[Move, ...]:
    """Move one peer to the longest vacant stage, if it has been vacant for long enough. One at a time."""
    due = [
        stage
        for stage, vacant_s in view.vacant_s.items()
        if vacant_s >= view.move_after_s and not is_hosted(view, stage)
    ]
    if not due or view.awake_s < view.settle_s:
        return ()
    stage = max(due, key=lambda candidate: (view.vacant_s[candidate], -candidate))
    mover = choose_mover(map(_host, view.participants), stage, num_stages=view.num_stages)
    return () if mover is None else (Move(peer=mover, stage=stage),)


def _host(participant: Participant) -> Host:
    is_here = participant.standing is Standing.HERE
    return Host(
        peer=participant.peer,
        stages=participant.stages,
        ready=frozenset(replica.stage for replica in participant.replicas if replica.ready and is_here),
        pinned=participant.pinned or not is_here,
        joined_s=participant.joined_s,
    )


def _named(stages: Sequence[StageId]) -> str:
    numbers = ", ".join(str(stage) for stage in stages)
    return f"stage {numbers}" if len(stages) == 1 else f"stages {numbers}"
