"""Decide how a peer's span trains within its budgets: what lives where, how large a wave is, what is computed twice.

Owns: `Plan`, what it predicts, and the choice between ways of training. Must not know: torch, how a plan looks
(`plan_report.py`), how bytes are counted and tiers are filled (`fit.py`), what an operation costs (`simulate.py`).

For every size of wave some tens of ways are fitted into the budgets and ranked by the longest of what has to run in
parallel - computing, and copying in each direction of each tier. The best few are simulated, operation by operation.
The smallest wave that is about as fast as the fastest one wins: microbatches come from neighbours who wait.
Among equals, what writes less to the drive wins: drives wear out.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice, product

from peer.memory.placement import Placement, Slots, Tier
from peer.memory.planning.budgets import Budgets
from peer.memory.planning.fit import Fit, Fitting, Shortage, Thread
from peer.memory.planning.profile import Profile
from peer.memory.planning.simulate import Recomputation, Simulated, recomputed_s, simulate_step
from peer.memory.planning.ways import STREAMING_SLOTS, Needs, Order, Row, Way
from peer.memory.planning.workload import Mode, Phase, Workload, parts_of
from peer.memory.segments import Segment, segments_of
from peer.memory.units import SLOTTED, Inventory
from protocol.errors import ConfigError
from protocol.layout import BlockKind
from protocol.sizes import size_text

DAY_S = 86_400
RATED_BYTES = 600e12  # what a drive of 1 TB is warranted for; consumer drives range about this (Samsung, WD, 2020-2025)
MIN_LIFE_DAYS = 365
UNLIMITED_BYTES = 1 << 60

TOLERANCE = 0.02
"""A smaller wave may be slower by this much and still be taken; a profile is not more exact than that."""
COVERED = 0.01
"""Waiting for less than this share of a step counts as not waiting."""
WORTH_A_SLOT = 0.005
"""Another slot has to save this share of a step."""
WORTH_A_SPILL = 0.01
"""Another eighth of the graphs in another tier, this one."""
EIGHTHS = 8
"""Parts of all segments by which more graphs are kept or spilled."""
MORE_WEAR = 0.1
"""A smaller wave may write this much more to the drive than another that is about as fast."""
WEAR_WEIGHT = 3.0
"""By how much a second of writing to a drive counts for more than one of any other copy, where time is about equal."""
NUM_SIMULATED = 4
"""Ways per size of wave that are simulated."""
FEW_ROUNDS = 10
"""Fewer rounds than these on a day, as the drive's budget would have it, are warned of."""

_WHOLE = tuple(
    frozenset(section for section, is_in in zip(SLOTTED, mask, strict=True) if is_in)
    for mask in product((False, True), repeat=len(SLOTTED))
)
SPILLING = (Tier.HOST, Tier.NVME)
"""Where graphs may wait, the nearest first."""

_ORDERS: tuple[Order, ...] = ("both", "in", "out")


@dataclass(frozen=True, slots=True)
class Activation:
    """What a block of the body leaves behind for its backward pass."""

    graphs: tuple[Tier | None, ...]
    """By segment, where what its autograd graph has saved waits. None: nothing is saved, and it is computed twice."""
    inputs: Tier
    """Where the input of what is computed twice waits."""

    @property
    def is_recomputed(self) -> bool:
        """Whether any of it is computed twice."""
        return None in self.graphs


