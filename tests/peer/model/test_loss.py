"""The head's loss and gradients by hand, against autograd."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch.nn import functional

from peer.model import loss as module
from peer.model.loss import (
    IGNORED,
    MAX_LOGIT_BYTES,
    Scores,
    add_gradients,
    add_scores,
    chunk_tokens,
    count_targets,
    loss_sum_and_gradients,
)


@pytest.fixture
def head() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    hidden = torch.randn(37, 16, generator=generator)
    weight = torch.randn(50, 16, generator=generator)
    labels = torch.randint(0, 50, (37,), generator=generator)
    labels[[0, 5, 36]] = IGNORED
    return hidden, weight, labels


@pytest.mark.parametrize("chunk", [None, 1, 8, 36, 37, 1000])
def test_loss_and_gradients_are_autograds(
    head: tuple[torch.Tensor, torch.Tensor, torch.Tensor], chunk: int | None
) -> None:
    """Oracle: torch's cross_entropy in double precision, over all tokens at once."""
    hidden, weight, labels = head
    hidden_64, weight_64 = hidden.double().requires_grad_(), weight.double().requires_grad_()
    expected = functional.cross_entropy(hidden_64 @ weight_64.T, labels, reduction="sum", ignore_index=IGNORED)
    torch.autograd.backward([expected])
    assert hidden_64.grad is not None
    assert weight_64.grad is not None

    weight_gradient = torch.ones_like(weight)  # what an earlier microbatch left
    loss, gradient = loss_sum_and_gradients(hidden, weight, labels, weight_gradient_VD=weight_gradient, chunk=chunk)
    assert loss == pytest.approx(expected.item(), rel=1e-6)
    torch.testing.assert_close(gradient, hidden_64.grad.float(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(weight_gradient, 1 + weight_64.grad.float(), rtol=1e-5, atol=1e-5)
    assert (gradient[labels == IGNORED] == 0).all()


@pytest.mark.parametrize("chunk", [1, 8, 37])
@pytest.mark.parametrize("borders", [(0, 50), (0, 1, 50), (0, 20, 21, 49, 50), tuple(range(51))])
def test_a_head_in_pieces_is_the_whole_one(
    head: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    monkeypatch: pytest.MonkeyPatch,
    borders: tuple[int, ...],
    chunk: int,
) -> None:
    """Oracle: torch's cross_entropy in double precision, over all tokens and rows at once; sums are added to."""
    monkeypatch.setattr(module, "chunk_tokens", lambda vocabulary: chunk)
    hidden, weight, labels = head
    hidden_64, weight_64 = hidden.double().requires_grad_(), weight.double().requires_grad_()
    expected = functional.cross_entropy(hidden_64 @ weight_64.T, labels, reduction="sum", ignore_index=IGNORED)
    torch.autograd.backward([expected])
    assert hidden_64.grad is not None
    assert weight_64.grad is not None

    pieces = [slice(start, end) for start, end in itertools.pairwise(borders)]
    scores = Scores.before(hidden)
    for rows in pieces:
        add_scores(hidden, weight[rows], labels, scores, first_row=rows.start)
    assert scores.loss_sum(labels) == pytest.approx(expected.item(), rel=1e-6)
    gradient, weight_gradient = torch.ones_like(hidden), torch.ones_like(weight)
    for rows in pieces:
        add_gradients(
            hidden,
            weight[rows],
            labels,
            scores,
            first_row=rows.start,
            gradient_ND=gradient,
            weight_gradient_RD=weight_gradient[rows],
        )
    torch.testing.assert_close(gradient, 1 + hidden_64.grad.float(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(weight_gradient, 1 + weight_64.grad.float(), rtol=1e-5, atol=1e-5)
    assert (gradient[labels == IGNORED] == 1).all()


def test_one_piece_scores_the_very_loss_of_the_whole_head(
    head: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
) -> None:
    """Oracle: training's own, bit for bit; evaluation goes by scores and training does not."""
    hidden, weight, labels = head
    scores = Scores.before(hidden)
    add_scores(hidden, weight, labels, scores, first_row=0)
    loss, _ = loss_sum_and_gradients(hidden, weight, labels, weight_gradient_VD=torch.zeros_like(weight))
    assert scores.loss_sum(labels) == loss


def test_only_ignored_labels_give_no_loss_and_no_gradient() -> None:
    """Oracle: zero."""
    labels = torch.full((4,), IGNORED)
    gradient = torch.zeros(9, 8)
    loss, by_hidden = loss_sum_and_gradients(torch.ones(4, 8), torch.ones(9, 8), labels, weight_gradient_VD=gradient)
    assert (loss, count_targets(labels)) == (0.0, 0)
    assert not by_hidden.any()
    assert not gradient.any()


def test_large_logits_do_not_overflow() -> None:
    """Oracle: the difference of the two logits, where exp() of either would be infinite."""
    hidden, weight = torch.tensor([[1000.0]]), torch.tensor([[1.0], [2.0]])
    loss, _ = loss_sum_and_gradients(hidden, weight, torch.tensor([0]), weight_gradient_VD=torch.zeros_like(weight))
    assert loss == 1000.0
    scores = Scores.before(hidden)
    for row in (0, 1):
        add_scores(hidden, weight[row : row + 1], torch.tensor([0]), scores, first_row=row)
    assert scores.loss_sum(torch.tensor([0])) == 1000.0


@pytest.mark.parametrize("vocabulary", [1024, 128_256, 10**9])
def test_chunk_keeps_logits_under_the_limit(vocabulary: int) -> None:
    """Oracle: bytes of a chunk's logits, unless a single token is over the limit."""
    tokens = chunk_tokens(vocabulary)
    assert tokens == 1 or tokens * vocabulary * 4 <= MAX_LOGIT_BYTES < (tokens + 1) * vocabulary * 4
