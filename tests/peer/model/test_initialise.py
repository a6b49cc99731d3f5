"""Initial weights are a function of seed and name."""

from __future__ import annotations

import hashlib

import pytest
import torch

import peer.model.initialise as module
from peer.model.initialise import initialise


def drawn(name: str = "lm_head.weight", seed: int = 0, shape: tuple[int, ...] = (60, 50)) -> torch.Tensor:
    tensor = torch.full(shape, 7.0)
    initialise(tensor, name, seed=seed, deviation=0.02)
    return tensor


def test_values_are_the_same_on_every_machine() -> None:
    """Oracle: a recorded hash. If it changes, peers of two versions start one run with different weights."""
    recorded = hashlib.sha256(drawn(shape=(1000, 64)).numpy().tobytes()).hexdigest()
    assert recorded[:16] == "92dd24ea967c0086"


def test_matrices_are_normal_with_the_given_deviation() -> None:
    """Oracle: moments of a normal distribution, within five standard errors of 240,000 draws."""
    values = drawn(shape=(600, 400)).double().flatten() / 0.02
    assert abs(float(values.mean())) < 5 / 240_000**0.5
    assert abs(float(values.var()) - 1) < 5 * (2 / 240_000) ** 0.5
    assert abs(float((values**4).mean()) - 3) < 5 * (96 / 240_000) ** 0.5


def test_seed_and_name_both_matter() -> None:
    """Oracle: equal arguments, equal values; one changed, no value equal."""
    assert torch.equal(drawn(), drawn())
    assert not (drawn() == drawn(seed=1)).any()
    assert not (drawn() == drawn("model.embed_tokens.weight")).any()


def test_drawing_in_pieces_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: the same tensor drawn at once."""
    whole = drawn()
    monkeypatch.setattr(module, "DRAW_ELEMENTS", 700)
    assert torch.equal(drawn(), whole)


def test_norms_are_one_biases_zero_and_the_padding_token_has_no_embedding() -> None:
    """Oracle: transformers' `_init_weights`."""
    assert torch.equal(drawn("model.norm.weight", shape=(5,)), torch.ones(5))
    assert torch.equal(drawn("model.layers.0.self_attn.q_proj.bias", shape=(5,)), torch.zeros(5))
    embedding = torch.ones(4, 8)
    initialise(embedding, "model.embed_tokens.weight", seed=0, deviation=0.02, pad_token=2)
    assert (embedding == 0).all(dim=1).tolist() == [False, False, True, False]


def test_blocks_of_rows_have_streams_of_their_own() -> None:
    """Oracle: the first block is drawn as a whole table would be, and no value of another one is the same."""
    first, second = torch.zeros(30, 50), torch.zeros(30, 50)
    initialise(first, "lm_head.weight", seed=0, deviation=0.02, first_row=0)
    initialise(second, "lm_head.weight", seed=0, deviation=0.02, first_row=30)
    assert torch.equal(first, drawn()[:30])
    assert not (second == first).any()
    assert not (second == drawn()[30:]).any()


@pytest.mark.parametrize(("pad_token", "zero"), [(9, []), (10, [0]), (13, [3]), (14, [])])
def test_the_padding_token_has_no_embedding_in_whichever_block_it_is(pad_token: int, zero: list[int]) -> None:
    """Oracle: rows 10 to 13 are here."""
    embedding = torch.ones(4, 8)
    initialise(embedding, "model.embed_tokens.weight", seed=0, deviation=0.02, pad_token=pad_token, first_row=10)
    assert (embedding == 0).all(dim=1).nonzero().flatten().tolist() == zero
