"""The whole machine from outside: events in, actions out. Longer stories are told in tests/sim."""

from __future__ import annotations

import ast
from dataclasses import replace
from pathlib import Path
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

import protocol.rounds
from protocol.ids import PeerId, RoundId, StageId, digest
from protocol.rounds import ROUND_MESSAGES, RoundMachine, RoundSize, Standing
from protocol.rounds.events import (
    Action,
    Applied,
    Apply,
    Drain,
    Event,
    Fetched,
    Freeze,
    Frozen,
    Left,
    NewLineage,
    OpenRound,
    Quit,
    Received,
    ReduceDone,
    Rejoin,
    Replay,
    Report,
    Resync,
    RosterChanged,
    Send,
    StartReduce,
    Synced,
    TaskDone,
    Tick,
    Trouble,
)
from protocol.rounds.messages import (
    MAX_BALLOT,
    Ack,
    AskChain,
    Ballot,
    ChainAnswer,
    CharterNotice,
    ClosingNotice,
    Committed,
    Goodbye,
    Hello,
    Outbid,
    Ping,
    Pong,
    Propose,
    StageMessage,
    VoidRound,
)
from protocol.rounds.quorum import steward_order
from protocol.rounds.steward import Phase
from tests.protocol.rounds.builders import (
    COORDINATOR,
    RULES,
    STAGE,
    STATE,
    A,
    B,
    C,
    chain,
    charter,
    closing,
    commit,
    done,
    seat,
    settings,
)

FEEDER = PeerId("feeder")


def machine(*members: PeerId, stage: StageId = STAGE, **changes: Any) -> tuple[RoundMachine, list[Action]]:
    """Make a's machine, standing at a fresh charter; return it with what it wanted at the start."""
    made = RoundMachine(settings(A, stage=stage, **changes))
    made.handle(RosterChanged({StageId(0): (FEEDER,), stage: members}), 0.0)
    return made, made.handle(Synced(charter(*members, stage=stage), (), STATE), 0.0)


def close(made: RoundMachine, round_id: int = 0, now_s: float = 0.0) -> list[Action]:
    notice = ClosingNotice(stage=StageId(0), closing=closing(round_id, clock=FEEDER))
    return made.handle(Received(FEEDER, notice), now_s)


def kinds(actions: list[Action]) -> list[str]:
    return [type(action).__name__ for action in actions if not isinstance(action, Send)]


def test_a_stage_with_one_replica_needs_nobody() -> None:
    """From opening to opening without a single message but acknowledgements, and without waiting for any tick."""
    made, actions = machine(A)
    assert kinds(actions) == ["OpenRound"]
    assert kinds(close(made)) == ["Freeze"]
    (start,) = made.handle(Frozen(RoundId(0), 40), 0.0)
    assert isinstance(start, StartReduce)
    (apply,) = made.handle(ReduceDone(start.group_id, digest(b"sum"), 400.0), 0.0)
    assert isinstance(apply, Apply)
    assert (apply.commit.norm, apply.commit.clip_scale) == (10.0, 0.1)
    (opened,) = made.handle(Applied(apply.lineage, digest(b"next")), 0.0)
    assert isinstance(opened, OpenRound)
    assert (opened.round, opened.version, opened.fresh) == (1, 1, True)
    facts = made.statistics()
    assert (facts.standing, facts.num_commits, facts.num_ballots, facts.num_voids) == (Standing.OPEN, 1, 1, 0)


def test_a_void_round_opens_the_next_with_the_same_version_and_what_was_accumulated() -> None:
    """Nothing has changed but the number."""
    made, actions = machine(A)
    close(made)
    (opened,) = [a for a in made.handle(Frozen(RoundId(0), 0), 0.0) if isinstance(a, OpenRound)]
    assert (opened.round, opened.version, opened.fresh) == (1, 0, False)
    assert isinstance(actions[0], OpenRound)
    assert opened.lineage == actions[0].lineage
    assert made.statistics().num_voids == 1


