"""Signing keys, peer ids and sealed messages (`protocol/signing.py`)."""

from __future__ import annotations

import contextlib

import base58
import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol.errors import SignatureError, WireError
from protocol.ids import PeerId
from protocol.signing import (
    Signed,
    SigningKey,
    fingerprint,
    peer_id_from_public_key,
    public_key_of,
    seal,
    unseal,
    verify,
)
from protocol.wire import Message

# RFC 8032, section 7.1, test 1
RFC_SEED = bytes.fromhex("9d61b19deffd5a60ba844af492ec2cc44449c5697b326919703bac031cae7f60")
RFC_PUBLIC = bytes.fromhex("d75a980182b10ab7d54bfed3c964073a0ee172f3daa62325af021a68f707511a")

ALICE = SigningKey(bytes(range(32)))
BOB = SigningKey(bytes(range(1, 33)))


class Note(Message):
    text: str


class OtherNote(Message):
    words: str


def test_public_key_follows_the_rfc() -> None:
    """Oracle: RFC 8032's first test vector."""
    assert SigningKey(RFC_SEED).public_bytes == RFC_PUBLIC


@given(st.binary(min_size=32, max_size=32))
def test_peer_id_text_matches_an_independent_base58(public_bytes: bytes) -> None:
    """Oracle: the `base58` package over libp2p's documented id bytes."""
    peer_id = peer_id_from_public_key(public_bytes)
    assert peer_id == base58.b58encode(bytes.fromhex("002408011220") + public_bytes).decode()
    assert peer_id.startswith("12D3Koo")
    assert public_key_of(peer_id) == public_bytes


@pytest.mark.parametrize(
    "text",
    [
        "",
        "12D3Koo",
        "QmYyQSo1c1Ym7orWxLYvCrM2EmxFTANf8wXmmE7DWjhx5N",  # an RSA id: a hash, holds no key
        "1" + ALICE.peer_id,  # the same number with another leading zero
        ALICE.peer_id[:-1],
        ALICE.peer_id + "1",
        ALICE.peer_id.replace("D", "0", 1),  # 0 is not a base58 digit
        " " + ALICE.peer_id,
        "z" * 10_000,
        base58.b58encode(bytes.fromhex("002408021220") + bytes(32)).decode(),  # another key type
        base58.b58encode(bytes.fromhex("002408011220") + bytes(31)).decode(),
    ],
)
def test_anything_but_a_canonical_ed25519_id_is_refused(text: str) -> None:
    """Oracle: the libp2p peer id specification; one key has one text."""
    with pytest.raises(SignatureError):
        public_key_of(text)


@given(st.text(max_size=80))
def test_no_text_crashes_the_peer_id_parser(text: str) -> None:
    """Oracle: the only way out is a key of 32 bytes or a SignatureError."""
    with contextlib.suppress(SignatureError):
        assert len(public_key_of(text)) == 32


@given(st.text())
def test_sealed_messages_come_back(text: str) -> None:
    """Oracle: round trip, over the wire form of the envelope too."""
    signed = Signed.from_bytes(seal(ALICE, "note", Note(text=text)).to_bytes())
    assert unseal(signed, "note", Note, signer=ALICE.peer_id) == Note(text=text)
    assert signed.signer == ALICE.peer_id


def test_a_signature_for_one_context_is_refused_in_another() -> None:
    """Oracle: domain separation; the bytes are the same, the kind is not."""
    signed = seal(ALICE, "note", Note(text="hello"))
    with pytest.raises(SignatureError):
        unseal(signed, "receipt", Note)


def test_context_and_payload_cannot_trade_bytes() -> None:
    """Oracle: without the length in front of it, "ab" + "c" and "a" + "bc" would be signed alike."""
    signature = ALICE.sign("ab", b"c")
    with pytest.raises(SignatureError):
        verify(ALICE.peer_id, context="a", payload=b"bc", signature=signature)


def test_another_signer_is_refused_even_with_a_valid_signature() -> None:
    """Oracle: who signed matters, not only that somebody did."""
    signed = seal(BOB, "note", Note(text="hello"))
    assert unseal(signed, "note", Note).text == "hello"
    with pytest.raises(SignatureError):
        unseal(signed, "note", Note, signer=ALICE.peer_id)


def test_claiming_another_signer_is_refused() -> None:
    """Oracle: the id is the key, so a swapped name cannot verify."""
    forged = seal(BOB, "note", Note(text="hello")).model_copy(update={"signer": ALICE.peer_id})
    with pytest.raises(SignatureError):
        unseal(forged, "note", Note, signer=ALICE.peer_id)


@given(st.integers(min_value=0, max_value=63), st.integers(min_value=1, max_value=255))
def test_any_flipped_signature_byte_is_noticed(position: int, flip: int) -> None:
    """Oracle: Ed25519 with strict decoding is not malleable."""
    payload = b"payload"
    signature = bytearray(ALICE.sign("note", payload))
    signature[position] ^= flip
    with pytest.raises(SignatureError):
        verify(ALICE.peer_id, context="note", payload=payload, signature=bytes(signature))


def test_a_signed_payload_of_another_class_is_a_wire_error() -> None:
    """Oracle: a valid signature does not excuse a wrong shape."""
    with pytest.raises(WireError):
        unseal(seal(ALICE, "note", Note(text="x")), "note", OtherNote)


def test_a_seed_of_the_wrong_length_is_our_own_bug() -> None:
    """Oracle: RFC 8032 seeds have 32 bytes."""
    with pytest.raises(ValueError, match="32 bytes"):
        SigningKey(b"short")


@pytest.mark.parametrize("context", ["", "x" * 65])
def test_contexts_are_short_and_not_empty(context: str) -> None:
    """Oracle: the length travels in one byte and must tell contexts apart."""
    with pytest.raises(ValueError, match="context"):
        ALICE.sign(context, b"")


def test_the_secret_is_not_shown() -> None:
    """Oracle: the seed appears in no text form of the key."""
    assert RFC_SEED.hex() not in repr(SigningKey(RFC_SEED))
    assert ALICE.peer_id in repr(ALICE)


def test_fingerprints_differ_and_are_short() -> None:
    """Oracle: 128 bits of SHA-256 over the raw key, as hex."""
    assert len(fingerprint(ALICE.peer_id)) == 32
    assert fingerprint(ALICE.peer_id) != fingerprint(BOB.peer_id)
    with pytest.raises(SignatureError):
        fingerprint(PeerId("nonsense"))
