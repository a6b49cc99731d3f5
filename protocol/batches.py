"""Which tokens microbatch number i of round r holds. Pure arithmetic, the same on every machine.

Owns: the plan of a round and the order in which training sequences are visited. Must not know: token
files, peers. Used by the feeder (inputs), the last stage (labels) and, later, the auditors.

The order is a fresh pseudo-random permutation of all sequences for every epoch, computed per index by a
four-round Feistel network with cycle walking (Black & Rogaway 2002, "Ciphers with arbitrary finite
domains"): no table, no memory, any epoch can be entered anywhere.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from hashlib import blake2b

from protocol.errors import CorpusError
from protocol.ids import RoundId
from protocol.manifest import BatchSpec, DataSpec

FEISTEL_ROUNDS = 4  # enough to be indistinguishable from random by anything that reads text


class TaskKind(StrEnum):
    """Why a microbatch travels."""

    TRAIN = "train"
    EVAL = "eval"


@dataclass(frozen=True, slots=True)
class Microbatch:
    """One numbered microbatch: the sequences it holds, as indices of windows of the train or held-out file.

    Window w holds tokens `[w * T, w * T + T]`, T + 1 of them: inputs and the same shifted by one.
    """

    number: int
    kind: TaskKind
    windows: tuple[int, ...]


def num_windows(num_tokens: int, sequence_length: int) -> int:
    """Count the windows of T + 1 tokens that start at multiples of T."""
    return max(0, (num_tokens - 1) // sequence_length)


def check_enough_tokens(data: DataSpec, batch: BatchSpec) -> None:
    """Raise `CorpusError` unless one round and one evaluation fit the token files."""
    need_train = batch.microbatches_per_round * batch.sequences_per_microbatch
    for spec, need in ((data.train, need_train), (data.heldout, batch.heldout_sequences)):
        have = num_windows(spec.num_tokens, batch.sequence_length)
        if have < need:
            raise CorpusError(
                f"{spec.name} holds {spec.num_tokens} tokens, {have} sequences of {batch.sequence_length}, "
                f"but {need} are needed.",
                hint="Add text with --corpus, or choose a preset with shorter sequences.",
            )


def plan_round(data: DataSpec, batch: BatchSpec, round_id: RoundId) -> tuple[Microbatch, ...]:
    """List the microbatches of a round: M training ones, then the evaluation of the version it starts from.

    Evaluation microbatches measure the shared state *before* this round's update. The round after the
    last (`num_rounds`) trains nothing and only evaluates.
    """
    train = () if round_id >= batch.num_rounds else _training(data, batch, round_id)
    return train + (_evaluation(batch, first_number=len(train)) if has_evaluation(batch, round_id) else ())


@dataclass(frozen=True, slots=True)
class Extent:
    """What there is to a microbatch, besides its text."""

    kind: TaskKind
    target_tokens: int


def extent_of(batch: BatchSpec, round_id: RoundId, number: int) -> Extent | None:
    """Return what `plan_round` says of one number, without making a plan; None if the round does not have it."""
    size, first_evaluation = batch.sequences_per_microbatch, num_trained(batch, round_id)
    if number < first_evaluation:
        return Extent(TaskKind.TRAIN, batch.tokens_per_microbatch)
    offset = number - first_evaluation
    if offset >= num_evaluated(batch, round_id):
        return None
    left = batch.heldout_sequences - offset * size  # the last one holds what is left
    return Extent(TaskKind.EVAL, min(size, left) * batch.sequence_length)


def num_trained(batch: BatchSpec, round_id: RoundId) -> int:
    """Count the training microbatches of a round."""
    return batch.microbatches_per_round if round_id < batch.num_rounds else 0


def num_evaluated(batch: BatchSpec, round_id: RoundId) -> int:
    """Count the evaluation microbatches of a round."""
    return batch.microbatches_per_evaluation if has_evaluation(batch, round_id) else 0


def has_evaluation(batch: BatchSpec, round_id: RoundId) -> bool:
    """Tell whether this round evaluates the state that the rounds before it made."""
    if round_id >= batch.num_rounds:
        return round_id == batch.num_rounds
    return round_id > 0 and round_id % batch.eval_every == 0


def training_window(data: DataSpec, batch: BatchSpec, position: int) -> int:
    """Return the window at `position` of the endless training order (round * sequences per round + slot)."""
    windows = num_windows(data.train.num_tokens, batch.sequence_length)
    epoch, index = divmod(position, windows)
    return _permute(index, size=windows, seed=f"{batch.data_seed}/{epoch}".encode())


def _training(data: DataSpec, batch: BatchSpec, round_id: RoundId) -> tuple[Microbatch, ...]:
    size = batch.sequences_per_microbatch
    first = round_id * batch.microbatches_per_round * size
    return tuple(
        Microbatch(
            number=number,
            kind=TaskKind.TRAIN,
            windows=tuple(training_window(data, batch, first + number * size + slot) for slot in range(size)),
        )
        for number in range(batch.microbatches_per_round)
    )


def _evaluation(batch: BatchSpec, *, first_number: int) -> tuple[Microbatch, ...]:
    size = batch.sequences_per_microbatch
    starts = range(0, batch.heldout_sequences, size)
    return tuple(
        Microbatch(
            number=first_number + offset,
            kind=TaskKind.EVAL,
            windows=tuple(range(start, min(start + size, batch.heldout_sequences))),
        )
        for offset, start in enumerate(starts)
    )


def _permute(index: int, *, size: int, seed: bytes) -> int:
    """Map `index` to its place in a permutation of `range(size)`; expected < 4 walks."""
    half_bits = max(1, ((size - 1).bit_length() + 1) // 2)
    mask = (1 << half_bits) - 1
    while True:
        left, right = index >> half_bits, index & mask
        for number in range(FEISTEL_ROUNDS):
            word = blake2b(b"%d/%d" % (number, right), key=seed, digest_size=8).digest()
            left, right = right, left ^ (int.from_bytes(word, "big") & mask)
        index = left << half_bits | right
        if index < size:
            return index
