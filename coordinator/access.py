"""Who is let in: anybody or by invitation, who came in by which invite, and which key goes on as which other.

Owns: whether a run is open, making tokens, what a newcomer is told that may not come in, and what a peer's successor
takes over. Must not know: bans' effect (`bans.py`), placement, the network. `registry.py` asks `admit` for every
registration; the organiser's commands call `make_invite` and `revoke` on a database, whether or not a coordinator runs.

A use of an invite is a peer, not a registration: who was let in stays in, until it is banned. Everything that belongs
together is one transaction, and on disk before anybody hears of it.
"""

from __future__ import annotations

import hashlib
import secrets
import time
from collections.abc import Sequence
from typing import Literal, NamedTuple, cast, get_args

from coordinator.clock import Clock
from coordinator.settings import Access, CoordinatorSettings
from coordinator.store import bans, invites, peers, successors
from coordinator.store.bans import BanRow
from coordinator.store.database import Connection, Database
from coordinator.store.invites import InviteRow
from protocol.errors import RefusedError
from protocol.handover import check_handovers
from protocol.ids import Digest, PeerId
from protocol.signing import Signed

ACCESS = "access"  # a key of the settings table
TOKEN_BYTES = 16
ID_CHARS = 8
ASK_FOR_ONE = "Ask the organiser for a new invite."

InviteState = Literal["good", "used up", "expired", "revoked"]


class Step(NamedTuple):
    """One handover of a chain."""

    peer: PeerId
    successor: PeerId
    statement: Signed


class AccessOffice:
    """Decides on newcomers."""

    def __init__(self, settings: CoordinatorSettings, *, database: Database, clock: Clock) -> None:
        self._settings = settings
        self._database = database
        self._clock = clock
        self._access: Access = "open"

    @property
    def access(self) -> Access:
        """Whom the run lets in."""
        return self._access

    async def load(self) -> None:
        """Find out whom the run lets in, and keep that. Call once, before serving."""
        kept = await self._database.run(kept_access)
        self._access = self._settings.access or kept
        await self._database.run(peers.put_setting, ACCESS, self._access)

    async def admit(self, caller: PeerId, token: str | None, handovers: Sequence[Signed]) -> tuple[PeerId, ...]:
        """Let a caller in, and return the keys that it went by before; `RefusedError` says why it may not come in.

        It takes over what belonged to those keys: the way in, and a ban.
        """
        before = check_handovers(handovers, last=caller)
        steps = tuple(map(Step, before, (*before, caller)[1:], handovers))
        return await self._database.run(self._admit, caller, token, steps)

    def _admit(self, db: Connection, caller: PeerId, token: str | None, steps: tuple[Step, ...]) -> tuple[PeerId, ...]:
        now_s = self._clock.wall()
        successor = successors.successor_of(db, caller)
        if successor is not None:
            raise RefusedError(_replaced(caller, successor), hint=f"Join with the new key. {ASK_FOR_ONE}")
        self._take_over(db, steps, now_s=now_s)
        if self._access == "invite" and not invites.has_use(db, caller):
            _use(db, caller, token, now_s=now_s)
        return successors.predecessors(db, caller)

    def _take_over(self, db: Connection, steps: tuple[Step, ...], *, now_s: float) -> None:
        """Follow handovers from the first key that this run knows; of those before it, it keeps nothing."""
        is_known = False
        for peer, successor, statement in steps:
            ban = bans.find_ban(db, peer, now_s=now_s)
            if ban is not None and ban.kind == "banned":
                why = f"the key that this one replaces is banned: {ban.reason or 'no reason was given'}."
                raise RefusedError(why, hint="Ask the organiser.")
            entered = successors.successor_of(db, peer)
            if entered not in (None, successor):
                raise RefusedError(_replaced(peer, entered), hint="If that was not you, ask the organiser.")
            is_known = is_known or peers.is_known(db, peer)
            if is_known and entered is None:
                successors.add_successor(db, peer, successor, statement=statement.to_bytes(), now_s=now_s)
                invites.pass_use_on(db, peer, successor)
                until_s = now_s + 3600 * self._settings.admission_hours  # then its last pass has run out
                reason = f"replaced by {successor}"
                bans.add_ban(db, BanRow(peer=peer, since_s=now_s, until_s=until_s, reason=reason, kind="rotated"))


def kept_access(db: Connection) -> Access:
    """Return whom the run let in when it was last served."""
    kept = peers.get_setting(db, ACCESS)
    return cast(Access, kept) if kept in get_args(Access) else "open"


def make_invite(
    db: Connection, *, uses: int, expires_s: float | None, note: str, now_s: float
) -> tuple[InviteRow, str]:
    """Keep a new invite, and return it with its token, which is kept nowhere."""
    taken = {row.id for row in invites.load_invites(db)}
    while (token := secrets.token_urlsafe(TOKEN_BYTES)) and (name := _secret(token).hex()[:ID_CHARS]) in taken:
        continue
    row = InviteRow(id=name, note=note, uses=uses, created_s=now_s, expires_s=expires_s)
    invites.add_invite(db, row, secret=_secret(token))
    return row, token


def revoke(db: Connection, invite: str, *, now_s: float) -> tuple[PeerId, ...] | None:
    """Let nobody come in by an invite, ban who has, and return them; None if there is none, or it was revoked."""
    if not invites.revoke_invite(db, invite, now_s=now_s):
        return None
    came = tuple(use.peer for use in invites.load_uses(db) if use.invite == invite)
    for peer in came:
        bans.add_ban(db, BanRow(peer=peer, since_s=now_s, until_s=None, reason=f"invite {invite} was revoked"))
    return came


def state_of(row: InviteRow, *, used: int, now_s: float) -> InviteState:
    """Say whether somebody could still come in by an invite, and if not, why."""
    if row.revoked_s is not None:
        return "revoked"
    if row.expires_s is not None and row.expires_s <= now_s:
        return "expired"
    return "good" if used < row.uses else "used up"


def _use(db: Connection, caller: PeerId, token: str | None, *, now_s: float) -> None:
    """Use an invite, or raise `RefusedError`. It is found by a hash: no time tells how much of a guess was right."""
    if not token:
        raise RefusedError("this run is by invitation, and that invite has no token.", hint=ASK_FOR_ONE)
    secret = _secret(token)
    if invites.use_invite(db, caller, secret=secret, now_s=now_s):
        return
    row = invites.find_invite(db, secret=secret)
    if row is None:
        raise RefusedError("this run does not know the token of that invite.", hint=ASK_FOR_ONE)
    why = {
        "revoked": "that invite was revoked.",
        "expired": f"that invite has expired, {_day(row.expires_s)}.",
        "used up": f"that invite is used up: it was good for {row.uses}.",
    }
    raise RefusedError(why[state_of(row, used=row.uses, now_s=now_s)], hint=ASK_FOR_ONE)


def _secret(token: str) -> Digest:
    return Digest(hashlib.sha256(token.encode()).digest())


def _replaced(peer: PeerId, successor: PeerId | None) -> str:
    return f"the key {peer} was replaced by {successor}."


def _day(at_s: float | None) -> str:
    return "" if at_s is None else time.strftime("on %Y-%m-%d at %H:%M UTC", time.gmtime(at_s))
