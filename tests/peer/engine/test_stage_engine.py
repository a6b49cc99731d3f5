"""One engine: what it keeps, what it refuses, and how it goes from version to version."""

from __future__ import annotations

import gc
import hashlib
import io
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from peer.engine.optimizer import OptimizerSpec
from peer.engine.stage_engine import StageEngine, Ticket
from peer.engine.stage_state import Step
from peer.engine.state import shard_digest, state_digest
from peer.memory.moments import moment_bytes
from peer.memory.placement import Tier
from peer.model.blocks import Saved
from protocol import architecture, layout
from protocol.architecture import preset, stage_tensors
from protocol.control import STATE_PARTS
from protocol.errors import CorpusError, LocalFault, PeerFault, StorageError
from protocol.ids import Digest, Version
from tests.peer.engine import placed, poke
from tests.peer.engine.poke import gradients

TINY = preset("tiny")
PLENTY = 1 << 30


def engine(
    stage: int = 1, *, num_stages: int = 3, keep: int = 0, name: Any = "adamw8bit", seed: int = 2
) -> StageEngine:
    spec = OptimizerSpec(name=name)
    return StageEngine.build(
        TINY, num_stages=num_stages, stage=stage, optimizer=spec, seed=seed, keep_budget_bytes=keep
    )


def hidden(seed: int = 0, sequences: int = 2, length: int = 16) -> torch.Tensor:
    return torch.randn(sequences, length, 64, generator=torch.Generator().manual_seed(seed))


def tokens(seed: int = 0, sequences: int = 2, length: int = 16) -> torch.Tensor:
    return torch.randint(0, 512, (sequences, length), generator=torch.Generator().manual_seed(seed))


def weights_of(own: StageEngine) -> Digest:
    """Hash all weights, padding included."""
    return Digest(hashlib.sha256(b"".join(flat.numpy().tobytes() for flat in flat_weights(own))).digest())


def flat_weights(own: StageEngine) -> list[torch.Tensor]:
    return [poke.weights(own, block) for block in range(len(own._blocks))]


def loading(sums: list[torch.Tensor]) -> Callable[[int, torch.Tensor], None]:
    """Return what `step` takes its gradient from: one sum per shard."""

    def load(number: int, out: torch.Tensor) -> None:
        out.copy_(sums[number])

    return load


def copy_state(target: StageEngine, source: StageEngine, version: int) -> None:
    files = {part: io.BytesIO() for part in STATE_PARTS}
    source.write_state(files)
    for file in files.values():
        file.seek(0)
    target.read_state(files, version=Version(version))


def all_equal(ours: list[torch.Tensor], theirs: list[torch.Tensor]) -> bool:
    return len(ours) == len(theirs) and all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


# --- forward and backward ---------------------------------------------------------------------------


@pytest.mark.parametrize("stage", [0, 1])
def test_kept_and_recomputed_passes_are_bit_identical(stage: int) -> None:
    """Oracle: each other, over three microbatches whose backwards come in another order."""
    inputs = [(tokens if stage == 0 else hidden)(seed) for seed in range(3)]
    seen = []
    for keep in (0, PLENTY):
        own = engine(stage, keep=keep)
        passes = [own.forward(each) for each in inputs]
        assert (own.statistics().kept_bytes > 0) == bool(keep)
        back = [own.backward(passes[index][1], hidden(10 + index)) for index in (1, 0, 2)]
        assert own.statistics().recomputed == (0 if keep else 3)
        assert own.statistics().kept_bytes == own.statistics().pending == 0
        seen.append([output for output, _ in passes] + [each for each in back if each is not None] + gradients(own))
    assert all_equal(*seen)


