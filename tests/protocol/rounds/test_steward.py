"""The conductor: whom it waits for, whom it leaves out, and when it must not go on."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, TypeVar

import pytest

from protocol.ids import Digest, PeerId, RoundId, digest
from protocol.rounds.events import Announce, Report, Send, Step, Trouble
from protocol.rounds.messages import (
    MAX_BALLOT,
    Accept,
    Ballot,
    Begin,
    Committed,
    Decline,
    Outbid,
    Ping,
    Pong,
    Propose,
    Ready,
    ReduceResult,
    StageMessage,
    StillHere,
    VoidRound,
    Vote,
)
from protocol.rounds.slot import StagedBytes
from protocol.rounds.steward import SOLO_AFTER_FAILURES, Phase, Steward
from protocol.signing import Signed
from tests.protocol.rounds.builders import RULES, STAGE, TIMERS, A, B, C, chain, closing, commit, heard, settings, slot

M = TypeVar("M", bound=StageMessage)
SUM = digest(b"sum")


class Case:
    """The steward is the first in order of three members, unless told otherwise."""

    def __init__(self, members: tuple[PeerId, ...] = (A, B, C), *, rank: int = 0, company: bool = True) -> None:
        self.chain = chain(A, *members)
        self.slot = slot(self.chain)
        self.me = self.slot.order[rank]
        self.others = [peer for peer in self.slot.order if peer != self.me]
        self.steward = Steward(settings(self.me), self.slot, self.chain)
        self.address: dict[str, Any] = {"stage": STAGE, "parent": self.chain.head.lineage}
        self.now_s = 0.0
        self.company = company
        self.talkers: set[PeerId] = set()
        """Members that say something at every beat, though not what is waited for."""

    @property
    def ballot(self) -> Ballot:
        assert self.steward.ballot is not None
        return self.steward.ballot

    def start(self) -> list[Step]:
        return self.steward.start(self.now_s)

    def pong(self, peer: PeerId, tokens: int | None = 10, vote: Vote | None = None, **fields: Any) -> list[Step]:
        fields = {"leaving": False, **fields}
        pong = Pong(**self.address, ballot=self.ballot, tokens=tokens, vote=vote, **fields)
        return self.steward.on_pong(peer, pong, self.now_s)

    def result(
        self, peer: PeerId, group: Begin, total: Digest | None = SUM, suspect: PeerId | None = None
    ) -> list[Step]:
        result = ReduceResult(
            **self.address, ballot=self.ballot, group_id=group.group_id, digest=total, norm=60.0, suspect=suspect
        )
        return self.steward.on_result(peer, result, self.now_s)

    def accept(self, peer: PeerId) -> list[Step]:
        return self.steward.on_accept(peer, Accept(**self.address, ballot=self.ballot))

    def wait(self, seconds: float) -> list[Step]:
        """Tick by beats and return the steps of the last tick."""
        steps: list[Step] = []
        until_s = self.now_s + seconds
        while self.now_s < until_s - 1e-9:
            steps = self.beat()
            if any(isinstance(step, Send) and isinstance(step.message, Begin | Propose | VoidRound) for step in steps):
                return steps
        return steps

    def beat(self) -> list[Step]:
        """Let one beat pass."""
        self.now_s += TIMERS.beat_s
        if self.company:
            self.slot.company_s = self.now_s
        self.slot.spoke_s.update(dict.fromkeys(self.talkers, self.now_s))
        return self.steward.tick(self.now_s)

    def to_begin(self) -> Begin:
        """Ping, and have everybody answer."""
        self.start()
        for peer in self.slot.order:
            steps = self.pong(peer)
        return only(Begin, steps)

    def to_propose(self) -> Propose:
        """And sum."""
        begin = self.to_begin()
        for each in begin.group:
            steps = self.result(each.peer, begin)
        return only(Propose, steps)


def only(kind: type[M], steps: list[Step]) -> M:
    """Return the one message of a kind, which may go to several."""
    found = [step.message for step in steps if isinstance(step, Send) and isinstance(step.message, kind)]
    assert found, f"no {kind.__name__} in {steps}"
    assert all(each == found[0] for each in found)
    return found[0]


def targets(kind: type[object], steps: list[Step]) -> set[PeerId]:
    """Return who gets a kind of message."""
    return {step.to for step in steps if isinstance(step, Send) and isinstance(step.message, kind)}


def test_an_undisturbed_round_goes_ping_begin_propose_commit() -> None:
    """Everybody is asked each time, itself included, and the commit names everybody."""
    case = Case()
    assert targets(Ping, case.start()) == {A, B, C}
    for peer in case.slot.order:
        steps = case.pong(peer)
    assert targets(Begin, steps) == {A, B, C}
    begin = only(Begin, steps)
    for peer in case.slot.order:
        steps = case.result(peer, begin)
    assert targets(Propose, steps) == {A, B, C}
    for peer in case.slot.order:
        steps = case.accept(peer)
    (announce,) = [step for step in steps if isinstance(step, Announce)]
    assert announce.to == frozenset(case.others)
    record = case.chain.follows_head(only(Committed, steps).commit)
    assert [each.peer for each in record.contributors] == list(case.slot.order)
    assert {each.peer for each in record.seats} == {A, B, C}
    assert case.steward.phase is Phase.IDLE


def test_a_majority_need_not_wait_for_the_rest_longer_than_the_ping_timeout() -> None:
    """Two of three; the third is neither summed nor seated."""
    case = Case()
    case.start()
    for peer in case.slot.order[:2]:
        assert not case.pong(peer)
    steps = case.wait(TIMERS.ping_timeout_s)
    assert {each.peer for each in only(Begin, steps).group} == set(case.slot.order[:2])


@pytest.mark.parametrize(("company", "wait_s"), [(True, TIMERS.patience_s), (False, TIMERS.isolation_s)])
def test_a_minority_goes_on_only_when_its_patience_is_at_an_end(company: bool, wait_s: float) -> None:
    """One of three; much later still if it hears nobody at all, because then its own line may be down."""
    case = Case(company=company)
    case.start()
    case.pong(case.me)
    assert not targets(Begin, case.wait(wait_s - 1.0))
    assert targets(Begin, case.wait(1.5)) == {case.me}


def test_company_that_was_heard_before_the_others_fell_silent_proves_nothing() -> None:
    """A line that broke took everybody away, though not in the same moment."""
    case = Case(company=False)
    case.start()
    case.pong(case.me)
    case.slot.company_s = TIMERS.beat_s
    assert not targets(Begin, case.wait(TIMERS.patience_s + 2.0))


def test_a_line_that_comes_back_gives_the_others_a_moment() -> None:
    """They have been silent for longer than anybody's patience, and may answer at any moment. Oracle: one ping's time
    from when anybody was heard again."""
    case = Case(company=False)
    case.start()
    case.pong(case.me)
    assert not targets(Begin, case.wait(2 * TIMERS.patience_s))
    case.slot.company_s = case.slot.company_since_s = case.now_s
    assert not targets(Begin, case.wait(TIMERS.ping_timeout_s - TIMERS.beat_s))
    assert targets(Begin, case.wait(TIMERS.beat_s)) == {case.me}


def test_the_certainly_dead_are_not_waited_for() -> None:
    """Their hosts refuse, so the one that is left is everybody there is."""
    case = Case()
    case.slot.gone = set(case.others)
    case.start()
    assert targets(Begin, case.pong(case.me)) == {case.me}


def test_a_death_does_not_make_a_minority_a_quorum() -> None:
    """One dead, one silent: the first of three waits out its patience, for the two others may have gone on."""
    case = Case()
    case.slot.gone = {case.others[0]}
    case.start()
    case.pong(case.me)
    assert not targets(Begin, case.wait(TIMERS.patience_s - 1.0))
    assert targets(Begin, case.wait(1.5)) == {case.me}


def test_a_vote_that_the_dead_may_have_made_final_is_not_passed_over() -> None:
    """One dead member and the voter are two of three: that we object is no reason to decide something else."""
    for dead, passes in ((1, False), (0, True)):
        case = Case()
        case.slot.gone = set(case.others[:dead])
        case.slot.staged = StagedBytes(SUM, 600.0, "fp32", RoundId(0))
        case.start()
        vote = _voted(case, 1)
        case.pong(case.me)
        case.pong(case.others[0]) if not dead else None
        steps = case.pong(case.others[1], vote=vote)
        assert bool(targets(Begin, steps)) is passes
        assert bool(targets(Propose, steps)) is not passes


def test_who_is_busy_is_waited_for_longer_than_who_is_silent() -> None:
    """A slow card that finishes its last task is no absentee."""
    case = Case()
    case.start()
    case.pong(case.me)
    case.pong(case.others[0])
    case.pong(case.others[1], tokens=None)
    case.talkers = {case.others[1]}
    assert not targets(Begin, case.wait(TIMERS.ping_timeout_s + 5.0))
    assert len(only(Begin, case.pong(case.others[1], tokens=3)).group) == 3


def test_who_was_busy_and_has_vanished_is_not_waited_for_any_longer() -> None:
    """It answered the ping once and then nothing: the others go on after the short timeout, not after the long one."""
    case = Case()
    case.start()
    for peer, tokens in ((case.me, 10), (case.others[0], 10), (case.others[1], None)):
        case.pong(peer, tokens=tokens)
    assert targets(Begin, case.wait(TIMERS.ping_timeout_s)) == {case.me, case.others[0]}


def test_a_voter_that_fetches_is_waited_for_only_as_long_as_it_says_so() -> None:
    """It is given up after the short timeout of silence, and at the latest when the long one is over."""
    case = Case()
    case.to_propose()
    fetching, other = case.others
    for peer in (case.me, other):
        case.accept(peer)
    case.talkers = {fetching}
    for _ in range(100):
        assert targets(Propose, case.beat()) == {fetching}
    case.talkers = set()
    for _ in range(round(TIMERS.ping_timeout_s / TIMERS.beat_s) - 1):
        assert not reports_of(case.beat())
    assert reports_of(case.beat()) == [Trouble.BALLOT_FAILED]


def reports_of(steps: list[Step]) -> list[Trouble]:
    return [step.trouble for step in steps if isinstance(step, Report)]


def test_half_the_members_suffice_only_with_the_first_and_only_if_it_never_slept() -> None:
    """Of two: the first may go on at once, the second may not, nor the first after it was stopped."""
    for rank, slept, goes_on in ((0, False, True), (1, False, False), (0, True, False)):
        case = Case((A, B), rank=rank)
        case.slot.slept = slept
        case.start()
        case.pong(case.me)
        assert bool(targets(Begin, case.wait(TIMERS.ping_timeout_s + 1.0))) is goes_on


def test_waking_up_starts_all_waiting_over() -> None:
    """While we were stopped nobody could have answered: the patience of before counts for nothing."""
    case = Case()
    case.start()
    case.pong(case.me)
    case.now_s += 10 * TIMERS.patience_s
    case.slot.slept = True
    case.steward.wake(case.now_s)
    assert not targets(Begin, case.wait(TIMERS.patience_s - 1.0))


def test_a_vote_is_proposed_again_unchanged_and_without_a_reduce() -> None:
    """The newest one, if there are several: an earlier steward may have made it final."""
    case = Case()
    old, new = (_voted(case, number) for number in (1, 2))
    case.steward.ballot = Ballot(number=7, steward=case.others[0])
    case.start()
    case.pong(case.me)
    case.pong(case.others[0], vote=old)
    propose = only(Propose, case.pong(case.others[1], vote=new))
    assert propose.commit == new.commit
    assert propose.ballot == Ballot(number=8, steward=case.me)


def _voted(case: Case, number: int) -> Vote:
    ballot = Ballot(number=number, steward=case.others[0])
    signed: Signed = commit(case.chain.head.lineage, signer=case.others[0], ballot=ballot)
    return Vote(ballot=ballot, commit=signed)


def test_nothing_accumulated_is_a_void_round() -> None:
    """No reduce, no division by zero, no commit."""
    case = Case()
    case.start()
    for peer in case.slot.order:
        steps = case.pong(peer, tokens=0)
    assert targets(VoidRound, steps) == {A, B, C}
    assert only(VoidRound, steps).round == 0


def test_a_failed_reduce_leaves_out_one_scapegoat_and_in_the_end_all_but_one() -> None:
    """Who is left out still votes. Oracle: the groups of five attempts, every one of which fails."""
    case = Case()
    suspect = case.others[0]
    sizes = []
    begin = case.to_begin()
    for _ in range(5):
        sizes.append(len(begin.group))
        failed = case.result(begin.group[-1].peer, begin, total=None, suspect=suspect)
        assert [step.trouble for step in failed if isinstance(step, Report)] == [Trouble.BALLOT_FAILED]
        assert targets(Ping, case.wait(TIMERS.beat_s)) == {A, B, C}
        for peer in case.slot.order:
            steps = case.pong(peer)
        begin = only(Begin, steps)
        assert suspect not in {each.peer for each in begin.group} or len(begin.group) == 1
    assert sizes == [3, 2, 2, 1, 1]


def test_who_has_failed_alone_is_not_chosen_again_while_another_has_a_sum() -> None:
    """The largest sum first, then the next; those without tokens never; in the end the steward's own."""
    case = Case()
    large, none = case.others
    tokens = {case.me: 5, large: 9, none: 0}
    singles = []
    case.start()
    for _ in range(7):
        for peer in case.slot.order:
            steps = case.pong(peer, tokens=tokens[peer])
        begin = only(Begin, steps)
        if len(begin.group) == 1:
            singles.append(begin.group[0].peer)
        case.result(begin.group[0].peer, begin, total=None)
        case.wait(TIMERS.beat_s)
    assert singles == [large, case.me, case.me, case.me]


