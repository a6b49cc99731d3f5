"""What members say they have put into averages, and whether that adds up to what came out. Pure.

Owns: putting the sketches of one commit side by side. Must not know: who is asked to recompute a contribution.

Sketches are linear: those of all contributions add up to that of the sum, but for what the codec rounds. The seed
depends on the sum, so nobody can give one thing into the average and sketch another that fits.
"""

from __future__ import annotations

import itertools
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial

from protocol.audits import ContributionReport, contribution_seed
from protocol.errors import WireError
from protocol.ids import Lineage, PeerId, RoundId, StageId
from protocol.rounds.factors import factors_of
from protocol.rounds.messages import Commit
from protocol.sketch import directions, distance, is_sketch, scaled, summed

MAX_COMMITS = 256
MAX_AHEAD = 4  # averages of which one may speak before anybody has reported the commit
MAX_REMEMBERED = 64  # averages of each stage, of which it is remembered who said nothing
GATHER_S = 3.0  # all members report with their next beat
GIVE_UP_S = 20.0
LEAST_MEMBERS = 3  # of two that point apart nobody knows which is wrong
AGAINST = -0.2
"""Whose drift has such a cosine with all others', or a lower one, goes another way. In the attack table's model honest
ones have -0.05 to 0.84, and those whose sign is turned -0.90 to -0.34 (docs/decisions/0025)."""
CLAIMED_AT_MOST = 1.5
"""Times what a member is credited with: up to that the rest counts as hidden (`contributed.py`)."""
ROUNDING = 0.05
COARSE_ROUNDING = {"int4": 0.25}
"""How far a sum may be from its parts: the codec rounds every one of them, and the sum."""


@dataclass(frozen=True, slots=True)
class Given:
    """What a member says it has given."""

    tokens: int
    """As it claims."""
    weight: int
    """Tokens that it counts for: no more than it is credited with."""
    sketch: bytes

    @property
    def claims_more(self) -> bool:
        """Tell whether it claims far more than it is credited with: some of its answers may have been lost."""
        return self.tokens > CLAIMED_AT_MOST * self.weight


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """The contributions to one commit."""

    stage: StageId
    round: RoundId
    lineage: Lineage
    seed: bytes
    members: tuple[PeerId, ...]
    """In the order in which they were summed, with the factor of each."""
    factors: tuple[float, ...]
    contributions: Mapping[PeerId, Given]
    """Of everybody who counts."""
    apart: float
    rounding: float = ROUNDING
    """How far apart honest words may be, by the codec."""

    @property
    def adds_up(self) -> bool:
        return self.apart <= self.rounding


@dataclass(slots=True)
class _Gathering:
    since_s: float
    opened_by: PeerId | None
    """Who spoke of it first; None: it came with its commit."""
    commit: Commit | None = None
    said: dict[PeerId, ContributionReport] = field(default_factory=dict)


class Sums:
    """Commits whose contributions are coming in."""

    def __init__(self, *, is_mean: bool = False) -> None:
        self._is_mean = is_mean
        self._gathering: OrderedDict[Lineage, _Gathering] = OrderedDict()
        self._done: OrderedDict[Lineage, None] = OrderedDict()
        self._silent, self._against, self._claiming, self._untold = (_Noted() for _ in range(4))

    def hear_commit(self, commit: Commit, lineage: Lineage, *, now_s: float) -> None:
        """Take who was summed."""
        if lineage not in self._done:
            self._of(lineage, now_s).commit = commit

    def hear(self, peer: PeerId, report: ContributionReport, *, now_s: float) -> None:
        """Take what a member says. What is no sketch says nothing."""
        if report.lineage in self._done or not (is_sketch(report.own) and is_sketch(report.total)):
            return
        if report.lineage not in self._gathering:  # a lineage may be made up, and each takes a place
            of_its_own = [each for each in self._gathering.values() if each.commit is None and each.opened_by == peer]
            if len(of_its_own) >= MAX_AHEAD:
                return
        self._of(report.lineage, now_s, opened_by=peer).said.setdefault(peer, report)

    def due(self, *, now_s: float) -> list[Record]:
        """Return commits of which everybody has spoken, or nobody will any more."""
        found = []
        for lineage, gathering in list(self._gathering.items()):
            commit, age_s = gathering.commit, now_s - gathering.since_s
            missing = None if commit is None else {each.peer for each in commit.contributors} - gathering.said.keys()
            if age_s < GATHER_S or (missing != set() and age_s < GIVE_UP_S):
                continue
            del self._gathering[lineage]
            self._done[lineage] = None
            while len(self._done) > MAX_COMMITS:
                self._done.popitem(last=False)
            if commit is None:
                continue
            gathering.said = _fitting(gathering.said)
            weighty = {each.peer for each in commit.contributors if each.weight}
            if 2 * len(weighty & gathering.said.keys()) > len(weighty):  # or else somebody may have made it up
                self._silent.note(commit.stage, {peer: peer not in gathering.said for peer in weighty})
            record = _record(commit, lineage, gathering.said, is_mean=self._is_mean)
            if record is not None:
                found.append(record)
                claiming = {peer: each.claims_more for peer, each in record.contributions.items()}
                self._claiming.note(record.stage, claiming)
                if self._is_mean and len(record.contributions) >= LEAST_MEMBERS:
                    self._against.note(record.stage, goes_against(record))
        return found

    def silence(self) -> dict[PeerId, tuple[int, int]]:
        """Return in how many of the latest averages peers counted, and of how many they say nothing."""
        return self._silent.counts()

    def against(self) -> dict[PeerId, tuple[int, int]]:
        """Return how many of the latest mean drifts peers have given to, and how often against all others.

        Sums of gradients are no such thing: their noise is larger than what they have in common.
        """
        return self._against.counts()

    def claiming(self) -> dict[PeerId, tuple[int, int]]:
        """Return to how many of the latest averages peers have given, and how often with more than is credited."""
        return self._claiming.counts()

    def untold(self) -> dict[PeerId, tuple[int, int]]:
        """Return to how many of the latest averages peers have given, and how often more than they tell of."""
        return self._untold.counts()

    def note_untold(self, stage: StageId, untold: dict[PeerId, bool]) -> None:
        """Take who tells of less work than it has given."""
        self._untold.note(stage, untold)

    def forget(self, peer: PeerId) -> None:
        """What it said or did not say of earlier averages is no more held against it."""
        for noted in (self._silent, self._against, self._claiming, self._untold):
            noted.forget(peer)

    def _of(self, lineage: Lineage, now_s: float, *, opened_by: PeerId | None = None) -> _Gathering:
        if lineage not in self._gathering:
            self._gathering[lineage] = _Gathering(now_s, opened_by)
            while len(self._gathering) > MAX_COMMITS:
                self._gathering.popitem(last=False)
        return self._gathering[lineage]