def test_graphs_are_kept_only_within_the_budget() -> None:
    """Oracle: the bytes that one graph turned out to cost."""
    generous = engine(keep=PLENTY)
    generous.forward(hidden())
    cost = generous.statistics().kept_bytes
    layers, tokens_in_batch, width = 2, 2 * 16, 64
    assert cost > layers * 10 * tokens_in_batch * width * 4  # at least ten activations per layer

    tight = engine(keep=2 * cost)
    tickets = [tight.forward(hidden(seed))[1] for seed in range(4)]
    assert tight.statistics().kept_bytes == 2 * cost
    tight.discard(tickets[0])
    assert tight.statistics().kept_bytes == cost
    for ticket in tickets[1:]:
        tight.backward(ticket, hidden())
    assert (tight.statistics().recomputed, tight.statistics().pending) == (2, 0)

    half = engine(keep=cost // 2)  # one of the two layers' graphs, which cost the same
    half_tickets = [half.forward(hidden(seed))[1] for seed in range(2)]
    assert half.statistics().kept_bytes == cost // 2
    half.backward(half_tickets[0], hidden())
    assert (half.statistics().recomputed, half.statistics().kept_bytes) == (1, 0)

    too_tight = engine(keep=cost // 8)  # even the first, that has to be measured, is let go again
    too_tight.forward(hidden())
    assert too_tight.statistics().kept_bytes == 0


@pytest.mark.parametrize("spilled", [None, Tier.HOST])
def test_a_microbatch_that_is_discarded_leaves_no_graph_behind(spilled: Tier | None) -> None:
    """Autograd's own references run in a circle if a result is saved as it is. Oracle: the storages, counted by weak
    references."""
    own = placed.build(1, keep=0 if spilled else PLENTY, spilled=spilled, graph_places=8)
    seen: list[weakref.ref[Saved]] = []
    count = Saved.count

    def seeing(saved: Saved, storage: torch.UntypedStorage) -> None:
        seen.append(weakref.ref(saved))
        count(saved, storage)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Saved, "count", seeing)
        own.discard(own.forward(placed.hidden(1))[1])
    assert seen
    own._memory.settle()
    gc.collect()
    assert not [saved for saved in seen if saved() is not None]


@pytest.mark.parametrize("keep", [0, PLENTY])
def test_a_wave_may_mix_microbatches_from_before_and_after_a_step(keep: int) -> None:
    """Oracle: the same two, one by one; the older one is recomputed at the new weights."""
    waved, single = engine(keep=keep), engine(keep=keep)
    results = []
    for own in (waved, single):
        _, old = own.forward(hidden(0))
        poke.gradient(own).fill_(1.0)
        own.step(1e-2, scale=1.0)
        _, new = own.forward(hidden(1))
        pairs = [(new, hidden(2)), (old, hidden(3))]
        back = own.backward_wave(pairs) if own is waved else [own.backward(*pair) for pair in pairs]
        results.append([each for each in back if each is not None] + gradients(own))
        assert own.statistics().recomputed == (1 if keep else 2)
        assert (own.statistics().kept_bytes, own.statistics().pending) == (0, 0)
    assert all_equal(*results)


def test_a_ticket_serves_once() -> None:
    """Oracle: KeyError (a bug of the caller), and one gradient."""
    own = engine()
    _, ticket = own.forward(hidden())
    own.backward(ticket, hidden())
    once = gradients(own)
    for again in (ticket, Ticket(99, Version(0))):
        with pytest.raises(KeyError):
            own.backward(again, hidden())
    own.forward(hidden())
    own.discard(own.forward(hidden())[1])
    assert all_equal(gradients(own), once)


@pytest.mark.parametrize("keep", [0, PLENTY])
def test_backward_after_a_step_runs_at_the_new_weights(keep: int) -> None:
    """Oracle: forward and backward both after the step. The ticket remembers the older version."""
    late, fresh = engine(keep=keep), engine(keep=keep)
    _, ticket = late.forward(hidden())
    for own in (late, fresh):
        poke.gradient(own).fill_(1.0)
        own.step(1e-2, scale=1.0)
    assert (ticket.version, late.version, late.statistics().kept_bytes) == (0, 1, 0)
    _, fresh_ticket = fresh.forward(hidden())
    late_back, fresh_back = late.backward(ticket, hidden(1)), fresh.backward(fresh_ticket, hidden(1))
    assert late_back is not None
    assert fresh_back is not None
    assert all_equal([late_back, *gradients(late)], [fresh_back, *gradients(fresh)])


def test_gradients_arrive_in_the_buffers_that_were_there_from_the_start() -> None:
    """Oracle: addresses; autograd replaces `.grad` when it may, and averaging would then read zeros."""
    own = engine(2)
    before = [poke.gradient(own, block).data_ptr() for block in range(3)]
    own.zero_gradients()
    own.loss_and_backward(hidden(), tokens())
    assert [poke.gradient(own, block).data_ptr() for block in range(3)] == before
    assert [shard.data_ptr() for shard in own.gradient_shards()] == before
    assert all(tensor.any() for tensor in poke.named_gradients(own).values())
    for shard, sum_ in zip(own.shards, own.gradient_shards(), strict=True):
        assert not any(sum_[start:end].any() for start, end in shard.padding)
    for block in own._stage.blocks:
        for parameter in block.parameters.values():
            assert parameter.grad is not None


# --- refusals ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "inputs",
    [
        hidden()[..., :63],
        hidden()[0],
        torch.zeros(2, 16, 64, dtype=torch.int64),
        hidden().index_fill(1, torch.tensor(3), float("nan")),
        hidden().index_fill(1, torch.tensor(3), float("inf")),
    ],
    ids=["width", "rank", "type", "nan", "infinite"],
)
@pytest.mark.parametrize("keep", [0, PLENTY])
def test_bad_hidden_states_are_the_senders_fault_and_leave_nothing(inputs: torch.Tensor, keep: int) -> None:
    """Oracle: PeerFault, no open microbatch, no gradient."""
    for own in (engine(keep=keep), engine(2)):
        with pytest.raises(PeerFault):
            own.forward(inputs) if not own.is_last else own.loss_and_backward(inputs, tokens())
        assert own.statistics().pending == 0
        assert not any(each.any() for each in gradients(own))


