"""A pen that costs nothing: signatures are a name, and what was read once is remembered.

Owns: nothing but speed. Forgery is not simulated here; one test runs the simulator with real keys.
"""

from __future__ import annotations

from typing import Any, TypeVar

from protocol.errors import SignatureError
from protocol.ids import PeerId
from protocol.signing import SIGNATURE_BYTES, Signed
from protocol.wire import Message

M = TypeVar("M", bound=Message)

_READ: dict[tuple[str, bytes], Any] = {}
MAX_READ = 4096  # records of the runs at hand; older ones are read again


class FakeNotary:
    """Signs with its name."""

    def __init__(self, name: PeerId) -> None:
        self._name = name

    def seal(self, context: str, message: Message) -> Signed:
        """Put our name under it."""
        payload = message.to_bytes()
        if len(_READ) > MAX_READ:
            _READ.clear()
        _READ[context, payload] = message
        mark = f"{context}/{self._name}".encode()[:SIGNATURE_BYTES].ljust(SIGNATURE_BYTES, b".")
        return Signed(payload=payload, signer=self._name, signature=mark)

    def unseal(self, signed: Signed, context: str, message_class: type[M], *, signer: PeerId | None = None) -> M:
        """Believe the name."""
        if signer is not None and signed.signer != signer:
            raise SignatureError(f"{context} is signed by {signed.signer}, not by {signer}")
        if not signed.signature.startswith(f"{context}/{signed.signer}".encode()[:SIGNATURE_BYTES]):
            raise SignatureError(f"bad signature of {signed.signer} on {context}")
        key = (context, signed.payload)
        if key not in _READ:
            _READ[key] = message_class.from_bytes(signed.payload)
        message: M = _READ[key]
        return message