def test_a_closing_of_a_later_round_covers_those_that_were_missed() -> None:
    """The commit says so in `first_round`, and the next round follows the closing."""
    made, _ = machine(A)
    close(made, 5)
    (start,) = made.handle(Frozen(RoundId(5), 40), 0.0)
    assert isinstance(start, StartReduce)
    (apply,) = made.handle(ReduceDone(start.group_id, digest(b"sum"), 1.0), 0.0)
    assert isinstance(apply, Apply)
    assert (apply.commit.first_round, apply.commit.round, apply.commit.version) == (0, 5, 1)
    assert close(made, 3) == [Send(FEEDER, Ack(stage=StageId(0), of=digest(closing(3, clock=FEEDER).payload)))]


def test_a_restarted_member_has_no_seat_and_says_so_to_who_pings_it() -> None:
    """Its seat belongs to an earlier session; the answer tells the steward that this one has died."""
    made = RoundMachine(replace(settings(A), me=seat(A, session=2)))
    made.handle(Synced(charter(A, B), (), STATE), 0.0)
    assert made.statistics().standing is Standing.LISTENING
    ping = Ping(
        stage=STAGE,
        parent=chain(A, A, B).head.lineage,
        ballot=Ballot(number=1, steward=B),
        generation=1,
        closing=closing(clock=FEEDER),
    )
    (answer,) = made.handle(Received(B, ping), 1.0)
    assert isinstance(answer, Send)
    assert isinstance(answer.message, Hello)
    assert answer.message.session == 2


def test_a_member_whose_state_was_fetched_anew_does_not_sit_where_it_sat() -> None:
    """It has forgotten what it promised in that seat."""
    made, _ = machine(A, B)
    assert made.statistics().standing is Standing.OPEN
    made.handle(Received(B, parted_hello()), 0.5)
    (resync,) = made.handle(Rejoin(chain(A, A, B).head.lineage, (B,)), 1.0)
    assert resync == Resync(charter(A, B), (B,), is_choice=True)
    made.handle(Synced(charter(A, B), (), STATE), 2.0)
    assert made.statistics().standing is Standing.LISTENING


def test_a_history_that_breaks_the_rules_is_fetched_anew() -> None:
    """A member that only reported it would stand nowhere for ever, and call itself ready."""
    made = RoundMachine(settings(A))
    head = chain(A, A, B).head.lineage
    stranger = commit(head, signer=PeerId("stranger"), members=(A, B))
    report, resync = made.handle(Synced(charter(A, B), (stranger,), STATE), 0.0)
    assert isinstance(report, Report)
    assert report.trouble is Trouble.FAULT
    assert isinstance(resync, Resync)
    made.handle(Synced(charter(A, B), (), STATE), 1.0)
    assert made.statistics().standing is not Standing.OUT


def test_a_final_commit_that_was_not_summed_here_is_replayed() -> None:
    """The bytes are fetched from those who summed them; afterwards the next round opens."""
    made, actions = machine(A, B, C)
    (opened,) = actions
    assert isinstance(opened, OpenRound)
    signed = commit(opened.lineage, signer=B)
    steps = made.handle(Received(B, Committed(stage=STAGE, commit=signed)), 0.0)
    (replay,) = [step for step in steps if isinstance(step, Replay)]
    assert replay.sources == (B, C)
    assert Send(B, Ack(stage=STAGE, of=digest(signed.payload))) in steps
    assert kinds(made.handle(Applied(replay.steps[-1].lineage, None), 0.0)) == ["OpenRound"]


def test_a_newer_charter_is_followed_in_place_if_the_state_is_the_same() -> None:
    """And fetched otherwise; an older generation is ignored."""
    made, _ = machine(A, B)
    same = made.handle(Received(COORDINATOR, CharterNotice(stage=STAGE, charter=charter(A, generation=2))), 0.0)
    assert kinds(same) == ["NewLineage", "OpenRound"]
    assert isinstance(same[0], NewLineage)
    old = made.handle(Received(COORDINATOR, CharterNotice(stage=STAGE, charter=charter(A, B))), 0.0)
    assert old == []
    other = charter(A, generation=3, state_digest=digest(b"other"))
    assert kinds(made.handle(Received(B, CharterNotice(stage=STAGE, charter=other)), 0.0)) == ["Resync"]
    assert made.statistics().standing is Standing.OUT


