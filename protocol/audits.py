"""Audits: what the coordinator asks of who recomputes somebody's work, and of who holds its inputs. Pure.

Owns: the orders and their answers. Must not know: who is drawn and what follows (`coordinator/audit/`), tensors.

An order comes after the work is signed away, so nobody knows beforehand what will be looked at. The auditor takes the
inputs from the neighbours of the audited, never from itself, and is not told the result: it sends a sketch of its own,
and the neighbours send one of what they were given. The seed of these sketches is as new as the order.

Blob name that a peer serves: `payload/DIGEST` (32 hex digits), bytes that crossed a hop of which it was one end.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

from pydantic import Field

from protocol.ids import Lineage, PeerId, RoundId, StageId, Version, digest
from protocol.receipts import SHORT_DIGEST_BYTES
from protocol.signing import MAX_PEER_ID_CHARS
from protocol.sketch import MAX_SKETCH_BYTES, WIDTH
from protocol.wire import Message

MAX_ORDERS = 16  # in one answer to a beat
SEED_BYTES = 32
MAX_WORKS = 256  # of one peer in one round, in one order
RECORDED_EVERY = 2  # commits
MAX_SHARES = 32  # members of an average that is looked into share by share
MAX_PREFIX = 1 << 20

_Number = Annotated[int, Field(ge=0, lt=1 << 53)]
_Seed = Annotated[bytes, Field(min_length=SEED_BYTES, max_length=SEED_BYTES)]
_Short = Annotated[bytes, Field(min_length=SHORT_DIGEST_BYTES, max_length=SHORT_DIGEST_BYTES)]
_Sketch = Annotated[bytes, Field(max_length=MAX_SKETCH_BYTES)]
_Folded = Annotated[bytes, Field(min_length=4 * WIDTH, max_length=4 * WIDTH)]


class Payload(Message):
    """Bytes that crossed a hop, and who holds them."""

    holder: Annotated[PeerId, Field(min_length=1, max_length=MAX_PEER_ID_CHARS)]
    digest: _Short


class AuditOrder(Message):
    """Recompute one microbatch of one peer at its stages, forward and backward."""

    order: _Number
    round: RoundId
    number: Annotated[int, Field(ge=0, lt=1 << 32)]
    first_stage: StageId
    num_stages: Annotated[int, Field(ge=1, le=256)]
    version: Version | None
    """Of the first of these stages; None: the one with which the round began."""
    seed: _Seed
    inputs: Payload | None
    """Activations that came in; None at the first stage, which reads tokens."""
    gradient: Payload | None
    """By the activations that went out; None at the last stage, which has labels."""
    outputs: Payload | None = None
    """The activations that went out; given to a second witness only, who checks the bytes as well."""
    returned: Payload | None = None
    """The gradient that went back; likewise."""
    prefix: Annotated[int, Field(ge=1, le=MAX_PREFIX)] | None = None
    """Look at so many tokens of every sequence, and forward only: they depend on nothing that comes after them."""
    is_fresh: bool = False
    """Get the weights anew before: what they were found to say of somebody may be their own fault."""


class SketchOrder(Message):
    """Sketch bytes that you hold, of a gradient or of activations."""

    order: _Number
    digest: _Short
    is_gradient: bool
    seed: _Seed


class AuditOutcome(StrEnum):
    """How an audit ended at the auditor."""

    DONE = "done"
    STALE = "stale"
    """It has no weights of that version (any more)."""
    MISSING = "missing"
    """Somebody did not bring the bytes; `missing` says who."""
    FAILED = "failed"
    """This machine could not."""


class AuditReport(Message):
    """What an auditor has found. Sketches are empty where there is nothing to sketch."""

    order: _Number
    outcome: Annotated[AuditOutcome, Field(strict=False)]
    missing: Annotated[PeerId, Field(max_length=MAX_PEER_ID_CHARS)] | None = None
    outputs: _Sketch = b""
    """Of the activations as they would have gone out: encoded and decoded. Of a prefix, if the order wants that."""
    returned: _Sketch = b""
    """Of the gradient as it would have gone back."""
    seen_outputs: _Sketch = b""
    """Of the bytes that did go out, if the order named them."""
    seen_returned: _Sketch = b""


class SketchReport(Message):
    """A sketch that was asked for; empty if the bytes are not here (any more)."""

    order: _Number
    sketch: _Sketch


class ContributionReport(Message):
    """What a member has put into an average, and what came out, as sketches."""

    stage: StageId
    round: RoundId
    lineage: Lineage
    """Of the commit, which names the seed as well."""
    own: Annotated[bytes, Field(min_length=1, max_length=MAX_SKETCH_BYTES)]
    total: Annotated[bytes, Field(min_length=1, max_length=MAX_SKETCH_BYTES)]


class NonsenseReport(Message):
    """What this peer sent us could not be taken for numbers: once for each peer and round."""

    peer: Annotated[PeerId, Field(min_length=1, max_length=MAX_PEER_ID_CHARS)]
    round: RoundId


class Work(Message):
    """One microbatch of a contribution, with its inputs as in `AuditOrder`."""

    number: Annotated[int, Field(ge=0, lt=1 << 32)]
    inputs: Payload | None
    gradient: Payload | None


class SumOrder(Message):
    """Recompute what one peer's microbatches of a round add up to at one stage; the answer has that in `outputs`."""

    order: _Number
    round: RoundId
    first_stage: StageId
    num_stages: Annotated[int, Field(ge=1, le=256)]
    version: Version | None
    stage: StageId
    seed: _Seed
    works: Annotated[tuple[Work, ...], Field(min_length=1, max_length=MAX_WORKS)]
    is_fresh: bool = False
    """As in `AuditOrder`."""


class ShareOrder(Message):
    """Contributions to this commit do not add up: say what you gave to whom, and were given by whom."""

    order: _Number
    stage: StageId
    lineage: Lineage
    """Of the commit."""


class ShareReport(Message):
    """The sketches of one commit, share by share, each in one piece. Empty: it is not known here (any more).

    A share is what one contributor adds up for all; members are in the commit's order.
    """

    order: _Number
    given: Annotated[tuple[_Folded, ...], Field(max_length=MAX_SHARES)] = ()
    """What we gave into each member's share."""
    taken: Annotated[tuple[_Folded, ...], Field(max_length=MAX_SHARES)] = ()
    """What each member gave into our share, as it came."""
    totals: Annotated[tuple[_Folded, ...], Field(max_length=MAX_SHARES)] = ()
    """What came out of each member's share."""


Order = AuditOrder | SketchOrder | SumOrder | ShareOrder
Answer = AuditReport | SketchReport | ContributionReport | ShareReport | NonsenseReport
"""What a peer reports for audits, asked or by itself."""


def contribution_seed(lineage: Lineage) -> bytes | None:
    """Return the seed for sketches of what a commit sums up; None for every other commit, which is not looked at.

    It depends on the summed bytes, so nobody knows it, or whether there is one, before all contributions are given.
    """
    seed = digest(b"handcar contributions", lineage)
    return seed if seed[0] % RECORDED_EVERY == 0 else None


def payload_name(digest: bytes) -> str:
    """Return the blob name of bytes that crossed a hop."""
    return f"payload/{digest.hex()}"
