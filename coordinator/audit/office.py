"""Audits as a service: draws work, hands out orders with beats, and acts on what comes back.

Owns: when what is drawn, and keeping findings and standings. Must not know: who recomputes it (`auditors.py`), how a
case is judged (`court.py`), what a standing means (`policy.py`), who carries orders to peers (`registry.py`).

Nothing here holds up training, and without a coordinator nobody is audited or put out: what was done meanwhile is drawn
from only as long as peers still hold it.
"""

from __future__ import annotations

import hashlib
import hmac
import itertools
import random
import secrets
from collections import OrderedDict, defaultdict, deque
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

import structlog

from coordinator.audit import policy
from coordinator.audit.auditors import Auditors
from coordinator.audit.contributed import MAX_HIDDEN, Contributed, Wrongs, contributed
from coordinator.audit.court import Case, Court, Finding, Verdict
from coordinator.audit.drifts import FLAGRANT_SCORE, Drifts, FarOff
from coordinator.audit.lookout import NONSENSE, Lookout, sides_of
from coordinator.audit.policy import Sanction, Standing, State
from coordinator.audit.shares import Blame, Disputes, ShareCases
from coordinator.audit.soundness import Soundness
from coordinator.audit.sums import Given, Record, Sums
from coordinator.audit.tolerance import tolerance_of
from coordinator.audit.vouchers import Vouchers
from coordinator.carries import Carry, RoundHops
from coordinator.clock import Clock
from coordinator.journal import DISK_NOTE, Journal
from coordinator.registry import Registry
from coordinator.store import audits, bans, credits, receipts, successors
from coordinator.store.bans import BanRow
from coordinator.store.database import Connection, Database
from protocol.audits import (
    MAX_SHARES,
    SEED_BYTES,
    Answer,
    ContributionReport,
    NonsenseReport,
    Order,
    ShareReport,
    contribution_seed,
)
from protocol.errors import StorageError
from protocol.ids import Lineage, PeerId, RoundId, StageId
from protocol.manifest import AveragingMode, Manifest
from protocol.receipts import Window
from protocol.rounds.messages import Commit

log = structlog.get_logger()

MAX_ROUNDS = 32  # of which receipts are looked through for work to draw; what is older nobody holds any more
MAX_AHEAD = 4  # rounds that receipts may be ahead of the commits that we know
MAX_PER_ROUND = 20  # of one peer's microbatches in one round
MAX_LEFT = 32  # microbatches that were drawn while nobody had time: the newest are looked at when somebody has
RINGER_RATE = 1 / 8  # of audits: somebody else does the same once more, so that who answers at random is noticed
PRUNE_EVERY_S = 600.0
LOOK_EVERY_S = 30.0
LATE_S, LATELY_S = 120.0, 900.0
"""What a peer has to say of a round is in by then; what is older counts no more."""
TELL_S = 45.0  # receipts are signed after the step, which may take long, and come with a beat
QUIET_S = 60.0  # after the run went back: what peers say of work before that is in by then
KEEP_S = 7 * 86400.0
MAX_AGAIN = 8  # microbatches that are looked at again when somebody was struck
OFF = "two others recomputed its work, and found it further off than honest work is, again and again"
SPOILT = "what it gave into an average, or made of what others gave, is not what it says"


@dataclass(frozen=True, slots=True)
class _Unread:
    """An average whose contributions wait for what their givers tell of their work."""

    record: Record
    since_s: float
    left: dict[PeerId, Given]
    untold: dict[PeerId, bool] = field(default_factory=dict)


