"""The acceptor's rules, one by one. Together they are what keeps a stage in one lineage."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from protocol.errors import PeerFault
from protocol.ids import Digest, PeerId, RoundId, digest
from protocol.rounds.events import (
    AbortReduce,
    Fetch,
    Fetched,
    FetchFailed,
    ReduceDone,
    ReduceFailed,
    Report,
    Send,
    StartReduce,
    Step,
    Trouble,
)
from protocol.rounds.lineage import Chain
from protocol.rounds.messages import (
    Accept,
    Ballot,
    Begin,
    Commit,
    Contribution,
    Decline,
    Outbid,
    Ping,
    Pong,
    Propose,
    ReduceResult,
    StillHere,
    Vote,
)
from protocol.rounds.records import group_id
from protocol.rounds.slot import Slot, StagedBytes
from protocol.rounds.voter import Voter
from protocol.signing import Signed
from tests.protocol.rounds.builders import RULES, STAGE, TIMERS, A, B, C, chain, closing, commit, settings, slot

OLD, NEW = Ballot(number=1, steward=B), Ballot(number=2, steward=C)
GROUP = (Contribution(peer=A, tokens=10, weight=10), Contribution(peer=B, tokens=5, weight=5))


class Case:
    """Member a in a stage of three, frozen with 10 tokens."""

    def __init__(self, **fields: Any) -> None:
        self.chain: Chain = chain()
        self.slot: Slot = slot(self.chain, **fields)
        self.voter = Voter(settings(), self.slot, self.chain)
        self.address: dict[str, Any] = {"stage": STAGE, "parent": self.chain.head.lineage}

    def ping(self, ballot: Ballot = OLD, now_s: float = 0.0) -> list[Step]:
        ping = Ping(**self.address, ballot=ballot, generation=1, closing=closing())
        return self.voter.on_ping(ballot.steward, ping, now_s)

    def group_id(self, ballot: Ballot = OLD, group: tuple[Contribution, ...] = GROUP) -> Digest:
        return group_id(self.slot, ballot, group, codec="fp32", round_id=RoundId(0))

    def begin(self, ballot: Ballot = OLD, group: tuple[Contribution, ...] = GROUP) -> list[Step]:
        begin = Begin(
            **self.address,
            ballot=ballot,
            round=RoundId(0),
            codec="fp32",
            group_id=self.group_id(ballot, group),
            group=group,
        )
        return self.voter.on_begin(ballot.steward, begin, 0.0)

    def propose(self, ballot: Ballot = OLD, signed: Signed | None = None) -> list[Step]:
        signed = signed or commit(self.chain.head.lineage)
        propose = Propose(**self.address, ballot=ballot, commit=signed, sources=(A, B))
        return self.voter.on_propose(ballot.steward, propose, 0.0)

    def reduced(self, ballot: Ballot = OLD) -> list[Step]:
        return self.voter.on_reduced(ReduceDone(self.group_id(ballot), digest(b"sum"), 60.0))


def sent(steps: list[Step]) -> list[object]:
    return [step.message for step in steps if isinstance(step, Send)]


def test_a_ping_is_answered_with_tokens_and_without_a_vote_at_first() -> None:
    """And the promise is remembered."""
    case = Case()
    (pong,) = sent(case.ping())
    assert isinstance(pong, Pong)
    assert (pong.ballot, pong.tokens, pong.vote) == (OLD, 10, None)
    assert case.slot.promised == OLD


@pytest.mark.parametrize("message", ["ping", "begin", "propose"])
def test_an_older_ballot_is_never_answered(message: str) -> None:
    """Whatever it asks: the only word is which newer ballot has been promised, and nothing else changes."""
    case = Case(staged=StagedBytes(digest(b"sum"), 60.0, "fp32", RoundId(0)))
    case.ping(NEW)
    steps = getattr(case, message)(OLD)
    assert sent(steps) == [Outbid(**case.address, promised=NEW)]
    assert len(steps) == 1
    assert (case.slot.promised, case.slot.vote, case.slot.reducing) == (NEW, None, None)


def test_who_is_still_finishing_tasks_says_that_it_is_there() -> None:
    """And tells the tokens as soon as they are known, without being asked again."""
    case = Case(tokens=None)
    (busy,) = sent(case.ping())
    case.slot.contribution = 7
    (pong,) = sent(case.voter.on_frozen())
    assert isinstance(busy, Pong)
    assert isinstance(pong, Pong)
    assert (busy.tokens, pong.tokens) == (None, 7)


def test_a_reduce_begins_once_and_its_end_is_repeated() -> None:
    """Messages are repeated at every beat, work is not."""
    case = Case()
    case.ping()
    (start,) = case.begin()
    assert isinstance(start, StartReduce)
    assert start.group == GROUP
    assert start.num_asked == 3
    assert case.begin() == []
    (result,) = sent(case.reduced())
    assert isinstance(result, ReduceResult)
    assert result.digest == digest(b"sum")
    assert sent(case.begin()) == [result]


def test_a_newer_ballot_aborts_the_reduce_and_its_late_end_is_ignored() -> None:
    """The bytes of an aborted group never get staged."""
    case = Case()
    case.ping()
    case.begin()
    assert AbortReduce(case.group_id()) in case.ping(NEW)
    assert case.reduced(OLD) == []
    assert case.slot.staged is None


def test_a_group_that_weighs_us_wrongly_fails_at_once() -> None:
    """Instead of summing something else than was announced."""
    case = Case()
    case.ping()
    (result,) = sent(case.begin(group=(Contribution(peer=A, tokens=11, weight=11),)))
    assert isinstance(result, ReduceResult)
    assert result.digest is None
    assert "11" in result.reason


@pytest.mark.parametrize(
    "group",
    [
        (*GROUP, Contribution(peer=A, tokens=10, weight=10)),
        (*GROUP, Contribution(peer=PeerId("stranger"), tokens=1, weight=1)),
        (GROUP[0], Contribution(peer=B, tokens=5, weight=6)),
        tuple(each.model_copy(update={"weight": 0}) for each in GROUP),
    ],
    ids=["twice", "stranger", "more counts than is brought", "nothing counts"],
)
def test_a_group_that_is_none_fails_at_once(group: tuple[Contribution, ...]) -> None:
    """The reduce itself would take it for a mistake of our own."""
    case = Case()
    case.ping()
    (result,) = sent(case.begin(group=group))
    assert isinstance(result, ReduceResult)
    assert result.digest is None
    assert case.slot.reducing is None


def test_a_group_under_the_name_of_another_fails_at_once() -> None:
    """A name is used once: what is on the wire under it must never be mixed."""
    case = Case()
    case.ping()
    begin = Begin(**case.address, ballot=OLD, round=RoundId(0), codec="fp32", group_id=case.group_id(NEW), group=GROUP)
    (result,) = sent(case.voter.on_begin(B, begin, 0.0))
    assert isinstance(result, ReduceResult)
    assert result.digest is None


@pytest.mark.parametrize(("codec", "round_id"), [("int8", 1), ("fp32", 0)])
def test_a_group_that_averages_what_the_run_does_not(codec: str, round_id: int) -> None:
    """A codec that is not the run's; a round before the one that follows."""
    case = Case()
    parent = case.slot.parent
    case.slot.parent = replace(parent, next_round=RoundId(1))
    case.ping()
    begin = Begin(
        **case.address, ballot=OLD, round=RoundId(round_id), codec=codec, group_id=case.group_id(), group=GROUP
    )
    (result,) = sent(case.voter.on_begin(B, begin, 0.0))
    assert isinstance(result, ReduceResult)
    assert result.digest is None
    assert f"{codec} after round {round_id}" in result.reason