def test_leaving_waits_for_the_commit_and_ends_with_a_goodbye() -> None:
    """The work of the round counts; then the seat is empty."""
    made, _ = machine(A, B)
    assert made.handle(Drain(), 0.0) == []
    close(made)
    pongs = [a.message for a in made.handle(Frozen(RoundId(0), 40), 0.0) if isinstance(a, Send)]
    assert all(not isinstance(each, Pong) or each.leaving for each in pongs)
    signed = commit(chain(A, A, B).head.lineage, signer=B, members=(B,))
    (replay,) = [
        a for a in made.handle(Received(B, Committed(stage=STAGE, commit=signed)), 0.0) if isinstance(a, Replay)
    ]
    assert kinds(made.handle(Applied(replay.steps[-1].lineage, None), 0.0)) == ["Left"]
    assert [a.to for a in made.handle(Quit(), 0.0) if isinstance(a, Send) and isinstance(a.message, Goodbye)] == [B]


def test_an_only_replica_may_leave_after_its_commit() -> None:
    """Nobody else holds the state, but nobody is there to fetch it either; it keeps working until it ends."""
    made, _ = machine(A)
    made.handle(Drain(), 0.0)
    close(made)
    (start,) = made.handle(Frozen(RoundId(0), 40), 0.0)
    assert isinstance(start, StartReduce)
    (apply,) = made.handle(ReduceDone(start.group_id, digest(b"sum"), 1.0), 0.0)
    assert isinstance(apply, Apply)
    assert kinds(made.handle(Applied(apply.lineage, None), 0.0)) == ["Left", "OpenRound"]
    assert Left() not in made.handle(Tick(), 0.5)


def test_the_first_stage_counts_and_closes_by_itself() -> None:
    """The closing is also handed to ourselves, for the other stages that this peer may host."""
    rules = replace(RULES, size_of=lambda _round: RoundSize(1))
    made = RoundMachine(settings(A, stage=StageId(0), rules=rules))
    made.handle(RosterChanged({StageId(0): (A,), STAGE: (B, C)}), 0.0)
    made.handle(Synced(charter(A, stage=StageId(0)), (), STATE), 0.0)
    actions = made.handle(TaskDone(RoundId(0), done(0)), 0.0)
    notices = {
        action.to for action in actions if isinstance(action, Send) and isinstance(action.message, ClosingNotice)
    }
    assert notices == {A, B, C}
    assert any(isinstance(action, Freeze) for action in actions)
    late = made.handle(TaskDone(RoundId(0), done(0)), 0.0)
    assert late == []


def test_a_closing_by_a_stranger_is_reported_and_neither_followed_nor_acknowledged() -> None:
    """So that its sender repeats it until the DHT has told us who it is."""
    made, _ = machine(A)
    notice = ClosingNotice(stage=StageId(0), closing=closing(clock=B))
    (report,) = made.handle(Received(B, notice), 0.0)
    assert isinstance(report, Report)
    assert report.trouble is Trouble.STRANGE_CLOCK
    assert made.statistics().standing is Standing.OPEN


def test_the_banned_are_not_heard() -> None:
    """Whatever they say."""
    made, _ = machine(A, B)
    made.handle(RosterChanged({StageId(0): (FEEDER,)}, frozenset({B})), 0.0)
    assert made.handle(Received(B, CharterNotice(stage=STAGE, charter=charter(A, generation=9))), 0.0) == []


