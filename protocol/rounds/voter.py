"""A member's answers to the stewards of one round: promise, reduce, accept. The safety of a round lies here.

Owns: the three rules of an acceptor. (1) Never answer a ballot older than the newest promised. (2) Accept a
commit only with its bytes in staging and its content checked. (3) Tell every later steward what was accepted.
Must not know: who conducts, how many answers are enough, what follows a commit.
"""

from __future__ import annotations

from collections import OrderedDict

from protocol.errors import PeerFault
from protocol.ids import Digest, PeerId, digest
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
    MAX_NORM,
    Accept,
    Ballot,
    Begin,
    Commit,
    Decline,
    Outbid,
    Ping,
    Pong,
    Propose,
    ReduceResult,
    StillHere,
    Vote,
)
from protocol.rounds.quorum import is_quorum
from protocol.rounds.records import check_proposal, group_id
from protocol.rounds.settings import Settings
from protocol.rounds.slot import Slot, StagedBytes

MAX_REASON_CHARS = 200
MAX_SHOWN = 64


class Voter:
    """One member in one slot."""

    def __init__(self, settings: Settings, slot: Slot, chain: Chain) -> None:
        self._settings = settings
        self._slot = slot
        self._chain = chain
        self._result: ReduceResult | None = None
        self._fetching: Propose | None = None
        self._shown: OrderedDict[Ballot, Digest] = OrderedDict()
        """Of the latest ballots that we were asked in the closing that their ping brought."""
        self.banned: frozenset[PeerId] = frozenset()

    # -- from the steward --------------------------------------------------------------------------

    def on_ping(self, sender: PeerId, ping: Ping, now_s: float) -> list[Step]:
        """Promise, and answer with what we hold. Our closing may be another one: any will do (0005)."""
        refusal = self._outbid(sender, ping.ballot)
        if refusal:
            return refusal
        actions = self._promise(ping.ballot, now_s)
        self._shown[ping.ballot] = digest(ping.closing.payload)
        while len(self._shown) > MAX_SHOWN:
            self._shown.popitem(last=False)
        return [*actions, self._pong()]

    def on_begin(self, sender: PeerId, begin: Begin, now_s: float) -> list[Step]:
        """Start the reduce, or repeat how it ended."""
        refusal = self._outbid(sender, begin.ballot)
        if refusal:
            return refusal
        slot = self._slot
        if begin.ballot != slot.promised or slot.tokens is None:
            return []  # we never answered its ping: we cannot be in its group
        self._heard(now_s)
        if self._result is not None and self._result.group_id == begin.group_id:
            return [Send(sender, self._result)]
        if slot.reducing is not None:
            return []
        slot.reducing = begin
        objection = self._object_to(begin)
        if objection:
            return self.on_reduced(ReduceFailed(begin.group_id, objection))
        return [
            StartReduce(
                group_id=begin.group_id,
                round=begin.round,
                version=slot.parent.version,
                ballot=begin.ballot.number,
                codec=begin.codec,
                group=begin.group,
                num_asked=len(slot.order),
            )
        ]

    def _object_to(self, begin: Begin) -> str:
        """Say why this is no group that we could sum with; nothing if it is one."""
        slot = self._slot
        assert slot.promised is not None
        by_peer = {contribution.peer: contribution for contribution in begin.group}
        weights = [contribution.weight for contribution in begin.group]
        if len(by_peer) != len(begin.group) or not by_peer.keys() <= set(slot.order):
            return "the group names somebody twice, or who is no member"
        if any(contribution.weight > contribution.tokens for contribution in begin.group):
            return "the group counts somebody for more than it brings"
        if not any(weights):
            return "the group has nothing to average"
        if begin.codec not in self._settings.rules.codecs or begin.round < slot.parent.next_round:
            return f"{begin.codec} after round {begin.round} is not what this run averages"
        if begin.group_id != group_id(slot, slot.promised, begin.group, codec=begin.codec, round_id=begin.round):
            return "the group does not have the name that its ballot and list give it"
        mine = by_peer.get(self._settings.me.peer)
        # the steward lies, or a void round has passed since our answer
        if mine is None or (mine.tokens, mine.norm) != (slot.tokens, slot.norm):
            weighs = "does not name us" if mine is None else f"weighs us with {mine.tokens} tokens, norm {mine.norm:g}"
            return f"the group {weighs} instead of {slot.tokens}, norm {slot.norm:g}"
        return ""

    def on_propose(self, sender: PeerId, propose: Propose, now_s: float) -> list[Step]:
        """Accept, fetch the bytes first, or decline. Asked again meanwhile, say that we are at it."""
        refusal = self._outbid(sender, propose.ballot)
        if refusal:
            return refusal
        slot = self._slot
        actions = self._promise(propose.ballot, now_s)  # accepting implies the promise
        if slot.vote is not None and slot.vote.ballot == propose.ballot:
            if slot.vote.commit.payload != propose.commit.payload:
                raise PeerFault(f"two commits in one ballot of {sender}")
            return [*actions, self._accept(propose)]
        if self._fetching is not None and self._fetching.ballot == propose.ballot:
            return [*actions, self._still_here(propose)]
        try:
            commit = self._chain.follows_head(propose.commit)
            self._check_ballot(propose, commit)
            self._check(propose, commit)
        except PeerFault as error:
            return [*actions, *self._object(Trouble.FAULT, propose.ballot, str(error))]
        own = self._result
        if own is not None and own.ballot == propose.ballot and own.digest not in (None, commit.digest):
            return [*actions, *self._object(Trouble.DIVERGED, propose.ballot, "another sum than we made in its group")]
        if slot.staged is not None and slot.staged.are_of(commit):
            slot.vote = Vote(ballot=propose.ballot, commit=propose.commit)
            return [*actions, self._accept(propose)]
        if not slot.applied:
            return [*actions, self._still_here(propose)]  # the next repetition finds us ready
        self._fetching, slot.staged = propose, None
        sources = tuple(peer for peer in propose.sources if peer != self._settings.me.peer)
        return [*actions, Fetch(commit, sources)]

    def on_still_here(self, sender: PeerId, ballot: Ballot, now_s: float) -> list[Step]:
        """Leave a living steward in peace."""
        if ballot == self._slot.promised:
            self._heard(now_s)
            return []
        return self._outbid(sender, ballot)

    # -- from the driver ---------------------------------------------------------------------------

    def on_frozen(self) -> list[Step]:
        """Tell the steward that we are ready, if one has asked."""
        return [self._pong()] if self._slot.promised is not None else []

    def on_reduced(self, event: ReduceDone | ReduceFailed) -> list[Step]:
        """Report to the steward of that reduce, and only if it is still the newest."""
        begin, slot = self._slot.reducing, self._slot
        if begin is None or begin.group_id != event.group_id:
            return []
        slot.reducing = None
        if isinstance(event, ReduceDone) and 0 <= event.norm <= MAX_NORM:
            slot.staged = StagedBytes(event.digest, event.norm, begin.codec, begin.round)
            slot.measured.bytes_per_s = event.bytes_per_s or slot.measured.bytes_per_s
            outcome = {"digest": event.digest, "norm": event.norm}
        elif isinstance(event, ReduceDone):
            outcome = {"digest": None, "reason": f"the norm of the sum is {event.norm}"}
        else:
            outcome = {"digest": None, "reason": event.reason[:MAX_REASON_CHARS], "suspect": event.suspect}
        self._result = ReduceResult.model_validate(
            {
                "stage": begin.stage,
                "parent": begin.parent,
                "ballot": begin.ballot,
                "group_id": begin.group_id,
                **outcome,
            }
        )
        return [Send(begin.ballot.steward, self._result)]

    def on_fetched(self, event: Fetched | FetchFailed) -> list[Step]:
        """Accept the proposal that the bytes were fetched for, if nothing newer has come up."""
        propose, slot = self._fetching, self._slot
        if propose is None:
            return []
        commit = self._chain.follows_head(propose.commit)
        if commit.digest != event.digest:
            return []
        self._fetching = None
        if isinstance(event, FetchFailed):
            late = propose.ballot != slot.promised
            return [] if late else [self._decline(propose.ballot, event.reason, objection=False)]
        slot.staged = StagedBytes(event.digest, event.norm, commit.codec, commit.round)
        if propose.ballot != slot.promised:
            return []
        try:
            self._check(propose, commit)
        except PeerFault as error:
            return self._object(Trouble.FAULT, propose.ballot, str(error))
        slot.vote = Vote(ballot=propose.ballot, commit=propose.commit)
        return [self._accept(propose)]

    def _check(self, propose: Propose, commit: Commit) -> None:
        """Raise `PeerFault` unless we can agree.

        A commit of an earlier ballot may be final, perhaps with votes of members who did not know yet that one of its
        seats was banned, and whom nobody can ask any more: nothing else can follow, and the next one is without it.
        """
        banned = self.banned if commit.ballot == propose.ballot else frozenset[PeerId]()
        check_proposal(self._settings, self._slot, commit, staged=self._slot.staged, banned=banned)

    def _check_ballot(self, propose: Propose, commit: Commit) -> None:
        """Raise `PeerFault` unless a commit is of this ballot or an earlier one, and of the closing shown in that.

        Or a steward could make a closing up, by which it counts for whatever it likes. Of a ballot that we were not
        asked in we do not know what was shown: it should be a closing that we have heard of. Two clocks may have closed
        the round, though, so whoever does not know what most stewards want to finish gives in.
        """
        named, slot = commit.summary.closing_digest, self._slot
        if propose.commit.signer != commit.ballot.steward:
            raise PeerFault("its signer is not the steward of its ballot")
        if commit.ballot.outranks(propose.ballot):
            raise PeerFault("it is of a later ballot than the one that it is proposed in")
        if commit.ballot in self._shown or commit.ballot == propose.ballot:
            if self._shown.get(commit.ballot, named) != named:
                raise PeerFault("it was made under another closing than its steward has shown")
            return
        heard = {*self._shown.values(), *(digest(each.signed.payload) for each in slot.closings.values())}
        if named not in heard and not is_quorum(slot.objected, slot.order, break_tie=True):
            raise PeerFault("it is of a ballot and a closing that we have not heard of")

    # -- helpers -----------------------------------------------------------------------------------

    def _outbid(self, sender: PeerId, ballot: Ballot) -> list[Step]:
        slot = self._slot
        if slot.promised is None or not slot.promised.outranks(ballot):
            return []
        return [Send(sender, Outbid(stage=self._settings.stage, parent=slot.parent.lineage, promised=slot.promised))]

    def _promise(self, ballot: Ballot, now_s: float) -> list[Step]:
        slot, actions = self._slot, list[Step]()
        if ballot.outranks(slot.promised):
            slot.promised, slot.promised_s = ballot, now_s
            self._result = None
            if slot.reducing is not None:
                actions.append(AbortReduce(slot.reducing.group_id))
                slot.reducing = None
        self._heard(now_s)
        return actions

    def _heard(self, now_s: float) -> None:
        """Note the steward's sign of life; a ballot that takes for ever stops counting as one."""
        if now_s - self._slot.promised_s <= self._settings.timers.ballot_limit_s:
            self._slot.heard_s = now_s

    def _pong(self) -> Send:
        slot = self._slot
        assert slot.promised is not None
        return Send(
            slot.promised.steward,
            Pong(
                stage=self._settings.stage,
                parent=slot.parent.lineage,
                ballot=slot.promised,
                tokens=slot.tokens,
                vote=slot.vote,
                leaving=slot.leaving,
                norm=slot.norm,
                bytes_per_s=slot.measured.bytes_per_s,
                tokens_per_s=slot.measured.tokens_per_s,
            ),
        )

    def _accept(self, propose: Propose) -> Send:
        message = Accept(stage=propose.stage, parent=propose.parent, ballot=propose.ballot)
        return Send(propose.ballot.steward, message)

    def _still_here(self, propose: Propose) -> Send:
        message = StillHere(stage=propose.stage, parent=propose.parent, ballot=propose.ballot)
        return Send(propose.ballot.steward, message)

    def _object(self, trouble: Trouble, ballot: Ballot, why: str) -> list[Step]:
        self._slot.objected.add(ballot.steward)
        return [Report(trouble, ballot.steward, why), self._decline(ballot, why, objection=True)]

    def _decline(self, ballot: Ballot, reason: str, *, objection: bool) -> Send:
        message = Decline(
            stage=self._settings.stage,
            parent=self._slot.parent.lineage,
            ballot=ballot,
            reason=reason[:MAX_REASON_CHARS],
            objection=objection,
        )
        return Send(ballot.steward, message)