def test_sums_that_differ_are_not_committed_and_the_odd_one_is_named() -> None:
    """And left out of the next attempt."""
    case = Case()
    odd = case.others[1]
    begin = case.to_begin()
    for peer in case.slot.order:
        steps = case.result(peer, begin, total=digest(b"other") if peer == odd else SUM)
    assert [step.peer for step in steps if isinstance(step, Report) and step.trouble is Trouble.DIVERGED] == [odd]
    assert not targets(Propose, steps)
    case.wait(TIMERS.beat_s)
    for peer in case.slot.order:
        steps = case.pong(peer)
    assert odd not in {each.peer for each in only(Begin, steps).group}


def test_a_newer_ballot_silences_us_and_ours_is_newer_next_time() -> None:
    """Ballots only grow."""
    case = Case()
    case.start()
    newer = Ballot(number=5, steward=case.others[0])
    outbid = Outbid(**case.address, promised=newer)
    assert case.steward.on_outbid(outbid, case.now_s) == []
    assert case.steward.phase is Phase.IDLE
    assert case.steward.tick(case.now_s + 1.0) == []
    case.start()
    assert case.ballot.outranks(newer)


def test_when_the_numbers_of_ballots_are_used_up_nothing_happens_any_more() -> None:
    """Instead of a ballot that cannot be sent."""
    case = Case()
    case.slot.promised = Ballot(number=MAX_BALLOT, steward=case.others[0])
    assert case.start() == []
    assert not case.steward.is_conducting
    case.slot.promised = Ballot(number=MAX_BALLOT - 1, steward=case.others[0])
    assert targets(Ping, case.start()) == {A, B, C}


