"""What the manifest says about rounds, in the form in which a round machine wants to hear it.

Owns: timers, the size of every round, the clip threshold of a stage, and what proves that a microbatch is
done. Pure.

The proof is the whole path, so the credits are read off signatures and not off a feeder's word. Not checked here, and
left to the trust layer: whether the signers host those stages.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from peer.engine.schedule import clip_threshold
from peer.tasks import Outcome
from protocol.architecture import stage_blocks
from protocol.batches import Microbatch, TaskKind, extent_of, num_evaluated, num_trained
from protocol.errors import PeerFault
from protocol.fragments import Fragments
from protocol.hops import Evidence, PathEntry
from protocol.ids import RoundId, StageId
from protocol.manifest import AveragingMode, BatchSpec, Manifest
from protocol.paths import read_path
from protocol.rounds.messages import Credit, DoneTask, Seat
from protocol.rounds.settings import KeyNotary, RoundRules, RoundSize, RoundTimers, Settings
from protocol.signing import SigningKey


def machine_settings(manifest: Manifest, stage: StageId, *, key: SigningKey, session: int) -> Settings:
    """Return what the machine of one stage is told once."""
    return Settings(
        run=manifest.run_id,
        stage=stage,
        me=Seat(peer=key.peer_id, session=session),
        coordinator=manifest.coordinator,
        timers=round_timers(manifest),
        rules=round_rules(manifest, stage),
        notary=KeyNotary(key),
    )


def round_timers(manifest: Manifest) -> RoundTimers:
    """Derive the timers from the manifest's beat and deadlines."""
    timing = manifest.timing
    beat_s = timing.beat_s / 4  # the manifest's beat is the slowest sign of life; rounds are looked at more often
    return RoundTimers(
        beat_s=beat_s,
        ping_timeout_s=4 * beat_s,
        patience_s=12 * beat_s,
        reduce_timeout_s=timing.reduce_timeout_s,
        accept_timeout_s=timing.reduce_timeout_s,
        round_deadline_s=timing.round_deadline_s,
        freeze_timeout_s=timing.hop_silence_s,
    )


def round_rules(manifest: Manifest, stage: StageId) -> RoundRules:
    """Derive sizes, proofs and the clip threshold from the manifest."""

    def size_of(round_id: RoundId) -> RoundSize:
        return round_size(manifest.batch, round_id)

    def check_done(round_id: RoundId, task: DoneTask) -> bool:
        return _proves(manifest, round_id, task)

    is_diloco = manifest.averaging.mode is AveragingMode.DILOCO
    return RoundRules(
        size_of=size_of,
        check_done=check_done,
        tokens_per_round=manifest.batch.tokens_per_round,
        # in diloco mode every local step was clipped already
        clip_threshold=math.inf if is_diloco else clip_threshold(manifest, stage),
        last_round=RoundId(manifest.batch.num_rounds),
        codecs=manifest.averaging.codecs_of(stage),
        num_averaged=_num_averaged(manifest, stage),
        overlap=manifest.averaging.overlap,
    )


def _num_averaged(manifest: Manifest, stage: StageId) -> Callable[[RoundId], int]:
    """Return how many numbers of a stage a round averages: those of the largest fragment, or at the end all."""
    blocks = stage_blocks(manifest.model.config, manifest.model.num_stages, stage)
    last_round = RoundId(manifest.batch.num_rounds - 1)
    lengths = [shard.num_elements for block in blocks for shard in block.shards()]
    fragments = Fragments(blocks, manifest.averaging.fragments, last_round=last_round)
    largest = max(sum(lengths[shard] for shard in part) for part in fragments)
    return lambda round_id: sum(lengths) if round_id >= last_round else largest


def round_size(batch: BatchSpec, round_id: RoundId) -> RoundSize:
    """Count what `protocol.batches.plan_round` lists, without listing it: anybody's closing makes us ask."""
    return RoundSize(num_trained(batch, round_id), num_evaluated(batch, round_id))


def done_task(microbatch: Microbatch, outcome: Outcome) -> DoneTask:
    """Return a finished microbatch as the clock wants to see it."""
    entries = [PathEntry.from_bytes(signed.payload) for signed in outcome.path]
    return DoneTask(
        number=microbatch.number,
        evidence=Evidence(path=outcome.path).to_bytes(),
        loss_sum=outcome.loss_sum,
        target_tokens=outcome.target_tokens,
        credits=_credits(entries),
    )


def _credits(entries: Sequence[PathEntry]) -> tuple[Credit, ...]:
    """Return who is credited with what by a path. What is only evaluated adds to no average."""
    return tuple(
        Credit(stage=stage, peer=entry.peer, tokens=entry.target_tokens)
        for entry in entries
        for stage in entry.stages
        if entry.kind is TaskKind.TRAIN
    )


def _proves(manifest: Manifest, round_id: RoundId, task: DoneTask) -> bool:
    """Check a path from its feeder to the last stage: this number, this loss, these tokens, these credits."""
    extent = extent_of(manifest.batch, round_id, task.number)
    if extent is None or task.target_tokens > extent.target_tokens:
        return False
    try:
        entries = read_path(Evidence.from_bytes(task.evidence).path)
    except PeerFault:
        return False
    first, last = entries[0], entries[-1]  # `read_path` has seen that they are about the same
    return (
        (first.run, first.kind, first.round, first.number) == (manifest.run_id, extent.kind, round_id, task.number)
        and (first.loss_sum, first.target_tokens) == (task.loss_sum, task.target_tokens)
        and (first.stages[0], last.stages[-1]) == (0, manifest.model.num_stages - 1)
        and task.credits == _credits(entries)
    )
