"""One replica of one stage, from commit to commit: open, frozen, applying, or merely listening.

Owns: the chain, the state that is applied, the open slot, and the steps between them. Voter, steward and
clock of the slot are made here and live as long as it does. Must not know: the network (others hand it
messages), gossip, repetition of announcements.

            charter / Synced                   closing                 commit final
    OUT ------------------> OPEN ---------------------------> FROZEN ----------------> APPLYING
     ^                       ^ ^------------ void --------------'                          |
     |                       '-------------------- Applied, seated ------------------------|
     '-- cannot catch up --  LISTENING <---------- Applied, not seated --------------------'

With overlap the next round is opened, at the version that is there, as soon as one is frozen, and averages travel while
it computes. The commit that becomes final meanwhile waits for the end of that round: then it is frozen, the commit is
applied, and so on. All members apply it at this boundary, so a task knows its version; who has no tasks of that round
(a joiner, or one that was away) need not wait.

    round r         | round r+1       | round r+2
    tasks at v      | tasks at v      | tasks at v+1
                    | ballots of r    | ballots of r+1
               Freeze            Freeze, Apply v+1
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from protocol.errors import PeerFault
from protocol.ids import Digest, Lineage, PeerId, RoundId
from protocol.rounds.clock import Clock
from protocol.rounds.closings import FIRST_STAGE, Closings, Word
from protocol.rounds.events import (
    AbortReduce,
    Applied,
    Apply,
    ApplyFailed,
    Drain,
    Freeze,
    Frozen,
    Left,
    NewLineage,
    OpenRound,
    Replay,
    Report,
    Resync,
    Shut,
    Step,
    Synced,
    Trouble,
)
from protocol.rounds.leaving import Leaving
from protocol.rounds.lineage import Chain, Link, read_charter
from protocol.rounds.messages import VoidRound
from protocol.rounds.neighbours import Neighbours
from protocol.rounds.quorum import is_quorum, steward_order
from protocol.rounds.records import check_scale
from protocol.rounds.settings import Settings
from protocol.rounds.slot import Measured, Slot
from protocol.rounds.steward import Steward
from protocol.rounds.voter import Voter
from protocol.signing import Signed

APPLY_ATTEMPTS = 3


class Standing(Enum):
    """What a replica is doing, as shown on the status page."""

    OUT = "out"
    LISTENING = "listening"
    APPLYING = "applying"
    OPEN = "open"
    FROZEN = "frozen"


@dataclass(frozen=True, slots=True)
class LastCommit:
    """The newest commit's figures: k contributors of n members."""

    round: RoundId
    num_contributors: int
    num_asked: int
    tokens: int
    tokens_dropped: int
    double_counted: int


@dataclass(frozen=True, slots=True)
class _Late:
    """A final commit that has to wait: how to get there."""

    apply: Apply | None
    """The bytes are staged; None: they have to be fetched from `sources`."""
    sources: tuple[PeerId, ...]


