"""Small parts for the tests of the round machine: members named a, b, c, their settings, charters and closings.

Owns: nothing but defaults. The notary is the simulator's, which signs with a name.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from protocol.ids import Lineage, PeerId, RoundId, RunId, StageId, Version, digest
from protocol.rounds import Chain, RoundRules, RoundSize, RoundTimers, Settings
from protocol.rounds.messages import (
    CHARTER_CONTEXT,
    CLOSING_CONTEXT,
    COMMIT_CONTEXT,
    Ballot,
    Charter,
    Closing,
    Commit,
    Contribution,
    Credit,
    DoneTask,
    RoundSummary,
    Seat,
)
from protocol.rounds.quorum import steward_order
from protocol.rounds.records import draw_closing
from protocol.rounds.slot import HeardClosing, Slot
from protocol.signing import Signed
from tests.sim.notary import FakeNotary

RUN = RunId("ab" * 16)
COORDINATOR = PeerId("coordinator")
A, B, C = PeerId("a"), PeerId("b"), PeerId("c")
STAGE = StageId(1)
TIMERS = RoundTimers()
RULES = RoundRules(size_of=lambda _round: RoundSize(4), clip_threshold=1.0)
STATE = digest(b"state")


def seat(peer: PeerId, session: int = 1) -> Seat:
    """Seat one life of a peer."""
    return Seat(peer=peer, session=session)


def settings(me: PeerId = A, *, stage: StageId = STAGE, **changes: Any) -> Settings:
    """Tell a machine who it is."""
    base = Settings(
        run=RUN,
        stage=stage,
        me=seat(me),
        coordinator=COORDINATOR,
        timers=TIMERS,
        rules=RULES,
        notary=FakeNotary(me),
    )
    return replace(base, **changes)


def charter(*members: PeerId, stage: StageId = STAGE, **changes: Any) -> Signed:
    """Found a stage."""
    plain: dict[str, Any] = {
        "run": RUN,
        "stage": stage,
        "generation": 1,
        "round": 0,
        "version": 0,
        "state_digest": STATE,
        "seats": tuple(seat(member) for member in members),
    }
    return FakeNotary(COORDINATOR).seal(CHARTER_CONTEXT, Charter.model_validate({**plain, **changes}))


def chain(me: PeerId = A, *members: PeerId, stage: StageId = STAGE) -> Chain:
    """Start a lineage."""
    return Chain.of_charter(settings(me, stage=stage), charter(*(members or (A, B, C)), stage=stage))


def done(number: int, *, tokens: int = 100, credits: tuple[Credit, ...] = ()) -> DoneTask:
    """Finish a number."""
    return DoneTask(number=number, evidence=b"proof", loss_sum=2.0 * tokens, target_tokens=tokens, credits=credits)


def closing(round_id: int = 0, *, numbers: tuple[int, ...] = (0, 1, 2, 3), clock: PeerId = A, **more: Any) -> Signed:
    """Close a round, in which each number was carried by one of a, b and c."""
    tasks = {
        number: done(number, **{"credits": (Credit(stage=STAGE, peer=(A, B, C)[number % 3], tokens=100),), **more})
        for number in numbers
    }
    record = draw_closing(RUN, RoundId(round_id), RoundSize(4), tasks)
    return FakeNotary(clock).seal(CLOSING_CONTEXT, record)


def heard(signed: Signed) -> HeardClosing:
    """Read a closing."""
    return HeardClosing(Closing.from_bytes(signed.payload), signed)


def slot(lineages: Chain, *, tokens: int | None = 10, **fields: Any) -> Slot:
    """Open and freeze the round after a chain's head."""
    head = lineages.head
    order = steward_order(RUN, STAGE, head.lineage, head.members)
    signed = closing(head.next_round)
    made = Slot(parent=head, order=order, round=head.next_round, heard_s=0.0, applied=True, frozen=True)
    made.contribution = tokens
    made.closings[head.next_round] = heard(signed)
    for name, value in fields.items():
        setattr(made, name, value)
    return made


def commit(
    parent: Lineage, /, *, signer: PeerId = A, members: tuple[PeerId, ...] = (A, B, C), **changes: Any
) -> Signed:
    """Write a commit that follows a chain of three members at version 0."""
    plain = Commit(
        run=RUN,
        stage=STAGE,
        generation=1,
        first_round=RoundId(0),
        round=RoundId(0),
        version=Version(1),
        parent=parent,
        ballot=Ballot(number=1, steward=signer),
        contributors=tuple(Contribution(peer=member, tokens=10, weight=10) for member in members),
        codec="fp32",
        digest=digest(b"sum"),
        norm=2.0,
        clip_scale=0.5,
        seats=tuple(seat(member) for member in members),
        speeds=(0.0,) * len(members),
        joiners=(),
        summary=RoundSummary(
            round=RoundId(0),
            clock=A,
            closing_digest=digest(closing().payload),
            tasks_done=4,
            tasks_lost=0,
            evals_done=0,
            loss_sum=1.0,
            target_tokens=400,
            eval_loss_sum=0.0,
            eval_tokens=0,
        ),
        tokens_dropped=0,
        double_counted=0,
    )
    return FakeNotary(signer).seal(COMMIT_CONTEXT, plain.model_copy(update=changes))
