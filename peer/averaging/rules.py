"""What the manifest says about rounds, in the form in which a round machine wants to hear it.

Owns: timers, the size of every round, the clip threshold of a stage, and what proves that a microbatch is
done. Pure.

The proof is one path entry, signed by the peer that it names: the number, the loss and the tokens, at the last
stage. Not checked here, and left to the trust layer, which has the receipts: whether the signer hosts the last
stage, and the credits. Those come from the whole path, which stays with its feeder; others take the feeder's word.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from peer.engine.schedule import clip_threshold
from peer.tasks import Outcome
from protocol.architecture import stage_blocks
from protocol.batches import Microbatch, TaskKind, has_evaluation
from protocol.errors import PeerFault
from protocol.fragments import Fragments
from protocol.hops import ENTRY_CONTEXT, PathEntry
from protocol.ids import RoundId, StageId
from protocol.manifest import AveragingMode, BatchSpec, Manifest
from protocol.rounds.messages import Credit, DoneTask, Seat
from protocol.rounds.settings import KeyNotary, RoundRules, RoundSize, RoundTimers, Settings
from protocol.signing import Signed, SigningKey, unseal


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
    num_train = batch.microbatches_per_round if round_id < batch.num_rounds else 0
    num_eval = math.ceil(batch.heldout_sequences / batch.sequences_per_microbatch)
    return RoundSize(num_train, num_eval if has_evaluation(batch, round_id) else 0)


def done_task(microbatch: Microbatch, outcome: Outcome) -> DoneTask:
    """Return a finished microbatch as the clock wants to see it."""
    return DoneTask(
        number=microbatch.number,
        evidence=outcome.path[-1].to_bytes(),
        loss_sum=outcome.loss_sum,
        target_tokens=outcome.target_tokens,
        credits=_credits(outcome.path) if microbatch.kind is TaskKind.TRAIN else (),
    )


def _credits(path: tuple[Signed, ...]) -> tuple[Credit, ...]:
    credits = []
    for signed in path:
        entry = PathEntry.from_bytes(signed.payload)
        credits += [Credit(stage=stage, peer=signed.signer, tokens=entry.target_tokens) for stage in entry.stages]
    return tuple(credits)


def _proves(manifest: Manifest, round_id: RoundId, task: DoneTask) -> bool:
    """Check the last stage's word: this number of this round, this loss, these tokens."""
    try:
        signed = Signed.from_bytes(task.evidence)
        entry = unseal(signed, ENTRY_CONTEXT, PathEntry)
    except PeerFault:
        return False
    return (
        entry.peer == signed.signer
        and entry.run == manifest.run_id
        and (entry.round, entry.number) == (round_id, task.number)
        and (entry.loss_sum, entry.target_tokens) == (task.loss_sum, task.target_tokens)
        and manifest.model.num_stages - 1 in entry.stages
    )
