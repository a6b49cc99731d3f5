"""One engine: what it keeps, what it refuses, and how it goes from version to version."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from peer.engine.optimizer import OptimizerSpec
from peer.engine.stage_engine import StageEngine, Ticket
from peer.engine.state import tensors_digest
from protocol.architecture import preset, stage_tensors
from protocol.errors import CorpusError, LocalFault, PeerFault, StorageError
from protocol.ids import Version, digest

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


def gradients(of: StageEngine) -> list[torch.Tensor]:
    return [shard.gradient.clone() for shard in of.shards]


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

    too_tight = engine(keep=cost - 1)  # even the first, that has to be measured, is let go again
    too_tight.forward(hidden())
    assert too_tight.statistics().kept_bytes == 0


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
        own.load_gradient(0, torch.ones_like(own.shards[0].gradient))
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
    before = [shard.gradient.data_ptr() for shard in own.shards]
    own.loss_and_backward(hidden(), tokens())
    assert [shard.gradient.data_ptr() for shard in own.shards] == before
    for shard in own.shards:
        assert all(shard.gradient_view(slot).any() for slot in shard.layout.slots)
        assert not any(shard.gradient[start:end].any() for start, end in shard.layout.padding())


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
        own.shards[0].weights[0] = float("nan")
    with pytest.raises(LocalFault, match="hidden states"):
        middle.forward(hidden())
    for call in (last.loss_and_backward, last.evaluate):
        with pytest.raises(LocalFault, match="hidden states"):
            call(hidden(), tokens())
    assert not any(each.any() for each in gradients(last))

    own = engine()
    own.shards[1].gradient[7] = float("inf")
    before = own.weights_digest()
    with pytest.raises(LocalFault, match=r"shard layer\.2"):
        own.step(1e-3, scale=1.0)
    assert (own.version, own.weights_digest()) == (0, before)


# --- steps ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["adamw8bit", "adamw32"])
def test_step_applies_the_scaled_gradient_clears_it_and_counts(name: Any) -> None:
    """Oracle: an engine that is given the scaled gradient itself (a power of two, so that scaling is exact)."""
    scaled, plain = engine(2, name=name), engine(2, name=name)
    scaled.loss_and_backward(hidden(), tokens())
    for index, shard in enumerate(scaled.shards):
        plain.load_gradient(index, shard.gradient * 0.25)
    before = scaled.weights_digest()
    scaled.step(1e-3, scale=0.25)
    plain.step(1e-3, scale=1.0)
    assert scaled.state_digest() == plain.state_digest()
    assert scaled.weights_digest() != before
    assert scaled.version == 1
    assert not any(each.any() for each in gradients(scaled))


def test_averaged_gradient_replaces_the_own_one() -> None:
    """Oracle: two replicas with different microbatches that load the same average end with the same state."""
    replicas = [engine(2), engine(2)]
    for seed, replica in enumerate(replicas):
        replica.loss_and_backward(hidden(seed), tokens(seed))
    sums = [a + b for a, b in zip(*(gradients(replica) for replica in replicas), strict=True)]
    for replica in replicas:
        for index, each in enumerate(sums):
            replica.load_gradient(index, each)
        replica.step(1e-3, scale=1 / 64)
    assert replicas[0].state_digest() == replicas[1].state_digest()


def test_norm_is_that_of_all_shards() -> None:
    """Oracle: numpy's idea of a sum of squares, in double precision."""
    own = engine(2)
    own.loss_and_backward(hidden(), tokens())
    squares = sum((each.numpy().astype("f8") ** 2).sum() for each in gradients(own))
    assert own.gradient_norm() == pytest.approx(squares**0.5, rel=1e-12)


# --- state ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["adamw8bit", "adamw32"])
def test_a_saved_and_restored_stage_goes_on_bit_for_bit(name: Any, tmp_path: Path) -> None:
    """Oracle: the undisturbed engine, through a real safetensors file."""

    def train(own: StageEngine, versions: range) -> None:
        for version in versions:
            own.loss_and_backward(hidden(version), tokens(version))
            own.step(1e-3, scale=1 / 32)

    undisturbed = engine(2, name=name)
    train(undisturbed, range(3))
    save_file(undisturbed.state_tensors(), tmp_path / "stage.safetensors")
    restored = engine(2, name=name, seed=9)
    restored.load_state_tensors(load_file(tmp_path / "stage.safetensors"), version=Version(3))
    assert restored.version == 3
    for own in (undisturbed, restored):
        train(own, range(3, 6))
    assert restored.state_digest() == undisturbed.state_digest()


def test_loading_lets_go_of_what_belonged_to_the_old_state() -> None:
    """Oracle: gradients are zero, and an open microbatch is recomputed at the loaded weights."""
    own, other = engine(keep=PLENTY), engine(seed=9)
    _, ticket = own.forward(hidden())
    _, other_ticket = other.forward(hidden())
    own.shards[0].gradient.fill_(1.0)
    own.load_state_tensors(other.state_tensors(), version=Version(4))
    back, other_back = own.backward(ticket, hidden(1)), other.backward(other_ticket, hidden(1))
    assert back is not None
    assert other_back is not None
    assert all_equal([back, *gradients(own)], [other_back, *gradients(other)])


@pytest.mark.parametrize("damage", ["weight", "optimizer"])
def test_state_of_another_stage_is_refused_and_changes_nothing(damage: str) -> None:
    """Oracle: StorageError and the digest from before."""
    own = engine(2)
    tensors = {key: torch.zeros_like(tensor) for key, tensor in own.state_tensors().items()}
    del tensors["model.norm.weight" if damage == "weight" else "optimizer.steps"]
    before = own.state_digest()
    with pytest.raises(StorageError):
        own.load_state_tensors(tensors, version=Version(1))
    assert (own.state_digest(), own.version) == (before, 0)


def test_weights_digest_covers_the_tensors_in_order_and_no_padding() -> None:
    """Oracle: SHA-256 over the bytes as safetensors would write them."""
    own = engine(2)
    expected = digest(*(tensor.numpy().tobytes() for tensor in own.weight_tensors().values()))
    assert own.weights_digest() == expected
    start, _ = next(own.shards[-1].layout.padding())
    own.shards[-1].weights[start] = 1.0
    assert own.weights_digest() == expected
    own.shards[-1].weights[0] += 1.0
    assert own.weights_digest() != expected


def test_state_digest_notices_every_tensor() -> None:
    """Oracle: one changed byte anywhere changes it."""
    own = engine(2)
    before = own.state_digest()
    for name, tensor in own.state_tensors().items():
        if name == "optimizer.steps":
            continue  # a copy; checked by the test that continues bit for bit
        flat = tensor.view(-1)
        old = flat[-1].clone()
        flat[-1] = old + 1
        assert own.state_digest() != before, name
        flat[-1] = old
    assert own.state_digest() == before


def test_digest_is_of_elements_whatever_their_layout_in_memory() -> None:
    """Oracle: the contiguous copy."""
    matrix = torch.arange(12.0).view(3, 4).T
    assert tensors_digest([matrix]) == tensors_digest([matrix.contiguous()]) != tensors_digest([matrix.T])


def test_engine_knows_its_place() -> None:
    """Oracle: the protocol's list of tensors."""
    for stage in range(3):
        own = engine(stage)
        expected = stage_tensors(TINY, 3, stage)
        assert list(own.weight_tensors()) == list(expected)
        assert own.num_parameters == sum(tensor.numel() for tensor in own.weight_tensors().values())
        assert (own.is_first, own.is_last) == (stage == 0, stage == 2)
