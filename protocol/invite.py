"""The invite: the one string with which a volunteer joins.

Owns: its text form. `handcar1:` + base58 of a checksummed msgpack of coordinator address(es), run id,
coordinator peer id (which is its public key, so it is the fingerprint too) and an optional token.
A lost or changed character is noticed by the checksum, before anybody is dialled.
"""

from __future__ import annotations

from typing import Annotated, Self

import base58
from pydantic import Field

from protocol.errors import InviteError, WireError
from protocol.ids import PeerId, RunId
from protocol.wire import Message

PREFIX = "handcar1:"
MAX_INVITE_CHARS = 2048


class Invite(Message):
    """Where the coordinator is, which run, and whom to trust."""

    addresses: Annotated[tuple[str, ...], Field(min_length=1, max_length=8)]
    run: RunId
    coordinator: PeerId
    token: str | None = None

    def to_text(self) -> str:
        """Return the invite as one word without spaces, safe in chats and shells."""
        return PREFIX + base58.b58encode_check(self.to_bytes()).decode()

    @classmethod
    def from_text(cls, text: str) -> Self:
        """Parse an invite, or raise `InviteError` saying in which way it is broken."""
        word = "".join(text.split())
        if not word.startswith(PREFIX):
            raise InviteError(f"that is not an invite: it does not begin with '{PREFIX}'.")
        if len(word) > MAX_INVITE_CHARS:
            raise InviteError(f"that invite is {len(word)} characters long; the longest is {MAX_INVITE_CHARS}.")
        try:
            data = base58.b58decode_check(word.removeprefix(PREFIX))
        except ValueError:
            raise InviteError("the invite is damaged: its checksum does not fit.") from None
        try:
            return cls.from_bytes(data)
        except WireError as error:
            raise InviteError(f"the invite cannot be read: {error}") from None
