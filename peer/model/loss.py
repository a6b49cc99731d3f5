"""Cross-entropy of the head, summed over target tokens, without ever holding all logits.

Owns: the loss and its gradients by hand, chunk by chunk over tokens: the gradient of the head's weights is
added straight into its shard, so neither logits nor a second copy of a large head appear. Must not know:
stages, tickets.

Shapes: N tokens, C tokens of one chunk, D model width, V vocabulary. Arithmetic on logits is fp32; sums over
tokens are taken in fp64, so that the way the tokens are split hardly shows.
"""

from __future__ import annotations

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
def loss_sum(
    hidden_ND: Tensor,  # (N, D) after the final norm
    weight_VD: Tensor,  # (V, D)
    labels_N: Tensor,  # (N,) int64, `IGNORED` where there is no target
    *,
    chunk: int | None = None,
) -> float:
    """Return the summed cross-entropy in nats."""
    total = 0.0
    for rows in _chunks(labels_N, chunk or chunk_tokens(weight_VD.shape[0])):
        logits_CV, targets_C, is_target_C = _logits(hidden_ND[rows], weight_VD, labels_N[rows])
        total += _chunk_loss(logits_CV, torch.logsumexp(logits_CV, dim=-1), targets_C, is_target_C)
    return total


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


def _chunks(labels_N: Tensor, chunk: int) -> list[slice]:
    return [slice(start, start + chunk) for start in range(0, labels_N.shape[0], chunk)]


def _logits(hidden_CD: Tensor, weight_VD: Tensor, labels_C: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    is_target_C = labels_C != IGNORED
    return torch.mm(hidden_CD, weight_VD.T).float(), labels_C.where(is_target_C, 0), is_target_C


def _chunk_loss(logits_CV: Tensor, normaliser_C: Tensor, targets_C: Tensor, is_target_C: Tensor) -> float:
    losses_C = normaliser_C - logits_CV.gather(1, targets_C[:, None]).squeeze(1)
    return float((losses_C.double() * is_target_C).sum())