class Member:
    """The replica itself."""

    def __init__(self, settings: Settings, neighbours: Neighbours) -> None:
        self._settings = settings
        self._neighbours = neighbours
        self.chain: Chain | None = None
        self.applied: Link | None = None
        self.state_digest: Digest | None = None
        self.slot: Slot | None = None
        self.voter: Voter | None = None
        self.steward: Steward | None = None
        self.clock: Clock | None = None
        self.closings = Closings(settings, neighbours)
        self.leaving = Leaving(settings)
        self.last_commit: LastCommit | None = None
        self.num_commits = 0
        self.num_voids = 0
        self.num_ballots = 0
        self.num_failed_ballots = 0
        self._generation = 0
        self._awaiting: Lineage | None = None  # what the driver is applying
        self._opened: RoundId | None = None  # the round whose tasks we take, or took last
        self._opened_s = 0.0
        self._measured = Measured()
        self._late: _Late | None = None  # waits for the end of that round
        self._keeps_work = False  # what is being applied was late: what was frozen since then stays
        self._stood_generation = 0
        self._given_up: Lineage | None = None
        self._syncing = False
        self._attempts = 0
        self._retry_from: tuple[PeerId, ...] | None = None

    # -- where we are ------------------------------------------------------------------------------

    @property
    def standing(self) -> Standing:
        if self.chain is None or self.applied is None:
            return Standing.OUT
        if self.applied.lineage != self.chain.head.lineage and self._late is None:
            return Standing.APPLYING
        if self.slot is None:
            return Standing.LISTENING
        is_over = self.closings.newest_round >= (self.slot.round if self.round is None else self.round)
        return Standing.FROZEN if self.slot.frozen and (is_over or not self._is_ahead) else Standing.OPEN

    @property
    def round(self) -> RoundId | None:
        """The round whose tasks we take, or would take as a member if its time had come."""
        if self.slot is None:
            return None
        return self._opened if self._opened is not None and self._is_ahead else self.slot.round

    @property
    def _is_ahead(self) -> bool:
        """Tell whether the round after the one that is averaged was opened: it may be over as well by now."""
        return self.slot is not None and self._opened is not None and self._opened > self.slot.round

    # -- charter and state -------------------------------------------------------------------------

    def on_charter(self, signed: Signed, now_s: float) -> list[Step]:
        """Follow a charter of a higher generation: in place if our state is the chartered one."""
        if self.chain is not None and signed == self.chain.signed_charter:
            return []
        charter = read_charter(self._settings, signed)
        if charter.generation <= self._generation:
            return []
        self._generation = charter.generation
        same = (
            not self._syncing
            and self._awaiting is None
            and self.applied is not None
            and self.applied.version == charter.version
            and self.state_digest == charter.state_digest
        )
        if not same:
            return self.resync(signed)
        actions, self._opened = self._end_slot(), None
        chain = Chain.of_charter(self._settings, signed)
        self._stand_at(chain, now_s)
        renamed = NewLineage(signed, chain.head.lineage, charter.round)
        return [*actions, renamed, *self._open(now_s, fresh=True)]

    def is_left_behind(self, now_s: float) -> bool:
        """Tell whether the stage may have gone on without us, as far as can be seen from here.

        No commit follows our head before its round is over. Then its members talk about it at every beat: a voter
        hears its steward, and a steward those who vote, unless all of them are elsewhere.
        """
        slot, wait_s = self.slot, self._settings.timers.ping_timeout_s
        if self.chain is None or self.closings.newest_round < self.chain.head.next_round:
            return False
        if slot is None:
            return True
        if not slot.frozen or now_s - slot.frozen_s < wait_s:
            return False
        me = self._settings.me.peer
        present = {peer for peer, at_s in slot.spoke_s.items() if peer != me and now_s - at_s < wait_s}
        if self.steward is not None and self.steward.is_conducting:
            return not is_quorum({*present, me}, slot.order, break_tie=not slot.slept)
        return not present

    def resync(self, charter: Signed | None, sources: tuple[PeerId, ...] = ()) -> list[Step]:
        """Give up what we have and fetch the stage's state from history, of anybody if no `sources` are named."""
        actions = self._end_slot()
        if charter is None and self.chain is not None:
            charter = self.chain.signed_charter
        resync = Resync(charter, sources or self._neighbours.hosts(self._settings.stage), is_choice=bool(sources))
        self.chain = self.applied = self._awaiting = self._retry_from = self.state_digest = None
        self._opened, self._late, self._keeps_work = None, None, False
        self._syncing, self._attempts = True, 0
        return [*actions, resync]

    def on_synced(self, event: Synced, now_s: float) -> list[Step]:
        """Stand where the fetched history ends, unless a newer charter has come meanwhile."""
        try:
            chain = Chain.of_history(self._settings, event.charter, event.commits)
        except PeerFault as fault:  # it must not leave us standing nowhere for good
            return [Report(Trouble.FAULT, None, fault.one_line()), *self.resync(None)]
        if chain.generation < self._generation:
            return self.resync(None)
        actions = self._end_slot()
        if chain.generation == self._stood_generation:
            self._given_up = chain.head.lineage  # what we promised there is forgotten: that seat is not ours any more
        self._generation, self._syncing, self._awaiting = chain.generation, False, None
        self.state_digest = event.state_digest
        self._stand_at(chain, now_s)
        return [*actions, *self._open(now_s, fresh=True)]

    # -- closing and void --------------------------------------------------------------------------

    def on_closing(self, sender: PeerId, signed: Signed, now_s: float) -> list[Step]:
        """Note that a round is over; if it is ours, freeze what we have accumulated."""
        heard = self.closings.add(signed, self._word_of(sender, now_s))
        if isinstance(heard, Report):
            return [heard]
        closing = heard.closing
        if self.clock is not None and self.clock.round <= closing.round:
            self.clock.is_closed = True
        slot = self.slot
        if slot is None or closing.round < slot.round or closing.round in slot.closings:
            return []
        slot.closings[closing.round] = heard
        if slot.frozen and self._opened is not None and slot.round < self._opened <= closing.round:
            return [Shut(self._opened)]  # it is over before the average of the one before is there
        return self._freeze(now_s)

    def _word_of(self, sender: PeerId, now_s: float) -> Word:
        if self.chain is None:
            return Word(sender, now_s)
        head = self.chain.head
        return Word(sender, now_s, head.members, head.next_round if self.round is None else self.round)

    def on_frozen(self, event: Frozen, now_s: float) -> list[Step]:
        """Go on to averaging, or to what had to wait for the end of the round.

        A void round's answer may come when the next is frozen already.
        """
        slot = self.slot
        if slot is None or slot.freezing != event.round:
            return []
        slot.freezing, slot.contribution, slot.norm = None, event.tokens, event.norm
        self._measured.tokens_per_s = event.tokens_per_s or self._measured.tokens_per_s
        return self._average(now_s) if slot.applied else self._apply_late()

    def on_void(self, sender: PeerId, void: VoidRound, now_s: float) -> list[Step]:
        """Go on to the next round with what we have: nothing was there to be averaged."""
        slot = self.slot
        if slot is None or void.parent != slot.parent.lineage or sender not in slot.order:
            return []
        stale = slot.promised is not None and slot.promised.outranks(void.ballot)
        if stale or slot.vote is not None or not slot.round <= void.round <= self.closings.newest_round:
            return []
        actions: list[Step] = [AbortReduce(slot.reducing.group_id)] if slot.reducing else []
        slot.reducing = None
        if self.steward is not None:
            self.steward.stop()
        self.num_voids += 1
        if self.leaving.is_wanted and slot.contribution == 0 and not self._is_ahead:
            actions.append(Left())
        slot.leaving = self.leaving.is_wanted
        slot.round, slot.frozen, slot.freezing, slot.contribution = RoundId(void.round + 1), False, None, None
        return [*actions, *(self._open(now_s, fresh=False) if slot.applied else self._apply_late())]

    # -- commits -----------------------------------------------------------------------------------

    def on_final(self, signed: Signed, sources: tuple[PeerId, ...], now_s: float) -> list[Step]:
        """Append a commit that is final to our chain, and bring the state there. Raises `PeerFault`."""
        assert self.chain is not None
        commit = self.chain.follows_head(signed)
        slot, parent = self.slot, self.chain.head
        can_apply = (
            slot is not None
            and slot.applied
            and self._awaiting is None
            and slot.staged is not None
            and slot.staged.are_of(commit)
        )
        if slot is not None and slot.staged is not None and slot.staged.are_of(commit):
            check_scale(self._settings.rules, commit, slot.staged)  # final or not: we apply nothing that is wrong
        actions = self._report_if_left_out(signed)
        clock, self._keeps_work = self.clock, False
        actions += self._end_slot()
        link = self.chain.extend(signed)
        self.leaving.forget_heirs()
        self.num_commits += 1
        self.last_commit = LastCommit(
            commit.round,
            len(commit.contributors),
            len(parent.seats),
            commit.total_tokens,
            commit.tokens_dropped,
            commit.double_counted,
        )
        self._new_slot(now_s)
        apply = Apply(commit, signed, link.lineage) if can_apply else None
        if self.slot is not None and self._awaiting is None and self._opened == self.slot.round:
            self._late, self.clock = _Late(apply, sources), clock
            return [*actions, *self._freeze(now_s)]
        self._opened = None
        return [*actions, *self._apply(apply, sources)]

    def on_applied(self, event: Applied, now_s: float) -> list[Step]:
        """Open the next round, or go on if the chain has grown meanwhile."""
        if self.chain is None or event.lineage != self._awaiting:
            return []
        self._awaiting, self._attempts, self.state_digest = None, 0, event.state_digest
        self.applied = self.chain.link_of(event.lineage)
        if self.applied is None:  # so far behind that our place is not kept any more
            return self.resync(None)
        if event.lineage != self.chain.head.lineage:
            return self._replay(())
        keeps_work, self._keeps_work = self._keeps_work, False
        if self.slot is not None and event.norm is not None:
            self.slot.norm = event.norm
        return self._open(now_s, fresh=not keeps_work)

    def on_apply_failed(self, event: ApplyFailed) -> list[Step]:
        """Try again from anybody who may have the bytes; then give up and fetch the whole state."""
        if event.lineage != self._awaiting:
            return []
        self._awaiting = None
        self._attempts += 1
        if self._attempts >= APPLY_ATTEMPTS:
            return self.resync(None)
        self._retry_from = self._neighbours.hosts(self._settings.stage)
        return []

    def on_drain(self, _event: Drain) -> list[Step]:
        """Leave with the next commit that has all our work in it; at once if none is waiting for one."""
        self.leaving.is_wanted = True
        if self.slot is None:
            return self.leaving.if_safe(self.chain, self.applied)
        self.slot.leaving = not self._is_ahead
        return []

    def note_heir(self, peer: PeerId) -> list[Step]:
        """Somebody else has applied our head as well."""
        self.leaving.note_heir(peer)
        return self.leaving.if_safe(self.chain, self.applied)

    # -- time --------------------------------------------------------------------------------------

    def tick(self, now_s: float) -> list[Step]:
        """Let clock and steward look at their timers; conduct if it is our turn."""
        actions: list[Step] = []
        if self._retry_from is not None and self._awaiting is None:
            sources, self._retry_from = self._retry_from, None
            actions += self._replay(sources)
        if self.slot is None:
            return actions
        self.refresh_slot(now_s)
        if self.clock is not None:
            actions += self.clock.tick(now_s)
        if self.steward is not None:
            actions += self.steward.tick(now_s)
        return [*actions, *self.conduct_if_due(now_s)]

    def wake(self, now_s: float) -> None:
        """Everything that was measured while we were stopped is worthless."""
        if self.slot is not None:
            self.slot.slept, self.slot.heard_s = True, now_s
            self.slot.spoke_s.clear()
        if self.steward is not None:
            self.steward.wake(now_s)
        if self.clock is not None:
            self.clock.wake(now_s)

    def conduct_if_due(self, now_s: float) -> list[Step]:
        """Start a ballot if we are first in order, or all before us have been silent for their turn."""
        slot, steward, me = self.slot, self.steward, self._settings.me.peer
        if slot is None or steward is None or not slot.frozen or steward.is_conducting:
            return []
        is_conducted = slot.promised is not None and slot.promised_s >= slot.frozen_s
        silent = slot.promised.steward if slot.promised is not None and is_conducted else None
        before = [peer for peer in slot.living if peer == me or peer != silent]
        turn = len(before) if steward.has_stepped_down else before.index(me) + is_conducted
        if now_s - slot.heard_s < turn * self._settings.timers.silence_s:
            return []
        self.num_ballots += 1
        return steward.start(now_s)

    def refresh_slot(self, now_s: float) -> None:
        """Copy into the slot what the neighbours' book says now."""
        slot = self.slot
        if slot is None:
            return
        slot.company_s, slot.company_since_s = self._neighbours.heard_s, self._neighbours.company_since_s
        slot.gone = self._neighbours.gone(slot.parent.seats) - {self._settings.me.peer}
        slot.has_listeners = self._neighbours.has_listeners(slot.order)
        seated = {(seat.peer, seat.session) for seat in slot.parent.seats}
        ready = self._neighbours.ready_at(slot.parent.lineage, now_s)
        slot.ready = {peer: each for peer, each in ready.items() if (peer, each.session) not in seated}
        if self.voter is not None and self.steward is not None:
            self.voter.banned = self.steward.banned = self._neighbours.banned

    # -- steps -------------------------------------------------------------------------------------

    def _stand_at(self, chain: Chain, now_s: float) -> None:
        self.chain, self.applied = chain, chain.head
        self._stood_generation = chain.generation
        self._new_slot(now_s)

    def _new_slot(self, now_s: float) -> None:
        """Open the question of what follows the head, if we have a seat in it."""
        assert self.chain is not None
        settings, head = self._settings, self.chain.head
        self._neighbours.keep_only(head.seats)
        if settings.me not in head.seats or head.lineage == self._given_up:
            return
        order = steward_order(settings.run, settings.stage, head.lineage, head.members)
        slot = Slot(
            parent=head,
            order=order,
            round=head.next_round,
            heard_s=now_s,
            one_by_one=settings.rules.overlap,
            leaving=self.leaving.is_wanted,
            measured=self._measured,
        )
        slot.closings.update(self.closings.since(slot.round))
        self.slot = slot
        self.voter = Voter(settings, slot, self.chain)
        self.steward = Steward(settings, slot, self.chain)
        self.refresh_slot(now_s)

    def _end_slot(self) -> list[Step]:
        slot = self.slot
        if self.steward is not None:
            self.num_failed_ballots += self.steward.num_failed
        self.slot = self.voter = self.steward = self.clock = self._late = None
        return [AbortReduce(slot.reducing.group_id)] if slot is not None and slot.reducing else []

    def _open(self, now_s: float, *, fresh: bool) -> list[Step]:
        """Take tasks of the slot's round; freeze again at once if that round is already over.

        If it was frozen before its parent could be applied, all that is left is to average.
        """
        slot = self.slot
        left = self.leaving.if_safe(self.chain, self.applied) if fresh else []
        if slot is None:
            return left
        slot.applied = True  # also when leaving: until the process ends, a stage may have nobody else
        if slot.frozen:
            return [*left, *self._average(now_s)]
        if fresh or self._opened != slot.round:
            left += self._take_tasks(slot.round, now_s, fresh=fresh)
        return [*left, *self._freeze(now_s)]

    def _take_tasks(self, round_id: RoundId, now_s: float, *, fresh: bool) -> list[Step]:
        """Open a round at the version that is there."""
        assert self.slot is not None
        parent = self.slot.parent
        self._opened, self._opened_s = round_id, now_s
        if self._settings.stage == FIRST_STAGE:
            self.clock = Clock(self._settings, round_id, self.slot.living, now_s)
        opened = OpenRound(
            round=round_id,
            first_round=self.slot.round,
            version=parent.version,
            lineage=parent.lineage,
            members=parent.members,
            fresh=fresh,
        )
        return [opened]

    def _freeze(self, now_s: float) -> list[Step]:
        slot = self.slot
        if slot is None or slot.frozen or not (slot.applied or self._late):
            return []
        heard = slot.due_closing
        if heard is None:
            return []
        slot.frozen, slot.frozen_s, slot.heard_s = True, now_s, now_s
        slot.round_s = None if self._opened is None else now_s - self._opened_s
        slot.freezing = heard.closing.round
        if self.clock is not None and self.clock.round <= heard.closing.round:
            self.clock.is_closed = True
        following = None if self._late is None or self._late.apply is None else self._late.apply.commit
        freeze = Freeze(heard.closing, heard.signed, replaces=not slot.applied, following=following)
        return [freeze, *self.conduct_if_due(now_s)]

    def _average(self, now_s: float) -> list[Step]:
        """Our contribution is there and stays as it is: tell a steward that has asked, and compute on meanwhile.

        Not if the next round is over already. Nor if we leave: all our work is in this contribution.
        """
        slot = self.slot
        if slot is None or self.voter is None or slot.contribution is None:
            return []
        ready, following = self.voter.on_frozen(), RoundId(slot.round + 1)
        is_hidden = self._settings.rules.is_hidden(slot.round) and not slot.leaving
        if is_hidden and self.closings.newest_round < following:
            return [*ready, *self._take_tasks(following, now_s, fresh=False)]
        return ready

    def _apply_late(self) -> list[Step]:
        """Apply the commit that has waited for the end of the round."""
        late, self._late = self._late, None
        if late is None:
            return []
        self._keeps_work = True
        return self._apply(late.apply, late.sources)

    def _apply(self, apply: Apply | None, sources: tuple[PeerId, ...]) -> list[Step]:
        """Bring the state to our chain's head: from staged bytes if `apply` is there, else from others."""
        if apply is None:
            return self._replay(sources)
        self._awaiting = apply.lineage
        return [apply]

    def _replay(self, sources: tuple[PeerId, ...]) -> list[Step]:
        if self.chain is None or self.applied is None or self._awaiting is not None:
            return []  # `on_applied` goes on from there
        steps = self.chain.steps_after(self.applied.lineage)
        if steps is None:
            return self.resync(None)
        if not steps:
            return []
        self._awaiting = steps[-1].lineage
        contributors = [each.peer for step in steps for each in step.commit.contributors]
        holders = dict.fromkeys([*sources, *contributors, *self._neighbours.hosts(self._settings.stage)])
        holders.pop(self._settings.me.peer, None)
        return [Replay(steps, tuple(holders))]

    def _report_if_left_out(self, signed: Signed) -> list[Step]:
        slot, me = self.slot, self._settings.me.peer
        if slot is None or not slot.tokens or self.chain is None:
            return []
        commit = self.chain.follows_head(signed)
        if slot.promised != commit.ballot or any(each.peer == me for each in commit.contributors):
            return []
        return [Report(Trouble.LEFT_OUT, signed.signer, f"round {commit.round}: our {slot.tokens} tokens")]
