"""A replica's own optimizer steps between two averagings: when one is due, and from what.

Owns: what each stage has added up since its last step. Must not know: rounds, the anchor (`anchored.py`), who else
trains.

A step is taken every so many microbatches, not every so many seconds: a faster card takes more steps in a round, and
nobody waits for the slowest (DiLoCo with dynamic local updates, arXiv 2401.09135). Sums are divided by their target
tokens and clipped by their own norm: no other replica has to agree.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from peer.engine.schedule import LearningRate
from peer.engine.stage_engine import StageEngine
from protocol.ids import StageId
from protocol.rounds.records import clip_scale


@dataclass(frozen=True, slots=True, kw_only=True)
class LocalRules:
    """What the manifest says about local steps."""

    every: int
    """Microbatches per step."""
    clip: Mapping[StageId, float]
    """The largest norm of a stage's mean gradient."""
    schedule: LearningRate


@dataclass(slots=True)
class _Sum:
    tokens: int = 0
    microbatches: int = 0


@dataclass(slots=True)
class LocalSteps:
    """The local steps of all stages of a span."""

    rules: LocalRules
    taken: int = 0
    _sums: dict[StageId, _Sum] = field(default_factory=dict)

    def note(self, stage: StageId, *, target_tokens: int, microbatches: int) -> None:
        """Take note of a wave that was added to a stage's gradient."""
        found = self._sums.setdefault(stage, _Sum())
        found.tokens += target_tokens
        found.microbatches += microbatches

    def is_due(self, stage: StageId) -> bool:
        """Tell whether enough has been added up for a step."""
        return stage in self._sums and self._sums[stage].microbatches >= self.rules.every

    def has_rest(self, stage: StageId) -> bool:
        """Tell whether anything has been added up since the last step."""
        return stage in self._sums

    def finish(self, stage: StageId, engine: StageEngine) -> None:
        """Take a step from what has been added up so far, if there is anything.

        Raises `LocalFault`, with the sum as it was, if it is not finite or the drive takes no more today.
        """
        found = self._sums.get(stage, _Sum())
        if not found.tokens:
            engine.zero_gradients()  # of microbatches without a single target
        else:
            scale = clip_scale(engine.gradient_norm() / found.tokens, self.rules.clip[stage])
            engine.step(self.rules.schedule.at(engine.version), scale=scale / found.tokens)
            self.taken += 1
        self.drop(stage)

    def drop(self, stage: StageId) -> int:
        """Forget what has been added up since the last step; return how many target tokens that were."""
        return self._sums.pop(stage, _Sum()).tokens