@pytest.mark.parametrize("grad", [hidden()[:, :15], hidden().index_fill(2, torch.tensor(0), float("nan"))])
def test_bad_gradient_is_the_senders_fault_and_the_ticket_stays_good(grad: torch.Tensor) -> None:
    """Oracle: PeerFault; a good gradient can still follow."""
    own = engine()
    _, ticket = own.forward(hidden())
    with pytest.raises(PeerFault):
        own.backward(ticket, grad)
    assert not any(each.any() for each in gradients(own))
    assert own.backward(ticket, hidden()) is not None


def test_bad_tokens_and_labels_are_refused() -> None:
    """Oracle: the error of whoever supplied them; no gradient."""
    first, last = engine(0), engine(2)
    with pytest.raises(PeerFault):
        first.forward(hidden())
    with pytest.raises(CorpusError):
        first.forward(tokens() + 500)
    for bad in (-1, -100, 512):
        with pytest.raises(CorpusError, match=f"token {bad} is outside the vocabulary of 512"):
            first.forward(tokens().index_fill(1, torch.tensor(3), bad))
        with pytest.raises(CorpusError):
            first.forward_only(tokens().index_fill(1, torch.tensor(3), bad))
    for bad in (-1, 512):
        for call in (last.loss_and_backward, last.evaluate):
            with pytest.raises(CorpusError):
                call(hidden(), tokens().index_fill(1, torch.tensor(3), bad))
    with pytest.raises(CorpusError):
        last.loss_and_backward(hidden(), tokens() + 500)
    for labels in (tokens()[:, :15], tokens().int()):
        with pytest.raises(PeerFault):
            last.loss_and_backward(hidden(), labels)
    assert not any(each.any() for each in gradients(first) + gradients(last))


def test_numbers_that_go_wrong_here_are_a_local_fault() -> None:
    """Oracle: LocalFault, for hidden states, loss and step; nothing is added, no weight moves."""
    middle, last = engine(), engine(2)
    for own in (middle, last):
        poke.weights(own)[0] = float("nan")
    with pytest.raises(LocalFault, match="hidden states"):
        middle.forward(hidden())
    for call in (last.loss_and_backward, last.evaluate):
        with pytest.raises(LocalFault, match="hidden states"):
            call(hidden(), tokens())
    assert not any(each.any() for each in gradients(last))

    own = engine()
    poke.gradient(own, 1)[7] = float("inf")
    before, state = weights_of(own), own.state_digest()
    with pytest.raises(LocalFault, match=r"shard layer\.2"):
        own.step(1e-3, scale=1.0)
    assert (own.version, weights_of(own), own.state_digest()) == (0, before, state)