class _Noted:
    """Of the latest averages of each stage, of whom something was noted."""

    def __init__(self) -> None:
        self._seen: defaultdict[StageId, deque[dict[PeerId, bool]]] = defaultdict(partial(deque, maxlen=MAX_REMEMBERED))

    def note(self, stage: StageId, noted: dict[PeerId, bool]) -> None:
        self._seen[stage].append(noted)

    def counts(self) -> dict[PeerId, tuple[int, int]]:
        """Return of how many averages peers were part, and of how many it was noted."""
        found: dict[PeerId, tuple[int, int]] = {}
        for each in itertools.chain(*self._seen.values()):
            for peer, is_noted in each.items():
                count, noted = found.get(peer, (0, 0))
                found[peer] = count + 1, noted + is_noted
        return found

    def forget(self, peer: PeerId) -> None:
        for each in itertools.chain(*self._seen.values()):
            each.pop(peer, None)


def _fitting(said: Mapping[PeerId, ContributionReport]) -> dict[PeerId, ContributionReport]:
    """Return what fits together: a sketch of another size than most have says nothing."""
    sizes = Counter(len(sketch) for each in said.values() for sketch in (each.own, each.total))
    usual = sizes.most_common(1)[0][0] if sizes else 0
    return {peer: each for peer, each in said.items() if len(each.own) == len(each.total) == usual}


def goes_against(record: Record) -> dict[PeerId, bool]:
    """Tell of everybody whether it goes against all others; nobody does unless most of them agree among themselves."""
    sketches = {peer: each.sketch for peer, each in record.contributions.items()}
    cosines = zip(sketches, directions(list(sketches.values())), strict=True)
    against = {peer for peer, cosine in cosines if cosine <= AGAINST}
    others = [sketch for peer, sketch in sketches.items() if peer not in against]
    is_clear = 2 * len(others) > len(sketches) and min(directions(others)) > 0
    return {peer: is_clear and peer in against for peer in sketches}


def _record(
    commit: Commit, lineage: Lineage, said: Mapping[PeerId, ContributionReport], *, is_mean: bool
) -> Record | None:
    """Put sketches together; None if too few have spoken, or what they say is no sketch."""
    seed = contribution_seed(lineage)
    members = {each.peer: each for each in commit.contributors if each.weight}
    factors = factors_of(commit.contributors, is_mean=is_mean) or (1.0,) * len(commit.contributors)
    scales = {each.peer: factor for each, factor in zip(commit.contributors, factors, strict=True)}
    # what one who does not say has given is not known: it is no word that could be held against it
    if seed is None or not members or not members.keys() <= said.keys() or not all(scales[peer] for peer in members):
        return None
    totals = [said[peer].total for peer in members]
    try:
        # whoever lies about the sum is alone with it: all others have the same bytes
        total = min(totals, key=lambda each: sorted(distance(other, each) for other in totals)[len(totals) // 2])
        apart = distance(total, summed(scaled(said[peer].own, scales[peer]) for peer in members))
    except WireError:
        return None
    return Record(
        stage=commit.stage,
        round=commit.round,
        lineage=lineage,
        seed=seed,
        members=tuple(each.peer for each in commit.contributors),
        factors=factors,
        contributions={
            peer: Given(tokens=each.tokens, weight=each.weight, sketch=said[peer].own) for peer, each in members.items()
        },
        apart=apart,
        rounding=COARSE_ROUNDING.get(commit.codec, ROUNDING),
    )
