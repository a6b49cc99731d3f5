"""A swarm that was torn: which half goes on. Pure: commits and where replicas stand in, a settlement out.

Owns: telling the branches of a stage's lineage apart, finding out which branches of the stages belong together, and the
choice between these halves. Must not know: when it is time to choose, how that is kept or told (`reunion.py`).

Where a network stays split for longer than members have patience, both halves train on, and every stage that has
replicas in both gets two branches (docs/decisions/0005). One half has to go, for all stages, as they have adapted to
each other. The half with more tokens in its commits stays; of equal ones the one with the lowest lineage
(docs/decisions/0015).

    stage 0   ... o--o--a--a--a      stands for a half: the lowest stage that is torn
                      \\-b--b
    stage 1   ... o--o--a--a         which half a branch is of shows in the closings that its commits name:
                      \\-b--b--b      every half has a clock of its own
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from coordinator.store.history import CommitLink
from protocol.ids import Digest, Lineage, PeerId, StageId

Closing = tuple[Digest, PeerId]


@dataclass(frozen=True, slots=True, kw_only=True)
class Branch:
    """What a stage has committed in one half, since its replicas have parted."""

    stage: StageId
    tip: Lineage
    peers: frozenset[PeerId]
    """Who stand there."""
    links: tuple[CommitLink, ...]
    """Newest first; those that it shares with some of the other branches included, if there are more than two."""

    @property
    def closings(self) -> frozenset[Closing]:
        return frozenset(link.closing for link in self.links)


@dataclass(frozen=True, slots=True, kw_only=True)
class Settlement:
    """What goes on, and what does not."""

    kept: Mapping[StageId, Branch]
    """Of every stage that is torn."""
    given_up: Mapping[StageId, tuple[CommitLink, ...]]
    """Commits that are in no branch that is kept, by stage."""


def settle(
    links: Iterable[CommitLink], standing: Mapping[StageId, Mapping[PeerId, Lineage]], *, most_tokens: int
) -> Settlement | None:
    """Choose a half; None if no stage is torn.

    `standing` says at which lineages members stand now: a branch that has nobody is none. No commit counts for more
    than `most_tokens`, those of a round, and it counts less if few of its members have reported it. A half that a
    single peer stands for cannot win over one with two: nobody else can say whether there ever was such a half.
    """
    by_stage: dict[StageId, dict[Lineage, CommitLink]] = {}
    for link in links:
        by_stage.setdefault(link.stage, {})[link.lineage] = link
    branches = {stage: _branches(stage, known, standing.get(stage, {})) for stage, known in sorted(by_stage.items())}
    torn = [stage for stage, found in branches.items() if len(found) > 1]
    if not torn:
        return None
    leaders = branches[torn[0]]
    halves = {leader.tip: _half_of(leader, leaders, branches) for leader in leaders}

    def weight(leader: Branch) -> tuple[int, int, float, bytes]:
        half = halves[leader.tip]
        witnesses = {peer for stage in torn if stage in half for peer in half[stage].peers}
        tokens = sum(_tokens(half[stage], most_tokens) for stage in torn if stage in half)
        return -min(len(witnesses), 2), -len(half), -tokens, leader.tip

    best = halves[min(leaders, key=weight).tip]
    kept = {
        stage: best.get(stage) or min(branches[stage], key=lambda one: (-_tokens(one, most_tokens), one.tip))
        for stage in torn
    }
    given_up = {stage: _without(branches[stage], kept[stage]) for stage in torn}
    return Settlement(kept=kept, given_up=given_up)


def _branches(stage: StageId, known: Mapping[Lineage, CommitLink], standing: Mapping[PeerId, Lineage]) -> list[Branch]:
    """Return a stage's branches since all of them were one; a single one if there is only one."""
    paths = {tip: _path(known, tip) for tip in set(standing.values()) if tip in known}
    ends = [tip for tip in paths if not any(tip in path for other, path in paths.items() if other != tip)]
    uses = Counter(lineage for tip in ends for lineage in paths[tip])
    return [
        Branch(
            stage=stage,
            tip=tip,
            peers=frozenset(peer for peer, lineage in standing.items() if lineage in paths[tip]),
            links=tuple(known[lineage] for lineage in paths[tip] if uses[lineage] < len(ends) or len(ends) == 1),
        )
        for tip in sorted(ends)
    ]


def _path(known: Mapping[Lineage, CommitLink], tip: Lineage) -> dict[Lineage, None]:
    """Return the commits that led to a lineage, as far as they are known, newest first."""
    path: dict[Lineage, None] = {}
    while tip in known and tip not in path:
        path[tip] = None
        tip = known[tip].parent
    return path


def _half_of(
    leader: Branch, leaders: Sequence[Branch], branches: Mapping[StageId, Sequence[Branch]]
) -> dict[StageId, Branch]:
    """Return the branches of all stages that belong to the half that `leader` stands for.

    A branch belongs to whom it has most closings in common with, of those that only one of them names: once the halves
    hear each other again, a closing of one of them ends the round of both. One that has none belongs to everybody.
    """
    uses = Counter(closing for each in leaders for closing in each.closings)
    half = {leader.stage: leader}
    for stage, found in branches.items():
        if stage == leader.stage:
            continue
        ours = []
        for branch in found:
            own = branch.closings
            shares = {each.tip: sum(uses[closing] == 1 for closing in own & each.closings) for each in leaders}
            if shares[leader.tip] == max(shares.values()):
                ours.append((-shares[leader.tip], branch.tip, branch))
        if ours:
            half[stage] = min(ours)[-1]
    return half


def _tokens(branch: Branch, most: int) -> float:
    return sum(min(link.tokens, most) * min(1.0, link.takers / max(1, link.members)) for link in branch.links)


def _without(branches: Iterable[Branch], kept: Branch) -> tuple[CommitLink, ...]:
    ours = {link.lineage for link in kept.links}
    others = {link.lineage: link for branch in branches for link in branch.links if link.lineage not in ours}
    return tuple(sorted(others.values(), key=lambda link: (-link.version, link.lineage)))
