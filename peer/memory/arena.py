"""Room outside the device for activations: what a forward pass leaves behind until its backward pass comes.

Owns: the places, and the copies there and back. Must not know: which activations go there and when (the plan says
which, the schedule says when), what they mean. Places are as many as the plan allows: whoever lets microbatches in sees
to it that there is always one free.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from concurrent.futures import Future
from dataclasses import dataclass

import torch
from torch import Tensor

from peer.memory.executor import Executor
from peer.memory.pages import padded
from peer.memory.placement import Tier
from peer.memory.schedule import PARK_BUFFERS
from protocol.errors import LocalFault


@dataclass(slots=True, eq=False)
class Parked:
    """An activation that is in another tier, or on its way there or back."""

    tier: Tier
    place: int
    shape: torch.Size
    under_way: Future[Tensor | None]
    """Ends with the tensor once it was sent for."""
    is_recalled: bool = False


class Arena:
    """The places for the activations of one peer. Used from the compute thread."""

    def __init__(self, memory: Executor, places: Mapping[Tier, int], *, num_bytes: int) -> None:
        """Make room for activations of at most `num_bytes` each; on NVMe the store has to have it."""
        self._memory, self._num_bytes = memory, num_bytes
        self._host = [memory.backend.allocate_host(num_bytes) for _ in range(places.get(Tier.HOST, 0))]
        self._leaving: deque[Future[Tensor | None]] = deque()
        self._free = {tier: deque(range(number)) for tier, number in places.items()}

    def may_park(self, activation: Tensor, tier: Tier) -> bool:
        """Tell whether an activation fits a place, and today's writes cover it and a round besides."""
        if activation.nbytes > self._num_bytes:
            return False
        store = self._memory.pool.store
        if tier is not Tier.NVME or store is None:
            return True
        self._memory.wait_counted(self._num_bytes)
        left_bytes = store.budget_left_bytes()
        return left_bytes is None or left_bytes >= padded(self._num_bytes) + self._memory.round_bytes

    def park(self, activation: Tensor, tier: Tier) -> Parked:
        """Begin to move an activation (contiguous, fp32) out of the device; it must not be changed any more."""
        if not self._free.get(tier):
            raise LocalFault("there is no room left for activations: more microbatches are open than were planned.")
        while len(self._leaving) >= PARK_BUFFERS:  # or what waits to be copied would pile up on the device
            self._memory.outwait([self._leaving.popleft()])
        place = self._free[tier].popleft()
        flat = self._as_place(activation.detach().reshape(-1).view(torch.uint8), tier)
        after = self._memory.backend.record()

        def move() -> Tensor | None:
            if tier is Tier.HOST:
                self._memory.backend.to_host(self._host[place][: flat.numel()], flat, after)
            else:
                self._memory.pool.park(place, flat, after)
            return None

        future = self._memory.start(tier, "out", move)
        self._leaving.append(future)
        return Parked(tier, place, activation.shape, future)

    def recall(self, parked: Parked) -> None:
        """Begin to bring an activation back; does nothing if that has begun."""
        if parked.is_recalled:
            return
        parked.is_recalled = True
        there = parked.under_way
        tensor = torch.empty(parked.shape, device=self._memory.backend.device)
        own = tensor.view(-1).view(torch.uint8)
        flat = self._as_place(own, parked.tier)
        after = self._memory.backend.record()

        def move() -> Tensor:
            there.result()
            if parked.tier is Tier.HOST:
                self._memory.backend.to_device(flat, self._host[parked.place][: flat.numel()], after)
            else:
                self._memory.pool.recall(parked.place, flat, after)
                if flat is not own:
                    own.copy_(flat[: own.numel()])
            return tensor

        parked.under_way = self._memory.start(parked.tier, "in", move)

    def _as_place(self, flat: Tensor, tier: Tier) -> Tensor:
        """Return bytes as long as a place, for a drive, which knows no shorter ones."""
        if tier is not Tier.NVME or flat.numel() == self._num_bytes:
            return flat
        whole = flat.new_zeros(self._num_bytes)
        whole[: flat.numel()] = flat
        return whole

    def take(self, parked: Parked) -> Tensor:
        """Wait for an activation that was sent for, and give its place to others."""
        self.recall(parked)
        try:
            tensor = self._memory.wait_for(parked.under_way)
        finally:
            self.drop(parked)
        assert tensor is not None
        return tensor

    def drop(self, parked: Parked) -> None:
        """Give up an activation; its place is free once nothing is under way there."""
        parked.under_way.add_done_callback(lambda _: self._free[parked.tier].append(parked.place))
