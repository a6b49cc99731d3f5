"""What is believed of what peers report, and what it adds up to.

Owns: checking reports (signatures, bounds, plausibility) before they become rows, idempotence, and the seats
that commits and charters name. Must not know: who is live, how numbers are shown. `registry.py` hands in the
reports of every beat; `status.py` and the demo read `store/tallies.py`, where the counters are defined.

A report that cannot be believed is acknowledged all the same, or its peer would repeat it for ever: it is
one line in the log, and counts for nothing.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Protocol

import structlog

from coordinator.clock import Clock
from coordinator.store import history, tree
from coordinator.store.database import Database
from coordinator.store.receipts import ReceiptRow
from coordinator.store.rounds import ClosingRow
from coordinator.store.successors import predecessors
from coordinator.store.tree import CommitLink
from protocol.audits import Answer, AuditReport, ContributionReport, NonsenseReport, ShareReport, SketchReport
from protocol.batches import has_evaluation, num_trained
from protocol.control import (
    AveragingReport,
    ClosingReport,
    CommitReport,
    NumberedReport,
    ReceiptReport,
    Report,
    WorkReport,
)
from protocol.errors import PeerFault
from protocol.ids import Digest, Lineage, PeerId, RoundId, StageId, Version, digest
from protocol.manifest import Manifest
from protocol.receipts import MAX_HOPS, RECEIPT_CONTEXT, Window
from protocol.rounds.lineage import next_lineage, root_lineage
from protocol.rounds.messages import CLOSING_CONTEXT, COMMIT_CONTEXT, Charter, Closing, Commit, Seats
from protocol.signing import Signed, unseal

log = structlog.get_logger()

MAX_NUMBER = 1 << 53  # far above any honest count, exact as a float, and SQLite adds 1,024 of them without overflow
EXTRA_WINDOWS = 16  # of a peer and a round, beyond four hops of every number: it may have been restarted meanwhile
MAX_LINEAGES = 4096  # whose seats are remembered: the newest of every stage are all that is asked for

Seating = frozenset[tuple[PeerId, int]]


class Place(Protocol):
    """Where somebody's state stands, or a snapshot of one."""

    @property
    def stage(self) -> StageId: ...

    @property
    def version(self) -> Version: ...

    @property
    def lineage(self) -> Lineage: ...


