"""How closings and commits are drawn up, and what a member checks before it accepts a commit.

Owns: the arithmetic of the records (sums, credits, dropped and double-counted tokens, the clip scale), so
that who writes a record and who checks it use the same lines. Must not know: messages, timers.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from protocol.errors import PeerFault
from protocol.ids import Digest, PeerId, RoundId, RunId, StageId, Version, digest
from protocol.rounds.lineage import Chain
from protocol.rounds.messages import (
    MAX_CREDITS,
    Ballot,
    Closing,
    Commit,
    Contribution,
    Credit,
    DoneTask,
    RoundSummary,
    Seats,
)
from protocol.rounds.quorum import is_quorum
from protocol.rounds.settings import RoundRules, RoundSize, Settings
from protocol.rounds.slot import HeardClosing, Slot, StagedBytes

MAX_LOSSES = 1 << 52  # a closing or a member may lie; a record must stay one, and the coordinator's books have room


def draw_closing(run: RunId, round_id: RoundId, size: RoundSize, tasks: Mapping[int, DoneTask]) -> Closing:
    """Sum up what is done, in the order of the numbers, so that equal bits give equal sums."""
    done = [tasks[number] for number in sorted(tasks)]
    train = [task for task in done if task.number < size.num_train]
    evaluation = [task for task in done if task.number >= size.num_train]
    credited: Counter[tuple[StageId, PeerId]] = Counter()
    for task in train:
        for credit in task.credits:
            credited[credit.stage, credit.peer] += credit.tokens
    bits = sum(1 << task.number for task in done)
    return Closing(
        run=run,
        round=round_id,
        num_train=size.num_train,
        num_eval=size.num_eval,
        done=bitmap(bits, size),
        loss_sum=math.fsum(task.loss_sum for task in train),
        target_tokens=sum(task.target_tokens for task in train),
        eval_loss_sum=math.fsum(task.loss_sum for task in evaluation),
        eval_tokens=sum(task.target_tokens for task in evaluation),
        credits=tuple(
            Credit(stage=stage, peer=peer, tokens=tokens)
            for (stage, peer), tokens in sorted(credited.items())[:MAX_CREDITS]
        ),
    )


def bitmap(bits: int, size: RoundSize) -> bytes:
    """Encode a set of numbers, low bit first."""
    return bits.to_bytes(-(-(size.num_train + size.num_eval) // 8), "little")


@dataclass(frozen=True, slots=True, kw_only=True)
class Draft:
    """What a steward has found out by the end of a reduce."""

    ballot: Ballot
    heard: HeardClosing
    contributors: tuple[Contribution, ...]
    staged: StagedBytes
    seats: Seats
    speeds: tuple[float, ...]
    joiners: tuple[PeerId, ...]


def draw_commit(settings: Settings, chain: Chain, slot: Slot, draft: Draft) -> Commit:
    """Write the record that ends the round, for the steward to sign."""
    parent, closing = slot.parent, draft.heard.closing
    norm = draft.staged.norm / sum(contribution.weight for contribution in draft.contributors)
    covered = [heard.closing for number, heard in slot.closings.items() if number <= closing.round]
    dropped, doubled = count_losses(settings.stage, draft.contributors, covered)
    return Commit(
        run=settings.run,
        stage=settings.stage,
        generation=chain.generation,
        first_round=parent.next_round,
        round=closing.round,
        version=Version(parent.version + 1),
        parent=parent.lineage,
        ballot=draft.ballot,
        contributors=draft.contributors,
        codec=draft.staged.codec,
        digest=draft.staged.digest,
        norm=norm,
        clip_scale=clip_scale(norm, settings.rules.clip_threshold),
        seats=draft.seats,
        speeds=draft.speeds,
        joiners=draft.joiners,
        summary=_summary(draft.heard),
        tokens_dropped=dropped,
        double_counted=doubled,
    )


def clip_scale(norm: float, threshold: float) -> float:
    """Return the factor that brings a gradient of this norm under the threshold; 1 if it is."""
    return 1.0 if norm <= threshold else threshold / norm


def weigh(
    settings: Settings, slot: Slot, claimed: Mapping[PeerId, tuple[int, float]], until: RoundId
) -> tuple[Contribution, ...]:
    """Say for how much of what members claim (tokens, norm) they count, in an average after round `until`.

    For what the closings since the parent credit them with. Of a round whose closing we have not heard, or whose list
    of credits is full, anybody may have done everything: what an honest member did shall count.
    """
    credited, num_unknown = _credits(settings.stage, slot, until)
    spare = num_unknown * settings.rules.tokens_per_round
    return tuple(
        Contribution(peer=peer, tokens=tokens, weight=min(tokens, credited[peer] + spare), norm=norm)
        for peer, (tokens, norm) in claimed.items()
    )


def _credits(stage: StageId, slot: Slot, until: RoundId) -> tuple[Counter[PeerId], int]:
    """Return what a stage's peers are credited with, and of how many rounds we do not know it."""
    first = slot.parent.next_round
    covered = [heard.closing for number, heard in slot.closings.items() if first <= number <= until]
    known = [closing for closing in covered if len(closing.credits) < MAX_CREDITS]
    return credits_of(stage, known), until + 1 - first - len(known)