def test_the_banned_are_not_waited_for() -> None:
    """Of two members the one that is left goes on alone, whoever comes first in order: nobody dials a banned peer, so
    nobody would ever hear that it has gone."""
    first = set()
    for other in (B, C, PeerId("d"), PeerId("e"), PeerId("f")):
        made, actions = machine(A, other)
        (opened,) = [action for action in actions if isinstance(action, OpenRound)]
        first.add(steward_order(settings(A).run, STAGE, opened.lineage, (A, other))[0] == A)
        close(made)
        made.handle(Frozen(RoundId(0), 40), 0.0)
        made.handle(RosterChanged({StageId(0): (FEEDER,), STAGE: (A, other)}, frozenset({other})), 0.1)
        actions = [action for second in range(1, 60) for action in made.handle(Tick(), float(second))]
        assert any(isinstance(action, StartReduce) for action in actions), other
    assert first == {True, False}


def parted_hello() -> Hello:
    """Return what a replica says that stands in another branch, at the version of ours."""
    return Hello(
        stage=STAGE,
        session=1,
        generation=1,
        lineage=digest(b"another branch"),  # type: ignore[arg-type]
        version=chain().head.version,
        applied=True,
        state_digest=None,
        closed=-1,
    )


def test_a_branch_is_given_up_only_for_others_who_were_met() -> None:
    """It is the coordinator's word, and it may be old: another branch may be meant, or nobody there be in reach."""
    made, _ = machine(A, B)
    ours, hello = chain(A, A, B).head.lineage, parted_hello()
    rivals = [made.rival]
    assert made.handle(Rejoin(ours, (B,)), 0.0) == [], "B may be out of reach"
    made.handle(Received(B, hello), 0.0)
    rivals.append(made.rival)
    assert made.handle(Rejoin(hello.lineage, (B,)), 0.0) == [], "it is not ours"
    assert made.handle(Rejoin(ours, (C,)), 0.0) == [], "C may be out of reach"
    made.handle(Received(B, hello.model_copy(update={"lineage": ours})), 1.0)
    rivals.append(made.rival)
    made.handle(Received(B, hello), 2.0)
    assert Resync(charter(A, B), (B,), is_choice=True) in made.handle(Rejoin(ours, (B,)), 2.0)
    assert [*rivals, made.rival] == [None, hello.lineage, None, None], "met; joined us; joined by us"


def test_halves_that_have_lost_sight_of_where_they_parted_meet_all_the_same() -> None:
    """The other's oldest commit is newer than our newest: it may be ahead, or elsewhere, which looks the same."""
    made, _ = machine(A, B)
    ask(made, B, 0.0)
    answer = chain_answer(made)
    assert made.handle(Received(B, answer), 0.0) == [], "we do not look left behind"
    assert made.rival == answer.lineage


def test_a_fork_is_reported_once_and_refused() -> None:
    """Same version, other lineage: no state is exchanged."""
    made, _ = machine(A, B)
    hello = parted_hello()
    first, second = made.handle(Received(B, hello), 0.0), made.handle(Received(B, hello), 1.0)
    assert [each.trouble for each in first if isinstance(each, Report)] == [Trouble.FORKED]
    assert not [each for each in second if isinstance(each, Report)]


def test_strangers_on_other_branches_are_not_kept_in_mind() -> None:
    """A fork is between replicas of the stage; anybody can make lineages up."""
    made, _ = machine(A, B)
    for number in range(100):
        hello = Hello(
            stage=STAGE,
            session=1,
            generation=1,
            lineage=digest(b"another branch"),  # type: ignore[arg-type]
            version=chain().head.version,
            applied=True,
            state_digest=None,
            closed=-1,
        )
        steps = made.handle(Received(PeerId(f"stranger {number}"), hello), 0.0)
        assert not [each for each in steps if isinstance(each, Report)]
    assert not made._gossip._forks


def chain_answer(made: RoundMachine, version: int = 1_000) -> ChainAnswer:
    """Claim that the stage is at `version`, and that nobody can tell us how it came there."""
    assert made.chain is not None
    return ChainAnswer(
        stage=STAGE,
        known=False,
        charter=made.chain.signed_charter,
        commits=(),
        lineage=digest(b"far away"),  # type: ignore[arg-type]
        version=version,  # type: ignore[arg-type]
        oldest_version=version,  # type: ignore[arg-type]
    )


