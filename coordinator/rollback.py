"""Taking the whole run back to a checkpoint: what was learnt since is given up, and all stages start over from there.

Owns: when that is carried out, and what of it is kept. Must not know: how peers start over (`registry.py` tells them),
who asks for it (`coordinator rollback` writes the wish down, whether or not a coordinator runs).

All stages go back together: they have learnt from each other. Members are told with their next beat that what they
stand in does not go on (`reunion.py`). As nobody stands anywhere else they restore the checkpoint, and the stages are
founded on that as after a death of everybody (`founding.py`). What members of the old lineage still commit until they
have heard of it, and what they had committed before and not reported, is given up as well.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from dataclasses import dataclass

import structlog

from coordinator.checkpointfiles import Checkpoint
from coordinator.checkpoints import versions
from coordinator.journal import DISK_NOTE, Journal
from coordinator.ledger import Ledger
from coordinator.rundir import RunDir
from coordinator.store import history, peers
from coordinator.store.database import Database
from protocol.errors import StorageError
from protocol.ids import RoundId

log = structlog.get_logger()

WISH = "rollback"  # a key of the settings table
NOTE = "rollback"


@dataclass(frozen=True, slots=True, kw_only=True)
class Wish:
    """What somebody asks for."""

    round: RoundId
    """Of the checkpoint to go back to."""
    reason: str

    def to_json(self) -> str:
        return json.dumps({"round": self.round, "reason": self.reason})


class Rollback:
    """Carries out what is wished for."""

    def __init__(self, run: RunDir, *, ledger: Ledger, database: Database, journal: Journal) -> None:
        self._run, self._ledger, self._database, self._journal = run, ledger, database, journal
        self.on_checkpoint: Callable[[Checkpoint], None] = lambda checkpoint: None
        """Hears which checkpoint is the newest now."""
        self.on_rollback: Callable[[], None] = lambda: None
        """Hears that what is known of the last rounds' work is of no use any more."""

    async def tick(self) -> None:
        """Go back if that is wished for. What has failed half-way is begun again at the next tick."""
        try:
            kept = await self._database.run(peers.get_setting, WISH)
            if kept is None:
                return
            wish = Wish(**json.loads(kept))
            await self._go_back(wish)
            await self._database.run(peers.drop_setting, WISH)
        except StorageError as error:
            self._journal.note(DISK_NOTE, str(error))

    async def _go_back(self, wish: Wish) -> None:
        async with self._run.checkpoints_turn:  # or the one to go back to might be the oldest, and make room meanwhile
            await self._go_back_to(wish)

    async def _go_back_to(self, wish: Wish) -> None:
        try:
            checkpoint = await asyncio.to_thread(self._run.checkpoints.open, wish.round)
        except StorageError as error:  # it was sound when it was asked for
            self._journal.note(NOTE, f"cannot go back to round {wish.round}: {error}")
            await self._journal.event("run.not_rolled_back", detail=f"round {wish.round}: {error}")
            return
        at = versions(checkpoint)
        num_gone = await self._ledger.go_back(at)
        later = await asyncio.to_thread(self._run.checkpoints.set_aside_after, wish.round)
        await self._database.run(history.remove_checkpoints, list(later))
        self.on_checkpoint(checkpoint)
        self.on_rollback()
        self._journal.clear(NOTE)
        log.warning("run.rolled_back", round=wish.round, commits=num_gone)
        await self._journal.event(
            "run.rolled_back",
            detail=f"to the checkpoint of round {wish.round}, versions {', '.join(map(str, at.values()))}: "
            f"{num_gone} commits are given up. {wish.reason}".strip(),
        )
