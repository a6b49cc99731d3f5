"""The anchor of a stage that is trained by local steps: what its replicas agree on, and how far one has gone from it.

Owns: anchor, velocity, error and sync point of every shard, their arithmetic when a round ends, the hash of what is
shared. Must not know: codecs, who takes part, what agreed on the mean (`peer/averaging/` does), where buffers live.

Between two rounds a replica's weights move away from the anchor by local steps (`peer/engine/outer.py` has the idea).
A *turn* ends a round. In it, in this order and shard by shard:

    contribution C = E + (A - S)          what was to be averaged since the turn before
    A, V    <- outer step by the mean of all contributions
    E       <- C - what the codec has sent of it        error feedback (arXiv 1809.07599)
    W       <- A + (W - S)                              our steps since then stay on top of the new anchor
    S       <- W                                        from now on: the next contribution

with anchor A, velocity V, error E, sync point S, weights W. Without a mean (none was agreed on, or it is still on its
way) only the last line happens, and the next contribution has our drift of both rounds. So nothing has to be taken back
after a round that came to nothing. If a mean was agreed on without us, E stays, and our drift of that round is lost.

When averaging waits (no overlap) the turn with the mean comes right after one without: W is S then, and becomes A.

A mean may be that of some shards only, a fragment (`protocol/fragments.py`): then only these are turned, and the drift
of the others grows on. The last line is all that happens to those that will be averaged next.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from peer.engine.optimizer import AdamW
from peer.engine.outer import OuterSpec, outer_step
from peer.engine.passes import ShardPass
from peer.engine.state import shard_digest, state_digest
from peer.engine.statefiles import StateReader, StateWriter
from peer.memory.executor import Executor
from peer.memory.schedule import Kind, shard_visits
from peer.memory.units import ELEMENT_BYTES, OUTER, Section, Unit
from peer.model.stage import Stage
from protocol.fragments import Fragments
from protocol.ids import Digest, RoundId, Version
from protocol.layout import ShardLayout


@dataclass(frozen=True, slots=True)
class Mean:
    """What a group has agreed on."""

    pieces: Callable[[int], Iterable[tuple[slice, Tensor]]]
    """The mean drift of the stage's shard with this number: ranges of it in order, and their values, flat fp32."""
    not_sent: Callable[[Tensor], Tensor] | None
    """What our codec did not send of one of these pieces of our contribution; None if we are not in the mean."""
    shards: tuple[int, ...] | None = None
    """The numbers of the shards that have been averaged; None: all of them."""


