"""Cross-entropy of the head, summed over target tokens, without ever holding all logits.

Owns: the loss and its gradients by hand, chunk by chunk over tokens: the gradient of the head's weights is
added straight into its shard, so neither logits nor a second copy of a large head appear. Must not know:
stages, tickets.

A head that is too large for one block is gone through twice, block by block: `add_scores` collects each token's
normaliser and target, then `add_gradients` knows the softmax. That costs a third more arithmetic in the head, and
only one block of it has to be on the device.

Shapes: N tokens, C tokens of one chunk, D model width, V vocabulary, R rows of the head in one block. Arithmetic on
logits is fp32; sums over tokens are taken in fp64, so that the way the tokens are split hardly shows.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

IGNORED = -100
"""Label of a position that is no target, as in transformers."""

MAX_LOGIT_BYTES = 64 * 1024 * 1024  # 16,384 tokens of a vocabulary of 1,024; 130 tokens of one of 128,256


def count_targets(labels: Tensor) -> int:
    """Return how many positions have a target."""
    return int((labels != IGNORED).sum())


def chunk_tokens(vocabulary: int) -> int:
    """Return how many tokens are put through the head at once: a function of the model alone, for equal bits."""
    return max(1, MAX_LOGIT_BYTES // (4 * vocabulary))


@torch.no_grad()
def loss_sum_and_gradients(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    labels_N: Tensor,
    *,
    weight_gradient_VD: Tensor,  # (V, D), added to
    chunk: int | None = None,
) -> tuple[float, Tensor]:
    """Return the summed cross-entropy and its gradient by `hidden_ND`; add that by the weights in place."""
    total = 0.0
    gradient_ND = torch.empty_like(hidden_ND)
    for rows in _chunks(labels_N, chunk or chunk_tokens(weight_VD.shape[0])):
        logits_CV, targets_C, is_target_C = _logits(hidden_ND[rows], weight_VD, labels_N[rows])
        normaliser_C = torch.logsumexp(logits_CV, dim=-1)
        total += _chunk_loss(logits_CV, normaliser_C, targets_C, is_target_C)
        # softmax minus one-hot, in the logits' own memory
        logits_CV.sub_(normaliser_C[:, None]).exp_()
        logits_CV.scatter_add_(1, targets_C[:, None], logits_CV.new_full((targets_C.shape[0], 1), -1.0))
        logits_CV.mul_(is_target_C[:, None])
        by_logits_CV = logits_CV.to(weight_VD.dtype)
        torch.mm(by_logits_CV, weight_VD, out=gradient_ND[rows])
        weight_gradient_VD.addmm_(by_logits_CV.T, hidden_ND[rows])
    return total, gradient_ND


@dataclass(slots=True)
class Scores:
    """What the blocks of a head have said about each token so far."""

    normaliser_N: Tensor  # log of the sum of exp(logit) over the rows seen
    target_N: Tensor  # the target's logit; 0 until its row is seen

    @classmethod
    def before(cls, hidden_ND: Tensor) -> Scores:
        """Return the scores over no rows at all."""
        normaliser_N = hidden_ND.new_full((hidden_ND.shape[0],), float("-inf"), dtype=torch.float32)
        return cls(normaliser_N, torch.zeros_like(normaliser_N))

    def loss_sum(self, labels_N: Tensor) -> float:
        """Return the summed cross-entropy in nats, once all rows were seen."""
        return float(((self.normaliser_N - self.target_N).double() * (labels_N != IGNORED)).sum())


@torch.no_grad()
def add_scores(hidden_ND: Tensor, weight_RD: Tensor, labels_N: Tensor, scores: Scores, *, first_row: int) -> None:
    """Add the rows from `first_row` on to the scores."""
    for tokens in _chunks(labels_N, chunk_tokens(weight_RD.shape[0])):
        logits_CR = torch.mm(hidden_ND[tokens], weight_RD.T).float()
        normaliser_C = scores.normaliser_N[tokens]
        torch.logaddexp(normaliser_C, torch.logsumexp(logits_CR, dim=-1), out=normaliser_C)
        rows_C, is_here_C = _rows_here(labels_N[tokens], first_row, weight_RD.shape[0])
        scores.target_N[tokens] += logits_CR.gather(1, rows_C[:, None]).squeeze(1) * is_here_C


@torch.no_grad()
def add_gradients(
    hidden_ND: Tensor,
    weight_RD: Tensor,
    labels_N: Tensor,
    scores: Scores,
    *,
    first_row: int,
    gradient_ND: Tensor,  # added to
    weight_gradient_RD: Tensor,  # added to
) -> None:
    """Add what the rows from `first_row` on have to do with the gradients; the scores are those over all rows."""
    for tokens in _chunks(labels_N, chunk_tokens(weight_RD.shape[0])):
        by_logits_CR = torch.mm(hidden_ND[tokens], weight_RD.T).float()
        by_logits_CR.sub_(scores.normaliser_N[tokens, None]).exp_()
        rows_C, is_here_C = _rows_here(labels_N[tokens], first_row, weight_RD.shape[0])
        by_logits_CR.scatter_add_(1, rows_C[:, None], -is_here_C[:, None].to(by_logits_CR.dtype))
        by_logits_CR.mul_((labels_N[tokens] != IGNORED)[:, None])
        by_logits_CR = by_logits_CR.to(weight_RD.dtype)
        gradient_ND[tokens].addmm_(by_logits_CR, weight_RD)
        weight_gradient_RD.addmm_(by_logits_CR.T, hidden_ND[tokens])


def _rows_here(labels_C: Tensor, first_row: int, num_rows: int) -> tuple[Tensor, Tensor]:
    """Return each token's target as a row of this block (0 if it is elsewhere), and whether it is here."""
    rows_C = labels_C - first_row
    is_here_C = (labels_C != IGNORED) & (rows_C >= 0) & (rows_C < num_rows)
    return rows_C.where(is_here_C, 0), is_here_C


def _chunks(labels_N: Tensor, chunk: int) -> list[slice]:
    return [slice(start, start + chunk) for start in range(0, labels_N.shape[0], chunk)]


def _logits(hidden_CD: Tensor, weight_VD: Tensor, labels_C: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    is_target_C = labels_C != IGNORED
    return torch.mm(hidden_CD, weight_VD.T).float(), labels_C.where(is_target_C, 0), is_target_C


def _chunk_loss(logits_CV: Tensor, normaliser_C: Tensor, targets_C: Tensor, is_target_C: Tensor) -> float:
    losses_C = normaliser_C - logits_CV.gather(1, targets_C[:, None]).squeeze(1)
    return float((losses_C.double() * is_target_C).sum())