def test_the_last_acceptance_makes_a_commit_final_and_not_one_earlier() -> None:
    """Whoever answered the ping must accept: a later steward may meet only that one."""
    case = Case()
    case.to_propose()
    for peer in case.slot.order[:2]:
        assert case.accept(peer) == []
    assert case.accept(case.slot.order[2])


def test_who_cannot_get_the_bytes_is_left_out_if_the_others_are_enough() -> None:
    """The same commit is proposed to the others; its seat stays in the record, which is unchanged."""
    case = Case()
    propose = case.to_propose()
    unable = case.others[0]
    decline = Decline(**case.address, ballot=case.ballot, reason="nobody has them", objection=False)
    case.steward.on_decline(unable, decline, case.now_s)
    case.wait(TIMERS.beat_s)
    vote = Vote(ballot=propose.ballot, commit=propose.commit)
    for peer in case.slot.order:
        steps = case.pong(peer, vote=None if peer == unable else vote)
    assert targets(Propose, steps) == {A, B, C} - {unable}
    assert only(Propose, steps).commit == propose.commit


def test_an_objection_of_the_others_makes_the_steward_step_down() -> None:
    """It neither repeats itself nor goes on alone when its patience is at an end."""
    case = Case()
    case.to_propose()
    decline = Decline(**case.address, ballot=case.ballot, reason="wrong scale", objection=True)
    for peer in case.others:
        case.steward.phase = Phase.PROPOSING
        case.steward.on_decline(peer, decline, case.now_s)
    assert case.steward.has_stepped_down
    assert not case.steward.is_conducting
    case.start()
    case.pong(case.me)
    assert not targets(Begin, case.wait(3 * TIMERS.patience_s))


