"""Credits: from receipts that fit each other to entries in the book.

Owns: when a round is settled, what a token is worth, and how long earnings are held. Must not know: how receipts are
matched (`settlement.py`), who takes earnings back from whom (`bancli.py`).

A round is settled once its receipts have stopped coming, and again whenever more come, also weeks later: what it comes
to is worked out anew from everything that was handed in, and only the difference is booked. So neither a crash at any
moment nor an outage of days can lose a credit or give one twice.

Worth of work: floating-point operations of the stage per token, forward and backward without recomputation, times
tokens; computed here, from the manifest, never reported. Unit: MFLOP, 10^6 operations.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import structlog

from coordinator.clock import Clock
from coordinator.forecast.spans import spans_of
from coordinator.journal import DISK_NOTE, Journal
from coordinator.settings import CoordinatorSettings
from coordinator.settlement import Settlement, settle
from coordinator.store import bans, credits, receipts, successors
from coordinator.store.credits import Work
from coordinator.store.database import Connection, Database
from coordinator.store.receipts import RoundReceipts
from protocol.errors import StorageError
from protocol.ids import RoundId, StageId
from protocol.manifest import Manifest
from protocol.receipts import Window
from protocol.signing import Signed

log = structlog.get_logger()

QUIET_S = 5.0  # receipts of a round come within a beat or two of each other
WAIT_S = 60.0  # for a round whose receipts keep dripping in
MAX_ROUNDS_PER_TICK = 8  # after an outage; each is one transaction
MAX_RELEASES_PER_TICK = 1000
PRUNE_EVERY_S = 600.0
MFLOP = 1e6


class Credits:
    """Settles rounds, and releases what was held for long enough."""

    def __init__(
        self, manifest: Manifest, *, settings: CoordinatorSettings, database: Database, journal: Journal, clock: Clock
    ) -> None:
        self._num_stages = manifest.model.num_stages
        self._settings = settings
        self._database = database
        self._journal = journal
        self._clock = clock
        self._mflop = worth_of(manifest)
        self._pruned_s = float("-inf")

    async def tick(self) -> None:
        """Settle and release what is due. What the disk refuses is due again at the next tick."""
        now_s = self._clock.wall()
        try:
            await self.settle_due(quiet_since_s=now_s - QUIET_S, waiting_since_s=now_s - WAIT_S)
            held_s = self._settings.hold_hours * 3600
            await self._database.run(credits.release, before_s=now_s - held_s, at_s=now_s, limit=MAX_RELEASES_PER_TICK)
            if now_s - self._pruned_s >= PRUNE_EVERY_S:
                self._pruned_s = now_s
                await self._database.run(receipts.prune, before_s=now_s - 2 * held_s)
        except StorageError as error:
            self._journal.note(DISK_NOTE, str(error))

    async def settle_rest(self) -> None:
        """Settle all that was handed in, before the coordinator goes: a run that has ended is not served again."""
        try:
            while await self.settle_due(quiet_since_s=float("inf"), waiting_since_s=float("inf")):
                pass
        except StorageError as error:  # due again at the next start
            log.warning("credits.unsettled", error=error.one_line())

    async def settle_due(self, *, quiet_since_s: float, waiting_since_s: float) -> int:
        """Settle rounds of which nothing new has come since a time; return how many. Raises `StorageError`."""
        due = await self._database.run(
            receipts.due_rounds,
            quiet_since_s=quiet_since_s,
            waiting_since_s=waiting_since_s,
            limit=MAX_ROUNDS_PER_TICK,
        )
        for round_id in due:
            handed_in = await self._database.run(receipts.receipts_of, round_id)
            settlement = await asyncio.to_thread(settle_round, handed_in, num_stages=self._num_stages)
            await self._database.run(self._book, round_id, handed_in, settlement)
        return len(due)

    def _book(self, db: Connection, round_id: RoundId, handed_in: RoundReceipts, settlement: Settlement) -> None:
        at_s = self._clock.wall()
        out = {row.peer for row in bans.load_bans(db, now_s=at_s) if row.kind == "banned"}
        following = successors.all_newest(db)
        work = {
            (stage, peer): Work(tokens, self._mflop(stage, tokens))
            for (stage, peer), tokens in settlement.earned.items()
            if following.get(peer, peer) not in out  # nothing comes to who is banned, by whatever key
        }
        credits.book_work(db, round_id, work, at_s=at_s)
        disputes = [
            (each.number, each.first_stage, each.caller, each.callee, each.quarrel.value)
            for each in settlement.disputes
        ]
        receipts.replace_disputes(db, round_id, disputes, at_s=at_s)
        receipts.mark_settled(db, round_id, handed_in.keys)


def settle_round(handed_in: RoundReceipts, *, num_stages: int) -> Settlement:
    """Settle a round by the stored envelopes, whose signatures were checked when they came."""
    windows = (Window.from_bytes(Signed.from_bytes(signed).payload) for signed in handed_in.signed)
    return settle(windows, caps=handed_in.caps, num_stages=num_stages)


def worth_of(manifest: Manifest) -> Callable[[StageId, int], int]:
    """Return how many MFLOP a number of target tokens at a stage is worth."""
    spans = spans_of(manifest.model.config, manifest.model.num_stages)
    length = manifest.batch.sequence_length
    flop = {span.stages[0]: span.training_flop(length, recomputes=False) for span in spans}
    return lambda stage, tokens: int(flop[stage] * tokens / MFLOP)
