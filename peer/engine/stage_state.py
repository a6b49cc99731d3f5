"""What a stage has learnt and is adding up: its weights, optimizer state and gradient sums, in the peer's memory.

Owns: the optimizer step, the gradient sums, the version, hashing, saving and loading. Must not know: microbatches
(`stage_engine.py` has them), where the state lives (`peer/memory/` does), rounds, the network. Synchronous; every call
comes from the one compute thread, but for those that say so. `peer/averaging/` reads the gradient sums here and brings
the averaged ones.

Gradients are sums over target tokens. They add up in the shards until `step` multiplies them by the scale it is given
(one over the round's target tokens, times the clip factor) and updates the weights.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import BinaryIO

import torch
from torch import Tensor

from peer.engine.anchored import Anchored, Mean
from peer.engine.optimizer import AdamW, OptimizerSpec
from peer.engine.outer import OuterSpec
from peer.engine.passes import InitialPass, OnShard, ShardPass, StepPass
from peer.engine.state import check_computed, is_finite, shard_digest, state_digest
from peer.engine.statefiles import Sink, StateFormat, StateReader, StateWriter
from peer.memory.executor import Executor
from peer.memory.schedule import Gradient, Kind, Visit, shard_visits
from peer.memory.units import Section, Unit
from peer.model.blocks import named_views
from peer.model.stage import Stage
from protocol.ids import Digest, RoundId, Version
from protocol.layout import BlockLayout, ShardLayout

NORM_ELEMENTS = 1 << 20  # piece of a gradient that is widened to fp64 at a time


@dataclass(frozen=True, slots=True)
class Step:
    """An optimizer step that is taken inside a backward pass: for who averages nothing, or not at every step."""

    learning_rate: float
    scale: float


class StageState:
    """The training state of one stage. `StageEngine` is one with microbatches."""

    def __init__(
        self,
        stage: Stage,
        spec: OptimizerSpec,
        memory: Executor,
        *,
        first_block: int = 0,
        outer: OuterSpec | None = None,
    ) -> None:
        """`memory` holds the stage's blocks from `first_block` on; what is in it counts as the state of version 0.

        With `outer`, replicas share an anchor, and optimizer steps are this one's own.
        """
        self.version = Version(0)
        """Of the shared state."""
        self.shards: tuple[ShardLayout, ...] = tuple(shard for layout in stage.layouts for shard in layout.shards())
        self.steps = 0
        """How many steps the optimizer has taken: after a restored state this may differ from the version."""
        self.changes = 0
        """How often something has begun to change the state: if the last of them failed, it is of no version."""
        self._stage, self._memory, self._first = stage, memory, first_block
        self._blocks = range(first_block, first_block + len(stage.blocks))
        self._gradient_units = tuple(self._units(Section.GRADIENT))
        self._spec, self._optimizer = spec, AdamW(spec, stage.device)
        self.anchored = None
        if outer is not None:
            self.anchored = Anchored(stage, memory, self._optimizer, outer, first_block=first_block)
        self._digest: Digest | None = None  # of the present state, if it is known
        self._fresh = set(self._blocks)  # blocks whose gradient sum is zero, whatever their buffers hold
        self._held_units = tuple(self._units(Section.HELD))

    def initialise(self, seed: int) -> None:
        """Start from the weights that a run's seed defines, with an optimizer that has seen nothing."""
        self._begin_anew()
        self._memory.let_go()  # blocks are drawn as a whole, when they are entered: none may be on its way home
        self._memory.run(
            shard_visits(self._blocks, Kind.FILL), InitialPass(self._stage, self._first, self._optimizer, seed=seed)
        )
        self.steps, self.version = 0, Version(0)
        if self.anchored is not None:
            self.anchored.begin()

    @property
    def is_first(self) -> bool:
        return self._stage.is_first

    @property
    def is_last(self) -> bool:
        return self._stage.is_last

    @property
    def num_parameters(self) -> int:
        return sum(layout.num_parameters for layout in self._stage.layouts)

    # --- gradients and weights -----------------------------------------------------------------------

    def zero_gradients(self) -> None:
        self._fresh = set(self._blocks)

    def gradient_shard(self, number: int) -> Tensor:
        """Return the gradient sum of one shard, flat fp32 in host memory; it may share that of the sum.

        May be called from any thread while nothing is added, and holds until something is.
        """
        return self._gradient_of(self._gradient_units[number])

    def contribution_shard(self, number: int) -> Tensor:
        """Return what a shard contributes to an average: the gradient sum, or how far its weights have come.

        Flat fp32 in host memory; may be called from any thread between the end of a round and what follows it, which
        is the end of the next round if gradients are held or steps are our own.
        """
        if self.anchored is not None:
            return self.anchored.contribution(number)
        return self._held(self._held_units[number]) if self._held_units else self.gradient_shard(number)

    def contribution_norm(self, shards: Iterable[int]) -> float:
        """Return the Euclidean norm of what some shards contribute, added up in fp64."""
        return _norm_of(map(self.contribution_shard, shards))

    def hold_gradients(self, *, on_top: bool) -> None:
        """Set the gradient sums aside for an average, and begin new ones.

        They take the place of what was held, or are added to it (`on_top`).
        """
        for held, own in zip(self._held_units, self._gradient_units, strict=True):
            gradient = self._gradient_of(own)
            self._memory.put(held, (self._held(held).add(gradient) if on_top else gradient).view(torch.uint8))
        self.zero_gradients()

    @property
    def holds(self) -> bool:
        """Tell whether gradient sums are set aside to be averaged."""
        return bool(self._held_units)

    def gradient_shards(self) -> list[Tensor]:
        """Return the gradient sums of all shards: for small stages only."""
        return [self._gradient_of(unit) for unit in self._gradient_units]

    def has_finite_gradients(self) -> bool:
        """Tell whether the gradient sums can be averaged: one overflow anywhere, and they cannot."""
        return all(is_finite(self._gradient_of(unit)) for unit in self._gradient_units if self._has(unit))

    def gradient_norm(self) -> float:
        """Return the Euclidean norm of the summed gradient of the stage, added up in fp64."""
        return _norm_of(map(self._gradient_of, self._gradient_units))

    def step(self, learning_rate: float, *, scale: float, load: Callable[[int, Tensor], None] | None = None) -> None:
        """Update the weights from `gradient * scale`, clear the gradients, and go to the next version.

        With `load(number, out)`, which writes the sum for shard `number` (finite, flat fp32), the own sums are dropped.
        Raises `LocalFault`, with no weight changed, if an own sum is not finite.
        """
        if load is None:
            for layout, unit in zip(self.shards, self._gradient_units, strict=True):
                if self._has(unit):
                    check_computed(self._gradient_of(unit), f"gradient of shard {layout.name}")
        self._before_change()
        visits = [
            Visit(
                block=block,
                shard_work=Kind.STEP,
                gradient=self._gradient_before(block) if load is None else Gradient.SPACE,
                keeps_gradient=False,
            )
            for block in self._blocks
        ]
        digests: list[Digest] | None = None if load is None else []  # who brings sums will ask for the new state's hash
        self._memory.run(visits, self._step_pass(Step(learning_rate, scale), load, digests))
        self._finish_step()
        self._digest = None if digests is None else state_digest(self.steps, digests)

    def due(self, version: Version, round_id: RoundId) -> tuple[int, ...]:
        """Return the shards that are averaged after a round, for the commit that leads to a version."""
        return tuple(range(len(self.shards))) if self.anchored is None else self.anchored.due(version, round_id)

    def turn(self, mean: Mean | None, *, sync: Collection[int] | None = None) -> None:
        """End a round of local steps (`Anchored`); with the mean of a group the stage goes to the next version.

        `sync` names the shards that may be contributed before the next turn; None: all.
        """
        assert self.anchored is not None, "without an anchor there is nothing to turn"
        if mean is not None:
            self._before_change()
            self._note_change()
        self.anchored.turn(mean, local_step=self.steps + 1, sync=sync)
        if mean is not None:
            self.version = Version(self.version + 1)

    # --- state ---------------------------------------------------------------------------------------

    @property
    def state_bytes(self) -> int:
        """Return how many bytes weights and optimizer state take."""
        units = [*self._units(Section.WEIGHTS), *self._units(Section.MOMENTS)]
        return sum(self._memory.pool.inventory.num_bytes(unit) for unit in units)

    def weight_tensors(self) -> dict[str, Tensor]:
        """Return a copy of the weights by Hugging Face name: all of them, so for small stages only."""
        parts: dict[str, list[Tensor]] = {}
        for layout, flat in zip(self._stage.layouts, self._copy_weights(), strict=True):
            for name, view in named_views(layout, flat).items():
                parts.setdefault(name, []).append(view)
        return {name: rows[0] if len(rows) == 1 else torch.cat(rows) for name, rows in parts.items()}

    def shared_weights(self) -> list[Tensor]:
        """Return a copy of the weights that replicas agree on, one flat fp32 buffer in host memory for each block."""
        if self.anchored is not None:
            return [self.anchored.block_weights(block).cpu().clone() for block in self._blocks]
        return self._copy_weights()

    @property
    def device(self) -> torch.device:
        return self._stage.device

    @property
    def has_contribution(self) -> bool:
        """Tell whether there is a gradient sum, of this round or set aside; or a drift, of the last turn."""
        if self.anchored is not None:
            return self.anchored.has_contribution
        return bool(self._held_units) or len(self._fresh) < len(self._blocks)

    @property
    def layouts(self) -> tuple[BlockLayout, ...]:
        return self._stage.layouts

    @property
    def num_elements(self) -> int:
        """Return how many numbers the weights are, padding included."""
        return sum(layout.num_elements for layout in self._stage.layouts)

    @property
    def is_shared(self) -> bool:
        """Tell whether the weights are those of the version, and not on their way from there by steps of our own."""
        return self.anchored is None or self.anchored.is_at_anchor

    def forget_drift(self) -> None:
        """Go back to the anchor, unless we are there."""
        assert self.anchored is not None, "without an anchor there is no drift"
        if self.anchored.has_drift:
            self._before_change()
            self.anchored.forget_drift()

    def state_digest(self) -> Digest:
        """Hash the shared state: weights and optimizer state, or anchor and velocity.

        At hand after a step with sums from elsewhere, or a turn, else all shards are read.
        """
        if self.anchored is not None:
            return self.anchored.digest()
        if self._digest is None:
            digests: list[Digest] = []
            self._read_shards(lambda block, layout, weights, moments: digests.append(shard_digest(weights, moments)))
            self._digest = state_digest(self.steps, digests)
        return self._digest

    def write_state(self, files: Mapping[str, Sink]) -> None:
        """Write the shared state into open files (by part), one shard at a time."""
        writer = StateWriter(files, self._format(), steps=0 if self.anchored is not None else self.steps)
        if self.anchored is not None:
            self.anchored.write(writer)
            return
        self._read_shards(lambda block, layout, weights, moments: writer.write(layout, weights, moments))

    def read_state(self, files: Mapping[str, BinaryIO], *, version: Version) -> None:
        """Become the saved state of `version`; raises `StorageError`, with nothing changed, if it does not fit."""
        reader = StateReader(files, self._format())
        self._begin_anew()  # before the first byte changes: reading may fail half-way
        self._memory.let_go()
        if self.anchored is not None:
            self.anchored.read(reader)
        else:
            self._memory.run(
                shard_visits(self._blocks, Kind.FILL),
                ShardPass(
                    self._stage,
                    self._first,
                    lambda block, layout, weights, moments: reader.read(layout, weights, moments),
                ),
            )
        self.steps, self.version = reader.steps, version

    def resume(self, *, version: Version, steps: int) -> None:
        """Take note that the memory holds the state of `version`.

        With an anchor, training goes on from there: what local steps had added stands for tokens that nobody knows any
        more, and what the error holds may have been sent since.
        """
        self.steps, self.version = steps, version
        self._begin_anew()
        if self.anchored is not None:
            self.anchored.forget_drift(and_error=True)

    # --- inside --------------------------------------------------------------------------------------

    def _before_change(self) -> None:
        """Let go of what was computed with the weights, which are about to change."""
        self._digest = None

    def _note_change(self) -> None:
        self.changes += 1

    def _step_pass(
        self,
        step: Step,
        load: Callable[[int, Tensor], None] | None = None,
        digests: list[Digest] | None = None,
    ) -> StepPass:
        return StepPass(
            self._stage,
            self._first,
            self._optimizer,
            step=self.steps + 1,
            learning_rate=step.learning_rate,
            scale=step.scale,
            load=load,
            digests=digests,
            # local steps do not touch what is shared
            before_changing=self._note_change if self.anchored is None else lambda: None,
        )

    def _finish_step(self) -> None:
        self.steps += 1
        if self.anchored is None:
            self.version = Version(self.version + 1)
        else:
            self.anchored.note_step()
        self.zero_gradients()

    def _copy_weights(self) -> list[Tensor]:
        """Return a copy of our weights, one flat buffer in host memory for each block."""
        shards: list[list[Tensor]] = [[] for _ in self._stage.blocks]
        self._read_shards(lambda block, layout, weights, moments: shards[block].append(weights.cpu().clone()))
        return [torch.cat(pieces) if len(pieces) > 1 else pieces[0] for pieces in shards]

    def _read_shards(self, on_shard: OnShard) -> None:
        self._memory.run(shard_visits(self._blocks, Kind.READ), ShardPass(self._stage, self._first, on_shard))

    def _units(self, section: Section, block: int | None = None) -> Iterator[Unit]:
        for index in self._blocks if block is None else [block]:
            yield from self._memory.pool.inventory.block_units(index, section)

    def _has(self, unit: Unit) -> bool:
        """Tell whether anything has been added to a gradient since it was last cleared."""
        return unit.block not in self._fresh

    def _gradient_before(self, block: int) -> Gradient:
        return Gradient.ZERO if block in self._fresh else Gradient.SUM

    def _gradient_of(self, unit: Unit) -> Tensor:
        if not self._has(unit):
            return torch.zeros(self._memory.pool.inventory.layout(unit).num_elements)
        return self._memory.look(unit).view(torch.float32).cpu()

    def _held(self, unit: Unit) -> Tensor:
        return self._memory.look(unit).view(torch.float32).cpu()

    def _format(self) -> StateFormat:
        return StateFormat(
            self._stage.layouts, self._spec.name, self._spec.master, is_anchored=self.anchored is not None
        )

    def _begin_anew(self) -> None:
        """Let go of everything that belonged to another state."""
        self._note_change()
        self._before_change()
        self.zero_gradients()


def _norm_of(shards: Iterable[Tensor]) -> float:
    pieces = (piece for shard in shards for piece in torch.split(shard, NORM_ELEMENTS))
    return math.sqrt(sum(float(torch.linalg.vector_norm(piece.double())) ** 2 for piece in pieces))