def test_what_was_measured_is_told_to_the_next_steward() -> None:
    """Oracle: the rate that the driver reports; a sum without one leaves it as it is."""
    case = Case()
    case.ping()
    case.begin()
    case.voter.on_reduced(ReduceDone(case.group_id(), digest(b"sum"), 60.0, 1e6))
    (pong,) = sent(case.ping(NEW))
    assert isinstance(pong, Pong)
    assert pong.bytes_per_s == 1e6
    case.begin(NEW)
    case.voter.on_reduced(ReduceDone(case.group_id(NEW), digest(b"sum"), 60.0))
    assert case.slot.measured.bytes_per_s == 1e6


@pytest.mark.parametrize("norm", [float("nan"), float("inf"), -1.0])
def test_a_sum_that_is_not_a_number_is_a_failed_reduce(norm: float) -> None:
    """It must not become an update."""
    case = Case()
    case.ping()
    case.begin()
    (result,) = sent(case.voter.on_reduced(ReduceDone(case.group_id(), digest(b"sum"), norm)))
    assert isinstance(result, ReduceResult)
    assert result.digest is None
    assert case.slot.staged is None


def test_a_failed_reduce_names_its_suspect() -> None:
    """The steward decides what to make of it."""
    case = Case()
    case.ping()
    case.begin()
    (result,) = sent(case.voter.on_reduced(ReduceFailed(case.group_id(), "x" * 999, B)))
    assert isinstance(result, ReduceResult)
    assert result.suspect == B
    assert len(result.reason) == 200