def test_joiners_get_a_seat_and_leavers_lose_theirs() -> None:
    """The joiner is listed as one who has to fetch; the last member never leaves an empty stage behind."""
    case = Case((A,))
    ready = Ready(
        stage=STAGE,
        session=5,
        generation=1,
        lineage=case.chain.head.lineage,
        version=case.chain.head.version,
        state_digest=None,
    )
    for joiners, seats in (({C: ready}, [C]), ({}, [A])):
        case.slot.ready = joiners
        case.start()
        begin = only(Begin, case.pong(A, leaving=True))
        record = case.chain.follows_head(only(Propose, case.result(A, begin)).commit)
        assert [each.peer for each in record.seats] == seats
        assert list(record.joiners) == list(joiners)


def test_unanswered_questions_are_repeated_and_the_others_hear_that_we_live() -> None:
    """At every beat."""
    case = Case()
    case.start()
    case.pong(case.others[0])
    steps = case.wait(TIMERS.beat_s)
    assert targets(Ping, steps) == {A, B, C} - {case.others[0]}
    assert targets(StillHere, steps) == {case.others[0]}


def test_a_member_that_never_ends_its_reduce_is_given_up() -> None:
    """After the reduce timeout the next ballot begins, and the missing one is the scapegoat."""
    case = Case()
    begin = case.to_begin()
    late = begin.group[-1].peer if begin.group[-1].peer != case.me else begin.group[0].peer
    for each in begin.group:
        if each.peer != late:
            case.result(each.peer, begin)
    case.now_s += TIMERS.reduce_timeout_s + 1.0
    assert any(isinstance(step, Report) for step in case.steward.tick(case.now_s))
    assert targets(Ping, case.wait(TIMERS.beat_s)) == {A, B, C}
    for peer in case.slot.order:
        steps = case.pong(peer)
    assert late not in {each.peer for each in only(Begin, steps).group}


