"""A swarm that was torn: which half goes on. Pure: the branches of all stages in, a settlement out.

Owns: finding out which branches of the stages belong together, whether they have met, and the choice between these
halves. Must not know: how branches are found (`store/tree.py`), how a choice is kept or told (`reunion.py`).

Where a network stays split for longer than members have patience, both halves train on, and every stage that has
replicas in both gets two branches (docs/decisions/0005). One half has to go, for all stages, as they have adapted to
each other (docs/decisions/0015). It is chosen by

    1. witnesses: a half that a single peer stands for cannot win over one with two
    2. stages: one that has lost all replicas of a stage cannot go on as it is
    3. tokens in its commits
    4. the lowest lineage

    stage 0   ... o--o--a--a--a      stands for a half: the lowest stage that is torn
                      \\-b--b
    stage 1   ... o--o--a--a         which half a branch is of shows in the closings that its commits name:
                      \\-b--b--b      every half has a clock of its own
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from coordinator.store.tree import CommitLink
from protocol.ids import Digest, Lineage, PeerId, StageId

FIRST_CLOSINGS = 3  # of a branch, by which it is told in which half it is

Closing = tuple[Digest, PeerId]
Paths = Mapping[Lineage, Sequence[CommitLink]]
"""Of one stage: where replicas stand, and what led there since all of them were one, newest first."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Branch:
    """What a stage has committed in one half, since its replicas have parted."""

    stage: StageId
    tip: Lineage
    peers: frozenset[PeerId]
    """Who stand there, and nowhere where others stand as well."""
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


def branches(stage: StageId, paths: Paths, standing: Mapping[PeerId, Lineage]) -> tuple[Branch, ...]:
    """Return a stage's branches: more than one if it is torn. `standing` says where its members stand."""
    ends = [tip for tip in paths if not any(tip in _lineages(path) for other, path in paths.items() if other != tip)]
    if len(ends) > 1:  # where they have parted is no end: others have gone on from there
        ends = [tip for tip in ends if paths[tip]]
    uses = Counter(link.lineage for tip in ends for link in paths[tip])
    found = []
    for tip in sorted(ends):
        own = {link.lineage for link in paths[tip] if uses[link.lineage] == 1}
        peers = frozenset(peer for peer, lineage in standing.items() if lineage in own)
        found.append(Branch(stage=stage, tip=tip, peers=peers, links=tuple(paths[tip])))
    return tuple(found)


def have_met(found: Iterable[Branch], rivals: Iterable[tuple[PeerId, Lineage]]) -> bool:
    """Tell whether somebody in one branch of a stage has met somebody in another, by where it saw that one stand."""
    found = list(found)
    met = list(rivals)
    return any(
        peer in branch.peers and rival in _lineages(other.links)
        for peer, rival in met
        for branch in found
        for other in found
        if other is not branch
    )


def settle(found: Mapping[StageId, Sequence[Branch]], *, most_tokens: int) -> Settlement | None:
    """Choose a half; None if no stage is torn.

    Of stages that are not torn, `found` has what their members have committed since about the same time, in one branch:
    that shows in which half they are. No commit counts for more than `most_tokens`, those of a round, and it counts
    less if few of its members have reported it.
    """
    torn = [stage for stage, each in sorted(found.items()) if len(each) > 1]
    if not torn:
        return None
    leaders = found[torn[0]]
    halves = {leader.tip: _half_of(leader, leaders, found) for leader in leaders}

    def weight(leader: Branch) -> tuple[int, int, float, bytes]:
        half = halves[leader.tip]
        witnesses = {peer for stage in torn if stage in half for peer in half[stage].peers}
        tokens = sum(_tokens(half[stage], most_tokens) for stage in torn if stage in half)
        return -min(len(witnesses), 2), -len(half), -tokens, leader.tip

    best = halves[min(leaders, key=weight).tip]
    kept = {
        stage: best.get(stage) or min(found[stage], key=lambda one: (-_tokens(one, most_tokens), one.tip))
        for stage in torn
    }
    return Settlement(kept=kept, given_up={stage: _without(found[stage], kept[stage]) for stage in torn})


def _half_of(
    leader: Branch, leaders: Sequence[Branch], found: Mapping[StageId, Sequence[Branch]]
) -> dict[StageId, Branch]:
    """Return the branches of all stages that belong to the half that `leader` stands for.

    A branch belongs to whom it has most closings in common with, of the first ones after the parting: once the halves
    hear each other again, a closing of one of them ends the round of both. One that has none belongs to everybody.
    """
    half = {leader.stage: leader}
    for stage, each in found.items():
        if stage == leader.stage:
            continue
        ours = []
        for branch in each:
            first = frozenset(link.closing for link in branch.links[-FIRST_CLOSINGS:])
            shares = {other.tip: len(first & other.closings) for other in leaders}
            if shares[leader.tip] == max(shares.values()):
                ours.append((-shares[leader.tip], branch.tip, branch))
        if ours:
            half[stage] = min(ours)[-1]
    return half


def _tokens(branch: Branch, most: int) -> float:
    return float(sum(min(link.tokens, most) * min(1.0, link.takers / max(1, link.members)) for link in branch.links))


def _without(found: Iterable[Branch], kept: Branch) -> tuple[CommitLink, ...]:
    ours = _lineages(kept.links)
    others = {link.lineage: link for branch in found for link in branch.links if link.lineage not in ours}
    return tuple(sorted(others.values(), key=lambda link: (-link.version, link.lineage)))


def _lineages(path: Iterable[CommitLink]) -> set[Lineage]:
    return {link.lineage for link in path}