@dataclass(frozen=True, slots=True, kw_only=True)
class Prediction:
    """What one optimizer step will take."""

    step_s: float
    """As long as neighbours deliver in time, and no daily budget is used up."""
    compute_s: float
    stall_s: float
    """Waiting for copies."""
    slowed_s: float
    """Computing lost to copies beside it."""
    read_bytes: Mapping[Tier, int]
    written_bytes: Mapping[Tier, int]
    peak_bytes: Mapping[Tier, int]
    process_bytes: int
    """What the operating system will show for the process at most: its libraries, and what is in the host's memory."""
    nvme_written_per_day_bytes: int
    tokens_per_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """How a span trains."""

    inventory: Inventory
    profile: Profile
    budgets: Budgets
    workload: Workload
    placement: Placement
    activations: Mapping[int, Activation]
    """Of the blocks of the body."""
    wave: int
    """Microbatches that go through a block together."""
    in_flight: int
    """Microbatches between their forward and backward pass for which room is kept."""
    keep_bytes: int
    """What kept graphs may take, of all microbatches in flight."""
    places: Mapping[Tier, Sequence[int]]
    """The sizes of the places for activations outside the device."""
    bytes: Mapping[str, Row]
    """What every tier is used for."""
    prediction: Prediction
    warnings: tuple[str, ...] = ()

    @property
    def kept(self) -> frozenset[Segment]:
        """The segments whose graphs stay on the device."""
        return frozenset(segment for segment, tier in self._graphs() if tier is Tier.DEVICE)

    @property
    def spilled(self) -> dict[Segment, Tier]:
        """The segments whose graphs wait in another tier."""
        return {segment: tier for segment, tier in self._graphs() if tier is not None and tier is not Tier.DEVICE}

    @property
    def parked(self) -> dict[int, Tier]:
        """The blocks whose inputs wait in another tier."""
        return {
            block: activation.inputs
            for block, activation in self.activations.items()
            if activation.is_recomputed and activation.inputs is not Tier.DEVICE
        }

    def _graphs(self) -> Iterator[tuple[Segment, Tier | None]]:
        for block, activation in self.activations.items():
            for part, tier in enumerate(activation.graphs):
                yield Segment(block, part), tier


def plan(inventory: Inventory, profile: Profile, budgets: Budgets, workload: Workload) -> Plan:
    """Return the best plan within the budgets. Raises `ConfigError`, saying what is missing, if there is none."""
    if profile.nvme is None:
        budgets = replace(budgets, nvme_bytes=0)
    search = _Search(Fitting(Needs(inventory, profile, workload), budgets))
    best = search.best()
    if best is None:
        raise _unaffordable(search.fitting) or _refusal(inventory, profile, budgets, workload)
    return _plan(search, best)


@dataclass(frozen=True, slots=True)
class _Priced:
    fit: Fit
    simulated: Simulated
    seconds: float
    """Of a step, on the average of a day on which the drive's budget may be used up."""

    @property
    def nvme_written_bytes(self) -> int:
        return self.simulated.written_bytes(Tier.NVME)


