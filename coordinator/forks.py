"""A run that was torn in two: which half goes on.

Owns: noticing that two commits follow the same one, and the choice between the halves. Pure. Must not know: who is
live, how peers are told (`registry.py` does, with every beat's reply).

Where a network stays split for longer than members have patience, both halves train on, and every stage that has
replicas in both has two lineages (docs/decisions/0005). One of them has to go, and the same half for all stages, for
they have adapted to each other. It is the one that has done less: the half with more tokens in its commits goes on,
of equal ones that with the lowest lineage. Stages of one half are known by the closings under which they commit.
"""

from __future__ import annotations

from collections import Counter, OrderedDict, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from protocol.ids import Digest, Lineage, PeerId, StageId, Version
from protocol.rounds.messages import Commit

MAX_LINKS = 4096  # the newest commits of all stages: a fork is noticed while it is young


@dataclass(frozen=True, slots=True)
class Branch:
    """A stage's commits in one half, since the halves have parted."""

    stage: StageId
    tip: Lineage
    version: Version
    members: tuple[PeerId, ...]
    """Of the newest commit."""
    lineages: frozenset[Lineage]
    num_commits: int
    tokens: int


@dataclass(frozen=True, slots=True)
class Verdict:
    """What goes on, and what does not, by stage."""

    winners: Mapping[StageId, Branch]
    losers: tuple[Branch, ...]
    """Only of stages that go on in the other half."""

    def rejoins(self, stage: StageId, lineage: Lineage) -> tuple[PeerId, ...]:
        """Return whom a replica that stands at a lineage should follow; nobody unless that lineage was given up."""
        is_lost = any(branch.stage == stage and lineage in branch.lineages for branch in self.losers)
        return self.winners[stage].members if is_lost else ()


@dataclass(frozen=True, slots=True)
class _Link:
    stage: StageId
    generation: int
    lineage: Lineage
    parent: Lineage
    version: Version
    tokens: int
    closing: tuple[Digest, PeerId]
    """And whose it is: two halves may close a round with the same words."""
    members: tuple[PeerId, ...]


class Forks:
    """The newest commits of all stages, as a tree."""

    def __init__(self) -> None:
        self._links: OrderedDict[Lineage, _Link] = OrderedDict()
        self._children: defaultdict[Lineage, list[Lineage]] = defaultdict(list)

    def note(self, commit: Commit, lineage: Lineage) -> None:
        """Take in a commit that a member of its stage has signed."""
        if lineage in self._links:
            return
        self._links[lineage] = _Link(
            stage=commit.stage,
            generation=commit.generation,
            lineage=lineage,
            parent=commit.parent,
            version=commit.version,
            tokens=commit.total_tokens,
            closing=(commit.summary.closing_digest, commit.summary.clock),
            members=tuple(seat.peer for seat in commit.seats if seat.peer not in commit.joiners),
        )
        self._children[commit.parent].append(lineage)
        while len(self._links) > MAX_LINKS:
            _, oldest = self._links.popitem(last=False)
            self._children[oldest.parent].remove(oldest.lineage)
            if not self._children[oldest.parent]:
                del self._children[oldest.parent]

    def verdict(self, generations: Mapping[StageId, int]) -> Verdict | None:
        """Return which half goes on; None if nothing has parted under the newest charters, of these generations."""
        torn = [
            child
            for siblings in self._children.values()
            if len(siblings) > 1
            for child in siblings
            if self._links[child].generation == generations.get(self._links[child].stage)
        ]
        if not torn:
            return None
        halves = self._halves(torn)
        if len(halves) < 2:
            return None
        best, *others = sorted(halves, key=lambda half: (-sum(link.tokens for link in half), min(_lineages(half))))
        winners = {branch.stage: branch for branch in _branches(best)}
        losers = [branch for half in others for branch in _branches(half) if branch.stage in winners]
        return Verdict(winners, tuple(losers)) if losers else None

    def _halves(self, torn: Iterable[Lineage]) -> list[list[_Link]]:
        """Group what has grown since the halves have parted by what belongs together: descent, and closings.

        Once the halves hear each other again, a closing of one of them ends the round of both: that says nothing.
        """
        grown = [self._descendants(child) for child in torn]
        uses = Counter((links[0].stage, closing) for links in grown for closing in {link.closing for link in links})
        shared = {closing for (_, closing), count in uses.items() if count > 1}
        halves: list[tuple[set[tuple[Digest, PeerId]], list[_Link]]] = []
        for links in grown:
            closings = {link.closing for link in links} - shared
            for known in [each for each in halves if each[0] & closings]:
                halves.remove(known)
                closings |= known[0]
                links = [*known[1], *links]
            halves.append((closings, links))
        return [links for _, links in halves]

    def _descendants(self, lineage: Lineage) -> list[_Link]:
        found, left = [], [lineage]
        while left:
            link = self._links[left.pop()]
            found.append(link)
            left += self._children.get(link.lineage, [])
        return found


def _lineages(links: Iterable[_Link]) -> set[Lineage]:
    return {link.lineage for link in links}


def _branches(half: Iterable[_Link]) -> list[Branch]:
    by_stage: defaultdict[StageId, dict[Lineage, _Link]] = defaultdict(dict)
    for link in half:
        by_stage[link.stage][link.lineage] = link
    branches = []
    for stage, links in sorted(by_stage.items()):
        tip = max(links.values(), key=lambda link: (link.version, link.lineage))
        branches.append(
            Branch(
                stage=stage,
                tip=tip.lineage,
                version=tip.version,
                members=tip.members,
                lineages=frozenset(links),
                num_commits=len(links),
                tokens=sum(link.tokens for link in links.values()),
            )
        )
    return branches