def ask(made: RoundMachine, peer: PeerId, now_s: float) -> list[Action]:
    """Make it ask a peer for its chain, by a commit that it cannot place."""
    return made.handle(Received(peer, Committed(stage=STAGE, commit=commit(digest(b"x"), signer=B))), now_s)  # type: ignore[arg-type]


def test_a_strangers_word_on_the_chain_is_neither_asked_for_nor_believed() -> None:
    """Whether the round is over or not. Oracle: no question goes out, and the round goes on."""
    made, _ = machine(A, B, C)
    close(made)
    stranger = PeerId("stranger")
    assert ask(made, stranger, 0.0) == []
    for now_s in (0.0, 10.0):
        assert made.handle(Received(stranger, chain_answer(made)), now_s) == []
    assert made.statistics().standing is Standing.FROZEN


def test_a_members_unasked_word_on_the_chain_is_a_reason_to_ask_and_no_more() -> None:
    """What comes of it depends on the answer."""
    made, _ = machine(A, B, C)
    assert made.handle(Received(B, chain_answer(made)), 0.0) == ask_chain(made, B)


def ask_chain(made: RoundMachine, to: PeerId) -> list[Action]:
    assert made.chain is not None
    head = made.chain.head
    return [Send(to, AskChain(stage=STAGE, generation=1, lineage=head.lineage, version=head.version))]


def test_nothing_can_have_happened_before_our_round_is_over() -> None:
    """A member says that we are a thousand versions behind, while the round is open: it lies, or has the wrong run."""
    made, _ = machine(A, B, C)
    ask(made, B, 0.0)
    assert made.handle(Received(B, chain_answer(made)), 0.1) == []
    assert made.statistics().standing is Standing.OPEN


def test_who_conducts_with_a_quorum_is_not_left_behind() -> None:
    """The others answer our ballot, so the stage stands where we stand, whatever one of them says besides."""
    made, now_s = frozen_steward()
    for _ in range(8):
        now_s += 0.5
        made.handle(Tick(), now_s)
        for peer in (B, C):
            made.handle(Received(peer, pong(made)), now_s)
    ask(made, B, now_s)
    assert made.handle(Received(B, chain_answer(made)), now_s) == []
    assert made.statistics().standing is Standing.FROZEN


def test_whose_ballots_nobody_answers_fetches_the_state_anew_but_not_twice_on_one_peers_word() -> None:
    """The rest of the stage is elsewhere and keeps no log that would lead there."""
    made, now_s = frozen_steward()
    for _ in range(8):
        now_s += 0.5
        made.handle(Tick(), now_s)
    ask(made, B, now_s)
    assert kinds(made.handle(Received(B, chain_answer(made)), now_s)) == ["Resync"]
    made.handle(Synced(charter(A, B, C), (), STATE), now_s)
    close(made, 1, now_s)
    ask(made, B, now_s + 1.0)
    assert kinds(made.handle(Received(B, chain_answer(made)), now_s + 1.0)) == []
    ask(made, C, now_s + 1.0)
    assert kinds(made.handle(Received(C, chain_answer(made)), now_s + 1.0)) == ["Resync"]


def frozen_steward() -> tuple[RoundMachine, float]:
    """Make a's machine conduct the end of round 0 with b and c, whoever is first in order."""
    made, _ = machine(A, B, C)
    close(made)
    made.handle(Frozen(RoundId(0), 10), 0.0)
    now_s = 0.0
    while made.statistics().phase is Phase.IDLE:
        now_s += 0.5
        made.handle(Tick(), now_s)
    return made, now_s


def pong(made: RoundMachine) -> Pong:
    """Answer a's ballot, still busy."""
    steward = made._member.steward
    assert steward is not None
    assert steward.ballot is not None
    parent = steward._slot.parent.lineage
    return Pong(stage=STAGE, parent=parent, ballot=steward.ballot, tokens=None, vote=None, leaving=False)