def test_with_the_bytes_at_hand_a_proposal_is_accepted_and_named_ever_after() -> None:
    """The vote is in the answer to the next steward: that is what lets it finish the same commit."""
    case = Case(staged=StagedBytes(digest(b"sum"), 60.0, "fp32", RoundId(0)))
    signed = commit(case.chain.head.lineage)
    assert sent(case.propose(OLD, signed)) == [Accept(**case.address, ballot=OLD)]
    (pong,) = sent(case.ping(NEW))
    assert isinstance(pong, Pong)
    assert pong.vote == Vote(ballot=OLD, commit=signed)


def test_without_the_bytes_they_are_fetched_first() -> None:
    """No acceptance before that, and a decline if nobody has them."""
    for outcome, answer in ((Fetched(digest(b"sum"), 60.0), Accept), (FetchFailed(digest(b"sum"), "gone"), Decline)):
        case = Case()
        (fetch,) = case.propose()
        assert isinstance(fetch, Fetch)
        assert fetch.sources == (B,)
        assert sent(case.propose()) == [StillHere(**case.address, ballot=OLD)], "asked twice"
        (message,) = sent(case.voter.on_fetched(outcome))
        assert isinstance(message, answer)
        assert not isinstance(message, Decline) or not message.objection


def test_bytes_that_come_after_a_newer_promise_accept_nothing() -> None:
    """They stay in staging, which is no harm."""
    case = Case()
    case.propose(OLD)
    case.ping(NEW)
    assert case.voter.on_fetched(Fetched(digest(b"sum"), 60.0)) == []
    assert case.slot.vote is None


def test_a_wrong_commit_is_declined_with_an_objection_and_reported() -> None:
    """Wrong by our own norm of the same bytes."""
    case = Case(staged=StagedBytes(digest(b"sum"), 600.0, "fp32", RoundId(0)))
    steps = case.propose()
    (decline,) = sent(steps)
    assert isinstance(decline, Decline)
    assert decline.objection
    assert any(isinstance(step, Report) and step.peer == B for step in steps)
    assert case.slot.vote is None


@pytest.mark.parametrize("changes", [{"codec": "int8"}, {"round": RoundId(2)}])
def test_bytes_that_a_commit_means_otherwise_are_not_those_at_hand(changes: dict[str, Any]) -> None:
    """The same digest, read as something else, is another update: it has to show that it fits. Oracle: `Fetch`."""
    case = Case(staged=StagedBytes(digest(b"sum"), 60.0, "fp32", RoundId(0)))
    case.chain._settings = replace(case.chain._settings, rules=replace(RULES, codecs=("fp32", "int8")))
    steps = case.propose(signed=commit(case.chain.head.lineage, **changes))
    assert [type(step) for step in steps] == [Fetch]
    assert case.slot.vote is None


def test_a_seat_of_somebody_banned_is_objected_to_unless_that_may_be_final_already() -> None:
    """It is in the commit's own ballot that it could still be left out."""
    for ballot, answer in ((OLD, Decline), (NEW, Accept)):
        case = Case(staged=StagedBytes(digest(b"sum"), 60.0, "fp32", RoundId(0)))
        case.voter.banned = frozenset({C})
        (message,) = sent(case.propose(ballot, commit(case.chain.head.lineage, signer=B)))
        assert isinstance(message, answer)


def test_another_sum_than_the_one_we_made_in_that_ballot_is_declined() -> None:
    """The steward had our result when it wrote the commit. Fetching its bytes instead would apply a lie."""
    case = Case()
    case.ping()
    case.begin()
    case.reduced()
    steps = case.propose(signed=commit(case.chain.head.lineage, signer=B, digest=digest(b"another sum")))
    (decline,) = sent(steps)
    assert isinstance(decline, Decline)
    assert decline.objection
    assert [(step.trouble, step.peer) for step in steps if isinstance(step, Report)] == [(Trouble.DIVERGED, B)]
    assert case.slot.vote is None


