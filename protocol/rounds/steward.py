"""The conductor of one round at one stage: ping, reduce, propose, commit.

Owns: one ballot after another until a commit is final or somebody else's newer ballot takes over; which
members are waited for, and who is left out of a reduce that failed. Must not know: our own vote (we ask
ourselves by message like everybody else), rounds before or after, the clock.

    PINGING   ask all members; freeze the list of those who answered
    REDUCING  the contributors among them sum their accumulators
    PROPOSING all who answered accept the commit, or the ballot has failed

A commit that any answer names (accepted in an earlier ballot) is proposed again unchanged, without a new reduce.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from enum import Enum
from typing import Any

from protocol.errors import PeerFault
from protocol.ids import PeerId, digest
from protocol.rounds.choice import choose_codec
from protocol.rounds.events import Announce, Report, Send, Step, Trouble
from protocol.rounds.lineage import Chain
from protocol.rounds.messages import (
    COMMIT_CONTEXT,
    MAX_BALLOT,
    MAX_SEATS,
    Accept,
    Ballot,
    BallotMessage,
    Begin,
    Commit,
    Committed,
    Contribution,
    Decline,
    Outbid,
    Ping,
    Pong,
    Propose,
    ReduceResult,
    Seat,
    StillHere,
    VoidRound,
    Vote,
)
from protocol.rounds.quorum import is_quorum, may_go_on
from protocol.rounds.records import Draft, check_proposal, draw_commit, group_id, weigh
from protocol.rounds.settings import Settings
from protocol.rounds.slot import HeardClosing, Slot, StagedBytes
from protocol.signing import Signed

SOLO_AFTER_FAILURES = 3  # then one member's sum becomes the update: progress, at the price of dropped tokens


class Phase(Enum):
    """What the steward is waiting for."""

    IDLE = "idle"
    PINGING = "pinging"
    REDUCING = "reducing"
    PROPOSING = "proposing"


class Steward:
    """Conducts the ballots of one slot on behalf of one member. Most never leave `IDLE`."""

    def __init__(self, settings: Settings, slot: Slot, chain: Chain) -> None:
        self._settings = settings
        self._slot = slot
        self._chain = chain
        self.phase = Phase.IDLE
        self.ballot: Ballot | None = None
        self.num_failed = 0
        self.has_stepped_down = False
        """Others objected to what we proposed: they shall try before we do again."""
        self._heard: HeardClosing | None = None
        self._retry = False
        self._since_s = 0.0
        self._missing_since_s: dict[PeerId, float] = {}
        self._pongs: dict[PeerId, Pong] = {}
        self._group: Begin | None = None
        self._results: dict[PeerId, ReduceResult] = {}
        self._propose: Propose | None = None
        self._accepted: set[PeerId] = set()
        self._left_out: set[PeerId] = set()
        self._unable: set[PeerId] = set()
        self._objectors: set[PeerId] = set()
        self._strange: set[PeerId] = set()
        self._blamed: dict[PeerId, PeerId] = {}
        self._failed_alone: set[PeerId] = set()
        self.banned: frozenset[PeerId] = frozenset()

    # -- ballots -----------------------------------------------------------------------------------

    def start(self, now_s: float) -> list[Step]:
        """Open a ballot newer than any we know of. Needs a closing. Nothing happens once the numbers are used up."""
        heard = self._slot.due_closing
        assert heard is not None
        if self.newest_number >= MAX_BALLOT:
            self.stop()
            return []
        self.ballot = Ballot(number=self.newest_number + 1, steward=self._settings.me.peer)
        self.phase, self._since_s, self._heard, self._retry = Phase.PINGING, now_s, heard, False
        for peer in self._slot.order:
            if peer in self._pongs and peer not in self._unable:
                self._missing_since_s[peer] = now_s  # was here: its silence, if any, begins only now
            self._missing_since_s.setdefault(peer, now_s)
        self._pongs, self._results, self._group, self._propose = {}, {}, None, None
        self._accepted = set()
        return self._ask(self._slot.living)

    def on_pong(self, sender: PeerId, pong: Pong, now_s: float) -> list[Step]:
        """Count an answer; go on when all are there."""
        if self.phase is not Phase.PINGING or pong.ballot != self.ballot or sender not in self._slot.order:
            return []
        self._pongs[sender] = pong
        if sender not in self._unable:
            self._missing_since_s[sender] = now_s
        return self._close_list(now_s)

    def on_outbid(self, outbid: Outbid, now_s: float) -> list[Step]:
        """Give way to a newer ballot."""
        if self.phase is Phase.IDLE or self.ballot is None or not outbid.promised.outranks(self.ballot):
            return []
        self.phase, self.ballot = Phase.IDLE, outbid.promised  # the number only: our next one is higher
        self._slot.heard_s = now_s
        return []

    def on_result(self, sender: PeerId, result: ReduceResult, now_s: float) -> list[Step]:
        """Collect the ends of the reduce. Blame that comes late still counts."""
        group = self._group
        if result.digest is None and result.suspect in self._slot.order:
            self._blamed[sender] = result.suspect
        if self.phase is not Phase.REDUCING or group is None or result.group_id != group.group_id:
            return []
        members = [contribution.peer for contribution in group.group]
        if sender not in members:
            return []
        if result.digest is None:
            return self._fail(f"{sender}: {result.reason}", now_s)
        self._results[sender] = result
        if len(self._results) < len(members):
            return []
        if len({each.digest for each in self._results.values()}) > 1:
            return [*self._report_divergence(), *self._fail("the sums differ", now_s)]
        return self._propose_new(group, now_s)

    def on_accept(self, sender: PeerId, accept: Accept) -> list[Step]:
        """Count an acceptance; with the last one the commit is final."""
        if self.phase is not Phase.PROPOSING or accept.ballot != self.ballot or self._propose is None:
            return []
        self._accepted.add(sender)
        if not self._voters() <= self._accepted:
            return []
        self.phase = Phase.IDLE
        signed = self._propose.commit
        commit = self._chain.follows_head(signed)
        message = Committed(stage=self._settings.stage, commit=signed)
        me = self._settings.me.peer
        targets = {*self._slot.living, *(seat.peer for seat in commit.seats)} - {me}
        return [Announce(to=frozenset(targets), message=message, key=digest(signed.payload)), Send(me, message)]

    def on_decline(self, sender: PeerId, decline: Decline, now_s: float) -> list[Step]:
        """Try again, without that one's vote if the others are enough. After an objection, let others try first."""
        is_late = self._retry and self.phase is Phase.IDLE  # a second objection to what has failed counts as well
        if not (is_late or self.phase is Phase.PROPOSING) or decline.ballot != self.ballot:
            return []
        self._give_up({sender}, now_s)
        failed = [] if is_late else self._fail(f"{sender} declined: {decline.reason}", now_s)
        if decline.objection:
            self._objectors.add(sender)
            self._retry = is_quorum(self._ready() - self._objectors, self._slot.order, break_tie=False)
            self.has_stepped_down = not self._retry
        return failed

    def tick(self, now_s: float) -> list[Step]:
        """Repeat what is unanswered, and give up on what takes too long."""
        timers, waited_s = self._settings.timers, now_s - self._since_s
        if self._retry:
            return self.start(now_s)
        if self.phase is Phase.PINGING:
            actions = self._close_list(now_s)
            return actions or self._remind(set(self._slot.living) - self._ready())
        if self.phase is Phase.REDUCING and self._group is not None:
            missing = [each.peer for each in self._group.group if each.peer not in self._results]
            dead = [peer for peer in missing if peer in self._slot.gone]
            if dead:
                return self._fail(f"{dead[0]} is gone", now_s)
            if waited_s > timers.reduce_timeout_s:
                self._blamed.update(dict.fromkeys(self._results, missing[0]))
                return self._fail(f"no result from {missing[0]}", now_s)
            return self._remind(set(missing))
        if self.phase is Phase.PROPOSING:
            missing_voters = self._voters() - self._accepted
            lost = missing_voters & (self._slot.gone | self._silent(now_s))
            given_up = missing_voters if waited_s > timers.accept_timeout_s else lost
            if given_up:
                self._give_up(given_up, now_s)
                return self._fail(f"not accepted by {min(given_up)}", now_s)
            return self._remind(missing_voters)
        return []

    def wake(self, now_s: float) -> None:
        """Start all waiting over: while we were stopped, nobody's silence meant anything."""
        self._since_s = now_s
        self._missing_since_s = dict.fromkeys(self._missing_since_s, now_s)

    def stop(self) -> None:
        """The slot goes on without us (void, or decided elsewhere)."""
        self.phase, self._retry = Phase.IDLE, False

    @property
    def newest_number(self) -> int:
        """The number of the newest ballot that we know of, our own included; 0 if there was none."""
        known = (self.ballot, self._slot.promised)
        return max((ballot.number for ballot in known if ballot is not None), default=0)

    @property
    def is_conducting(self) -> bool:
        return self.phase is not Phase.IDLE or self._retry

    # -- the list ----------------------------------------------------------------------------------

    def _ready(self) -> set[PeerId]:
        return {peer for peer, pong in self._pongs.items() if pong.tokens is not None}

    def _weights(self) -> dict[PeerId, int]:
        """For how much each of those who are ready counts: most of it by closings, not by its own word."""
        return {each.peer: each.weight for each in self._weighed(self._ready())}

    def _weighed(self, peers: Collection[PeerId]) -> tuple[Contribution, ...]:
        assert self._heard is not None
        claimed = {peer: (self._pongs[peer].tokens or 0, self._pongs[peer].norm) for peer in peers}
        return weigh(self._settings, self._slot, claimed, self._heard.closing.round)

    def _voters(self) -> set[PeerId]:
        """Those whose acceptance makes a commit final: who answered, less those who could not accept before."""
        return self._ready() - self._left_out

    def _give_up(self, voters: set[PeerId], now_s: float) -> None:
        """Count on these no longer. If the others are too few without them, patience begins only now."""
        self._missing_since_s.update(dict.fromkeys(voters - self._unable, now_s))
        self._unable |= voters

    def _silent(self, now_s: float) -> set[PeerId]:
        """Those who have not answered our question for so long that they have vanished, however busy they were."""
        slot, until_s = self._slot, now_s - self._settings.timers.ping_timeout_s
        return {peer for peer in slot.order if max(self._since_s, slot.spoke_s.get(peer, 0.0)) <= until_s}

    def _close_list(self, now_s: float) -> list[Step]:
        """Freeze the list and begin, if everybody has answered or need not be waited for any longer."""
        timers, ready = self._settings.timers, self._ready()
        waiting = set(self._slot.living) - ready
        is_busy = bool(waiting & set(self._pongs) - self._silent(now_s))
        limit_s = timers.freeze_timeout_s if is_busy else timers.ping_timeout_s
        if not ready or (waiting and now_s - self._since_s < limit_s):
            return []
        self._left_out = self._unable if self._enough(ready - self._unable, now_s) else set()
        if not self._enough(self._voters(), now_s):
            return []
        votes = [pong.vote for pong in self._pongs.values() if pong.vote is not None]
        votes = [vote for vote in votes if not self._cannot_be_final(vote)]
        if votes:
            newest = max(votes, key=lambda vote: (vote.ballot.number, vote.ballot.steward))
            return self._propose_again(newest.commit, now_s)
        if not any(self._weights().values()):
            return self._void()
        return self._begin(now_s)

    def _cannot_be_final(self, vote: Vote) -> bool:
        """Tell whether we may pass over a vote: we object to it, and too few can have accepted it.

        Whoever answered this ballot without that vote can never accept it in its own. The dead may have accepted it.
        """
        slot = self._slot
        try:
            commit = self._chain.follows_head(vote.commit)
            check_proposal(self._settings, slot, commit, staged=slot.staged, banned=self.banned)
        except PeerFault:
            others = {
                peer for peer, pong in self._pongs.items() if pong.vote is None or pong.vote.commit != vote.commit
            }
            return not is_quorum(set(slot.order) - others, slot.order, break_tie=True)
        return False

    def _enough(self, voters: set[PeerId], now_s: float) -> bool:
        """A quorum, or all who live, are enough at once; fewer are when the others have been missing for long (0005).

        A home whose own line is down sees everybody else missing. It waits much longer, and mostly in vain.
        """
        slot = self._slot
        if self._settings.me.peer not in voters:
            return False
        if may_go_on(voters, slot.order, gone=slot.gone, has_listeners=slot.has_listeners, break_tie=not slot.slept):
            return True
        timers, others = self._settings.timers, set(slot.living) - voters
        if others & self._objectors:
            return False  # they are there, and they are against it
        if slot.has_listeners:
            others |= slot.gone - voters  # whoever has heard of their last commit needs a moment to tell us
        since_s = max(self._missing_since_s[peer] for peer in others)
        # Our own line is fine if it brought anything from anybody lately, and after the last of them fell silent.
        alone = slot.company_s <= max(now_s - timers.patience_s, since_s + timers.silence_s)
        if alone:
            return now_s - since_s >= timers.isolation_s
        # while our line was down their silence meant nothing: if it has just come back they may answer at any moment
        return now_s - since_s >= timers.patience_s and now_s - slot.company_since_s >= timers.ping_timeout_s

    # -- begin, propose, fail ----------------------------------------------------------------------

    def _begin(self, now_s: float) -> list[Step]:
        assert self.ballot is not None
        assert self._heard is not None
        group = self._weighed(self._choose_contributors())
        round_id, codec = self._heard.closing.round, self._choose_codec([contribution.peer for contribution in group])
        self.phase, self._since_s = Phase.REDUCING, now_s
        self._group = Begin(
            **self._address(),
            ballot=self.ballot,
            round=round_id,
            codec=codec,
            group_id=group_id(self._slot, self.ballot, group, codec=codec, round_id=round_id),
            group=group,
        )
        return self._ask([contribution.peer for contribution in group])

    def _choose_codec(self, group: Sequence[PeerId]) -> str:
        assert self._heard is not None
        rules = self._settings.rules
        measured = [rate for peer in group if (rate := self._pongs[peer].bytes_per_s) is not None]
        return choose_codec(
            rules.codecs,
            num_elements=rules.num_averaged(self._heard.closing.round),
            num_members=len(group),
            bytes_per_s=min(measured, default=None),
            round_s=self._slot.round_s,
            is_hidden=rules.is_hidden(self._heard.closing.round),
        )

    def _choose_contributors(self) -> list[PeerId]:
        """Leave out one scapegoat for each failed reduce; after some failures, go on with a single sum.

        Who broke a reduce cannot be told from outside (a broken link has two ends), so this is about
        progress and not about guilt: whoever is left out still votes, stays a member, and may report it.
        """
        slot, ready, weights = self._slot, self._ready(), self._weights()
        voters = [peer for peer in slot.order if peer in ready - self._strange]
        if not any(weights[peer] for peer in voters):
            voters = [peer for peer in slot.order if peer in ready]
        me = self._settings.me.peer
        if self.num_failed >= SOLO_AFTER_FAILURES:
            return [self._choose_single([peer for peer in voters if weights[peer]], weights)]
        named = Counter(reporter if suspect == me else suspect for reporter, suspect in self._blamed.items())
        del named[me]  # who cannot reach the steward is left out, never the steward
        worst = sorted(named, key=lambda peer: (-named[peer], -slot.order.index(peer)))
        chosen = [peer for peer in voters if peer not in worst[: self.num_failed]]
        return chosen if any(weights[peer] for peer in chosen) else voters

    def _choose_single(self, holders: list[PeerId], weights: Mapping[PeerId, int]) -> PeerId:
        """Choose the largest sum of those that have not failed alone yet; when all have, our own if we have any."""
        me = self._settings.me.peer
        untried = [peer for peer in holders if peer not in self._failed_alone]
        if not untried and me in holders:
            return me
        return max(untried or holders, key=lambda peer: (weights[peer], peer == me))

    def _propose_new(self, group: Begin, now_s: float) -> list[Step]:
        assert self.ballot is not None
        assert self._heard is not None
        own = self._results.get(self._settings.me.peer)
        result = own or self._results[group.group[0].peer]
        assert result.digest is not None
        seats, joiners = self._next_seats()
        commit = draw_commit(
            self._settings,
            self._chain,
            self._slot,
            Draft(
                ballot=self.ballot,
                heard=self._heard,
                contributors=group.group,
                staged=StagedBytes(result.digest, result.norm, group.codec, group.round),
                seats=seats,
                speeds=tuple(self._speed_of(seat.peer) for seat in seats),
                joiners=joiners,
            ),
        )
        signed = self._settings.notary.seal(COMMIT_CONTEXT, commit)
        return self._put(signed, commit, now_s)

    def _propose_again(self, signed: Signed, now_s: float) -> list[Step]:
        """Finish what an earlier steward may already have made final somewhere: the same bytes, and no others."""
        return self._put(signed, self._chain.follows_head(signed), now_s)

    def _put(self, signed: Signed, commit: Commit, now_s: float) -> list[Step]:
        assert self.ballot is not None
        holders = {peer for peer, pong in self._pongs.items() if pong.vote and pong.vote.commit == signed}
        holders |= {contribution.peer for contribution in commit.contributors}
        sources = tuple(peer for peer in self._slot.living if peer in holders)
        self.phase, self._since_s, self._accepted = Phase.PROPOSING, now_s, set()
        self._propose = Propose(**self._address(), ballot=self.ballot, commit=signed, sources=sources)
        return self._ask(sorted(self._voters()))

    def _next_seats(self) -> tuple[tuple[Seat, ...], tuple[PeerId, ...]]:
        """Seat who votes now and stays, and the joiners that are there; never nobody."""
        slot, voters = self._slot, self._voters()
        present = [seat for seat in slot.parent.seats if seat.peer in voters and seat.peer not in self.banned]
        staying = [seat for seat in present if not self._pongs[seat.peer].leaving]
        joiners = tuple(
            Seat(peer=peer, session=ready.session)
            for peer, ready in sorted(slot.ready.items())
            if peer not in voters and peer not in self.banned
        )[: MAX_SEATS - len(staying)]
        seats = (*staying, *joiners) or tuple(present)  # the last one out leaves its name on the door
        return seats, tuple(seat.peer for seat in joiners)

    def _speed_of(self, peer: PeerId) -> float:
        pong = self._pongs.get(peer)
        return 0.0 if pong is None or pong.tokens_per_s is None else pong.tokens_per_s

    def _void(self) -> list[Step]:
        assert self.ballot is not None
        assert self._heard is not None
        self.phase = Phase.IDLE
        message = VoidRound(**self._address(), ballot=self.ballot, round=self._heard.closing.round)
        return [Send(peer, message) for peer in self._slot.living]

    def _fail(self, why: str, now_s: float) -> list[Step]:
        """End the ballot; the next one starts at the next tick, so that failures cannot spin."""
        assert self.ballot is not None
        if self.phase is Phase.REDUCING and self._group is not None and len(self._group.group) == 1:
            self._failed_alone.add(self._group.group[0].peer)
        self.phase, self._retry, self._slot.heard_s = Phase.IDLE, True, now_s
        self.num_failed += 1
        return [Report(Trouble.BALLOT_FAILED, detail=f"ballot {self.ballot.number}: {why}"[:200])]

    def _report_divergence(self) -> list[Step]:
        """Name those whose sum differs from most, and sum without them, be it without ourselves."""
        counts = Counter(result.digest for result in self._results.values())
        common, _ = counts.most_common(1)[0]
        strange = [peer for peer, result in self._results.items() if result.digest != common]
        if 2 * len(strange) < len(self._results):  # of two, nobody can say which one is wrong
            self._strange.update(strange)
        return [Report(Trouble.DIVERGED, peer, "another sum than most of its group") for peer in strange]

    # -- messages ----------------------------------------------------------------------------------

    def _address(self) -> dict[str, Any]:
        return {"stage": self._settings.stage, "parent": self._slot.parent.lineage}

    def _question(self) -> BallotMessage:
        assert self.ballot is not None
        assert self._heard is not None
        if self.phase is Phase.PINGING:
            closing, generation = self._heard.signed, self._chain.generation
            return Ping(**self._address(), ballot=self.ballot, generation=generation, closing=closing)
        question = self._group if self.phase is Phase.REDUCING else self._propose
        assert question is not None
        return question

    def _ask(self, peers: Collection[PeerId]) -> list[Step]:
        question = self._question()
        return [Send(peer, question) for peer in peers]

    def _remind(self, missing: set[PeerId]) -> list[Step]:
        """Repeat the question to who has not answered it; the others only need to know that we live."""
        assert self.ballot is not None
        sign = StillHere(**self._address(), ballot=self.ballot)
        others = [peer for peer in self._slot.living if peer not in missing and peer != self._settings.me.peer]
        return [*self._ask(sorted(missing)), *(Send(peer, sign) for peer in others)]
