"""All memory of a peer's training state: allocated once, handed out as tensors, moved between tiers.

Owns: the buffers of a placement - homes on the device and in host memory, the device's slots - the store for what
lives on NVMe, and the copying of one unit. Must not know: in which order things happen (`executor.py`), what a block
computes.

A disk reads straight into a device that is host memory; for others, for weights that are kept as bf16, and for
activations, which are many pieces, there is one staging buffer per direction.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from peer.memory.backend import Backend, Event, host_buffer
from peer.memory.disk.slot_table import Json
from peer.memory.disk.store import NvmeStore, UnitSpec
from peer.memory.pages import packed, padded
from peer.memory.placement import Placement, Tier, check_placement, slot_bytes
from peer.memory.schedule import AT_HOME
from peer.memory.units import ELEMENT_BYTES, OUTER, PASSING, Inventory, Section, Unit

DURABLE = (Section.WEIGHTS, Section.MOMENTS, *OUTER)
"""What is the state; the rest is work in progress."""

IN_BLOCKS = (Section.WEIGHTS, Section.GRADIENT)
"""What a block computes with in one piece: on the device the shards of these lie one behind the other."""


@dataclass(slots=True)
class Traffic:
    """Bytes that went from a tier to the device, and back to it."""

    fetched: Counter[Tier] = field(default_factory=Counter)
    flushed: Counter[Tier] = field(default_factory=Counter)


def stored_units(inventory: Inventory, placement: Placement) -> tuple[Unit, ...]:
    """List the units of the NVMe store, in its order: nothing if nothing lives there.

    Otherwise all that lasts has a place in it, wherever it lives, so that a commit is of the whole.
    """
    if not placement.uses(Tier.NVME):
        return ()
    passing = [
        unit for section in PASSING for unit in inventory.units(section) if placement.homes.get(unit) is Tier.NVME
    ]
    return (*lasting_units(inventory), *passing)


def lasting_units(inventory: Inventory) -> tuple[Unit, ...]:
    """List the units that are the state, in the order of the NVMe store."""
    return tuple(unit for section in DURABLE for unit in inventory.units(section))


def lasting_specs(inventory: Inventory) -> list[UnitSpec]:
    """Describe what is the state in every store of a span, whatever else the plan of the day keeps there."""
    return [_spec(inventory, unit) for unit in lasting_units(inventory)]


def unit_specs(inventory: Inventory, placement: Placement, *, activations: Sequence[int] = ()) -> list[UnitSpec]:
    """Describe the units of the NVMe store; behind those of the training state come places for activations.

    `activations` has the size of each of these.
    """
    state = [_spec(inventory, unit) for unit in stored_units(inventory, placement)]
    places = [UnitSpec(f"activation.{number}", size, durable=False) for number, size in enumerate(activations)]
    return state + places


def _spec(inventory: Inventory, unit: Unit) -> UnitSpec:
    name = f"{unit.section}.{inventory.layout(unit).name}"
    return UnitSpec(name, inventory.num_bytes(unit), durable=unit.section in DURABLE)


class Pool:
    """The buffers of one placement. Nothing is allocated after construction."""

    def __init__(
        self,
        inventory: Inventory,
        placement: Placement,
        backend: Backend,
        store: NvmeStore | None = None,
        *,
        activations: Sequence[int] = (),
    ) -> None:
        """`store` has the units of `unit_specs`, and is needed if anything is on NVMe."""
        check_placement(inventory, placement)
        self.inventory, self.placement, self.store = inventory, placement, store
        self.traffic = Traffic()
        self._backend = backend
        self._in_store = {unit: number for number, unit in enumerate(stored_units(inventory, placement))}
        self._beside = tuple(
            unit for unit in self._in_store if unit.section in DURABLE and placement.homes[unit] is not Tier.NVME
        )
        self._activations = tuple(activations)
        if store is None and self._in_store:
            raise ValueError("a placement on NVMe needs a store")
        staged = [unit for unit in self._in_store if inventory.is_narrow(unit) or not backend.is_host_memory]
        staging = max((*activations, *map(inventory.num_bytes, staged)), default=0)
        self._staging = {direction: backend.allocate_host(staging) for direction in ("in", "out") if staging}
        self._blocks = self._allocate_blocks()
        self._units = {
            unit: backend.allocate(inventory.device_bytes(unit))
            if tier is Tier.DEVICE
            else backend.allocate_host(inventory.num_bytes(unit))
            for unit, tier in placement.homes.items()
            if tier is Tier.HOST or (tier is Tier.DEVICE and unit.section not in IN_BLOCKS)
        }
        self._slots = {
            section: [
                backend.allocate(slot_bytes(inventory, placement, section)) for _ in range(placement.slots.of(section))
            ]
            for section in Section
        }

    def block_tensor(self, block: int, section: Section, slot: int) -> Tensor:
        """Return a block's weights or gradient as flat fp32, at home on the device or in a slot."""
        buffer = self._blocks[block, section] if slot == AT_HOME else self._slots[section][slot]
        return buffer[: self.inventory.block_bytes(block, section)].view(torch.float32)

    def moments(self, block: int, shard: int, slot: int) -> Tensor:
        """Return a shard's moments as flat bytes."""
        unit = Unit(block, Section.MOMENTS, shard)
        buffer = self._units[unit] if slot == AT_HOME else self._slots[Section.MOMENTS][slot]
        return buffer[: self.inventory.num_bytes(unit)]

    def home(self, unit: Unit) -> Tensor:
        """Return a unit's own bytes, on the device or in host memory. What lives on NVMe is read into new memory."""
        if self.placement.homes[unit] is Tier.NVME:
            copy = host_buffer(self.inventory.num_bytes(unit))[: self.inventory.num_bytes(unit)]
            self._read(unit, copy)
            return copy
        return self._in_memory(unit)

    def put_home(self, unit: Unit, source: Tensor) -> None:
        """Write a unit's bytes, as they lie outside the device, to where it lives. Not for what may be narrow."""
        tier = self.placement.homes[unit]
        if tier is Tier.NVME:
            self._write(unit, source)
        elif tier is Tier.DEVICE:
            self._bring_in(unit, self._in_memory(unit), source, self._backend.record())
        elif source.data_ptr() != self._in_memory(unit).data_ptr():
            self._in_memory(unit).copy_(source)

    def fetch(self, unit: Unit, slot: int, after: Event) -> None:
        """Copy a unit from its home into a slot of the device."""
        target, tier = self._in_slot(unit, slot), self.placement.homes[unit]
        if tier is Tier.HOST:
            self._bring_in(unit, target, self._in_memory(unit), after)
        elif self._is_direct(unit):
            self._read(unit, target)
        else:
            staging = self._staging["in"][: self.inventory.num_bytes(unit)]
            self._read(unit, staging)
            self._bring_in(unit, target, staging, after)
        self.traffic.fetched[tier] += self.inventory.num_bytes(unit)

    def flush(self, unit: Unit, slot: int, after: Event) -> None:
        """Copy a unit from a slot of the device to its home."""
        source, tier = self._in_slot(unit, slot), self.placement.homes[unit]
        if tier is Tier.HOST:
            self._bring_out(unit, self._in_memory(unit), source, after)
        elif self._is_direct(unit):
            self._write(unit, source)
        else:
            staging = self._staging["out"][: self.inventory.num_bytes(unit)]
            self._bring_out(unit, staging, source, after)
            self._write(unit, staging)
        self.traffic.flushed[tier] += self.inventory.num_bytes(unit)

    def _is_direct(self, unit: Unit) -> bool:
        """Tell whether a disk can read a unit straight into its slot."""
        return self._backend.is_host_memory and not self.inventory.is_narrow(unit)

    def _is_at_rest(self, unit: Unit) -> bool:
        """Tell whether a unit lies in memory as it would on a disk, so that it can be written from where it is."""
        return self.placement.homes[unit] is Tier.HOST or self._is_direct(unit)

    def _bring_in(self, unit: Unit, target: Tensor, source: Tensor, after: Event) -> None:
        copy = self._backend.widen if self.inventory.is_narrow(unit) else self._backend.to_device
        copy(target, source, after)

    def _bring_out(self, unit: Unit, target: Tensor, source: Tensor, after: Event) -> None:
        copy = self._backend.narrow if self.inventory.is_narrow(unit) else self._backend.to_host
        copy(target, source, after)

    # -- the store ------------------------------------------------------------------------------------

    @property
    def round_bytes(self) -> int:
        """Return what the drive takes in a round of few waves: everything that lives there once, some of it twice."""
        twice = (Section.GRADIENT, Section.SYNC)
        return sum((1 + (unit.section in twice)) * self.nvme_bytes(unit) for unit in self._in_store)

    @property
    def keeps_state(self) -> bool:
        """Tell whether the store has places for the state, and not just for activations."""
        return bool(self._in_store)

    @property
    def beside_bytes(self) -> int:
        """Return how much a commit writes of what does not live on NVMe."""
        return sum(padded(self.inventory.num_bytes(unit)) for unit in self._beside)

    def commit(self, meta: Mapping[str, Json]) -> None:
        """Make the present state of everything that lasts the one that survives a crash, with `meta` beside it.

        What lives elsewhere is written beside what lives on NVMe. To be called while nothing is under way.
        """
        assert self.store is not None
        self.store.require_budget(self.beside_bytes)
        copied = {unit for unit in self._beside if not self._is_at_rest(unit)}
        copy = self._spare("out", copied)
        for unit in self._beside:
            at_rest = self._in_memory(unit)
            if unit in copied:
                at_rest = copy[: self.inventory.num_bytes(unit)]
                self._bring_out(unit, at_rest, self._in_memory(unit), self._backend.record())
            self._write(unit, at_rest)
        self.store.commit(meta)

    def recover(self) -> None:
        """Bring what lives elsewhere back from the store's last commit, and check what lives there."""
        assert self.store is not None
        self.store.revert()
        copy = self._spare("in", self._in_store)
        for unit in self._in_store:
            if unit.section in DURABLE:
                at_rest = copy[: self.inventory.num_bytes(unit)]
                self._read(unit, at_rest)
                if unit in self._beside:
                    self._take_in(unit, at_rest)

    def move_in(self, store: NvmeStore) -> None:
        """Bring home, into memory, everything that lasts from a store that holds nothing else (`lasting_specs`)."""
        units = lasting_units(self.inventory)
        copy = host_buffer(max(map(self.inventory.num_bytes, units)))
        for number, unit in enumerate(units):
            at_rest = copy[: self.inventory.num_bytes(unit)]
            store.read(number, at_rest.numpy().data)
            self._take_in(unit, at_rest)

    def _take_in(self, unit: Unit, at_rest: Tensor) -> None:
        """Put a unit's bytes, as they lie on NVMe, where it lives in memory."""
        if self.placement.homes[unit] is Tier.HOST:
            self._in_memory(unit).copy_(at_rest)
        else:
            self._bring_in(unit, self._in_memory(unit), at_rest, self._backend.record())

    def _spare(self, direction: str, units: Iterable[Unit]) -> Tensor:
        """Return a buffer of the host for any of these units while nothing is under way: a staging buffer will do."""
        num_bytes, staging = max(map(self.inventory.num_bytes, units), default=0), self._staging.get(direction)
        return host_buffer(num_bytes) if staging is None or staging.numel() < num_bytes else staging

    def nvme_bytes(self, unit: Unit) -> int:
        """Return how much writing a unit home puts on the NVMe drive: nothing if it lives elsewhere."""
        return padded(self.inventory.num_bytes(unit)) if self.placement.homes.get(unit) is Tier.NVME else 0

    def park(self, place: int, pieces: Sequence[Tensor], after: Event) -> None:
        """Write an activation (pieces of flat bytes on the device) to one of the places on NVMe."""
        assert self.store is not None
        staging = self._staging["out"][: self._activations[place]]
        gather(self._backend, staging, pieces, after)
        self.store.write(len(self._in_store) + place, staging.numpy().data)
        self.traffic.flushed[Tier.NVME] += staging.numel()

    def recall(self, place: int, pieces: Sequence[Tensor], after: Event) -> None:
        """Read an activation back into buffers (flat bytes) of the device."""
        assert self.store is not None
        staging = self._staging["in"][: self._activations[place]]
        self.store.read(len(self._in_store) + place, staging.numpy().data)
        scatter(self._backend, staging, pieces, after)
        self.traffic.fetched[Tier.NVME] += staging.numel()

    def _read(self, unit: Unit, target: Tensor) -> None:
        assert self.store is not None
        self.store.read(self._in_store[unit], target.numpy().data)

    def _write(self, unit: Unit, source: Tensor) -> None:
        assert self.store is not None
        self.store.write(self._in_store[unit], source.numpy().data)

    def _in_memory(self, unit: Unit) -> Tensor:
        if self.placement.homes[unit] is Tier.DEVICE and unit.section in IN_BLOCKS:
            return self._part(self._blocks[unit.block, unit.section], unit)
        is_on_device = self.placement.homes[unit] is Tier.DEVICE
        size = self.inventory.device_bytes(unit) if is_on_device else self.inventory.num_bytes(unit)
        return self._units[unit][:size]

    def _in_slot(self, unit: Unit, slot: int) -> Tensor:
        return self._part(self._slots[unit.section][slot], unit)

    def _part(self, buffer: Tensor, unit: Unit) -> Tensor:
        """Return where a unit lies in a buffer: in a block's if it is a part of one, else at its start."""
        start = ELEMENT_BYTES * self.inventory.layout(unit).start if unit.section in IN_BLOCKS else 0
        return buffer[start : start + self.inventory.device_bytes(unit)]

    def _allocate_blocks(self) -> dict[tuple[int, Section], Tensor]:
        return {
            (unit.block, unit.section): self._backend.allocate(self.inventory.block_bytes(unit.block, unit.section))
            for section in IN_BLOCKS
            for unit in self.inventory.units(section)
            if unit.shard == 0 and self.placement.is_on_device(unit)
        }


def gather(backend: Backend, buffer: Tensor, pieces: Sequence[Tensor], after: Event) -> None:
    """Copy pieces (flat bytes on the device) one behind the other into a buffer of the host."""
    for part, piece in _parts(buffer, pieces):
        backend.to_host(part, piece, after)


def scatter(backend: Backend, buffer: Tensor, pieces: Sequence[Tensor], after: Event) -> None:
    """Copy pieces back from where `gather` has put them."""
    for part, piece in _parts(buffer, pieces):
        backend.to_device(piece, part, after)


def _parts(buffer: Tensor, pieces: Sequence[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield for each piece its part of the buffer, and the piece."""
    for place, piece in zip(packed(piece.numel() for piece in pieces), pieces, strict=True):
        yield buffer[place.start : place.stop], piece