def test_equal_lineages_with_different_states_are_reported() -> None:
    """Broken memory, or another kind of device: the trust layer decides."""
    made, _ = machine(A, B)
    hello = Hello(
        stage=STAGE,
        session=1,
        generation=1,
        lineage=chain(A, A, B).head.lineage,
        version=chain().head.version,
        applied=True,
        state_digest=digest(b"other"),
        closed=-1,
    )
    assert [each.trouble for each in made.handle(Received(B, hello), 0.0) if isinstance(each, Report)] == [
        Trouble.DIVERGED
    ]


def test_a_message_in_the_name_of_another_steward_is_a_fault() -> None:
    """Ballots belong to who conducts them."""
    made, _ = machine(A, B, C)
    void_of_b = Ping(
        stage=STAGE,
        parent=chain().head.lineage,
        ballot=Ballot(number=1, steward=B),
        generation=1,
        closing=closing(clock=FEEDER),
    )
    (report,) = made.handle(Received(C, void_of_b), 0.0)
    assert isinstance(report, Report)
    assert (report.trouble, report.peer) == (Trouble.FAULT, C)


def test_a_void_reaches_no_further_than_the_closings_that_were_heard() -> None:
    """Otherwise a member could send the others to the end of the run."""
    made, _ = machine(A, B, C)
    close(made)
    parent = chain().head.lineage
    for round_id, is_followed in ((1, False), (2**40, False), (0, True)):
        void = VoidRound(stage=STAGE, parent=parent, ballot=Ballot(number=1, steward=B), round=RoundId(round_id))
        opened = [each for each in made.handle(Received(B, void), 0.0) if isinstance(each, OpenRound)]
        assert bool(opened) is is_followed
    assert made.statistics().round == 1


def test_a_ballot_that_leaps_or_comes_from_a_stranger_is_a_fault() -> None:
    """Neither an answer nor a question of such a ballot changes ours."""
    made, now_s = frozen_steward()
    ballot = made.statistics().ballot
    parent = chain().head.lineage
    far = Ballot(number=MAX_BALLOT, steward=B)
    ping = Ping(stage=STAGE, parent=parent, ballot=far, generation=1, closing=closing(clock=FEEDER))
    for sender, message in (
        (B, ping),
        (B, Outbid(stage=STAGE, parent=parent, promised=far)),
        (PeerId("stranger"), Outbid(stage=STAGE, parent=parent, promised=Ballot(number=ballot + 1, steward=B))),
    ):
        (report,) = made.handle(Received(sender, message), now_s)
        assert isinstance(report, Report)
        assert (report.trouble, report.peer) == (Trouble.FAULT, sender)
    assert (made.statistics().phase, made.statistics().ballot) == (Phase.PINGING, ballot)
    made.handle(Received(B, Outbid(stage=STAGE, parent=parent, promised=Ballot(number=ballot + 1, steward=B))), now_s)
    assert made.statistics().phase is Phase.IDLE


def test_a_void_does_not_undo_a_vote() -> None:
    """What a member has accepted may be final elsewhere."""
    made, _ = machine(A, B, C)
    close(made)
    made.handle(Frozen(RoundId(0), 10), 0.0)
    member = made._member
    assert member.slot is not None
    member.slot.promised = None
    signed = commit(member.slot.parent.lineage, signer=B, members=(B, C))
    propose = Propose(
        stage=STAGE,
        parent=member.slot.parent.lineage,
        ballot=Ballot(number=9, steward=B),
        commit=signed,
        sources=(B,),
    )
    made.handle(Received(B, propose), 0.0)
    made.handle(Fetched(digest(b"sum"), 40.0), 0.0)
    assert member.slot.vote is not None
    void = VoidRound(
        stage=STAGE, parent=member.slot.parent.lineage, ballot=Ballot(number=10, steward=C), round=RoundId(0)
    )
    assert made.handle(Received(C, void), 0.0) == []
    assert made.statistics().standing is Standing.FROZEN


EVENTS: st.SearchStrategy[Event] = st.one_of(
    st.just(Tick()),
    st.just(Drain()),
    st.just(Rejoin(chain().head.lineage, (B,))),
    st.builds(Frozen, st.just(RoundId(0)), st.integers(0, 100)),
    st.builds(ReduceDone, st.binary(min_size=32, max_size=32), st.just(digest(b"sum")), st.floats()),
    st.builds(Applied, st.just(chain().head.lineage), st.none()),
    st.builds(Synced, st.sampled_from([charter(A, B), charter(B), closing()]), st.just(()), st.just(STATE)),
)