class AuditOffice:
    """The audits of one run."""

    def __init__(
        self, manifest: Manifest, *, registry: Registry, database: Database, journal: Journal, clock: Clock
    ) -> None:
        self._num_stages = manifest.model.num_stages
        self._registry, self._database, self._journal, self._clock = registry, database, journal, clock
        self._secret = secrets.token_bytes(32)
        self._chance = random.Random(self._secret)
        self._order = int(clock.wall() * 1000)  # so that no number comes twice, whoever has answered an earlier one
        self._drifts = Drifts()
        self._tolerance = tolerance_of(*manifest.averaging.hop_codecs)
        self._court = Court(self._tolerance, next_order=self._next_order, drifts=self._drifts)
        self._auditors = Auditors(
            manifest,
            registry=registry,
            load=lambda peer, *, is_sum: self._court.load(peer, is_sum=is_sum),
            is_trusted=self._is_trusted,
            chance=self._chance,
        )
        self._quiet_until_s = float("-inf")
        self._newest_round: RoundId | None = None
        """Of the commits that we have heard of."""
        self._standings: dict[PeerId, Standing] = {}
        self._rounds: OrderedDict[RoundId, RoundHops] = OrderedDict()
        self._touched: set[RoundId] = set()
        self._is_local = manifest.averaging.mode is AveragingMode.DILOCO
        self._sums = Sums(is_mean=self._is_local)
        self._lookout = Lookout(num_stages=self._num_stages)
        self._look_at_s = float("-inf")
        self._vouchers = Vouchers()
        self._shares = ShareCases(next_order=self._next_order)
        self._disputes = Disputes()
        self._soundness = Soundness()
        self._unread: list[_Unread] = []
        self._wrongs = Wrongs()
        self._far_off = FarOff()
        self._drawn: defaultdict[tuple[RoundId, PeerId], int] = defaultdict(int)
        self._left: deque[Carry] = deque(maxlen=MAX_LEFT)
        self._verdicts: list[Verdict] = []
        self._pruned_s = float("-inf")
        self._newest: dict[PeerId, PeerId] = {}
        """Keys that were replaced, and by which: a peer is one peer, whatever it went by."""
        registry.orders = self.orders_for
        registry.succeeded = self.succeed

    async def load(self) -> None:
        """Take over where everybody stands. Call once, before serving."""
        for peer, fields in (await self._database.run(audits.load_standings)).items():
            self._standings[peer] = policy.standing_from(peer, fields)
        self._newest = await self._database.run(successors.all_newest)

    async def succeed(self, peer: PeerId, before: Sequence[PeerId]) -> None:
        """Take over what is known of a peer from the keys that it went by. Said again it changes nothing."""
        standing, known = self.standing(peer), [key for key in before if key in self._standings]
        for key in known:
            standing = policy.inherited(standing, self._standings[key])
        changed = {peer: standing} if known else {}
        for other in (*changed.values(), *self._standings.values()):
            for key in before:
                if policy.is_witness(other, key) and other.peer not in before:
                    other = policy.renamed(changed.get(other.peer, other), key, peer)
                    changed[other.peer] = other

        # before the first await, or a verdict that comes meanwhile would be lost with the key
        self._standings.update(changed)
        for key in known:
            del self._standings[key]
        self._newest.update((key, peer) for key in before)
        for key in before:
            self._disputes.succeed(key, peer)
            self._far_off.succeed(key, peer)
            self._wrongs.succeed(key, peer)

        def write(db: Connection) -> None:
            for each in changed.values():
                audits.put_standing(db, each.peer, policy.fields_of(each))
            for key in known:
                audits.drop_standing(db, key)

        if changed:
            await self._database.run(write)

    def forget(self) -> None:
        """The run goes back: the same rounds and versions come again, with other weights.

        Nobody may be judged for the work of the one by those of the other, so for a while nothing is drawn at all.
        """
        self._drifts, self._vouchers = Drifts(), Vouchers()
        self._court = Court(self._tolerance, next_order=self._next_order, drifts=self._drifts)
        self._shares = ShareCases(next_order=self._next_order)
        self._rounds.clear()
        self._touched.clear()
        self._drawn.clear()
        self._left.clear()
        self._verdicts.clear()
        self._sums, self._newest_round = Sums(is_mean=self._is_local), None
        self._lookout.start_over()
        self._soundness = Soundness()
        self._unread.clear()
        self._wrongs = Wrongs()
        self._far_off = FarOff()
        self._quiet_until_s = self._clock.monotonic() + QUIET_S

    # -- what is heard ----------------------------------------------------------------------------------

    def hear_receipts(self, window: Window) -> None:
        """Take what a peer says of its hops, whose signature was checked."""
        is_far = self._newest_round is not None and window.round > self._newest_round + MAX_AHEAD
        if self._clock.monotonic() < self._quiet_until_s or is_far:  # made up, it would take the place of what is real
            return
        if window.round not in self._rounds:
            self._rounds[window.round] = RoundHops(window.round, num_stages=self._num_stages)
            while len(self._rounds) > MAX_ROUNDS:
                oldest = min(self._rounds)
                del self._rounds[oldest]
                for key in [key for key in self._drawn if key[0] == oldest]:
                    del self._drawn[key]
        if window.round in self._rounds:
            self._rounds[window.round].add(window)
            self._touched.add(window.round)

    def hear_commit(self, commit: Commit, lineage: Lineage) -> None:
        """Take who was summed by a commit, if contributions to it are on record."""
        self._newest_round = commit.round if self._newest_round is None else max(self._newest_round, commit.round)
        if contribution_seed(lineage) is not None and commit.first_round == commit.round:
            self._sums.hear_commit(commit, lineage, now_s=self._clock.monotonic())

    def hear(self, peer: PeerId, report: Answer) -> None:
        """Take an answer; what it comes to is dealt with at the next tick."""
        if isinstance(report, ContributionReport):
            self._sums.hear(peer, report, now_s=self._clock.monotonic())
            return
        if isinstance(report, ShareReport):
            self._shares.hear(peer, report)
            return
        if isinstance(report, NonsenseReport):
            self._lookout.complain(report.peer, peer, now_s=self._clock.monotonic())
            return
        verdict = self._court.hear(peer, report)
        if verdict is not None:
            self._verdicts.append(verdict)

    def orders_for(self, peer: PeerId) -> Sequence[Order]:
        """Return what a peer is asked with the answer to its beat."""
        return [*self._shares.orders_for(peer), *self._court.orders_for(peer)]

    def standing(self, peer: PeerId) -> Standing:
        """Return where a peer stands."""
        peer = self._who(peer)
        return self._standings.get(peer) or Standing(peer=peer)

    def _is_trusted(self, peer: PeerId) -> bool:
        return policy.state_of(self.standing(peer), now_s=self._clock.wall()) is State.TRUSTED

    def _who(self, key: PeerId) -> PeerId:
        return self._newest.get(key, key)

    # -- what is done -----------------------------------------------------------------------------------

    async def tick(self) -> None:
        """Deal with verdicts, and draw from what was told since the last time."""
        now_s = self._clock.wall()
        verdicts, self._verdicts = self._verdicts, []
        verdicts += self._court.expire(now_s=self._clock.monotonic())
        try:
            for verdict in verdicts:
                await self._act(verdict, now_s=now_s)
            for blame in self._shares.due(now_s=self._clock.monotonic()):
                await self._act_on_shares(blame, now_s=now_s)
            await self._pardon(now_s=now_s)
            await self._look_around(now_s=now_s)
            if now_s - self._pruned_s >= PRUNE_EVERY_S:
                self._pruned_s = now_s
                await self._database.run(audits.prune_audits, before_s=now_s - KEEP_S)
        except StorageError as error:  # what was found is lost; who does wrong is found again
            self._journal.note(DISK_NOTE, str(error))
        touched, self._touched = self._touched, set()
        self._draw(touched, now_s=now_s)
        self._draw_sums(touched, now_s=now_s)

    def _draw(self, touched: Collection[RoundId], *, now_s: float) -> None:
        hosts = {peer.peer: peer.stages for peer in self._registry.live()}
        self._drifts.keep_only(hosts, now_s=self._clock.monotonic())
        for carry in [self._left.pop() for _ in range(len(self._left))]:
            if not self._open(carry, _new_seed()):
                self._left.appendleft(carry)
        for round_id in sorted(self._rounds.keys() & touched):
            for carry in sorted(self._rounds[round_id].fresh(hosts, is_rough=self._is_local), key=self._lot):
                drawn = self._drawn[round_id, carry.peer]
                chance = policy.rate(self.standing(carry.peer), now_s=now_s)
                if drawn >= MAX_PER_ROUND or self._lot(carry) >= chance:
                    continue
                self._drawn[round_id, carry.peer] = drawn + 1
                if not self._open(carry, _new_seed()):
                    self._left.append(carry)
                elif self._chance.random() < RINGER_RATE:
                    self._open(carry, _new_seed(), without=self._auditors_of(carry))

    async def _look_around(self, *, now_s: float) -> None:
        """Look who does work of which nothing can be looked at, or sends nothing that could be work."""
        monotonic_s = self._clock.monotonic()
        if monotonic_s < self._look_at_s:
            return
        self._look_at_s = monotonic_s + LOOK_EVERY_S
        live = {peer.peer: peer.stages for peer in self._registry.live()}
        handed_in = await self._database.run(receipts.handed_in, since_s=now_s - LATELY_S, until_s=now_s - LATE_S)
        # of local steps only those before the first one can be done again
        unsteady = {} if self._is_local else self._unsteady_work(live)
        for each in self._lookout.look(live, handed_in, unsteady, self._sums, now_s=monotonic_s):
            log.warning("audit.sighted", peer=each.peer, why=each.why)
            if each.is_proven:
                await self._strike(each.peer, each.why, now_s=now_s)
            else:
                await self._suspect([each.peer], now_s=now_s)

    def _unsteady_work(self, live: Mapping[PeerId, Collection[StageId]]) -> dict[PeerId, tuple[int, int]]:
        """Count of everybody's work what is known, and what nobody can do again by its own word."""
        counts: dict[PeerId, tuple[int, int]] = {}
        for hops in self._rounds.values():
            for carry in hops.told(live):
                known, unsteady = counts.get(carry.peer, (0, 0))
                counts[carry.peer] = known + 1, unsteady + (not carry.is_repeatable)
        return counts

    def _draw_sums(self, touched: Collection[RoundId], *, now_s: float) -> None:
        """Have contributions recomputed: now and then, and all of them if they do not add up to what came out."""
        monotonic_s = self._clock.monotonic()
        for record in self._sums.due(now_s=monotonic_s):
            if not record.adds_up:
                log.warning("audit.sum", stage=record.stage, round=record.round, apart=record.apart)
                if len(record.members) <= MAX_SHARES:
                    self._shares.open(record, now_s=monotonic_s)
            if not self._is_local:  # what local steps come to depends on their order
                self._unread.append(_Unread(record, monotonic_s, dict(record.contributions)))
        hosts = {peer.peer: peer.stages for peer in self._registry.live()}
        for unread in self._unread:
            is_late = monotonic_s - unread.since_s >= TELL_S
            if is_late or unread.record.round in touched or unread.since_s == monotonic_s:
                self._draw_contributions(unread, hosts, is_late=is_late, now_s=now_s)
        done = [unread for unread in self._unread if not unread.left]
        self._unread = [unread for unread in self._unread if unread.left][-MAX_ROUNDS * self._num_stages :]
        for unread in done:
            self._sums.note_untold(unread.record.stage, unread.untold)

    def _draw_contributions(
        self, unread: _Unread, hosts: Mapping[PeerId, Collection[StageId]], *, is_late: bool, now_s: float
    ) -> None:
        """Draw from contributions to one average whose givers have told what they worked on, or will not any more."""
        record, hops = unread.record, self._rounds.get(unread.record.round)
        if hops is None:
            unread.left.clear()
            return
        said = {peer: hops.told_by(peer, record.stage) for peer in unread.left}
        ready = {peer: told for peer, told in said.items() if is_late or told.tokens >= unread.left[peer].tokens}
        works = [carry for carry in hops.all(hosts) if record.stage in carry.stages] if ready else []
        for peer, told in ready.items():
            given = unread.left.pop(peer)
            if told.tokens and not self._lookout.is_alone(hosts.get(peer, ())):  # who tells nothing at all is silent
                unread.untold[peer] = told.alike_tokens < (1 - MAX_HIDDEN) * given.tokens
            known = contributed(record.stage, given, told, (carry for carry in works if carry.peer == peer))
            if known is None:
                continue
            if not record.adds_up or self._chance.random() < policy.rate(self.standing(peer), now_s=now_s):
                self._open(known.works[0], record.seed, contribution=known)

    def _open(
        self,
        carry: Carry,
        seed: bytes,
        *,
        without: Collection[PeerId] = (),
        contribution: Contributed | None = None,
        first: Case | None = None,
    ) -> bool:
        """Have somebody recompute it, or the contribution that it is a part of, if there is anybody who can."""
        concerned = {self._who(key) for key in (carry.peer, *carry.neighbours, *without)}
        choice = self._auditors.choose(carry, without=concerned, is_sum=contribution is not None, first=first)
        if choice is None:
            return False
        self._court.open(
            carry,
            choice.auditor,
            seed,
            now_s=self._clock.monotonic(),
            contribution=contribution,
            first=first,
            is_watcher=choice.is_watcher,
            prefix=choice.prefix,
        )
        return True

    def _is_believed(self, case: Case, peer: PeerId) -> bool:
        """Tell whether two witnesses are enough for a sentence: one watcher is both only if it is sound."""
        if not (case.is_watcher and case.is_fresh):
            return True
        stage = StageId(case.carry.first_stage)
        return self._soundness.accuse(case.auditor, peer, stage, now_s=self._clock.monotonic())

    async def _act(self, verdict: Verdict, *, now_s: float) -> None:
        case, peer = verdict.case, verdict.case.carry.peer
        is_sum = case.contribution is not None
        standing = self.standing(peer)
        # what is found right says nothing of what was booked since it was drawn: that may be of the same round
        age_s = self._clock.monotonic() - (case.first or case).opened_s
        auditor, vouchers = self._who(case.auditor), set[PeerId]() if is_sum else self._vouchers.of(case.carry)
        own = self._registry.watchers
        if case.is_watcher and verdict.finding is Finding.VALID:
            self._soundness.note_valid(auditor, StageId(case.carry.first_stage))
        if verdict.finding is Finding.CONFIRMED and verdict.is_flagrant and not case.is_rough:
            # no more than that: a neighbour told them what was sent, and may have told the others something else
            await self._suspect(vouchers - own, now_s=now_s)
        is_out = standing.out_until_s > now_s
        if is_out and not (verdict.finding is Finding.DIFFERS and vouchers):
            # it has had its sentence for what was found at the same time
            await self._database.run(audits.add_audit, _row(verdict, now_s))
        elif verdict.finding is Finding.VALID:
            if not is_sum:
                self._vouchers.note(case.carry, auditor)
            self._far_off.note(standing.peer, case.carry.key, 0.0)
            await self._keep(verdict, now_s, policy.passed(standing, auditor, now_s=now_s - age_s, is_sum=is_sum))
        elif verdict.finding is Finding.DIFFERS:
            has_second = self._open(
                case.carry, case.seed, without=(case.auditor, *vouchers), contribution=case.contribution, first=case
            )
            log.info("audit.differs", peer=peer, round=case.carry.round, number=case.carry.number, second=has_second)
            after, sanction = _doubted(case, standing, auditor, now_s=now_s)
            if has_second or is_out:  # it will settle that
                after, sanction = standing, None
            await self._keep(verdict, now_s, after, sanction)
        elif verdict.finding is Finding.CONFIRMED and case.contribution is not None and case.slack:
            await self._keep(verdict, now_s, policy.suspected(standing, now_s=now_s))
            await self._act_on_hidden(case.contribution, case.carry, now_s=now_s)
        elif verdict.finding is Finding.CONFIRMED and not self._is_believed(case, peer):
            await self._keep(verdict, now_s, policy.suspected(standing, now_s=now_s))
        elif verdict.finding is Finding.CONFIRMED and (case.is_rough or not verdict.is_flagrant):
            await self._keep(verdict, now_s, policy.suspected(standing, now_s=now_s))
            score = FLAGRANT_SCORE if verdict.is_flagrant else 1.0
            if self._far_off.note(standing.peer, case.carry.key, score):
                self._far_off.forget(standing.peer)
                await self._strike(standing.peer, OFF, now_s=now_s)
                self._look_again(peer)
        elif verdict.finding is Finding.CONFIRMED:
            after, sanction = policy.struck(standing, now_s=now_s, is_sum=is_sum, own=own)
            await self._keep(verdict, now_s, after, sanction)
            self._look_again(peer)
        elif verdict.finding is Finding.CLEARED:
            await self._keep(verdict, now_s, policy.passed(standing, auditor, now_s=now_s - age_s, is_sum=is_sum))
            for liar in sorted({*verdict.liars} - own):
                after, sanction = policy.doubted(self.standing(liar), auditor, now_s=now_s)
                await self._keep(None, now_s, after, sanction)
        elif case.first is not None:  # the second opinion has come to nothing: the first one stands alone
            after, sanction = _doubted(case, standing, self._who(case.first.auditor), now_s=now_s)
            await self._keep(verdict, now_s, after, sanction)
        else:
            await self._database.run(audits.add_audit, _row(verdict, now_s))

    def _look_again(self, peer: PeerId) -> None:
        """Have others recompute what was found right of a peer that does wrong."""
        for carry in self._vouchers.newest(peer, MAX_AGAIN):
            self._open(carry, _new_seed(), without=(*self._vouchers.of(carry), *self._auditors_of(carry)))

    async def _act_on_hidden(self, contribution: Contributed, carry: Carry, *, now_s: float) -> None:
        """Somebody's contribution is not what is known of it: by its doing, or by that of whoever hides the rest.

        All of them are suspects. It is struck if others could not have done all that was found of it lately.
        """
        peer, others = self._who(carry.peer), frozenset(self._who(each) for each in contribution.contradicted_by)
        await self._suspect(others, now_s=now_s)
        sides = sides_of({each.peer: each.stages for each in self._registry.live()}).get(carry.peer, ())
        num_neighbours = min((len(side) for side in sides if side), default=1)
        self._wrongs.note(peer, carry.round, others, num_neighbours=num_neighbours, now_s=now_s)
        if self._wrongs.is_liar(peer, now_s=now_s):
            self._wrongs.forget(peer)
            await self._strike(peer, SPOILT, now_s=now_s)

    async def _act_on_shares(self, blame: Blame, *, now_s: float) -> None:
        """Follow what was said of an average that does not add up."""
        record = blame.record
        found = {"proven": blame.proven, "disputes": blame.disputes, "evasive": blame.evasive}
        log.warning("audit.shares", stage=record.stage, round=record.round, **found)
        for pair in blame.disputes:
            self._disputes.note(*map(self._who, pair), now_s=now_s)
        members = [self._who(peer) for peer in record.members]
        pairs = [(self._who(one), self._who(other)) for one, other in blame.disputes]
        liars = {self._who(peer) for peer in blame.proven}
        liars |= {
            peer for peer in itertools.chain(*pairs) if self._disputes.is_liar(peer, members=members, now_s=now_s)
        }
        for peer in sorted(liars):
            self._disputes.forget(peer)
            await self._strike(peer, SPOILT, now_s=now_s)
        # of what is left one lies in every pair; and who did not answer may only have lost what it was sent
        left = {peer for pair in pairs if not liars & set(pair) for peer in pair}
        await self._suspect(left | {self._who(peer) for peer in blame.evasive}, now_s=now_s)

    async def _strike(self, peer: PeerId, why: str, *, now_s: float) -> None:
        """Put a peer out for another reason than a case, if it is not out already."""
        standing = self.standing(peer)
        if standing.out_until_s <= now_s:
            await self._keep(None, now_s, *policy.struck(standing, now_s=now_s, why=why, is_broken=why == NONSENSE))

    async def _suspect(self, peers: Collection[PeerId], *, now_s: float) -> None:
        """Have all of some peers' work looked at for a while."""
        for standing in map(self.standing, sorted(peers)):
            if standing.out_until_s <= now_s:
                await self._keep(None, now_s, policy.suspected(standing, now_s=now_s))

    async def _keep(
        self, verdict: Verdict | None, now_s: float, standing: Standing, sanction: Sanction | None = None
    ) -> None:
        """Keep a finding, a standing and what follows from it, all or nothing."""

        def write(db: Connection) -> None:
            if verdict is not None:
                audits.add_audit(db, _row(verdict, now_s))
            audits.put_standing(db, standing.peer, policy.fields_of(standing))
            if sanction is not None:
                until_s = now_s + sanction.hours * 3600
                reason = f"{sanction.state.value}: {sanction.reason}"
                bans.add_milder_ban(db, BanRow(peer=standing.peer, since_s=now_s, until_s=until_s, reason=reason))
                for key in (standing.peer, *successors.predecessors(db, standing.peer)):
                    credits.revoke(db, key, reason=reason, at_s=now_s, since_s=sanction.gone_since_s)

        await self._database.run(write)
        self._standings[standing.peer] = standing
        if sanction is not None:
            await self._journal.event(f"peer.{sanction.state.value}", standing.peer, sanction.reason)

    async def _pardon(self, *, now_s: float) -> None:
        """Follow the organiser, who has let somebody in again (`coordinator unban`): an appeal was granted."""
        out = [standing for standing in self._standings.values() if standing.out_until_s > now_s]
        if not out:
            return

        def write(db: Connection) -> list[Standing]:
            banned = {self._who(row.peer) for row in bans.load_bans(db, now_s=now_s) if row.kind == "banned"}
            let_in = [standing for standing in out if standing.peer not in banned]
            for standing in let_in:
                for key in (standing.peer, *successors.predecessors(db, standing.peer)):
                    credits.restore(db, key, since_s=standing.out_since_s, at_s=now_s)
                audits.put_standing(db, standing.peer, policy.fields_of(policy.pardoned(standing)))
            return let_in

        for standing in await self._database.run(write):
            self._standings[standing.peer] = policy.pardoned(standing)
            self._sums.forget(standing.peer)
            self._lookout.forget(standing.peer, now_s=self._clock.monotonic())
            self._soundness.forget(standing.peer)
            self._wrongs.forget(standing.peer)
            self._far_off.forget(standing.peer)
            await self._journal.event("peer.pardoned", standing.peer, "back on probation: all of its work is looked at")

    def _auditors_of(self, carry: Carry) -> tuple[PeerId, ...]:
        return tuple(case.auditor for case in self._court.cases_of(carry))

    def _lot(self, carry: Carry) -> float:
        """Draw a number from 0 to 1 for a piece of work, which nobody can know before."""
        name = repr(carry.key).encode()
        return int.from_bytes(hmac.digest(self._secret, name, hashlib.sha256)[:8], "big") / 2.0**64

    def _next_order(self) -> int:
        self._order += 1
        return self._order


def _doubted(case: Case, standing: Standing, accuser: PeerId, *, now_s: float) -> tuple[Standing, Sanction | None]:
    """Return where somebody stands of whom one witness alone says that it did wrong."""
    if case.is_rough or case.slack:  # it may be nobody's fault
        return policy.suspected(standing, now_s=now_s), None
    return policy.doubted(standing, accuser, now_s=now_s)


def _new_seed() -> bytes:
    return secrets.token_bytes(SEED_BYTES)


def _row(verdict: Verdict, now_s: float) -> audits.AuditRow:
    carry = verdict.case.carry
    return audits.AuditRow(
        at_s=now_s,
        peer=carry.peer,
        auditor=verdict.case.auditor,
        round=carry.round,
        number=carry.number,
        first_stage=StageId(carry.first_stage),
        num_stages=carry.num_stages,
        finding=verdict.finding.value,
        outputs=min(verdict.outputs, 1e9),
        returned=min(verdict.returned, 1e9),
        liars=verdict.liars,
        missing=verdict.missing,
        seed=verdict.case.seed,
    )