def test_who_dies_after_the_sum_was_made_is_not_waited_for() -> None:
    """Oracle: the next beat, long before any timeout; the sum is made again by those who live."""
    case = Case()
    begin = case.to_begin()
    dead, alive = case.others
    for peer in (case.me, alive):
        case.result(peer, begin)
    case.slot.gone = {dead}
    failed = case.wait(TIMERS.beat_s)
    assert [step.trouble for step in failed if isinstance(step, Report)] == [Trouble.BALLOT_FAILED]
    assert dead not in targets(Ping, case.wait(TIMERS.beat_s))
    case.pong(case.me)
    again = only(Begin, case.pong(alive))
    assert {each.peer for each in again.group} == {case.me, alive}


def test_who_dies_before_it_has_accepted_is_not_waited_for() -> None:
    """Oracle: the same commit again (somebody may have it already), accepted by those who live."""
    case = Case()
    propose = case.to_propose()
    dead, alive = case.others
    case.accept(case.me)
    case.slot.gone = {dead}
    case.wait(TIMERS.beat_s)
    case.wait(TIMERS.beat_s)
    vote = Vote(ballot=propose.ballot, commit=propose.commit)
    case.pong(case.me, vote=vote)
    assert only(Propose, case.pong(alive)).commit == propose.commit
    case.accept(case.me)
    assert any(isinstance(step, Announce) for step in case.accept(alive))


