"""What a stage does at each block when a schedule takes it there: the workers of the memory engine's executor.

Owns: the arithmetic of one wave (`WavePass`), of the optimizer step (`StepPass`), and of going through the shards
(`ShardPass`). Must not know: order, slots, tiers (`peer/memory/` does), tickets and versions (`stage_engine.py`).

A microbatch's gradients are added block by block in the order of the wave, which is also the order in which a loop
over microbatches would add them: hence the same bits for every wave and every placement.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import structlog
import torch
from torch import Tensor

from peer.engine.graph import Graph
from peer.engine.optimizer import AdamW
from peer.engine.retention import Retention
from peer.engine.state import check_computed, shard_digest
from peer.engine.tape import Tape
from peer.memory.arena import Arena, Parked
from peer.memory.placement import Tier
from peer.memory.schedule import Kind, Work
from peer.memory.segments import Segment, segments_of
from peer.model.loss import Scores
from peer.model.stage import Stage
from protocol.ids import Digest
from protocol.layout import ShardLayout

log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class Parking:
    """What waits for its backward pass outside the device. Blocks are counted within the stage."""

    arena: Arena
    inputs: Mapping[int, Tier]
    """The inputs of these blocks' segments that are recomputed."""
    graphs: Mapping[Segment, Tier] = field(default_factory=dict)
    """What these segments' graphs have saved."""

    @property
    def blocks(self) -> set[int]:
        return {*self.inputs, *(block for block, _ in self.graphs)}


class OnShard(Protocol):
    """What is done with one shard while it is in place."""

    def __call__(self, block: int, layout: ShardLayout, weights: Tensor, moments: Tensor) -> None:
        """`weights` are flat fp32 of the shard's length, `moments` flat bytes; both may be written where FILL says so.

        `block` is counted within the stage.
        """


class StagePass:
    """What all passes share: they bind the block that is entered. Blocks are counted from `first_block`."""

    def __init__(self, stage: Stage, first_block: int) -> None:
        self._stage, self._first = stage, first_block
        self._shards = [layout.shards() for layout in stage.layouts]
        self._weights = self._gradient = torch.empty(0)

    def enter(self, block: int, weights: Tensor, gradient: Tensor | None) -> None:
        self._stage.blocks[block - self._first].bind(weights, gradient)
        self._weights = weights
        self._gradient = weights.new_empty(0) if gradient is None else gradient

    def _shard(self, work: Work) -> tuple[int, ShardLayout, slice]:
        block = work.block - self._first
        layout = self._shards[block][work.index]
        return block, layout, slice(layout.start, layout.stop)


class ShardPass(StagePass):
    """Goes through the shards: to load them (FILL), to save or hash them (READ)."""

    def __init__(self, stage: Stage, first_block: int, on_shard: OnShard) -> None:
        super().__init__(stage, first_block)
        self._on_shard = on_shard

    def work(self, work: Work, moments: Tensor | None) -> None:
        assert moments is not None
        block, layout, part = self._shard(work)
        self._on_shard(block, layout, self._weights[part], moments)


class InitialPass(StagePass):
    """Fills blocks with their initial weights, and an optimizer state that has seen nothing.

    A tensor may span shards, so a block is drawn as a whole when it is entered.
    """

    def __init__(self, stage: Stage, first_block: int, optimizer: AdamW, *, seed: int) -> None:
        super().__init__(stage, first_block)
        self._optimizer, self._seed = optimizer, seed

    def enter(self, block: int, weights: Tensor, gradient: Tensor | None) -> None:
        super().enter(block, weights, gradient)
        weights.zero_()
        self._stage.initialise(block - self._first, weights, seed=self._seed)

    def work(self, work: Work, moments: Tensor | None) -> None:
        assert moments is not None
        _, layout, part = self._shard(work)
        self._optimizer.begin(layout, self._weights[part], moments)


class StepPass(StagePass):
    """Takes the optimizer step, shard by shard."""

    def __init__(
        self,
        stage: Stage,
        first_block: int,
        optimizer: AdamW,
        *,
        step: int,
        learning_rate: float,
        scale: float,
        load: Callable[[int, Tensor], None] | None = None,
        digests: list[Digest] | None = None,
        before_changing: Callable[[], None] = lambda: None,
    ) -> None:
        """`load(number, out)` writes the gradient sum of the stage's shard `number`; without it our own is taken.

        The hash of each new shard is added to `digests`: while it is here, it need not be fetched for that.
        `before_changing` is called before each of them changes.
        """
        super().__init__(stage, first_block)
        self._optimizer, self._step = optimizer, step
        self._learning_rate, self._scale, self._load, self._digests = learning_rate, scale, load, digests
        self._numbers = _numbers(self._shards)
        self._before_changing = before_changing

    def work(self, work: Work, moments: Tensor | None) -> None:
        assert moments is not None
        block, layout, part = self._shard(work)
        gradient = self._gradient[part]
        if self._load is None:  # inside a backward pass nobody has looked at it yet
            check_computed(gradient, f"gradient of shard {layout.name}")
        else:
            self._load(self._numbers[block] + work.index, gradient)
            for start, end in layout.padding:  # bytes from elsewhere may carry anything there
                gradient[start:end].zero_()
        self._before_changing()
        gradient.mul_(self._scale)  # in place: the sum is not needed afterwards
        self._optimizer.step(
            layout, self._weights[part], gradient, moments, step=self._step, learning_rate=self._learning_rate
        )
        if self._digests is not None:
            self._digests.append(shard_digest(self._weights[part], moments))


