"""Keeping peers out: the revocation list, and what a peer on it is told.

Owns: making a new signed list whenever who is banned has changed, and keeping it. Must not know: who decides on a ban
(the organiser's command, or `access.py`, writes the row), how a cloned key is noticed, how the list travels. The app
calls `tick`; `registry.py` sends the list with its answers to beats, and calls `freeze`.

The rows are the truth: the command writes them also while no coordinator runs. A list is on disk before anybody sees
it, so its number never comes twice.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable

import structlog

from coordinator.clock import Clock
from coordinator.journal import DISK_NOTE, Journal
from coordinator.registry import Registry
from coordinator.store import bans, peers
from coordinator.store.bans import BanRow, Kind
from coordinator.store.database import Database
from protocol.access import MAX_REVOKED, REVOCATION_CONTEXT, Revocations, revoke
from protocol.errors import RefusedError, StorageError
from protocol.ids import PeerId, RunId
from protocol.signing import Signed, SigningKey, unseal

log = structlog.get_logger()

REVOCATIONS = "revocations"  # a key of the settings table
CLONED = "two processes use this peer's key at the same time"
EVENTS: dict[Kind, str] = {"banned": "peer.banned", "frozen": "peer.frozen", "rotated": "peer.rotated"}


class Bans:
    """Who is kept out at the moment."""

    def __init__(
        self, run: RunId, *, key: SigningKey, registry: Registry, database: Database, journal: Journal, clock: Clock
    ) -> None:
        self._run = run
        self._key = key
        self._registry = registry
        self._database = database
        self._journal = journal
        self._clock = clock
        self._rows: dict[PeerId, BanRow] = {}
        self._number = 0
        self._listed: tuple[PeerId, ...] = ()
        self._told: frozenset[PeerId] = frozenset()
        self._newest: Signed | None = None
        self.on_list: Callable[[Signed], object] = lambda signed: None
        """Hears of every new list: our own door."""
        registry.bans = self

    async def load(self) -> None:
        """Take over who is banned, and the newest list. Call once, before serving."""
        await self._read()
        kept = await self._database.run(peers.get_setting, REVOCATIONS)
        if kept is not None:
            self._newest = Signed.from_bytes(bytes.fromhex(kept))
            newest = unseal(self._newest, REVOCATION_CONTEXT, Revocations, signer=self._key.peer_id)
            self._number, self._listed, self._told = newest.number, newest.peers, frozenset(newest.peers)

    async def tick(self) -> None:
        """Look who is banned now, put them out, and make a list of them if that has changed."""
        try:
            await self._read()
            await self._renew()
        except StorageError as error:  # tried again at the next tick
            self._journal.note(DISK_NOTE, str(error))
            return
        for row in self._rows.values():
            await self._registry.expel(row.peer, f"{row.kind}: {row.reason}")
        before, self._told = self._told, frozenset(self._rows)
        for peer in sorted(self._told - before):
            await self._journal.event(EVENTS[self._rows[peer].kind], peer, self._rows[peer].reason)
        for peer in sorted(before - self._told):
            await self._journal.event("peer.unbanned", peer)

    async def freeze(self, peer: PeerId) -> None:
        """Keep a cloned identity out until somebody looks into it. Who holds its key is not known any more."""
        row = BanRow(peer=peer, since_s=self._clock.wall(), until_s=None, reason=CLONED, kind="frozen")
        try:
            held = await self._database.run(bans.add_milder_ban, row)
        except StorageError as error:  # it is noticed again
            self._journal.note(DISK_NOTE, str(error))
        else:
            self._rows[peer] = held  # its next word is refused; the list follows with the next tick

    async def _read(self) -> None:
        rows = await self._database.run(bans.load_bans, now_s=self._clock.wall())
        self._rows = {row.peer: row for row in rows}

    async def _renew(self) -> None:
        """Make a new list if the old one does not fit. Its number is a time: made after a backup, it is newer."""
        listed = tuple(sorted(list(self._rows)[:MAX_REVOKED]))  # the newest come first
        if listed == self._listed:
            return
        number = max(self._number + 1, int(1000 * self._clock.wall()))
        signed = revoke(self._key, run=self._run, number=number, issued_s=self._clock.wall(), peers=listed)
        await self._database.run(peers.put_setting, REVOCATIONS, signed.to_bytes().hex())
        self._listed, self._number, self._newest = listed, number, signed
        self.on_list(signed)

    @property
    def number(self) -> int:
        """Of the newest list."""
        return self._number

    @property
    def newest(self) -> Signed | None:
        """The newest list; None as long as nobody was ever banned."""
        return self._newest

    def refusal(self, peer: PeerId) -> RefusedError | None:
        """Return what to tell a peer that is kept out; None if it is not."""
        row = self._rows.get(peer)
        if row is None or (row.until_s is not None and row.until_s <= self._clock.wall()):
            return None
        match row.kind:
            case "frozen":
                return RefusedError(
                    f"this identity is frozen: {row.reason}.",
                    hint="Stop all but one of them, then run there: peer identity rotate. Or ask the organiser.",
                )
            case "rotated":
                return RefusedError(f"this key was {row.reason}.", hint="Join with the new key, or ask the organiser.")
        why = f"you are banned {until(row)}: {row.reason or 'no reason was given'}."
        return RefusedError(why, hint="Ask the organiser.")


def until(row: BanRow) -> str:
    """Say how long a ban holds."""
    if row.until_s is None or math.isinf(row.until_s):
        return "until the organiser takes it back"
    return time.strftime("until %Y-%m-%d %H:%M UTC", time.gmtime(row.until_s))
