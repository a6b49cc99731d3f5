"""What a stage's round machine is told once: timers, rules, who it is, and how records are signed.

Owns: the values that do not change while a process runs, and the `Notary` seam. Must not know: any state.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, TypeVar

from protocol.ids import PeerId, RoundId, RunId, StageId
from protocol.rounds.messages import MAX_COUNT, DoneTask, Seat
from protocol.signing import Signed, SigningKey, seal, unseal
from protocol.wire import Message

M = TypeVar("M", bound=Message)


@dataclass(frozen=True, slots=True, kw_only=True)
class RoundTimers:
    """How long to wait for what. Only patience and isolation bear on safety (docs/decisions/0005)."""

    beat_s: float = 0.5
    """The driver's `Tick` interval; unanswered messages are repeated at every tick."""
    silence_beats: int = 3
    """A steward or clock that misses so many beats is replaced; a gap of our own as long counts as sleep."""
    ping_timeout_s: float = 2.0
    """After this, those who did not answer are left out, if the others are a quorum. Whoever is silent for so long
    in the middle of a ballot is not waited for any longer either."""
    patience_s: float = 10.0
    """Without a quorum, so long must the others have been silent before the rest goes on alone."""
    isolation_s: float = 120.0
    """The same for who hears nobody at all: then the broken link is most likely its own."""
    freeze_timeout_s: float = 60.0
    """How long a member that keeps answering may still be busy with the last tasks of the round."""
    reduce_timeout_s: float = 600.0
    accept_timeout_s: float = 120.0
    """How long a voter that keeps answering may fetch the bytes, if it was not in the reduce."""
    round_deadline_s: float = 3600.0
    """From the opening of a round to its closing with missing bits."""
    gossip_s: float = 5.0
    ready_s: float = 2.0
    notice_s: float = 10.0
    """How long a closing or a commit is repeated to those who do not acknowledge; gossip does the rest."""

    def __post_init__(self) -> None:
        if not 0 < self.beat_s * 2 <= self.ping_timeout_s < self.patience_s <= self.isolation_s:
            raise ValueError("timers need 0 < 2 * beat_s <= ping_timeout_s < patience_s <= isolation_s")

    @property
    def silence_s(self) -> float:
        return self.beat_s * self.silence_beats

    @property
    def ballot_limit_s(self) -> float:
        """A steward that needs longer than this for one ballot is treated as silent, however loud it is."""
        waits = (self.freeze_timeout_s, self.isolation_s, self.reduce_timeout_s, self.accept_timeout_s)
        return self.ping_timeout_s + sum(waits)


@dataclass(frozen=True, slots=True)
class RoundSize:
    """How many numbers a round has. The evaluation numbers follow the training numbers."""

    num_train: int
    num_eval: int = 0

    @property
    def all_bits(self) -> int:
        return (1 << (self.num_train + self.num_eval)) - 1


def any_evidence(_round: RoundId, _task: DoneTask) -> bool:
    """Believe every feeder. For tests; a run checks the signed path."""
    return True


@dataclass(frozen=True, slots=True, kw_only=True)
class RoundRules:
    """What the run's manifest says about rounds, as pure functions and numbers."""

    size_of: Callable[[RoundId], RoundSize]
    check_done: Callable[[RoundId, DoneTask], bool] = any_evidence
    """Does the evidence prove that the number is done, with that loss, those tokens and credits?"""
    tokens_per_round: int = MAX_COUNT
    """More than these target tokens no round has."""
    clip_threshold: float = 1.0
    """Largest norm of this stage's averaged gradient that passes unscaled."""
    scale_tolerance: float = 1e-3
    """Relative; members on other devices sum the norm in another order."""
    last_round: RoundId | None = None
    """Later ones do not exist; None: the run has no end."""
    commits_kept: int = 64
    """How far back a member that was away can be brought up to date without fetching a snapshot."""
    codecs: tuple[str, ...] = ("fp32",)
    """What averages of this stage may travel in, from the most exact to the smallest; the steward chooses."""
    num_averaged: Callable[[RoundId], int] = lambda _round: 0
    """How many numbers are averaged after a round, at most."""
    overlap: bool = False
    """Average one round while the next one computes, and take the result over when that has ended, too."""

    def is_hidden(self, round_id: RoundId) -> bool:
        """Tell whether the averaging of a round runs while the next one computes: not if that trains nothing."""
        return self.overlap and self.size_of(RoundId(round_id + 1)).num_train > 0


class Notary(Protocol):
    """Signs our records and checks those of others. Pure: the same in, the same out."""

    def seal(self, context: str, message: Message) -> Signed:
        """Sign as ourselves."""

    def unseal(self, signed: Signed, context: str, message_class: type[M], *, signer: PeerId | None = None) -> M:
        """Return what was signed; raise `SignatureError` or `WireError`."""


@dataclass(frozen=True, slots=True)
class KeyNotary:
    """The real one: an Ed25519 key."""

    key: SigningKey

    def seal(self, context: str, message: Message) -> Signed:
        """Sign with our key."""
        return seal(self.key, context, message)

    def unseal(self, signed: Signed, context: str, message_class: type[M], *, signer: PeerId | None = None) -> M:
        """Check the signature against the signer's peer id."""
        return unseal(signed, context, message_class, signer=signer)


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """Everything about one replica of one stage that stays as it is."""

    run: RunId
    stage: StageId
    me: Seat
    coordinator: PeerId
    timers: RoundTimers
    rules: RoundRules
    notary: Notary