# --- steps ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["adamw8bit", "adamw32"])
def test_step_applies_the_scaled_gradient_clears_it_and_counts(name: Any) -> None:
    """Oracle: an engine that is given the scaled gradient itself (a power of two, so that scaling is exact)."""
    scaled, plain = engine(2, name=name), engine(2, name=name)
    scaled.loss_and_backward(hidden(), tokens())
    own = [sum_ * 0.25 for sum_ in gradients(scaled)]
    before = weights_of(scaled)
    scaled.step(1e-3, scale=0.25)
    plain.step(1e-3, scale=1.0, load=loading(own))
    assert scaled.state_digest() == plain.state_digest()
    assert weights_of(scaled) != before
    assert scaled.version == 1
    assert not any(each.any() for each in gradients(scaled))


def test_averaged_gradient_replaces_the_own_one() -> None:
    """Oracle: two replicas with different microbatches that load the same average end with the same state."""
    replicas = [engine(2), engine(2)]
    for seed, replica in enumerate(replicas):
        replica.loss_and_backward(hidden(seed), tokens(seed))
    sums = [a + b for a, b in zip(*(gradients(replica) for replica in replicas), strict=True)]
    for replica in replicas:
        replica.step(1e-3, scale=1 / 64, load=loading(sums))
    assert replicas[0].state_digest() == replicas[1].state_digest()