class Anchored:
    """Anchor and drift of one stage. Synchronous; what is no pass may be called from any thread."""

    def __init__(
        self, stage: Stage, memory: Executor, optimizer: AdamW, spec: OuterSpec, *, first_block: int = 0
    ) -> None:
        self._stage, self._memory, self._optimizer, self._spec = stage, memory, optimizer, spec
        self._first = first_block
        self._blocks = range(first_block, first_block + len(stage.blocks))
        self._units = [unit for block in self._blocks for unit in memory.pool.inventory.block_units(block, OUTER[0])]
        self._layouts = [memory.pool.inventory.layout(unit) for unit in self._units]
        self._fragments = Fragments(stage.layouts, spec.fragments, last_round=spec.last_round)
        self._digests: list[Digest | None] = [None] * len(self._units)
        """Of every shard's anchor and velocity, as far as they are known."""
        self._scratch: Tensor | None = None
        self._has_moved = self._has_contributed = False
        """Whether local steps were taken since the last turn, and whether that left what they did as a contribution."""

    def begin(self) -> None:
        """Take the present weights for the anchor, and forget what was before."""

        def start(number: int, weights: Tensor, _layout: ShardLayout) -> None:
            self._start(number, weights, torch.zeros_like(weights))

        self._forget()
        self._run(Kind.READ, start, puts=OUTER)

    def forget_drift(self, *, and_error: bool = False) -> None:
        """Go back to the anchor: what was learnt since does not count. The error stays to be sent, or goes as well."""

        def go_back(number: int, weights: Tensor, _layout: ShardLayout) -> None:
            weights.copy_(self._look(Section.ANCHOR, number))
            self._put(Section.SYNC, number, weights)
            if and_error:
                self._put(Section.ERROR, number, torch.zeros_like(weights))

        self._has_moved = self._has_contributed = False
        self._run(Kind.MERGE, go_back, puts=(Section.SYNC, Section.ERROR) if and_error else (Section.SYNC,))

    @property
    def has_drift(self) -> bool:
        """Tell whether local steps were taken that no turn with a mean has come after.

        What drifts on until its fragment's turn comes does not count: it belongs to a later contribution.
        """
        return self._has_moved or self._has_contributed

    @property
    def has_contribution(self) -> bool:
        """Tell whether what `contribution` returns was left by a turn of ours, and no mean has come since."""
        return self._has_contributed

    @property
    def is_at_anchor(self) -> bool:
        """Tell whether the weights are the anchor. With fragments some always drift on."""
        return not self.has_drift and self._spec.fragments == 1

    def note_step(self) -> None:
        """Take note that the weights have moved."""
        self._has_moved = True

    def contribution(self, number: int) -> Tensor:
        """Return what shard `number` has to contribute, flat fp32. Holds until the next turn."""
        anchor, error, sync = (self._look(section, number) for section in (Section.ANCHOR, Section.ERROR, Section.SYNC))
        return (anchor - sync).add_(error)

    def due(self, version: Version, round_id: RoundId) -> tuple[int, ...]:
        """Return the shards that the mean has which leads to a version, after a round."""
        return self._fragments.due(version, round_id)

    def turn(self, mean: Mean | None, *, local_step: int, sync: Collection[int] | None = None) -> None:
        """End a round, with the mean of the contributions of the turn before if there is one.

        `local_step` is the number of the next step that the optimizer will take. `sync` names the shards that may be
        contributed before the turn after this one; None: all.
        """
        shards = range(len(self._units))
        merged = () if mean is None else shards if mean.shards is None else mean.shards

        def merge(number: int, weights: Tensor, layout: ShardLayout) -> None:
            assert mean is not None
            self._digests[number] = self._merge(number, weights, layout, mean)
            self._put(Section.SYNC, number, weights)

        if mean is None:
            self._has_moved, self._has_contributed = False, self._has_contributed or self._has_moved
        else:
            if not self._has_contributed:  # it is of a contribution that an earlier life of this peer has made
                mean = replace(mean, not_sent=None)
            for number in merged:
                self._digests[number] = None
            self._has_moved, self._has_contributed = False, self._has_moved
            self._run(Kind.MERGE, merge, local_step=local_step, puts=OUTER, shards=merged)
        left = [number for number in (shards if sync is None else sync) if number not in set(merged)]
        if left:
            self._run(
                Kind.READ,
                lambda number, weights, _layout: self._put(Section.SYNC, number, weights),
                puts=(Section.SYNC,),
                shards=left,
            )

    def block_weights(self, block: int) -> Tensor:
        """Return a copy of the anchor's weights of a block of the memory, flat fp32 on the device, until the next one.

        All blocks get the same buffer in turn: they would hold on to buffers of their own.
        """
        inventory = self._memory.pool.inventory
        if self._scratch is None:
            longest = max(inventory.block_bytes(each, Section.WEIGHTS) for each in self._blocks)
            self._scratch = torch.empty(longest // ELEMENT_BYTES, device=self._stage.device)
        copy = self._scratch[: inventory.block_bytes(block, Section.WEIGHTS) // ELEMENT_BYTES]
        for number, (unit, layout) in enumerate(zip(self._units, self._layouts, strict=True)):
            if unit.block == block:
                copy[layout.start : layout.stop].copy_(self._look(Section.ANCHOR, number))
        return copy

    def digest(self) -> Digest:
        """Hash what is shared: anchor and velocity."""
        known = [
            shard_digest(self._look(Section.ANCHOR, number), self._look(Section.VELOCITY, number))
            if each is None
            else each
            for number, each in enumerate(self._digests)
        ]
        self._digests[:] = known
        return state_digest(0, known)

    def write(self, writer: StateWriter) -> None:
        """Write what is shared, the anchor in the place of weights and the velocity in that of moments."""
        for number, layout in enumerate(self._layouts):
            velocity = self._look(Section.VELOCITY, number).view(torch.uint8)
            writer.write(layout, self._look(Section.ANCHOR, number), velocity)

    def read(self, reader: StateReader) -> None:
        """Begin anew from what `write` has written: from here our weights are the anchor."""
        self._forget()
        numbers = itertools.count()

        def fill(block: int, layout: ShardLayout, weights: Tensor, moments: Tensor) -> None:
            anchor, velocity, number = torch.empty(weights.shape), torch.empty(weights.shape), next(numbers)
            reader.read(layout, anchor, velocity.view(torch.uint8))
            self._start(number, anchor, velocity)
            weights.copy_(anchor)
            self._optimizer.begin(layout, weights, moments)

        self._memory.run(shard_visits(self._blocks, Kind.FILL), ShardPass(self._stage, self._first, fill))

    # --- inside --------------------------------------------------------------------------------------

    def _forget(self) -> None:
        self._digests = [None] * len(self._units)
        self._has_moved = self._has_contributed = False

    def _start(self, number: int, anchor: Tensor, velocity: Tensor) -> None:
        """Put a shard's first state: no error, and no drift."""
        for section, values in zip(OUTER, (anchor, velocity, torch.zeros_like(anchor), anchor), strict=True):
            self._put(section, number, values)

    def _merge(self, number: int, weights: Tensor, layout: ShardLayout, mean: Mean) -> Digest:
        anchor, velocity, error, sync = (self._look(section, number) for section in OUTER)
        end = 0
        for part, drift in mean.pieces(number):
            assert part.start == end, "the pieces of a mean cover a shard from front to back"
            end = part.stop
            if mean.not_sent is not None:
                error[part] = mean.not_sent((anchor[part] - sync[part]).add_(error[part]))
            outer_step(anchor[part], velocity[part], drift, self._spec)
        assert end == len(anchor)
        for start, stop in layout.padding:  # bytes from elsewhere may carry anything there
            for each in (anchor, velocity, error):
                each[start:stop].zero_()
        weights.sub_(sync).add_(anchor)
        for section, values in zip(OUTER[:3], (anchor, velocity, error), strict=True):
            self._put(section, number, values)
        return shard_digest(anchor, velocity)

    def _run(
        self,
        kind: Kind,
        on_shard: Callable[[int, Tensor, ShardLayout], None],
        *,
        puts: Collection[Section],
        local_step: int = 0,
        shards: Sequence[int] | None = None,
    ) -> None:
        """Go through shards (None: all) with their master weights in host memory; MERGE keeps what becomes of them.

        `puts` names the sections that `on_shard` writes. Fragments are whole blocks, and so is what is gone through.
        """
        wanted = range(len(self._units)) if shards is None else sorted(shards)
        blocks = sorted({self._units[number].block for number in wanted})
        assert len(wanted) == sum(unit.block in blocks for unit in self._units), "whole blocks"
        numbers = iter(wanted)

        def visit(block: int, layout: ShardLayout, weights: Tensor, moments: Tensor) -> None:
            own = weights if kind is Kind.MERGE else weights.clone()
            self._optimizer.widen(layout, own, moments)
            in_host = own.cpu()
            on_shard(next(numbers), in_host, layout)
            if kind is Kind.MERGE:
                own.copy_(in_host)  # what rounding adds to it now counts as a step of ours
                self._optimizer.narrow(layout, own, moments, step=-local_step)

        units = (self._unit(section, number) for section in puts for number in wanted)
        self._memory.run(
            shard_visits(blocks, kind),
            ShardPass(self._stage, self._first, visit),
            drive_bytes=sum(map(self._memory.pool.nvme_bytes, units)),
        )

    def _unit(self, section: Section, number: int) -> Unit:
        return self._units[number]._replace(section=section)

    def _look(self, section: Section, number: int) -> Tensor:
        return self._memory.look(self._unit(section, number)).view(torch.float32).cpu()

    def _put(self, section: Section, number: int, values: Tensor) -> None:
        self._memory.put(self._unit(section, number), values.view(torch.uint8))
