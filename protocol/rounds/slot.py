"""What one member remembers about the round that is to follow one lineage.

Owns: the fields that voter, steward, clock and member share, and nothing that decides. A slot begins when
its parent lineage becomes our head and ends with the commit that follows; a void round leaves it open.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from protocol.ids import Digest, PeerId, RoundId
from protocol.rounds.lineage import Link
from protocol.rounds.messages import Ballot, Begin, Closing, Commit, Ready, Vote
from protocol.signing import Signed


@dataclass(frozen=True, slots=True)
class HeardClosing:
    """A closing and the envelope that proves it."""

    closing: Closing
    signed: Signed


@dataclass(frozen=True, slots=True)
class StagedBytes:
    """Update bytes that lie in the driver's staging; `norm` is that of the undivided sum."""

    digest: Digest
    norm: float
    codec: str
    round: RoundId
    """After which they were summed: it decides what of the stage they are."""

    def are_of(self, commit: Commit) -> bool:
        """Tell whether a commit means these bytes, read as we have read them."""
        return (self.digest, self.codec, self.round) == (commit.digest, commit.codec, commit.round)


@dataclass(slots=True)
class Measured:
    """What a member has last found out about itself, for stewards to hear. None: nothing yet."""

    bytes_per_s: float | None = None
    """How much it could send in an average."""
    tokens_per_s: float | None = None
    """How fast it was while it had something to do."""


@dataclass(slots=True)
class Slot:
    """The open question: which commit follows `parent`?"""

    parent: Link
    order: tuple[PeerId, ...]
    """Its members, the first steward first."""
    round: RoundId
    """The round that the commit will cover last, and whose tasks are taken first; void rounds move it up."""
    heard_s: float
    """When a closing or a steward was last heard."""
    one_by_one: bool = False
    """Its commit shall not cover a second round, whose tasks may be under way already."""
    applied: bool = False
    """The state of `parent` is in place."""
    frozen: bool = False
    frozen_s: float = 0.0
    freezing: RoundId | None = None
    """The round that the driver is asked to freeze, until it has."""
    contribution: int | None = None
    """The target tokens of what the driver has frozen, once it has."""
    norm: float = 0.0
    """Of the same."""
    closings: dict[RoundId, HeardClosing] = field(default_factory=dict)
    """All closings heard since the parent; void rounds leave theirs, because credits add up."""
    promised: Ballot | None = None
    promised_s: float = 0.0
    vote: Vote | None = None
    staged: StagedBytes | None = None
    objected: set[PeerId] = field(default_factory=set)
    """The stewards whose proposals we have declined because they were wrong."""
    reducing: Begin | None = None
    slept: bool = False
    """We were stopped for a while, and others may have gone on without us."""
    gone: set[PeerId] = field(default_factory=set)
    """Members whose process is certainly dead."""
    has_listeners: bool = False
    """Somebody without a seat may have followed a commit that we have not heard of."""
    ready: dict[PeerId, Ready] = field(default_factory=dict)
    """Joiners that hold the parent's state."""
    spoke_s: dict[PeerId, float] = field(default_factory=dict)
    """When each member, ourselves included, last said something in a ballot of this slot."""
    company_s: float = 0.0
    """When anybody at all was last heard."""
    company_since_s: float = 0.0
    """Since when our own line has been fine."""
    leaving: bool = False
    """We want to leave with the next commit."""
    round_s: float | None = None
    """How long we took tasks of what is frozen, if we did."""
    measured: Measured = field(default_factory=Measured)
    """Outlives the slot."""

    @property
    def tokens(self) -> int | None:
        """What we bring, in target tokens. Not known before what came before it is in place."""
        return self.contribution if self.applied else None

    @property
    def due_closing(self) -> HeardClosing | None:
        """The closing that this slot's commit will be made under, if its round is over."""
        over = [number for number in self.closings if number >= self.round]
        if not over:
            return None
        return self.closings[min(over) if self.one_by_one else max(over)]

    @property
    def living(self) -> tuple[PeerId, ...]:
        """The members that are not certainly dead, in order."""
        return tuple(peer for peer in self.order if peer not in self.gone)