@pytest.mark.parametrize("name", ["adamw8bit", "adamw32"])
def test_a_given_gradient_loses_what_stands_in_its_padding(name: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: the step from a gradient whose padding is zero; bytes from elsewhere may carry anything there, and it
    shares quantisation blocks with the tensors before it."""
    config = {**TINY, "hidden_size": 72, "num_attention_heads": 3, "num_key_value_heads": 3, "head_dim": 22}
    monkeypatch.setattr(layout, "SHARD_ELEMENTS", 8192)
    clean, dirty = (
        StageEngine.build(config, num_stages=3, stage=2, optimizer=OptimizerSpec(name=name), seed=1) for _ in range(2)
    )
    sums = [torch.randn(shard.num_elements, generator=torch.Generator().manual_seed(0)) for shard in clean.shards]
    assert len(sums) > len(clean._blocks)
    dirty.step(1e-3, scale=1.0, load=loading(sums))
    num_gaps = 0
    for shard, sum_ in zip(clean.shards, sums, strict=True):
        for start, end in shard.padding:
            sum_[start:end] = 0.0
            num_gaps += 1
    assert num_gaps > 4
    clean.step(1e-3, scale=1.0, load=loading(sums))
    assert clean.state_digest() == dirty.state_digest()


@pytest.mark.parametrize("wrong", [torch.ones(7), torch.ones(2)])
def test_a_gradient_of_another_size_is_no_gradient(wrong: torch.Tensor) -> None:
    """Oracle: whoever writes gets exactly the shard's elements to write to, in fp32."""
    own, seen = engine(2), []

    def load(number: int, out: torch.Tensor) -> None:
        seen.append((number, tuple(out.shape), out.dtype))
        out.copy_(wrong)

    with pytest.raises(RuntimeError):
        own.step(1e-3, scale=1.0, load=load)
    assert seen == [(0, (own.shards[0].num_elements,), torch.float32)]
    assert own.version == 0


@pytest.mark.parametrize("limit", [layout.SHARD_ELEMENTS, 8192])
def test_every_shard_is_asked_for_once_by_its_number(limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: the engine's list of shards."""
    monkeypatch.setattr(layout, "SHARD_ELEMENTS", limit)
    own = engine(2)
    asked: list[tuple[int, int]] = []

    def load(number: int, out: torch.Tensor) -> None:
        asked.append((number, len(out)))
        out.zero_()

    own.step(1e-3, scale=1.0, load=load)
    assert asked == [(number, shard.num_elements) for number, shard in enumerate(own.shards)]
    assert [len(sum_) for sum_ in own.gradient_shards()] == [shard.num_elements for shard in own.shards]


def test_a_step_inside_the_backward_pass_is_the_step_after_it() -> None:
    """Oracle: backward, then `step`, over two microbatches of which only the second steps; an open microbatch is
    recomputed after either."""
    inside, after = engine(2), engine(2)
    for own in (inside, after):
        own.loss_and_backward(hidden(0), tokens(0))
    own_results = inside.loss_wave([(hidden(1), tokens(1))], step=Step(1e-3, 1 / 64))
    their_results = [after.loss_and_backward(hidden(1), tokens(1))]
    after.step(1e-3, scale=1 / 64)
    assert inside.version == after.version == 1
    assert inside.state_digest() == after.state_digest()
    assert own_results[0].loss_sum == their_results[0].loss_sum
    assert not any(each.any() for each in gradients(inside))


def test_norm_is_that_of_all_shards() -> None:
    """Oracle: numpy's idea of a sum of squares, in double precision."""
    own = engine(2)
    own.loss_and_backward(hidden(), tokens())
    squares = sum((each.numpy().astype("f8") ** 2).sum() for each in gradients(own))
    assert own.gradient_norm() == pytest.approx(squares**0.5, rel=1e-12)


# --- state ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["adamw8bit", "adamw32"])
def test_a_saved_and_restored_stage_goes_on_bit_for_bit(name: Any, tmp_path: Path) -> None:
    """Oracle: the undisturbed engine, through real files."""

    def train(own: StageEngine, versions: range) -> None:
        for version in versions:
            own.loss_and_backward(hidden(version), tokens(version))
            own.step(1e-3, scale=1 / 32)

    undisturbed = engine(2, name=name)
    train(undisturbed, range(3))
    with (tmp_path / "weights").open("wb") as weights, (tmp_path / "optimizer").open("wb") as optimizer:
        undisturbed.write_state({"weights": weights, "optimizer": optimizer})
    restored = engine(2, name=name, seed=9)
    with (tmp_path / "weights").open("rb") as own_weights, (tmp_path / "optimizer").open("rb") as own_optimizer:
        restored.read_state({"weights": own_weights, "optimizer": own_optimizer}, version=Version(3))
    assert restored.version == 3
    for own in (undisturbed, restored):
        train(own, range(3, 6))
    assert restored.state_digest() == undisturbed.state_digest()


def test_loading_lets_go_of_what_belonged_to_the_old_state() -> None:
    """Oracle: gradients are zero, and an open microbatch is recomputed at the loaded weights."""
    own, other = engine(keep=PLENTY), engine(seed=9)
    _, ticket = own.forward(hidden())
    _, other_ticket = other.forward(hidden())
    poke.gradient(own).fill_(1.0)
    copy_state(own, other, 4)
    assert not any(each.any() for each in gradients(own))
    assert (own.version, own.statistics().kept_bytes) == (4, 0)
    back, other_back = own.backward(ticket, hidden(1)), other.backward(other_ticket, hidden(1))
    assert back is not None
    assert other_back is not None
    assert all_equal([back, *gradients(own)], [other_back, *gradients(other)])


def test_state_of_another_stage_is_refused_and_changes_nothing() -> None:
    """Oracle: StorageError, the digest from before, and the gradients. (What else is refused: test_statefiles.py.)"""
    own, other = engine(2), engine(1)
    own.loss_and_backward(hidden(), tokens())
    before, sums = own.state_digest(), gradients(own)
    with pytest.raises(StorageError):
        copy_state(own, other, 1)
    assert (own.state_digest(), own.version) == (before, 0)
    assert all_equal(gradients(own), sums)


@pytest.mark.parametrize("limit", [layout.SHARD_ELEMENTS, 8192])
def test_state_digest_is_of_the_step_count_and_every_shards_bytes(limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: SHA-256 by hand over the buffers, padding included, as docs/protocol.md could be checked with."""
    monkeypatch.setattr(layout, "SHARD_ELEMENTS", limit)
    own = engine(2)
    own.loss_and_backward(hidden(), tokens())
    own.step(1e-3, scale=1 / 32)
    expected = hashlib.sha256((1).to_bytes(8, "little"))
    for block, shards in enumerate(each.shards() for each in own._stage.layouts):
        for number, shard in enumerate(shards):
            flat = poke.weights(own, block)[shard.start : shard.stop]
            expected.update(
                hashlib.sha256(flat.numpy().tobytes() + poke.moments(own, block, number).numpy().tobytes()).digest()
            )
    assert own.state_digest() == expected.digest()


@pytest.mark.parametrize("limit", [layout.SHARD_ELEMENTS, 8192])
def test_state_digest_notices_every_tensor(limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: one changed byte anywhere changes it: in every tensor, every shard's moments, and the padding."""
    monkeypatch.setattr(layout, "SHARD_ELEMENTS", limit)
    own = engine(2)
    before = poke.digest(own)
    places: list[tuple[torch.Tensor, int]] = []
    for block, each in enumerate(own._stage.layouts):
        flat = poke.weights(own, block)
        places += [(flat, slot.offset) for slot in each.slots] + [(flat, slot.end - 1) for slot in each.slots]
        places += [(flat, start) for start, _ in each.padding()]
        for number in range(len(each.shards())):
            buffer = poke.moments(own, block, number)
            places += [(buffer, 0), (buffer, buffer.numel() - 1)]
    assert len(places) > 30
    for buffer, index in places:
        old = buffer[index].clone()
        buffer[index] = old + 1
        assert poke.digest(own) != before, index
        buffer[index] = old
    assert poke.digest(own) == before
    own.steps += 1
    assert poke.digest(own) != before


@pytest.mark.parametrize("limit", [layout.SHARD_ELEMENTS, 8192])
def test_the_digest_that_is_at_hand_after_a_step_is_that_of_the_state(
    limit: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: all shards, read again; after steps of every kind, a restored state and a step that failed half-way."""
    monkeypatch.setattr(layout, "SHARD_ELEMENTS", limit)
    own, other = engine(2), engine(2, seed=5)
    seen: list[Digest] = []

    def look() -> None:
        seen.append(own.state_digest())
        assert poke.digest(own) == seen[-1]

    def load(number: int, out: torch.Tensor) -> None:
        out.fill_(1.0)

    def failing(number: int, out: torch.Tensor) -> None:
        if number == len(own.shards) - 1:
            raise OSError(5, "Input/output error")
        out.fill_(1.0)

    look()
    own.step(1e-3, scale=1.0, load=load)
    look()
    own.loss_and_backward(hidden(), tokens())
    own.step(1e-3, scale=1.0)
    look()
    own.loss_wave([(hidden(), tokens())], step=Step(1e-3, 1.0))
    look()
    with pytest.raises(OSError, match="Input/output"):
        own.step(1e-3, scale=1.0, load=failing)
    look()
    copy_state(own, other, 1)
    look()
    assert len({*seen}) == len(seen)
    assert own.state_digest() == other.state_digest()


def test_digest_of_shards_is_of_their_order_and_of_all_their_bytes() -> None:
    """Oracle: pairs that differ in one thing."""
    weights, moments = torch.arange(6.0), torch.arange(9, dtype=torch.uint8)
    one, two = shard_digest(weights, moments), shard_digest(weights + 1, moments)
    assert one == shard_digest(weights.clone(), moments.clone())
    assert len({one, two, shard_digest(weights, moments + 1), shard_digest(weights[:5], moments)}) == 4
    digests = {state_digest(0, [one, two]), state_digest(0, [two, one]), state_digest(1, [one, two])}
    assert len(digests) == 3


def test_weight_tensors_are_copies() -> None:
    """Oracle: writing to them changes nothing here."""
    own = engine(2)
    before = own.state_digest()
    for tensor in own.weight_tensors().values():
        tensor.fill_(9.0)
    assert own.state_digest() == before


def test_engine_knows_its_place() -> None:
    """Oracle: the protocol's list of tensors."""
    for stage in range(3):
        own = engine(stage)
        expected = stage_tensors(TINY, 3, stage)
        assert list(own.weight_tensors()) == list(expected)
        assert own.num_parameters == sum(tensor.numel() for tensor in own.weight_tensors().values())
        assert {name: tuple(tensor.shape) for name, tensor in own.weight_tensors().items()} == expected
        assert (own.is_first, own.is_last) == (stage == 0, stage == 2)
        moments = sum(moment_bytes(shard, "adamw8bit") for shard in own.shards)
        assert own.state_bytes == moments + 4 * sum(shard.num_elements for shard in own.shards)


def test_a_table_in_several_blocks_is_one_tensor_to_everybody_else(monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: the protocol's list of tensors."""
    monkeypatch.setattr(architecture, "TABLE_ELEMENTS", 64 * 200)
    for stage in (0, 2):
        own = engine(stage)
        assert len(own._blocks) == {0: 3 + 1, 2: 2 + 3}[stage]
        assert {name: tuple(tensor.shape) for name, tensor in own.weight_tensors().items()} == stage_tensors(
            TINY, 3, stage
        )