@pytest.mark.parametrize(
    ("rates", "codec"), [((9e3, 9e3, 9e3), "fp16"), ((9e3, 40.0, 9e3), "sparse"), ((None,) * 3, "int8")]
)
def test_the_codec_is_for_the_slowest_who_takes_part(rates: tuple[float | None, ...], codec: str) -> None:
    """Oracle: 1,024 numbers in a tenth of 10 s, by `choose_codec`; the commit says what its bytes are in."""
    case = Case()
    rules = replace(RULES, codecs=("fp16", "int8", "sparse"), num_averaged=lambda _round: 1024)
    case.steward._settings = case.chain._settings = replace(case.steward._settings, rules=rules)
    case.slot.round_s = 10.0
    case.start()
    for peer, rate in zip(case.slot.order, rates, strict=True):
        steps = case.pong(peer, bytes_per_s=rate)
    begin = only(Begin, steps)
    assert (begin.codec, begin.round) == (codec, case.slot.round)
    for each in begin.group:
        steps = case.result(each.peer, begin)
    assert case.chain.follows_head(only(Propose, steps).commit).codec == codec


def test_members_count_for_what_the_closing_credits_them_with() -> None:
    """All claim a thousand times as much. Oracle: the closing, which gives a 200 tokens, b and c 100."""
    case = Case()
    case.start()
    for peer in case.slot.order:
        steps = case.pong(peer, tokens=10**6)
    group = only(Begin, steps).group
    assert {each.peer: each.weight for each in group} == {A: 200, B: 100, C: 100}
    assert {each.tokens for each in group} == {10**6}


def test_if_nobodys_work_is_credited_the_round_is_void_and_all_keep_what_they_have() -> None:
    """A void round leaves sums where they are: what was done may be credited with the next."""
    case = Case()
    case.slot.closings[RoundId(0)] = heard(closing(credits=()))
    case.start()
    for peer in case.slot.order:
        steps = case.pong(peer, tokens=10)
    assert only(VoidRound, steps).round == 0


def test_after_failures_the_sum_goes_on_that_counts_most_and_not_the_one_that_claims_most() -> None:
    """Oracle: the closing, by which a did most."""
    case = Case()
    case.steward.num_failed = SOLO_AFTER_FAILURES
    case.start()
    for peer in case.slot.order:
        steps = case.pong(peer, tokens=10**6 if peer == C else 150)
    assert [(each.peer, each.weight) for each in only(Begin, steps).group] == [(A, 150)]


def test_two_objections_to_one_proposal_count_both_however_late_the_second_comes() -> None:
    """Or a steward that everybody is against would try again as long as the same one objects first."""
    case = Case()
    propose = case.to_propose()
    for peer in case.others:
        decline = Decline(**case.address, ballot=propose.ballot, reason="no", objection=True)
        case.steward.on_decline(peer, decline, case.now_s)
    assert case.steward.has_stepped_down
    assert not case.steward.is_conducting