@dataclass(frozen=True, slots=True)
class _Search:
    fitting: Fitting

    def best(self) -> _Priced | None:
        """Return the best way with as many waves in flight as the pipeline wants, or else as fit."""
        for waves_in_flight in range(self.fitting.needs.workload.stages_behind + 1, 0, -1):
            found: list[_Priced] = []
            for wave in self._waves():
                # once copies are covered, a larger wave only takes room; but it may spare gradients their home
                if found and _is_covered(found[-1].simulated) and self.fitting.needs.workload.keeps_sums(wave):
                    continue
                priced = self._best_of(wave, waves_in_flight)
                if priced is not None:
                    found.append(priced)
            if found:
                limit_s = min(priced.seconds for priced in found) * (1 + TOLERANCE)
                found = [priced for priced in found if priced.seconds <= limit_s]
                limit_bytes = min(priced.nvme_written_bytes for priced in found) * (1 + MORE_WEAR)
                return next(priced for priced in found if priced.nvme_written_bytes <= limit_bytes)
        return None

    def _waves(self) -> list[int]:
        most = self.fitting.needs.workload.microbatches
        return sorted({most, *(1 << power for power in range(most.bit_length()) if 1 << power < most)})

    def _best_of(self, wave: int, waves_in_flight: int) -> _Priced | None:
        """Return the best way with waves of a size."""
        fits: dict[int, Fit] = {}
        for way in self._ways(wave, waves_in_flight):
            fit = self.fitting.fit(way)
            if isinstance(fit, Fit) and self._may_begin(fit):
                fits.setdefault(id(fit), fit)  # the same one for ways that differ in nothing that matters
        ranked = sorted(fits.values(), key=self._estimate)  # stable, so that equals stay in the order of trying
        in_time = (fit for fit in ranked if wave == 1 or not self.is_late(fit))
        priced = [each for fit in islice(in_time, NUM_SIMULATED) if (each := self._price(fit)) is not None]
        if not priced:
            return None
        best = self._with_spilled_graphs(self._with_more_slots(_gentlest(priced)))
        keeping_none = next((fit for fit in ranked if not fit.way.kept and not self.is_late(fit)), None)
        if keeping_none is None or not best.fit.way.kept or not any(map(self._may_be_used, SPILLING)):
            return best
        start = self._price(keeping_none)
        return best if start is None else _gentlest([best, self._with_spilled_graphs(start)])

    def _ways(self, wave: int, waves_in_flight: int) -> Iterator[Way]:
        num_segments = len(self.fitting.needs.preferred)
        tiers = [Tier.DEVICE, *filter(self._may_wait_in, (Tier.HOST, Tier.NVME))]
        for kept, inputs, whole, order in product(_eighths(num_segments), tiers, _WHOLE, _ORDERS):
            if kept == num_segments and inputs is not Tier.DEVICE:
                continue
            if len(whole) == len(SLOTTED) and order != _ORDERS[0]:
                continue
            yield Way(wave=wave, waves_in_flight=waves_in_flight, kept=kept, inputs=inputs, whole=whole, order=order)

    def is_late(self, fit: Fit) -> bool:
        """Tell whether a wave takes longer up or down than rounds wait for it."""
        limit_s = self.fitting.needs.workload.longest_pass_s
        if limit_s is None:
            return False
        longest_s = self._longest_s(fit, self.fitting.copy_seconds(fit))
        num_waves = len(self.fitting.needs.workload.waves(fit.way.wave))
        return max(longest_s[Phase.UP], longest_s[Phase.DOWN]) / num_waves > limit_s

    def _may_begin(self, fit: Fit) -> bool:
        """Tell whether the drive's daily budget lets training begin at all: with the first contents, and a round."""
        cap = self.fitting.budgets.nvme_writes_per_day_bytes
        return cap is None or _first_day_bytes(self.fitting, fit) <= cap

    def _estimate(self, fit: Fit) -> tuple[float, float]:
        """Return the longest of what has to run in parallel in each phase, and for the choice among equals all copying.

        Estimates that differ by less than the tolerance count as equal, and writing to a drive as dear: it wears out.
        """
        copies_s = self.fitting.copy_seconds(fit)
        written_s = sum(phase.get((Tier.NVME, "out"), 0.0) for phase in copies_s.values())
        written_bytes = written_s * self.fitting.needs.profile.link(Tier.NVME).out_bytes_per_s if written_s else 0.0
        longest_s = max(sum(self._longest_s(fit, copies_s).values()), self._throttled_s(written_bytes))
        about = math.ceil(math.log(longest_s) / math.log1p(TOLERANCE)) if longest_s else 0
        return about, sum(sum(phase.values()) for phase in copies_s.values()) + WEAR_WEIGHT * written_s

    def _longest_s(self, fit: Fit, copies_s: Mapping[Phase, Mapping[Thread, float]]) -> dict[Phase, float]:
        """Return the longest of what has to run in parallel in each phase of a step."""
        compute_s = self._compute_s(fit.recomputation)
        return {phase: max(compute_s[phase], *copies_s[phase].values(), 0.0) for phase in Phase}

    def _compute_s(self, recomputation: Recomputation) -> dict[Phase, float]:
        """Return how long each phase of a step computes."""
        needs = self.fitting.needs
        head, optimizer = parts_of(needs.inventory).head, needs.inventory.optimizer
        seconds = dict.fromkeys(Phase, 0.0)
        step = Phase.DOWN if needs.workload.mode is Mode.LOCAL else Phase.STEP
        for index, block in enumerate(needs.inventory.blocks):
            forward_s, backward_s = needs.profile.forward_s(block), needs.profile.backward_s(block)
            if index not in head or len(head) > 1:
                seconds[Phase.UP] += needs.workload.microbatches * forward_s
            again_s = recomputed_s(needs.profile, recomputation, index, block)
            seconds[Phase.DOWN] += needs.workload.microbatches * (backward_s + again_s)
            seconds[step] += sum(needs.profile.step_s(shard, optimizer) for shard in needs.inventory.shards[index])
        return seconds

    def _may_wait_in(self, tier: Tier) -> bool:
        """Tell whether blocks' inputs may wait in a tier.

        Only if they leave as fast as they are made: nothing holds a forward pass back, so they would pile up. And a
        drive wears out, so it is not used for that unless the user has said how much may be written.
        """
        profile = self.fitting.needs.profile
        if not self._may_be_used(tier):
            return False
        layer = next(block for block in self.fitting.needs.inventory.blocks if block.kind is BlockKind.LAYER)
        return profile.entry_bytes / profile.link(tier).out_bytes_per_s <= profile.forward_s(layer)

    def _may_be_used(self, tier: Tier) -> bool:
        budgets = self.fitting.budgets
        return budgets.of(tier) > 0 and (tier is not Tier.NVME or budgets.nvme_writes_per_day_bytes is not None)

    def _price(self, fit: Fit) -> _Priced | None:
        """Simulate a way; None if it would spill activations beyond the drive's daily budget."""
        simulated = simulate_step(
            self.fitting.needs.inventory,
            fit.placement,
            self.fitting.needs.profile,
            self.fitting.needs.workload,
            wave=fit.way.wave,
            recomputation=fit.recomputation,
        )
        throttled_s = self._throttled_s(simulated.written_bytes(Tier.NVME))
        is_spilling = Tier.NVME in self.fitting.needs.places(fit.way)
        if is_spilling and throttled_s > simulated.seconds:
            return None
        return _Priced(fit, simulated, max(simulated.seconds, throttled_s))

    def _try(self, way: Way) -> _Priced | None:
        """Price a way; None if it does not fit, or may not be gone."""
        fit = self.fitting.fit(way)
        return self._price(fit) if isinstance(fit, Fit) and self._may_begin(fit) else None

    def _with_more_slots(self, best: _Priced) -> _Priced:
        """Add slots, which cost pins, as long as they save time."""
        if _is_covered(best.simulated):
            return best
        for slots in (
            replace(STREAMING_SLOTS, moments=3),
            replace(STREAMING_SLOTS, weights=3, moments=3),
            Slots(weights=3, gradient=3, moments=3),
        ):
            priced = self._try(replace(best.fit.way, slots=slots))
            if priced is not None and priced.seconds < best.seconds * (1 - WORTH_A_SLOT):
                best = priced
        return best

    def _with_spilled_graphs(self, best: _Priced) -> _Priced:
        """Let more and more graphs wait in other tiers, where they are not computed twice, as long as it saves time.

        Whether bringing one back is faster than making it again depends on the card, the link, and on how much of the
        link weights leave idle (LoHan, arXiv 2403.06504): so a step is simulated each time.

        It only adds to what a way keeps on the device. Where that took room that weights would need, spilling instead
        may be better, so it is tried from a way that keeps nothing as well.
        """
        start, num_left = best, len(self.fitting.needs.preferred) - best.fit.way.kept
        for tier in filter(self._may_be_used, SPILLING):
            for spilled in _eighths(num_left)[1:]:
                priced = self._try(replace(start.fit.way, spilled=spilled, spill=tier))
                if priced is None or priced.seconds >= best.seconds * (1 - WORTH_A_SPILL):
                    break
                best = priced
        return best

    def _throttled_s(self, nvme_written_bytes: float) -> float:
        """Return how long a step takes on average if the drive's daily budget decides."""
        cap = self.fitting.budgets.nvme_writes_per_day_bytes
        if cap is None or not nvme_written_bytes:
            return 0.0
        return nvme_written_bytes * DAY_S / cap if cap else float("inf")


