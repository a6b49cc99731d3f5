"""Receipts: what both ends of a hop say of it, in signed windows. Pure.

Owns: a hop as it is vouched for, the window that a peer signs over the hops of one round, and their bytes. Must not
know: who keeps windows until they are handed in (`peer/receipts.py`), nor what they are worth
(`coordinator/settlement.py`).

Both ends see the same bytes, so they name the same digests: two honest ends never differ, and no tolerance is needed.
That the work was done *right* is not said here; audits are for that. Evaluations measure and are not paid, so they
leave no receipts.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Annotated, Self

from pydantic import Field, model_validator

from protocol.errors import WireError
from protocol.ids import Digest, PeerId, RoundId, RunId, StageId, Version
from protocol.signing import MAX_PEER_ID_CHARS, Signed, SigningKey, seal
from protocol.wire import Message

RECEIPT_CONTEXT = "handcar receipts"
SHORT_DIGEST_BYTES = 16  # of a SHA-256: nobody finds a second input for one, and half the bytes travel
MAX_HOPS = 1024  # in one window, about 54 KiB
FIRST_VERSION = Version(0)
MAX_LOCAL_STEP = (1 << 16) - 1
MAX_PARTNERS = 1024
MAX_PARTS = 1024

_HOP = struct.Struct(f">IHHHI{SHORT_DIGEST_BYTES}s{SHORT_DIGEST_BYTES}sIHH")
HOP_BYTES = _HOP.size

_Fields = tuple[int, StageId, int, int, bytes, bytes, Version, int, int]
_Peer = Annotated[PeerId, Field(min_length=1, max_length=MAX_PEER_ID_CHARS)]
_Hops = Annotated[bytes, Field(max_length=MAX_HOPS * HOP_BYTES)]
_Part = Annotated[int, Field(ge=0, lt=MAX_PARTS)]


@dataclass(frozen=True, slots=True)
class Hop:
    """A training microbatch went from `caller` through `num_stages` stages at `callee`, and its gradient came back."""

    number: int
    caller: PeerId
    callee: PeerId
    first_stage: StageId
    num_stages: int
    target_tokens: int
    given: bytes
    """Of the activations, shortened."""
    returned: bytes
    """Of their gradient, shortened."""
    version: Version = FIRST_VERSION
    """Of the callee's first stage, as it has signed it."""
    local_step: int = 0
    """0 if the callee's weights were those of its versions both ways, and not its own."""
    caller_step: int = 0
    """The same of the caller's on the way forward."""

    @property
    def end_stage(self) -> int:
        """The stage behind the callee's."""
        return self.first_stage + self.num_stages


class Window(Message):
    """What one life of a peer says of its hops in one round. Several parts if they are many."""

    run: Annotated[RunId, Field(max_length=64)]
    peer: _Peer
    session: Annotated[int, Field(ge=0, lt=1 << 63)]
    round: Annotated[RoundId, Field(ge=0, lt=1 << 53)]
    part: _Part
    parts: Annotated[int, Field(ge=1, le=MAX_PARTS)]
    partners: Annotated[tuple[_Peer, ...], Field(max_length=MAX_PARTNERS)]
    sent: _Hops
    """Those that it opened; `HOP_BYTES` each, partners by index."""
    served: _Hops
    """Those that it answered."""

    @model_validator(mode="after")
    def _hops_are_whole(self) -> Self:
        if len(self.sent) % HOP_BYTES or len(self.served) % HOP_BYTES:
            raise ValueError("a window ends within a hop")
        if self.part >= self.parts:
            raise ValueError("a window has fewer parts than its number")
        if self.peer in self.partners:
            raise ValueError("nobody vouches for itself")
        return self

    def sent_hops(self) -> Iterator[Hop]:
        """Unpack the hops that it opened. Raises `WireError` if one names no partner."""
        for partner, fields in self._unpacked(self.sent):
            yield Hop(fields[0], self.peer, partner, *fields[1:])

    def served_hops(self) -> Iterator[Hop]:
        """Unpack the hops that it answered. Raises `WireError` if one names no partner."""
        for partner, fields in self._unpacked(self.served):
            yield Hop(fields[0], partner, self.peer, *fields[1:])

    def _unpacked(self, packed: bytes) -> Iterator[tuple[PeerId, _Fields]]:
        for number, partner, first_stage, num_stages, tokens, given, returned, version, *steps in _HOP.iter_unpack(
            packed
        ):
            if partner >= len(self.partners):
                raise WireError(f"a window of {self.peer} names partner {partner} of {len(self.partners)}")
            stage = StageId(first_stage)
            yield self.partners[partner], (number, stage, num_stages, tokens, given, returned, version, *steps)


def shortened(digest: Digest) -> bytes:
    """Return of a digest what a receipt keeps."""
    return digest[:SHORT_DIGEST_BYTES]


def draw_windows(
    key: SigningKey, *, run: RunId, session: int, round_id: RoundId, sent: Iterable[Hop], served: Iterable[Hop]
) -> tuple[Signed, ...]:
    """Sign what we say of the hops of a round, in as many parts as it takes; none if there was no hop."""
    said = [*((True, hop) for hop in sent), *((False, hop) for hop in served)]
    pieces = [said[start : start + MAX_HOPS] for start in range(0, len(said), MAX_HOPS)][:MAX_PARTS]
    windows = []
    for part, piece in enumerate(pieces):
        partners = {hop.callee if is_sent else hop.caller: 0 for is_sent, hop in piece}
        partners = {partner: index for index, partner in enumerate(partners)}
        window = Window(
            run=run,
            peer=key.peer_id,
            session=session,
            round=round_id,
            part=part,
            parts=len(pieces),
            partners=tuple(partners),
            sent=b"".join(_packed(hop, partners[hop.callee]) for is_sent, hop in piece if is_sent),
            served=b"".join(_packed(hop, partners[hop.caller]) for is_sent, hop in piece if not is_sent),
        )
        windows.append(seal(key, RECEIPT_CONTEXT, window))
    return tuple(windows)


def _packed(hop: Hop, partner: int) -> bytes:
    steps = min(hop.local_step, MAX_LOCAL_STEP), min(hop.caller_step, MAX_LOCAL_STEP)
    what = hop.target_tokens, hop.given, hop.returned, hop.version
    return _HOP.pack(hop.number, partner, hop.first_stage, hop.num_stages, *what, *steps)
