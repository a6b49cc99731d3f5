"""A stage's chain of commits: how it grows, where somebody else's place in it is, and when two have parted.

Owns: lineage hashes, the links that are kept, and the rules by which a signed commit may follow another.
Must not know: ballots, timers, what an update is. Everything a peer believes about its stage's past is here.

    charter (coordinator) -> commit -> commit -> head
       L0 = H(charter)     L1 = H(L0, commit) ...

Every commit adds one to the version; a void round adds nothing at all.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum
from typing import Self

from protocol.errors import PeerFault
from protocol.ids import Lineage, PeerId, RoundId, Version, digest
from protocol.rounds.events import CommitStep
from protocol.rounds.messages import CHARTER_CONTEXT, COMMIT_CONTEXT, Charter, Commit, Seats
from protocol.rounds.settings import Settings
from protocol.signing import Signed


class Relation(Enum):
    """Where another replica's head stands, seen from ours."""

    SAME = "same"
    BEHIND = "behind"
    """Its head is a link of ours."""
    UNKNOWN = "unknown"
    """Its version is newer than ours: it may be ahead, or on another branch."""
    FORKED = "forked"
    """We know another lineage at its version."""
    ANCIENT = "ancient"
    """Its version is older than what we keep."""


@dataclass(frozen=True, slots=True)
class Link:
    """A place in the chain: a state that members agreed on, and who they are from here on."""

    lineage: Lineage
    version: Version
    next_round: RoundId
    seats: Seats
    step: CommitStep | None
    """What led here; None for the charter."""

    @property
    def members(self) -> tuple[PeerId, ...]:
        return tuple(seat.peer for seat in self.seats)


class Chain:
    """The charter and the newest commits of one stage. Its head may be ahead of the state that is applied."""

    def __init__(self, settings: Settings, signed_charter: Signed, charter: Charter, root: Link) -> None:
        self._settings = settings
        self.signed_charter = signed_charter
        self.charter = charter
        self._links = [root]

    @classmethod
    def of_charter(cls, settings: Settings, signed: Signed) -> Self:
        """Start at a charter. Raises `PeerFault` if the coordinator did not sign it for this stage."""
        charter = read_charter(settings, signed)
        root = Link(root_lineage(signed), charter.version, charter.round, charter.seats, None)
        return cls(settings, signed, charter, root)

    @classmethod
    def of_history(cls, settings: Settings, signed_charter: Signed, commits: tuple[Signed, ...]) -> Self:
        """Start where fetched history ends. The first commit is trusted as the hashed history is, under its charter."""
        chain = cls.of_charter(settings, signed_charter)
        for signed in commits:
            if chain.head.step is None:
                commit = chain._read(signed)
                if commit.parent != chain.head.lineage:
                    chain._links = [chain._link(signed, commit)]
                    continue
            chain.extend(signed)
        return chain

    @property
    def generation(self) -> int:
        return self.charter.generation

    @property
    def head(self) -> Link:
        return self._links[-1]

    @property
    def oldest(self) -> Link:
        return self._links[0]

    def follows_head(self, signed: Signed) -> Commit:
        """Return the commit inside if it may follow our head, or raise `PeerFault`."""
        settings, head = self._settings, self.head
        commit = self._read(signed)
        _require(commit.parent == head.lineage, "it follows another lineage")
        _require(commit.version == head.version + 1, "it skips a version")
        _require(commit.first_round == head.next_round <= commit.round, "its rounds do not follow")
        last_round = settings.rules.last_round
        _require(last_round is None or commit.round <= last_round, "its round is none of the run's")
        _require(signed.signer in head.members, f"its signer {signed.signer} is not a member")
        _require(bool(commit.seats) and _distinct(s.peer for s in commit.seats), "its seats are wrong")
        peers = [contribution.peer for contribution in commit.contributors]
        _require(_distinct(peers) and set(peers) <= set(head.members), "its contributors are not members")
        _require(all(each.weight <= each.tokens for each in commit.contributors), "it counts more than was brought")
        _require(commit.total_tokens > 0, "it averages nothing")
        return commit

    def extend(self, signed: Signed) -> Link:
        """Append a commit, or raise `PeerFault`."""
        link = self._link(signed, self.follows_head(signed))
        self._links.append(link)
        del self._links[: -(self._settings.rules.commits_kept + 1)]
        return link

    def steps_after(self, lineage: Lineage) -> tuple[CommitStep, ...] | None:
        """Return the commits after `lineage`, oldest first, or None if it is not (any longer) a link of ours."""
        for index, link in enumerate(self._links):
            if link.lineage == lineage:
                return tuple(later.step for later in self._links[index + 1 :] if later.step is not None)
        return None

    def link_of(self, lineage: Lineage) -> Link | None:
        """Return the link with this lineage, if it is kept."""
        return next((link for link in self._links if link.lineage == lineage), None)

    def has(self, signed: Signed) -> bool:
        """Tell whether this very commit is a link of ours."""
        return any(link.step is not None and link.step.signed.payload == signed.payload for link in self._links)

    def parent_of(self, signed: Signed) -> Lineage:
        """Return what a commit says that it follows, checking only its signature."""
        return self._settings.notary.unseal(signed, COMMIT_CONTEXT, Commit).parent

    def relation(self, lineage: Lineage, version: Version) -> Relation:
        """Tell where another head of the same generation stands."""
        if lineage == self.head.lineage:
            return Relation.SAME
        if version > self.head.version:
            return Relation.UNKNOWN
        if version < self.oldest.version:
            return Relation.ANCIENT
        return Relation.FORKED if self.steps_after(lineage) is None else Relation.BEHIND

    def _read(self, signed: Signed) -> Commit:
        settings = self._settings
        commit = settings.notary.unseal(signed, COMMIT_CONTEXT, Commit)
        _require(commit.run == settings.run and commit.stage == settings.stage, "it is about another stage")
        _require(commit.generation == self.generation, "it belongs to another charter")
        _require(commit.codec in settings.rules.codecs, "its bytes are in what this run does not use")
        return commit

    def _link(self, signed: Signed, commit: Commit) -> Link:
        lineage = next_lineage(commit.parent, signed.payload)
        step = CommitStep(commit, signed, lineage)
        return Link(lineage, commit.version, RoundId(commit.round + 1), commit.seats, step)


def read_charter(settings: Settings, signed: Signed) -> Charter:
    """Return the charter inside, or raise `PeerFault`."""
    charter = settings.notary.unseal(signed, CHARTER_CONTEXT, Charter, signer=settings.coordinator)
    if charter.run != settings.run or charter.stage != settings.stage:
        raise PeerFault("that charter is about another stage")
    return charter


def root_lineage(signed_charter: Signed) -> Lineage:
    """H(charter): where a lineage begins, before any commit."""
    return Lineage(digest(CHARTER_CONTEXT.encode(), signed_charter.payload))


def next_lineage(parent: Lineage, commit_bytes: bytes) -> Lineage:
    """H(parent lineage, commit): the steward's signature is left out, so any steward may finish a ballot."""
    return Lineage(digest(COMMIT_CONTEXT.encode(), parent, commit_bytes))


def _require(holds: bool, otherwise: str) -> None:
    if not holds:
        raise PeerFault(f"bad commit: {otherwise}")


def _distinct(peers: Iterable[PeerId]) -> bool:
    names = list(peers)
    return len(set(names)) == len(names)
