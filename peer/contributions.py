"""What audits may ask for of a round that ends: its weights, and sketches of what we have given into its average.

Owns: taking that down before a stage goes to the next version, and what we say of it share by share when it is asked.
Must not know: who is audited, how sketches are compared (`coordinator/audit/`). In the compute thread, but for the
report and the answer.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from peer.averaging.absorb import Update, update_shards
from peer.averaging.sketches import sketch_by_maker, sketch_taken
from peer.codecs import codec
from peer.engine.recompute import Recomputer
from peer.engine.stage_engine import StageEngine
from peer.pipeline.gate import Gate
from protocol.audits import MAX_SHARES, ContributionReport, ShareOrder, ShareReport, contribution_seed
from protocol.ids import Lineage, PeerId, StageId
from protocol.rounds.lineage import next_lineage
from protocol.rounds.messages import Commit
from protocol.sketch import folded, summed

COARSE_CODECS = ("int4",)
"""What they leave of a contribution is not close enough to it: what is sketched goes through them first."""
MAX_KEPT = 8  # commits whose shares are remembered: they are asked about within half a minute


@dataclass(frozen=True, slots=True)
class Shares:
    """Sketches of one average, by the member that added a share up, or that gave something into ours."""

    given: tuple[bytes, ...]
    taken: tuple[bytes, ...]
    totals: tuple[bytes, ...]


class Contributions:
    """Takes down what this peer has contributed."""

    def __init__(
        self,
        *,
        me: PeerId,
        engines: Mapping[StageId, StageEngine],
        recomputer: Recomputer,
        gate: Gate,
        report: Callable[[ContributionReport], object],
    ) -> None:
        """`report` is called from the compute thread."""
        self._me, self._engines, self._recomputer, self._gate, self._report = me, engines, recomputer, gate, report
        self._kept: OrderedDict[tuple[StageId, Lineage], Shares] = OrderedDict()
        self._replaced: set[StageId] = set()
        """Stages whose contribution to the next step is not there any more."""

    def before_step(self, stage: StageId, commit: Commit, update: Update) -> None:
        """Keep the weights that a commit is about to change; if contributions to it are on record, sketch ours."""
        is_gone = stage in self._replaced
        self._replaced.discard(stage)
        if self._gate.opening(stage) is None:  # we are catching up: nothing was worked on here with these weights
            return
        self._recomputer.keep(stage)
        if not is_gone:
            self._take_down(stage, commit, update)

    def before_replaced(self, stage: StageId, commit: Commit | None, update: Update | None) -> None:
        """Sketch our contribution now, if a new one is about to take its place before the step that it is for.

        Without the commit and its bytes nothing is ever said of it.
        """
        if not self._engines[stage].holds:  # a drift stays until the step
            return
        if commit is not None and update is not None and self._gate.opening(stage) is not None:
            self._take_down(stage, commit, update)
        self._replaced.add(stage)

    def _take_down(self, stage: StageId, commit: Commit, update: Update) -> None:
        engine, lineage = self._engines[stage], next_lineage(commit.parent, commit.to_bytes())
        seed = contribution_seed(lineage)
        is_ours = any(each.peer == self._me and each.tokens for each in commit.contributors)
        if seed is None or not is_ours or not engine.has_contribution:
            return
        used, num_members = codec(update.codec), len(commit.contributors)
        if not used.is_dense:  # nobody adds anything up for others
            return
        hands = num_members if num_members <= MAX_SHARES else 1  # of more nobody asks share by share
        own = map(engine.contribution_shard, update.shards_of(engine))
        rounds = used if update.codec in COARSE_CODECS else None
        given = sketch_by_maker(own, seed, num_members=hands, using=rounds)
        totals = sketch_by_maker(update_shards(engine, update), seed, num_members=hands)
        self._report(
            ContributionReport(
                stage=stage, round=commit.round, lineage=lineage, own=summed(given), total=summed(totals)
            )
        )
        if num_members <= MAX_SHARES:
            taken = () if update.taken is None else sketch_taken(update.taken, seed)
            self._keep(stage, lineage, Shares(*(tuple(map(folded, each)) for each in (given, taken, totals))))

    def answer(self, order: ShareOrder) -> ShareReport:
        """Say who gave what, if we have taken that down and still know it. May be called from any thread."""
        kept = self._kept.get((order.stage, order.lineage))
        if kept is None:
            return ShareReport(order=order.order)
        return ShareReport(order=order.order, given=kept.given, taken=kept.taken, totals=kept.totals)

    def _keep(self, stage: StageId, lineage: Lineage, shares: Shares) -> None:
        self._kept[stage, lineage] = shares
        while len(self._kept) > MAX_KEPT:
            self._kept.popitem(last=False)
