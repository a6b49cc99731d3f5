"""Which tier each unit gets under a way of training and a budget, and the bytes of it all. Pure.

Owns: filling dear tiers with what saves most there. Must not know: what computing takes (`ways.py`), the choice
between ways (`plan.py`).

What is pinned to a tier stays there for good. A cache that rotates would read as little, but it would rotate changed
state, and so write all of it in every step (docs/architecture.md).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property

from peer.memory.pages import padded
from peer.memory.placement import Placement, Slots, Tier
from peer.memory.planning.budgets import Budgets
from peer.memory.planning.simulate import Recomputation
from peer.memory.planning.ways import Needs, Row, Way, spread
from peer.memory.planning.workload import Phase, Trips, parts_of, total, trips
from peer.memory.units import APART, SLOTTED, Section, Unit
from protocol.layout import BlockKind

Thread = tuple[Tier, str]
"""A direction ("in", "out") of a tier."""


@dataclass(frozen=True, slots=True)
class Shortage:
    """Why a way does not fit: which tier lacks how many bytes."""

    tier: Tier
    missing_bytes: int


@dataclass(frozen=True, slots=True)
class Fit:
    """A way in which everything has its place."""

    way: Way
    placement: Placement
    recomputation: Recomputation
    bytes: Mapping[str, Row]
    """By what they are for."""

    def total_bytes(self, tier: Tier) -> int:
        return sum(row.get(tier, 0) for row in self.bytes.values())


@dataclass(frozen=True, slots=True)
class _Piece:
    """Units that go to the device together or not at all, and the bytes they take there."""

    units: tuple[Unit, ...]
    num_bytes: int
    is_table: bool


@dataclass(frozen=True)
class Fitting:
    """Fits ways into budgets. Holds what all of them have in common."""

    needs: Needs
    budgets: Budgets
    _trips: dict[tuple[int, Section, int], dict[Phase, Trips]] = field(default_factory=dict)
    _fits: dict[Hashable, Fit | Shortage] = field(default_factory=dict)

    def fit(self, way: Way) -> Fit | Shortage:
        """Give everything a place, or say what is missing."""
        key = (replace(way, order="both"), tuple(self._for_device(way)), tuple(self._for_host(way)))
        if key not in self._fits:
            # slots may turn out shorter than the longest block, if those are pinned: worth a try
            found = self._fitted(way, are_tables_pinned=True)
            self._fits[key] = found if isinstance(found, Fit) else self._fitted(way, are_tables_pinned=False)
        return self._fits[key]

    def copy_seconds(self, fit: Fit) -> dict[Phase, dict[Thread, float]]:
        """Return how long each direction of each tier copies in each phase of a step, at least about."""
        seconds: dict[Phase, dict[Thread, float]] = {phase: defaultdict(float) for phase in Phase}
        profile, sizes = self.needs.profile, self.needs.sizes
        for (tier, block, section), num_bytes in _streaming_bytes(fit, sizes).items():
            link = profile.link(tier)
            for phase, count in self._trips_of(block, section, fit.way.wave).items():
                seconds[phase][tier, "in"] += count.fetches * num_bytes / link.in_bytes_per_s
                seconds[phase][tier, "out"] += count.flushes * num_bytes / link.out_bytes_per_s
        for tier, num_bytes in self._waiting_bytes(fit).items():
            link = profile.link(tier)
            seconds[Phase.UP][tier, "out"] += num_bytes / link.out_bytes_per_s
            seconds[Phase.DOWN][tier, "in"] += num_bytes / link.in_bytes_per_s
        return seconds

    def first_bytes(self, fit: Fit) -> int:
        """Return what the drive takes before training can begin: all of the state that lives there, once."""
        found = _streaming_bytes(fit, self.needs.sizes).items()
        return sum(size for (tier, _, section), size in found if tier is Tier.NVME and section is not Section.GRADIENT)

    def round_bytes(self, fit: Fit) -> int:
        """Return what the drive takes in a round, at most; not less than `Pool.round_bytes`, which has to be left."""
        num_bytes = self._waiting_bytes(fit).get(Tier.NVME, 0)
        for (tier, block, section), size in _streaming_bytes(fit, self.needs.sizes).items():
            if tier is Tier.NVME:
                flushes = total(self._trips_of(block, section, fit.way.wave)).flushes
                num_bytes += size * max(flushes, 2 if section is Section.GRADIENT else 1)
        return num_bytes

    def _waiting_bytes(self, fit: Fit) -> dict[Tier, int]:
        """Return the bytes of a step's activations that wait in each tier."""
        share = self.needs.workload.microbatches / self.needs.in_flight(fit.way)
        return {tier: int(share * sum(map(padded, sizes))) for tier, sizes in self.needs.places(fit.way).items()}

    # -- filling ----------------------------------------------------------------------------------------

    def _fitted(self, way: Way, *, are_tables_pinned: bool) -> Fit | Shortage:
        recomputation, rows = self.needs.computing(way)
        homes: dict[Unit, Tier] = {}
        fixed_bytes = self._slots_bytes(way, are_tables_pinned=are_tables_pinned)
        fixed_bytes += sum(row.get(Tier.DEVICE, 0) for row in rows.values())
        left_bytes = self.budgets.device_bytes - fixed_bytes
        for section in self._sections(way):
            if section in way.whole:
                left_bytes -= sum(_pin(piece, homes) for piece in self._pieces[section])
            elif are_tables_pinned:
                left_bytes -= sum(_pin(piece, homes) for piece in self._pieces[section] if piece.is_table)
        if left_bytes < 0:
            return Shortage(Tier.DEVICE, -left_bytes)
        for section in self._for_device(way):
            for piece in self._pieces[section]:
                if piece.num_bytes <= left_bytes and piece.units[0] not in homes:
                    left_bytes -= _pin(piece, homes)
        host_bytes = self.budgets.host_bytes - rows["activations"][Tier.HOST]
        rest = self._rest(way, homes, host_bytes - self.needs.staging_bytes(way, homes))
        if Tier.NVME in rest.values():
            rest = self._rest(way, homes, host_bytes - self.needs.staging_bytes(way, rest))
        return self._finished(way, homes | rest, recomputation, rows)

    def _rest(self, way: Way, homes: Mapping[Unit, Tier], host_bytes: int) -> dict[Unit, Tier]:
        """Give units that are not on the device a place in host memory as long as there is room, else on the drive."""
        rest: dict[Unit, Tier] = {}
        sizes = self.needs.sizes
        for section in self._for_host(way):
            for unit in self._spread_units[section]:
                if unit not in homes:
                    is_in_host = sizes[unit] <= host_bytes
                    rest[unit] = Tier.HOST if is_in_host else Tier.NVME
                    host_bytes -= sizes[unit] * is_in_host
        return rest

    def _finished(
        self, way: Way, homes: Mapping[Unit, Tier], recomputation: Recomputation, rows: dict[str, Row]
    ) -> Fit | Shortage:
        """Count everything, and compare it with the budgets."""
        counts, slots_bytes = {}, 0
        for section in SLOTTED:
            streaming = [piece for piece in self._pieces[section] if homes.get(piece.units[0]) is not Tier.DEVICE]
            counts[section.value] = self._num_slots(way, section, len(streaming))
            slots_bytes += counts[section.value] * max((piece.num_bytes for piece in streaming), default=0)
        for section in (*SLOTTED, *self._apart):
            rows[section.value] = dict.fromkeys(Tier, 0)
        for unit, tier in homes.items():
            size = self.needs.device_sizes[unit] if tier is Tier.DEVICE else self.needs.sizes[unit]
            rows[unit.section.value][tier] += size
        rows["slots"] = {Tier.DEVICE: slots_bytes}
        rows["staging"] = {Tier.HOST: self.needs.staging_bytes(way, homes)}
        known_bytes = sum(row.get(Tier.NVME, 0) for row in rows.values())
        rows["copies"] = {Tier.NVME: self.needs.stored_bytes(way, homes) - known_bytes}
        fit = Fit(way, Placement(homes=homes, slots=Slots(**counts)), recomputation, rows)
        for tier in (Tier.NVME, Tier.HOST, Tier.DEVICE):
            missing_bytes = fit.total_bytes(tier) - self.budgets.of(tier)
            if missing_bytes > 0:
                return Shortage(tier, missing_bytes)
        return fit

    def _slots_bytes(self, way: Way, *, are_tables_pinned: bool) -> int:
        """Return what slots take: those of all sections that are not on the device entirely."""
        total_bytes = 0
        for section in SLOTTED:
            has_home = section in self._sections(way)  # a gradient without one needs its slot for tables as well
            if section not in way.whole or not has_home:
                are_pinned = are_tables_pinned and has_home
                streaming = [p.num_bytes for p in self._pieces[section] if not (are_pinned and p.is_table)]
                total_bytes += self._num_slots(way, section, len(streaming)) * max(streaming)
        return total_bytes

    def _num_slots(self, way: Way, section: Section, num_streaming: int) -> int:
        if section not in self._sections(way):
            return 1  # nothing travels, so one serves all
        return min(way.slots.of(section), num_streaming)

    # -- what goes first --------------------------------------------------------------------------------

    def _sections(self, way: Way) -> tuple[Section, ...]:
        """Return the sections that have homes."""
        if self.needs.workload.keeps_sums(way.wave):
            return (*SLOTTED, *self._apart)
        return (Section.WEIGHTS, Section.MOMENTS, *self._apart)

    def _for_device(self, way: Way) -> list[Section]:
        return self._by_density(way, Tier.HOST if self.budgets.host_bytes else Tier.NVME, onto_device=True)

    def _for_host(self, way: Way) -> list[Section]:
        return self._by_density(way, Tier.NVME, onto_device=False)

    def _by_density(self, way: Way, instead: Tier, *, onto_device: bool) -> list[Section]:
        """Return the sections with homes, those first that save most copying from `instead` per byte that they take."""
        if instead is Tier.NVME and self.needs.profile.nvme is None:
            return list(self._sections(way))
        link, block = self.needs.profile.link(instead), parts_of(self.needs.inventory).body[0]

        def saved_s(section: Section) -> float:
            count = total(self._trips_of(block, section, way.wave))
            unit = Unit(block, section, 0)
            share = self.needs.sizes[unit] / self.needs.device_sizes[unit] if onto_device else 1.0
            saved_in_s, saved_out_s = count.fetches / link.in_bytes_per_s, count.flushes / link.out_bytes_per_s
            return share * {"both": saved_in_s + saved_out_s, "in": saved_in_s, "out": saved_out_s}[way.order]

        return sorted(self._sections(way), key=saved_s, reverse=True)

    def _trips_of(self, block: int, section: Section, wave: int) -> dict[Phase, Trips]:
        key = (block, section, wave)
        if key not in self._trips:
            self._trips[key] = trips(self.needs.inventory, block, section, self.needs.workload, wave)
        return self._trips[key]

    @cached_property
    def _pieces(self) -> Mapping[Section, list[_Piece]]:
        """What of each section goes to the device in one piece, in the order of going.

        Layers are spread, so that between two that stream there are some that do not.
        """
        blocks = self.needs.inventory.blocks
        layers = [index for index, block in enumerate(blocks) if block.kind is BlockKind.LAYER]
        others = [index for index, block in enumerate(blocks) if block.kind is not BlockKind.LAYER]

        def piece(*units: Unit) -> _Piece:
            is_table = blocks[units[0].block].kind is not BlockKind.LAYER
            return _Piece(units, sum(self.needs.device_sizes[unit] for unit in units), is_table)

        pieces = {
            section: [piece(*self.needs.inventory.block_units(block, section)) for block in (*others, *spread(layers))]
            for section in (Section.WEIGHTS, Section.GRADIENT)
        }
        alone = (Section.MOMENTS, *self._apart)
        return pieces | {section: [piece(unit) for unit in self._spread_units[section]] for section in alone}

    @cached_property
    def _apart(self) -> tuple[Section, ...]:
        """The sections that this run has besides those that computing needs."""
        return tuple(section for section in APART if self._spread_units[section])

    @cached_property
    def _spread_units(self) -> Mapping[Section, list[Unit]]:
        return {section: spread(self.needs.inventory.units(section)) for section in Section}


def _streaming_bytes(fit: Fit, sizes: Mapping[Unit, int]) -> Mapping[tuple[Tier, int, Section], int]:
    """Return the bytes that live elsewhere, by tier, block and section."""
    num_bytes: dict[tuple[Tier, int, Section], int] = defaultdict(int)
    for unit, tier in fit.placement.homes.items():
        if tier is not Tier.DEVICE:
            num_bytes[tier, unit.block, unit.section] += sizes[unit]
    return num_bytes


def _pin(piece: _Piece, homes: dict[Unit, Tier]) -> int:
    homes.update(dict.fromkeys(piece.units, Tier.DEVICE))
    return piece.num_bytes
