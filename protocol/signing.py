"""Ed25519 keys, peer ids and signed messages. Pure: no files, no sockets, no clock.

Owns: the peer id text (base58 of a libp2p id that holds the public key itself), the domain separation of
signatures, and `Signed`, the envelope in which every signed message of the protocol travels. Must not know:
where keys are kept (`protocol/transport/identity.py`) or what any signed message means.

A peer id *is* a public key (docs/decisions/0003), so a signature is checked against the id alone and the
remote id that libp2p authenticated is enough to know who signed what.

What is signed is `"handcar-sign-1" | len(context) | context | payload`: the same bytes signed as one kind of
message never pass as another kind.
"""

from __future__ import annotations

import hashlib
import os
from functools import lru_cache
from typing import Annotated, Self, TypeVar

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from pydantic import Field

from protocol.errors import SignatureError
from protocol.ids import PeerId
from protocol.wire import MAX_MESSAGE_BYTES, Message

SEED_BYTES = 32
PUBLIC_KEY_BYTES = 32
SIGNATURE_BYTES = 64
MAX_CONTEXT_BYTES = 64
MAX_PEER_ID_CHARS = 64  # an Ed25519 id takes 52; anything longer is not decoded at all
KNOWN_KEYS = 4096  # parsed public keys kept: every peer of a large run, at about 300 bytes each

# libp2p's id of an Ed25519 key: identity multihash (0x00) of 36 bytes, protobuf {1: Ed25519, 2: 32 bytes}
_ID_PREFIX = bytes.fromhex("002408011220")
_DOMAIN = b"handcar-sign-1"
_ALPHABET = "123456789ABCDEFGHJKLMNPQRSTUVWXYZabcdefghijkmnopqrstuvwxyz"
_DIGIT = {char: value for value, char in enumerate(_ALPHABET)}


M = TypeVar("M", bound=Message)


class SigningKey:
    """A private key that signs and never shows itself: neither `repr` nor an error contains the seed."""

    __slots__ = ("_private", "_seed", "peer_id", "public_bytes")

    def __init__(self, seed: bytes) -> None:
        if len(seed) != SEED_BYTES:
            raise ValueError(f"an Ed25519 seed has {SEED_BYTES} bytes, not {len(seed)}")
        self._seed = bytes(seed)
        self._private = Ed25519PrivateKey.from_private_bytes(self._seed)
        self.public_bytes: bytes = self._private.public_key().public_bytes_raw()
        self.peer_id: PeerId = peer_id_from_public_key(self.public_bytes)

    @classmethod
    def generate(cls) -> Self:
        """Make a new key from the system's random source."""
        return cls(os.urandom(SEED_BYTES))

    def sign(self, context: str, payload: bytes) -> bytes:
        """Sign `payload` as a message of kind `context`; deterministic, 64 bytes."""
        return self._private.sign(_signed_bytes(context, payload))

    def secret_seed(self) -> bytes:
        """Return the secret itself, for the one file that keeps it."""
        return self._seed

    def __repr__(self) -> str:
        return f"SigningKey({self.peer_id})"


class Signed(Message):
    """A message's bytes, who signed them, and the signature."""

    payload: Annotated[bytes, Field(max_length=MAX_MESSAGE_BYTES)]
    signer: Annotated[PeerId, Field(max_length=MAX_PEER_ID_CHARS)]
    signature: Annotated[bytes, Field(min_length=SIGNATURE_BYTES, max_length=SIGNATURE_BYTES)]


def seal(key: SigningKey, context: str, message: Message) -> Signed:
    """Sign a message as one of kind `context`."""
    payload = message.to_bytes()
    return Signed(payload=payload, signer=key.peer_id, signature=key.sign(context, payload))


def unseal(signed: Signed, context: str, message_class: type[M], *, signer: PeerId | None = None) -> M:
    """Return the message inside, after its signature has been checked.

    With `signer` the envelope must name exactly that one; without, any valid signer will do and the caller
    decides by `signed.signer`. Raises `SignatureError`, or `WireError` for a signed payload that is not a message.
    """
    if signer is not None and signed.signer != signer:
        raise SignatureError(f"{context} is signed by {signed.signer}, not by {signer}")
    verify(signed.signer, context=context, payload=signed.payload, signature=signed.signature)
    return message_class.from_bytes(signed.payload)


def verify(peer_id: PeerId, *, context: str, payload: bytes, signature: bytes) -> None:
    """Raise `SignatureError` unless `peer_id` signed `payload` as a message of kind `context`."""
    public_key = _parsed_key(peer_id)
    try:
        public_key.verify(signature, _signed_bytes(context, payload))
    except InvalidSignature:
        raise SignatureError(f"bad signature of {peer_id} on {context}") from None


def peer_id_from_public_key(public_bytes: bytes) -> PeerId:
    """Return the libp2p id text (`12D3Koo...`) of a raw Ed25519 public key."""
    if len(public_bytes) != PUBLIC_KEY_BYTES:
        raise ValueError(f"an Ed25519 public key has {PUBLIC_KEY_BYTES} bytes, not {len(public_bytes)}")
    return PeerId(_base58_encode(_ID_PREFIX + public_bytes))


def public_key_of(peer_id: str) -> bytes:
    """Return the raw public key inside a peer id, or raise `SignatureError`.

    Strict: only Ed25519 ids, in the one text form that `peer_id_from_public_key` makes. Two texts for one key
    would let a peer pass as two.
    """
    raw = _base58_decode(peer_id)
    if raw is None or len(raw) != len(_ID_PREFIX) + PUBLIC_KEY_BYTES or not raw.startswith(_ID_PREFIX):
        raise SignatureError(f"not an Ed25519 peer id: {peer_id[:MAX_PEER_ID_CHARS]!r}")
    return raw[len(_ID_PREFIX) :]


def fingerprint(peer_id: PeerId) -> str:
    """Return 32 lower-case hex digits that people and invites compare instead of a whole id (128 bits)."""
    return hashlib.sha256(public_key_of(peer_id)).hexdigest()[:32]


@lru_cache(maxsize=KNOWN_KEYS)
def _parsed_key(peer_id: str) -> Ed25519PublicKey:
    raw = public_key_of(peer_id)
    try:
        return Ed25519PublicKey.from_public_bytes(raw)
    except ValueError:
        raise SignatureError(f"{peer_id} holds no valid public key") from None


def _signed_bytes(context: str, payload: bytes) -> bytes:
    label = context.encode("ascii")
    if not 0 < len(label) <= MAX_CONTEXT_BYTES:
        raise ValueError(f"a signature context has 1 to {MAX_CONTEXT_BYTES} ASCII characters, not {context!r}")
    return b"".join((_DOMAIN, bytes((len(label),)), label, payload))


def _base58_encode(data: bytes) -> str:
    number = int.from_bytes(data, "big")
    digits = []
    while number:
        number, digit = divmod(number, 58)
        digits.append(_ALPHABET[digit])
    leading_zeros = len(data) - len(data.lstrip(b"\0"))
    return _ALPHABET[0] * leading_zeros + "".join(reversed(digits))


def _base58_decode(text: str) -> bytes | None:
    """Return the bytes, or None; the length limit keeps the quadratic conversion from being a lever."""
    if not 0 < len(text) <= MAX_PEER_ID_CHARS:
        return None
    number = 0
    for char in text:
        digit = _DIGIT.get(char)
        if digit is None:
            return None
        number = number * 58 + digit
    leading_ones = len(text) - len(text.lstrip(_ALPHABET[0]))
    return b"\0" * leading_ones + number.to_bytes((number.bit_length() + 7) // 8, "big")