def _eighths(number: int) -> list[int]:
    """Return counts from nothing to all, in steps of about an eighth."""
    return sorted({number * eighths // EIGHTHS for eighths in range(EIGHTHS + 1)})


def _first_day_bytes(fitting: Fitting, fit: Fit) -> int:
    """Return what a drive has to take on one day, or the peer pauses every day and never trains."""
    round_bytes = fitting.round_bytes(fit)
    return fitting.first_bytes(fit) + round_bytes if round_bytes else 0


def _is_covered(simulated: Simulated) -> bool:
    return simulated.stall_s <= COVERED * simulated.seconds


def _gentlest(priced: list[_Priced]) -> _Priced:
    """Return the way that writes least to the drive, of those that are about as fast as the fastest."""
    limit_s = min(each.seconds for each in priced) * (1 + TOLERANCE)
    about_as_fast = (each for each in priced if each.seconds <= limit_s)
    return min(about_as_fast, key=lambda each: (each.nvme_written_bytes, each.seconds))


# -- the result ---------------------------------------------------------------------------------------


def _plan(search: _Search, best: _Priced) -> Plan:
    fitting = search.fitting
    fit, simulated, needs = best.fit, best.simulated, fitting.needs
    profile = needs.profile
    peak_bytes = {tier: fit.total_bytes(tier) for tier in Tier}
    written_per_day_bytes = int(simulated.written_bytes(Tier.NVME) * DAY_S / simulated.seconds)
    on_host_bytes = peak_bytes[Tier.HOST] + (peak_bytes[Tier.DEVICE] if profile.is_host_memory else 0)
    streaming = [tier for tier in Tier if tier is not Tier.DEVICE]
    prediction = Prediction(
        step_s=simulated.seconds,
        compute_s=simulated.compute_s,
        stall_s=simulated.stall_s,
        slowed_s=simulated.slowed_s,
        read_bytes={tier: simulated.read_bytes(tier) for tier in streaming},
        written_bytes={tier: simulated.written_bytes(tier) for tier in streaming},
        peak_bytes=peak_bytes,
        process_bytes=profile.process_bytes + on_host_bytes,
        nvme_written_per_day_bytes=written_per_day_bytes,
        tokens_per_s=needs.workload.microbatches * profile.num_tokens / best.seconds,
    )
    return Plan(
        inventory=needs.inventory,
        profile=profile,
        budgets=fitting.budgets,
        workload=needs.workload,
        placement=fit.placement,
        activations={block: _activation(fit, needs.inventory, block) for block in parts_of(needs.inventory).body},
        wave=fit.way.wave,
        in_flight=needs.in_flight(fit.way),
        keep_bytes=needs.graph_bytes(fit.way),
        places=needs.places(fit.way),
        bytes=fit.bytes,
        prediction=prediction,
        warnings=tuple(_warnings(search, fit, prediction)),
    )


def _activation(fit: Fit, inventory: Inventory, block: int) -> Activation:
    recomputation = fit.recomputation
    graphs = (
        Tier.DEVICE if segment in recomputation.kept else recomputation.spilled.get(segment)
        for segment in segments_of(block, inventory.blocks[block].kind)
    )
    return Activation(tuple(graphs), fit.way.inputs)


def _warnings(search: _Search, fit: Fit, prediction: Prediction) -> Iterator[str]:
    fitting = search.fitting
    if search.is_late(fit):
        yield (
            "even one microbatch takes longer through this span than rounds wait for one: what is under way when a "
            "round closes will be lost. Take fewer stages."
        )
    cap = fitting.budgets.nvme_writes_per_day_bytes
    written = prediction.nvme_written_per_day_bytes
    if cap is not None and written > cap:
        yield (
            f"training would write {written / 1e9:,.0f} GB a day to the drive and {cap / 1e9:,.0f} GB are allowed: "
            f"it will stand still for {24 * (1 - cap / written):.1f} hours of the day."
        )
        round_bytes = fitting.round_bytes(fit)
        if cap < FEW_ROUNDS * round_bytes:
            yield (
                f"the {size_text(cap)} that may be written to the drive in a day are enough for "
                f"{cap / round_bytes:.1f} rounds."
            )
    elif cap is None and written * MIN_LIFE_DAYS > RATED_BYTES:
        yield (
            f"training would write {written / 1e9:,.0f} GB a day to the drive: one that is rated for 600 TB "
            f"would be worn out in {RATED_BYTES / written:,.0f} days. Set a limit per day."
        )
    wanted = fitting.needs.workload.stages_behind + 1
    if fit.way.waves_in_flight < wanted:
        yield (
            f"there is room for {fit.way.waves_in_flight} of {wanted} waves in flight: "
            "this peer will wait for the stages behind it."
        )


def _unaffordable(fitting: Fitting) -> ConfigError | None:
    """Say what the drive's daily budget would have to be, if that is what stands in the way."""
    cap = fitting.budgets.nvme_writes_per_day_bytes
    if cap is None:
        return None
    uncapped = replace(fitting, budgets=replace(fitting.budgets, nvme_writes_per_day_bytes=None), _fits={})
    best = _Search(uncapped).best()
    if best is None:
        return None
    needed_bytes = _first_day_bytes(uncapped, best.fit)
    enough = size_text(1.05 * needed_bytes)  # sizes are written with one decimal
    return ConfigError(
        f"this span writes {size_text(needed_bytes)} to the drive before its first round is over, and "
        f"{size_text(cap)} a day are allowed: it would never train.",
        hint=f"Allow {enough} with --nvme-writes-per-day, or more memory, or take fewer stages.",
    )


def _refusal(inventory: Inventory, profile: Profile, budgets: Budgets, workload: Workload) -> ConfigError:
    """Say what of which memory would have made room for the most frugal way."""
    needs = Needs(inventory, profile, workload)

    def lacking(**unlimited: int) -> Fit | Shortage:
        fitting = Fitting(needs, replace(budgets, **unlimited))
        ways = [Way(wave=wave, inputs=tier) for wave in (1, workload.microbatches) for tier in (Tier.DEVICE, Tier.HOST)]
        found = [fitting.fit(way) for way in ways]
        fits = [fit for fit in found if isinstance(fit, Fit)]
        if fits:
            return min(fits, key=lambda fit: (fit.total_bytes(Tier.HOST), fit.total_bytes(Tier.NVME)))
        shortages = (each for each in found if isinstance(each, Shortage))
        return min(shortages, key=lambda each: (each.tier is Tier.DEVICE, each.missing_bytes))

    with_host = lacking(host_bytes=UNLIMITED_BYTES)
    if isinstance(with_host, Shortage):
        needed = size_text(budgets.device_bytes + with_host.missing_bytes)
        return ConfigError(
            f"this span needs {needed} of device memory even if everything else lives elsewhere, "
            f"and {size_text(budgets.device_bytes)} are allowed.",
            hint=f"Allow {size_text(with_host.missing_bytes)} more, or take smaller microbatches or fewer layers.",
        )
    host_bytes = with_host.total_bytes(Tier.HOST) - budgets.host_bytes
    ways_out = []
    if not budgets.nvme_bytes:
        ways_out.append("a folder on an NVMe drive")
    else:
        with_drive = lacking(nvme_bytes=UNLIMITED_BYTES)
        if isinstance(with_drive, Fit):
            ways_out.append(f"{size_text(with_drive.total_bytes(Tier.NVME) - budgets.nvme_bytes)} more on the drive")
        else:  # the drive needs some host memory to work with
            host_bytes = min(host_bytes, with_drive.missing_bytes)
    ways_out.insert(0, f"{size_text(host_bytes)} more of host memory")
    return ConfigError(
        f"this span does not fit: with all that is not on the device in host memory, it would take "
        f"{size_text(with_host.total_bytes(Tier.HOST))} there.",
        hint=f"Allow {' or '.join(ways_out)}, or take fewer stages.",
    )
