"""protocol/invite.py: an invite gets through chats and shells whole, or is noticed to be damaged."""

from __future__ import annotations

import base58
import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol.errors import InviteError
from protocol.ids import PeerId, RunId
from protocol.invite import MAX_INVITE_CHARS, PREFIX, Invite
from tests.protocol.manifests import KEY

INVITE = Invite(
    addresses=("/ip4/203.0.113.7/tcp/31337", "/dns4/example.org/tcp/443/wss"),
    run=RunId("0123456789abcdef0123456789abcdef"),
    coordinator=KEY.peer_id,
    token="for Ada",
)
TEXT = INVITE.to_text()
BASE58 = "123456789ABCDEFGHJKLMNPQRSTUVWXYZabcdefghijkmnopqrstuvwxyz"


@given(
    addresses=st.lists(st.text(min_size=1, max_size=40), min_size=1, max_size=8),
    token=st.none() | st.text(max_size=40),
)
def test_an_invite_comes_back_as_it_was(addresses: list[str], token: str | None) -> None:
    """Oracle: equality, for any text in the fields."""
    one = Invite(addresses=tuple(addresses), run=RunId("ab"), coordinator=PeerId("12D3KooW"), token=token)
    assert Invite.from_text(one.to_text()) == one


def test_an_invite_is_one_plain_word() -> None:
    """Oracle: no character that a shell, a chat or an e-mail program treats specially."""
    assert TEXT.startswith(PREFIX)
    assert TEXT.removeprefix(PREFIX).isalnum()
    assert TEXT.isascii()


def test_an_invite_survives_being_wrapped() -> None:
    """Oracle: line breaks and spaces that a mail program adds are dropped."""
    wrapped = "  " + "\r\n\t ".join(TEXT[start : start + 40] for start in range(0, len(TEXT), 40)) + "\n"
    assert Invite.from_text(wrapped) == INVITE


@given(cut=st.integers(0, len(TEXT) - 1))
def test_a_truncated_invite_is_noticed(cut: int) -> None:
    """Oracle: no proper beginning of an invite is one."""
    with pytest.raises(InviteError) as caught:
        Invite.from_text(TEXT[:cut])
    assert caught.value.exit_code == 3


@given(place=st.integers(len(PREFIX), len(TEXT) - 1), other=st.sampled_from(BASE58 + "0OIl+/ä"))
def test_a_changed_character_is_noticed(place: int, other: str) -> None:
    """Oracle: any other character at any place, in the alphabet or not."""
    changed = TEXT[:place] + other + TEXT[place + 1 :]
    if changed == TEXT:
        return
    with pytest.raises(InviteError, match="damaged"):
        Invite.from_text(changed)


@given(place=st.integers(len(PREFIX), len(TEXT) - 2))
def test_swapped_neighbours_are_noticed(place: int) -> None:
    """Oracle: the commonest slip of a typist."""
    swapped = TEXT[:place] + TEXT[place + 1] + TEXT[place] + TEXT[place + 2 :]
    if swapped == TEXT:
        return
    with pytest.raises(InviteError):
        Invite.from_text(swapped)


@pytest.mark.parametrize("text", ["", "hello", "https://example.org", TEXT.removeprefix(PREFIX), "handcar2:abc"])
def test_something_else_is_told_apart_from_a_damaged_invite(text: str) -> None:
    """Oracle: the message says that this is no invite at all."""
    with pytest.raises(InviteError, match="not an invite"):
        Invite.from_text(text)


def test_an_endless_invite_is_refused_before_it_is_decoded() -> None:
    """Oracle: base58 takes quadratic time; a megabyte of it would take minutes."""
    with pytest.raises(InviteError, match="longest"):
        Invite.from_text(PREFIX + "z" * MAX_INVITE_CHARS)


@pytest.mark.parametrize("payload", [b"", b"\x80", b"\xc1", b"\x93\x01\x02\x03", b"\x81\xa3run\xa2ab"])
def test_a_sound_checksum_over_something_else_is_refused(payload: bytes) -> None:
    """Oracle: the checksum is right, the message is not an invite."""
    with pytest.raises(InviteError, match="cannot be read"):
        Invite.from_text(PREFIX + base58.b58encode_check(payload).decode())


def test_an_invite_without_an_address_is_refused() -> None:
    """Oracle: nobody could be dialled."""
    payload = INVITE.model_construct(**(INVITE.model_dump() | {"addresses": ()})).to_bytes()
    with pytest.raises(InviteError, match="addresses"):
        Invite.from_text(PREFIX + base58.b58encode_check(payload).decode())
