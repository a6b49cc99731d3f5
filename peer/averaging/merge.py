"""Adding up one part after another in member order, whatever order the contributions arrive in.

Owns: the running sum of the part at hand, and its one encoding. Takes the place of hivemind's
`TensorPartReducer`, which adds in order of arrival (so the result depends on the network), divides by
whatever weights came, and goes on with fewer when somebody fails. Must not know: peers, messages, clocks.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import torch
from torch import Tensor

from peer.codecs import Codec
from peer.codecs.codec import largest
from protocol.errors import WireError


class MergeStopped(Exception):
    """The reduce ended while somebody was waiting for a sum. Never leaves this package."""


def squares(values: Tensor) -> float:
    """Return the squared length of some numbers, added up in fp64."""
    return float(torch.linalg.vector_norm(values.double())) ** 2


def check_summable(values: Tensor, *, num_senders: int) -> None:
    """Raise `WireError` for values of which so many might not add up any more."""
    limit = torch.finfo(torch.float32).max / (2 * num_senders)
    if largest(values) > limit:
        raise WireError(f"values beyond {limit:.1e} would overflow the sum")


class OrderedMerger:
    """Sums the parts of which we are the reducer, one at a time."""

    def __init__(
        self, codec: Codec, lengths: Sequence[int], *, num_senders: int, factors: Sequence[float] = ()
    ) -> None:
        """With `factors`, one per sender, what they send is multiplied by them first."""
        assert not factors or len(factors) == num_senders
        self._codec, self._factors = codec, tuple(factors)
        self._lengths = tuple(lengths)
        self._num_senders = num_senders
        self._stopped = False
        self._sum: Tensor | None = None
        self._early: dict[int, Tensor] = {}
        self.squares = [0.0] * num_senders
        """The squared length of what each sender has contributed so far."""
        self._begin(0)

    @property
    def num_parts(self) -> int:
        return len(self._lengths)

    async def accumulate_part(self, sender_index: int, part_index: int, values: Tensor) -> bytes:
        """Contribute `values` (ours from now on) to the part at hand; return its encoded sum once all have.

        Raises `WireError` if they are too large to be summed, `MergeStopped` if the reduce ends before.
        """
        assert part_index == self._part, "a sender waits for each sum before it hands in the next part"
        assert len(values) == self._lengths[part_index]
        if self._stopped:
            raise MergeStopped
        check_summable(values, num_senders=self._num_senders)
        self._early[sender_index] = values
        self.squares[sender_index] += squares(values)
        merged = self._merged
        self._add_in_order()
        return await asyncio.shield(merged)  # shared by all senders: one that is cancelled must not cancel it

    def missing(self, part_index: int) -> list[int]:
        """Which senders have not contributed to a part; nobody, if its sum is made."""
        if part_index < self._part:
            return []
        return [sender for sender in range(self._next_sender, self._num_senders) if sender not in self._early]

    def finalize(self) -> None:
        """Let everybody go who waits. hivemind's runner calls it, perhaps more than once."""
        self._stopped = True
        self._early.clear()
        self._sum = None
        if not self._merged.done():
            self._merged.set_exception(MergeStopped())
            self._merged.exception()  # seen: nobody needs to have been waiting

    def _begin(self, part_index: int) -> None:
        self._part = part_index
        self._next_sender = 0
        self._sum = None
        self._early = {}
        self._merged: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()

    def _add_in_order(self) -> None:
        """Add what can be added: everything up to the first member that is still missing."""
        while (values := self._early.pop(self._next_sender, None)) is not None:
            if self._factors:
                values.mul_(self._factors[self._next_sender])
            self._sum = values if self._sum is None else self._sum.add_(values)
            self._next_sender += 1
        if self._next_sender == self._num_senders:
            assert self._sum is not None
            merged, encoded = self._merged, self._codec.encode(self._sum)
            self._begin(self._part + 1)
            merged.set_result(encoded)