def credits_of(stage: StageId, closings: Iterable[Closing]) -> Counter[PeerId]:
    """Add up what closings credit the peers of a stage with."""
    credited: Counter[PeerId] = Counter()
    for closing in closings:
        for credit in closing.credits:
            if credit.stage == stage:
                credited[credit.peer] += credit.tokens
    return credited


def count_losses(stage: StageId, contributors: Sequence[Contribution], closings: Iterable[Closing]) -> tuple[int, int]:
    """Return (tokens dropped, tokens double counted) of one stage over all rounds that a commit covers.

    Dropped is what somebody is credited with and did not bring: it died, was left out, or had to begin its sum anew.
    """
    credited = credits_of(stage, closings)
    accumulated = {contribution.peer: contribution.tokens for contribution in contributors}
    dropped = sum(max(0, tokens - accumulated.get(peer, 0)) for peer, tokens in credited.items())
    doubled = sum(max(0, tokens - credited[peer]) for peer, tokens in accumulated.items())
    return min(dropped, MAX_LOSSES), min(doubled, MAX_LOSSES)


def group_id(slot: Slot, ballot: Ballot, group: Sequence[Contribution], *, codec: str, round_id: RoundId) -> Digest:
    """Name a reduce: another ballot, list, codec or round is another group, so nothing is ever mixed."""
    how = f"/{codec}/{round_id}/".encode()
    words = [slot.parent.lineage, ballot.to_bytes(), how, *(contribution.to_bytes() for contribution in group)]
    return digest(b"handcar group", *words)


def check_proposal(
    settings: Settings, slot: Slot, commit: Commit, *, staged: StagedBytes | None, banned: frozenset[PeerId]
) -> None:
    """Raise `PeerFault` unless a member that knows only its own part can agree.

    The chain has been checked already (`Chain.follows_head`). Without staged bytes only the shape is looked
    at; the bytes are compared by digest when they are fetched.
    """
    me = settings.me.peer
    mine = next((each for each in commit.contributors if each.peer == me), None)
    if mine is not None and slot.tokens is not None and (mine.tokens, mine.norm) != (slot.tokens, slot.norm):
        raise PeerFault(
            f"it weighs us with {mine.tokens} tokens, norm {mine.norm:g} instead of {slot.tokens}, norm {slot.norm:g}"
        )
    check_weights(settings, slot, commit)
    for seat in commit.seats:
        if seat.peer in banned:
            raise PeerFault(f"it seats {seat.peer}, who is banned")
        if seat not in slot.parent.seats and seat.peer not in commit.joiners:
            raise PeerFault(f"it seats {seat.peer}, who is neither a member nor a joiner")
    if staged is not None and staged.are_of(commit):
        check_scale(settings.rules, commit, staged)


def check_weights(settings: Settings, slot: Slot, commit: Commit) -> None:
    """Raise `PeerFault` if members count for other than what they are credited with, as far as we know.

    We know if we have heard all closings that a commit covers, and hold the last of them for the same. Those before it
    may still differ, as two clocks may close one round: whoever disagrees with most stewards gives in, or with one of
    two that comes first in order. Otherwise a stage would stand still.
    """
    heard = slot.closings.get(commit.round)
    if heard is None or digest(heard.signed.payload) != commit.summary.closing_digest:
        return
    credited, num_unknown = _credits(settings.stage, slot, commit.round)
    gives_in = commit.first_round < commit.round and is_quorum(slot.objected, slot.order, break_tie=True)
    if num_unknown or gives_in:
        return
    for each in commit.contributors:
        if each.weight != min(each.tokens, credited[each.peer]):
            raise PeerFault(f"it counts {each.peer} for {each.weight} tokens instead of {credited[each.peer]}")


def check_scale(rules: RoundRules, commit: Commit, staged: StagedBytes) -> None:
    """Raise `PeerFault` unless the commit's scale fits our own norm of the same bytes."""
    own = clip_scale(staged.norm / commit.total_tokens, rules.clip_threshold)
    if abs(commit.clip_scale - own) > rules.scale_tolerance * own:
        raise PeerFault(f"its clip scale is {commit.clip_scale:.6g}, ours is {own:.6g}")


def _summary(heard: HeardClosing) -> RoundSummary:
    closing = heard.closing
    return RoundSummary(
        round=closing.round,
        clock=heard.signed.signer,
        closing_digest=digest(heard.signed.payload),
        tasks_done=closing.tasks_done,
        tasks_lost=closing.tasks_lost,
        evals_done=closing.evals_done,
        loss_sum=closing.loss_sum,
        target_tokens=closing.target_tokens,
        eval_loss_sum=closing.eval_loss_sum,
        eval_tokens=closing.eval_tokens,
    )
