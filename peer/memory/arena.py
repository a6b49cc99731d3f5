"""Room outside the device for activations: what a forward pass leaves behind until its backward pass comes.

Owns: the places, and the copies there and back. Must not know: which activations go there and when (the plan says
which, the schedule says when), what they mean. Places are as many as the plan allows: whoever lets microbatches in sees
to it that there is always one free.

An activation is one or several pieces of flat bytes: an input is one, what a graph has saved is many. They leave and
come back together.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass

import torch
from torch import Tensor

from peer.memory.executor import Executor
from peer.memory.pages import packed, padded
from peer.memory.placement import Tier
from peer.memory.pool import gather, scatter
from peer.memory.schedule import PARK_BUFFERS
from protocol.errors import LocalFault


@dataclass(slots=True, eq=False)
class Parked:
    """An activation that is in another tier, or on its way there or back."""

    tier: Tier
    place: int
    sizes: tuple[int, ...]
    """Of its pieces, in bytes."""
    under_way: Future[list[Tensor]]
    """Ends with the pieces once it was sent for."""
    is_recalled: bool = False


class Arena:
    """The places for the activations of one peer. Used from the compute thread."""

    def __init__(self, memory: Executor, places: Mapping[Tier, Sequence[int]]) -> None:
        """Make room: `places` has the size of each place, in bytes, and on NVMe the store has to have the same ones."""
        self._memory = memory
        self._sizes = {tier: tuple(sizes) for tier, sizes in places.items()}
        self._host = [memory.backend.allocate_host(size) for size in places.get(Tier.HOST, ())]
        self._leaving: deque[Future[list[Tensor]]] = deque()
        self._free = {
            tier: {size: deque(n for n, each in enumerate(sizes) if each == size) for size in sorted({*sizes})}
            for tier, sizes in self._sizes.items()
        }
        self._dropped: list[Parked] = []
        """Given up, while something may be under way there."""

    def may_park(self, pieces: Sequence[Tensor], tier: Tier) -> bool:
        """Tell whether an activation fits a place, and today's writes cover it and a round besides."""
        place_bytes = next(iter(self._fitting(pieces, tier)), None)
        if place_bytes is None:
            return False
        store = self._memory.pool.store
        if tier is not Tier.NVME or store is None:
            return True
        self._memory.wait_counted(place_bytes)
        left_bytes = store.budget_left_bytes()
        return left_bytes is None or left_bytes >= padded(place_bytes) + self._memory.round_bytes

    def park(self, pieces: Sequence[Tensor], tier: Tier) -> Parked:
        """Begin to move an activation (flat bytes) out of the device; it must not be changed any more."""
        while len(self._leaving) >= PARK_BUFFERS:  # or what waits to be copied would pile up on the device
            self._memory.outwait([self._leaving.popleft()])
        place = self._take_place(self._fitting(pieces, tier), tier)
        after = self._memory.backend.record()

        def move() -> list[Tensor]:
            if tier is Tier.HOST:
                gather(self._memory.backend, self._host[place], pieces, after)
            else:
                self._memory.pool.park(place, pieces, after)
            return []

        written_bytes = padded(self._sizes[tier][place]) if tier is Tier.NVME else 0
        future = self._memory.start(tier, "out", move, num_bytes=written_bytes)
        self._leaving.append(future)
        return Parked(tier, place, tuple(piece.numel() for piece in pieces), future)

    def recall(self, parked: Parked) -> None:
        """Begin to bring an activation back; does nothing if that has begun."""
        if parked.is_recalled:
            return
        parked.is_recalled = True
        there = parked.under_way
        lies = packed(parked.sizes)
        together = torch.empty(lies[-1].stop, dtype=torch.uint8, device=self._memory.backend.device)
        pieces = [together[each.start : each.stop] for each in lies]
        after = self._memory.backend.record()

        def move() -> list[Tensor]:
            there.result()
            if parked.tier is Tier.HOST:
                scatter(self._memory.backend, self._host[parked.place], pieces, after)
            else:
                self._memory.pool.recall(parked.place, pieces, after)
            return pieces

        parked.under_way = self._memory.start(parked.tier, "in", move)

    def take(self, parked: Parked) -> list[Tensor]:
        """Wait for an activation that was sent for, and give its place to others."""
        self.recall(parked)
        try:
            return self._memory.wait_for(parked.under_way)
        finally:
            self.drop(parked)

    def drop(self, parked: Parked) -> None:
        """Give up an activation; its place is free once nothing is under way there."""
        self._dropped.append(parked)
        self.reclaim()

    def reclaim(self) -> None:
        """Take places back from what was given up, where nothing is under way any more."""
        still: list[Parked] = []
        for parked in self._dropped:
            if parked.under_way.done():
                self._free[parked.tier][self._sizes[parked.tier][parked.place]].append(parked.place)
            else:
                still.append(parked)
        self._dropped = still

    def _take_place(self, sizes: Sequence[int], tier: Tier) -> int:
        """Return the smallest free place of one of these sizes, waiting for one that was given up if need be."""
        for _ in range(2):
            self.reclaim()
            for size in sizes:
                if self._free[tier][size]:
                    return self._free[tier][size].popleft()
            self._memory.outwait([parked.under_way for parked in self._dropped])
        raise LocalFault("there is no room left for activations: more microbatches are open than were planned.")

    def _fitting(self, pieces: Sequence[Tensor], tier: Tier) -> list[int]:
        """Return the sizes of the places that an activation fits, the smallest first."""
        needed_bytes = packed(piece.numel() for piece in pieces)[-1].stop
        return [size for size in self._free.get(tier, {}) if size >= needed_bytes]
