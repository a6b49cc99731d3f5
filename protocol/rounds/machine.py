"""The round machine of one stage at one peer: one event in, a list of actions out.

Owns: the routing of events to member, voter, steward, clock and gossip; messages to ourselves; announcements;
waking up. Must not know: any rule of the protocol. Pure: no clock, socket, chance or log; `now_s` is any
monotonic clock, and the same events at the same times give the same actions.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from protocol.errors import PeerFault
from protocol.ids import Lineage, PeerId, RoundId, Version, digest
from protocol.rounds.events import (
    Action,
    Announce,
    Applied,
    ApplyFailed,
    Drain,
    Event,
    Fetched,
    FetchFailed,
    Frozen,
    PeerGone,
    Quit,
    Received,
    ReduceDone,
    ReduceFailed,
    Rejoin,
    Report,
    RosterChanged,
    Send,
    Step,
    Synced,
    TaskDone,
    Tick,
    Trouble,
)
from protocol.rounds.gossip import Gossip
from protocol.rounds.lineage import Chain, Link
from protocol.rounds.member import LastCommit, Member, Standing
from protocol.rounds.messages import (
    Accept,
    Ack,
    AskChain,
    AskClosing,
    Ballot,
    BallotMessage,
    Begin,
    ChainAnswer,
    CharterNotice,
    ClosingNotice,
    Committed,
    Decline,
    DoneReport,
    DoneUnion,
    Goodbye,
    Hello,
    Outbid,
    Ping,
    Pong,
    Propose,
    Ready,
    ReduceResult,
    StageMessage,
    StillHere,
    VoidRound,
)
from protocol.rounds.neighbours import Neighbours
from protocol.rounds.notices import Notices
from protocol.rounds.settings import Settings
from protocol.rounds.slot import Slot
from protocol.rounds.steward import Phase, Steward
from protocol.signing import Signed

MAX_STEPS = 10_000  # of messages to ourselves within one event; a round takes about ten
MAX_BALLOT_LEAP = 10_000  # over an hour of failed ballots, one a beat, all of which we would have missed


@dataclass(frozen=True, slots=True, kw_only=True)
class RoundStatistics:
    """Where a replica stands, for the status page and the coordinator's ledger."""

    standing: Standing
    round: RoundId | None
    version: Version | None
    lineage: Lineage | None
    generation: int
    num_members: int
    steward: PeerId | None
    """Who conducts the present ballot, as far as we have promised."""
    phase: Phase
    """What our own steward waits for; idle unless we conduct the ballot."""
    ballot: int
    num_done: int
    """Numbers of the open round known to be done; stage 0 only."""
    num_numbers: int
    num_commits: int
    num_voids: int
    num_ballots: int
    """Ballots that we have opened ourselves; one per round we conduct, if nothing fails."""
    num_failed_ballots: int
    last_commit: LastCommit | None