class WavePass(StagePass):
    """Takes a wave of microbatches through the stage, up or down or both."""

    def __init__(
        self,
        stage: Stage,
        first_block: int,
        tapes: Sequence[Tape],
        *,
        retention: Retention | None = None,
        kept: Collection[Segment] | None = None,
        step: StepPass | None = None,
        parking: Parking | None = None,
        before_adding: Callable[[], None] = lambda: None,
        weights_of: Callable[[int], Tensor] | None = None,
    ) -> None:
        """Without `retention` nothing is kept for a backward pass; with `kept`, graphs are kept of those segments only.

        `parking` says what waits elsewhere. `weights_of` brings other weights than those of the memory, by its blocks.

        `before_adding` is called before the gradient sums change; `step` follows each block's backward pass.
        """
        super().__init__(stage, first_block)
        self._tapes, self._retention, self._step, self._before_adding = tapes, retention, step, before_adding
        self._kept, self._parking, self._weights_of = kept, parking, weights_of

    def enter(self, block: int, weights: Tensor, gradient: Tensor | None) -> None:
        if self._weights_of is not None:
            weights = self._weights_of(block)
        super().enter(block, weights, gradient)
        if self._step is not None:
            self._step.enter(block, weights, gradient)

    def work(self, work: Work, moments: Tensor | None) -> None:
        if work.kind is Kind.STEP:
            assert self._step is not None
            self._step.work(work, moments)
            return
        block, tape = work.block - self._first, self._tapes[work.index]
        is_table = block not in self._stage.body
        if work.kind is Kind.FORWARD:
            self._embed(block, tape) if is_table else self._forward(block, tape)
        elif work.kind is Kind.PARK:
            self._park(block, tape)
        elif work.kind is Kind.RECALL:
            self._recall(block, tape)
        elif work.kind is Kind.SCORE:
            self._score(block, tape)
        elif work.kind is Kind.LOSS:
            self._before_adding()
            self._loss(block, tape)
        elif work.kind is Kind.BACKWARD:
            self._before_adding()
            self._unembed(block, tape) if is_table else self._backward(block, tape)
        else:
            raise AssertionError(f"a wave does no {work.kind}")

    # -- tables ---------------------------------------------------------------------------------------

    def _embed(self, block: int, tape: Tape) -> None:
        tape.hidden_BTD = self._stage.embed(block, tape.inputs, tape.hidden_BTD)

    def _unembed(self, block: int, tape: Tape) -> None:
        self._stage.add_embedding_gradient(block, tape.inputs, tape.present_BTD)

    def _score(self, block: int, tape: Tape) -> None:
        if tape.scores is None:
            tape.scores = Scores.before(tape.present_BTD.view(-1, self._stage.width))
        self._stage.add_head_scores(block, tape.present_BTD, _labels(tape), tape.scores)

    def _loss(self, block: int, tape: Tape) -> None:
        if len(self._stage.head) == 1:
            tape.loss_sum, tape.hidden_BTD = self._stage.head_loss_and_gradient(block, tape.present_BTD, _labels(tape))
            return
        assert tape.scores is not None
        if tape.normed_BTD is None:  # the first of the head's blocks: from here on, `hidden_BTD` is a gradient
            tape.loss_sum = tape.scores.loss_sum(_labels(tape).reshape(-1))
            tape.normed_BTD, tape.hidden_BTD = tape.present_BTD, torch.zeros_like(tape.present_BTD)
        self._stage.add_head_gradients(block, tape.normed_BTD, _labels(tape), tape.scores, tape.present_BTD)

    # -- layers ---------------------------------------------------------------------------------------

    def _forward(self, block: int, tape: Tape) -> None:
        if self._retention is None:
            with torch.no_grad():
                tape.hidden_BTD = self._stage.pass_through(block, tape.present_BTD)
            return
        is_made_again = False
        for segment in self._segments(block):
            entered_BTD = tape.present_BTD
            if self._wants_graph(segment, entered_BTD):
                graph = Graph(self._stage, *segment, entered_BTD, may_leave=self._leaves_for(segment) is not None)
                tape.hidden_BTD = graph.take_outputs()
                if self._may_hold(segment, entered_BTD, graph):
                    tape.graphs[segment] = graph
            else:
                with torch.no_grad():
                    tape.hidden_BTD = self._stage.pass_segment(*segment, entered_BTD)
            if segment not in tape.graphs and not is_made_again:
                tape.entries[segment] = entered_BTD
            is_made_again = segment not in tape.graphs  # and with it the input of the next one

    def _backward(self, block: int, tape: Tape) -> None:
        for segment in reversed(self._segments(block)):
            tape.hidden_BTD = self._graph(segment, tape).backward(tape.present_BTD)

    def _graph(self, segment: Segment, tape: Tape) -> Graph:
        """Return a segment's graph for its backward pass: the one that was kept, or a new one."""
        graph = tape.graphs.pop(segment, None)
        if graph is None:
            entered_BTD = self._entry(segment, tape)
            if entered_BTD is None:
                before = Segment(segment.block, segment.part - 1)
                tape.graphs[before] = self._graph(before, tape)  # whose turn comes next
                entered_BTD = tape.graphs[before].take_outputs()
            return Graph(self._stage, *segment, entered_BTD, waits=False)
        assert self._retention is not None
        self._retention.release(graph.booked_bytes)
        if graph.parked is not None:
            graph.return_savings(self._arena.take(graph.parked))
            graph.parked = None
        return graph

    def _segments(self, block: int) -> tuple[Segment, ...]:
        return segments_of(block, self._stage.layouts[block].kind)

    def _wants_graph(self, segment: Segment, entered_BTD: Tensor) -> bool:
        if self._leaves_for(segment) is not None:
            return True
        assert self._retention is not None
        is_kept = self._kept is None or segment in self._kept
        return is_kept and self._retention.may_keep(self._kind(segment, entered_BTD))

    def _may_hold(self, segment: Segment, entered_BTD: Tensor, graph: Graph) -> bool:
        """Book a graph that stays, or see whether there is room for one that leaves."""
        tier = self._leaves_for(segment)
        if tier is not None:
            may_leave = self._arena.may_park(graph.savings, tier)
            if not may_leave:  # a full drive's budget, or other tensors than the plan knew of
                log.warning("activations.stay", block=segment.block, tier=tier.name.lower(), bytes=graph.num_bytes)
            return may_leave
        assert self._retention is not None
        if not self._retention.keep(self._kind(segment, entered_BTD), graph.num_bytes):
            return False
        graph.booked_bytes = graph.num_bytes
        return True

    def _kind(self, segment: Segment, entered_BTD: Tensor) -> Hashable:
        """Return what decides how much a graph saves."""
        return self._stage.layouts[segment.block].kind, segment.part, entered_BTD.shape

    # -- what waits elsewhere ---------------------------------------------------------------------------

    @property
    def _arena(self) -> Arena:
        assert self._parking is not None
        return self._parking.arena

    def _leaves_for(self, segment: Segment) -> Tier | None:
        """Return where what a segment's graph has saved waits, if not on the device."""
        return None if self._parking is None else self._parking.graphs.get(segment)

    def _park(self, block: int, tape: Tape) -> None:
        if self._parking is None:
            return
        tier = self._parking.inputs.get(block)
        for segment in self._segments(block):
            entry_BTD, graph = tape.entries.get(segment), tape.graphs.get(segment)
            if tier is not None and isinstance(entry_BTD, Tensor):
                flat = entry_BTD.detach().reshape(-1).view(torch.uint8)
                if self._arena.may_park([flat], tier):
                    tape.entries[segment] = self._arena.park([flat], tier)
            graph_tier = self._leaves_for(segment)
            if graph is not None and graph_tier is not None:
                graph.parked = self._arena.park(graph.take_savings(), graph_tier)

    def _recall(self, block: int, tape: Tape) -> None:
        for segment in self._segments(block):
            entry, graph = tape.entries.get(segment), tape.graphs.get(segment)
            if isinstance(entry, Parked):
                self._arena.recall(entry)
            if graph is not None and graph.parked is not None:
                self._arena.recall(graph.parked)

    def _entry(self, segment: Segment, tape: Tape) -> Tensor | None:
        entry = tape.entries.pop(segment, None)
        if not isinstance(entry, Parked):
            return entry
        (flat,) = self._arena.take(entry)
        return flat.view(torch.float32).view(*tape.inputs.shape[:2], self._stage.width)


def _labels(tape: Tape) -> Tensor:
    assert tape.labels_BT is not None
    return tape.labels_BT


def _numbers(shards: Sequence[Sequence[ShardLayout]]) -> list[int]:
    """Return, for each block, the number of its first shard within the stage."""
    numbers, count = [], 0
    for block in shards:
        numbers.append(count)
        count += len(block)
    return numbers
