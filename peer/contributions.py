"""What audits may ask for of a round that ends: its weights, and sketches of what we have given into its average.

Owns: taking that down before a stage goes to the next version. Must not know: who is audited, how sketches are compared
(`coordinator/audit/`). In the compute thread, but for the report.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from peer.averaging.absorb import Update, update_shards
from peer.engine.recompute import Recomputer
from peer.engine.stage_engine import StageEngine
from peer.pipeline.gate import Gate
from protocol.audits import ContributionReport, contribution_seed
from protocol.ids import PeerId, StageId
from protocol.rounds.lineage import next_lineage
from protocol.rounds.messages import Commit


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

    def before_step(self, stage: StageId, commit: Commit, update: Update) -> None:
        """Keep the weights that a commit is about to change; if contributions to it are on record, sketch ours."""
        if self._gate.opening(stage) is None:  # we are catching up: nothing was worked on here with these weights
            return
        self._recomputer.keep(stage)
        engine, lineage = self._engines[stage], next_lineage(commit.parent, commit.to_bytes())
        seed = contribution_seed(lineage)
        is_ours = any(each.peer == self._me and each.tokens for each in commit.contributors)
        if seed is None or not is_ours or not engine.has_contribution:
            return
        found = self._recomputer.contribution(stage, update_shards(engine, update), seed)
        if found is not None:
            own, total = found
            self._report(ContributionReport(stage=stage, round=commit.round, lineage=lineage, own=own, total=total))