class RoundMachine:
    """Everything a peer has to decide about the rounds of one stage. See the package docstring."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._neighbours = Neighbours(settings)
        self._member = Member(settings, self._neighbours)
        self._gossip = Gossip(settings, self._member, self._neighbours)
        self._notices = Notices(settings.timers.notice_s)
        self._last_s: float | None = None

    def handle(self, event: Event, now_s: float) -> list[Action]:
        """Take in one fact and return what has to be done now, in this order. Never raises for a remote fault."""
        if self._last_s is not None and now_s - self._last_s > self._settings.timers.silence_s:
            self._member.wake(now_s)
        self._last_s = now_s
        queue = deque[Step](self._guarded(event, now_s))
        done: list[Action] = []
        for _ in range(MAX_STEPS):
            if not queue:
                return done
            action = queue.popleft()
            if isinstance(action, Announce):
                queue.extendleft(reversed(self._announce(action, now_s)))
            elif isinstance(action, Send) and action.to == self._settings.me.peer:
                queue.extendleft(reversed(self._guarded(Received(action.to, action.message), now_s)))
                if isinstance(action.message, ClosingNotice):
                    done.append(action)
            else:
                done.append(action)
        raise AssertionError("a message to ourselves causes itself")

    @property
    def newest_closing(self) -> Signed | None:
        """The closing of the newest round that is over, as far as we know."""
        return self._member.closings.newest

    @property
    def conductors(self) -> tuple[PeerId, ...]:
        """The members in the order in which they would conduct the open round, ourselves among them; else none."""
        return self._member.slot.order if self._member.slot is not None else ()

    def statistics(self) -> RoundStatistics:
        """Describe this moment."""
        member = self._member
        slot, clock = member.slot, member.clock
        promised = slot.promised if slot is not None else None
        failed = member.steward.num_failed if member.steward is not None else 0
        return RoundStatistics(
            standing=member.standing,
            round=member.round,
            version=member.applied.version if member.applied is not None else None,
            lineage=member.applied.lineage if member.applied is not None else None,
            generation=member.chain.generation if member.chain is not None else 0,
            num_members=len(member.chain.head.seats) if member.chain is not None else 0,
            steward=promised.steward if promised is not None else None,
            phase=member.steward.phase if member.steward is not None else Phase.IDLE,
            ballot=promised.number if promised is not None else 0,
            num_done=clock.bits.bit_count() if clock is not None else 0,
            num_numbers=clock.size.all_bits.bit_count() if clock is not None else 0,
            num_commits=member.num_commits,
            num_voids=member.num_voids,
            num_ballots=member.num_ballots,
            num_failed_ballots=member.num_failed_ballots + failed,
            last_commit=member.last_commit,
        )

    @property
    def rival(self) -> Lineage | None:
        """Where one of those stands who have parted from us; None if we have met nobody of the kind."""
        return self._gossip.rival

    @property
    def chain(self) -> Chain | None:
        """The lineage as we know it; its head may be ahead of the state that is applied."""
        return self._member.chain

    @property
    def applied(self) -> Link | None:
        """The place in the chain whose state the driver has applied."""
        return self._member.applied

    # -- routing -----------------------------------------------------------------------------------

    def _guarded(self, event: Event, now_s: float) -> list[Step]:
        """A peer that breaks the rules causes a report, and nothing else."""
        try:
            return self._dispatch(event, now_s)
        except PeerFault as fault:
            sender = event.sender if isinstance(event, Received) else None
            return [Report(Trouble.FAULT, sender, fault.one_line())]

    def _dispatch(self, event: Event, now_s: float) -> list[Step]:
        member = self._member
        match event:
            case Received(sender, message):
                return self._on_message(sender, message, now_s)
            case Tick():
                return [*self._notices.tick(now_s), *member.tick(now_s), *self._gossip.tick(now_s)]
            case RosterChanged():
                self._neighbours.on_roster(event)
                member.refresh_slot(now_s)
            case PeerGone(peer):
                if member.chain is not None:
                    self._neighbours.note_gone(member.chain.head.seats, peer)
                    member.refresh_slot(now_s)
            case TaskDone(round_id, task):
                if member.clock is not None and member.clock.round == round_id:
                    return member.clock.on_task_done(task)
            case Frozen():
                return member.on_frozen(event, now_s)
            case ReduceDone() | ReduceFailed():
                return member.voter.on_reduced(event) if member.voter is not None else []
            case Fetched() | FetchFailed():
                return member.voter.on_fetched(event) if member.voter is not None else []
            case Applied():
                return [*member.on_applied(event, now_s), *self._gossip.ask_for_seat(now_s)]
            case ApplyFailed():
                return member.on_apply_failed(event)
            case Synced():
                return member.on_synced(event, now_s)
            case Drain():
                return member.on_drain(event)
            case Quit():
                return member.leaving.goodbyes(member.chain)
            case Rejoin():
                return self._rejoin(event)
        return []

    def _rejoin(self, event: Rejoin) -> list[Step]:
        """Give our branch up, if it is the one that is meant."""
        chain = self._member.chain
        if chain is None or chain.link_of(event.lost) is None or self._gossip.rivals.isdisjoint(event.sources):
            return []
        return self._member.resync(None, event.sources)

    def _on_message(self, sender: PeerId, message: StageMessage, now_s: float) -> list[Step]:
        if sender in self._neighbours.banned:
            return []
        if sender != self._settings.me.peer:
            self._neighbours.note_heard(sender, now_s)
        match message:
            case BallotMessage():
                return self._on_ballot(sender, message, now_s)
            case Outbid():
                return self._on_outbid(sender, message, now_s)
            case VoidRound():
                return self._member.on_void(sender, message, now_s)
            case DoneReport() | DoneUnion():
                return self._on_done(sender, message, now_s)
            case ClosingNotice(stage=stage, closing=closing):
                actions = self._member.on_closing(sender, closing, now_s)
                is_strange = any(isinstance(each, Report) for each in actions)
                return [*actions, *([] if is_strange else self._ack(sender, stage, closing))]
            case Committed(commit=commit):
                actions = self._gossip.on_committed(sender, message, now_s)
                chain = self._member.chain
                has_it = chain is not None and chain.has(commit)
                return [*actions, *(self._ack(sender, self._settings.stage, commit) if has_it else [])]
            case Ack(of=key):
                self._notices.on_ack(sender, key)
                return []
            case CharterNotice(charter=charter):
                return self._member.on_charter(charter, now_s)
        return self._on_gossip(sender, message, now_s)

    def _on_gossip(self, sender: PeerId, message: StageMessage, now_s: float) -> list[Step]:
        gossip = self._gossip
        match message:
            case Hello():
                return gossip.on_hello(sender, message, now_s)
            case Ready():
                return gossip.on_ready(sender, message, now_s)
            case Goodbye():
                return gossip.on_goodbye(sender, message)
            case AskChain():
                return gossip.on_ask_chain(sender, message, now_s)
            case AskClosing():
                return gossip.on_ask_closing(sender, message.newest)
            case ChainAnswer():
                return gossip.on_answer(sender, message, now_s)
        raise PeerFault(f"{type(message).__name__} is not a message about rounds")

    def _on_ballot(self, sender: PeerId, message: BallotMessage, now_s: float) -> list[Step]:
        member = self._member
        if member.chain is None:
            return []
        if message.parent != member.chain.head.lineage:
            return self._gossip.on_strange_parent(sender, message.parent, now_s)
        slot, voter, steward = member.slot, member.voter, member.steward
        if slot is None or voter is None or steward is None:
            # A steward takes us for a member that we no longer are: our session tells it.
            hello = self._gossip.hello(member.chain.head, member.chain.generation)
            return [Send(sender, hello)] if isinstance(message, Ping) else []
        _check_ballot(slot, steward, sender, message.ballot)
        self._neighbours.note_alive(slot.parent.seats, sender)
        slot.spoke_s[sender] = now_s
        match message:
            case Pong():
                return steward.on_pong(sender, message, now_s)
            case ReduceResult():
                return steward.on_result(sender, message, now_s)
            case Accept():
                return steward.on_accept(sender, message)
            case Decline():
                return steward.on_decline(sender, message, now_s)
            case StillHere(ballot=ballot) if ballot.steward == self._settings.me.peer:
                return []  # a voter, whose sign of life is noted in the slot
        if message.ballot.steward != sender:
            raise PeerFault(f"{sender} conducts a ballot of {message.ballot.steward}")
        match message:
            case Ping():
                return self._on_ping(sender, message, now_s)
            case Begin():
                return voter.on_begin(sender, message, now_s)
            case Propose():
                return voter.on_propose(sender, message, now_s)
            case StillHere():
                return voter.on_still_here(sender, message.ballot, now_s)
        return []

    def _on_outbid(self, sender: PeerId, outbid: Outbid, now_s: float) -> list[Step]:
        slot, steward = self._member.slot, self._member.steward
        if slot is None or steward is None or outbid.parent != slot.parent.lineage:
            return []
        _check_ballot(slot, steward, sender, outbid.promised)
        return steward.on_outbid(outbid, now_s)

    def _on_ping(self, sender: PeerId, ping: Ping, now_s: float) -> list[Step]:
        """A ping also brings the closing, to those who have not heard it."""
        member = self._member
        actions = member.on_closing(sender, ping.closing, now_s)
        slot, voter = member.slot, member.voter
        if slot is None or voter is None or any(isinstance(each, Report) for each in actions):
            return actions
        if slot.due_closing is None:  # we know that its round was void
            void = VoidRound(stage=ping.stage, parent=ping.parent, ballot=ping.ballot, round=RoundId(slot.round - 1))
            proof = self._gossip.on_ask_closing(sender, slot.round - 2)
            return [*actions, *proof, Send(sender, void)]
        return [*actions, *voter.on_ping(sender, ping, now_s)]

    def _on_done(self, sender: PeerId, message: DoneReport | DoneUnion, now_s: float) -> list[Step]:
        clock = self._member.clock
        if clock is not None and message.round == clock.round and not clock.is_closed:
            if isinstance(message, DoneReport):
                return clock.on_report(sender, message)
            return clock.on_union(sender, message, now_s)
        if isinstance(message, DoneReport):
            return self._gossip.on_ask_closing(sender, message.round - 1)
        return []

    # -- helpers -----------------------------------------------------------------------------------

    def _ack(self, sender: PeerId, stage: int, signed: Signed) -> list[Step]:
        if sender == self._settings.me.peer:
            return []
        return [Send(sender, Ack.model_validate({"stage": stage, "of": digest(signed.payload)}))]

    def _announce(self, what: Announce, now_s: float) -> list[Step]:
        """A closing concerns the whole run, so everybody that we know of hears it; a commit also the joiners."""
        is_closing = isinstance(what.message, ClosingNotice)
        more = self._neighbours.everybody() if is_closing else self._neighbours.listeners()
        to = (what.to | more) - {self._settings.me.peer}
        return self._notices.announce(Announce(to=to, message=what.message, key=what.key), now_s)


def _check_ballot(slot: Slot, steward: Steward, sender: PeerId, ballot: Ballot) -> None:
    """Raise `PeerFault` unless a member speaks, of a ballot that may exist: numbers that leap would soon be used up."""
    if sender not in slot.order:
        raise PeerFault(f"{sender} has no seat")
    if ballot.number > steward.newest_number + MAX_BALLOT_LEAP:
        raise PeerFault(f"ballot {ballot.number} of {sender} cannot follow {steward.newest_number}")