class Ledger:
    """Stores reports, and knows who sits where in the lineages that it has seen."""

    def __init__(self, manifest: Manifest, *, database: Database, clock: Clock) -> None:
        self._manifest = manifest
        self._database = database
        self._clock = clock
        self._seats: OrderedDict[Lineage, Seating] = OrderedDict()
        self._charters: dict[StageId, Charter] = {}
        self._tips: dict[bytes, tuple[Signed, Commit]] = {}
        """Commits that nothing follows, by their envelopes."""
        self._roots: dict[StageId, Lineage] = {}
        self._given_up: set[Lineage] = set()
        self._gone: set[Lineage] = set()
        """What of that is not gone on from in any case: the run has gone back to a checkpoint before it."""
        self._barriers: dict[StageId, tree.Barrier] = {}
        self.on_receipts: Callable[[Window], None] = lambda window: None
        """Hears of receipts that are believed to be their sender's; the audit office puts itself here."""
        self.on_commit: Callable[[Commit, Lineage], None] = lambda commit, lineage: None
        """Hears of commits that a member has signed, as often as they are reported; likewise."""
        self.on_audit: Callable[[PeerId, Answer], None] = lambda peer, report: None
        """Hears of answers to its orders; likewise."""

    async def load(self) -> None:
        """Take over the newest commits. Call once, before serving, when the charters are known."""
        self._given_up = set(await self._database.run(tree.given_up))
        self._gone = set(await self._database.run(tree.gone))
        self._barriers = dict(await self._database.run(tree.barriers))
        await self._load_tips()

    def newest_commit(self, stage: StageId) -> tuple[Signed, Commit] | None:
        """Return the newest commit under a stage's newest charter that a member of it signed, as far as we were told.

        Others are history. Of two that part it is always the same one, unless it was settled which half goes on.
        """
        charter = self._charters.get(stage)
        known = [
            (signed, commit)
            for signed, commit in self._tips.values()
            if charter is not None and (commit.stage, commit.generation) == (stage, charter.generation)
        ]
        return min(known, key=_newest_first, default=None)

    def has_given_up(self, lineage: Lineage) -> bool:
        """Tell whether a lineage is of the half of a torn swarm that does not go on, or gone, as far as we know it."""
        return lineage in self._given_up

    def is_given_up(self, place: Place) -> bool:
        """Tell whether a state is of a lineage that was given up, or so far on that it must be, reported or not."""
        return place.lineage in self._given_up or self._is_beyond_barrier(place)

    def is_gone(self, place: Place) -> bool:
        """Tell whether a state was given up although nobody stands anywhere else."""
        return place.lineage in self._gone or self._is_beyond_barrier(place)

    def is_to_be_founded(self, stage: StageId) -> bool:
        """Tell whether the run has gone back and this stage has no charter since."""
        barrier, charter = self._barriers.get(stage), self._charters.get(stage)
        return barrier is not None and charter is not None and charter.generation <= barrier.generation

    async def is_certain(self, place: Place) -> bool:
        """Tell whether a state goes on for all we know: of a stage that has gone back, if what led there was reported.

        Where the run has never gone back, what was not reported yet cannot be what it went back from.
        """
        return place.stage not in self._barriers or place.lineage in await self.known(place.stage, [place.lineage])

    async def go_back(self, at: Mapping[StageId, Version]) -> int:
        """Give up for good what leads beyond these versions, whenever it is heard of. Raises `StorageError`.

        Returns how many commits that are.
        """
        marked = await self._database.run(tree.go_back, at, at_s=self._clock.wall())
        self._given_up.update(marked)
        self._gone.update(marked)
        self._barriers = dict(await self._database.run(tree.barriers))
        await self._load_tips()
        return len(marked)

    async def give_up(self, lineages: Collection[Lineage]) -> None:
        """Settle that commits, and all that will ever follow them, do not go on. Raises `StorageError`."""
        self._given_up.update(await self._database.run(tree.give_up, lineages, at_s=self._clock.wall()))
        await self._load_tips()

    async def take_back(self, lineage: Lineage) -> None:
        """Let a commit that was given up go on after all, with all that led to it. Raises `StorageError`."""
        self._given_up.difference_update(await self._database.run(tree.take_back, lineage))

    async def paths(self, stage: StageId, tips: Collection[Lineage]) -> Mapping[Lineage, Sequence[CommitLink]]:
        """Return what led to places in a stage's tree since they were one; see `store/tree.py`."""
        charter = self._charters.get(stage)
        if charter is None:
            return {}
        return await self._database.run(tree.paths, tips, root=(self._roots[stage], charter.version))

    async def known(self, stage: StageId, lineages: Collection[Lineage]) -> Collection[Lineage]:
        """Return those places of a stage of which we know what led there: a commit that goes on, or the charter."""
        found = await self._database.run(tree.known, lineages)
        return found | {lineage for lineage in lineages if lineage == self._roots.get(stage)}

    async def path_since(self, tip: Lineage, round_id: RoundId) -> Sequence[CommitLink]:
        """Return what led to a place, back to a round; see `store/tree.py`."""
        return await self._database.run(tree.path_since, tip, round_id)

    async def record(self, peer: PeerId, reports: Sequence[NumberedReport]) -> int:
        """Store what is new among a peer's reports; return up to which number they are safe on disk.

        Raises `StorageError` if they could not be stored: none of them was, then.
        """
        if any(numbered.sequence >= MAX_NUMBER for numbered in reports):
            raise PeerFault(f"{peer} numbers its reports beyond reason")
        keys = {peer}
        if any(isinstance(one.report, ReceiptReport) and one.report.window.signer != peer for one in reports):
            # what the keys before this one had signed and not handed in is its successor's to hand in
            keys.update(await self._database.run(predecessors, peer))
        entries = [self._entry(peer, keys, numbered) for numbered in reports]
        stored = await self._database.run(history.add_reports, peer, entries, received_s=self._clock.wall())
        self._given_up.update(stored.given_up)
        if stored.given_up:
            self._gone = set(await self._database.run(tree.gone))
        if any(isinstance(entry.said, history.CommitRow) for entry in entries):
            await self._load_tips()
        return stored.acknowledged

    def learn_charter(self, signed: Signed, charter: Charter) -> None:
        """Remember whom a charter seats that we have issued: the newest one of its stage."""
        self._charters[charter.stage] = charter
        self._roots[charter.stage] = root_lineage(signed)
        self._remember(self._roots[charter.stage], charter.seats)

    def is_seated(self, peer: PeerId, session: int, lineage: Lineage) -> bool | None:
        """Tell whether a life of a peer is a member in a lineage; None if we have not seen that lineage."""
        seating = self._seats.get(lineage)
        return None if seating is None else (peer, session) in seating

    async def _load_tips(self) -> None:
        """Take over which commits nothing follows, and who sits there."""
        found: dict[bytes, tuple[Signed, Commit]] = {}
        for row in await self._database.run(history.newest_commits):
            known = self._tips.get(row)
            if known is None:
                signed = Signed.from_bytes(row)
                known = signed, Commit.from_bytes(signed.payload)
            signed, commit = known
            found[row] = known
            self._remember(next_lineage(commit.parent, signed.payload), commit.seats)
        self._tips = found

    def _remember(self, lineage: Lineage, seats: Seats) -> None:
        self._seats[lineage] = frozenset((seat.peer, seat.session) for seat in seats)
        self._seats.move_to_end(lineage)
        while len(self._seats) > MAX_LINEAGES:
            self._seats.popitem(last=False)

    def _is_beyond_barrier(self, place: Place) -> bool:
        """Tell whether a state is further than where its stage has gone back to, and was not founded on since."""
        return self.is_to_be_founded(place.stage) and place.version > self._barriers[place.stage].version

    # -- what is believed -------------------------------------------------------------------------------

    def _entry(self, peer: PeerId, keys: Collection[PeerId], numbered: NumberedReport) -> history.ReportEntry:
        try:
            said = self._read(peer, keys, numbered.report)
        except PeerFault as fault:
            kind = type(numbered.report).__name__
            log.warning("report.refused", peer=peer, kind=kind, error=fault.one_line())
            said = None
        return history.ReportEntry(sequence=numbered.sequence, said=said)

    def _read(self, peer: PeerId, keys: Collection[PeerId], report: Report) -> history.Said | None:
        match report:
            case ClosingReport():
                return self._read_closing(report.closing)
            case CommitReport():
                commit = self._read_commit(report.commit)
                vouched = self._is_vouched(report.commit.signer, commit)
                if vouched:  # at once: the next report of this beat may follow it
                    lineage = next_lineage(commit.parent, report.commit.payload)
                    self._remember(lineage, commit.seats)
                    self.on_commit(commit, lineage)
                return _commit_row(report.commit, commit, is_member=peer in _members(commit), vouched=vouched)
            case AveragingReport():
                self._check_place(report.stage, report.round)
                _check_numbers(report.ballot, report.members, report.asked, report.bytes_sent, report.bytes_received)
            case WorkReport():
                self._check_place(0, report.round)
                tasks = (report.tasks_fed, report.tasks_resent, report.hops)
                _check_numbers(*tasks, report.activation_bytes, report.target_tokens)
            case ReceiptReport():
                return self._read_receipts(keys, report.window)
            case AuditReport() | SketchReport() | ContributionReport() | ShareReport() | NonsenseReport():
                self.on_audit(peer, report)
                return None
        return report

    def _read_receipts(self, keys: Collection[PeerId], signed: Signed) -> history.ReceiptEntry:
        window = unseal(signed, RECEIPT_CONTEXT, Window)
        batch, num_stages = self._manifest.batch, self._manifest.model.num_stages
        self._check_run(window.run)
        self._check_place(0, window.round)
        if window.peer != signed.signer or signed.signer not in keys:
            raise PeerFault("its receipts are of another peer")
        for hop in (*window.sent_hops(), *window.served_hops()):
            fits = 0 < hop.first_stage < hop.end_stage <= num_stages and hop.number < batch.microbatches_per_round
            if not (fits and 0 < hop.target_tokens <= batch.tokens_per_microbatch):
                raise PeerFault(f"its receipts speak of number {hop.number} at stages that there are not")
        self.on_receipts(window)
        row = ReceiptRow(
            peer=signed.signer, session=window.session, round=window.round, part=window.part, signed=signed.to_bytes()
        )
        return history.ReceiptEntry(row, max_per_round=EXTRA_WINDOWS + 4 * batch.microbatches_per_round // MAX_HOPS)

    def _read_closing(self, signed: Signed) -> ClosingRow:
        closing = unseal(signed, CLOSING_CONTEXT, Closing)
        batch = self._manifest.batch
        self._check_run(closing.run)
        self._check_place(0, closing.round)
        if closing.num_train != num_trained(batch, closing.round) or bool(closing.num_eval) != has_evaluation(
            batch, closing.round
        ):
            raise PeerFault(f"a closing of round {closing.round} speaks of other microbatches")
        for credit in closing.credits:
            self._check_place(credit.stage, closing.round)
        if max(closing.carried.values(), default=0) > closing.target_tokens:
            raise PeerFault(f"a closing of round {closing.round} credits more tokens than it counts")
        if closing.target_tokens > batch.tokens_per_round or closing.eval_tokens > _heldout_tokens(self._manifest):
            raise PeerFault(f"a closing of round {closing.round} counts more tokens than there are")
        return ClosingRow(
            digest=digest(signed.payload),
            signer=signed.signer,
            round=closing.round,
            tasks_done=closing.tasks_done,
            tasks_lost=closing.tasks_lost,
            loss_sum=closing.loss_sum,
            tokens=closing.target_tokens,
            heldout_loss_sum=closing.eval_loss_sum,
            heldout_tokens=closing.eval_tokens,
            credits=tuple((credit.stage, credit.peer, credit.tokens) for credit in closing.credits),
        )

    def _read_commit(self, signed: Signed) -> Commit:
        commit = unseal(signed, COMMIT_CONTEXT, Commit)
        self._check_run(commit.run)
        self._check_place(commit.stage, commit.round)
        summary = commit.summary
        if summary.round != commit.round or summary.target_tokens > self._manifest.batch.tokens_per_round:
            raise PeerFault(f"a commit of round {commit.round} sums up something else")
        if commit.version > commit.round + 1:
            raise PeerFault(f"a commit of round {commit.round} claims to be update {commit.version}")
        numbers = (summary.tasks_done, summary.tasks_lost, summary.eval_tokens, commit.version, commit.generation)
        _check_numbers(*numbers, commit.total_tokens, commit.tokens_dropped, commit.double_counted)
        if any(each.weight > each.tokens for each in commit.contributors):
            raise PeerFault(f"a commit of round {commit.round} counts somebody for more than it brought")
        names = {each.peer for each in commit.contributors}
        if len(names) < len(commit.contributors) or not any(each.weight for each in commit.contributors):
            raise PeerFault(f"a commit of round {commit.round} counts somebody twice, or nobody")
        charter = self._charters.get(commit.stage)
        if charter is None or commit.generation > charter.generation:
            raise PeerFault(f"a commit of stage {commit.stage} follows a charter that we have not issued")
        return commit

    def _is_vouched(self, signer: PeerId, commit: Commit) -> bool:
        """Tell whether a member signed a commit; raise `PeerFault` if it is known that none did.

        Of a parent that we have not heard of (reports are lost with those who had them) nothing is known. Then a member
        of the newest place that we know will do, or we would learn nothing more until the next charter.
        """
        seating = self._seats.get(commit.parent)
        if seating is None:
            newest = self.newest_commit(commit.stage)
            seats = self._charters[commit.stage].seats if newest is None else newest[1].seats
            return signer in {seat.peer for seat in seats}
        if signer not in {peer for peer, _ in seating}:
            raise PeerFault(f"{signer} signed a commit of stage {commit.stage} without being a member")
        return True

    def _check_run(self, run: str) -> None:
        if run != self._manifest.run_id:
            raise PeerFault("it belongs to another run")

    def _check_place(self, stage: int, round_id: RoundId) -> None:
        if not (0 <= stage < self._manifest.model.num_stages and 0 <= round_id <= self._manifest.batch.num_rounds):
            raise PeerFault(f"there is no stage {stage} in a round {round_id}")


def _newest_first(known: tuple[Signed, Commit]) -> tuple[int, int, Digest]:
    signed, commit = known
    return -commit.generation, -commit.round, digest(signed.payload)


def _members(commit: Commit) -> frozenset[PeerId]:
    """Return who shared in a commit: those who were summed, and those who go on, without who only joins."""
    seated = {seat.peer for seat in commit.seats} - set(commit.joiners)
    return frozenset(seated | {contribution.peer for contribution in commit.contributors})


def _commit_row(signed: Signed, commit: Commit, *, is_member: bool, vouched: bool) -> history.CommitRow:
    summary = commit.summary
    members = _members(commit)
    return history.CommitRow(
        digest=digest(signed.payload),
        signer=signed.signer,
        stage=commit.stage,
        generation=commit.generation,
        version=commit.version,
        lineage=next_lineage(commit.parent, signed.payload),
        parent=commit.parent,
        closing=ClosingRow(
            digest=summary.closing_digest,
            signer=summary.clock,
            round=summary.round,
            tasks_done=summary.tasks_done,
            tasks_lost=summary.tasks_lost,
            loss_sum=summary.loss_sum,
            tokens=summary.target_tokens,
            heldout_loss_sum=summary.eval_loss_sum,
            heldout_tokens=summary.eval_tokens,
        ),
        members=len(members),
        tokens=commit.total_tokens,
        dropped=commit.tokens_dropped,
        double_counted=commit.double_counted,
        solo=len(members) == 1,
        was_taken=is_member,
        vouched=vouched,
        signed=signed.to_bytes(),
    )


def _heldout_tokens(manifest: Manifest) -> int:
    return manifest.batch.heldout_sequences * manifest.batch.sequence_length


def _check_numbers(*numbers: int) -> None:
    if max(numbers) >= MAX_NUMBER:
        raise PeerFault(f"a report counts to {max(numbers)}")
