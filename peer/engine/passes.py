"""What a stage does at each block when a schedule takes it there: the workers of the memory engine's executor.

Owns: the arithmetic of one wave (`WavePass`), of the optimizer step (`StepPass`), and of going through the shards
(`ShardPass`). Must not know: order, slots, tiers (`peer/memory/` does), tickets and versions (`stage_engine.py`).

A microbatch's gradients are added block by block in the order of the wave, which is also the order in which a loop
over microbatches would add them: hence the same bits for every wave and every placement.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from peer.engine.optimizer import AdamW
from peer.engine.retention import Retention
from peer.engine.state import check_computed, shard_digest
from peer.engine.tape import Graph, Tape
from peer.memory.arena import Arena, Parked
from peer.memory.placement import Tier
from peer.memory.schedule import Kind, Work
from peer.model.loss import Scores
from peer.model.stage import Stage
from protocol.ids import Digest
from protocol.layout import ShardLayout


@dataclass(frozen=True, slots=True)
class Parking:
    """Where the inputs of some blocks (counted within the stage) wait for their backward pass."""

    arena: Arena
    tiers: Mapping[int, Tier]


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
        kept: Collection[int] | None = None,
        step: StepPass | None = None,
        parking: Parking | None = None,
        before_adding: Callable[[], None] = lambda: None,
    ) -> None:
        """Without `retention` nothing is kept for a backward pass; with `kept`, graphs are kept of those blocks only.

        `parking` says which inputs wait elsewhere.

        `before_adding` is called before the gradient sums change; `step` follows each block's backward pass.
        """
        super().__init__(stage, first_block)
        self._tapes, self._retention, self._step, self._before_adding = tapes, retention, step, before_adding
        self._kept, self._parking = kept, parking

    def enter(self, block: int, weights: Tensor, gradient: Tensor | None) -> None:
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
        hidden_BTD = tape.present_BTD
        kind = (self._stage.layouts[block].kind, hidden_BTD.shape)
        is_kept = self._kept is None or block in self._kept
        if self._retention is not None and is_kept and self._retention.may_keep(kind):
            entered_BTD = hidden_BTD.detach().requires_grad_()
            with torch.enable_grad(), self._stage.blocks[block].saving() as saved:
                outputs_BTD = self._stage.pass_through(block, entered_BTD)
            tape.hidden_BTD = outputs_BTD.detach()
            if self._retention.keep(kind, saved.num_bytes):
                tape.graphs[block] = Graph(entered_BTD, outputs_BTD, saved.num_bytes)
                return
        else:
            with torch.no_grad():
                tape.hidden_BTD = self._stage.pass_through(block, hidden_BTD)
        if self._retention is not None:
            tape.entries[block] = hidden_BTD

    def _backward(self, block: int, tape: Tape) -> None:
        graph = tape.graphs.pop(block, None)
        if graph is not None:
            assert self._retention is not None
            self._retention.release(graph.num_bytes)
            entered_BTD, outputs_BTD = graph.entered_BTD, graph.outputs_BTD
        else:
            entered_BTD = self._entry(block, tape).detach().requires_grad_()
            with torch.enable_grad():
                outputs_BTD = self._stage.pass_through(block, entered_BTD)
        torch.autograd.backward([outputs_BTD], [tape.present_BTD])
        tape.hidden_BTD = entered_BTD.grad

    # -- inputs that wait elsewhere ---------------------------------------------------------------------

    def _park(self, block: int, tape: Tape) -> None:
        entry_BTD = tape.entries.get(block)  # none if the block's graph was kept
        if self._parking is not None and isinstance(entry_BTD, Tensor):
            tier = self._parking.tiers[block]
            if self._parking.arena.may_park(entry_BTD, tier):
                tape.entries[block] = self._parking.arena.park(entry_BTD, tier)

    def _recall(self, block: int, tape: Tape) -> None:
        entry = tape.entries.get(block)
        if self._parking is not None and isinstance(entry, Parked):
            self._parking.arena.recall(entry)

    def _entry(self, block: int, tape: Tape) -> Tensor:
        entry = tape.entries.pop(block)
        if isinstance(entry, Tensor):
            return entry
        assert self._parking is not None
        return self._parking.arena.take(entry)


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
