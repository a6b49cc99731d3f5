"""How many bytes go over the wire: of a hop, and of an averaging. Pure.

Owns: what messages weigh besides tensors, and how many copies of a contribution each member sends. Must not know:
seconds, who has which link.

Counted are the bytes that peers write to their streams. libp2p's encryption and TCP/IP add about 4 % on an Ethernet
line: give a link the rate that a transfer reaches on it. Not counted, because they are small or rare: beats, ballots,
the DHT, tokens (a peer fetches each chunk of text once), and states for those who join.
"""

from __future__ import annotations

from typing import NamedTuple

from coordinator.forecast.spans import Span
from protocol.encoding import encoded_bytes, is_dense, num_blocks
from protocol.wire import HEADER, MAX_CHUNK_BYTES

# tests/coordinator/test_forecast_wire.py compares these with real messages
HOP_REQUEST_BYTES = 350  # OpenTask, BodyEnd, Received
HOP_ANSWER_BYTES = 250  # Accepted, one Progress, Answer
PATH_ENTRY_BYTES = 545  # one for every peer behind
PART_MESSAGE_BYTES = 20  # protobuf's and hivemind's framing of a part


class Traffic(NamedTuple):
    """Bytes that a peer sends and receives."""

    up: float = 0.0
    down: float = 0.0

    def times(self, factor: float) -> Traffic:
        return Traffic(self.up * factor, self.down * factor)

    def plus(self, other: Traffic) -> Traffic:
        return Traffic(self.up + other.up, self.down + other.down)


class Hop(NamedTuple):
    """Bytes of one microbatch between two peers, there and back."""

    forward: float
    backward: float


def body_bytes(codec: str, num_elements: int) -> int:
    """Return the size of a tensor on a hop: encoded, and cut into chunks with a header each."""
    num_bytes = encoded_bytes(codec, num_elements)
    return num_bytes + HEADER.size * num_blocks(num_bytes, MAX_CHUNK_BYTES)


def hops(codecs: tuple[str, str], num_elements: int, *, num_spans: int, trains: bool = True) -> tuple[Hop, ...]:
    """Return what a microbatch of so many numbers costs on each way from one span to the next.

    Activations go there in the first codec, and the gradient by them comes back in the second one; of an evaluation
    only the loss comes back.
    """
    activations, gradients = (body_bytes(codec, num_elements) for codec in codecs)
    return tuple(
        Hop(
            forward=activations + HOP_REQUEST_BYTES,
            backward=gradients * trains + HOP_ANSWER_BYTES + PATH_ENTRY_BYTES * (num_spans - 1 - span),
        )
        for span in range(num_spans - 1)
    )


def at_span(between: tuple[Hop, ...], span: int) -> Traffic:
    """Return what a microbatch costs the peer that hosts a span."""
    before = between[span - 1] if span > 0 else Hop(0.0, 0.0)
    behind = between[span] if span < len(between) else Hop(0.0, 0.0)
    return Traffic(up=behind.forward + before.backward, down=before.forward + behind.backward)


class Averaging(NamedTuple):
    """Bytes that a member of a group sends in one averaging; it receives as many."""

    mean: float
    busiest: float


def averaging(codec: str, span: Span, *, members: int, fragments: int = 1) -> Averaging:
    """Return what averaging a span among so many members costs each of them, in a round with an average turn.

    Dense codecs (a butterfly, `peer/averaging/butterfly.py`): of N parts each member makes an equal share. It sends
    the others' shares of its contribution to them, and what it has made to each of them: N - own + (n - 1) own =
    N + (n - 2) own, which is 2 (n - 1) / n of N on average. Where there are few parts, some make one more than others.
    Sparse (an exchange, `peer/averaging/exchange.py`): each sends all of its contribution to the n - 1 others.
    """
    if members < 2:
        return Averaging(0.0, 0.0)
    num_parts = span.num_parts
    num_bytes = (span.encoded_bytes(codec) + PART_MESSAGE_BYTES * num_parts) / fragments
    if not is_dense(codec):
        return Averaging(num_bytes * (members - 1), num_bytes * (members - 1))
    most = num_blocks(num_parts, members) / num_parts
    return Averaging(num_bytes * (1 + (members - 2) / members), num_bytes * (1 + (members - 2) * most))