def test_the_sum_of_an_older_ballot_is_fetched_although_ours_was_another() -> None:
    """A steward that finds a vote proposes it as it is; what we summed since then does not count."""
    case = Case()
    case.ping()
    case.begin()
    case.reduced()
    case.ping(NEW)
    (fetch,) = case.propose(NEW, commit(case.chain.head.lineage, signer=B, digest=digest(b"another sum")))
    assert isinstance(fetch, Fetch)


def test_two_commits_in_one_ballot_are_a_fault() -> None:
    """A steward that says different things to different members is caught by whoever hears both."""
    case = Case(staged=StagedBytes(digest(b"sum"), 60.0, "fp32", RoundId(0)))
    case.propose()
    with pytest.raises(PeerFault, match="two commits"):
        case.propose(signed=commit(case.chain.head.lineage, tokens_dropped=5))


def test_a_ballot_that_takes_for_ever_stops_counting_as_a_sign_of_life() -> None:
    """A wedged steward beats on; its members stop believing it after the limit."""
    case = Case()
    case.ping(OLD, now_s=0.0)
    limit_s = TIMERS.ballot_limit_s
    for now_s in (limit_s - 1, limit_s + 1):
        assert case.voter.on_still_here(B, StillHere(**case.address, ballot=OLD).ballot, now_s) == []
    assert case.slot.heard_s == limit_s - 1


def _favours(me: PeerId) -> tuple[Contribution, ...]:
    """Let a member count for ten times what it is credited with."""
    return tuple(
        Contribution(peer=peer, tokens=2000 if peer == me else 10, weight=2000 if peer == me else 10)
        for peer in (A, B, C)
    )


def test_a_steward_that_favours_itself_is_refused() -> None:
    """It claims 2,000 tokens and is credited with 100. Oracle: the closing."""
    case = Case()
    case.ping()
    steps = case.propose(signed=commit(case.chain.head.lineage, signer=B, contributors=_favours(B)))
    (decline,) = sent(steps)
    assert isinstance(decline, Decline)
    assert decline.objection
    assert "2000 tokens instead of 100" in decline.reason


def test_a_steward_cannot_hide_behind_a_closing_that_it_has_not_shown() -> None:
    """By which nobody could check what it says. Nor behind another number, or somebody else's name."""
    case, lying = Case(), {"closing_digest": digest(b"a closing that nobody has seen")}
    case.ping()
    head = case.chain.head.lineage
    summary = Commit.from_bytes(commit(head).payload).summary.model_copy(update=lying)
    (decline,) = sent(case.propose(signed=commit(head, signer=B, contributors=_favours(B), summary=summary)))
    assert isinstance(decline, Decline)
    assert decline.objection
    assert "another closing" in decline.reason
    for ballot, label, complaint in (
        (NEW, Ballot(number=7, steward=C), "later ballot"),
        (NEW, Ballot(number=1, steward=C), "not heard of"),
        (NEW, OLD, "not the steward"),
    ):
        other = Case(staged=StagedBytes(digest(b"sum"), 60.0, "fp32", RoundId(0)))
        other.ping(ballot)
        (decline,) = sent(other.propose(ballot, commit(head, signer=C, ballot=label, summary=summary)))
        assert isinstance(decline, Decline)
        assert complaint in decline.reason


def test_what_most_want_to_finish_is_finished_though_its_closing_was_not_heard() -> None:
    """Two clocks have closed the round, and the first steward has died. Oracle: the answers to the next ones."""
    case = Case(staged=StagedBytes(digest(b"sum"), 60.0, "fp32", RoundId(0)))
    head, unheard = case.chain.head.lineage, {"closing_digest": digest(b"of the other clock")}
    summary = Commit.from_bytes(commit(head).payload).summary.model_copy(update=unheard)
    signed = commit(head, signer=B, summary=summary)
    answers = []
    for ballot in (NEW, Ballot(number=3, steward=A), Ballot(number=4, steward=C)):
        case.ping(ballot)
        (answer,) = sent(case.propose(ballot, signed))
        answers.append(type(answer))
    assert answers == [Decline, Decline, Accept]


def test_a_member_never_gives_in_about_a_single_round() -> None:
    """There is one closing that both name, so the steward is wrong, however often it comes."""
    case = Case()
    for number in range(1, 6):
        ballot = Ballot(number=number, steward=(B, C)[number % 2])
        case.ping(ballot)
        signed = commit(case.chain.head.lineage, signer=ballot.steward, contributors=_favours(B), ballot=ballot)
        (decline,) = sent(case.propose(ballot, signed))
        assert isinstance(decline, Decline)
    assert case.slot.objected == {B, C}