def _plain(kind: type[StageMessage]) -> st.SearchStrategy[StageMessage]:
    """Make messages that are well formed and otherwise mostly nonsense."""
    lineage = chain(A, A, B).head.lineage
    known: dict[str, st.SearchStrategy[Any]] = {
        "stage": st.just(STAGE),
        "parent": st.sampled_from([lineage, digest(b"x")]),
        "lineage": st.sampled_from([lineage, digest(b"x")]),
        "ballot": st.builds(Ballot, number=st.integers(1, 3), steward=st.sampled_from([A, B])),
        "promised": st.builds(Ballot, number=st.integers(1, 3), steward=st.sampled_from([A, B])),
        "closing": st.sampled_from([closing(clock=FEEDER), closing(2, clock=FEEDER), charter(A, B)]),
        "charter": st.sampled_from([charter(A, B), charter(A, B, generation=2), closing()]),
        "commit": st.sampled_from([commit(lineage, signer=B, members=(A, B)), commit(lineage, signer=C), closing()]),
        "commits": st.lists(st.just(commit(lineage, signer=B, members=(A, B))), max_size=2).map(tuple),
        "sources": st.just((A, B)),
        "group": st.just(()),
        "vote": st.none(),
        "tasks": st.just((done(0),)),
        "suspect": st.sampled_from([None, A, B]),
        "reason": st.just("why"),
        "done": st.binary(max_size=4),
        "credits": st.just(()),
    }
    fields = {
        name: known[name] if name in known else _of_type(field.annotation, field.metadata)
        for name, field in kind.model_fields.items()
    }
    return st.fixed_dictionaries(fields).map(lambda values: kind.model_construct(**values))


def _of_type(annotation: Any, metadata: list[Any]) -> st.SearchStrategy[Any]:
    if annotation is bool:
        return st.booleans()
    if annotation is int or "int" in str(annotation) or "Id" in str(annotation) or "Version" in str(annotation):
        return st.integers(1, 3)
    if "None" in str(annotation):
        return st.none()
    if annotation is float:
        return st.floats(0, 10)
    return st.binary(min_size=32, max_size=32)


MESSAGES = st.one_of([_plain(kind) for kind in ROUND_MESSAGES])
HISTORIES = st.lists(
    st.one_of(EVENTS, st.builds(Received, st.sampled_from([A, B, C, FEEDER]), MESSAGES)), min_size=1, max_size=25
)


@given(HISTORIES)
def test_nothing_that_a_peer_says_raises_in_us_and_equal_histories_give_equal_actions(history: list[Event]) -> None:
    """Well-formed nonsense in any order. Purity: two machines that see the same do the same."""
    for members in ((A,), (A, B)):
        twins = [machine(*members)[0] for _ in range(2)]
        for number, event in enumerate(history):
            one, other = (twin.handle(event, 0.4 * number) for twin in twins)
            assert one == other
        assert twins[0].statistics() == twins[1].statistics()


def test_the_package_touches_no_clock_no_chance_no_network() -> None:
    """Purity is a property of the imports. Oracle: the syntax trees."""
    forbidden = {
        "time",
        "random",
        "secrets",
        "os",
        "socket",
        "asyncio",
        "logging",
        "structlog",
        "datetime",
        "threading",
    }
    for path in Path(protocol.rounds.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [node.module or ""]
            assert not {name.split(".")[0] for name in names} & forbidden, path.name


@given(MESSAGES)
def test_messages_before_we_have_a_state_do_no_harm(message: StageMessage) -> None:
    """A machine that waits for its first charter keeps waiting, whatever it is told except a charter."""
    made = RoundMachine(settings(A))
    wants = kinds(made.handle(Received(B, message), 0.0))
    assert set(wants) <= {"Report", "Resync"}
    assert made.statistics().standing is Standing.OUT
